#![no_main]
//! What clients say at a door, and what services say to what they are told: an end however it comes, the same one however
//! it is cut, and no answer to nothing.

use fourtuple_broker::door::{DIALECTS, Door, Move, Standing, hears};
use fourtuple_engine::broker::guide::Heard;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let [first, segment, bytes @ ..] = data else { return };
    for expect in 0..32 {
        let heard = hears(expect, bytes);
        // Once it is a no, more does not make it a yes.
        for end in 0..bytes.len() {
            let early = hears(expect, &bytes[..end]);
            assert!(early != Some(Heard::No) || heard != Some(Heard::Yes), "{expect} {end}");
        }
    }
    let dialect = DIALECTS[usize::from(*first) % DIALECTS.len()].1;
    let door = Door { dialect, host: "mx.example.com".to_owned(), requires_tls: first & 128 != 0 };
    let by_piece = talk(&door, bytes, usize::from(*segment) + 1);
    let by_byte = talk(&door, bytes, 1);
    // What is said behind a yes before it is heard is refused, so that cuts matter there and nowhere else.
    assert!(by_piece == by_byte || by_piece.ends_with("Garbage"), "{by_piece} {by_byte}");
});

/// What is told, and the end, if so many bytes come at a time.
fn talk(door: &Door, bytes: &[u8], step: usize) -> String {
    let (mut standing, mut says, mut told, mut shown) = (Standing::default(), Vec::new(), String::new(), 0);
    loop {
        let last = shown == bytes.len();
        let said = &bytes[..shown];
        match door.look(&mut standing, said, last, &mut says) {
            Move::Tell => told += &format!("{} ", says.escape_ascii()),
            Move::More if !last => shown = (shown + step).min(bytes.len()),
            found => {
                let turns = match found {
                    Move::Tls => door.before_tls(&standing, said),
                    Move::Plain { .. } => door.before_plain(&standing, said),
                    _ => Vec::new(),
                };
                return format!("{told}{} {found:?}", turns.len());
            }
        }
        assert!(told.len() < 1 << 20, "it does not end");
    }
}
