//! TLS: a ClientHello, out of however many records and segments it came in (RFC 8446 4.1.2, 5.1; RFC 6066 3; RFC 7301).
//!
//! Decides what a client names and offers. Knows no key, cipher or later message. Two bytes, 22 and 3, and it is TLS:
//! from there on a fault is refused, because a server may forgive what a sniffer does not.
//!
//! A probe is what names no server, as who comes by an address alone, or offers nothing newer than TLS 1.1, which RFC 8996
//! ended in 2021: of today's clients it is scanners that ask for it, a version at a time.
//!
//! Bound: a handshake message of 65,536 bytes, in records of one byte at worst, so six bytes of stream for each. The
//! protocol's own maximum is 131,396 (cipher suites and extensions both full); no known client passes 20,000.

use crate::cursor::{Cursor, u16_at};
use crate::name;
use crate::shown::{Alpn, Intent, Scratch, Shown};
use crate::{Found, Progress, Protocol, Refusal};

/// The largest ClientHello that is read, with the four bytes of its own header.
pub const HELLO_BYTES: usize = 65_536;
pub(crate) const BOUND: usize = HELLO_BYTES * (RECORD_HEAD + 1);

const RECORD_HEAD: usize = 5;
/// RFC 8446 5.1: the length MUST NOT exceed 2^14 bytes.
const RECORD_BYTES: usize = 1 << 14;
const MESSAGE_HEAD: usize = 4;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;

mod extension {
    pub(super) const SERVER_NAME: u16 = 0;
    pub(super) const ALPN: u16 = 16;
    pub(super) const SUPPORTED_VERSIONS: u16 = 43;
    /// RFC 9849.
    pub(super) const ENCRYPTED_HELLO: u16 = 0xfe0d;
}

/// `at`: the next record; `mark`: bytes of the hello before it; `size`: bytes of the hello in all, once known.
pub(crate) fn find(progress: &mut Progress, bytes: &[u8]) -> Found {
    match bytes {
        [] | [HANDSHAKE] => return Found::More(RECORD_HEAD),
        [HANDSHAKE, 3, ..] => {} // the minor version means nothing (RFC 8446 5.1)
        _ => return Found::No,
    }
    loop {
        let at = progress.at as usize;
        let body = at + RECORD_HEAD;
        if bytes.len() < body {
            return Found::More(body);
        }
        let count = u16_at(bytes, at + 3);
        // No other type in between, no empty fragment (RFC 8446 5.1).
        if bytes[at] != HANDSHAKE || bytes[at + 1] != 3 || count == 0 || count > RECORD_BYTES {
            return Found::Refused(Refusal::Malformed);
        }
        let before = progress.mark as usize;
        let there = (bytes.len() - body).min(count);
        if progress.size == 0 && before + there >= MESSAGE_HEAD {
            match hello_bytes(bytes) {
                Ok(size) => progress.size = size,
                Err(why) => return Found::Refused(why),
            }
        }
        let wanted = if progress.size == 0 { MESSAGE_HEAD } else { progress.size as usize } - before;
        if progress.size != 0 && there >= wanted {
            return Found::Whole(body + wanted);
        }
        if there < count {
            return Found::More(body + count.min(wanted));
        }
        progress.mark += count as u32;
        progress.at = (body + count) as u32;
    }
}

/// Read the hello whose last byte is before `end`.
pub(crate) fn read<'a>(bytes: &'a [u8], end: usize, scratch: &'a mut Scratch) -> Result<Shown<'a>, Refusal> {
    let Scratch { message, name, .. } = scratch;
    let first = &bytes[RECORD_HEAD..end.min(RECORD_HEAD + u16_at(bytes, 3))];
    let hello = if first.len() + RECORD_HEAD == end {
        first
    } else {
        let mut used = 0;
        for fragment in Fragments(&bytes[..end]) {
            message[used..used + fragment.len()].copy_from_slice(fragment);
            used += fragment.len();
        }
        &message[..used]
    };
    let mut shown = Shown::new(Protocol::Tls, end);
    let mut is_old = hello.get(MESSAGE_HEAD..MESSAGE_HEAD + 2).is_some_and(is_old_version);
    let mut extensions = extensions(Cursor(&hello[MESSAGE_HEAD..]))?;
    let (mut server_name, mut alpn) = (None, None);
    while !extensions.is_empty() {
        let kind = extensions.u16()?;
        let data = extensions.long()?;
        // Of the extensions that are not read here, GREASE (RFC 8701) is one; whether one repeats is the server's affair.
        let earlier = match kind {
            extension::SERVER_NAME => server_name.replace(data),
            extension::ALPN => alpn.replace(data),
            extension::ENCRYPTED_HELLO => {
                shown.ech = true;
                None
            }
            // Where it is, it alone counts (RFC 8446 4.2.1); a list that is not whole is the server's affair.
            extension::SUPPORTED_VERSIONS => {
                is_old = data.0.get(1..).unwrap_or_default().chunks_exact(2).all(is_old_version);
                None
            }
            _ => None,
        };
        if earlier.is_some() {
            return Err(Refusal::Repeated); // RFC 8446 4.2: not more than one of the same type
        }
    }
    if let Some(data) = server_name
        && let Some(raw) = host_name(data)?
    {
        // RFC 6066 3 forbids addresses; OpenSSL and others send them, and servers take them for no name at all.
        shown.name = if name::is_address(raw) { None } else { Some(name::fold(raw, name)?) };
    }
    if let Some(data) = alpn {
        shown.alpn = protocols(data)?;
    }
    shown.intent = Intent::probe_if(shown.name.is_none() || is_old);
    Ok(shown)
}

/// Whether this is SSL 3.0, TLS 1.0 or 1.1, or GREASE, which is 0x0a0a and so on (RFC 8701 2).
fn is_old_version(version: &[u8]) -> bool {
    u16_at(version, 0) < 0x0303 || version[0] == version[1] && version[0] & 0x0f == 0x0a
}

/// The size of the hello with its head, from its first four bytes, which are in the first four records at the latest.
fn hello_bytes(bytes: &[u8]) -> Result<u32, Refusal> {
    let mut head = [0; MESSAGE_HEAD];
    for (place, byte) in head.iter_mut().zip(Fragments(bytes).flatten()) {
        *place = *byte;
    }
    let size = u32::from_be_bytes([0, head[1], head[2], head[3]]) + MESSAGE_HEAD as u32;
    match head[0] {
        CLIENT_HELLO if size as usize > HELLO_BYTES => Err(Refusal::TooLong),
        CLIENT_HELLO => Ok(size),
        _ => Err(Refusal::Malformed), // no connection begins with another message
    }
}

/// What follows the compression methods; nothing does in a hello of 1999 (RFC 5246 7.4.1.2).
fn extensions<'a>(mut hello: Cursor<'a>) -> Result<Cursor<'a>, Refusal> {
    hello.take(2 + 32)?; // legacy_version, random
    let session = hello.short()?;
    let suites = hello.long()?;
    let compressions = hello.short()?;
    if session.0.len() > 32 || suites.0.len() < 2 || suites.0.len() % 2 != 0 || compressions.is_empty() {
        return Err(Refusal::Malformed);
    }
    if hello.is_empty() {
        return Ok(hello);
    }
    let extensions = hello.long()?;
    if hello.is_empty() { Ok(extensions) } else { Err(Refusal::Malformed) }
}

/// The one name of type host_name in a ServerNameList (RFC 6066 3).
fn host_name<'a>(mut data: Cursor<'a>) -> Result<Option<&'a [u8]>, Refusal> {
    let mut list = data.long()?;
    if list.is_empty() || !data.is_empty() {
        return Err(Refusal::Malformed);
    }
    let mut found = None;
    while !list.is_empty() {
        let kind = list.u8()?;
        let name = list.long()?;
        if kind == 0 && found.replace(name.0).is_some() {
            return Err(Refusal::Repeated); // not more than one name of the same type
        }
    }
    Ok(found)
}

/// A ProtocolNameList whose names are whole and not empty (RFC 7301 3.1).
fn protocols<'a>(mut data: Cursor<'a>) -> Result<Alpn<'a>, Refusal> {
    let list = data.long()?;
    let mut names = list;
    if list.is_empty() || !data.is_empty() {
        return Err(Refusal::Malformed);
    }
    while !names.is_empty() {
        if names.short()?.is_empty() {
            return Err(Refusal::Malformed);
        }
    }
    Ok(Alpn(list.0))
}

/// What the records hold, as far as it is there.
struct Fragments<'a>(&'a [u8]);

impl<'a> Iterator for Fragments<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(RECORD_HEAD)?;
        let (fragment, rest) = rest.split_at(rest.len().min(u16_at(head, 3)));
        self.0 = rest;
        Some(fragment)
    }
}
