//! How many connections each source prefix and each service has: rows exist only while there are some.
//!
//! Decides what a source is for the limits: an IPv4 address, or an IPv6 /64, which is what one customer is given
//! (RFC 6177). Knows no limit.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;

/// A source as limits see it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Prefix {
    V4(u32),
    V6(u64),
}

impl Prefix {
    pub(super) fn of(address: IpAddr) -> Prefix {
        match address.to_canonical() {
            IpAddr::V4(address) => Prefix::V4(address.into()),
            IpAddr::V6(address) => Prefix::V6((u128::from(address) >> 64) as u64),
        }
    }
}

/// Rows by key, each with a number that names it and how many use it.
#[derive(Debug)]
pub(super) struct Counts<K> {
    by_key: HashMap<K, u32>,
    rows: Vec<(K, u32)>,
    free: Vec<u32>,
}

impl<K: Clone + Eq + Hash> Counts<K> {
    pub(super) fn new() -> Counts<K> {
        Counts { by_key: HashMap::new(), rows: Vec::new(), free: Vec::new() }
    }

    /// One more of `key`; returns its row.
    pub(super) fn add<Q: ?Sized + Eq + Hash + ToOwned<Owned = K>>(&mut self, key: &Q) -> u32
    where
        K: std::borrow::Borrow<Q>,
    {
        if let Some(&row) = self.by_key.get(key) {
            self.rows[row as usize].1 += 1;
            return row;
        }
        let key = key.to_owned();
        let row = match self.free.pop() {
            Some(row) => {
                self.rows[row as usize] = (key.clone(), 1);
                row
            }
            None => {
                self.rows.push((key.clone(), 1));
                self.rows.len() as u32 - 1
            }
        };
        self.by_key.insert(key, row);
        row
    }

    pub(super) fn less(&mut self, row: u32) {
        let (key, count) = &mut self.rows[row as usize];
        *count -= 1;
        if *count == 0 {
            self.by_key.remove(key);
            self.free.push(row);
        }
    }

    pub(super) fn count(&self, row: u32) -> u32 {
        self.rows[row as usize].1
    }

    pub(super) fn key(&self, row: u32) -> &K {
        &self.rows[row as usize].0
    }

    pub(super) fn total(&self) -> u64 {
        self.by_key.values().map(|&row| u64::from(self.count(row))).sum()
    }
}
