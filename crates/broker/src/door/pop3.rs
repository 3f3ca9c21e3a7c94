//! POP3 before STLS (RFC 1939, RFC 2449, RFC 2595), and who logs in without.

use fourtuple_engine::broker::guide::Turn;

use super::lines::{self, Line, word};
use super::{Command, Door};

/// A line with +OK.
pub(super) const FINE: u8 = 5;
/// RFC 2449 4.
const LINE_BYTES: usize = 255;

pub(super) fn greet(door: &Door, says: &mut Vec<u8>) {
    // Without a timestamp: APOP would need the service's (RFC 1939 7).
    says.extend_from_slice(format!("+OK {} is ready\r\n", door.host).as_bytes());
}

pub(super) fn command<'a>(door: &Door, bytes: &'a [u8], says: &mut Vec<u8>) -> Command<'a> {
    let line = match lines::first(bytes, LINE_BYTES) {
        Line::More => return Command::More,
        Line::Broken => return Command::Garbage,
        Line::Whole(line) => line,
    };
    let count = line.len() + 2;
    let (verb, rest) = word(line);
    let (answer, command) = match verb.as_slice() {
        b"CAPA" if door.requires_tls => ("+OK\r\nSTLS\r\n.\r\n", Command::Answered(count)),
        b"CAPA" => ("+OK\r\nSTLS\r\nUSER\r\n.\r\n", Command::Answered(count)),
        b"QUIT" => ("+OK\r\n", Command::Leaves),
        b"STLS" => ("+OK begin\r\n", Command::Begins(count)),
        b"USER" => return Command::Plain(Some(rest).filter(|name| !name.is_empty()), None),
        _ => return Command::Plain(None, None),
    };
    says.extend_from_slice(answer.as_bytes());
    command
}

pub(super) fn insist(bytes: &[u8], says: &mut Vec<u8>) -> usize {
    says.extend_from_slice(b"-ERR STLS has to come first\r\n");
    bytes.iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |end| end + 1)
}

pub(super) fn before_tls() -> Vec<Turn> {
    let mut turns = before_plain();
    turns.push(Turn { say: b"STLS\r\n".into(), expect: Some(FINE) });
    turns
}

pub(super) fn before_plain() -> Vec<Turn> {
    vec![Turn { say: b"".into(), expect: Some(FINE) }]
}
