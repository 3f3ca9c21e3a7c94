#![no_main]
//! Headers of AMQP.

use fourtuple_sniff::{Protocol, Sniffer};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fourtuple_fuzz::holds(&Sniffer::new([Protocol::Amqp, Protocol::Amqp1]), data);
});
