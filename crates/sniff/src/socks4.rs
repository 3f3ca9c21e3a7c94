//! SOCKS 4 and 4A: a request to connect to an address or, as the extension has it, a name (Y.-D. Lee, "SOCKS: A protocol
//! for TCP proxy across firewalls", "SOCKS 4A").
//!
//! Decides host, port and user. Who asks waits for the answer, so the request is the broker's, and the service sees only
//! what comes behind. Nobody has proven to be that user.

use core::net::Ipv4Addr;

use crate::cursor::{Cursor, agrees, u16_at};
use crate::name;
use crate::shown::{Scratch, Shown};
use crate::{Found, Progress, Protocol, Refusal};

const HEAD_BYTES: usize = 8;
/// A user name or a host, with its NUL.
const TEXT_BYTES: usize = 256;
pub(crate) const REQUEST_BYTES: usize = HEAD_BYTES + 2 * TEXT_BYTES;

const VERSION: u8 = 4;
const CONNECT: u8 = 1;
const BIND: u8 = 2;
/// "Request granted"; the rest is ignored.
const GRANTED: &[u8] = &[0, 90, 0, 0, 0, 0, 0, 0];

/// Two bytes are no mark, so that what is not a request in all its parts is another protocol. `mark`: where the text
/// begins that is being looked at; `at`: how far.
pub(crate) fn find(progress: &mut Progress, bytes: &[u8]) -> Found {
    if !agrees(bytes, &[VERSION]) || bytes.get(1).is_some_and(|&command| command != CONNECT && command != BIND) {
        return Found::No;
    }
    if bytes.len() < HEAD_BYTES {
        return Found::More(HEAD_BYTES + 1);
    }
    let texts = if names_host(bytes) { 2 } else { 1 };
    progress.mark = progress.mark.max(HEAD_BYTES as u32);
    progress.at = progress.at.max(HEAD_BYTES as u32);
    loop {
        let (begin, from) = (progress.mark as usize, progress.at as usize);
        let there = &bytes[from..bytes.len().min(begin + TEXT_BYTES)];
        let end = there.iter().position(|&byte| byte == 0);
        if there[..end.unwrap_or(there.len())].iter().any(u8::is_ascii_control) {
            return Found::No;
        }
        match end.map(|end| from + end + 1) {
            Some(end) if usize::from(progress.phase) + 1 == texts => return Found::Whole(end),
            Some(end) => {
                (progress.mark, progress.at, progress.phase) = (end as u32, end as u32, progress.phase + 1);
            }
            None if bytes.len() < begin + TEXT_BYTES => {
                progress.at = bytes.len() as u32;
                return Found::More(bytes.len() + 1);
            }
            None => return Found::No,
        }
    }
}

pub(crate) fn read<'a>(bytes: &'a [u8], end: usize, scratch: &'a mut Scratch) -> Result<Shown<'a>, Refusal> {
    if bytes[1] != CONNECT {
        return Err(Refusal::Unsupported);
    }
    let mut shown = Shown::new(Protocol::Socks4, end);
    let mut rest = Cursor(&bytes[HEAD_BYTES..end]);
    shown.user = Some(rest.text()?).filter(|user| !user.is_empty());
    shown.port = Some(u16_at(bytes, 2) as u16);
    shown.name = Some(if names_host(bytes) {
        name::host(rest.text()?, &mut scratch.name)?
    } else {
        name::address(Ipv4Addr::new(bytes[4], bytes[5], bytes[6], bytes[7]).into(), &mut scratch.name)?
    });
    shown.reply = GRANTED;
    Ok(shown)
}

/// Whether the address is none, 0.0.0.x, and a name follows (SOCKS 4A).
fn names_host(bytes: &[u8]) -> bool {
    bytes[4..7] == [0, 0, 0] && bytes[7] != 0
}
