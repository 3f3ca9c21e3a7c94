//! A service as it lies in the file: few bytes, in network order. The layout is in `docs/registry.md`.
//!
//! Decides the encoding of services and their options. A unix path that holds the service's own name holds a NUL in its
//! place, which no path can: of a million services with a socket each, that saves a third of the file.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::failure::{Error, Result};
use crate::name::Name;
use crate::target::Target;

const KIND: u8 = 0b0000_0011;
const UNIX: u8 = 0;
const IPV4: u8 = 1;
const IPV6: u8 = 2;
const HOST: u8 = 3;
const HANDOFF: u8 = 0b0000_0100;
const WIDE_PORT: u8 = 0b0000_1000;
const OPTIONS: u8 = 0b0001_0000;
const INETD: u8 = 0b0010_0000;
const KNOWN: u8 = KIND | HANDOFF | WIDE_PORT | OPTIONS | INETD;

const PATIENCE: u8 = 1;
const CONNECTIONS: u8 = 2;
const PROXY: u8 = 4;
const START: u8 = 8;
const KNOWN_OPTIONS: u8 = PATIENCE | CONNECTIONS | PROXY | START;

/// How a connection reaches its service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Delivery {
    /// Bytes are carried between client and service.
    #[default]
    Relay,
    /// The accepted socket itself is passed to the service, over its unix socket.
    Handoff,
    /// The accepted socket is passed to whoever starts a process for each connection.
    Inetd,
}

impl Delivery {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Delivery::Relay => "relay",
            Delivery::Handoff => "handoff",
            Delivery::Inetd => "inetd",
        }
    }

    /// By name; an error names `field`.
    pub fn checked(field: &str, text: &str) -> Result<Delivery> {
        match text {
            "relay" => Ok(Delivery::Relay),
            "handoff" => Ok(Delivery::Handoff),
            "inetd" => Ok(Delivery::Inetd),
            _ => Err(Error::bad(field, format!("{} is not one of relay, handoff, inetd", crate::failure::shown(text)))),
        }
    }
}

/// What a service may ask of the broker.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// How long a connection waits for a service that is absent or full, in milliseconds.
    pub patience_ms: Option<u32>,
    /// Most connections at once.
    pub connections: Option<u32>,
    /// Version of the PROXY header that a relayed connection begins with: 1 or 2.
    pub proxy: Option<u8>,
    /// The template by which the service is started when somebody calls it; without one it is there or not.
    pub start: Option<Start>,
}

/// The name of a template: `[a-z0-9_-]{1,32}`. Templates themselves are not in the registry: who may write it may not
/// thereby run commands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Start {
    length: u8,
    bytes: [u8; Start::MOST_BYTES],
}

impl Start {
    /// No name is longer.
    pub const MOST_BYTES: usize = 32;

    /// From its text; an error names `field`.
    pub fn checked(field: &str, text: &str) -> Result<Start> {
        Start::read(text.as_bytes()).ok_or_else(|| {
            let shown = crate::failure::shown(text);
            Error::bad(field, format!("{shown} is no name of a template: 1 to 32 of a-z, 0-9, _ and -"))
        })
    }

    fn read(text: &[u8]) -> Option<Start> {
        let known = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
        if !(1..=Start::MOST_BYTES).contains(&text.len()) || !text.iter().all(known) {
            return None;
        }
        let mut bytes = [0; Start::MOST_BYTES];
        bytes[..text.len()].copy_from_slice(text);
        Some(Start { length: text.len() as u8, bytes })
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        // Only ASCII is read.
        std::str::from_utf8(&self.bytes[..usize::from(self.length)]).unwrap_or_default()
    }
}

impl std::fmt::Debug for Start {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_str().fmt(formatter)
    }
}

impl Options {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Options::default()
    }

    /// One byte that says which there are, then those in its order.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let bit = |there: bool, bit: u8| if there { bit } else { 0 };
        out.push(
            bit(self.patience_ms.is_some(), PATIENCE)
                | bit(self.connections.is_some(), CONNECTIONS)
                | bit(self.proxy.is_some(), PROXY)
                | bit(self.start.is_some(), START),
        );
        out.extend(self.patience_ms.iter().chain(&self.connections).flat_map(|number| number.to_be_bytes()));
        out.extend(self.proxy);
        if let Some(start) = &self.start {
            out.push(start.length);
            out.extend(start.as_str().bytes());
        }
    }

    pub(crate) fn decode(bytes: &mut &[u8]) -> Option<Options> {
        let [there] = take(bytes)?;
        if there & !KNOWN_OPTIONS != 0 {
            return None;
        }
        let mut number =
            |bit: u8| if there & bit == 0 { Some(None) } else { take(bytes).map(u32::from_be_bytes).map(Some) };
        let (patience_ms, connections) = (number(PATIENCE)?, number(CONNECTIONS)?);
        let proxy = if there & PROXY == 0 { None } else { Some(take::<1>(bytes)?[0]) };
        let start = match there & START {
            0 => None,
            _ => {
                let [length] = take(bytes)?;
                let (text, rest) = bytes.split_at_checked(length.into())?;
                *bytes = rest;
                Some(Start::read(text)?)
            }
        };
        Some(Options { patience_ms, connections, proxy, start })
    }
}

/// A service: the target behind a name, and perhaps behind a wide port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// In its one spelling.
    pub name: String,
    /// Where it listens.
    pub target: Target,
    /// How connections reach it.
    pub delivery: Delivery,
    /// A 32-bit number that means it.
    pub wide_port: Option<u32>,
    /// What it asks of the broker.
    pub options: Options,
}

impl Service {
    /// What does not go together; an error names the field.
    pub fn checked(self) -> Result<Service> {
        coherent(&self.target, self.delivery, &self.options)?;
        if self.wide_port == Some(0) {
            return Err(Error::bad("wide_port", "0 is none; a number from 1 to 4294967295 is needed"));
        }
        Ok(self)
    }

    /// Append its value; the name is the key.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let kind = match &self.target {
            Target::Unix(_) => UNIX,
            Target::Tcp(SocketAddr::V4(_)) => IPV4,
            Target::Tcp(SocketAddr::V6(_)) => IPV6,
            Target::Host(..) => HOST,
        };
        let bit = |there: bool, bit: u8| if there { bit } else { 0 };
        out.push(
            kind | bit(self.delivery == Delivery::Handoff, HANDOFF)
                | bit(self.delivery == Delivery::Inetd, INETD)
                | bit(self.wide_port.is_some(), WIDE_PORT)
                | bit(!self.options.is_empty(), OPTIONS),
        );
        out.extend(self.wide_port.iter().flat_map(|port| port.to_be_bytes()));
        if !self.options.is_empty() {
            self.options.encode(out);
        }
        match &self.target {
            Target::Unix(path) => match path.split_once(self.name.as_str()) {
                Some((before, after)) => {
                    out.extend(before.bytes());
                    out.push(0);
                    out.extend(after.bytes());
                }
                None => out.extend(path.bytes()),
            },
            Target::Tcp(endpoint) => {
                out.extend(endpoint.port().to_be_bytes());
                match endpoint.ip() {
                    IpAddr::V4(address) => out.extend(address.octets()),
                    IpAddr::V6(address) => out.extend(address.octets()),
                }
            }
            Target::Host(name, port) => {
                out.extend(port.to_be_bytes());
                out.extend(name.bytes());
            }
        }
    }

    /// Read key and value; None if no `encode` wrote them.
    pub(crate) fn decode(key: &[u8], value: &[u8]) -> Option<Service> {
        let name = Name::parse(key).ok()?.to_string();
        let mut rest = value;
        let [head] = take(&mut rest)?;
        if head & !KNOWN != 0 {
            return None;
        }
        let wide_port = if head & WIDE_PORT == 0 { None } else { Some(u32::from_be_bytes(take(&mut rest)?)) };
        let options = if head & OPTIONS == 0 { Options::default() } else { Options::decode(&mut rest)? };
        let target = match head & KIND {
            UNIX => {
                let path = std::str::from_utf8(rest).ok()?;
                Target::Unix(match path.split_once('\0') {
                    Some((before, after)) => [before, &name, after].concat(),
                    None => path.to_owned(),
                })
            }
            HOST => {
                let port = u16::from_be_bytes(take(&mut rest)?);
                Target::Host(std::str::from_utf8(rest).ok()?.to_owned(), port)
            }
            kind => {
                let port = u16::from_be_bytes(take(&mut rest)?);
                let address = if kind == IPV4 {
                    IpAddr::V4(Ipv4Addr::from(take::<4>(&mut rest)?))
                } else {
                    IpAddr::V6(Ipv6Addr::from(take::<16>(&mut rest)?))
                };
                if !rest.is_empty() {
                    return None;
                }
                Target::Tcp(SocketAddr::new(address, port))
            }
        };
        let delivery = match head & (HANDOFF | INETD) {
            0 => Delivery::Relay,
            HANDOFF => Delivery::Handoff,
            INETD => Delivery::Inetd,
            _ => return None,
        };
        Some(Service { name, target, delivery, wide_port, options })
    }
}

/// The wide port of an encoded service, without decoding the rest.
pub(crate) fn wide_port(value: &[u8]) -> Option<u32> {
    let mut rest = value;
    let [head] = take(&mut rest)?;
    if head & WIDE_PORT == 0 { None } else { take(&mut rest).map(u32::from_be_bytes) }
}

/// Of an encoded service what says where it lies, as it is encoded.
pub(crate) enum Lying<'a> {
    /// A unix path or name, with a NUL for the service's own name.
    Path(&'a [u8]),
    /// A port in two bytes, big-endian, and an address.
    Address(&'a [u8]),
    /// Of a host by its name.
    Port(u16),
}

/// The path of an encoded service that has a unix target and says nothing else.
pub(crate) fn plain_path(value: &[u8]) -> Option<&[u8]> {
    let (head, path) = value.split_first()?;
    (head & !(HANDOFF | INETD) == UNIX).then_some(path)
}

/// Where an encoded service lies, without decoding the rest; None if no `encode` wrote it.
pub(crate) fn lying(value: &[u8]) -> Option<Lying<'_>> {
    let mut rest = value;
    let [head] = take(&mut rest)?;
    if head & WIDE_PORT != 0 {
        take::<4>(&mut rest)?;
    }
    if head & OPTIONS != 0 {
        Options::decode(&mut rest)?;
    }
    match head & KIND {
        UNIX => Some(Lying::Path(rest)),
        HOST => take(&mut rest).map(u16::from_be_bytes).map(Lying::Port),
        kind => (rest.len() == if kind == IPV4 { 6 } else { 18 }).then_some(Lying::Address(rest)),
    }
}

/// What delivery, target and options say together.
pub(crate) fn coherent(target: &Target, delivery: Delivery, options: &Options) -> Result<()> {
    if delivery == Delivery::Handoff && !matches!(target, Target::Unix(_)) {
        return Err(Error::bad("delivery", "handoff passes sockets over a unix socket; the target has to be unix:"));
    }
    if delivery == Delivery::Inetd && options.start.is_none() {
        return Err(Error::bad(
            "start",
            "inetd starts a process for each connection; name the template that it is made of",
        ));
    }
    if delivery != Delivery::Relay && options.proxy.is_some() {
        return Err(Error::bad(
            "proxy",
            "a handed-off connection is the client's own and has no PROXY header; relay has",
        ));
    }
    if options.proxy.is_some_and(|version| !matches!(version, 1 | 2)) {
        return Err(Error::bad("proxy", "is the version of the PROXY header, 1 or 2"));
    }
    if options.connections == Some(0) {
        return Err(Error::bad("connections", "0 is none; a number from 1 to 4294967295 is needed"));
    }
    Ok(())
}

/// The next `N` bytes, if there are so many.
pub(crate) fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn service(name: &str, target: &str) -> Service {
        Service {
            name: name.to_owned(),
            target: Target::checked("target", target).unwrap(),
            delivery: Delivery::Relay,
            wide_port: None,
            options: Options::default(),
        }
    }

    #[test]
    fn to_the_byte() {
        let mut out = Vec::new();
        service("a.b", "unix:/run/a.b.sock").encode(&mut out);
        assert_eq!(out, b"\x00/run/\0.sock");
        out.clear();
        let options = Options { patience_ms: Some(258), proxy: Some(2), ..Options::default() };
        Service { wide_port: Some(0x0001_0002), options, ..service("a", "tcp:1.2.3.4:80") }.encode(&mut out);
        assert_eq!(out, b"\x19\0\x01\0\x02\x05\0\0\x01\x02\x02\0\x50\x01\x02\x03\x04");
        out.clear();
        Service { delivery: Delivery::Handoff, ..service("a", "unix:@x") }.encode(&mut out);
        assert_eq!(out, b"\x04@x");
        out.clear();
        let options = Options { start: Some(Start::checked("start", "app").unwrap()), ..Options::default() };
        Service { options, ..service("a", "unix:@x") }.encode(&mut out);
        assert_eq!(out, b"\x10\x08\x03app@x");
        out.clear();
        Service { delivery: Delivery::Inetd, options, ..service("a", "unix:@x") }.encode(&mut out);
        assert_eq!(out, b"\x30\x08\x03app@x");
    }

    #[test]
    fn templates_have_short_plain_names() {
        for name in ["a", "redis-7_b", "0", "-", &"x".repeat(32)] {
            assert_eq!(Start::checked("start", name).unwrap().as_str(), name);
        }
        for name in ["", "A", "a b", "a/b", "../a", "\u{e4}", "a\0", &"x".repeat(33)] {
            assert!(Start::checked("start", name).is_err(), "{name:?}");
        }
    }

    fn any_service() -> impl Strategy<Value = Service> {
        let target = prop_oneof![
            "unix:/[a-z]{1,20}(/[a-z.]{1,3}x){0,3}",
            "unix:@[a-z]{1,20}",
            any::<(Ipv4Addr, u16)>().prop_map(|(ip, port)| format!("tcp:{ip}:{}", port.max(1))),
            any::<(Ipv6Addr, u16)>().prop_map(|(ip, port)| format!("tcp:[{ip}]:{}", port.max(1))),
            "tcp:[a-z]{1,20}(\\.[a-z]{1,3}){0,3}:80",
        ];
        let start = proptest::option::of("[a-z0-9_-]{1,32}");
        let options = (any::<(Option<u32>, Option<u32>, Option<bool>)>(), start).prop_map(
            |((patience_ms, connections, two), start)| Options {
                patience_ms,
                connections,
                proxy: two.map(|two| if two { 2 } else { 1 }),
                start: start.map(|start| Start::checked("start", &start).unwrap()),
            },
        );
        ("[a-z]{1,3}(\\.[a-z]{1,3}){0,3}", target, any::<Option<u32>>(), options)
            .prop_map(|(name, target, wide_port, options)| Service { wide_port, options, ..service(&name, &target) })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(service in any_service()) {
            let mut value = Vec::new();
            service.encode(&mut value);
            prop_assert_eq!(wide_port(&value), service.wide_port);
            prop_assert_eq!(Service::decode(service.name.as_bytes(), &value), Some(service));
        }

        #[test]
        fn any_bytes_are_a_service_or_not(key in proptest::collection::vec(any::<u8>(), 0..20), value in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = Service::decode(&key, &value);
        }
    }
}
