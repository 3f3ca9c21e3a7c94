//! How many connections each source prefix and each service has: rows exist only while there are some.
//!
//! Decides what a source is for the limits: an IPv4 address, or an IPv6 /64, which is what one customer is given
//! (RFC 6177). Knows no limit.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;

use foldhash::fast::RandomState;

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

impl From<&Prefix> for Prefix {
    fn from(prefix: &Prefix) -> Prefix {
        *prefix
    }
}

/// Rows by key, each with a number that names it and how many use it.
#[derive(Debug)]
pub(super) struct Counts<K> {
    by_key: HashMap<K, u32, RandomState>,
    rows: Vec<Row<K>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Row<K> {
    key: K,
    count: u32,
    /// Of whoever keeps something about the key; a row with one stays.
    tag: u32,
}

impl<K: Clone + Eq + Hash> Counts<K> {
    pub(super) fn new() -> Counts<K> {
        Counts { by_key: HashMap::default(), rows: Vec::new(), free: Vec::new() }
    }

    /// One more of `key`; returns its row.
    pub(super) fn add<Q: ?Sized + Eq + Hash>(&mut self, key: &Q) -> u32
    where
        K: Borrow<Q> + for<'a> From<&'a Q>,
    {
        let row = self.row(key);
        self.rows[row as usize].count += 1;
        row
    }

    /// The row of `key`, made if there is none. Whoever makes one adds to it or tags it.
    pub(super) fn row<Q: ?Sized + Eq + Hash>(&mut self, key: &Q) -> u32
    where
        K: Borrow<Q> + for<'a> From<&'a Q>,
    {
        if let Some(row) = self.find(key) {
            return row;
        }
        let key = K::from(key);
        let new = Row { key: key.clone(), count: 0, tag: 0 };
        let row = match self.free.pop() {
            Some(row) => {
                self.rows[row as usize] = new;
                row
            }
            None => {
                self.rows.push(new);
                self.rows.len() as u32 - 1
            }
        };
        self.by_key.insert(key, row);
        row
    }

    /// The row of `key`, if there is one.
    pub(super) fn find<Q: ?Sized + Eq + Hash>(&self, key: &Q) -> Option<u32>
    where
        K: std::borrow::Borrow<Q>,
    {
        self.by_key.get(key).copied()
    }

    pub(super) fn less(&mut self, row: u32) {
        self.rows[row as usize].count -= 1;
        self.free_if_unused(row);
    }

    pub(super) fn tag(&self, row: u32) -> u32 {
        self.rows[row as usize].tag
    }

    /// 0 is none.
    pub(super) fn set_tag(&mut self, row: u32, tag: u32) {
        self.rows[row as usize].tag = tag;
        self.free_if_unused(row);
    }

    fn free_if_unused(&mut self, row: u32) {
        let Row { key, count, tag } = &self.rows[row as usize];
        if (*count, *tag) == (0, 0) {
            self.by_key.remove(key);
            self.free.push(row);
        }
    }

    pub(super) fn count(&self, row: u32) -> u32 {
        self.rows[row as usize].count
    }

    /// The count of a row, whether it is in use or not; None behind the last.
    pub(super) fn count_at(&self, row: u32) -> Option<u32> {
        self.rows.get(row as usize).map(|row| row.count)
    }

    pub(super) fn key(&self, row: u32) -> &K {
        &self.rows[row as usize].key
    }

    pub(super) fn total(&self) -> u64 {
        self.by_key.values().map(|&row| u64::from(self.count(row))).sum()
    }
}
