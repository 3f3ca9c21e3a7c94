//! HTTP/2 with prior knowledge: the host and path of the first request (RFC 9113 3.3, 3.4, 6, 8.3.1).
//!
//! Decides by the first header block, out of its frames. Knows no later request: a client may send those for other
//! hosts over the same connection. A client that waits for the server's SETTINGS before it asks for anything, as some
//! of gRPC do, shows no name and meets the sniff deadline; to answer it here would make it acknowledge SETTINGS that the
//! service never sent, which servers take for an attack. What a probe is, `http1` says.

use crate::cursor::{Cursor, agrees, u32_at};
use crate::hpack::{Fields, Text};
use crate::http1::{PREFLIGHT, without_query};
use crate::name;
use crate::shown::{Intent, Scratch, Shown};
use crate::{Found, Progress, Protocol, Refusal};

/// How far the first request may end from the beginning of the stream.
pub const BYTES: usize = 65_536;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEAD: usize = 9;
/// SETTINGS_MAX_FRAME_SIZE before the server has said anything (RFC 9113 6.5.2).
const FRAME_BYTES: usize = 1 << 14;
/// The largest header block that is read.
const BLOCK_BYTES: usize = 1 << 14;

mod frame {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PUSH_PROMISE: u8 = 5;
    pub(super) const CONTINUATION: u8 = 9;
}

const ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// Phases of the search: what has to come next.
const SETTINGS: u8 = 0;
const REQUEST: u8 = 1;
const REST_OF_REQUEST: u8 = 2;
const DONE: u8 = 3;

/// `at`: the next frame; `mark`: bytes of the header block so far; `size`: the stream of the request.
pub(crate) fn find(progress: &mut Progress, bytes: &[u8]) -> Found {
    if progress.at == 0 {
        if !agrees(bytes, PREFACE) {
            return Found::No;
        }
        if bytes.len() < PREFACE.len() {
            return Found::More(PREFACE.len() + FRAME_HEAD);
        }
        progress.at = PREFACE.len() as u32;
    }
    loop {
        let at = progress.at as usize;
        let Some(frame) = Frame::at(bytes, at) else { return Found::More(at + FRAME_HEAD) };
        let next = match follow(*progress, &frame) {
            Ok(next) => next,
            Err(why) => return Found::Refused(why),
        };
        let end = next.at as usize;
        if next.phase > REQUEST && bytes.len() < end {
            return Found::More(end);
        }
        if next.phase == DONE {
            return Found::Whole(end);
        }
        *progress = next;
    }
}

/// Read the request whose block ends at `end`.
pub(crate) fn read<'a>(bytes: &'a [u8], end: usize, scratch: &'a mut Scratch) -> Result<Shown<'a>, Refusal> {
    let Scratch { message, text, name } = scratch;
    let mut shown = Shown::new(Protocol::Http2, end);
    let request = Request::read(block(&bytes[..end], message)?)?;
    let (authority, rest) = match request.authority.or(request.host) {
        Some(authority) => {
            let used = authority.copy(text)?.len();
            text.split_at_mut(used)
        }
        None => text.split_at_mut(0),
    };
    if let (Some(_), Some(host)) = (request.authority, request.host)
        && !name::same(authority, host.copy(rest)?)?
    {
        return Err(Refusal::Contradiction); // RFC 9113 8.3.1
    }
    (shown.name, shown.port) = name::authority(authority, name)?;
    shown.path = match request.path {
        Some(path) => Some(without_query(path.copy(rest)?)),
        None => None,
    };
    shown.intent = Intent::probe_if(request.is_probe && !request.is_preflight || shown.name.is_none());
    Ok(shown)
}

#[derive(Clone, Copy)]
struct Frame<'a> {
    size: usize,
    kind: u8,
    flags: u8,
    stream: u32,
    /// As much of the payload as is there.
    payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// The frame whose head begins at `at` (RFC 9113 4.1).
    fn at(bytes: &'a [u8], at: usize) -> Option<Self> {
        let (head, rest) = bytes.get(at..)?.split_at_checked(FRAME_HEAD)?;
        let size = (u32_at(head, 0) >> 8) as usize;
        let payload = &rest[..rest.len().min(size)];
        Some(Self { size, kind: head[3], flags: head[4], stream: u32_at(head, 5) & 0x7fff_ffff, payload })
    }
}

/// Where the search stands behind this frame.
fn follow(mut progress: Progress, frame: &Frame<'_>) -> Result<Progress, Refusal> {
    let end = progress.at as usize + FRAME_HEAD + frame.size;
    if frame.size > FRAME_BYTES || end > BYTES - FRAME_HEAD {
        return Err(Refusal::TooLong);
    }
    progress.at = end as u32;
    match (progress.phase, frame.kind) {
        // RFC 9113 3.4: SETTINGS is the first frame.
        (SETTINGS, frame::SETTINGS) if frame.stream == 0 && frame.flags & ACK == 0 && frame.size.is_multiple_of(6) => {
            progress.phase = REQUEST;
            return Ok(progress);
        }
        // RFC 9113 5.1.1: streams of clients have odd numbers.
        (REQUEST, frame::HEADERS) if frame.stream % 2 == 1 => {}
        // RFC 9113 6.2: nothing comes between the frames of one block.
        (REST_OF_REQUEST, frame::CONTINUATION) if frame.stream == progress.size => {}
        // RFC 9113 5.1: these are for a stream that is open, or for no client.
        (REQUEST, frame::DATA | frame::HEADERS | frame::RST_STREAM | frame::PUSH_PROMISE | frame::CONTINUATION)
        | (SETTINGS | REST_OF_REQUEST, _) => return Err(Refusal::Malformed),
        _ => return Ok(progress), // WINDOW_UPDATE, PRIORITY, PING, and those that nobody knows (5.5)
    }
    progress.size = frame.stream;
    progress.mark += frame.size as u32;
    progress.phase = if frame.flags & END_HEADERS == 0 { REST_OF_REQUEST } else { DONE };
    if progress.mark as usize > BLOCK_BYTES { Err(Refusal::TooLong) } else { Ok(progress) }
}

/// The header block of the request: as it stands if it is in one frame, otherwise put together in `message`.
fn block<'a>(bytes: &'a [u8], message: &'a mut [u8]) -> Result<&'a [u8], Refusal> {
    let (mut at, mut used) = (PREFACE.len(), 0);
    while let Some(frame) = Frame::at(bytes, at) {
        at += FRAME_HEAD + frame.size;
        let fragment = match frame.kind {
            frame::HEADERS => without_padding(&frame)?,
            frame::CONTINUATION => frame.payload,
            _ => continue,
        };
        if frame.kind == frame::HEADERS && at == bytes.len() {
            return Ok(fragment);
        }
        message[used..used + fragment.len()].copy_from_slice(fragment);
        used += fragment.len();
    }
    Ok(&message[..used])
}

/// The fragment in a HEADERS frame (RFC 9113 6.2).
fn without_padding<'a>(frame: &Frame<'a>) -> Result<&'a [u8], Refusal> {
    let mut payload = Cursor(frame.payload);
    let padding = if frame.flags & PADDED == 0 { 0 } else { usize::from(payload.u8()?) };
    if frame.flags & PRIORITY != 0 {
        payload.take(5)?;
    }
    let count = payload.0.len().checked_sub(padding).ok_or(Refusal::Malformed)?;
    payload.take(count)
}

/// The fields that say where a request goes.
#[derive(Default)]
struct Request<'a> {
    authority: Option<Text<'a>>,
    path: Option<Text<'a>>,
    host: Option<Text<'a>>,
    is_probe: bool,
    is_preflight: bool,
}

impl<'a> Request<'a> {
    /// Pseudo-fields come first, each once (RFC 9113 8.3); a request has :method, and :path unless it is CONNECT.
    fn read(block: &'a [u8]) -> Result<Self, Refusal> {
        let mut found = Self::default();
        let (mut method, mut regular) = (None, false);
        let mut fields = Fields::new(block);
        while let Some(field) = fields.next()? {
            let mut first = None;
            field.name.each(|byte| first = first.or(Some(byte)))?;
            let pseudo = first == Some(b':');
            regular |= !pseudo;
            let place = if field.name.is(b":authority")? {
                &mut found.authority
            } else if field.name.is(b":path")? {
                &mut found.path
            } else if field.name.is(b":method")? {
                &mut method
            } else if field.name.is(b"host")? {
                &mut found.host
            } else {
                found.is_preflight |= field.name.is(PREFLIGHT)?;
                continue;
            };
            if pseudo && regular {
                return Err(Refusal::Malformed);
            }
            if place.replace(field.value).is_some() {
                return Err(Refusal::Repeated);
            }
        }
        let method = method.ok_or(Refusal::Malformed)?;
        let tunnel = method.is(b"CONNECT")?;
        found.is_probe = method.is(b"HEAD")? || method.is(b"OPTIONS")?;
        if found.path.is_some() || tunnel { Ok(found) } else { Err(Refusal::Malformed) }
    }
}
