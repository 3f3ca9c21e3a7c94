//! sniff: what the first bytes of a connection show, read without consuming them.
//!
//! Decides which protocol the bytes speak, where the part that says so ends, and what it names: host, path, user,
//! database, client. Knows no socket, clock, service or route, and has no allocator: `no_std` without `alloc` is the
//! proof that nothing is allocated per connection.
//!
//! The bytes are always those from the beginning of the stream, because MSG_PEEK shows the same ones again and more. So
//! [`Sniffer::sniff`] is called with the whole prefix each time, and keeps its place in a small [`State`]; the work per
//! new byte is bounded, also when they come one at a time. Four rules:
//!
//! 1. **Order.** The probes of [`PROBES`] are asked in their order, and the first that does not say `No` speaks for the
//!    sniffer. A probe further down cannot overtake one that still wants more, so a verdict does not depend on how the
//!    network cut the bytes.
//! 2. **Refused is not No.** What is certainly one protocol and breaks its rules is refused. It is never offered to the
//!    probes below or to a default route: that is how a hello split over two records gets past an SNI rule elsewhere.
//! 3. **Find, then read.** `find` walks over new bytes and remembers numbers only. `read` runs once, when the end is
//!    known, and makes the [`Shown`]: slices of the bytes, or of one [`Scratch`] per worker where the stream has the
//!    text in pieces, folded or compressed.
//! 4. **Bounded.** Each probe says how many bytes it may ask for, [`Probe::bound`]; past it, it has decided.

#![no_std]
#![forbid(unsafe_code)]

mod amqp;
mod cursor;
mod hpack;
mod http1;
mod http2;
mod huffman;
mod ldap;
mod minecraft;
mod mqtt;
mod name;
mod pattern;
mod postgres;
pub mod proxy;
mod rdp;
mod redis;
mod rtsp;
mod shown;
mod sniffer;
mod socks4;
mod socks5;
mod ssh;
mod tcpmux;
mod tls;
mod xmpp;

pub use http2::BYTES as HTTP2_BYTES;
pub use pattern::{PATTERN_BYTES, Pattern};
pub use shown::{Alpn, Intent, Scratch, Shown};
pub use sniffer::{Prelude, Sniffer, State, Verdict};
pub use tls::HELLO_BYTES;

/// What a connection may speak, in the order in which the probes are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// A TLS ClientHello, with or without a name.
    Tls,
    /// HTTP/2 with prior knowledge: preface, SETTINGS, the first request.
    Http2,
    /// An HTTP/1 request for a tunnel.
    Connect,
    /// An HTTP/1 request that upgrades to WebSocket.
    WebSocket,
    /// Any HTTP/1 request.
    Http,
    /// An RTSP request.
    Rtsp,
    /// The head of an XMPP stream.
    Xmpp,
    /// A header of AMQP 0-9-1 or before.
    Amqp,
    /// A header of AMQP 1.0.
    Amqp1,
    /// An SSH identification line.
    Ssh,
    /// A PostgreSQL startup message, or the hello behind an SSLRequest.
    Postgres,
    /// An MQTT CONNECT packet: 3.1, 3.1.1 or 5.
    Mqtt,
    /// An X.224 connection request, as RDP has it.
    Rdp,
    /// A request of LDAP.
    Ldap,
    /// A handshake of Minecraft, Java edition, or an old client's ping.
    Minecraft,
    /// A Redis command, as an array or in line.
    Redis,
    /// A greeting of SOCKS 5, answered, and the request behind it.
    Socks5,
    /// A request of SOCKS 4 or 4A.
    Socks4,
    /// A line with a service name or number (RFC 1078).
    Tcpmux,
    /// Bytes at an offset, as one of the sniffer's patterns says.
    Pattern,
}

/// One row of the table.
#[derive(Debug)]
pub struct Probe {
    /// What it recognises.
    pub protocol: Protocol,
    /// Its name in configuration and counters.
    pub name: &'static str,
    /// How many bytes of the stream it looks at, at most.
    pub bound: usize,
    /// What it shows, in a sentence.
    pub shows: &'static str,
}

/// Every probe in order of precedence: what is said in fewer ways stands first, what matches anything last.
pub const PROBES: [Probe; 20] = [
    Probe { protocol: Protocol::Tls, name: "tls", bound: tls::BOUND, shows: "server name (SNI), ALPN, whether ECH" },
    Probe { protocol: Protocol::Http2, name: "http2", bound: http2::BYTES, shows: ":authority, port, path" },
    Probe { protocol: Protocol::Connect, name: "connect", bound: http1::HEAD_BYTES, shows: "host and port to reach" },
    Probe { protocol: Protocol::WebSocket, name: "websocket", bound: http1::HEAD_BYTES, shows: "host, port, path" },
    Probe { protocol: Protocol::Http, name: "http", bound: http1::HEAD_BYTES, shows: "host, port, path" },
    Probe {
        protocol: Protocol::Rtsp,
        name: "rtsp",
        bound: rtsp::BOUND,
        shows: "host, port, path, session, user in the URL",
    },
    Probe { protocol: Protocol::Xmpp, name: "xmpp", bound: xmpp::HEAD_BYTES, shows: "domain, and who comes" },
    Probe { protocol: Protocol::Amqp, name: "amqp", bound: amqp::HEADER_BYTES, shows: "nothing else" },
    Probe { protocol: Protocol::Amqp1, name: "amqp1", bound: amqp::HEADER_BYTES, shows: "whether it asks for TLS" },
    Probe { protocol: Protocol::Ssh, name: "ssh", bound: ssh::LINE_BYTES, shows: "the client's software" },
    Probe {
        protocol: Protocol::Postgres,
        name: "postgres",
        bound: 2 * postgres::REQUEST_BYTES + tls::BOUND,
        shows: "user, database; or server name and ALPN; or the key of a request to cancel",
    },
    Probe { protocol: Protocol::Mqtt, name: "mqtt", bound: mqtt::PACKET_BYTES, shows: "client id, user name" },
    Probe {
        protocol: Protocol::Rdp,
        name: "rdp",
        bound: rdp::PACKET_BYTES,
        shows: "user, or routing token and the host in it",
    },
    Probe {
        protocol: Protocol::Ldap,
        name: "ldap",
        bound: ldap::BYTES,
        shows: "distinguished name, whether it asks for TLS",
    },
    Probe {
        protocol: Protocol::Minecraft,
        name: "minecraft",
        bound: minecraft::PACKET_BYTES,
        shows: "host, port, whether to play or to look",
    },
    Probe {
        protocol: Protocol::Redis,
        name: "redis",
        bound: redis::BYTES,
        shows: "user, client name, database number",
    },
    Probe { protocol: Protocol::Socks5, name: "socks5", bound: socks5::BYTES, shows: "host and port to reach" },
    Probe {
        protocol: Protocol::Socks4,
        name: "socks4",
        bound: socks4::REQUEST_BYTES,
        shows: "host and port to reach, user",
    },
    Probe { protocol: Protocol::Tcpmux, name: "tcpmux", bound: tcpmux::LINE_BYTES, shows: "service name or number" },
    Probe { protocol: Protocol::Pattern, name: "pattern", bound: pattern::BOUND, shows: "which pattern it was" },
];

impl Protocol {
    /// Its row in the table.
    pub fn probe(self) -> &'static Probe {
        &PROBES[self as usize]
    }
}

/// Why a connection is refused: it speaks a protocol, and breaks it where a route would depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Refusal {
    /// Against the protocol's own grammar.
    Malformed,
    /// More than the bound of the probe, or of a field.
    TooLong,
    /// A host name that no host can have.
    BadName,
    /// Said twice where once is allowed.
    Repeated,
    /// Two places that name different things.
    Contradiction,
    /// Bytes sent before the answer on which they depend.
    Early,
    /// Something that nobody here does.
    Unsupported,
    /// No PROXY header on a listener that requires one.
    Unproxied,
}

/// Name and meaning of each refusal, in the order of the enum: the reasons that a broker counts.
pub const REFUSALS: [(&str, &str); 8] = [
    ("malformed", "breaks the grammar of the protocol that it speaks"),
    ("too-long", "says more before it names anything than the probe reads"),
    ("bad-name", "names a host that cannot exist: wrong characters, an empty or long label, a user in front"),
    ("repeated", "says twice what may be said once, such as a second Host header or server name"),
    ("contradiction", "names one host in one place and another in the next"),
    ("early", "goes on before the answer that decides how to go on"),
    ("unsupported", "asks for what a broker does not do: SOCKS with a password, or to listen or send datagrams for it"),
    ("unproxied", "comes without a PROXY header where one is required"),
];

impl Refusal {
    /// Its name in counters and logs.
    pub fn name(self) -> &'static str {
        REFUSALS[self as usize].0
    }
}

/// Where a probe stands in the stream; what the numbers mean is the probe's own affair.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Progress {
    pub(crate) at: u32,
    pub(crate) mark: u32,
    pub(crate) size: u32,
    pub(crate) phase: u8,
}

/// What a probe says while it looks for the end of what it wants to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Everything is there; what shows something ends here.
    Whole(usize),
    /// Not this protocol.
    No,
    /// At least so many bytes are needed in all.
    More(usize),
    /// This protocol, but not like this.
    Refused(Refusal),
}
