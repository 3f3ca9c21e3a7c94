//! The note that goes with a socket that is handed off, byte by byte as docs/handoff.md has it.
//!
//! Decides the layout. Knows no socket. Python's reader is `fourtuple.service`; a test holds the two together.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The first four bytes.
pub const MAGIC: [u8; 4] = *b"4TUP";
/// The version of this layout.
pub const VERSION: u8 = 1;
/// Bytes before the two names.
pub const FIXED_BYTES: usize = 48;
/// No note is longer: a name has at most 255 bytes.
pub const MOST_BYTES: usize = FIXED_BYTES + 2 * 256;

/// Write the note; returns its length. Names are cut at 255 bytes, at a character's end.
pub fn write(
    into: &mut [u8; MOST_BYTES],
    names: Option<(SocketAddr, SocketAddr)>,
    seen: u32,
    service: &str,
    matched: &str,
) -> usize {
    into[..FIXED_BYTES].fill(0);
    into[..4].copy_from_slice(&MAGIC);
    into[4] = VERSION;
    if let Some((peer, local)) = names {
        into[5] = if peer.is_ipv4() { 4 } else { 6 };
        into[8..10].copy_from_slice(&peer.port().to_be_bytes());
        into[10..12].copy_from_slice(&local.port().to_be_bytes());
        into[16..32].copy_from_slice(&wide(peer.ip()).octets());
        into[32..48].copy_from_slice(&wide(local.ip()).octets());
    }
    into[12..16].copy_from_slice(&seen.to_be_bytes());
    let mut end = FIXED_BYTES;
    for name in [service, matched] {
        let name = cut(name);
        into[end] = name.len() as u8;
        into[end + 1..end + 1 + name.len()].copy_from_slice(name.as_bytes());
        end += 1 + name.len();
    }
    into[6..8].copy_from_slice(&(end as u16).to_be_bytes());
    end
}

/// What of a name has room.
fn cut(name: &str) -> &str {
    let mut end = name.len().min(255);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

/// IPv4 as ::ffff:a.b.c.d (RFC 4291 section 2.5.5.2).
fn wide(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_what_the_document_says() {
        let mut note = [0xff; MOST_BYTES];
        let names = Some(("192.0.2.7:1000".parse().unwrap(), "198.51.100.1:443".parse().unwrap()));
        let length = write(&mut note, names, 517, "shop", "shop.example.com");
        let text: String = note[..length].iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = concat!(
            "34545550",
            "01",
            "04",
            "0046",
            "03e8",
            "01bb",
            "00000205",
            "00000000000000000000ffffc0000207",
            "00000000000000000000ffffc6336401",
            "04",
            "73686f70",
            "10",
            "73686f702e6578616d706c652e636f6d",
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn long_names_are_cut_at_a_character() {
        let mut note = [0; MOST_BYTES];
        let length = write(&mut note, None, 0, &"ä".repeat(200), &"x".repeat(300));
        assert_eq!((note[5], length), (0, FIXED_BYTES + 1 + 254 + 1 + 255));
        assert!(std::str::from_utf8(&note[FIXED_BYTES + 1..FIXED_BYTES + 255]).is_ok());
    }
}
