#![no_main]
//! Request heads, in the three ways that they are asked for.

use fourtuple_sniff::{Protocol, Sniffer};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fourtuple_fuzz::holds(&Sniffer::new([Protocol::Connect, Protocol::WebSocket, Protocol::Http]), data);
});
