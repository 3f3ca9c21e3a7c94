//! tcpmux: a service by name or by number, in one line (RFC 1078).
//!
//! Decides which service a line asks for, and what a yes is; saying it, and taking the line off the stream, are the broker's. A number is
//! a name like any other and may have 32 bits: that is how a client without raw sockets says a wide port.

use crate::cursor::{line_end, trim_end};
use crate::name;
use crate::shown::{Scratch, Shown};
use crate::{Found, Progress, Protocol, Refusal};

/// A name, its final dot, CR and LF.
pub(crate) const LINE_BYTES: usize = name::NAME_BYTES + 3;

/// What begins with a plus is a yes.
const YES: &[u8] = b"+\r\n";

/// Anything but the letters of a name is not tcpmux: the RFC allows more, and so would take every text protocol.
pub(crate) fn find(progress: &mut Progress, bytes: &[u8]) -> Found {
    let bytes = &bytes[..bytes.len().min(LINE_BYTES)];
    let may = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'\r' | b'\n');
    let from = progress.at as usize;
    let end = line_end(bytes, from);
    if !bytes[from..end.unwrap_or(bytes.len())].iter().all(may) {
        return Found::No;
    }
    match end {
        Some(end) if is_name(trim_end(&bytes[..end])) => Found::Whole(end),
        None if bytes.len() < LINE_BYTES => {
            progress.at = bytes.len() as u32;
            Found::More(bytes.len() + 1)
        }
        _ => Found::No,
    }
}

/// Names are not case-sensitive.
pub(crate) fn read<'a>(bytes: &'a [u8], end: usize, scratch: &'a mut Scratch) -> Result<Shown<'a>, Refusal> {
    let line = trim_end(&bytes[..end]);
    let mut shown = Shown::new(Protocol::Tcpmux, end);
    shown.number = name::number(line);
    shown.name = Some(name::fold(line, &mut scratch.name)?);
    shown.reply = YES;
    Ok(shown)
}

fn is_name(line: &[u8]) -> bool {
    name::fold(line, &mut [0; name::NAME_BYTES]).is_ok()
}
