//! The tuples that a load core may use, as arithmetic: how many, and which is the n-th. Nothing is stored per tuple.
//!
//! Decides the order in which tuples are used. Knows no connection.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

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
    /// Number of tuples. A product above 2^128 (two /64 prefixes facing each other on every port make 2^160) is given as
    /// `u128::MAX`: no one walks that far.
    pub fn size(&self) -> u128 {
        self.pairs().saturating_mul(port_count(&self.source_ports))
    }

    /// Number of (source address, destination endpoint) pairs.
    pub fn pairs(&self) -> u128 {
        address_count(&self.sources).saturating_mul(self.endpoints())
    }

    /// Number of destination endpoints.
    pub fn endpoints(&self) -> u128 {
        address_count(&self.destinations).saturating_mul(port_count(&self.destination_ports))
    }

    /// The `index`-th tuple: source address fastest (it spreads best over the kernel's hash and over NIC queues), then
    /// destination address, destination port, and source port slowest, so that a part of the space uses few ports on every
    /// address.
    pub fn nth(&self, index: u128) -> Option<(SocketAddr, SocketAddr)> {
        let pairs = self.pairs();
        let (source, destination) = self.nth_pair(index.checked_rem(pairs)?)?;
        let port = nth_port(&self.source_ports, index / pairs)?;
        Some((SocketAddr::new(source, port), destination))
    }

    /// The `index`-th pair, in the order of [`Space::nth`].
    pub fn nth_pair(&self, index: u128) -> Option<(IpAddr, SocketAddr)> {
        let sources = address_count(&self.sources);
        let source = nth_address(&self.sources, index.checked_rem(sources)?)?;
        Some((source, self.nth_endpoint(index / sources)?))
    }

    /// The `index`-th destination endpoint, address fastest.
    pub fn nth_endpoint(&self, index: u128) -> Option<SocketAddr> {
        let addresses = address_count(&self.destinations);
        let address = nth_address(&self.destinations, index.checked_rem(addresses)?)?;
        Some(SocketAddr::new(address, nth_port(&self.destination_ports, index / addresses)?))
    }
}

fn address_count(ranges: &[Addresses]) -> u128 {
    ranges.iter().map(|range| u128::from(range.count)).sum()
}

fn port_count(ranges: &[Ports]) -> u128 {
    ranges.iter().map(ports_in).sum()
}

fn ports_in(range: &Ports) -> u128 {
    (u128::from(range.last) + 1).saturating_sub(u128::from(range.first))
}

fn nth_address(ranges: &[Addresses], mut index: u128) -> Option<IpAddr> {
    for range in ranges {
        let count = u128::from(range.count);
        if index < count {
            return match range.first {
                IpAddr::V4(first) => {
                    u32::try_from(u128::from(first.to_bits()) + index).ok().map(|bits| Ipv4Addr::from_bits(bits).into())
                }
                IpAddr::V6(first) => first.to_bits().checked_add(index).map(|bits| Ipv6Addr::from_bits(bits).into()),
            };
        }
        index -= count;
    }
    None
}

fn nth_port(ranges: &[Ports], mut index: u128) -> Option<u16> {
    for range in ranges {
        if index < ports_in(range) {
            return Some(range.first + index as u16);
        }
        index -= ports_in(range);
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn addresses(first: &str, count: u64) -> Addresses {
        Addresses { first: first.parse().expect("an address"), count }
    }

    fn ports(first: u16, last: u16) -> Ports {
        Ports { first, last }
    }

    #[test]
    fn textbook_sizes_are_exact() {
        let mut space = Space {
            sources: vec![addresses("10.0.0.1", 1)],
            source_ports: vec![ports(1, 65535)],
            destinations: vec![addresses("10.0.1.1", 1)],
            destination_ports: vec![ports(443, 443)],
        };
        assert_eq!(space.size(), 65_535);
        space.sources = vec![addresses("0.0.0.0", 1 << 32)];
        space.source_ports = vec![ports(0, 65535)];
        assert_eq!(space.size(), 1 << 48);
        space.sources = vec![addresses("2001:db8::", u64::MAX)];
        assert_eq!(space.size(), u128::from(u64::MAX) << 16);
        space.destinations = vec![addresses("2001:db8:1::", u64::MAX)];
        space.destination_ports = vec![ports(0, 65535)];
        assert_eq!(space.size(), u128::MAX, "2^160 does not fit and says so");
        space.destination_ports.clear();
        assert_eq!((space.size(), space.nth(0)), (0, None));
    }

    #[test]
    fn order_is_source_address_then_destination_then_source_port() {
        let space = Space {
            sources: vec![addresses("10.0.0.1", 1), addresses("10.9.0.1", 1)],
            source_ports: vec![ports(1000, 1000), ports(2000, 2000)],
            destinations: vec![addresses("10.1.0.1", 2)],
            destination_ports: vec![ports(80, 81)],
        };
        let shown: Vec<String> = (0..space.size())
            .map(|index| space.nth(index).map(|(from, to)| format!("{from}>{to}")).expect("in"))
            .collect();
        assert_eq!(shown[0], "10.0.0.1:1000>10.1.0.1:80");
        assert_eq!(shown[1], "10.9.0.1:1000>10.1.0.1:80");
        assert_eq!(shown[2], "10.0.0.1:1000>10.1.0.2:80");
        assert_eq!(shown[4], "10.0.0.1:1000>10.1.0.1:81");
        assert_eq!(shown[8], "10.0.0.1:2000>10.1.0.1:80");
        assert_eq!((shown.len(), space.nth(16)), (16, None));
    }

    #[test]
    fn a_range_that_leaves_its_family_ends_there() {
        let space = Space {
            sources: vec![addresses("255.255.255.255", 2)],
            source_ports: vec![ports(1, 1)],
            destinations: vec![addresses("10.0.0.1", 1)],
            destination_ports: vec![ports(1, 1)],
        };
        assert!(space.nth(0).is_some());
        assert_eq!(space.nth(1), None);
    }

    proptest! {
        #[test]
        fn every_index_is_another_tuple(
            sources in 1u64..5, low in 1u16..100, width in 0u16..6, gap in 1u16..9, destinations in 1u64..4, six: bool
        ) {
            let (source, destination) = if six { ("2001:db8::ffff", "2001:db8:1::1") } else { ("127.0.0.250", "10.0.0.255") };
            let second = low + width + gap;
            let space = Space {
                sources: vec![addresses(source, sources)],
                source_ports: vec![ports(low, low + width), ports(second, second + width)],
                destinations: vec![addresses(destination, destinations)],
                destination_ports: vec![ports(7, 8)],
            };
            let seen: HashSet<_> = (0..space.size()).map(|index| space.nth(index).expect("inside")).collect();
            prop_assert_eq!(seen.len() as u128, space.size());
            prop_assert_eq!(space.size(), u128::from(sources * destinations) * 2 * 2 * u128::from(width + 1));
            prop_assert_eq!(space.nth(space.size()), None);
        }
    }
}
