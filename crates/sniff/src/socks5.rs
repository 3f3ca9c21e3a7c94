//! SOCKS 5: how a client may prove who it is, then, once it has been told, where to connect (RFC 1928).
//!
//! Decides host and port. A client need not prove anything: the broker knows no users, and one that insists on a password
//! is refused. Both messages are the broker's, and the service sees only what comes behind; a client that does not wait
//! for the answers is served as well, for nothing in what it says depends on them.

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::cursor::Cursor;
use crate::name;
use crate::shown::{Scratch, Shown};
use crate::{Found, Progress, Protocol, Refusal};

/// Version, count, that many methods.
const GREETING_BYTES: usize = 2 + 255;
/// Version, command, reserved, kind of address, a name behind its length, port.
const REQUEST_BYTES: usize = 4 + 1 + 255 + 2;
pub(crate) const BYTES: usize = GREETING_BYTES + REQUEST_BYTES;

const VERSION: u8 = 5;
const CONNECT: u8 = 1;
const BIND: u8 = 2;
const ASSOCIATE: u8 = 3;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;
/// "No authentication required", and what no method is (section 3).
const NOTHING: u8 = 0;
const NO_METHOD: u8 = 0xff;

/// What a client is told that need not prove anything.
pub(crate) const SELECTED: &[u8] = &[VERSION, NOTHING];
/// "Succeeded", from 0.0.0.0:0 (section 6).
const SUCCEEDED: &[u8] = &[VERSION, 0, 0, IPV4, 0, 0, 0, 0, 0, 0];

/// One byte is no mark, so what is not a greeting is another protocol.
pub(crate) fn find(_: &mut Progress, bytes: &[u8]) -> Found {
    match bytes {
        [] | [VERSION] => Found::More(3),
        [VERSION, 0, ..] => Found::No,
        [VERSION, count, methods @ ..] => {
            let end = 2 + usize::from(*count);
            if methods.iter().take(usize::from(*count)).any(|&method| method == NO_METHOD) {
                Found::No
            } else if bytes.len() < end {
                Found::More(end)
            } else {
                Found::Whole(end)
            }
        }
        _ => Found::No,
    }
}

/// Whether a client with this greeting may go without proving anything.
pub(crate) fn offers_nothing(greeting: &[u8]) -> bool {
    greeting[2..].contains(&NOTHING)
}

/// The message behind the greeting.
pub(crate) fn find_request(bytes: &[u8]) -> Found {
    let wrong = |(at, &byte): (usize, &u8)| match at {
        0 => byte != VERSION,
        1 => !matches!(byte, CONNECT | BIND | ASSOCIATE),
        2 => byte != 0,
        3 => !matches!(byte, IPV4 | NAME | IPV6),
        _ => false,
    };
    if bytes.iter().take(4).enumerate().any(wrong) {
        return Found::Refused(Refusal::Malformed);
    }
    let end = match bytes.get(3..) {
        Some([IPV4, ..]) => 4 + 4 + 2,
        Some([IPV6, ..]) => 4 + 16 + 2,
        Some([_, count, ..]) => 4 + 1 + usize::from(*count) + 2,
        _ => return Found::More(4 + 1 + 2),
    };
    if bytes.len() < end { Found::More(end) } else { Found::Whole(end) }
}

/// Read the request that ends at `end`.
pub(crate) fn read_request<'a>(bytes: &'a [u8], end: usize, scratch: &'a mut Scratch) -> Result<Shown<'a>, Refusal> {
    let mut rest = Cursor(&bytes[..end]);
    let head = rest.take(4)?;
    if head[1] != CONNECT {
        return Err(Refusal::Unsupported);
    }
    let mut shown = Shown::new(Protocol::Socks5, end);
    let space = &mut scratch.name;
    shown.name = Some(match head[3] {
        IPV4 => name::address(octets::<4>(&mut rest).map(Ipv4Addr::from)?.into(), space)?,
        IPV6 => name::address(octets::<16>(&mut rest).map(Ipv6Addr::from)?.into(), space)?,
        _ => name::host(rest.short()?.0, space)?,
    });
    shown.port = Some(rest.u16()?);
    shown.reply = SUCCEEDED;
    Ok(shown)
}

fn octets<const COUNT: usize>(rest: &mut Cursor<'_>) -> Result<[u8; COUNT], Refusal> {
    rest.take(COUNT)?.try_into().map_err(|_| Refusal::Malformed)
}
