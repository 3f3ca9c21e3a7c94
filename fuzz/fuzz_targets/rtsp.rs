#![no_main]
//! Request heads of RTSP.

use fourtuple_sniff::{Protocol, Sniffer};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fourtuple_fuzz::holds(&Sniffer::new([Protocol::Rtsp]), data);
});
