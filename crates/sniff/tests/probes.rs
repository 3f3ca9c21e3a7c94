//! Every probe, through the sniffer: whole, byte by byte, truncated, followed by more, oversized and contradictory.

mod probes {
    mod http;
    mod http2;
    mod ldap;
    mod minecraft;
    mod others;
    mod proxy;
    mod rdp;
    mod rivals;
    mod rtsp;
    mod socks;
    pub(crate) mod support;
    mod table;
    mod tls;
    mod xmpp;
}

use probes::support;
