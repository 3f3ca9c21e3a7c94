//! MySQL's and MariaDB's handshake: the server greets with a salt, and the client asks for TLS or logs in at once.
//!
//! A password is proved with the salt of whoever greeted, so no proof that a client has made for the door may count for
//! the service. The door therefore names a way of proving that nobody knows: the client then proves nothing, and the
//! service, whose account is of another kind, asks it anew with its own salt (AuthSwitchRequest).

use fourtuple_engine::broker::guide::{Heard, Turn};

use super::{Command, Door};

/// A greeting.
pub(super) const GREETING: u8 = 6;
/// A greeting of a server that has TLS.
pub(super) const GREETING_WITH_TLS: u8 = 7;
/// What nobody knows.
const PLUGIN: &[u8] = b"fourtuple_door";
/// No secret: nothing is proved with it.
const SALT: &[u8; 20] = b"fourtuple-has-nosalt";
const HEADER_BYTES: usize = 4;
/// Of a client's answer, and a server's greeting.
const PACKET_BYTES: usize = 4_000;
const PROTOCOL_10: u8 = 10;
/// An SSLRequest is the beginning of a login, up to the user.
const REQUEST_BYTES: usize = 32;

const CONNECT_WITH_DB: u32 = 1 << 3;
const PROTOCOL_41: u32 = 1 << 9;
const SSL: u32 = 1 << 11;
const SECURE_CONNECTION: u32 = 1 << 15;
const PLUGIN_AUTH_LENENC: u32 = 1 << 21;
/// LONG_PASSWORD, FOUND_ROWS, LONG_FLAG, CONNECT_WITH_DB, LOCAL_FILES, IGNORE_SPACE, PROTOCOL_41, INTERACTIVE, SSL,
/// TRANSACTIONS, SECURE_CONNECTION, MULTI_STATEMENTS, MULTI_RESULTS, PS_MULTI_RESULTS, PLUGIN_AUTH, CONNECT_ATTRS,
/// PLUGIN_AUTH_LENENC: what every server has had since 2013.
const CAPABILITIES: u32 = 0x003f_af8f;

pub(super) fn greet(door: &Door, says: &mut Vec<u8>) {
    let mut packet = vec![PROTOCOL_10];
    packet.extend_from_slice(door.host.as_bytes());
    packet.push(0);
    packet.extend_from_slice(&1_u32.to_le_bytes());
    packet.extend_from_slice(&SALT[..8]);
    packet.push(0);
    packet.extend_from_slice(&(CAPABILITIES as u16).to_le_bytes());
    // utf8mb4, SERVER_STATUS_AUTOCOMMIT.
    packet.extend_from_slice(&[45, 2, 0]);
    packet.extend_from_slice(&((CAPABILITIES >> 16) as u16).to_le_bytes());
    packet.push(SALT.len() as u8 + 1);
    packet.extend_from_slice(&[0; 10]);
    packet.extend_from_slice(&SALT[8..]);
    packet.push(0);
    packet.extend_from_slice(PLUGIN);
    packet.push(0);
    says.extend_from_slice(&framed(0, &packet));
}

pub(super) fn command(bytes: &[u8]) -> Command<'_> {
    let packet = match packet(bytes, 1) {
        Packet::Whole(packet, _) => packet,
        Packet::More => return Command::More,
        Packet::Broken => return Command::Garbage,
    };
    let Some(flags) = packet.first_chunk().map(|flags| u32::from_le_bytes(*flags)) else { return Command::Garbage };
    if flags & PROTOCOL_41 == 0 || packet.len() < REQUEST_BYTES {
        return Command::Garbage;
    }
    if flags & SSL != 0 && packet.len() == REQUEST_BYTES {
        return Command::Begins(HEADER_BYTES + REQUEST_BYTES);
    }
    match login(flags, &packet[REQUEST_BYTES..]) {
        Some((user, database)) => Command::Plain(user, database),
        None => Command::Garbage,
    }
}

/// ER_SECURE_TRANSPORT_REQUIRED.
pub(super) fn insist(bytes: &[u8], says: &mut Vec<u8>) -> usize {
    let text = [&[0xff][..], &3_159_u16.to_le_bytes(), b"#HY000TLS is needed"].concat();
    says.extend_from_slice(&framed(2, &text));
    bytes.len()
}

/// The client's own SSLRequest, which says its capabilities.
pub(super) fn before_tls(request: &[u8]) -> Vec<Turn> {
    vec![Turn { say: b"".into(), expect: Some(GREETING_WITH_TLS) }, Turn { say: request.to_vec().into(), expect: None }]
}

pub(super) fn before_plain() -> Vec<Turn> {
    vec![Turn { say: b"".into(), expect: Some(GREETING) }]
}

pub(super) fn hears(said: &[u8], with_tls: bool) -> Heard {
    let packet = match packet(said, 0) {
        Packet::Whole(packet, []) => packet,
        Packet::More => return Heard::More,
        Packet::Whole(..) | Packet::Broken => return Heard::No,
    };
    let [PROTOCOL_10, rest @ ..] = packet else { return Heard::No };
    let Some(end) = rest.iter().position(|&byte| byte == 0) else { return Heard::No };
    // The thread's number, the first part of the salt and a zero stand in between.
    let flags = rest.get(end + 14..end + 16).map(|flags| u32::from(u16::from_le_bytes([flags[0], flags[1]])));
    match flags {
        Some(flags) if !with_tls || flags & SSL != 0 => Heard::Yes,
        _ => Heard::No,
    }
}

/// User and database; each may be missing.
type Login<'a> = (Option<&'a [u8]>, Option<&'a [u8]>);

/// What a login says behind its fixed part.
fn login(flags: u32, bytes: &[u8]) -> Option<Login<'_>> {
    let (user, rest) = text(bytes)?;
    let rest = match flags {
        _ if flags & PLUGIN_AUTH_LENENC != 0 => match rest {
            // The proof is a short one.
            [count @ 0..=250, rest @ ..] => rest.get(usize::from(*count)..)?,
            [0xfc, low, high, rest @ ..] => rest.get(usize::from(u16::from_le_bytes([*low, *high]))..)?,
            _ => return None,
        },
        _ if flags & SECURE_CONNECTION != 0 => rest.get(1 + usize::from(*rest.first()?)..)?,
        _ => text(rest)?.1,
    };
    let database = if flags & CONNECT_WITH_DB != 0 { Some(text(rest)?.0) } else { None };
    let said = |text: &&[u8]| !text.is_empty();
    Some((Some(user).filter(said), database.filter(said)))
}

fn text(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|&byte| byte == 0)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

enum Packet<'a> {
    /// The packet, and what is behind it.
    Whole(&'a [u8], &'a [u8]),
    More,
    Broken,
}

/// A packet behind three bytes of length and one that counts packets.
fn packet(bytes: &[u8], number: u8) -> Packet<'_> {
    if bytes.get(2).is_some_and(|&byte| byte != 0) || bytes.get(3).is_some_and(|&byte| byte != number) {
        return Packet::Broken;
    }
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return Packet::More };
    let length = usize::from(u16::from_le_bytes([header[0], header[1]]));
    if length > PACKET_BYTES {
        return Packet::Broken;
    }
    rest.split_at_checked(length).map_or(Packet::More, |(packet, rest)| Packet::Whole(packet, rest))
}

fn framed(number: u8, packet: &[u8]) -> Vec<u8> {
    let length = (packet.len() as u32).to_le_bytes();
    [&length[..3], &[number], packet].concat()
}
