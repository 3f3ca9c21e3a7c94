//! SMTP before STARTTLS (RFC 5321, RFC 3207).

use fourtuple_engine::broker::guide::{Heard, Turn};

use super::lines::{self, Line, word};
use super::{Command, Door};

/// A reply with 220: the greeting, and the yes to STARTTLS.
pub(super) const READY: u8 = 1;
/// A reply with 250.
pub(super) const DONE: u8 = 2;
/// RFC 5321 4.5.3.1.4.
const LINE_BYTES: usize = 512;

pub(super) fn greet(door: &Door, says: &mut Vec<u8>) {
    says.extend_from_slice(format!("220 {} ESMTP\r\n", door.host).as_bytes());
}

pub(super) fn command<'a>(door: &Door, bytes: &'a [u8], says: &mut Vec<u8>) -> Command<'a> {
    let line = match lines::first(bytes, LINE_BYTES) {
        Line::More => return Command::More,
        Line::Broken => return Command::Garbage,
        Line::Whole(line) => line,
    };
    let count = line.len() + 2;
    let (verb, rest) = word(line);
    let host = &door.host;
    let (answer, command) = match verb.as_slice() {
        // 4.1.1.1: a name has to follow.
        b"EHLO" | b"HELO" if !is_name(rest) => ("501 a name is needed\r\n".to_owned(), Command::Answered(count)),
        b"EHLO" => (format!("250-{host}\r\n250 STARTTLS\r\n"), Command::Answered(count)),
        b"HELO" => (format!("250 {host}\r\n"), Command::Answered(count)),
        b"NOOP" | b"RSET" => ("250 OK\r\n".to_owned(), Command::Answered(count)),
        b"QUIT" => (format!("221 {host}\r\n"), Command::Leaves),
        // RFC 3207 4.
        b"STARTTLS" if !rest.is_empty() => ("501 no parameters are allowed\r\n".to_owned(), Command::Answered(count)),
        b"STARTTLS" => ("220 begin\r\n".to_owned(), Command::Begins(count)),
        _ => return Command::Plain(None, None),
    };
    says.extend_from_slice(answer.as_bytes());
    command
}

/// RFC 3207 4: what a server says that needs TLS.
pub(super) fn insist(bytes: &[u8], says: &mut Vec<u8>) -> usize {
    says.extend_from_slice(b"530 STARTTLS has to come first\r\n");
    count(bytes)
}

/// Whether an answered line is one by which a client introduces itself.
pub(super) fn introduces(line: &[u8]) -> bool {
    let (verb, rest) = word(line.strip_suffix(b"\r\n").unwrap_or(line));
    matches!(verb.as_slice(), b"EHLO" | b"HELO") && is_name(rest)
}

pub(super) fn before_tls(introduction: &[u8]) -> Vec<Turn> {
    let mut turns = before_plain(true, introduction);
    turns.push(Turn { say: b"STARTTLS\r\n".into(), expect: Some(READY) });
    turns
}

pub(super) fn before_plain(introduced: bool, introduction: &[u8]) -> Vec<Turn> {
    let greeting = Turn { say: b"".into(), expect: Some(READY) };
    let name = Turn { say: introduction.to_vec().into(), expect: Some(DONE) };
    if introduced { vec![greeting, name] } else { vec![greeting] }
}

/// A reply: lines with the code and "-", then one with the code and a blank, or nothing (4.2.1).
pub(super) fn hears(code: &[u8], said: &[u8]) -> Heard {
    lines::hears(said, |line| match line.strip_prefix(code) {
        Some([b'-', ..]) => Heard::More,
        Some([b' ' | b'\r' | b'\n', ..]) => Heard::Yes,
        _ => Heard::No,
    })
}

fn is_name(rest: &[u8]) -> bool {
    !rest.trim_ascii().is_empty() && rest.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ')
}

fn count(bytes: &[u8]) -> usize {
    bytes.iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |end| end + 1)
}
