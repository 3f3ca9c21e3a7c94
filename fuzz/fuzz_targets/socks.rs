#![no_main]
//! Requests of SOCKS 4 and 5, answered and left.

use fourtuple_sniff::{Protocol, Sniffer};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let sniffer = Sniffer::new([Protocol::Socks4, Protocol::Socks5]);
    fourtuple_fuzz::holds(&sniffer, data);
    fourtuple_fuzz::holds(&sniffer.with_socks_answered(false), data);
});
