//! IMAP before STARTTLS (RFC 9051, RFC 3501), and who logs in without.

use fourtuple_engine::broker::guide::{Heard, Turn};

use super::lines::{self, Line, word};
use super::{Command, Door};

/// A greeting of a server that wants to be logged in to.
pub(super) const GREETING: u8 = 3;
/// The tagged OK to what the broker asks.
pub(super) const TAGGED: u8 = 4;
const LINE_BYTES: usize = 2_048;
const TAG_BYTES: usize = 64;
const TAG: &[u8] = b"door ";

pub(super) fn greet(door: &Door, says: &mut Vec<u8>) {
    let text = format!("* OK [CAPABILITY {}] {} is ready\r\n", capabilities(door), door.host);
    says.extend_from_slice(text.as_bytes());
}

pub(super) fn command<'a>(door: &Door, bytes: &'a [u8], says: &mut Vec<u8>) -> Command<'a> {
    let line = match lines::first(bytes, LINE_BYTES) {
        Line::More => return Command::More,
        Line::Broken => return Command::Garbage,
        Line::Whole(line) => line,
    };
    let Some((tag, rest)) = tagged_line(line) else { return Command::Garbage };
    let count = line.len() + 2;
    let (verb, rest) = word(rest);
    let (untagged, ok, command) = match verb.as_slice() {
        b"CAPABILITY" => (format!("* CAPABILITY {}\r\n", capabilities(door)), "done", Command::Answered(count)),
        b"NOOP" => (String::new(), "done", Command::Answered(count)),
        // RFC 2971: clients say who they are before they know anything. A literal in it is the service's.
        b"ID" if !rest.ends_with(b"}") => ("* ID NIL\r\n".to_owned(), "done", Command::Answered(count)),
        b"LOGOUT" => (format!("* BYE {}\r\n", door.host), "done", Command::Leaves),
        b"STARTTLS" => (String::new(), "begin", Command::Begins(count)),
        b"LOGIN" => return Command::Plain(astring(rest), None),
        _ => return Command::Plain(None, None),
    };
    says.extend_from_slice(untagged.as_bytes());
    says.extend_from_slice(tag);
    says.extend_from_slice(format!(" OK {ok}\r\n").as_bytes());
    command
}

/// RFC 5530: what a server says that needs TLS.
pub(super) fn insist(bytes: &[u8], says: &mut Vec<u8>) -> usize {
    let Line::Whole(line) = lines::first(bytes, LINE_BYTES) else { return bytes.len() };
    says.extend_from_slice(tagged_line(line).map_or(&b"*"[..], |(tag, _)| tag));
    says.extend_from_slice(b" NO [PRIVACYREQUIRED] STARTTLS has to come first\r\n");
    line.len() + 2
}

pub(super) fn before_tls() -> Vec<Turn> {
    let mut turns = before_plain();
    turns.push(Turn { say: [TAG, b"STARTTLS\r\n"].concat().into(), expect: Some(TAGGED) });
    turns
}

pub(super) fn before_plain() -> Vec<Turn> {
    vec![Turn { say: b"".into(), expect: Some(GREETING) }]
}

/// Untagged lines may come in between.
pub(super) fn tagged(line: &[u8]) -> Heard {
    match line.strip_prefix(TAG) {
        Some(rest) if rest.starts_with(b"OK") => Heard::Yes,
        None if line.starts_with(b"* ") && !line.starts_with(b"* BYE") => Heard::More,
        _ => Heard::No,
    }
}

fn capabilities(door: &Door) -> &'static str {
    if door.requires_tls { "IMAP4rev1 STARTTLS LOGINDISABLED" } else { "IMAP4rev1 STARTTLS" }
}

/// The tag, and what is behind it. A tag is repeated to the client, so it is checked: ASTRING-CHAR without "+".
fn tagged_line(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = line.iter().position(|&byte| byte == b' ')?;
    let is_right = |byte: &u8| byte.is_ascii_graphic() && !b"(){%*\"\\+".contains(byte);
    let (tag, rest) = (&line[..end], &line[end + 1..]);
    ((1..=TAG_BYTES).contains(&end) && tag.iter().all(is_right)).then_some((tag, rest))
}

/// A user name as an atom, or in quotes without escapes; a literal comes later, and one with escapes is no plain slice.
fn astring(rest: &[u8]) -> Option<&[u8]> {
    match rest {
        [b'"', quoted @ ..] => {
            let end = quoted.iter().position(|&byte| byte == b'"')?;
            let name = &quoted[..end];
            (!name.contains(&b'\\') && !name.is_empty()).then_some(name)
        }
        [b'{', ..] => None,
        _ => {
            let name = &rest[..rest.iter().position(|&byte| byte == b' ')?];
            (!name.is_empty()).then_some(name)
        }
    }
}
