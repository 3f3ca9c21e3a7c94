//! The sniffer: a PROXY header if there may be one, then the probes in their order, then what they want answered.
//!
//! Decides whose verdict is the whole's. Knows no protocol: those are one file each.

use crate::postgres::Asks;
use crate::{Found, Intent, PROBES, Pattern, Probe, Progress, Protocol, Refusal, Scratch, Shown};
use crate::{
    amqp, http1, http2, ldap, minecraft, mqtt, pattern, postgres, proxy, rdp, redis, rtsp, socks4, socks5, ssh,
};
use crate::{tcpmux, tls, xmpp};

/// What a listener looks for. Many connections share one.
#[derive(Clone, Copy, Debug)]
pub struct Sniffer<'p> {
    enabled: u32,
    prelude: Prelude,
    encrypts_postgres: bool,
    answers_socks: bool,
    patterns: &'p [Pattern],
}

/// Whether a PROXY header stands in front.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prelude {
    /// The peer is not trusted to say who it is: a header is bytes like any other.
    #[default]
    None,
    /// The peer may say so. Only for sources that no client can have.
    Allowed,
    /// The peer has to.
    Required,
}

/// Where a connection stands, between two looks at it.
#[derive(Clone, Copy, Debug, Default)]
pub struct State {
    /// Where the PROXY header ends.
    header: u16,
    /// Bytes behind it that have been answered.
    answered: u16,
    stage: Stage,
    /// The probe that is being asked.
    row: u8,
    progress: Progress,
}

const _: () = assert!(size_of::<State>() <= 24, "a connection that is being sniffed costs this much and no more");

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Begin,
    Probes,
    /// A PostgreSQL client was told that encryption with GSSAPI is not to be had.
    AfterGss,
    /// A PostgreSQL client was told that TLS is not to be had.
    AfterDecline,
    /// As both.
    AfterBoth,
    /// A PostgreSQL client was told to go on with TLS.
    Hello,
    /// A SOCKS 5 client was told to go on without proving anything.
    Request,
}

/// What a look at a connection says. All but `More` and `Answer` are final: more bytes do not change them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "a box would be an allocation per connection")]
pub enum Verdict<'a> {
    /// Recognised, and what it shows.
    Match(Shown<'a>),
    /// None of the probes knows it.
    No,
    /// Look again when there are more: a match takes at least so many in all. A deadline is the caller's affair.
    More(usize),
    /// Send these bytes, once, and look again. What they answer stays in front of what follows.
    Answer(&'static [u8]),
    /// It is this protocol (None: the PROXY header is at fault), and must not be passed on.
    Refused(Option<Protocol>, Refusal),
}

/// The end of one step of the sniffer.
enum Step {
    Whole(Protocol, usize),
    Answer(&'static [u8]),
    No,
    More(usize),
    Refused(Option<Protocol>, Refusal),
}

impl<'p> Sniffer<'p> {
    /// A sniffer with these probes.
    pub fn new(protocols: impl IntoIterator<Item = Protocol>) -> Self {
        let enabled = protocols.into_iter().fold(0, |set, it| set | 1 << it as u32);
        Self { enabled, prelude: Prelude::None, encrypts_postgres: true, answers_socks: true, patterns: &[] }
    }

    /// Every probe that there is.
    pub fn all() -> Self {
        Self::new(PROBES.iter().map(|it| it.protocol))
    }

    /// Whether a PROXY header stands in front; not at first.
    #[must_use]
    pub fn with_prelude(self, prelude: Prelude) -> Self {
        Self { prelude, ..self }
    }

    /// Whether a PostgreSQL client that asks for TLS is told to begin, which shows its server name, or that there is
    /// none, which shows user and database. At first it is told to begin.
    #[must_use]
    pub fn with_postgres_tls(self, encrypts_postgres: bool) -> Self {
        Self { encrypts_postgres, ..self }
    }

    /// Whether a SOCKS client is answered and its request is the broker's, or left to the service as it is: then a greeting
    /// of version 5 shows no more than that. At first it is answered.
    #[must_use]
    pub fn with_socks_answered(self, answers_socks: bool) -> Self {
        Self { answers_socks, ..self }
    }

    /// What `Protocol::Pattern` looks for.
    #[must_use]
    pub fn with_patterns(self, patterns: &'p [Pattern]) -> Self {
        Self { patterns, ..self }
    }

    /// How many bytes it may ask for at most.
    pub fn bound(&self) -> usize {
        let header = if self.prelude == Prelude::None { 0 } else { proxy::HEADER_BYTES };
        header + self.probes().map(|probe| probe.bound).max().unwrap_or(0)
    }

    /// Look at everything that a connection has sent so far, which is never less than at the last look.
    pub fn sniff<'a>(&self, state: &mut State, bytes: &'a [u8], scratch: &'a mut Scratch) -> Verdict<'a> {
        match self.step(state, bytes) {
            Step::Whole(protocol, end) => match read(state, protocol, bytes, end, scratch) {
                Ok(shown) if !self.answers_socks && matches!(protocol, Protocol::Socks4 | Protocol::Socks5) => {
                    Verdict::Match(Shown { reply: b"", ..shown })
                }
                Ok(shown) => Verdict::Match(shown),
                Err(why) => Verdict::Refused(Some(protocol), why),
            },
            Step::No => Verdict::No,
            Step::Answer(answer) => Verdict::Answer(answer),
            Step::Refused(protocol, why) => Verdict::Refused(protocol, why),
            Step::More(needed) => Verdict::More(needed),
        }
    }

    fn probes(&self) -> impl Iterator<Item = &'static Probe> + use<> {
        let enabled = self.enabled;
        PROBES.iter().filter(move |probe| enabled & 1 << probe.protocol as u32 != 0)
    }

    fn step(&self, state: &mut State, bytes: &[u8]) -> Step {
        if state.stage == Stage::Begin {
            match self.prelude(state, bytes) {
                Ok(end) => (state.header, state.stage) = (end as u16, Stage::Probes),
                Err(step) => return step,
            }
            state.progress = Progress::default();
        }
        let start = state.start();
        let rest = &bytes[start..];
        let (protocol, found) = match state.stage {
            Stage::Hello => (Protocol::Postgres, hello(&mut state.progress, rest)),
            Stage::Request => (Protocol::Socks5, socks5::find_request(rest)),
            Stage::Begin | Stage::Probes => self.first(state, rest),
            _ => (Protocol::Postgres, without_no(postgres::find(&mut state.progress, rest))),
        };
        match found {
            Found::Whole(end) if protocol == Protocol::Postgres && state.stage != Stage::Hello => {
                self.answer(state, rest, end)
            }
            Found::Whole(end)
                if protocol == Protocol::Socks5 && self.answers_socks && state.stage != Stage::Request =>
            {
                if !socks5::offers_nothing(&rest[..end]) {
                    return Step::Refused(Some(protocol), Refusal::Unsupported);
                }
                (state.stage, state.progress) = (Stage::Request, Progress::default());
                state.answered += end as u16;
                Step::Answer(socks5::SELECTED)
            }
            Found::Whole(end) => Step::Whole(protocol, start + end),
            Found::No => Step::No,
            Found::More(count) => Step::More(start + count),
            // A broken head asks for nothing, so not for WebSocket either.
            Found::Refused(why) if protocol == Protocol::WebSocket => Step::Refused(Some(Protocol::Http), why),
            Found::Refused(why) => Step::Refused(Some(protocol), why),
        }
    }

    /// Where the PROXY header ends.
    fn prelude(&self, state: &mut State, bytes: &[u8]) -> Result<usize, Step> {
        if self.prelude == Prelude::None {
            return Ok(0);
        }
        match proxy::find(&mut state.progress, bytes) {
            Found::Whole(end) => proxy::read(bytes, end).map(|_| end).map_err(|why| Step::Refused(None, why)),
            Found::No if self.prelude == Prelude::Allowed => Ok(0),
            Found::No => Err(Step::Refused(None, Refusal::Unproxied)),
            Found::More(count) => Err(Step::More(count)),
            Found::Refused(why) => Err(Step::Refused(None, why)),
        }
    }

    /// The first probe in order that does not say No.
    fn first(&self, state: &mut State, bytes: &[u8]) -> (Protocol, Found) {
        let State { row, progress, .. } = state;
        while let Some(probe) = PROBES.get(usize::from(*row)) {
            let found = match self.enabled & 1 << probe.protocol as u32 {
                0 => Found::No,
                _ => self.find(probe.protocol, progress, bytes),
            };
            if found != Found::No {
                return (probe.protocol, found);
            }
            (*row, *progress) = (*row + 1, Progress::default());
        }
        (Protocol::Pattern, Found::No)
    }

    fn find(&self, protocol: Protocol, progress: &mut Progress, bytes: &[u8]) -> Found {
        match protocol {
            Protocol::Tls => tls::find(progress, bytes),
            Protocol::Http2 => http2::find(progress, bytes),
            Protocol::Connect => http1::find_connect(progress, bytes),
            Protocol::WebSocket => http1::find_websocket(progress, bytes),
            Protocol::Http => http1::find(progress, bytes),
            Protocol::Rtsp => rtsp::find(progress, bytes),
            Protocol::Xmpp => xmpp::find(progress, bytes),
            Protocol::Amqp | Protocol::Amqp1 => amqp::find(protocol, bytes),
            Protocol::Ssh => ssh::find(progress, bytes),
            Protocol::Postgres => postgres::find(progress, bytes),
            Protocol::Mqtt => mqtt::find(progress, bytes),
            Protocol::Rdp => rdp::find(progress, bytes),
            Protocol::Ldap => ldap::find(progress, bytes),
            Protocol::Minecraft => minecraft::find(progress, bytes),
            Protocol::Redis => redis::find(progress, bytes),
            Protocol::Socks5 => socks5::find(progress, bytes),
            Protocol::Socks4 => socks4::find(progress, bytes),
            Protocol::Tcpmux => tcpmux::find(progress, bytes),
            Protocol::Pattern => pattern::find(progress, bytes, self.patterns),
        }
    }

    /// A whole PostgreSQL message: what it shows, or what to answer. Each request is answered once, as the server does.
    fn answer(&self, state: &mut State, bytes: &[u8], end: usize) -> Step {
        use Stage::{AfterBoth, AfterDecline, AfterGss, Hello};
        let Some(asks) = postgres::asks(bytes) else { return Step::Whole(Protocol::Postgres, state.start() + end) };
        let refused = |why| Step::Refused(Some(Protocol::Postgres), why);
        if bytes.len() > end {
            return refused(Refusal::Early); // sent in the clear before encryption began: CVE-2021-23214
        }
        let (stage, answer): (_, &[u8]) = match (asks, state.stage) {
            (Asks::Gss, AfterGss | AfterBoth) | (Asks::Tls, AfterDecline | AfterBoth) => {
                return refused(Refusal::Repeated);
            }
            (Asks::Tls, _) if self.encrypts_postgres => (Hello, b"S"),
            (Asks::Tls, AfterGss) | (Asks::Gss, AfterDecline) => (AfterBoth, b"N"),
            (Asks::Tls, _) => (AfterDecline, b"N"),
            (Asks::Gss, _) => (AfterGss, b"N"),
        };
        (state.stage, state.progress) = (stage, Progress::default());
        state.answered += end as u16;
        Step::Answer(answer)
    }
}

impl State {
    /// Whether it is known who says that it comes from where: a PROXY header has been read, or none is to come.
    pub fn knows_source(&self) -> bool {
        self.stage != Stage::Begin
    }

    /// The PROXY header in front of the bytes, once it is whole.
    pub fn proxied<'a>(&self, bytes: &'a [u8]) -> Option<proxy::Header<'a>> {
        if self.header == 0 { None } else { proxy::read(bytes, self.header()).ok() }
    }

    /// Where it ends; 0 if there is none, or not yet.
    pub fn header(&self) -> usize {
        usize::from(self.header)
    }

    /// Where the probes begin to look: what is in front, a PROXY header and requests that have been answered, the service
    /// must not see again.
    pub fn start(&self) -> usize {
        self.header() + usize::from(self.answered)
    }

    /// What a service has to be told, alone, and has to answer before it gets what follows: that was promised in its name.
    pub fn promised(&self) -> Option<(&'static [u8], u8)> {
        (self.stage == Stage::Hello).then_some((&postgres::TLS_REQUEST, b'S'))
    }
}

/// The hello of a client that was told to send one.
fn hello(progress: &mut Progress, bytes: &[u8]) -> Found {
    without_no(tls::find(progress, bytes))
}

/// After an answer, nothing else than what it allows is right.
fn without_no(found: Found) -> Found {
    if found == Found::No { Found::Refused(Refusal::Malformed) } else { found }
}

/// What the whole shows that ends at `end`.
fn read<'a>(
    state: &State,
    protocol: Protocol,
    bytes: &'a [u8],
    end: usize,
    scratch: &'a mut Scratch,
) -> Result<Shown<'a>, Refusal> {
    let start = state.start();
    let (rest, count) = (&bytes[start..], end - start);
    let shown = match protocol {
        // libpq names no server that it knows by address, and asked for PostgreSQL before: that is no scan.
        Protocol::Postgres if state.stage == Stage::Hello => {
            tls::read(rest, count, scratch).map(|shown| Shown { intent: Intent::Use, ..shown })
        }
        Protocol::Tls => tls::read(rest, count, scratch),
        Protocol::Http2 => http2::read(rest, count, scratch),
        Protocol::Connect | Protocol::WebSocket | Protocol::Http => http1::read(protocol, rest, count, scratch),
        Protocol::Rtsp => rtsp::read(rest, count, scratch),
        Protocol::Xmpp => xmpp::read(&state.progress, rest, count, scratch),
        Protocol::Amqp | Protocol::Amqp1 => Ok(amqp::read(protocol, rest, count)),
        Protocol::Ssh => ssh::read(rest, count),
        Protocol::Postgres => postgres::read(rest, count),
        Protocol::Mqtt => mqtt::read(rest, count),
        Protocol::Rdp => rdp::read(rest, count, scratch),
        Protocol::Ldap => ldap::read(rest, count),
        Protocol::Minecraft => minecraft::read(rest, count, scratch),
        Protocol::Redis => redis::read(rest, count),
        Protocol::Socks5 if state.stage == Stage::Request => socks5::read_request(rest, count, scratch),
        Protocol::Socks5 => Ok(Shown::new(protocol, count)),
        Protocol::Socks4 => socks4::read(rest, count, scratch),
        Protocol::Tcpmux => tcpmux::read(rest, count, scratch),
        Protocol::Pattern => Ok(pattern::read(&state.progress, count)),
    }?;
    Ok(Shown { protocol, end, proxied: state.proxied(bytes), ..shown })
}
