//! Reads WebSocket frames byte by byte (RFC 6455 5.2) and keeps none but a ping's payload, to answer it.
//!
//! Decides where a frame ends, which pong is the one waited for, and which frames end the dialogue. Knows no handshake.
//! A ping of more than 7 bytes is not answered: a connection has no room for it. Bounded: payloads below 4 GiB.

use super::Place;
use crate::speech::Wrong;

/// Places of the reader. Each of LENGTH_0..LENGTH_7 is one byte of an extended length.
mod phase {
    pub(super) const START: u8 = 0;
    pub(super) const LENGTH: u8 = 1;
    pub(super) const EXTENDED: u8 = 2;
    /// After the last byte of an extended length.
    pub(super) const PAYLOAD: u8 = 10;
    /// The payload of a pong that is not the one waited for, or one that we do not look at.
    pub(super) const IGNORED: u8 = 11;
}

/// Flags beside REFUSED and OPENING: the frame's kind.
const KIND: u8 = 4 | 8;
const PING: u8 = 4;
const PONG: u8 = 8;
/// Bytes of a ping's payload that wait to be sent back, plus one; zero is none.
const OWED: u8 = 0xf0;

const OPCODE_CLOSE: u8 = 0x8;
const OPCODE_PING: u8 = 0x9;
const OPCODE_PONG: u8 = 0xa;

/// Hear frames; returns how many bytes, all of them unless the pong that is waited for ended before.
pub(super) fn hear(place: &mut Place, carried: Option<&[u8]>, bytes: &[u8]) -> Result<usize, Wrong> {
    let mut took = 0;
    while took < bytes.len() {
        let byte = bytes[took];
        took += 1;
        match place.phase {
            phase::START => start(place, byte)?,
            phase::LENGTH => length(place, byte)?,
            phase::EXTENDED..phase::PAYLOAD => {
                place.left = place.left.checked_mul(256).and_then(|left| left.checked_add(byte.into())).ok_or(Wrong)?;
                place.phase += 1;
            }
            phase::PAYLOAD => payload_byte(place, carried, byte),
            _ => {
                // Bytes that nobody looks at go in one step.
                let part = place.left.min(u32::try_from(bytes.len() - took + 1).unwrap_or(u32::MAX));
                (place.left, took) = (place.left - part, took + part as usize - 1);
            }
        }
        if place.phase == phase::PAYLOAD && place.left > 0 && place.flags & KIND == 0 {
            place.phase = phase::IGNORED;
        }
        if place.phase >= phase::PAYLOAD && place.left == 0 && end(place, carried) {
            return Ok(took);
        }
    }
    Ok(took)
}

pub(super) fn owes_pong(place: &Place) -> bool {
    place.flags & OWED != 0
}

/// The pong that is owed, masked as a client's frames must be (RFC 6455 5.3); a mask of zeros is one.
pub(super) fn write_pong(place: &mut Place, into: &mut [u8]) -> usize {
    let length = usize::from(place.flags >> 4) - 1;
    place.flags &= !OWED;
    let (header, rest) = into.split_at_mut(6);
    header.copy_from_slice(&[0x80 | OPCODE_PONG, 0x80 | length as u8, 0, 0, 0, 0]);
    rest[..length].copy_from_slice(&place.kept[..length]);
    6 + length
}

fn start(place: &mut Place, byte: u8) -> Result<(), Wrong> {
    place.flags &= !KIND;
    (place.left, place.at, place.phase) = (0, 0, phase::LENGTH);
    match byte & 0x0f {
        OPCODE_CLOSE => return Err(Wrong),
        OPCODE_PING => {
            // Only the newest ping need be answered (RFC 6455 5.5.3).
            place.flags = (place.flags & !OWED) | PING;
        }
        OPCODE_PONG => place.flags |= PONG,
        0x0..=0x2 => {}
        _ => return Err(Wrong),
    }
    // No extension was agreed on, so the three reserved bits are zero.
    if byte & 0x70 == 0 { Ok(()) } else { Err(Wrong) }
}

fn length(place: &mut Place, byte: u8) -> Result<(), Wrong> {
    let control = place.flags & KIND != 0;
    match byte {
        // A server never masks (RFC 6455 5.1); a control frame has at most 125 bytes.
        0x80.. => return Err(Wrong),
        126.. if control => return Err(Wrong),
        126 => place.phase = phase::PAYLOAD - 2,
        127 => place.phase = phase::EXTENDED,
        short => (place.left, place.phase) = (short.into(), phase::PAYLOAD),
    }
    Ok(())
}

fn payload_byte(place: &mut Place, carried: Option<&[u8]>, byte: u8) {
    let at = usize::from(place.at);
    place.left -= 1;
    place.at += 1;
    match place.flags & KIND {
        PING if at < place.kept.len() => place.kept[at] = byte,
        PONG if carried.is_some_and(|carried| carried.get(at) != Some(&byte)) => place.phase = phase::IGNORED,
        _ => {}
    }
}

/// A frame is over; true if it was the pong that is waited for.
fn end(place: &mut Place, carried: Option<&[u8]>) -> bool {
    let (whole, length) = (place.phase == phase::PAYLOAD, usize::from(place.at));
    place.phase = phase::START;
    match place.flags & KIND {
        PING if length <= place.kept.len() => place.flags |= (length as u8 + 1) << 4,
        PONG if whole && carried.is_some_and(|carried| carried.len() == length) => {
            place.go_on();
            return true;
        }
        _ => {}
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x80 | opcode];
        match payload.len() {
            short @ 0..126 => bytes.push(short as u8),
            medium @ 126..65_536 => bytes.extend([&[126][..], &(medium as u16).to_be_bytes()].concat()),
            long => bytes.extend([&[127][..], &(long as u64).to_be_bytes()].concat()),
        }
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn the_pong_is_found_among_other_frames() {
        let before = [
            frame(1, &[b'x'; 300]),
            frame(OPCODE_PONG, b"other"),
            frame(OPCODE_PONG, b"mine, and more"),
            frame(2, &[0; 70_000]),
            frame(1, b""),
        ]
        .concat();
        let mut bytes = before.clone();
        bytes.extend(frame(OPCODE_PONG, b"mine"));
        let whole = bytes.len();
        bytes.extend(frame(1, b"after"));
        for cut in (0..330).chain(whole - 8..whole) {
            let (mut place, mut took) = (Place::default(), 0);
            for end in [cut, bytes.len()] {
                while took < end && place.act == 0 {
                    took += hear(&mut place, Some(b"mine"), &bytes[took..end]).expect("frames");
                }
            }
            assert_eq!((took, place.act), (whole, 1), "cut at {cut}");
        }
    }

    #[test]
    fn a_ping_is_answered_once_and_whole() {
        let mut place = Place::default();
        let bytes = [frame(OPCODE_PING, b"old"), frame(OPCODE_PING, b"abcd"), frame(1, b"text")].concat();
        for (at, byte) in bytes.iter().enumerate() {
            hear(&mut place, None, &[*byte]).expect("frames");
            assert_eq!(owes_pong(&place), !(5..10).contains(&at) && at >= 4, "after byte {at}");
        }
        let mut out = [0xff; 32];
        let length = write_pong(&mut place, &mut out);
        assert_eq!(out[..length], *b"\x8a\x84\0\0\0\0abcd");
        assert!(!owes_pong(&place));
        hear(&mut place, None, &frame(OPCODE_PING, b"too long")).expect("a frame");
        assert!(!owes_pong(&place), "there is no room for it");
        hear(&mut place, None, &frame(OPCODE_PING, b"")).expect("a frame");
        assert_eq!(write_pong(&mut place, &mut out), 6);
    }

    #[test]
    fn what_ends_the_dialogue_is_wrong() {
        for bytes in [&frame(OPCODE_CLOSE, b"")[..], &[0x8a, 0x81], &[0x89, 126], &[0x83], &[0xc1]] {
            assert_eq!(hear(&mut Place::default(), None, bytes), Err(Wrong), "{bytes:?}");
        }
        let huge = [0x82, 127, 0, 0, 0, 1, 0, 0, 0, 0];
        assert_eq!(hear(&mut Place::default(), None, &huge), Err(Wrong));
    }
}
