#![no_main]
//! Every probe in its order, behind a PROXY header or none.

use fourtuple_sniff::{Prelude, Sniffer};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fourtuple_fuzz::holds(&Sniffer::all().with_prelude(Prelude::Allowed), data);
});
