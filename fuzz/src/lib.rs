//! What a reader promises about any bytes: no panic, and one meaning however they are cut.
//!
//! Of a sniffer the check is the tests' own (`crates/sniff/tests/probes/support.rs`); here the fuzzer chooses bytes and cuts.

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../../crates/sniff/tests/probes/support.rs"]
mod support;

use fourtuple_engine::script::{Place, Script};
use fourtuple_engine::speech::{Part, Speech, Turn};
use fourtuple_sniff::Sniffer;

/// The first byte says how large the segments are, the rest is what comes.
pub fn holds(sniffer: &Sniffer<'_>, data: &[u8]) {
    let Some((&segment, bytes)) = data.split_first() else { return };
    let segment = usize::from(segment) + 1;
    let told = support::converse(sniffer, bytes);
    if told.starts_with("answer S") || told.starts_with("answer N") {
        return; // what comes before PostgreSQL's answer is refused, so cuts matter; a conversation has only one
    }
    let whole = support::look(sniffer, bytes);
    assert_eq!(support::feed(sniffer, bytes, (segment..bytes.len()).step_by(segment)), whole);
    assert_eq!(told, whole);
}

/// Where a script is after these bytes, in pieces of that size; None if they were wrong.
pub fn heard_from(script: &mut Script, mut place: Place, segment: usize, bytes: &[u8]) -> Option<String> {
    let (mut took, mut said) = (0, [0; 16]);
    for end in (segment..bytes.len()).step_by(segment).chain([bytes.len()]) {
        while took < end {
            match script.turn(&place) {
                Turn::Listen => {}
                // A pong that is owed: these scripts say nothing else.
                Turn::Say => {
                    script.say(&mut place, 0, &mut said);
                    continue;
                }
                Turn::Wait(_) | Turn::Over { .. } => break,
            }
            let more = script.hear(&mut place, 0, &bytes[took..end]).ok()?;
            assert!(more > 0 && took + more <= end, "{more} bytes of {}", end - took);
            took += more;
        }
    }
    while script.owes(&place) {
        script.say(&mut place, 0, &mut said);
    }
    Some(format!("{took} {:?} {place:?}", script.turn(&place)))
}

/// A round leads to one place, however the bytes are cut.
pub fn heard_alike(script: &Script, segment: usize, bytes: &[u8]) {
    let ends = [segment, bytes.len().max(1)].map(|segment| {
        let (mut script, mut place) = (script.clone(), Place::default());
        script.begin(&mut place, Part::Round);
        heard_from(&mut script, place, segment, bytes)
    });
    assert_eq!(ends[0], ends[1]);
}
