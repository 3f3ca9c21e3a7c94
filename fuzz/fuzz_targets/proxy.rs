#![no_main]
//! PROXY headers in front of an SSH line.

use fourtuple_sniff::{Prelude, Protocol, Sniffer};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fourtuple_fuzz::holds(&Sniffer::new([Protocol::Ssh]).with_prelude(Prelude::Required), data);
});
