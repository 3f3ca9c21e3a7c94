#![no_main]
//! WebSocket frames of a server under load, between rounds and until the pong of one.

use fourtuple_engine::script::{Act, Script};
use fourtuple_engine::speech::{Part, Speech};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let [segment, share, bytes @ ..] = data else { return };
    let (segment, share) = (usize::from(*segment) + 1, usize::from(*share).min(bytes.len()));
    let acts = vec![Act::Pong(b"me".to_vec()), Act::Pong(Vec::new())];
    let mut script = Script::new(Vec::new(), acts).expect("a script");
    fourtuple_fuzz::heard_alike(&script, segment, bytes);

    // What comes before somebody asks for the round is overheard.
    let (before, during) = bytes.split_at(share);
    let ends = [before.len(), segment].map(|piece| {
        let mut place = Default::default();
        for piece in before.chunks(piece.max(1)) {
            script.overhear(&mut place, piece).ok()?;
        }
        script.begin(&mut place, Part::Round);
        Some(fourtuple_fuzz::heard_from(&mut script, place, segment, during))
    });
    assert_eq!(ends[0], ends[1]);
});
