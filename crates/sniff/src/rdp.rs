//! RDP: the X.224 connection request, with whom it is for (MS-RDPBCGR 2.2.1.1; RFC 1006; ITU-T X.224 13.3).
//!
//! Decides user or routing token, which a load balancer in front of several hosts goes by. Both are what the client says,
//! in the clear and unproven, and the user is cut off after nine characters by some. Whatever else follows the request, as
//! in S7 and H.323, is another protocol over the same transport. A probe is the user `nmap`, which nmap's own probe has.

use core::net::Ipv4Addr;

use crate::cursor::u16_at;
use crate::name::{self, number};
use crate::shown::{Intent, Scratch, Shown};
use crate::{Found, Progress, Protocol, Refusal};

/// The head says its length in one byte (X.224 13.2.1), and stands behind four of TPKT and its own.
pub(crate) const PACKET_BYTES: usize = 5 + 254;

/// TPKT of version 3; length; a connection request to reference 0 from any, of class 0.
const HEAD_BYTES: usize = 11;
const CONNECTION_REQUEST: u8 = 0xe0;

/// What may follow the text: each begins with its type, flags, and length in the least byte first (2.2.1.1.1, 2.2.1.1.2).
const NEGOTIATION: (u8, usize) = (1, 8);
const CORRELATION: (u8, usize) = (6, 36);

const USER: &[u8] = b"Cookie: mstshash=";
const TOKEN: &[u8] = b"Cookie: msts=";
const SCANNER: &[u8] = b"nmap";

pub(crate) fn find(_: &mut Progress, bytes: &[u8]) -> Found {
    let fits = |(at, &byte): (usize, &u8)| match at {
        0 => byte == 3,
        1 | 2 => byte == 0, // reserved; more than a request can have
        3 if bytes[2] == 0 => usize::from(byte) >= HEAD_BYTES,
        4 => usize::from(byte) + 5 == u16_at(bytes, 2),
        5 => byte == CONNECTION_REQUEST,
        6 | 7 | 10 => byte == 0,
        _ => true,
    };
    if !bytes.iter().take(HEAD_BYTES).enumerate().all(fits) {
        return Found::No;
    }
    if bytes.len() < HEAD_BYTES {
        return Found::More(HEAD_BYTES);
    }
    let end = u16_at(bytes, 2);
    match bytes.get(HEAD_BYTES..end) {
        None => Found::More(end),
        Some(rest) if text(rest).is_some() => Found::Whole(end),
        Some(_) => Found::No,
    }
}

pub(crate) fn read<'a>(bytes: &'a [u8], end: usize, scratch: &'a mut Scratch) -> Result<Shown<'a>, Refusal> {
    let mut shown = Shown::new(Protocol::Rdp, end);
    let line = text(&bytes[HEAD_BYTES..end]).ok_or(Refusal::Malformed)?;
    if let Some(user) = line.strip_prefix(USER) {
        shown.user = Some(user).filter(|user| !user.is_empty());
        shown.intent = Intent::probe_if(user == SCANNER);
    } else if !line.is_empty() {
        let token = line.strip_prefix(TOKEN).unwrap_or(line);
        shown.client = Some(token);
        if let Some((address, port)) = place(token) {
            shown.name = Some(name::address(address.into(), &mut scratch.name)?);
            shown.port = Some(port);
        }
    }
    Ok(shown)
}

/// The line between the head and what is negotiated, without its end; empty if there is none. None if this is no RDP.
fn text(rest: &[u8]) -> Option<&[u8]> {
    let (line, mut rest) = match rest.windows(2).position(|it| it == b"\r\n") {
        Some(end) if rest[..end].iter().all(|&byte| byte >= b' ' && byte != 0x7f) => (&rest[..end], &rest[end + 2..]),
        _ => (&b""[..], rest),
    };
    for (kind, size) in [NEGOTIATION, CORRELATION] {
        match rest.split_at_checked(size) {
            Some(([first, _, low, 0, ..], left)) if *first == kind && usize::from(*low) == size => rest = left,
            _ => break,
        }
    }
    rest.is_empty().then_some(line)
}

/// A token of the usual form: address and port as numbers, each with its first byte as the least (MS-RDPBCGR 3.2.5.3.1).
fn place(token: &[u8]) -> Option<(Ipv4Addr, u16)> {
    let mut parts = token.split(|&byte| byte == b'.');
    let address = number(parts.next()?)?;
    let port = u16::try_from(number(parts.next()?)?).ok()?;
    (parts.next()? == b"0000" && parts.next().is_none()).then_some((address.to_le_bytes().into(), port.swap_bytes()))
}
