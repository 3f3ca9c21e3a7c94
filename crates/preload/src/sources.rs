//! Which addresses a program's connections may come from, and which of them is next. Knows no socket and no process.
//!
//! Loopback is kept apart: a destination on loopback is reached from loopback sources or left alone, and no other
//! destination is reached from them (the kernel answers EINVAL, __mkroute_output).

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::sync::atomic::{AtomicU64, Ordering};

/// Runs of addresses per family; `fourtuple run` refuses more before a program starts.
pub(crate) const MOST_RUNS: usize = 64;

const LOOPBACK_V4: (u128, u128) = (0x7f00_0000, 0x7fff_ffff);
const LOOPBACK_V6: (u128, u128) = (1, 1);

/// Why a text is no set of sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// A part is neither ADDRESS nor PREFIX/LENGTH nor FIRST-LAST.
    Form,
    /// A range goes downward, or its ends are of two families.
    Backward,
    /// A prefix has bits set beyond its length.
    HostBits,
    /// Multicast, unspecified, reserved or IPv4-mapped: no connection can come from there.
    Unusable,
    /// More runs than there is room for, or as many addresses as no counter holds.
    TooMany,
}

impl Refused {
    /// The end of a sentence that begins with the text.
    pub(crate) fn why(self) -> &'static str {
        match self {
            Refused::Form => "needs ADDRESS, PREFIX/LENGTH or FIRST-LAST with commas between them",
            Refused::Backward => "has a range that does not go upward inside one family",
            Refused::HostBits => "has a prefix with bits set beyond its length",
            Refused::Unusable => "has addresses that no connection can come from",
            Refused::TooMany => "has more than 64 ranges of one family, or too many addresses",
        }
    }
}

/// Addresses of one kind, as runs of integers.
pub(crate) struct Pool {
    runs: [(u128, u128); MOST_RUNS],
    count: usize,
    size: u128,
    v6: bool,
}

impl Pool {
    const fn new(v6: bool) -> Pool {
        Pool { runs: [(0, 0); MOST_RUNS], count: 0, size: 0, v6 }
    }

    /// How many addresses; an address named twice counts twice.
    pub(crate) fn size(&self) -> u128 {
        self.size
    }

    /// The address at this place, counted from 0 and round and round; None only if there is none at all.
    pub(crate) fn nth(&self, place: u128) -> Option<IpAddr> {
        let mut rest = place.checked_rem(self.size)?;
        for &(first, last) in self.runs.iter().take(self.count) {
            let length = last.wrapping_sub(first).wrapping_add(1);
            if rest < length {
                let number = first.wrapping_add(rest);
                return Some(if self.v6 {
                    IpAddr::V6(Ipv6Addr::from_bits(number))
                } else {
                    IpAddr::V4(Ipv4Addr::from_bits(number as u32))
                });
            }
            rest = rest.wrapping_sub(length);
        }
        None
    }

    fn add(&mut self, first: u128, last: u128) -> Result<(), Refused> {
        let length = last.wrapping_sub(first).checked_add(1).ok_or(Refused::TooMany)?;
        self.size = self.size.checked_add(length).ok_or(Refused::TooMany)?;
        *self.runs.get_mut(self.count).ok_or(Refused::TooMany)? = (first, last);
        self.count = self.count.wrapping_add(1);
        Ok(())
    }
}

/// Every source, by what it can reach.
pub(crate) struct Sources {
    v4: Pool,
    v4_loopback: Pool,
    v6: Pool,
    v6_loopback: Pool,
}

impl Sources {
    /// Read "10.0.0.0/16,10.7.0.1-10.7.0.9,2001:db8::/64": both families may be mixed.
    pub(crate) fn parse(text: &str) -> Result<Sources, Refused> {
        let mut sources = Sources {
            v4: Pool::new(false),
            v4_loopback: Pool::new(false),
            v6: Pool::new(true),
            v6_loopback: Pool::new(true),
        };
        for part in text.split(',') {
            match range(part.trim_ascii())? {
                (IpAddr::V4(first), IpAddr::V4(last)) => {
                    let (first, last) = (u128::from(first.to_bits()), u128::from(last.to_bits()));
                    require_usable(first, last, &[(0, 0x00ff_ffff), (0xe000_0000, 0xffff_ffff)])?;
                    split(first, last, LOOPBACK_V4, &mut sources.v4, &mut sources.v4_loopback)?;
                }
                (IpAddr::V6(first), IpAddr::V6(last)) => {
                    let (first, last) = (first.to_bits(), last.to_bits());
                    let mapped = (0xffff_0000_0000, 0xffff_ffff_ffff);
                    require_usable(first, last, &[(0, 0), mapped, (0xff << 120, u128::MAX)])?;
                    split(first, last, LOOPBACK_V6, &mut sources.v6, &mut sources.v6_loopback)?;
                }
                _ => return Err(Refused::Backward),
            }
        }
        Ok(sources)
    }

    /// The addresses from which a destination may be reached; None leaves the choice to the kernel.
    pub(crate) fn towards(&self, destination: IpAddr) -> Option<&Pool> {
        let pool = match destination {
            // connect() to the unspecified address is connect() to loopback (tcp_v6_connect, ip_route_connect).
            IpAddr::V4(address) if address.is_loopback() || address.is_unspecified() => &self.v4_loopback,
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(address) if address.is_loopback() || address.is_unspecified() => &self.v6_loopback,
            // A link-local destination is reached from a link-local source of its link, which the kernel knows.
            IpAddr::V6(address) if address.is_unicast_link_local() || address.is_multicast() => return None,
            IpAddr::V6(_) => &self.v6,
        };
        (pool.size() > 0).then_some(pool)
    }
}

/// Where each destination's next connection starts in its pool: one after the other, from a place of its own.
///
/// Two destinations may share a counter; then each skips what the other takes, and meets it in the next round.
pub(crate) struct Rounds([AtomicU64; Rounds::COUNTERS]);

impl Rounds {
    const COUNTERS: usize = 1_024;

    pub(crate) const fn new() -> Rounds {
        Rounds([const { AtomicU64::new(0) }; Rounds::COUNTERS])
    }

    /// The place for one more connection. `seed` differs from process to process, so that a thousand processes with one
    /// connection each spread as one process with a thousand does.
    pub(crate) fn next(&self, destination: IpAddr, port: u16, seed: u64) -> u128 {
        let number = match destination {
            IpAddr::V4(address) => u128::from(address.to_bits()),
            IpAddr::V6(address) => address.to_bits(),
        };
        let hash = mixed(mixed(number as u64 ^ (number >> 64) as u64) ^ u64::from(port));
        let position = (hash % Rounds::COUNTERS as u64) as usize;
        let turn = self.0.get(position).map_or(0, |counter| counter.fetch_add(1, Ordering::Relaxed));
        // 128 bits wide, so that a start anywhere in a /64 is followed by the addresses next to it, without a wrap.
        u128::from(mixed(seed ^ hash)) + u128::from(turn)
    }
}

/// The finaliser of splitmix64: every bit of the answer depends on every bit of the question.
pub(crate) fn mixed(bits: u64) -> u64 {
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

fn range(part: &str) -> Result<(IpAddr, IpAddr), Refused> {
    if let Some((first, last)) = part.split_once('-') {
        let (first, last) = (address(first)?, address(last)?);
        return if first.is_ipv4() == last.is_ipv4() && first <= last {
            Ok((first, last))
        } else {
            Err(Refused::Backward)
        };
    }
    let Some((first, length)) = part.split_once('/') else {
        return address(part).map(|one| (one, one));
    };
    let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
    let length = length.parse::<u32>().ok().filter(|_| digits).ok_or(Refused::Form)?;
    match address(first)? {
        IpAddr::V4(first) => {
            let host = u32::MAX.checked_shr(length).unwrap_or(0);
            within(length, 32, u128::from(first.to_bits() & host))?;
            Ok((IpAddr::V4(first), IpAddr::V4(Ipv4Addr::from_bits(first.to_bits() | host))))
        }
        IpAddr::V6(first) => {
            let host = u128::MAX.checked_shr(length).unwrap_or(0);
            within(length, 128, first.to_bits() & host)?;
            Ok((IpAddr::V6(first), IpAddr::V6(Ipv6Addr::from_bits(first.to_bits() | host))))
        }
    }
}

fn within(length: u32, most: u32, host_bits: u128) -> Result<(), Refused> {
    match (length <= most, host_bits) {
        (false, _) => Err(Refused::Form),
        (true, 0) => Ok(()),
        (true, _) => Err(Refused::HostBits),
    }
}

fn address(text: &str) -> Result<IpAddr, Refused> {
    text.trim_ascii().parse().map_err(|_| Refused::Form)
}

fn require_usable(first: u128, last: u128, unusable: &[(u128, u128)]) -> Result<(), Refused> {
    let touches = unusable.iter().any(|&(low, high)| first <= high && low <= last);
    if touches { Err(Refused::Unusable) } else { Ok(()) }
}

/// Add what lies inside the loopback range to one pool, and what lies on either side of it to the other.
fn split(first: u128, last: u128, loopback: (u128, u128), usual: &mut Pool, looped: &mut Pool) -> Result<(), Refused> {
    let (low, high) = loopback;
    if first < low {
        usual.add(first, last.min(low.wrapping_sub(1)))?;
    }
    if first <= high && low <= last {
        looped.add(first.max(low), last.min(high))?;
    }
    if last > high {
        usual.add(first.max(high.wrapping_add(1)), last)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::string::{String, ToString};
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn all(sources: &Sources, destination: &str) -> Vec<String> {
        let pool = sources.towards(destination.parse().unwrap());
        pool.map_or(Vec::new(), |pool| (0..pool.size()).map(|place| pool.nth(place).unwrap().to_string()).collect())
    }

    #[test]
    fn every_form_of_a_range_is_read() {
        let sources = Sources::parse(" 10.0.0.0/30, 10.7.0.8-10.7.0.9 ,10.9.9.9,2001:db8::/127,::1").unwrap();
        let expected =
            ["10.0.0.0", "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.7.0.8", "10.7.0.9", "10.9.9.9"].map(String::from);
        assert_eq!(all(&sources, "192.0.2.1"), expected);
        assert_eq!(all(&sources, "2001:db8:1::1"), ["2001:db8::", "2001:db8::1"]);
        assert_eq!(all(&sources, "::1"), ["::1"]);
        assert_eq!(all(&sources, "::"), ["::1"], "the unspecified destination is loopback");
        assert!(all(&sources, "127.0.0.1").is_empty(), "loopback is left alone where no source is loopback");
        assert!(all(&sources, "fe80::1").is_empty(), "so is a link-local destination");
    }

    #[test]
    fn a_range_across_loopback_is_cut_in_three() {
        let sources = Sources::parse("126.255.255.255-128.0.0.0").unwrap();
        assert_eq!(all(&sources, "192.0.2.1"), ["126.255.255.255", "128.0.0.0"]);
        assert_eq!(sources.towards("127.0.0.1".parse().unwrap()).unwrap().size(), 1 << 24);
    }

    #[test]
    fn each_mistake_has_its_name() {
        let many = (0..=MOST_RUNS).map(|number| std::format!("10.0.{number}.1")).collect::<Vec<_>>().join(",");
        for (text, why) in [
            ("", Refused::Form),
            ("10.0.0.1,", Refused::Form),
            ("10.0.0.0/33", Refused::Form),
            ("10.0.0.0/+8", Refused::Form),
            ("10.0.0.0/", Refused::Form),
            ("10.0.0.0/99999999999", Refused::Form),
            ("10.0.0.1:80", Refused::Form),
            ("localhost", Refused::Form),
            ("10.0.0.1/8", Refused::HostBits),
            ("2001:db8::1/64", Refused::HostBits),
            ("10.0.0.9-10.0.0.1", Refused::Backward),
            ("10.0.0.1-2001:db8::1", Refused::Backward),
            ("0.0.0.0/0", Refused::Unusable),
            ("224.0.0.1", Refused::Unusable),
            ("::", Refused::Unusable),
            ("::ffff:10.0.0.1", Refused::Unusable),
            ("ff02::1", Refused::Unusable),
            (many.as_str(), Refused::TooMany),
        ] {
            assert_eq!(Sources::parse(text).err(), Some(why), "{text}");
        }
    }

    #[test]
    fn a_round_takes_each_address_once_and_starts_elsewhere_in_another_process() {
        let rounds = Rounds::new();
        let sources = Sources::parse("10.0.0.0/24").unwrap();
        let destination = "192.0.2.1".parse().unwrap();
        let pool = sources.towards(destination).unwrap();
        let taken: BTreeSet<_> = (0..256).map(|_| pool.nth(rounds.next(destination, 80, 7))).collect();
        assert_eq!(taken.len(), 256);
        let starts: BTreeSet<_> =
            (0..100).map(|seed| pool.nth(Rounds::new().next(destination, 80, mixed(seed)))).collect();
        assert!(starts.len() > 50, "{} starts of 100 processes", starts.len());
    }

    proptest! {
        #[test]
        fn any_text_is_a_set_or_a_named_mistake(text in "[0-9a-f:./, \\-]{0,60}|\\PC{0,40}") {
            if let Ok(sources) = Sources::parse(&text) {
                let pools = [&sources.v4, &sources.v4_loopback, &sources.v6, &sources.v6_loopback];
                prop_assert!(pools.iter().any(|pool| pool.size() > 0));
            }
        }

        #[test]
        fn every_place_holds_an_address_of_the_range(first: u32, extra in 0u32..5000, place: u128) {
            let first = first.clamp(0x0100_0000, 0x7e00_0000);
            let last = first + extra;
            let text = std::format!("{}-{}", Ipv4Addr::from_bits(first), Ipv4Addr::from_bits(last));
            let sources = Sources::parse(&text).unwrap();
            let Some(IpAddr::V4(found)) = sources.v4.nth(place) else { panic!("{text} has no place {place}") };
            prop_assert!((first..=last).contains(&found.to_bits()));
        }
    }
}
