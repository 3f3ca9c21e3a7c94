#![no_main]
//! The note beside a socket that is handed off: whatever names there are, what is written has the form of docs/handoff.md.

use std::net::SocketAddr;

use fourtuple_engine::broker::note::{self, FIXED_BYTES, MOST_BYTES};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((&[family, split], text)) = data.split_first_chunk() else { return };
    let text = String::from_utf8_lossy(text);
    let (service, matched) = text.split_at(text.floor_char_boundary(usize::from(split) * 2));
    let names: Option<(SocketAddr, SocketAddr)> = match family % 3 {
        0 => None,
        1 => Some((([192, 0, 2, family], 1).into(), ([192, 0, 2, split], 65_535).into())),
        _ => Some((([0x2001, 0xdb8, 0, 0, 0, 0, 0, family.into()], 1).into(), ([0_u16; 8], 65_535).into())),
    };
    let mut space = [0xaa; MOST_BYTES];
    let length = note::write(&mut space, names, data.len() as u32, service, matched);
    let written = &space[..length];
    assert_eq!(written[..5], [b'4', b'T', b'U', b'P', 1]);
    assert_eq!(usize::from(u16::from_be_bytes([written[6], written[7]])), length);
    let mut rest = &written[FIXED_BYTES..];
    for name in [service, matched] {
        let (read, left) = rest[1..].split_at(rest[0].into());
        assert!(name.as_bytes().starts_with(read) && name.is_char_boundary(read.len()));
        assert!(read.len() == name.len() || read.len() > 255 - 4, "no more is cut than has to be");
        rest = left;
    }
    assert_eq!(rest, b"");
});
