//! Minecraft, Java edition: the handshake with which a client begins, or the ping of an old one (wiki of the game, "Java
//! Edition protocol": Handshake, Server List Ping).
//!
//! Decides which host the player typed, without what mods and proxies hang on to it. Knows no player: whose name comes in
//! the packet behind. A handshake says itself whether it is about the status in a list of servers (a probe) or about
//! playing. The pings of versions before 1.6 name no host and end where the longer ones go on, so they are not known here.

use crate::cursor::{Cursor, agrees, u16_at};
use crate::name;
use crate::shown::{Intent, Scratch, Shown};
use crate::{Found, Progress, Protocol, Refusal};

/// The largest packet that is read. A host has up to 255 characters; proxies in front add addresses and signatures.
pub(crate) const PACKET_BYTES: usize = 4096;

/// A packet's id, a version of the protocol, an empty host, a port, what is wanted.
const LEAST_BYTES: usize = 6;
const HANDSHAKE: u8 = 0;
const STATUS: u8 = 1;
const TRANSFER: u8 = 3;
/// A length or version takes so many bytes.
const SIZE_BYTES: usize = 2;
const VERSION_BYTES: usize = 5;

/// The ping of 1.6, which newer clients fall back to: 0xfe 0x01 0xfa, then "MC|PingHost" behind its length in UTF-16.
const PING: &[u8] = b"\xfe\x01\xfa\0\x0b\0M\0C\0|\0P\0i\0n\0g\0H\0o\0s\0t";
/// What follows it: a length, a version, a host behind its length, a port in four bytes.
const PING_HEAD: usize = 2;
const PING_REST: usize = 1 + 2 + 4;
const PING_HOST_BYTES: usize = 2 * 255;

const SRV_PREFIX: &[u8] = b"_minecraft._tcp.";

/// Nothing in it is a magic number: what makes it Minecraft is that two lengths and an id agree and nothing is left over.
pub(crate) fn find(_: &mut Progress, bytes: &[u8]) -> Found {
    if bytes.len() > 2 && agrees(bytes, PING) {
        return find_ping(bytes);
    }
    let mut at = 0;
    let size = match integer(bytes, &mut at, SIZE_BYTES) {
        Integer::Is(size) if (LEAST_BYTES..=PACKET_BYTES - SIZE_BYTES).contains(&size) => size,
        Integer::More => return Found::More(LEAST_BYTES + 1),
        _ => return Found::No,
    };
    let end = at + size;
    let more = if bytes.len() < end { Found::More(end) } else { Found::No };
    match bytes.get(at) {
        Some(&HANDSHAKE) => at += 1,
        Some(_) => return Found::No,
        None => return more,
    }
    for part in [VERSION_BYTES, SIZE_BYTES] {
        match integer(bytes, &mut at, part) {
            Integer::Is(_) if part == VERSION_BYTES => {}
            Integer::Is(host) if at + host + 3 == end => {}
            Integer::More => return more,
            _ => return Found::No,
        }
    }
    match bytes.get(end - 1) {
        Some(STATUS..=TRANSFER) => Found::Whole(end),
        Some(_) => Found::No,
        None => more,
    }
}

fn find_ping(bytes: &[u8]) -> Found {
    let head = PING.len() + PING_HEAD;
    if bytes.len() < head {
        return Found::More(head + PING_REST);
    }
    let size = u16_at(bytes, PING.len());
    match head + size {
        _ if size < PING_REST => Found::Refused(Refusal::Malformed),
        _ if size > PING_REST + PING_HOST_BYTES => Found::Refused(Refusal::TooLong),
        end if bytes.len() < end => Found::More(end),
        end => Found::Whole(end),
    }
}

pub(crate) fn read<'a>(bytes: &'a [u8], end: usize, scratch: &'a mut Scratch) -> Result<Shown<'a>, Refusal> {
    let Scratch { text, name, .. } = scratch;
    let mut shown = Shown::new(Protocol::Minecraft, end);
    let (host, port, is_probe) = match bytes[..end].strip_prefix(PING) {
        Some(ping) => {
            let (host, port) = read_ping(&ping[PING_HEAD..], text)?;
            (host, port, true)
        }
        None => {
            let mut at = 0;
            for part in [SIZE_BYTES, 1, VERSION_BYTES, SIZE_BYTES] {
                integer(bytes, &mut at, part);
            }
            (&bytes[at..end - 3], u16_at(bytes, end - 3) as u16, bytes[end - 1] == STATUS)
        }
    };
    shown.intent = Intent::probe_if(is_probe);
    shown.port = Some(port);
    shown.name = match typed(host) {
        b"" => None,
        host => Some(name::host(host, name)?),
    };
    Ok(shown)
}

/// Host and port of an old ping. What is in no name becomes a question mark, which is in none either.
fn read_ping<'t>(ping: &[u8], text: &'t mut [u8]) -> Result<(&'t [u8], u16), Refusal> {
    let mut rest = Cursor(ping);
    rest.u8()?; // the version
    let count = usize::from(rest.u16()?);
    let host = rest.take(2 * count)?;
    for (place, pair) in text.iter_mut().zip(host.chunks_exact(2)) {
        *place = if pair[0] == 0 { pair[1] } else { b'?' };
    }
    let (high, port) = (rest.u16()?, rest.u16()?);
    if high == 0 && rest.is_empty() { Ok((&text[..count], port)) } else { Err(Refusal::Malformed) }
}

/// What the player typed: Forge appends a NUL and its mark, proxies a NUL or three slashes and the player's address, and
/// some clients ask for the name under which they have looked up the port (SRV, RFC 2782).
fn typed(host: &[u8]) -> &[u8] {
    let host = host.split(|&byte| byte == 0).next().unwrap_or_default();
    let end = host.windows(3).position(|it| it == b"///").unwrap_or(host.len());
    match host[..end].split_at_checked(SRV_PREFIX.len()) {
        Some((prefix, rest)) if prefix.eq_ignore_ascii_case(SRV_PREFIX) => rest,
        _ => &host[..end],
    }
}

/// Seven bits in each byte, the least first; negative ones have all five.
enum Integer {
    Is(usize),
    More,
    Wrong,
}

fn integer(bytes: &[u8], at: &mut usize, most_bytes: usize) -> Integer {
    let mut number = 0;
    for place in 0..most_bytes {
        let Some(&byte) = bytes.get(*at) else { return Integer::More };
        *at += 1;
        number |= usize::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Integer::Is(number);
        }
    }
    Integer::Wrong
}
