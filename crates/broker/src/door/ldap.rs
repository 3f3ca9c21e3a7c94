//! LDAP before StartTLS (RFC 4511 4.14): one extended request, and the answer with its message id.

use fourtuple_engine::broker::guide::{Heard, Turn};

use super::Command;

/// The answer to the broker's own request.
pub(super) const BEGIN: u8 = 8;
/// 1.3.6.1.4.1.1466.20037
const START_TLS: &[u8] = b"1.3.6.1.4.1.1466.20037";
/// The message id that the broker asks with. The service's connection is a new one, so any does.
const ID: &[u8] = &[2, 1, 1];
const MESSAGE_BYTES: usize = 4_096;
const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const OCTETS: u8 = 0x04;
const ENUMERATED: u8 = 0x0a;
const EXTENDED_REQUEST: u8 = 0x77;
const EXTENDED_RESPONSE: u8 = 0x78;
const REQUEST_NAME: u8 = 0x80;
const RESPONSE_NAME: u8 = 0x8a;

pub(super) fn command<'a>(bytes: &'a [u8], says: &mut Vec<u8>) -> Command<'a> {
    let (message, length) = match element(bytes, SEQUENCE) {
        Element::Whole(message, rest) => (message, bytes.len() - rest.len()),
        Element::More => return Command::More,
        Element::Broken => return Command::Garbage,
    };
    let Element::Whole(id, operation) = element(message, INTEGER) else { return Command::Garbage };
    let Element::Whole(request, _) = element(operation, EXTENDED_REQUEST) else { return Command::Plain(None, None) };
    match element(request, REQUEST_NAME) {
        Element::Whole(START_TLS, _) if (1..=4).contains(&id.len()) => {
            says.extend_from_slice(&answer(id));
            Command::Begins(length)
        }
        _ => Command::Plain(None, None),
    }
}

/// confidentialityRequired (RFC 4511 4.1.9) in the kind of response that a bind has; whoever asks otherwise is told, too.
pub(super) fn insist(bytes: &[u8], says: &mut Vec<u8>) -> usize {
    let Element::Whole(message, rest) = element(bytes, SEQUENCE) else { return bytes.len() };
    if let Element::Whole(id, _) = element(message, INTEGER) {
        says.extend_from_slice(&wrap(SEQUENCE, &[&wrap(INTEGER, id)[..], &wrap(0x61, &result(13))].concat()));
    }
    bytes.len() - rest.len()
}

/// What a client is told that asks for TLS: success, with the id of its message.
pub(crate) fn answer(id: &[u8]) -> Vec<u8> {
    let body = [&result(0)[..], &wrap(RESPONSE_NAME, START_TLS)].concat();
    wrap(SEQUENCE, &[&wrap(INTEGER, id)[..], &wrap(EXTENDED_RESPONSE, &body)].concat())
}

/// What the service is asked, too.
pub(crate) fn before_tls() -> Vec<Turn> {
    let request = wrap(EXTENDED_REQUEST, &wrap(REQUEST_NAME, START_TLS));
    vec![Turn { say: wrap(SEQUENCE, &[ID, &request].concat()).into(), expect: Some(BEGIN) }]
}

/// Success, with the id of the broker's message, and nothing else.
pub(super) fn hears(said: &[u8]) -> Heard {
    let message = match element(said, SEQUENCE) {
        Element::Whole(message, []) => message,
        Element::More => return Heard::More,
        Element::Whole(..) | Element::Broken => return Heard::No,
    };
    let Some(rest) = message.strip_prefix(ID) else { return Heard::No };
    let Element::Whole(response, _) = element(rest, EXTENDED_RESPONSE) else { return Heard::No };
    match element(response, ENUMERATED) {
        Element::Whole([0], _) => Heard::Yes,
        _ => Heard::No,
    }
}

/// An LDAPResult with that code, without names and words.
fn result(code: u8) -> [u8; 7] {
    [ENUMERATED, 1, code, OCTETS, 0, OCTETS, 0]
}

fn wrap(tag: u8, content: &[u8]) -> Vec<u8> {
    debug_assert!(content.len() < 128, "nothing that is said here needs a long length");
    [&[tag, content.len() as u8][..], content].concat()
}

enum Element<'a> {
    /// The content, and what is behind it.
    Whole(&'a [u8], &'a [u8]),
    More,
    Broken,
}

/// The first element, if it has that tag (X.690 8.1; lengths are definite: RFC 4511 5.1).
fn element(bytes: &[u8], expected: u8) -> Element<'_> {
    let (tag, rest) = match bytes {
        [] => return Element::More,
        [tag, ..] if *tag != expected => return Element::Broken,
        [_] => return Element::More,
        [tag, rest @ ..] => (tag, rest),
    };
    debug_assert_eq!(*tag, expected, "others are broken");
    let (length, content) = match rest {
        [short @ 0..=0x7f, content @ ..] => (usize::from(*short), content),
        [long @ 0x81..=0x84, more @ ..] => {
            let count = usize::from(long & 0x7f);
            let Some((digits, content)) = more.split_at_checked(count) else { return Element::More };
            (digits.iter().fold(0, |sum: usize, &digit| sum << 8 | usize::from(digit)), content)
        }
        _ => return Element::Broken,
    };
    if length > MESSAGE_BYTES {
        return Element::Broken;
    }
    content.split_at_checked(length).map_or(Element::More, |(content, rest)| Element::Whole(content, rest))
}
