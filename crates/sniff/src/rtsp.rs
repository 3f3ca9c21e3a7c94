//! RTSP: which host and stream a request is for, and which session it belongs to (RFC 2326, RFC 7826).
//!
//! Decides by the whole head of the first request, as `http1` does, whose grammar of lines it has. Knows no media. A
//! request that names no host is a probe: OPTIONS for `*` or for a path alone, as nmap sends it.

use crate::cursor::{agrees, trim_end};
use crate::http1::{HEAD_BYTES, field, find_head, without_query};
use crate::name;
use crate::shown::{Intent, Scratch, Shown};
use crate::{Found, Progress, Protocol, Refusal};

pub(crate) const BOUND: usize = HEAD_BYTES;

/// What a client may begin with, each with the space behind it (RFC 2326 10, RFC 7826 13).
const METHODS: [&[u8]; 10] = [
    b"OPTIONS ",
    b"DESCRIBE ",
    b"SETUP ",
    b"PLAY ",
    b"PAUSE ",
    b"TEARDOWN ",
    b"ANNOUNCE ",
    b"RECORD ",
    b"GET_PARAMETER ",
    b"SET_PARAMETER ",
];

/// As in `http1`.
pub(crate) fn find(progress: &mut Progress, bytes: &[u8]) -> Found {
    if !METHODS.iter().any(|method| agrees(bytes, method)) {
        return Found::No;
    }
    find_head(progress, bytes, 0, |line| Ok(target(line)?.is_some()))
}

pub(crate) fn read<'a>(bytes: &'a [u8], end: usize, scratch: &'a mut Scratch) -> Result<Shown<'a>, Refusal> {
    let mut shown = Shown::new(Protocol::Rtsp, end);
    let mut lines = bytes[..end].split_inclusive(|&byte| byte == b'\n');
    let target = target(lines.next().unwrap_or_default())?.ok_or(Refusal::Malformed)?;
    for line in lines.map(trim_end).take_while(|line| !line.is_empty()) {
        let (name, value) = field(line)?;
        if name.eq_ignore_ascii_case(b"session") {
            // Its timeout stands behind a semicolon (RFC 2326 12.37).
            let id = value.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii();
            if shown.client.replace(id).is_some() {
                return Err(Refusal::Repeated);
            }
        }
    }
    let rest = match target {
        b"*" | [b'/', ..] => target,
        _ => {
            let colon = target.windows(3).position(|it| it == b"://").ok_or(Refusal::Malformed)?;
            let (scheme, rest) = (&target[..colon], &target[colon + 3..]);
            if ![b"rtsp".as_slice(), b"rtsps", b"rtspu"].iter().any(|it| scheme.eq_ignore_ascii_case(it)) {
                return Err(Refusal::Malformed);
            }
            let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
            let (authority, rest) = rest.split_at(end);
            // Cameras are asked with user and password in front, as people write their addresses.
            let host = match authority.iter().position(|&byte| byte == b'@') {
                Some(at) => {
                    shown.user = authority[..at].split(|&byte| byte == b':').next();
                    &authority[at + 1..]
                }
                None => authority,
            };
            (shown.name, shown.port) = name::authority(host, &mut scratch.name)?;
            if shown.name.is_none() {
                return Err(Refusal::BadName);
            }
            rest
        }
    };
    shown.path = Some(match without_query(rest) {
        b"" => b"/",
        path => path,
    });
    shown.intent = Intent::probe_if(shown.name.is_none());
    Ok(shown)
}

/// What the request line asks for; None if it is none of RTSP.
fn target(line: &[u8]) -> Result<Option<&[u8]>, Refusal> {
    let line = trim_end(line);
    let last = line.iter().rposition(|&byte| byte == b' ').map_or(0, |at| at + 1);
    let version = &line[last..];
    if !version.starts_with(b"RTSP/") {
        return Ok(None);
    }
    let mut words = line.split(|&byte| byte == b' ');
    let (Some(_), Some(target), Some(b"RTSP/1.0" | b"RTSP/2.0"), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Refusal::Malformed);
    };
    let visible = !target.is_empty() && target.iter().all(|&byte| byte > b' ' && byte != 0x7f);
    if visible { Ok(Some(target)) } else { Err(Refusal::Malformed) }
}
