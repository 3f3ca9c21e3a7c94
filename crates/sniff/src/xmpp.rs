//! XMPP: the head of a stream, with the domain that it is for (RFC 6120 4.2, 4.7, 4.8, 11).
//!
//! Decides host and, if the client says it already, who it is. That is XML, of which a stream's head has little: maybe a
//! declaration, then one tag. Anything else that begins with a bracket is another protocol. TLS comes later, asked for
//! and answered within the stream, or before all of it, and then `tls` knows the host.

use crate::cursor::{Cursor, agrees};
use crate::name::{self, is_clean};
use crate::shown::{Scratch, Shown};
use crate::{Found, Progress, Protocol, Refusal};

/// The longest head; one has some 200 bytes.
pub(crate) const HEAD_BYTES: usize = 4096;
/// White space in front, as left over from what was sent to keep a connection alive, and the longest name of the tag.
const LEADING_BYTES: usize = 16;
const NAME_BYTES: usize = 64;

const DECLARATION: &[u8] = b"<?xml";
/// The namespace of streams (RFC 6120 4.8.1), and the tag in it.
const STREAMS: &[u8] = b"http://etherx.jabber.org/streams";
const TAG: &[u8] = b"stream";

/// Phases of the search: where in the text `at` is.
const FRONT: u8 = 0;
const IN_DECLARATION: u8 = 1;
const BEHIND_DECLARATION: u8 = 2;
const NAME: u8 = 3;
const ATTRIBUTES: u8 = 4;
const IN_QUOTES: u8 = 5;
const IN_DOUBLE_QUOTES: u8 = 6;

/// `at`: how far it is looked at; `mark`: where the declaration or the tag begins.
pub(crate) fn find(progress: &mut Progress, bytes: &[u8]) -> Found {
    let there = &bytes[..bytes.len().min(HEAD_BYTES)];
    for (at, &byte) in there.iter().enumerate().skip(progress.at as usize) {
        progress.at = at as u32;
        let since = at - progress.mark as usize;
        progress.phase = match (progress.phase, byte) {
            (FRONT | BEHIND_DECLARATION, b' ' | b'\t' | b'\r' | b'\n') if since < LEADING_BYTES => progress.phase,
            (FRONT | BEHIND_DECLARATION, b'<') => {
                progress.mark = at as u32;
                // Which of both it is, the next byte says.
                if progress.phase == FRONT { IN_DECLARATION } else { NAME }
            }
            (IN_DECLARATION, b'?') if since == 1 => IN_DECLARATION,
            (IN_DECLARATION, _) if since == 1 && is_name_start(byte) => NAME,
            (IN_DECLARATION, _) if !agrees(&bytes[progress.mark as usize..=at], DECLARATION) => return Found::No,
            (IN_DECLARATION, b'>') if since > DECLARATION.len() && bytes[at - 1] == b'?' => {
                progress.mark = at as u32;
                BEHIND_DECLARATION
            }
            (IN_DECLARATION, b'<' | b'>') => return Found::No,
            (IN_DECLARATION, _) if since > NAME_BYTES + DECLARATION.len() => return Found::No,
            (IN_DECLARATION, _) => IN_DECLARATION,
            (NAME, _) if since == 1 && !is_name_start(byte) || since > NAME_BYTES => return Found::No,
            (NAME, _) if is_name(byte) => NAME,
            (NAME, b' ' | b'\t' | b'\r' | b'\n' | b'>' | b'/') => {
                if local(&bytes[progress.mark as usize + 1..at]) != TAG {
                    return Found::No;
                }
                ATTRIBUTES
            }
            (NAME, _) => return Found::No,
            (ATTRIBUTES, b'\'') => IN_QUOTES,
            (ATTRIBUTES, b'"') => IN_DOUBLE_QUOTES,
            (IN_QUOTES, b'\'') | (IN_DOUBLE_QUOTES, b'"') => ATTRIBUTES,
            // In no value either (XML 1.0 3.1, AttValue).
            (ATTRIBUTES.., b'<') => return Found::Refused(Refusal::Malformed),
            (phase @ (ATTRIBUTES | IN_QUOTES | IN_DOUBLE_QUOTES), _) => phase,
            _ => return Found::No,
        };
        if byte == b'>' && progress.phase == ATTRIBUTES {
            return match Head::read(&bytes[..=at], progress.mark as usize) {
                Ok(Some(_)) => Found::Whole(at + 1),
                Ok(None) => Found::No,
                Err(why) => Found::Refused(why),
            };
        }
    }
    progress.at = there.len() as u32;
    match there.len() < HEAD_BYTES {
        true => Found::More(there.len() + 1),
        false if progress.phase >= ATTRIBUTES => Found::Refused(Refusal::TooLong),
        false => Found::No,
    }
}

pub(crate) fn read<'a>(
    progress: &Progress,
    bytes: &'a [u8],
    end: usize,
    scratch: &'a mut Scratch,
) -> Result<Shown<'a>, Refusal> {
    let mut shown = Shown::new(Protocol::Xmpp, end);
    let head = Head::read(&bytes[..end], progress.mark as usize)?.ok_or(Refusal::Malformed)?;
    if let Some(to) = head.to {
        shown.name = Some(name::host(to, &mut scratch.name)?);
    }
    if let Some(from) = head.from {
        // Without the resource (RFC 7622 3.1). What XML would have to escape is in neither of the other parts (3.3.1).
        let bare = from.split(|&byte| byte == b'/').next().unwrap_or_default();
        if !is_clean(Cursor(bare)) || bare.iter().any(|byte| byte.is_ascii_control() || b"&\"'>".contains(byte)) {
            return Err(Refusal::Malformed);
        }
        shown.user = Some(bare).filter(|bare| !bare.is_empty());
    }
    Ok(shown)
}

/// What of a stream's head says where it goes.
struct Head<'a> {
    to: Option<&'a [u8]>,
    from: Option<&'a [u8]>,
}

impl<'a> Head<'a> {
    /// The tag from `begin` to the end; None if its namespace is another.
    fn read(bytes: &'a [u8], begin: usize) -> Result<Option<Self>, Refusal> {
        let tag = &bytes[begin + 1..bytes.len() - 1];
        let name = tag.iter().position(|&byte| !is_name(byte)).unwrap_or(tag.len());
        let (name, mut rest) = tag.split_at(name);
        let prefix = name.split_at(name.len() - local(name).len()).0;
        let (mut head, mut is_stream) = (Self { to: None, from: None }, None);
        loop {
            let after = rest.trim_ascii_start();
            if after.is_empty() {
                break;
            }
            if after.len() == rest.len() {
                return Err(Refusal::Malformed); // no white space in front (XML 1.0 3.1)
            }
            let (name, value, left) = attribute(after).ok_or(Refusal::Malformed)?;
            rest = left;
            let earlier = match name {
                b"to" => head.to.replace(value).is_some(),
                b"from" => head.from.replace(value).is_some(),
                _ if declares(name, prefix) => is_stream.replace(value == STREAMS).is_some(),
                _ => false,
            };
            if earlier {
                return Err(Refusal::Repeated);
            }
        }
        Ok(is_stream.unwrap_or(false).then_some(head))
    }
}

/// Name and value of the attribute in front, and what follows it.
fn attribute(text: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let name = text.iter().position(|&byte| !is_name(byte)).filter(|&count| count > 0)?;
    let (name, rest) = text.split_at(name);
    let rest = rest.trim_ascii_start().strip_prefix(b"=")?.trim_ascii_start();
    let (quote, rest) = rest.split_first().filter(|(quote, _)| matches!(quote, b'\'' | b'"'))?;
    let end = rest.iter().position(|byte| byte == quote)?;
    Some((name, &rest[..end], &rest[end + 1..]))
}

/// Whether an attribute says what a prefix means, which has its colon, or is empty (Namespaces in XML, 3).
fn declares(attribute: &[u8], prefix: &[u8]) -> bool {
    match (attribute.strip_prefix(b"xmlns"), prefix) {
        (Some(rest), b"") => rest.is_empty(),
        (Some([b':', rest @ ..]), [prefix @ .., _]) => rest == prefix,
        _ => false,
    }
}

/// What of a name stands behind its prefix.
fn local(name: &[u8]) -> &[u8] {
    name.iter().position(|&byte| byte == b':').map_or(name, |colon| &name[colon + 1..])
}

/// ASCII of what XML allows: prefixes are chosen by programs.
fn is_name_start(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_'
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_-.:".contains(&byte)
}
