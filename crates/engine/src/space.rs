//! The tuples that a load core may use, as arithmetic: how many, and which is the n-th. Nothing is stored per tuple.
//!
//! Decides the order in which tuples are used. Knows no connection.

use std::net::{IpAddr, SocketAddr};

/// `count` addresses in a row from `first`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Addresses {
    /// The first.
    pub first: IpAddr,
    /// How many; the range stays inside its family.
    pub count: u64,
}

/// Ports `first..=last`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ports {
    /// The first.
    pub first: u16,
    /// The last, not below the first.
    pub last: u16,
}

/// Source addresses x source ports x destination addresses x destination ports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Space {
    /// Local addresses.
    pub sources: Vec<Addresses>,
    /// Local ports.
    pub source_ports: Vec<Ports>,
    /// Peer addresses.
    pub destinations: Vec<Addresses>,
    /// Peer ports.
    pub destination_ports: Vec<Ports>,
}

impl Space {
    /// Number of tuples.
    pub fn size(&self) -> u128 {
        todo!()
    }

    /// The `index`-th tuple: source address fastest (it spreads best over the kernel's hash and over NIC queues), then
    /// destination, then source port slowest, so that a part of the space uses few ports on every address.
    pub fn nth(&self, index: u128) -> Option<(SocketAddr, SocketAddr)> {
        let _ = index;
        todo!()
    }
}
