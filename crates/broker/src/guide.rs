//! The guide: sniff, ask the registry, else the listener's default.
//!
//! Decides what of a sniffer's find a route can be matched with, and who gets a listener's default: whoever says nothing,
//! and whoever says what no enabled protocol knows. Never who begins a protocol and does not finish it, or breaks it: that
//! is how a split hello gets past a rule elsewhere.
//!
//! Decides, too, which bytes are for the broker and not for the service: a PROXY header from a source that the listener
//! trusts, a PostgreSQL client's wish for encryption, what a SOCKS client says, a tcpmux line that a route understands.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fourtuple_engine::ListenerId;
use fourtuple_engine::broker::guide::{
    Address, Asleep, Chosen, Delivery, Guidance, Guide, Heard, Known, Opinion, Shown, Turn, Why, Word,
};
use fourtuple_registry::{Name, Options, Outcome, Prefix, Resolved, Seen, Store, Target};
use fourtuple_sniff::{Alpn, Pattern, Prelude, Protocol, Scratch, Sniffer, State, Verdict, proxy};

use crate::cancel::{Cancels, Overheard, Place};
use crate::door::{self, Door, Standing, TALK_BYTES};

mod manners;

use self::manners::Manner;
pub use self::manners::Manners;

/// Of a connection that is asked about, so many bytes are shown.
const CONSULTED_BYTES: usize = 4_096;

/// Where a connection goes that nothing else matches.
#[derive(Clone)]
pub enum Fallback {
    /// A service of the registry.
    Service(Box<Name>),
    /// A target; relayed.
    Target(Target),
}

/// Who is believed at one listener, and what is answered there in a service's name.
#[derive(Clone, Default, Debug)]
pub struct Rules {
    /// The sources whose PROXY headers are believed.
    pub proxies: Vec<Prefix>,
    /// Whether these may do without; all others never have one.
    pub may_be_direct: bool,
    /// What a PostgreSQL client is told that asks for TLS.
    pub postgres_tls: PostgresTls,
    /// Whether a SOCKS client is answered by the service, and not here.
    pub leaves_socks: bool,
}

/// What becomes of a PostgreSQL client's request for TLS.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum PostgresTls {
    /// The client is told to begin, which shows its server name; a relayed service is then asked, too.
    #[default]
    Offered,
    /// The client is told that there is none, which shows user and database.
    Declined,
    /// The service answers, so that only the protocol is known.
    Left,
}

/// How far a connection is read.
#[derive(Clone, Copy, Default, Debug)]
pub struct Reading {
    state: State,
    /// It is told for whom the peer speaks.
    spoke: bool,
    /// How the client is spoken to if its service sleeps.
    manner: Manner,
    /// At a door.
    standing: Standing,
}

/// What is looked for in the connections of one listener, under which rules, and who gets the rest.
#[derive(Clone)]
pub struct Looking {
    sniffer: Sniffer<'static>,
    patterns: Vec<Pattern>,
    /// Of the patterns, as a route has them.
    names: Vec<String>,
    fallback: Option<Fallback>,
    rules: Rules,
    door: Option<Arc<Door>>,
    /// What no protocol knows is asked about.
    consults: bool,
}

/// Sniffers and registry of one worker.
pub struct BrokerGuide {
    store: Arc<Store>,
    scratch: Box<Scratch>,
    /// By listener.
    looking: Vec<Looking>,
    manners: Manners,
    cancels: Arc<Cancels>,
    /// Connections to PostgreSQL that are relayed in the clear, by session.
    overheard: HashMap<u32, Overheard>,
}

impl Looking {
    /// Look for these protocols and patterns; a pattern's name is what a route says of it.
    pub fn new(
        protocols: impl IntoIterator<Item = Protocol>,
        patterns: impl IntoIterator<Item = (String, Pattern)>,
        fallback: Option<Fallback>,
    ) -> Looking {
        let (names, patterns): (Vec<_>, Vec<_>) = patterns.into_iter().unzip();
        let asked_last = (!patterns.is_empty()).then_some(Protocol::Pattern);
        let sniffer = Sniffer::new(protocols.into_iter().chain(asked_last));
        Looking { sniffer, patterns, names, fallback, rules: Rules::default(), door: None, consults: false }
    }

    /// Ask the outside about what none of these know.
    #[must_use]
    pub fn consulting(self, consults: bool) -> Looking {
        Looking { consults, ..self }
    }

    /// Behind a door: its clients are greeted, and nothing is looked for but what it speaks.
    #[must_use]
    pub fn behind(self, door: Door) -> Looking {
        Looking { door: Some(Arc::new(door)), ..self }
    }

    /// Under other rules than the usual ones.
    #[must_use]
    pub fn under(self, rules: Rules) -> Looking {
        Looking { rules, ..self }
    }

    /// Whether it stands in a prefix whose headers are believed.
    fn is_proxy(&self, peer: SocketAddr) -> bool {
        self.rules.proxies.iter().any(|prefix| prefix.contains(peer.ip()))
    }

    fn bound(&self) -> usize {
        let prelude = if self.rules.proxies.is_empty() { Prelude::None } else { Prelude::Required };
        match self.door {
            // The header goes before the rest is looked at.
            Some(_) => TALK_BYTES + Sniffer::new([Protocol::Tls]).bound(),
            // The outside is shown so much.
            None if self.consults => self.sniffer.with_prelude(prelude).bound().max(2 * CONSULTED_BYTES),
            None => self.sniffer.with_prelude(prelude).bound(),
        }
    }
}

impl BrokerGuide {
    /// A guide with what each listener looks for.
    pub fn new(store: Arc<Store>, looking: Vec<Looking>) -> BrokerGuide {
        let (cancels, overheard, manners) = (Arc::default(), HashMap::new(), Manners::default());
        BrokerGuide { store, scratch: Box::new(Scratch::new()), looking, manners, cancels, overheard }
    }

    /// With other words for the clients of services that sleep.
    #[must_use]
    pub fn saying(self, manners: Manners) -> BrokerGuide {
        BrokerGuide { manners, ..self }
    }

    /// With a table of PostgreSQL's keys that other workers have, too.
    #[must_use]
    pub fn sharing(self, cancels: Arc<Cancels>) -> BrokerGuide {
        BrokerGuide { cancels, ..self }
    }

    /// Bytes that it may ask for.
    pub fn bound(&self) -> usize {
        self.looking.iter().map(Looking::bound).max().unwrap_or(0)
    }

    fn fall_back(&self, listener: ListenerId, shown: &Shown<'_>, chosen: &mut Chosen) -> Guidance {
        match &self.looking[listener.0 as usize].fallback {
            Some(Fallback::Target(target)) => {
                let (delivery, options) = (fourtuple_registry::Delivery::Relay, Options::default());
                choose(Resolved { service: None, target: target.clone(), delivery, options }, shown, chosen);
                Guidance::Found
            }
            Some(Fallback::Service(name)) => match self.store.reader().and_then(|reader| reader.by_name(name)) {
                Ok(Some(found)) => {
                    let fourtuple_registry::Service { name, target, delivery, options, .. } = found;
                    choose(Resolved { service: Some(name), target, delivery, options }, shown, chosen);
                    Guidance::Found
                }
                Ok(None) | Err(_) => Guidance::NoRoute,
            },
            None => Guidance::NoRoute,
        }
    }

    /// Ask the registry, and else the default.
    fn resolve(&self, seen: &Seen<'_>, shown: &Shown<'_>, chosen: &mut Chosen) -> Guidance {
        match self.store.reader().and_then(|reader| reader.resolve(seen)) {
            Ok(Outcome::Found(resolved)) => {
                if let Some(name) = seen.name {
                    chosen.matched = String::from_utf8_lossy(name).into_owned();
                }
                choose(resolved, shown, chosen);
                Guidance::Found
            }
            Ok(Outcome::Refused(_)) => Guidance::Garbage,
            // Who names something that there is not is not sent to somebody else.
            Ok(Outcome::NoService(_)) | Err(_) => Guidance::NoRoute,
            Ok(Outcome::NoRoute) => self.fall_back(shown.listener, shown, chosen),
        }
    }
}

impl Guide for BrokerGuide {
    type Memory = Reading;

    fn trusts(&self, listener: ListenerId, peer: SocketAddr) -> bool {
        self.looking[listener.0 as usize].is_proxy(peer)
    }

    fn speaks_first(&self, listener: ListenerId) -> bool {
        self.looking[listener.0 as usize].door.is_some()
    }

    fn hears(&self, expect: u8, said: &[u8]) -> Heard {
        door::hears(expect, said).unwrap_or_else(|| Heard::of_byte(expect, said))
    }

    fn relays(&mut self, session: u32, chosen: &Chosen) {
        self.overheard.insert(session, Overheard::at(place(chosen)));
    }

    fn overhears(&mut self, session: u32, said: &[u8]) -> bool {
        self.overheard.get_mut(&session).is_some_and(|connection| self.cancels.said(connection, said))
    }

    fn forgets(&mut self, session: u32) {
        if let Some(connection) = self.overheard.remove(&session) {
            self.cancels.forget(connection);
        }
    }

    fn guide(&mut self, shown: &Shown<'_>, memory: &mut Reading, chosen: &mut Chosen) -> Guidance {
        let looking = &self.looking[shown.listener.0 as usize];
        let Rules { may_be_direct, postgres_tls, leaves_socks, .. } = looking.rules;
        // Once it has spoken for another, the names are that one's.
        let is_proxy = !memory.spoke && shown.names.is_some_and(|(peer, _)| looking.is_proxy(peer));
        let prelude = match (is_proxy, may_be_direct) {
            (false, _) => Prelude::None,
            (true, false) => Prelude::Required,
            (true, true) => Prelude::Allowed,
        };
        if let Some(door) = looking.door.clone().filter(|_| !is_proxy) {
            return self.at_door(&door, shown, memory, chosen);
        }
        let sniffer = looking
            .sniffer
            .with_patterns(&looking.patterns)
            .with_prelude(prelude)
            .with_postgres_tls(postgres_tls != PostgresTls::Declined)
            .with_socks_answered(!leaves_socks);
        let (source, destination) = shown.names.unzip();
        let mut seen = Seen { source, destination, ..Seen::default() };
        let verdict = sniffer.sniff(&mut memory.state, shown.bytes, &mut self.scratch);
        // Whoever waits for the other side to speak first.
        let is_silent = shown.last && shown.bytes.is_empty();
        if is_proxy {
            if memory.state.knows_source() || is_silent && may_be_direct {
                let names = memory.state.proxied(shown.bytes).and_then(|header| header.endpoints);
                let header = memory.state.header() as u32;
                *memory = Reading { spoke: true, ..Reading::default() };
                return Guidance::Speaks { names, header };
            }
            // A broken header, or none where one has to be, or too late.
            let is_over = shown.last || matches!(verdict, Verdict::Refused(..));
            return if is_over { Guidance::Unproxied } else { Guidance::More };
        }
        let mut skip = memory.state.start();
        memory.manner = Manner::default();
        let promise = memory.state.promised().filter(|_| postgres_tls == PostgresTls::Offered);
        let turn = promise.map(|(request, answer)| Turn { say: request.into(), expect: Some(answer) });
        let (mut reply, mut line, mut is_tcpmux, mut name) = (&b""[..], 0, false, None);
        let alpn;
        let mut in_the_clear = false;
        let known;
        match verdict {
            Verdict::More(_) if is_silent => seen.protocol = Some("unknown"),
            Verdict::More(_) => return Guidance::More,
            Verdict::No if looking.consults => {
                match (&chosen.opinion, shown.last) {
                    (Opinion::Unasked, false) => return Guidance::Consult,
                    (Opinion::More(known), false) if shown.bytes.len() > *known as usize => return Guidance::Consult,
                    (Opinion::More(_), false) => return Guidance::More,
                    _ => {}
                }
                known = match std::mem::take(&mut chosen.opinion) {
                    Opinion::Known(known) => *known,
                    _ => Known { protocol: "unknown".to_owned(), ..Known::default() },
                };
                seen.protocol = Some(&known.protocol);
                seen.name = known.name.as_deref().map(str::as_bytes);
                (seen.user, seen.database) =
                    (known.user.as_deref().map(str::as_bytes), known.database.as_deref().map(str::as_bytes));
                seen.client = known.client.as_deref().map(str::as_bytes);
            }
            Verdict::No => seen.protocol = Some("unknown"),
            Verdict::Refused(..) => return Guidance::Garbage,
            Verdict::Answer(b"S" | b"N") if postgres_tls == PostgresTls::Left => {
                (seen.protocol, skip) = (Some("postgres"), 0);
            }
            Verdict::Answer(answer) => return Guidance::Answer(answer),
            Verdict::Match(found) => {
                if let Some(key) = found.cancel
                    && self.cancels.choose(shown, (key, skip), chosen, |version| preface(version, shown))
                {
                    chosen.skip = skip as u32;
                    return Guidance::Found;
                }
                // Only then does the server say its key in the clear.
                in_the_clear = found.protocol == Protocol::Postgres && found.user.is_some();
                if !found.reply.is_empty() {
                    (reply, line, is_tcpmux) = (found.reply, found.end, found.protocol == Protocol::Tcpmux);
                }
                if found.path.is_some() && !found.path_is_plain() {
                    // A path that may mean another one matches no route on paths.
                    seen.path = None;
                } else {
                    seen.path = found.path;
                }
                alpn = self::alpn(found.alpn);
                name = found.name;
                seen.name = name.map(str::as_bytes);
                seen.wide_port = found.number;
                seen.protocol = Some(match found.protocol {
                    Protocol::Http => "http1",
                    Protocol::Pattern => &looking.names[usize::from(found.pattern.unwrap_or_default())],
                    other => other.probe().name,
                });
                let opening = shown.bytes.get(skip..).unwrap_or_default();
                let protocol = seen.protocol.unwrap_or_default();
                memory.manner = Manner::of(protocol, found.intent, found.path, opening, &self.manners);
                (seen.user, seen.database, seen.client) = (found.user, found.database, found.client);
                seen.alpn = (!alpn.is_empty()).then_some(alpn.as_slice());
            }
        }
        let is_postgres = seen.protocol == Some("postgres");
        let guidance = match self.store.reader().and_then(|reader| reader.resolve(&seen)) {
            Ok(Outcome::Found(resolved)) => {
                if let Some(name) = name {
                    name.clone_into(&mut chosen.matched);
                }
                choose(resolved, shown, chosen);
                (chosen.skip, chosen.reply) = (skip.max(line) as u32, reply);
                chosen.script.extend(turn);
                chosen.protocol = seen.protocol.map_or_else(Word::default, Word::new);
                Guidance::Found
            }
            Ok(Outcome::Refused(_)) => Guidance::Garbage,
            // Who names something that there is not is not sent to somebody else.
            Ok(Outcome::NoService(_)) | Err(_) => Guidance::NoRoute,
            Ok(Outcome::NoRoute) => {
                // A line of tcpmux is the broker's if a route understands it, and otherwise any line of text.
                let (reply, line) = if is_tcpmux { (&b""[..], 0) } else { (reply, line) };
                (chosen.skip, chosen.reply) = (skip.max(line) as u32, reply);
                chosen.script.extend(turn);
                chosen.protocol = seen.protocol.map_or_else(Word::default, Word::new);
                self.fall_back(shown.listener, shown, chosen)
            }
        };
        if guidance == Guidance::Found && is_postgres {
            self.cancels.brought(source, place(chosen));
            chosen.overheard = in_the_clear && chosen.delivery == Delivery::Relay;
        }
        guidance
    }

    fn asleep(&mut self, shown: &Shown<'_>, memory: &mut Reading, _: &Chosen, say: &mut Vec<u8>) -> Asleep {
        let opening = shown.bytes.get(memory.state.start()..).unwrap_or_default();
        memory.manner.asleep(opening, shown.last, &self.manners, say)
    }

    fn farewell(&mut self, memory: &Reading, _: &Chosen, why: Why, say: &mut Vec<u8>) {
        memory.manner.farewell(why, &self.manners, say);
    }
}

/// Where a chosen service is.
fn place(chosen: &Chosen) -> Place {
    let version = match chosen.preface.first() {
        None => None,
        Some(b'P') => Some(1),
        Some(_) => Some(2),
    };
    Place::of(chosen, version)
}

fn choose(resolved: Resolved, shown: &Shown<'_>, chosen: &mut Chosen) {
    chosen.service = resolved.service.unwrap_or_else(|| resolved.target.to_string());
    chosen.address = match resolved.target {
        Target::Tcp(endpoint) => Address::Tcp(endpoint),
        Target::Unix(path) => Address::Unix(match path.strip_prefix('@') {
            Some(name) => [b"\0", name.as_bytes()].concat(),
            None => path.into_bytes(),
        }),
        // The data plane asks no resolver; `fourtuple serve` refuses such targets where it sees them.
        Target::Host(..) => Address::Unix(Vec::new()),
    };
    chosen.delivery = match resolved.delivery {
        fourtuple_registry::Delivery::Relay => Delivery::Relay,
        fourtuple_registry::Delivery::Handoff => Delivery::HandOff,
        fourtuple_registry::Delivery::Inetd => Delivery::Inetd,
    };
    let Options { patience_ms, connections, proxy, start } = resolved.options;
    chosen.start = start.map_or_else(Word::default, |start| Word::new(start.as_str()));
    chosen.patience = patience_ms.map(|ms| Duration::from_millis(ms.into()));
    chosen.most_connections = connections;
    chosen.preface = proxy.map_or_else(Vec::new, |version| preface(version, shown));
}

/// A list of protocols as the registry is asked about it (RFC 7301 3.1).
fn alpn(protocols: Alpn<'_>) -> Vec<u8> {
    let mut list = Vec::new();
    for protocol in protocols {
        list.push(protocol.len() as u8);
        list.extend_from_slice(protocol);
    }
    list
}

/// A PROXY header with the client's endpoint.
fn preface(version: u8, shown: &Shown<'_>) -> Vec<u8> {
    let mut space = [0; 256];
    let length = match version {
        1 => proxy::write_line(shown.names, &mut space),
        _ => proxy::write(shown.names, &[], &mut space),
    };
    length.map_or_else(Vec::new, |length| space[..length].to_vec())
}

mod doors;

#[cfg(test)]
mod conversations;

#[cfg(test)]
mod tests {
    use super::*;
    use fourtuple_registry::{Batch, Conditions, Mode, Route, Service};

    fn service(name: &str, target: &str) -> Service {
        let target = Target::checked("target", target).unwrap();
        let (delivery, options) = (fourtuple_registry::Delivery::Handoff, Options::default());
        Service { name: name.to_owned(), target, delivery, wide_port: None, options }
    }

    fn guide(folder: &crate::Folder) -> BrokerGuide {
        let store = Store::open(folder.path(), true, Some(1 << 24)).unwrap();
        let mut batch = Batch::default();
        batch.push(&service("shop.example.com", "unix:/run/shop"));
        batch.push(&service("other", "unix:@other"));
        batch.commit(&store, Mode::Set).unwrap();
        let conditions = Conditions::checked([("protocol", "ssh")]).unwrap();
        let (delivery, options) =
            (fourtuple_registry::Delivery::Relay, Options { proxy: Some(1), ..Options::default() });
        let to = "tcp:127.0.0.1:22".to_owned();
        let ssh = Route { conditions, to, delivery, options };
        let conditions = Conditions::checked([("protocol", "pattern:two")]).unwrap();
        let (to, options) = ("unix:/run/two".to_owned(), Options::default());
        store.add_routes(&[ssh, Route { conditions, to, delivery, options }], true).unwrap();
        let fallback = Some(Fallback::Service(Box::new(Name::parse(b"other").unwrap())));
        let protocols = [Protocol::Tls, Protocol::Http, Protocol::Ssh];
        let patterns = [("pattern:one", &b"\x00one"[..]), ("pattern:two", b"\x00two")]
            .map(|(name, bytes)| (name.to_owned(), Pattern::new(2, bytes).unwrap()));
        let looking = [
            Looking::new(protocols, [], fallback),
            Looking::new(protocols, [], None),
            Looking::new([], patterns, None),
        ];
        BrokerGuide::new(store, looking.into())
    }

    fn asked(guide: &mut BrokerGuide, listener: u32, bytes: &[u8], last: bool) -> (Guidance, Chosen) {
        let names = Some(("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap()));
        let (mut memory, mut chosen) = (Reading::default(), Chosen::default());
        let shown = Shown { listener: ListenerId(listener), names, bytes, last };
        (guide.guide(&shown, &mut memory, &mut chosen), chosen)
    }

    #[test]
    fn names_protocols_and_defaults_lead_to_services() {
        let folder = crate::Folder::new();
        let mut guide = guide(&folder);
        let (guidance, chosen) = asked(&mut guide, 0, b"GET / HTTP/1.1\r\nHost: shop.example.com:80\r\n\r\n", false);
        assert_eq!(
            (guidance, chosen.service.as_str(), chosen.delivery),
            (Guidance::Found, "shop.example.com", Delivery::HandOff)
        );
        assert_eq!(chosen.address, Address::Unix(b"/run/shop".to_vec()));
        let (guidance, chosen) = asked(&mut guide, 0, b"SSH-2.0-x\r\n", false);
        assert_eq!(
            (guidance, chosen.preface.as_slice()),
            (Guidance::Found, &b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"[..])
        );
        assert_eq!(chosen.address, Address::Tcp("127.0.0.1:22".parse().unwrap()));
        for bytes in [&b""[..], b"\x01\x02\x03\x04\x05\x06\x07\x08"] {
            let (guidance, chosen) = asked(&mut guide, 0, bytes, true);
            assert_eq!((guidance, chosen.address), (Guidance::Found, Address::Unix(b"\0other".to_vec())), "{bytes:?}");
            assert_eq!(asked(&mut guide, 1, bytes, true).0, Guidance::NoRoute);
        }
    }

    #[test]
    fn each_listener_looks_for_its_own() {
        let folder = crate::Folder::new();
        let mut guide = guide(&folder);
        let (guidance, chosen) = asked(&mut guide, 2, b"..\x00two", false);
        assert_eq!((guidance, chosen.address), (Guidance::Found, Address::Unix(b"/run/two".to_vec())));
        for (listener, bytes, expected) in [
            (2, &b"..\x00one"[..], Guidance::NoRoute),
            (2, b"..\x00", Guidance::More),
            (2, b"SSH-2.0-x\r\n", Guidance::NoRoute),
            (1, b"..\x00two", Guidance::NoRoute),
        ] {
            assert_eq!(asked(&mut guide, listener, bytes, true).0, expected, "{listener}: {}", bytes.escape_ascii());
        }
    }

    #[test]
    fn what_is_begun_or_broken_gets_no_default() {
        let folder = crate::Folder::new();
        let mut guide = guide(&folder);
        assert_eq!(asked(&mut guide, 0, b"\x16\x03\x01\x02\x00\x01", true).0, Guidance::More);
        assert_eq!(asked(&mut guide, 0, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", true).0, Guidance::Garbage);
    }
}
