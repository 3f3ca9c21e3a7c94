//! PostgreSQL: a startup message, a request to cancel, or a request for encryption that needs an answer first
//! (PostgreSQL documentation, "Message Flow" and "Message Formats"; `ProcessStartupPacket` in backend_startup.c).
//!
//! Decides user and database. What to answer is the sniffer's setting; the hello that follows is for `tls`.

use crate::cursor::{Cursor, u32_at};
use crate::shown::Shown;
use crate::{Found, Progress, Protocol, Refusal};

/// A request for encryption: a length and a code.
pub(crate) const REQUEST_BYTES: usize = 8;
/// MAX_STARTUP_PACKET_LENGTH of the server.
const PACKET_BYTES: usize = 10_000;
/// The secret of protocol 3.2 has up to 256 bytes, before it had 4; length, code and process id stand in front.
const CANCEL_BYTES: core::ops::RangeInclusive<usize> = 16..=12 + 256;

/// An SSLRequest.
pub(crate) const TLS_REQUEST: [u8; REQUEST_BYTES] = [0, 0, 0, 8, 4, 210, 22, 47];

const CANCEL: u32 = 80_877_102;
const TLS: u32 = 80_877_103;
const GSS: u32 = 80_877_104;

/// A request that is answered with one byte before anything else comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asks {
    Tls,
    Gss,
}

pub(crate) fn find(_: &mut Progress, bytes: &[u8]) -> Found {
    let impossible = |(at, &byte): (usize, &u8)| byte > (PACKET_BYTES as u32).to_be_bytes()[at];
    if bytes.iter().take(2).enumerate().any(impossible) {
        return Found::No;
    }
    if bytes.len() < REQUEST_BYTES {
        return Found::More(REQUEST_BYTES);
    }
    let (size, code) = (u32_at(bytes, 0) as usize, u32_at(bytes, 4));
    let right = match code {
        TLS | GSS => size == REQUEST_BYTES,
        CANCEL => CANCEL_BYTES.contains(&size),
        _ if code >> 16 == 3 => (REQUEST_BYTES + 1..=PACKET_BYTES).contains(&size),
        _ => return Found::No,
    };
    match right {
        false => Found::Refused(Refusal::Malformed),
        true if bytes.len() < size => Found::More(size),
        true => Found::Whole(size),
    }
}

/// What a whole message asks for before it says anything.
pub(crate) fn asks(bytes: &[u8]) -> Option<Asks> {
    match u32_at(bytes, 4) {
        TLS => Some(Asks::Tls),
        GSS => Some(Asks::Gss),
        _ => None,
    }
}

pub(crate) fn read(bytes: &[u8], end: usize) -> Result<Shown<'_>, Refusal> {
    let mut shown = Shown::new(Protocol::Postgres, end);
    let mut rest = Cursor(&bytes[REQUEST_BYTES..end]);
    if u32_at(bytes, 4) == CANCEL {
        shown.cancel = Some(rest.0);
        return Ok(shown);
    }
    loop {
        let name = rest.text()?;
        if name.is_empty() {
            break;
        }
        let value = rest.text()?;
        let earlier = match name {
            b"user" => shown.user.replace(value),
            b"database" => shown.database.replace(value),
            _ => None,
        };
        if earlier.is_some() {
            return Err(Refusal::Repeated); // the server would take the last
        }
    }
    let user = shown.user.filter(|user| !user.is_empty());
    if user.is_none() || !rest.is_empty() {
        return Err(Refusal::Malformed); // the server: "no PostgreSQL user name specified", "expected terminator"
    }
    shown.database = shown.database.filter(|name| !name.is_empty()).or(user);
    Ok(shown)
}
