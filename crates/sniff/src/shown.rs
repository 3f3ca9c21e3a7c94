//! What was found, in the form that a route is matched with.
//!
//! Decides nothing. Every field is a slice of the peeked bytes or of the [`Scratch`], valid until either is used again.

use crate::name::NAME_BYTES;
use crate::{Protocol, proxy, tls};

/// Whether a connection is there to be served, or only to see what is there. Nothing here is proof: whoever probes can
/// also say what a client says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Intent {
    /// Whatever bears no mark of a probe.
    #[default]
    Use,
    /// It bears a mark that its protocol's file gives and explains: HTTP that asks for no content or names no host, TLS
    /// that names no server or offers nothing newer than TLS 1.1, Minecraft's list of servers.
    Probe,
}

impl Intent {
    /// Its name in counters and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Use => "use",
            Self::Probe => "probe",
        }
    }

    pub(crate) fn probe_if(is_probe: bool) -> Self {
        if is_probe { Self::Probe } else { Self::Use }
    }
}

/// What a connection shows of itself. Fields that its protocol does not have, or that it left out, are `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown<'a> {
    /// What it speaks.
    pub protocol: Protocol,
    /// Whether it wants to be served. A service that sleeps need not be woken for a probe.
    pub intent: Intent,
    /// Where what showed it ends, from the beginning of the stream. Nothing of it is consumed.
    pub end: usize,
    /// The host or service that is meant: lower case, without a final dot, fit for exact and suffix matches.
    pub name: Option<&'a str>,
    /// The port beside the name.
    pub port: Option<u16>,
    /// A service number (a wide port) in place of a name.
    pub number: Option<u32>,
    /// The path of an HTTP request as it was sent, without its query.
    pub path: Option<&'a [u8]>,
    /// The application protocols that a TLS client offers.
    pub alpn: Alpn<'a>,
    /// Whether the hello carries an encrypted one: `name` is then the public name of the outer hello (RFC 9849).
    pub ech: bool,
    /// The user that the client logs in as; of LDAP the distinguished name, of XMPP the address without a resource.
    pub user: Option<&'a [u8]>,
    /// The database that it asks for.
    pub database: Option<&'a [u8]>,
    /// Who the client says it is, or what it goes on with: MQTT client id, SSH software, Redis client name, RTSP session,
    /// routing token of RDP.
    pub client: Option<&'a [u8]>,
    /// Process and secret of a PostgreSQL request to cancel, as sent: it belongs to whoever gave out that key.
    pub cancel: Option<&'a [u8]>,
    /// Whether it asks to go on with TLS, within the protocol, before it says anything else: LDAP's StartTLS, AMQP 1.0.
    pub starttls: bool,
    /// What the client waits for, to be sent once its service is reached. Where it is not empty, everything in front of
    /// `end` is for whoever sends it, and not for the service.
    pub reply: &'static [u8],
    /// Which of the sniffer's patterns it was.
    pub pattern: Option<u16>,
    /// The PROXY header in front of it all.
    pub proxied: Option<proxy::Header<'a>>,
}

impl<'a> Shown<'a> {
    pub(crate) fn new(protocol: Protocol, end: usize) -> Self {
        Self {
            protocol,
            intent: Intent::Use,
            end,
            name: None,
            port: None,
            number: None,
            path: None,
            alpn: Alpn(&[]),
            ech: false,
            user: None,
            database: None,
            client: None,
            cancel: None,
            starttls: false,
            reply: b"",
            pattern: None,
            proxied: None,
        }
    }

    /// Whether the path means what it says. One with `.`, `..` or empty segments, a backslash or an escape may mean
    /// another to the service (RFC 3986 6.2.2), so a prefix route must not trust it.
    pub fn path_is_plain(&self) -> bool {
        let Some(path) = self.path else { return true };
        let inner = path.strip_prefix(b"/").unwrap_or(path);
        let inner = inner.strip_suffix(b"/").unwrap_or(inner);
        let mut segments = inner.split(|&byte| byte == b'/');
        !path.iter().any(|byte| matches!(byte, b'%' | b'\\'))
            && (matches!(path, b"/" | b"*") || segments.all(|segment| !matches!(segment, b"" | b"." | b"..")))
    }
}

/// The list of a TLS client's application protocols, in its order (RFC 7301 3.1).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Alpn<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Alpn<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (&count, rest) = self.0.split_first()?;
        let (name, rest) = rest.split_at_checked(usize::from(count))?;
        self.0 = rest;
        Some(name)
    }
}

impl core::fmt::Debug for Alpn<'_> {
    fn fmt(&self, to: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        to.debug_list().entries(self.map(<[u8]>::escape_ascii)).finish()
    }
}

/// Room for text that the stream has in pieces. One per worker, used again for each connection; 82 kB.
pub struct Scratch {
    /// A ClientHello out of its records, a header block out of its frames.
    pub(crate) message: [u8; tls::HELLO_BYTES],
    /// Decompressed text.
    pub(crate) text: [u8; 16_384],
    /// A folded name.
    pub(crate) name: [u8; NAME_BYTES],
}

impl Scratch {
    /// Empty room. A constant, so that it can be made in place.
    pub const fn new() -> Self {
        Self { message: [0; tls::HELLO_BYTES], text: [0; 16_384], name: [0; NAME_BYTES] }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}
