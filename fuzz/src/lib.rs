//! What a sniffer promises about any bytes: no panic, and one verdict however they are cut.
//!
//! The check is the tests' own (`crates/sniff/tests/probes/support.rs`); here the fuzzer chooses bytes and cuts.

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../../crates/sniff/tests/probes/support.rs"]
mod support;

use fourtuple_sniff::Sniffer;

/// The first byte says how large the segments are, the rest is what comes.
pub fn holds(sniffer: &Sniffer<'_>, data: &[u8]) {
    let Some((&segment, bytes)) = data.split_first() else { return };
    let segment = usize::from(segment) + 1;
    let told = support::converse(sniffer, bytes);
    if told.starts_with("answer") {
        return; // what comes before its answer is refused, so cuts matter there; a conversation has only one
    }
    let whole = support::look(sniffer, bytes);
    assert_eq!(support::feed(sniffer, bytes, (segment..bytes.len()).step_by(segment)), whole);
    assert_eq!(told, whole);
}
