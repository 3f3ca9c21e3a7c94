//! Routes: conditions on what a connection shows, and where it then goes. And their precedence, which is the order of keys.
//!
//! A route lies in the file under its *anchor*, the first of its conditions in the order of [`ANCHORS`]; below that, under
//! its *rank*, one byte per condition, more specific first. So the order of bytes in the file is the precedence, a lookup
//! reads only routes of the anchors that a connection shows, and the first that matches is the one. Two routes of equal
//! rank cannot match the same connection, but for ALPN, of which a client offers several: then the older one is meant.

use std::fmt::Write;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use crate::failure::{Error, Result, shown};
use crate::name::{Name, Pattern};
use crate::record::{Delivery, Options, coherent, take};
use crate::resolve::Seen;
use crate::target::Target;

/// What the `protocol` of a route may be, beside [`PATTERN`] and a name.
pub const PROTOCOLS: [&str; 24] = [
    "tls",
    "http1",
    "http2",
    "websocket",
    "connect",
    "ssh",
    "postgres",
    "redis",
    "mqtt",
    "tcpmux",
    "unknown",
    "smtp",
    "imap",
    "pop3",
    "mysql",
    "ldap",
    "rtsp",
    "xmpp",
    "amqp",
    "amqp1",
    "rdp",
    "minecraft",
    "socks5",
    "socks4",
];
/// What stands before the name of a pattern: bytes at an offset, which whoever sniffs has a name for.
pub const PATTERN: &str = "pattern:";
/// What stands before the name of a plug-in's sniffer.
pub const PLUGIN: &str = "plugin:";
/// Most routes under one anchor: a lookup may have to look at each of them.
pub(crate) const MOST_PER_ANCHOR: usize = 1_000;
const MOST_TEXT_BYTES: usize = 255;
const MOST_PATH_BYTES: usize = 1_024;

/// The kinds of anchors, in the order in which they are looked at.
pub(crate) mod anchor {
    pub(crate) const WIDE_PORT: u8 = 1;
    pub(crate) const EXACT: u8 = 2;
    pub(crate) const ONE: u8 = 3;
    pub(crate) const MANY: u8 = 4;
    pub(crate) const DATABASE: u8 = 5;
    pub(crate) const USER: u8 = 6;
    pub(crate) const CLIENT: u8 = 7;
    pub(crate) const ANY: u8 = 8;
}

/// A condition on a user, database or client id.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// `*`: the connection shows one.
    Any,
    /// This one, byte by byte.
    This(String),
}

impl Wanted {
    /// `*` or the text itself.
    pub fn checked(field: &str, text: &str) -> Result<Wanted> {
        if text == "*" { Ok(Wanted::Any) } else { plain(field, text).map(Wanted::This) }
    }

    fn matches(&self, seen: Option<&[u8]>) -> bool {
        match self {
            Wanted::Any => seen.is_some(),
            Wanted::This(text) => seen == Some(text.as_bytes()),
        }
    }

    fn text(&self) -> &str {
        match self {
            Wanted::Any => "*",
            Wanted::This(text) => text,
        }
    }
}

/// Addresses that begin alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Prefix {
    address: IpAddr,
    bits: u8,
}

impl Prefix {
    /// `10.0.0.0/8`, `2001:db8::/32`, or an address alone.
    pub fn checked(field: &str, text: &str) -> Result<Prefix> {
        let bad = |why: &str| Error::bad(field, format!("{} {why}; such as 10.0.0.0/8 or 2001:db8::/32", shown(text)));
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.parse().map_err(|_| bad("has no address"))?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => most,
            Some(bits) if (1..=3).contains(&bits.len()) && bits.bytes().all(|digit| digit.is_ascii_digit()) => {
                bits.parse().ok().filter(|bits| *bits <= most).ok_or_else(|| bad("has too many bits"))?
            }
            Some(_) => return Err(bad("has no number of bits")),
        };
        let prefix = Prefix { address, bits };
        if number(address) & !prefix.mask() != 0 {
            return Err(bad("has bits set behind its prefix"));
        }
        Ok(prefix)
    }

    /// Whether the address is one of them.
    pub fn contains(&self, address: IpAddr) -> bool {
        // A dual-stack listener shows IPv4 clients as ::ffff:a.b.c.d (RFC 4291 2.5.5.2).
        let address = address.to_canonical();
        address.is_ipv4() == self.address.is_ipv4() && number(address) & self.mask() == number(self.address)
    }

    fn mask(&self) -> u128 {
        let most = if self.address.is_ipv4() { 32 } else { 128 };
        let ones = u128::MAX.checked_shr(128 - u32::from(self.bits)).unwrap_or(0);
        ones.checked_shl(most - u32::from(self.bits)).unwrap_or(0)
    }
}

impl std::fmt::Display for Prefix {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}/{}", self.address, self.bits)
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// What a connection must show; all of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Conditions {
    /// The wide port that it asks for.
    pub wide_port: Option<u32>,
    /// SNI, Host or :authority, without a port.
    pub name: Option<Pattern>,
    /// The path is this one or below it, byte by byte as it was sent.
    pub path: Option<String>,
    /// One of [`PROTOCOLS`], or a pattern.
    pub protocol: Option<String>,
    /// Among the protocols that a client offers in TLS.
    pub alpn: Option<String>,
    /// User of the startup message or CONNECT packet.
    pub user: Option<Wanted>,
    /// Database of the startup message.
    pub database: Option<Wanted>,
    /// MQTT client id.
    pub client: Option<Wanted>,
    /// Address that the client connected to.
    pub destination: Option<Prefix>,
    /// Port that the client connected to.
    pub destination_port: Option<u16>,
    /// Address of the client.
    pub source: Option<Prefix>,
    /// Port of the client.
    pub source_port: Option<u16>,
}

/// Conditions, and where a connection that fulfils them goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// All of them have to hold.
    pub conditions: Conditions,
    /// `service:NAME` or a target; with placeholders.
    pub to: String,
    /// How connections reach a target; a service knows that itself.
    pub delivery: Delivery,
    /// What the target asks of the broker.
    pub options: Options,
}

impl Conditions {
    /// Whether a connection fulfils them; `name` is the one it shows, in its one spelling.
    pub(crate) fn hold(&self, seen: &Seen<'_>, name: Option<&Name>) -> bool {
        self.wide_port.is_none_or(|port| seen.wide_port == Some(port))
            && self.name.as_ref().is_none_or(|pattern| name.is_some_and(|name| pattern.matches(name)))
            && self.path.as_deref().is_none_or(|path| seen.path.is_some_and(|seen| below(path.as_bytes(), seen)))
            && self.protocol.as_deref().is_none_or(|protocol| seen.protocol == Some(protocol))
            && self.alpn.as_deref().is_none_or(|alpn| offers(seen.alpn.unwrap_or_default(), alpn.as_bytes()))
            && self.user.as_ref().is_none_or(|user| user.matches(seen.user))
            && self.database.as_ref().is_none_or(|database| database.matches(seen.database))
            && self.client.as_ref().is_none_or(|client| client.matches(seen.client))
            && self.destination.is_none_or(|prefix| seen.destination.is_some_and(|end| prefix.contains(end.ip())))
            && self.destination_port.is_none_or(|port| seen.destination.is_some_and(|end| end.port() == port))
            && self.source.is_none_or(|prefix| seen.source.is_some_and(|end| prefix.contains(end.ip())))
            && self.source_port.is_none_or(|port| seen.source.is_some_and(|end| end.port() == port))
    }

    /// Where in the file the route is looked for.
    pub(crate) fn anchor(&self) -> Vec<u8> {
        let text = |kind: u8, text: &str| anchor_key(kind, text.as_bytes());
        if let Some(port) = self.wide_port {
            return anchor_key(anchor::WIDE_PORT, &port.to_be_bytes());
        }
        match &self.name {
            Some(Pattern::Exact(name)) => return text(anchor::EXACT, name),
            Some(Pattern::One(suffix)) => return text(anchor::ONE, suffix),
            Some(Pattern::Many(suffix)) => return text(anchor::MANY, suffix),
            None => {}
        }
        match (&self.database, &self.user, &self.client) {
            (Some(Wanted::This(database)), _, _) => text(anchor::DATABASE, database),
            (_, Some(Wanted::This(user)), _) => text(anchor::USER, user),
            (_, _, Some(Wanted::This(client))) => text(anchor::CLIENT, client),
            _ => text(anchor::ANY, ""),
        }
    }

    /// The precedence among routes of one anchor, once: the earlier condition outweighs all later ones, and the more
    /// specific sorts first, so each byte is 255 less what it counts.
    pub(crate) fn rank(&self) -> [u8; RANK_BYTES] {
        let name = match &self.name {
            None => [0, 0],
            Some(Pattern::Many(suffix)) => [1, suffix.len() as u8],
            Some(Pattern::One(suffix)) => [2, suffix.len() as u8],
            Some(Pattern::Exact(_)) => [3, 0],
        };
        let path = self.path.as_ref().map_or(0, |path| path.len() as u16).to_be_bytes();
        let wanted = |wanted: &Option<Wanted>| match wanted {
            None => 0,
            Some(Wanted::Any) => 1,
            Some(Wanted::This(_)) => 2,
        };
        let bits = |prefix: &Option<Prefix>| prefix.map_or(0, |prefix| prefix.bits + 1);
        [
            name[0],
            name[1],
            path[0],
            path[1],
            self.protocol.is_some().into(),
            self.alpn.is_some().into(),
            wanted(&self.database),
            wanted(&self.user),
            wanted(&self.client),
            bits(&self.destination),
            self.destination_port.is_some().into(),
            bits(&self.source),
            self.source_port.is_some().into(),
        ]
        .map(|count| u8::MAX - count)
    }

    /// As in files and on the command line; empty where there are none.
    pub fn fields(&self) -> Vec<(&'static str, String)> {
        let wanted = |wanted: &Option<Wanted>| wanted.as_ref().map(|wanted| wanted.text().to_owned());
        let fields = [
            ("wide_port", self.wide_port.map(|port| port.to_string())),
            ("name", self.name.as_ref().map(Pattern::to_string)),
            ("path", self.path.clone()),
            ("protocol", self.protocol.clone()),
            ("alpn", self.alpn.clone()),
            ("user", wanted(&self.user)),
            ("database", wanted(&self.database)),
            ("client", wanted(&self.client)),
            ("destination", self.destination.map(|prefix| prefix.to_string())),
            ("destination_port", self.destination_port.map(|port| port.to_string())),
            ("source", self.source.map(|prefix| prefix.to_string())),
            ("source_port", self.source_port.map(|port| port.to_string())),
        ];
        fields.into_iter().filter_map(|(field, value)| Some((field, value?))).collect()
    }

    /// The opposite of [`Conditions::fields`]; the first that is wrong is the error.
    pub fn checked<'a>(fields: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Conditions> {
        let mut read = Conditions::default();
        for (field, text) in fields {
            match field {
                "wide_port" => read.wide_port = Some(whole(field, text, 1..=u32::MAX)?),
                "name" => read.name = Some(Pattern::checked(field, text)?),
                "path" => read.path = Some(path(field, text)?),
                "protocol" => read.protocol = Some(protocol(field, text)?),
                "alpn" => read.alpn = Some(plain(field, text)?),
                "user" => read.user = Some(Wanted::checked(field, text)?),
                "database" => read.database = Some(Wanted::checked(field, text)?),
                "client" => read.client = Some(Wanted::checked(field, text)?),
                "destination" => read.destination = Some(Prefix::checked(field, text)?),
                "destination_port" => read.destination_port = Some(whole(field, text, 1..=65_535)? as u16),
                "source" => read.source = Some(Prefix::checked(field, text)?),
                "source_port" => read.source_port = Some(whole(field, text, 1..=65_535)? as u16),
                _ => return Err(Error::bad(field, "is no condition of a route")),
            }
        }
        Ok(read)
    }
}

/// Bytes of [`Conditions::rank`].
pub(crate) const RANK_BYTES: usize = 13;

impl Route {
    /// What does not go together; an error names the field. Placeholders need their condition: what a connection need not
    /// show cannot name its target.
    pub fn checked(self) -> Result<Route> {
        let sample = Shown {
            name: self.conditions.name.as_ref().map(|_| "a.a"),
            label: matches!(self.conditions.name, Some(Pattern::One(_) | Pattern::Many(_))).then_some("a"),
            user: self.conditions.user.as_ref().map(|_| b"a".as_slice()),
            database: self.conditions.database.as_ref().map(|_| b"a".as_slice()),
            client: self.conditions.client.as_ref().map(|_| b"a".as_slice()),
        };
        let to = sample.expand(&self.to).map_err(|why| Error::bad("to", format!("{} {why}", shown(&self.to))))?;
        if let Some(name) = to.strip_prefix("service:") {
            Name::checked("to", name)?;
            if self.delivery != Delivery::default() || !self.options.is_empty() {
                return Err(Error::bad(
                    "to",
                    "a service has its own delivery and options; give these with a target only",
                ));
            }
        } else {
            coherent(&Target::checked("to", &to)?, self.delivery, &self.options)?;
        }
        Ok(self)
    }

    /// The name of the service, where it is no template.
    pub(crate) fn service(&self) -> Option<&str> {
        self.to.strip_prefix("service:").filter(|name| !name.contains('{'))
    }

    /// Delivery and options, then each condition as a field number, a length in two bytes and its text; 0 is `to`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![match self.delivery {
            Delivery::Relay => 0,
            Delivery::Handoff => 1,
            Delivery::Inetd => 2,
        }];
        self.options.encode(&mut out);
        let mut field = |number: usize, text: &str| {
            out.push(number as u8);
            out.extend((text.len() as u16).to_be_bytes());
            out.extend(text.bytes());
        };
        field(0, &self.to);
        for (name, text) in self.conditions.fields() {
            field(FIELDS.iter().position(|one| *one == name).unwrap_or_default() + 1, &text);
        }
        out
    }

    /// Read what `encode` wrote; None if it did not.
    pub(crate) fn decode(value: &[u8]) -> Option<Route> {
        let mut rest = value;
        let [delivery] = take(&mut rest)?;
        let options = Options::decode(&mut rest)?;
        let (mut to, mut fields) = (None, Vec::new());
        while !rest.is_empty() {
            let [number] = take(&mut rest)?;
            let length = u16::from_be_bytes(take(&mut rest)?).into();
            let (text, left) = rest.split_at_checked(length)?;
            let text = std::str::from_utf8(text).ok()?;
            rest = left;
            match usize::from(number).checked_sub(1) {
                None => to = Some(text.to_owned()),
                Some(index) => fields.push((*FIELDS.get(index)?, text)),
            }
        }
        let delivery = match delivery {
            0 => Delivery::Relay,
            1 => Delivery::Handoff,
            2 => Delivery::Inetd,
            _ => return None,
        };
        Some(Route { conditions: Conditions::checked(fields).ok()?, to: to?, delivery, options })
    }
}

/// The conditions by their numbers in the file, from 1.
const FIELDS: [&str; 12] = [
    "wide_port",
    "name",
    "path",
    "protocol",
    "alpn",
    "user",
    "database",
    "client",
    "destination",
    "destination_port",
    "source",
    "source_port",
];

/// What may stand in the place of a placeholder.
pub(crate) struct Shown<'a> {
    pub(crate) name: Option<&'a str>,
    pub(crate) label: Option<&'a str>,
    pub(crate) user: Option<&'a [u8]>,
    pub(crate) database: Option<&'a [u8]>,
    pub(crate) client: Option<&'a [u8]>,
}

impl Shown<'_> {
    /// The template with every placeholder replaced. What a client sent is one component of a path, or refused.
    pub(crate) fn expand(&self, template: &str) -> std::result::Result<String, &'static str> {
        let mut out = String::with_capacity(template.len() + 32);
        let mut rest = template;
        while let Some(start) = rest.find(['{', '}']) {
            let (before, after) = rest.split_at(start);
            out.push_str(before);
            let (word, left) = after
                .strip_prefix('{')
                .and_then(|inner| inner.split_once('}'))
                .ok_or("has a brace without its other half")?;
            let sent = |value: Option<&'_ [u8]>| match value.map(crate::target::component) {
                None => Ok(None),
                Some(Some(text)) => Ok(Some(text.to_owned())),
                Some(None) => Err("has a placeholder for which the client sent what no path may hold"),
            };
            let value = match word {
                "name" => self.name.map(str::to_owned),
                "label" => self.label.map(str::to_owned),
                "user" => sent(self.user)?,
                "database" => sent(self.database)?,
                "client" => sent(self.client)?,
                _ => return Err("has a placeholder that is not one of {name}, {label}, {user}, {database}, {client}"),
            };
            let value = value.ok_or(
                "has a placeholder without its condition: {label} needs a wildcard name, {name}, {user}, {database} and \
                 {client} a condition on that",
            )?;
            let _ = out.write_str(&value);
            rest = left;
        }
        out.push_str(rest);
        Ok(out)
    }
}

/// Anchor kind, length and bytes: no anchor is the beginning of another.
pub(crate) fn anchor_key(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(bytes.len() + 2 + RANK_BYTES + 2);
    key.extend([kind, bytes.len() as u8]);
    key.extend(bytes);
    key
}

/// Whether a path is `prefix` or below it. The query is no part of it, and nothing is decoded: what was sent is compared.
fn below(prefix: &[u8], seen: &[u8]) -> bool {
    let end = seen.iter().position(|byte| matches!(byte, b'?' | b'#')).unwrap_or(seen.len());
    match seen[..end].strip_prefix(prefix) {
        Some(rest) => rest.is_empty() || rest[0] == b'/' || prefix == b"/",
        None => false,
    }
}

/// Whether a ProtocolNameList, without its own length, holds a protocol (RFC 7301 3.1).
fn offers(mut list: &[u8], protocol: &[u8]) -> bool {
    while let Some((&length, rest)) = list.split_first() {
        let Some((name, left)) = rest.split_at_checked(length.into()) else { return false };
        if name == protocol {
            return true;
        }
        list = left;
    }
    false
}

fn protocol(field: &str, text: &str) -> Result<String> {
    let named = text.strip_prefix(PATTERN).or_else(|| text.strip_prefix(PLUGIN));
    let is_named = named.is_some_and(|name| {
        (1..=32).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte))
    });
    if PROTOCOLS.contains(&text) || is_named {
        return Ok(text.to_owned());
    }
    let allowed = "or pattern:NAME or plugin:NAME, a name of 1 to 32 of a-z, 0-9, - and _";
    Err(Error::bad(field, format!("{} is not one of {}, {allowed}", shown(text), PROTOCOLS.join(", "))))
}

fn path(field: &str, text: &str) -> Result<String> {
    let allowed = "a path begins with / and has at most 1,024 visible ASCII characters, without ? and #";
    let visible = text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#'));
    if !text.starts_with('/') || !visible || text.len() > MOST_PATH_BYTES {
        return Err(Error::bad(field, format!("{}; {allowed}", shown(text))));
    }
    let bare = text.trim_end_matches('/');
    Ok(if bare.is_empty() { "/" } else { bare }.to_owned())
}

fn plain(field: &str, text: &str) -> Result<String> {
    if text.is_empty() || text.len() > MOST_TEXT_BYTES || text.chars().any(char::is_control) {
        return Err(Error::bad(
            field,
            format!("{}; 1 to 255 bytes without control characters are needed", shown(text)),
        ));
    }
    Ok(text.to_owned())
}

/// A decimal number in that range, without a sign.
pub(crate) fn whole(field: &str, text: &str, range: RangeInclusive<u32>) -> Result<u32> {
    let digits = !text.is_empty() && text.len() <= 10 && text.bytes().all(|digit| digit.is_ascii_digit());
    let read = text.parse().ok().filter(|number| digits && range.contains(number));
    let (least, most) = range.into_inner();
    read.ok_or_else(|| Error::bad(field, format!("{} is not a whole number from {least} to {most}", shown(text))))
}
