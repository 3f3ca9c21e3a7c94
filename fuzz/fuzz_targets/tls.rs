#![no_main]
//! ClientHellos out of records.

use fourtuple_sniff::{Protocol, Sniffer};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fourtuple_fuzz::holds(&Sniffer::new([Protocol::Tls]), data);
});
