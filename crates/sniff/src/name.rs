//! Host names as the registry has them: lower case, no final dot, labels of letters, digits, hyphen and underscore.
//!
//! Decides what may be a host's name, whatever protocol it came in. What passes is at most 253 bytes of ASCII and never
//! empty, and holds neither NUL, slash nor two dots in a row, so that a path made of its labels cannot climb.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Refusal;
use crate::cursor::Cursor;

/// The longest name without its final dot (RFC 1035 2.3.4: 255 octets on the wire).
pub(crate) const NAME_BYTES: usize = 253;
const LABEL_BYTES: usize = 63;

/// Where a folded name is kept.
pub(crate) type NameSpace = [u8; NAME_BYTES];

/// Fold a name into `space`. Underscore is in no host name of RFC 1123 2.1, and in many that are in use.
pub(crate) fn fold<'s>(raw: &[u8], space: &'s mut NameSpace) -> Result<&'s str, Refusal> {
    let raw = raw.strip_suffix(b".").unwrap_or(raw);
    let folded = space.get_mut(..raw.len()).filter(|it| !it.is_empty()).ok_or(Refusal::BadName)?;
    let mut label_bytes = 0;
    for (place, &byte) in folded.iter_mut().zip(raw) {
        label_bytes = match byte {
            b'.' if label_bytes > 0 => 0,
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' if label_bytes < LABEL_BYTES => label_bytes + 1,
            _ => return Err(Refusal::BadName),
        };
        *place = byte.to_ascii_lowercase();
    }
    if label_bytes == 0 {
        return Err(Refusal::BadName); // "a..", of which one dot is left
    }
    core::str::from_utf8(folded).map_err(|_| Refusal::BadName)
}

/// A host alone, where a protocol has its port elsewhere: a name, or an address with or without brackets.
pub(crate) fn host<'s>(raw: &[u8], space: &'s mut NameSpace) -> Result<&'s str, Refusal> {
    match raw {
        [b'[', inside @ .., b']'] => ipv6(inside, space),
        _ if raw.contains(&b':') => ipv6(raw, space),
        _ => fold(raw, space),
    }
}

/// Whether this is an address and not a name.
pub(crate) fn is_address(raw: &[u8]) -> bool {
    let text = core::str::from_utf8(raw).unwrap_or_default();
    text.parse::<Ipv4Addr>().is_ok() || text.parse::<Ipv6Addr>().is_ok()
}

/// Host and port of `uri-host [ ":" port ]` (RFC 3986 3.2.2, 3.2.3). An IPv6 address loses its brackets; an empty
/// authority names nothing.
pub(crate) fn authority<'s>(raw: &[u8], space: &'s mut NameSpace) -> Result<(Option<&'s str>, Option<u16>), Refusal> {
    let (host, port) = split(raw)?;
    let name = match host {
        b"" => None,
        [b'[', inside @ .., b']'] => Some(ipv6(inside, space)?),
        _ => Some(fold(host, space)?),
    };
    Ok((name, port))
}

/// Whether two authorities name the same host, and the same port if both name one.
pub(crate) fn same(one: &[u8], other: &[u8]) -> Result<bool, Refusal> {
    let (mut space, mut other_space) = ([0; NAME_BYTES], [0; NAME_BYTES]);
    let (name, port) = authority(one, &mut space)?;
    let (other_name, other_port) = authority(other, &mut other_space)?;
    Ok(name == other_name && (port == other_port || port.is_none() || other_port.is_none()))
}

/// Host as written and port as a number. "Host:" with nothing behind the colon has no port (RFC 3986 3.2.3).
fn split(raw: &[u8]) -> Result<(&[u8], Option<u16>), Refusal> {
    let from = raw.iter().position(|&byte| byte == b']').unwrap_or(0);
    let Some(colon) = raw[from..].iter().position(|&byte| byte == b':').map(|place| from + place) else {
        return Ok((raw, None));
    };
    let digits = &raw[colon + 1..];
    if digits.len() > 5 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(Refusal::BadName); // also `user:password@host`
    }
    let port = digits.iter().fold(0u32, |number, digit| number * 10 + u32::from(digit - b'0'));
    let port = u16::try_from(port).map_err(|_| Refusal::BadName)?;
    Ok((&raw[..colon], (!digits.is_empty()).then_some(port)))
}

fn ipv6<'s>(raw: &[u8], space: &'s mut NameSpace) -> Result<&'s str, Refusal> {
    let text = core::str::from_utf8(raw).map_err(|_| Refusal::BadName)?;
    let read: Ipv6Addr = text.parse().map_err(|_| Refusal::BadName)?;
    address(read.into(), space)
}

/// An address in the one way to write it (RFC 5952), as a route would.
pub(crate) fn address(address: IpAddr, space: &mut NameSpace) -> Result<&str, Refusal> {
    let mut line = Line { space, used: 0 };
    core::fmt::write(&mut line, format_args!("{address}")).map_err(|_| Refusal::BadName)?;
    let used = line.used;
    core::str::from_utf8(&space[..used]).map_err(|_| Refusal::BadName)
}

/// Text written into bytes that somebody else owns.
pub(crate) struct Line<'s> {
    pub(crate) space: &'s mut [u8],
    pub(crate) used: usize,
}

impl core::fmt::Write for Line<'_> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let free = self.space.get_mut(self.used..self.used + text.len()).ok_or(core::fmt::Error)?;
        free.copy_from_slice(text.as_bytes());
        self.used += text.len();
        Ok(())
    }
}

/// A decimal number of 32 bits, in no other way than the shortest.
pub(crate) fn number(text: &[u8]) -> Option<u32> {
    let plain = text.iter().all(u8::is_ascii_digit) && (text.len() == 1 || text.first() != Some(&b'0'));
    core::str::from_utf8(text).ok().filter(|_| plain)?.parse().ok()
}

/// Whether a cursor's rest is UTF-8 without NUL.
pub(crate) fn is_clean(text: Cursor<'_>) -> bool {
    core::str::from_utf8(text.0).is_ok_and(|text| !text.contains('\0'))
}
