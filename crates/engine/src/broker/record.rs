//! What is said over a ferry: the record of a connection that moves, the bytes that move with it, and the answers.
//!
//! Decides the layout (docs/ferry.md) and what of it is believed. Knows no socket and no session.
//!
//! All numbers are big-endian. Magic, version, kind and serial stay where they are in every version, so that a message of
//! another one can be refused by its serial.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The first four bytes.
pub const MAGIC: [u8; 4] = *b"4TFY";
/// The version of this layout.
pub const VERSION: u8 = 1;
/// Bytes of every message before what is its own.
const HEAD_BYTES: usize = 12;
/// Bytes of a record before the service's name.
const RECORD_BYTES: usize = 88;
/// A service's name is no longer.
pub const MOST_NAME_BYTES: usize = 4096;
/// No message is longer, so that it has room in a send buffer (net.core.wmem_default) with another one.
pub const MOST_BYTES: usize = 96 << 10;

/// What a side of a connection has said or heard.
pub const FINISHED: u8 = 1;
/// It has been told that it gets no more.
pub const SHUT: u8 = 2;
/// It receives no more.
pub const GONE: u8 = 4;

const BYTES: u8 = 1;
const RELAY: u8 = 2;
const FRESH: u8 = 3;
const DONE: u8 = 4;
const TAKEN: u8 = 5;
const REFUSED: u8 = 6;

/// One message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message<'a> {
    /// Bytes for one side of the connection whose record follows.
    Bytes {
        /// Of that record.
        serial: u32,
        /// 0 the client, 1 the service.
        side: usize,
        /// At least one.
        bytes: &'a [u8],
    },
    /// A connection that is relayed; both sockets come with it.
    Relay(Record<'a>),
    /// A connection whose service is not known yet, or not reached; its socket comes with it, and every byte of it is unread.
    Fresh(Record<'a>),
    /// There is no more to come.
    Done,
    /// The connection is the receiver's.
    Taken {
        /// Of its record.
        serial: u32,
    },
    /// The connection stays where it is.
    Refused {
        /// Of its record.
        serial: u32,
    },
}

/// A connection on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record<'a> {
    /// Which of its sender's.
    pub serial: u32,
    /// Through which listener it came.
    pub listener: u32,
    /// Who it is.
    pub peer: Option<SocketAddr>,
    /// The moment at which it was accepted, which is its name, too (`survey`).
    pub accepted_ns: u64,
    /// Nanoseconds until it is given up; 0 is not said.
    pub patience_ns: u64,
    /// `FINISHED`, `SHUT`, `GONE` of the client and of the service.
    pub sides: [u8; 2],
    /// Bytes received from each side so far.
    pub bytes: [u64; 2],
    /// Bytes for each side that came in messages before.
    pub before: [u32; 2],
    /// The service's name; empty if it is not known.
    pub service: &'a str,
    /// Bytes for each side, behind those.
    pub queued: [&'a [u8]; 2],
}

/// Why a message is not believed; the serial that an answer names, if it says one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unread(pub Option<u32>);

/// The message in these bytes, whole.
pub fn read(message: &[u8]) -> Result<Message<'_>, Unread> {
    if message.len() < HEAD_BYTES || message[..4] != MAGIC {
        return Err(Unread(None));
    }
    let serial = number(message, 8);
    let (own, unread) = (&message[HEAD_BYTES..], Unread(Some(serial)));
    if message[4] != VERSION || message[7] != 0 {
        return Err(unread);
    }
    let side = message[6];
    match (message[5], side, own) {
        (BYTES, 0 | 1, [_, ..]) => Ok(Message::Bytes { serial, side: side.into(), bytes: own }),
        (RELAY, 0, _) => record(serial, message).map(Message::Relay).ok_or(unread),
        (FRESH, 0, _) => {
            let fresh = record(serial, message).filter(|it| it.before == [0; 2] && it.queued == [b"" as &[u8]; 2]);
            fresh.map(Message::Fresh).ok_or(unread)
        }
        (DONE, 0, []) => Ok(Message::Done),
        (TAKEN, 0, []) => Ok(Message::Taken { serial }),
        (REFUSED, 0, []) => Ok(Message::Refused { serial }),
        _ => Err(unread),
    }
}

fn record(serial: u32, message: &[u8]) -> Option<Record<'_>> {
    let (fixed, rest) = message.split_at_checked(RECORD_BYTES)?;
    let name_bytes = usize::from(u16::from_be_bytes([fixed[22], fixed[23]]));
    let counts = [number(fixed, 80), number(fixed, 84)].map(|count| count as usize);
    let (service, rest) = rest.split_at_checked(name_bytes)?;
    let (to_client, rest) = rest.split_at_checked(counts[0])?;
    let (to_service, rest) = rest.split_at_checked(counts[1])?;
    let known = FINISHED | SHUT | GONE;
    if !rest.is_empty() || name_bytes > MOST_NAME_BYTES || (fixed[16] | fixed[17]) & !known != 0 || fixed[19] != 0 {
        return None;
    }
    let address = Ipv6Addr::from(<[u8; 16]>::try_from(&fixed[24..40]).ok()?);
    let port = u16::from_be_bytes([fixed[20], fixed[21]]);
    let peer = match fixed[18] {
        0 => None,
        4 => Some(SocketAddr::new(address.to_ipv4_mapped()?.into(), port)),
        6 => Some(SocketAddr::new(address.into(), port)),
        _ => return None,
    };
    Some(Record {
        serial,
        listener: number(fixed, 12),
        peer,
        accepted_ns: long(fixed, 40),
        patience_ns: long(fixed, 48),
        sides: [fixed[16], fixed[17]],
        bytes: [long(fixed, 56), long(fixed, 64)],
        before: [number(fixed, 72), number(fixed, 76)],
        service: std::str::from_utf8(service).ok()?,
        queued: [to_client, to_service],
    })
}

/// Write a message of the head alone; returns its length. Anything but an answer or `Done` is a bug of ours.
pub fn write(into: &mut [u8], message: Message<'_>) -> usize {
    let (kind, serial) = match message {
        Message::Taken { serial } => (TAKEN, serial),
        Message::Refused { serial } => (REFUSED, serial),
        Message::Done => (DONE, 0),
        Message::Bytes { .. } | Message::Relay(_) | Message::Fresh(_) => unreachable!("it has more than a head"),
    };
    head(into, kind, 0, serial);
    HEAD_BYTES
}

/// Write the head of a message of bytes for `side`; they go behind it. Returns where.
pub fn write_bytes(into: &mut [u8], serial: u32, side: usize) -> usize {
    head(into, BYTES, side as u8, serial);
    HEAD_BYTES
}

/// Write a record, whose `queued` are not looked at: so many bytes for the client and for the service as `counts` says go
/// behind it. Returns where.
pub fn write_record(into: &mut [u8], is_relay: bool, record: &Record<'_>, counts: [u32; 2]) -> usize {
    head(into, if is_relay { RELAY } else { FRESH }, 0, record.serial);
    let service = cut(record.service);
    into[12..16].copy_from_slice(&record.listener.to_be_bytes());
    into[16..18].copy_from_slice(&record.sides);
    into[18..24].fill(0);
    into[24..40].fill(0);
    if let Some(peer) = record.peer {
        into[18] = if peer.is_ipv4() { 4 } else { 6 };
        into[20..22].copy_from_slice(&peer.port().to_be_bytes());
        let address = match peer.ip() {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        into[24..40].copy_from_slice(&address.octets());
    }
    into[22..24].copy_from_slice(&(service.len() as u16).to_be_bytes());
    for (at, value) in
        [(40, record.accepted_ns), (48, record.patience_ns), (56, record.bytes[0]), (64, record.bytes[1])]
    {
        into[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    for (at, value) in [(72, record.before[0]), (76, record.before[1]), (80, counts[0]), (84, counts[1])] {
        into[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    let end = RECORD_BYTES + service.len();
    into[RECORD_BYTES..end].copy_from_slice(service.as_bytes());
    end
}

fn head(into: &mut [u8], kind: u8, side: u8, serial: u32) {
    into[..4].copy_from_slice(&MAGIC);
    into[4..8].copy_from_slice(&[VERSION, kind, side, 0]);
    into[8..12].copy_from_slice(&serial.to_be_bytes());
}

/// What of a name has room.
fn cut(name: &str) -> &str {
    let mut end = name.len().min(MOST_NAME_BYTES);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(number(bytes, at)) << 32 | u64::from(number(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_record() -> (Record<'static>, Vec<u8>) {
        let record = Record {
            serial: 7,
            listener: 1,
            peer: Some("192.0.2.7:1000".parse().unwrap()),
            accepted_ns: 1 << 40,
            patience_ns: 9,
            sides: [FINISHED, SHUT],
            bytes: [3, 1 << 33],
            before: [0, 5],
            service: "shop",
            queued: [b"to the client", b"to the service"],
        };
        let mut message = vec![0xff; 4096];
        let mut end = write_record(&mut message, true, &record, [13, 14]);
        for part in record.queued {
            message[end..end + part.len()].copy_from_slice(part);
            end += part.len();
        }
        message.truncate(end);
        (record, message)
    }

    #[test]
    fn what_is_written_is_read() {
        let (record, message) = a_record();
        assert_eq!(read(&message), Ok(Message::Relay(record)));
        let peers = [None, Some("[2001:db8::1]:9".parse().unwrap())];
        for peer in peers {
            let fresh = Record { peer, before: [0; 2], queued: [b""; 2], service: "", ..record };
            let mut message = vec![0xff; 4096];
            let end = write_record(&mut message, false, &fresh, [0; 2]);
            assert_eq!(read(&message[..end]), Ok(Message::Fresh(fresh)));
        }
        for said in [Message::Done, Message::Taken { serial: 9 }, Message::Refused { serial: u32::MAX }] {
            let mut message = [0xff; HEAD_BYTES];
            assert_eq!(write(&mut message, said), HEAD_BYTES);
            assert_eq!(read(&message), Ok(said));
        }
        let mut message = vec![0xff; 20];
        let end = write_bytes(&mut message, 3, 1);
        let bytes = &[0xff; 8][..];
        assert_eq!(read(&message), Ok(Message::Bytes { serial: 3, side: 1, bytes }));
        assert_eq!(read(&message[..end]), Err(Unread(Some(3))));
    }

    #[test]
    fn what_is_cut_longer_or_changed_is_not_believed() {
        let (record, message) = a_record();
        for end in 0..message.len() {
            let serial = (end >= HEAD_BYTES).then_some(7);
            assert_eq!(read(&message[..end]), Err(Unread(serial)), "{end} bytes");
        }
        assert_eq!(read(&[&message[..], b"!"].concat()), Err(Unread(Some(7))));
        for (at, value) in [(4, 2), (5, 9), (6, 1), (7, 1), (16, 8), (17, 255), (18, 5), (19, 1), (88, 0xff)] {
            let mut other = message.clone();
            other[at] = value;
            assert_eq!(read(&other), Err(Unread(Some(7))), "byte {at}");
        }
        let mut other = message.clone();
        other[0] = 0;
        assert_eq!(read(&other), Err(Unread(None)));
        // Any byte may be anything: a value or a refusal, never a panic.
        for at in 0..message.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut other = message.clone();
                other[at] = value;
                let _ = read(&other);
            }
        }
        let long = Record { service: &"ä".repeat(3000), ..record };
        let mut into = vec![0; 8192];
        assert_eq!(write_record(&mut into, false, &long, [0; 2]), RECORD_BYTES + MOST_NAME_BYTES);
    }
}
