#![no_main]
//! Acts of any kind in a row, on a stream and in datagrams. The first byte is the size of the pieces, the second how many
//! acts follow, of which each has three bytes.

use fourtuple_engine::script::{Act, Script};
use fourtuple_engine::speech::{Part, Speech, Turn};

const MARKS: [&[u8]; 4] = [b"\n", b"aab", b"abcabd", b"\r\n\r\n"];

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let [segment, count, rest @ ..] = data else { return };
    let Some((acts, bytes)) = rest.split_at_checked(3 * usize::from(count % 8)) else { return };
    let script = |in_datagrams: bool| {
        let acts = acts.chunks_exact(3).map(|act| self::act([act[0], act[1], act[2]], in_datagrams)).collect();
        Script::new(Vec::new(), acts)
    };
    if let Ok(script) = script(false) {
        fourtuple_fuzz::heard_alike(&script, usize::from(*segment) + 1, bytes);
    }
    let Ok(mut script) = script(true) else { return };
    let mut place = Default::default();
    script.begin(&mut place, Part::Round);
    for datagram in bytes.chunks(usize::from(*segment) + 1) {
        if script.turn(&place) != Turn::Listen {
            break;
        }
        let before = format!("{place:?}");
        if script.hear_datagram(&mut place, 0, datagram).is_err() {
            assert_eq!(format!("{place:?}"), before, "a stray changes nothing");
        }
    }
});

fn act([kind, one, two]: [u8; 3], in_datagrams: bool) -> Act {
    let text = MARKS[usize::from(one % 4)].to_vec();
    match kind % 8 {
        0 => Act::Expect(text),
        1 => Act::Until(text, two.into()),
        2 => Act::Skip(one.into()),
        3 => Act::Response(100 * u16::from(one % 6), 100 * u16::from(two % 6) + 99),
        4 => Act::Upgrade(vec![b'a'; 28]),
        5 => Act::Pong(text),
        6 if in_datagrams => Act::Rest, // of a stream it is what a piece happens to hold
        _ => Act::Expect(vec![two]),
    }
}
