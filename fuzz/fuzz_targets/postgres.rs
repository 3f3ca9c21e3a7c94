#![no_main]
//! Startup messages, and conversations in front of them.

use fourtuple_sniff::{Protocol, Sniffer};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fourtuple_fuzz::holds(&Sniffer::new([Protocol::Postgres]).with_postgres_tls(false), data);
    fourtuple_fuzz::holds(&Sniffer::new([Protocol::Postgres]), data);
});
