//! AMQP: the header with which a client says which version it speaks (AMQP 0-9-1, 4.2.2; AMQP 1.0, 2.2 and 5.3.2).
//!
//! Decides between the family of 0-9-1 and 1.0, which are two protocols. Both name host and user only when the server has
//! spoken. To speak in its place is no way to learn them: Connection.Start promises mechanisms and capabilities by which a
//! client then acts, Connection.Tune binds it to sizes, and all of it would have to be agreed upon with the service once
//! more, with other outcome. Behind TLS the server name says more.

use crate::cursor::agrees;
use crate::shown::Shown;
use crate::{Found, Protocol};

pub(crate) const HEADER_BYTES: usize = 8;

/// Of 0-9-1, 0-8, 0-9, 0-10, and of clients of 0-9-1 that got it wrong and are served all the same.
const OLD: &[&[u8; HEADER_BYTES]] = &[
    b"AMQP\x00\x00\x09\x01",
    b"AMQP\x01\x01\x08\x00",
    b"AMQP\x01\x01\x00\x09",
    b"AMQP\x01\x01\x00\x0a",
    b"AMQP\x01\x01\x09\x01",
];
/// Plain, with TLS after the server's header, with SASL after it.
const ONE: &[&[u8; HEADER_BYTES]] = &[b"AMQP\x00\x01\x00\x00", TLS, b"AMQP\x03\x01\x00\x00"];
const TLS: &[u8; HEADER_BYTES] = b"AMQP\x02\x01\x00\x00";

/// A version that neither knows is no AMQP: its server would answer with one that it does know, and close.
pub(crate) fn find(protocol: Protocol, bytes: &[u8]) -> Found {
    let known = if protocol == Protocol::Amqp1 { ONE } else { OLD };
    match known.iter().any(|header| agrees(bytes, *header)) {
        false => Found::No,
        true if bytes.len() < HEADER_BYTES => Found::More(HEADER_BYTES),
        true => Found::Whole(HEADER_BYTES),
    }
}

pub(crate) fn read(protocol: Protocol, bytes: &[u8], end: usize) -> Shown<'static> {
    let mut shown = Shown::new(protocol, end);
    shown.starttls = bytes[..end] == *TLS;
    shown
}
