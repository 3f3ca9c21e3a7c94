//! The PROXY protocol, versions 1 and 2: read what a proxy in front says, write what one behind wants to hear
//! (HAProxy, "The PROXY protocol", 2.1, 2.2).
//!
//! Decides where the header ends and whom it names. Whether the peer may say so is the listener's affair: only a
//! [`crate::Sniffer`] made for a trusted source looks for a header at all.

use core::fmt::Write;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::cursor::{Cursor, agrees, line_end, trim_end, u16_at};
use crate::name::{self, Line};
use crate::{Found, Progress, Refusal};

/// The longest line of version 1, with CR LF (2.1).
pub const LINE_BYTES: usize = 107;
/// What of a header in version 2 is read, addresses and all TLVs together.
pub const HEADER_BYTES: usize = 4096;

/// The types of TLVs that are known here (2.2).
pub mod tlv {
    /// Application protocol, as in ALPN.
    pub const ALPN: u8 = 0x01;
    /// Host name that the client asked for, as in SNI.
    pub const AUTHORITY: u8 = 0x02;
    /// CRC-32C of the whole header; checked where it is present.
    pub const CRC32C: u8 = 0x03;
    /// What the connection is called upstream; up to 128 bytes.
    pub const UNIQUE_ID: u8 = 0x05;
}

const LINE_PREFIX: &[u8] = b"PROXY ";
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const HEAD_BYTES: usize = 16;
const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;
const STREAM_IPV4: u8 = 0x11;
const STREAM_IPV6: u8 = 0x21;
const UNIQUE_ID_BYTES: usize = 128;

/// What a proxy says about the connection that it passes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header<'a> {
    /// 1 or 2.
    pub version: u8,
    /// Who connected, and to which address. None for a connection of the proxy's own (a health check), and where it
    /// speaks of another family than IP over TCP: the addresses of the socket are then the right ones.
    pub endpoints: Option<(SocketAddr, SocketAddr)>,
    tlvs: &'a [u8],
}

impl<'a> Header<'a> {
    /// Type and value of each TLV, in their order.
    pub fn tlvs(&self) -> impl Iterator<Item = (u8, &'a [u8])> + use<'a> {
        Tlvs(Cursor(self.tlvs)).map_while(Result::ok) // all were seen to be whole
    }

    /// The value of the first TLV of this type.
    pub fn tlv(&self, kind: u8) -> Option<&'a [u8]> {
        self.tlvs().find_map(|(it, value)| (it == kind).then_some(value))
    }
}

/// Write a header of version 1 into `space`; returns how long it is, or None if it does not fit.
pub fn write_line(endpoints: Option<(SocketAddr, SocketAddr)>, space: &mut [u8]) -> Option<usize> {
    let mut line = Line { space, used: 0 };
    match families(endpoints) {
        Families::None => line.write_str("PROXY UNKNOWN\r\n"),
        Families::Ipv4(from, to, ports) => write!(line, "PROXY TCP4 {from} {to} {} {}\r\n", ports.0, ports.1),
        Families::Ipv6(from, to, ports) => write!(line, "PROXY TCP6 {from} {to} {} {}\r\n", ports.0, ports.1),
    }
    .ok()?;
    Some(line.used)
}

/// Write a header of version 2 with these TLVs and a checksum into `space`; returns how long it is, or None if it does
/// not fit.
pub fn write(endpoints: Option<(SocketAddr, SocketAddr)>, tlvs: &[(u8, &[u8])], space: &mut [u8]) -> Option<usize> {
    let mut header = Bytes { space, used: 0 };
    let families = families(endpoints);
    let (command, family) = match families {
        Families::None => (LOCAL, 0),
        Families::Ipv4(..) => (PROXY, STREAM_IPV4),
        Families::Ipv6(..) => (PROXY, STREAM_IPV6),
    };
    header.put(SIGNATURE)?.put(&[command, family, 0, 0])?;
    match families {
        Families::None => {}
        Families::Ipv4(from, to, ports) => header.put(&from.octets())?.put(&to.octets())?.put_ports(ports)?,
        Families::Ipv6(from, to, ports) => header.put(&from.octets())?.put(&to.octets())?.put_ports(ports)?,
    }
    for &(kind, value) in tlvs {
        header.put(&[kind])?.put(&u16::try_from(value.len()).ok()?.to_be_bytes())?.put(value)?;
    }
    header.put(&[tlv::CRC32C, 0, 4, 0, 0, 0, 0])?;
    let used = header.used;
    let rest = u16::try_from(used - HEAD_BYTES).ok()?.to_be_bytes();
    space[HEAD_BYTES - 2..HEAD_BYTES].copy_from_slice(&rest);
    let sum = crc32c(&space[..used], used..used);
    space[used - 4..used].copy_from_slice(&sum.to_be_bytes());
    Some(used)
}

pub(crate) fn find(progress: &mut Progress, bytes: &[u8]) -> Found {
    if bytes.is_empty() {
        return Found::More(LINE_PREFIX.len());
    }
    if agrees(bytes, SIGNATURE) {
        if bytes.len() < HEAD_BYTES {
            return Found::More(HEAD_BYTES);
        }
        let end = HEAD_BYTES + u16_at(bytes, HEAD_BYTES - 2);
        return match bytes[12] {
            LOCAL | PROXY if end > HEADER_BYTES => Found::Refused(Refusal::TooLong),
            LOCAL | PROXY if bytes.len() < end => Found::More(end),
            LOCAL | PROXY => Found::Whole(end),
            _ => Found::Refused(Refusal::Malformed), // another version or command: a receiver must drop it
        };
    }
    if !agrees(bytes, LINE_PREFIX) {
        return Found::No;
    }
    match line_end(&bytes[..bytes.len().min(LINE_BYTES)], progress.at as usize) {
        Some(end) => Found::Whole(end),
        None if bytes.len() < LINE_BYTES => {
            progress.at = bytes.len() as u32;
            Found::More((bytes.len() + 1).max(LINE_PREFIX.len()))
        }
        None => Found::Refused(Refusal::TooLong),
    }
}

/// Read the header that ends at `end`.
pub(crate) fn read(bytes: &[u8], end: usize) -> Result<Header<'_>, Refusal> {
    match bytes.strip_prefix(LINE_PREFIX) {
        Some(_) => read_line(&bytes[LINE_PREFIX.len()..end]),
        None => read_binary(&bytes[..end]),
    }
}

/// TCP4 or TCP6, source, destination, source port, destination port, one space between; CR LF and nothing less.
fn read_line(line: &[u8]) -> Result<Header<'_>, Refusal> {
    let words = trim_end(line);
    if words.len() + 2 != line.len() {
        return Err(Refusal::Malformed);
    }
    let mut header = Header { version: 1, endpoints: None, tlvs: &[] };
    let mut words = words.split(|&byte| byte == b' ');
    let family = words.next();
    if family == Some(b"UNKNOWN") {
        return Ok(header); // what follows must be ignored
    }
    let mut word = || words.next().ok_or(Refusal::Malformed);
    let (from, to) = (word()?, word()?);
    let (from_port, to_port) = (port(word()?)?, port(word()?)?);
    let (from, to) = match family {
        Some(b"TCP4") => (IpAddr::V4(parse::<Ipv4Addr>(from)?), IpAddr::V4(parse::<Ipv4Addr>(to)?)),
        Some(b"TCP6") => (IpAddr::V6(parse::<Ipv6Addr>(from)?), IpAddr::V6(parse::<Ipv6Addr>(to)?)),
        _ => return Err(Refusal::Malformed),
    };
    header.endpoints = Some((SocketAddr::new(from, from_port), SocketAddr::new(to, to_port)));
    if words.next().is_none() { Ok(header) } else { Err(Refusal::Malformed) }
}

fn read_binary(bytes: &[u8]) -> Result<Header<'_>, Refusal> {
    let (command, family) = (bytes[12], bytes[13]);
    let mut header = Header { version: 2, endpoints: None, tlvs: &[] };
    if command == LOCAL {
        return Ok(header); // 2.2: everything that follows is discarded
    }
    let mut rest = Cursor(&bytes[HEAD_BYTES..]);
    let addresses = match family {
        STREAM_IPV4 => Some((ipv4(&mut rest)?, ipv4(&mut rest)?)),
        STREAM_IPV6 => Some((ipv6(&mut rest)?, ipv6(&mut rest)?)),
        _ => {
            // Datagrams and unix sockets are none of ours, but are as long as their family says.
            rest.take([0, 12, 36, 216].get(usize::from(family >> 4)).copied().unwrap_or(0))?;
            None
        }
    };
    if let Some((from, to)) = addresses {
        header.endpoints = Some((SocketAddr::new(from, rest.u16()?), SocketAddr::new(to, rest.u16()?)));
    }
    header.tlvs = rest.0;
    while !rest.is_empty() {
        let kind = rest.u8()?;
        let value = rest.long()?.0;
        let end = bytes.len() - rest.0.len();
        match kind {
            tlv::CRC32C if value.len() != 4 || crc32c(bytes, end - 4..end).to_be_bytes() != value => {
                return Err(Refusal::Malformed); // a receiver must drop it
            }
            tlv::UNIQUE_ID if value.len() > UNIQUE_ID_BYTES => return Err(Refusal::TooLong),
            _ => {}
        }
    }
    Ok(header)
}

/// Type, length, value, until nothing is left.
struct Tlvs<'a>(Cursor<'a>);

impl<'a> Iterator for Tlvs<'a> {
    type Item = Result<(u8, &'a [u8]), Refusal>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = &mut self.0;
        (!rest.is_empty()).then(|| Ok((rest.u8()?, rest.long()?.0)))
    }
}

fn parse<T: core::str::FromStr>(text: &[u8]) -> Result<T, Refusal> {
    core::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or(Refusal::Malformed)
}

/// 0 to 65535, no leading zero (2.1).
fn port(text: &[u8]) -> Result<u16, Refusal> {
    name::number(text).and_then(|number| u16::try_from(number).ok()).ok_or(Refusal::Malformed)
}

fn ipv4(rest: &mut Cursor<'_>) -> Result<IpAddr, Refusal> {
    let octets: [u8; 4] = rest.take(4)?.try_into().map_err(|_| Refusal::Malformed)?;
    Ok(IpAddr::from(octets))
}

fn ipv6(rest: &mut Cursor<'_>) -> Result<IpAddr, Refusal> {
    let octets: [u8; 16] = rest.take(16)?.try_into().map_err(|_| Refusal::Malformed)?;
    Ok(IpAddr::from(octets))
}

/// Both endpoints in one family: IPv4 becomes IPv6 where the other is.
enum Families {
    None,
    Ipv4(Ipv4Addr, Ipv4Addr, (u16, u16)),
    Ipv6(Ipv6Addr, Ipv6Addr, (u16, u16)),
}

fn families(endpoints: Option<(SocketAddr, SocketAddr)>) -> Families {
    let Some((from, to)) = endpoints else { return Families::None };
    let ports = (from.port(), to.port());
    let six = |address| match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => Families::Ipv4(from, to, ports),
        (from, to) => Families::Ipv6(six(from), six(to), ports),
    }
}

/// Bytes written into bytes that somebody else owns.
struct Bytes<'s> {
    space: &'s mut [u8],
    used: usize,
}

impl Bytes<'_> {
    fn put(&mut self, bytes: &[u8]) -> Option<&mut Self> {
        self.space.get_mut(self.used..self.used + bytes.len())?.copy_from_slice(bytes);
        self.used += bytes.len();
        Some(self)
    }

    fn put_ports(&mut self, (from, to): (u16, u16)) -> Option<()> {
        self.put(&from.to_be_bytes())?.put(&to.to_be_bytes()).map(|_| ())
    }
}

/// CRC-32C (RFC 3309, appendix) of the bytes, with zeros where the sum itself stands.
fn crc32c(bytes: &[u8], zeros: core::ops::Range<usize>) -> u32 {
    let mut sum = u32::MAX;
    for (at, &byte) in bytes.iter().enumerate() {
        sum ^= u32::from(if zeros.contains(&at) { 0 } else { byte });
        for _ in 0..8 {
            sum = sum >> 1 ^ 0x82f6_3b78 & (sum & 1).wrapping_neg();
        }
    }
    !sum
}
