//! Every probe, through the sniffer: whole, byte by byte, truncated, followed by more, oversized and contradictory.

mod probes {
    mod http;
    mod http2;
    mod minecraft;
    mod others;
    mod proxy;
    mod rivals;
    pub(crate) mod support;
    mod table;
    mod tls;
}

use probes::support;
