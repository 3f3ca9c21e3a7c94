//! Reads one HTTP/1.1 response byte by byte (RFC 9112) and keeps none of it: where it ends, and whether it says yes.
//!
//! Decides what is a response that a kept connection can go on after. Knows no header but the two that say how long the
//! body is, and the one that proves a WebSocket's opening. Bounded: 65,535 bytes of status and headers, a body or chunk
//! below 4 GiB.

use std::ops::RangeInclusive;

use super::{Place, REFUSED};
use crate::speech::Wrong;

/// Places of the reader. The names of `phase`; `at` counts bytes of status line and headers.
mod phase {
    pub(super) const VERSION: u8 = 0;
    pub(super) const STATUS: u8 = 1;
    pub(super) const REASON: u8 = 2;
    pub(super) const NAME: u8 = 3;
    pub(super) const LENGTH: u8 = 4;
    pub(super) const CODING: u8 = 5;
    pub(super) const OTHER: u8 = 6;
    pub(super) const BODY: u8 = 7;
    pub(super) const CHUNK_SIZE: u8 = 8;
    pub(super) const CHUNK_EXTENSION: u8 = 9;
    pub(super) const CHUNK_DATA: u8 = 10;
    pub(super) const CHUNK_END: u8 = 11;
    pub(super) const TRAILER: u8 = 12;
    pub(super) const ACCEPT: u8 = 13;
    /// The headers are over, and the answer to a WebSocket's opening does not prove that our key was read.
    pub(super) const UNPROVEN: u8 = 14;
}

/// Flags beside REFUSED and OPENING.
const HAS_LENGTH: u8 = 4;
const CHUNKED: u8 = 8;
/// 1xx: another response follows (RFC 9110 15.2).
const INTERIM: u8 = 16;
/// 101, 204, 304: no body, whatever the headers say (RFC 9112 6.3).
const BODILESS: u8 = 32;
/// A digit has been seen in the number being read.
const DIGIT: u8 = 64;
/// The right Sec-WebSocket-Accept has been seen.
const PROVEN: u8 = 128;
const OWN: u8 = HAS_LENGTH | CHUNKED | INTERIM | BODILESS | DIGIT | PROVEN;

/// Places in `Place::kept`.
const PLACE_IN_LINE: usize = 0;
const CANDIDATES: usize = 1;
const STATUS_HIGH: usize = 2;
const STATUS_LOW: usize = 3;

const VERSION: &[u8] = b"http/1.";
/// Told apart by their first letters.
const NAMES: [&[u8]; 3] = [b"content-length", b"transfer-encoding", b"sec-websocket-accept"];
const CODING: &[u8] = b"chunked";

/// Of a Sec-WebSocket-Accept: the base64 of a SHA-1.
pub(super) const ACCEPT_BYTES: usize = 28;

/// What is wanted of the response.
pub(super) enum Answer<'a> {
    /// A status in this range; another is a refusal.
    Status(RangeInclusive<u16>),
    /// Status 101 with this Sec-WebSocket-Accept (RFC 6455 4.1); another status is a refusal.
    Upgrade(&'a [u8]),
}

impl Answer<'_> {
    fn refuses(&self, status: u16) -> bool {
        match self {
            Answer::Status(wanted) => !wanted.contains(&status),
            Answer::Upgrade(_) => status != 101,
        }
    }
}

/// Whether a wrong answer was wrong for want of the proof.
pub(super) fn is_unproven(place: &Place) -> bool {
    place.phase == phase::UNPROVEN
}

/// Hear bytes of a response; returns how many belonged to it.
pub(super) fn hear(place: &mut Place, wanted: &Answer<'_>, bytes: &[u8]) -> Result<usize, Wrong> {
    let mut took = 0;
    while took < bytes.len() {
        if matches!(place.phase, phase::BODY | phase::CHUNK_DATA) {
            let part = place.left.min(u32::try_from(bytes.len() - took).unwrap_or(u32::MAX));
            (place.left, took) = (place.left - part, took + part as usize);
            if place.left > 0 {
                break;
            }
            if place.phase == phase::BODY {
                over(place);
                return Ok(took);
            }
            place.phase = phase::CHUNK_END;
            continue;
        }
        if hear_byte(place, wanted, bytes[took])? {
            return Ok(took + 1);
        }
        took += 1;
    }
    Ok(took)
}

/// One byte outside of a body; true if it was the response's last.
fn hear_byte(place: &mut Place, wanted: &Answer<'_>, byte: u8) -> Result<bool, Wrong> {
    if place.phase < phase::BODY || place.phase == phase::ACCEPT {
        place.at = place.at.checked_add(1).ok_or(Wrong)?;
    }
    let lower = byte.to_ascii_lowercase();
    match place.phase {
        phase::VERSION => {
            let at = usize::from(place.at) - 1;
            match at {
                0..=6 if lower == VERSION[at] => {}
                7 if byte.is_ascii_digit() => {}
                8 if byte == b' ' => start_line(place, phase::STATUS),
                _ => return Err(Wrong),
            }
        }
        phase::STATUS => {
            let digits = place.kept[PLACE_IN_LINE];
            if digits == 3 {
                status(place, wanted)?;
                // RFC 9112 4: the blank after the status stands even if the reason is empty; some leave it out.
                place.phase = phase::REASON;
                match byte {
                    b' ' => {}
                    b'\r' | b'\n' => return end_of_line(place, byte),
                    _ => return Err(Wrong),
                }
            } else {
                let digit = u16::from(byte.is_ascii_digit().then(|| byte - b'0').ok_or(Wrong)?);
                let number = read_status(place) * 10 + digit;
                [place.kept[STATUS_HIGH], place.kept[STATUS_LOW]] = number.to_be_bytes();
                place.kept[PLACE_IN_LINE] = digits + 1;
            }
        }
        phase::NAME if byte == b'\n' && place.kept[PLACE_IN_LINE] == 0 => return end_of_headers(place, wanted),
        phase::NAME if matches!(byte, b'\r' | b'\n') => return end_of_line(place, byte),
        phase::NAME => name_byte(place, lower)?,
        phase::LENGTH if byte.is_ascii_digit() => {
            place.left =
                place.left.checked_mul(10).and_then(|left| left.checked_add(u32::from(byte - b'0'))).ok_or(Wrong)?;
            place.flags |= DIGIT;
        }
        phase::LENGTH if matches!(byte, b' ' | b'\t') => {}
        phase::CODING if !matches!(byte, b'\r' | b'\n') => coding_byte(place, lower),
        phase::ACCEPT if !matches!(byte, b'\r' | b'\n') => proof_byte(place, wanted, byte),
        phase::REASON | phase::LENGTH | phase::CODING | phase::ACCEPT | phase::OTHER => {
            return end_of_line(place, byte);
        }
        phase::CHUNK_SIZE | phase::CHUNK_EXTENSION => chunk_byte(place, byte)?,
        phase::CHUNK_END => match byte {
            b'\r' => {}
            b'\n' => start_chunk(place),
            _ => return Err(Wrong),
        },
        // Trailers are read as lines; an empty one ends the response.
        _ => {
            place.at = place.at.checked_add(1).ok_or(Wrong)?;
            match byte {
                b'\n' if place.kept[PLACE_IN_LINE] == 0 => {
                    over(place);
                    return Ok(true);
                }
                b'\n' => place.kept[PLACE_IN_LINE] = 0,
                b'\r' => {}
                _ => place.kept[PLACE_IN_LINE] = 1,
            }
        }
    }
    Ok(false)
}

fn status(place: &mut Place, wanted: &Answer<'_>) -> Result<(), Wrong> {
    let status = read_status(place);
    match status {
        101 => place.flags |= BODILESS,
        100..=199 => place.flags |= INTERIM,
        204 | 304 => place.flags |= BODILESS,
        200..=599 => {}
        _ => return Err(Wrong),
    }
    if !place.has(INTERIM) && wanted.refuses(status) {
        place.flags |= REFUSED;
    }
    Ok(())
}

/// Which of the names a header's may still be: the first byte decides between the two, the rest must follow.
fn name_byte(place: &mut Place, lower: u8) -> Result<(), Wrong> {
    let at = usize::from(place.kept[PLACE_IN_LINE]);
    if lower == b':' {
        let name = NAMES.iter().position(|name| at == name.len() && place.kept[CANDIDATES] == name[0]);
        match name {
            // Two lengths, or a length beside chunks, is a response that two readers may read in two ways (RFC 9112 6.3).
            Some(0) if place.has(HAS_LENGTH | CHUNKED) => return Err(Wrong),
            Some(1) if place.has(HAS_LENGTH | CHUNKED) => return Err(Wrong),
            Some(0) => (place.phase, place.left) = (phase::LENGTH, 0),
            Some(1) => place.phase = phase::CODING,
            Some(_) => place.phase = phase::ACCEPT,
            None => place.phase = phase::OTHER,
        }
        place.flags &= !DIGIT;
        place.kept[PLACE_IN_LINE] = 0;
        return Ok(());
    }
    if at == 0 {
        place.kept[CANDIDATES] = lower;
    } else {
        let follows = NAMES
            .iter()
            .any(|name| name[0] == place.kept[CANDIDATES] && name.get(at).is_some_and(|&byte| byte == lower));
        if !follows {
            place.kept[CANDIDATES] = 0;
        }
    }
    // A longer name matches none; its length is bounded by `at` of the place.
    place.kept[PLACE_IN_LINE] = place.kept[PLACE_IN_LINE].saturating_add(1);
    Ok(())
}

/// Only the last coding counts, and it must be chunked for the connection to go on (RFC 9112 6.1).
fn coding_byte(place: &mut Place, lower: u8) {
    let at = &mut place.kept[PLACE_IN_LINE];
    *at = match lower {
        b' ' | b'\t' => *at,
        b',' => 0,
        other if CODING.get(usize::from(*at)) == Some(&other) => *at + 1,
        _ => u8::MAX,
    };
}

/// The value stands alone in its header, between blanks.
fn proof_byte(place: &mut Place, wanted: &Answer<'_>, byte: u8) {
    let at = &mut place.kept[PLACE_IN_LINE];
    let blank_around = matches!(byte, b' ' | b'\t') && matches!(usize::from(*at), 0 | ACCEPT_BYTES);
    *at = match wanted {
        _ if blank_around => *at,
        Answer::Upgrade(proof) if proof.get(usize::from(*at)) == Some(&byte) => *at + 1,
        _ => u8::MAX,
    };
}

fn end_of_line(place: &mut Place, byte: u8) -> Result<bool, Wrong> {
    match (byte, place.phase) {
        (b'\r', _) => return Ok(false),
        (b'\n', phase::LENGTH) if !place.has(DIGIT) => return Err(Wrong),
        (b'\n', phase::LENGTH) => place.flags |= HAS_LENGTH,
        (b'\n', phase::CODING) if usize::from(place.kept[PLACE_IN_LINE]) != CODING.len() => return Err(Wrong),
        (b'\n', phase::CODING) => place.flags |= CHUNKED,
        (b'\n', phase::NAME) => return Err(Wrong),
        (b'\n', phase::ACCEPT) if usize::from(place.kept[PLACE_IN_LINE]) == ACCEPT_BYTES => place.flags |= PROVEN,
        (b'\n', _) | (_, phase::REASON | phase::OTHER) => {}
        _ => return Err(Wrong),
    }
    if byte == b'\n' {
        start_line(place, phase::NAME);
    }
    Ok(false)
}

fn end_of_headers(place: &mut Place, wanted: &Answer<'_>) -> Result<bool, Wrong> {
    if place.has(INTERIM) {
        place.flags &= !OWN;
        (place.at, place.left, place.phase) = (0, 0, phase::VERSION);
        return Ok(false);
    }
    if matches!(wanted, Answer::Upgrade(_)) && !place.has(REFUSED | PROVEN) {
        place.phase = phase::UNPROVEN;
        return Err(Wrong);
    }
    if place.has(BODILESS) || (place.has(HAS_LENGTH) && place.left == 0) {
        over(place);
        return Ok(true);
    }
    if place.has(CHUNKED) {
        start_chunk(place);
    } else if place.has(HAS_LENGTH) {
        place.phase = phase::BODY;
    } else {
        // A body that ends with the connection leaves none to go on with.
        return Err(Wrong);
    }
    Ok(false)
}

fn chunk_byte(place: &mut Place, byte: u8) -> Result<(), Wrong> {
    match (place.phase, char::from(byte).to_digit(16)) {
        (phase::CHUNK_SIZE, Some(digit)) => {
            place.left = place.left.checked_mul(16).and_then(|left| left.checked_add(digit)).ok_or(Wrong)?;
            place.flags |= DIGIT;
        }
        _ if !place.has(DIGIT) => return Err(Wrong),
        _ if byte == b'\n' && place.left == 0 => start_line(place, phase::TRAILER),
        _ if byte == b'\n' => place.phase = phase::CHUNK_DATA,
        _ => {
            // An extension's length is bounded as the headers are.
            place.at = place.at.checked_add(1).ok_or(Wrong)?;
            place.phase = phase::CHUNK_EXTENSION;
        }
    }
    Ok(())
}

fn start_chunk(place: &mut Place) {
    (place.phase, place.left) = (phase::CHUNK_SIZE, 0);
    place.flags &= !DIGIT;
}

fn start_line(place: &mut Place, phase: u8) {
    place.phase = phase;
    place.kept = [0; 7];
}

fn over(place: &mut Place) {
    place.flags &= !OWN;
    place.kept = [0; 7];
    place.go_on();
}

fn read_status(place: &Place) -> u16 {
    u16::from_be_bytes([place.kept[STATUS_HIGH], place.kept[STATUS_LOW]])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes taken and whether the answer was a no; `None` while it is not over.
    fn heard(bytes: &[u8], cut: usize) -> Result<Option<(usize, bool)>, Wrong> {
        let (mut place, mut took) = (Place::default(), 0);
        for end in [cut.min(bytes.len()), bytes.len()] {
            while took < end && place.act == 0 {
                took += hear(&mut place, &Answer::Status(200..=399), &bytes[took..end])?;
            }
        }
        Ok((place.act == 1).then_some((took, place.has(REFUSED))))
    }

    #[test]
    fn a_response_ends_where_it_says() {
        let rows: [(&[u8], bool); 9] = [
            (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", false),
            (b"HTTP/1.1 200 OK\r\ncontent-lengthy: 9\r\nX: y\r\nCONTENT-LENGTH:2 \r\n\r\nok", false),
            (
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\nA\r\n0123456789\r\n0\r\n\r\n",
                false,
            ),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\nX: y\r\n\r\n", false),
            (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", true),
            (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503\r\nContent-Length: 1\r\n\r\n!", true),
            (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\n\r\n", false),
            (b"HTTP/1.0 204 \r\n\r\n", false),
            (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", true),
        ];
        for (response, refused) in rows {
            let mut followed = response.to_vec();
            followed.extend_from_slice(b"HTTP/1.1 200 OK");
            for cut in 0..followed.len() {
                let text = String::from_utf8_lossy(response);
                assert_eq!(heard(&followed, cut), Ok(Some((response.len(), refused))), "{text} cut at {cut}");
            }
            assert_eq!(heard(&response[..response.len() - 1], 3), Ok(None));
        }
    }

    #[test]
    fn an_upgrade_has_to_be_proven() {
        let proof = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
        let rows: [(&str, Result<bool, bool>); 8] = [
            ("101 Switching\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n", Ok(false)),
            ("101\r\nUpgrade: websocket\r\nsec-websocket-ACCEPT:s3pPLMBiTxaQ9kYGzzhZRbK+xOo= \r\n\r\n", Ok(false)),
            ("403 No\r\nContent-Length: 2\r\n\r\nno", Ok(true)),
            ("200 Yes\r\nContent-Length: 0\r\n\r\n", Ok(true)),
            ("101 Switching\r\nUpgrade: websocket\r\n\r\n", Err(true)),
            ("101 Switching\r\nSec-WebSocket-Accept: S3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n", Err(true)),
            ("101 Switching\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=x\r\n\r\n", Err(true)),
            ("ten one\r\n\r\n", Err(false)),
        ];
        for (rest, found) in rows {
            let response = format!("HTTP/1.1 {rest}").into_bytes();
            for cut in 0..response.len() {
                let (mut place, mut took) = (Place::default(), 0);
                let mut heard = Ok(());
                for end in [cut, response.len()] {
                    while took < end && place.act == 0 && heard.is_ok() {
                        heard =
                            hear(&mut place, &Answer::Upgrade(proof), &response[took..end]).map(|more| took += more);
                    }
                }
                let outcome = heard.map(|()| place.has(REFUSED)).map_err(|Wrong| is_unproven(&place));
                assert_eq!((outcome, place.act == 1), (found, found.is_ok()), "{rest} cut at {cut}");
            }
        }
    }

    #[test]
    fn what_is_no_response_is_wrong() {
        let huge = [b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'a'; 70_000]].concat();
        let trailers =
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n".to_vec(), vec![b'a'; 70_000]].concat();
        let rows: [&[u8]; 12] = [
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/2 200\r\n",
            b"HTTP/1.1 99 \r\n\r\n",
            b"HTTP/1.1 20x OK\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
            &huge,
            &trailers,
        ];
        for response in rows {
            let start = String::from_utf8_lossy(&response[..response.len().min(60)]).into_owned();
            assert_eq!(heard(response, 5), Err(Wrong), "{start}");
        }
    }
}
