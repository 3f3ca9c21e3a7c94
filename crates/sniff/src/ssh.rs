//! SSH: the identification line of a client that speaks first (RFC 4253 4.2).
//!
//! Decides that it is SSH and what software says so. The line names neither host nor user: those come encrypted.

use crate::cursor::{agrees, line_end, trim_end};
use crate::shown::Shown;
use crate::{Found, Progress, Protocol, Refusal};

/// RFC 4253 4.2: 255 characters with CR and LF.
pub(crate) const LINE_BYTES: usize = 255;
const PREFIX: &[u8] = b"SSH-";

pub(crate) fn find(progress: &mut Progress, bytes: &[u8]) -> Found {
    if !agrees(bytes, PREFIX) {
        return Found::No;
    }
    match line_end(&bytes[..bytes.len().min(LINE_BYTES)], progress.at as usize) {
        Some(end) => Found::Whole(end),
        None if bytes.len() < LINE_BYTES => {
            progress.at = bytes.len() as u32;
            Found::More((bytes.len() + 1).max(PREFIX.len()))
        }
        None => Found::Refused(Refusal::TooLong),
    }
}

/// SSH-protoversion-softwareversion, then a space and comments if there are any; printable US-ASCII.
pub(crate) fn read(bytes: &[u8], end: usize) -> Result<Shown<'_>, Refusal> {
    let line = trim_end(&bytes[PREFIX.len()..end]);
    let dash = line.iter().position(|&byte| byte == b'-').ok_or(Refusal::Malformed)?;
    let (version, software) = (&line[..dash], &line[dash + 1..]);
    // 2.0 and 1.99 (RFC 4253 5.1), or the 1.x of old.
    if !(version == b"2.0" || version.starts_with(b"1.")) || !software.iter().all(|byte| (b' '..=b'~').contains(byte)) {
        return Err(Refusal::Malformed);
    }
    let mut shown = Shown::new(Protocol::Ssh, end);
    shown.client = Some(software);
    Ok(shown)
}
