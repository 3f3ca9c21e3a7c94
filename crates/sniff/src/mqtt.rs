//! MQTT: who connects (3.1, 3.1.1 and 5: OASIS MQTT Version 3.1.1 and Version 5.0, section 3.1 of each).
//!
//! Decides client id and user name out of a CONNECT packet, whole. Knows no topic, and keeps no password.

use crate::cursor::{Cursor, agrees};
use crate::name::is_clean;
use crate::shown::Shown;
use crate::{Found, Progress, Protocol, Refusal};

/// The largest CONNECT that is read, with its fixed header. A will may fill most of it.
pub(crate) const PACKET_BYTES: usize = 65_536;

const CONNECT: u8 = 0x10;
/// The length of the rest takes four bytes at most (1.5.5 of version 5, 2.2.3 of version 3.1.1).
const LENGTH_BYTES: usize = 4;

/// Name and level at the head of the variable header (3.1.2.1, 3.1.2.2), with the length of the name.
const LEVELS: [&[u8]; 3] = [b"\x00\x04MQTT\x05", b"\x00\x04MQTT\x04", b"\x00\x06MQIsdp\x03"];

/// Connect flags (3.1.2.3).
const RESERVED: u8 = 0x01;
const WILL: u8 = 0x04;
const WILL_QOS: u8 = 0x18;
const WILL_RETAIN: u8 = 0x20;
const PASSWORD: u8 = 0x40;
const USER_NAME: u8 = 0x80;

pub(crate) fn find(_: &mut Progress, bytes: &[u8]) -> Found {
    if bytes.first().is_some_and(|&byte| byte != CONNECT) {
        return Found::No;
    }
    let mut rest = Cursor(bytes.get(1..).unwrap_or_default());
    let size = match integer(&mut rest) {
        Ok(size) => size,
        Err(_) if bytes.len() <= LENGTH_BYTES => return Found::More(bytes.len().max(1) + 1),
        Err(_) => return Found::No,
    };
    let body = bytes.len() - rest.0.len();
    let Some(level) = LEVELS.iter().find(|level| agrees(rest.0, level)) else { return Found::No };
    if rest.0.len() < level.len() {
        return Found::More(bytes.len() + 1);
    }
    match body + size {
        end if end > PACKET_BYTES => Found::Refused(Refusal::TooLong),
        end if bytes.len() < end => Found::More(end),
        end => Found::Whole(end),
    }
}

/// Everything in the packet has its place, and nothing is left over.
pub(crate) fn read(bytes: &[u8], end: usize) -> Result<Shown<'_>, Refusal> {
    let mut rest = Cursor(&bytes[1..end]);
    integer(&mut rest)?;
    rest.long()?; // the protocol's name
    let five = rest.u8()? == 5;
    let flags = rest.u8()?;
    rest.u16()?; // keep alive
    if five {
        properties(&mut rest)?;
    }
    let has = |flag| flags & flag != 0;
    if has(RESERVED)
        || !has(WILL) && has(WILL_QOS | WILL_RETAIN)
        || flags & WILL_QOS == WILL_QOS
        || !five && has(PASSWORD) && !has(USER_NAME)
    {
        return Err(Refusal::Malformed); // MQTT-3.1.2-3, -11, -13, -14, -15; -22 of version 3.1.1
    }
    let mut shown = Shown::new(Protocol::Mqtt, end);
    shown.client = Some(string(&mut rest)?);
    if has(WILL) {
        if five {
            properties(&mut rest)?;
        }
        string(&mut rest)?;
        rest.long()?;
    }
    if has(USER_NAME) {
        shown.user = Some(string(&mut rest)?);
    }
    if has(PASSWORD) {
        rest.long()?;
    }
    if rest.is_empty() { Ok(shown) } else { Err(Refusal::Malformed) }
}

/// UTF-8 and no NUL, or the connection is closed (1.5.4 of version 5, MQTT-1.5.3-1 and -2 of 3.1.1).
fn string<'a>(rest: &mut Cursor<'a>) -> Result<&'a [u8], Refusal> {
    let text = rest.long()?;
    if is_clean(text) { Ok(text.0) } else { Err(Refusal::Malformed) }
}

fn properties(rest: &mut Cursor<'_>) -> Result<(), Refusal> {
    let size = integer(rest)?;
    rest.take(size).map(|_| ())
}

/// Seven bits in each byte, the least first.
fn integer(rest: &mut Cursor<'_>) -> Result<usize, Refusal> {
    let mut number = 0;
    for place in 0..LENGTH_BYTES {
        let byte = usize::from(rest.u8()?);
        number |= (byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(Refusal::Malformed)
}
