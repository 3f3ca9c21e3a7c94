#![no_main]
//! Patterns that overlap.

use fourtuple_sniff::{Pattern, Protocol, Sniffer};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let patterns = [(2, b"ab".as_slice()), (0, b"aaab"), (1, b"ab"), (0, b"b")]
        .map(|(offset, bytes)| Pattern::new(offset, bytes).expect("within bounds"));
    fourtuple_fuzz::holds(&Sniffer::new([Protocol::Pattern]).with_patterns(&patterns), data);
});
