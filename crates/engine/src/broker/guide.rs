//! What a broker asks about a connection, and the answer: which service is meant, where it is, how to bring it there.
//!
//! Decides the vocabulary between the broker, which knows when to ask, and a guide, which knows protocols and routes. Knows
//! no protocol, no store of routes and no time.

use std::borrow::Cow;
use std::fmt::Debug;
use std::net::SocketAddr;
use std::time::Duration;

use crate::contract::ListenerId;

/// What a connection has shown so far.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    /// Through which listener it came.
    pub listener: ListenerId,
    /// The peer's endpoint and ours, unless the connection broke before anybody could ask.
    pub names: Option<(SocketAddr, SocketAddr)>,
    /// Its first bytes.
    pub bytes: &'a [u8],
    /// No more will be waited for: the answer `More` is as good as `NoRoute`.
    pub last: bool,
}

/// What to do with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Guidance {
    /// Show more.
    More,
    /// Send the client these bytes, once, and show what it says then. What has come stays in front of it.
    Answer(&'static [u8]),
    /// As `Answer`, with the bytes that stand in `Chosen::told`.
    Tell,
    /// Ask the outside about the bytes, and show them again when `Chosen::opinion` says what it knows.
    Consult,
    /// The client has said that it leaves: send it what stands there, and end.
    Goodbye,
    /// What a peer says whom `Guide::trusts` trusts. Said once; the guide is asked again at once.
    Speaks {
        /// The endpoints of whom it speaks for; None is itself.
        names: Option<(SocketAddr, SocketAddr)>,
        /// So many bytes said it. They are gone then, and nobody gets them.
        header: u32,
    },
    /// `Chosen` says where to.
    Found,
    /// It names nothing that there is.
    NoRoute,
    /// It breaks the protocol that it began.
    Garbage,
    /// It should say for whom it speaks, and says nothing that can be read, or not in time.
    Unproxied,
}

/// How a connection is brought to its service.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Delivery {
    /// The broker carries the bytes.
    #[default]
    Relay,
    /// The service is given the socket.
    HandOff,
    /// Whoever starts a process for each connection is given the socket.
    Inetd,
}

/// A short word, such as the name of a template or a protocol, without memory of its own.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Word {
    length: u8,
    bytes: [[u8; 8]; Word::MOST_BYTES / 8],
}

impl Word {
    /// No word is longer.
    pub const MOST_BYTES: usize = 40;

    /// These bytes, as many as have room; what cuts a character is left out.
    pub fn new(text: &str) -> Word {
        let mut end = text.len().min(Word::MOST_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let mut word = Word { length: end as u8, ..Word::default() };
        word.bytes.as_flattened_mut()[..end].copy_from_slice(&text.as_bytes()[..end]);
        word
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes.as_flattened()[..usize::from(self.length)]).unwrap_or_default()
    }

    /// Whether it is none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

impl Debug for Word {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_str().fmt(formatter)
    }
}

/// What to do with the client of a service that sleeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asleep {
    /// Wake the service; the client waits.
    Wake,
    /// Send what is to be said, wake nothing, and ask again when more has come.
    Say,
    /// Send nothing, wake nothing, and ask again when more has come.
    More,
    /// Send what is to be said and end; without anything to say, just end. Nothing is woken.
    Farewell,
}

/// Why a client is ended whose service sleeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// It could not be started.
    Failed,
    /// It is not started for this client.
    Refused,
    /// It was not up in time.
    Late,
    /// Too many wait already.
    Full,
}

/// Where a service listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// TCP.
    Tcp(SocketAddr),
    /// A unix stream socket, by its path; one that begins with a zero byte is abstract.
    Unix(Vec<u8>),
}

/// A guide's answer.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The service's name: limits and the ledger go by it.
    pub service: String,
    /// What named it, as far as it is text: a server name, a host, a path.
    pub matched: String,
    /// How.
    pub delivery: Delivery,
    /// Where. An empty path is a place that cannot be reached.
    pub address: Address,
    /// How long the service may be absent or full; None leaves it to the broker.
    pub patience: Option<Duration>,
    /// Most connections of the service at once; None leaves it to the broker.
    pub most_connections: Option<u32>,
    /// What a relayed connection begins with, before the client's own bytes.
    pub preface: Vec<u8>,
    /// What a relayed connection's service is asked then, and has to answer, because the client has been told so in its
    /// name. Nothing of it reaches the client.
    pub script: Vec<Turn>,
    /// What is said at other places before that, the last of these first.
    pub errands: Vec<Errand>,
    /// What the service says when bytes go both ways is for the guide to hear, too (`Guide::overhears`).
    pub overheard: bool,
    /// So many of the client's first bytes are not for the service.
    pub skip: u32,
    /// What the client is told once its service is reached, or right before its socket is handed off.
    pub reply: &'static [u8],
    /// With `Guidance::Tell` or `Goodbye`, what the client is told.
    pub told: Vec<u8>,
    /// What the outside says of the connection.
    pub opinion: Opinion,
    /// The template by which the service is started; none is a service that is there or not.
    pub start: Word,
    /// The protocol that was seen, in the words of a route.
    pub protocol: Word,
}

/// What the outside says of a connection that no guide knows.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub enum Opinion {
    /// It has not been asked.
    #[default]
    Unasked,
    /// It does not know it either.
    Nothing,
    /// More than so many bytes would be needed.
    More(u32),
    /// It knows it.
    Known(Box<Known>),
}

/// What the outside knows of a connection.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Known {
    /// What it speaks, in the words of a route.
    pub protocol: String,
    /// The service that it names.
    pub name: Option<String>,
    /// The user that it is.
    pub user: Option<String>,
    /// The database that it asks for.
    pub database: Option<String>,
    /// Who it says it is.
    pub client: Option<String>,
}

/// A connection that is told one thing and closed, after the other side has closed it or soon.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Errand {
    /// Where to.
    pub address: Address,
    /// What it is told.
    pub say: Vec<u8>,
}

/// One exchange with a service before it gets the client's bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Turn {
    /// What it is told, alone; nothing if it is to speak first. Not more than one buffer of the carrier.
    pub say: Cow<'static, [u8]>,
    /// What it has to say then, by a number of the guide's (`Guide::hears`); with None nothing is waited for.
    pub expect: Option<u8>,
}

/// What a service has said, held against what it was to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Heard {
    /// All of it, and nothing behind it.
    Yes,
    /// It has begun well.
    More,
    /// Something else.
    No,
}

impl Heard {
    /// As an answer of one byte.
    pub fn of_byte(expected: u8, said: &[u8]) -> Heard {
        match said {
            [] => Heard::More,
            &[byte] if byte == expected => Heard::Yes,
            _ => Heard::No,
        }
    }
}

impl Chosen {
    /// Whether the service may have to be started first. What is started for each connection never sleeps.
    pub fn can_sleep(&self) -> bool {
        !self.start.is_empty() && self.delivery != Delivery::Inetd
    }
}

impl Default for Chosen {
    fn default() -> Chosen {
        let (service, matched) = (String::new(), String::new());
        Chosen {
            service,
            matched,
            delivery: Delivery::Relay,
            address: Address::Unix(Vec::new()),
            patience: None,
            most_connections: None,
            preface: Vec::new(),
            script: Vec::new(),
            errands: Vec::new(),
            overheard: false,
            skip: 0,
            reply: b"",
            told: Vec::new(),
            opinion: Opinion::Unasked,
            start: Word::default(),
            protocol: Word::default(),
        }
    }
}

/// Tells services by what connections show.
pub trait Guide: Send {
    /// Where it stands with a connection between two looks; zeros before the first.
    type Memory: Copy + Default + Debug + Send;

    /// Whether this peer is believed when it says for whom it speaks, and is asked to. If so, it counts as that one, and
    /// `guide` says `Speaks` before it finds anything.
    fn trusts(&self, _listener: ListenerId, _peer: SocketAddr) -> bool {
        false
    }

    /// Whether clients of this listener wait to be spoken to. If so, the guide is asked once before they have said anything.
    fn speaks_first(&self, _listener: ListenerId) -> bool {
        false
    }

    /// Whether what a service has said in a turn is what was expected. Unless a guide knows better, that is one byte.
    fn hears(&self, expect: u8, said: &[u8]) -> Heard {
        Heard::of_byte(expect, said)
    }

    /// Bytes go both ways between this client and the service that was chosen, which is `overheard` as long as `overhears`
    /// says yes. `forgets` is called once when it has ended. Sessions are numbers that are used again.
    fn relays(&mut self, _session: u32, _chosen: &Chosen) {}

    /// The service has said this; whether more is wanted.
    fn overhears(&mut self, _session: u32, _said: &[u8]) -> bool {
        false
    }

    /// A session is over of which `relays` was told.
    fn forgets(&mut self, _session: u32) {}

    /// Look at it; on `Found`, `chosen` is what the guide made of an empty one.
    fn guide(&mut self, shown: &Shown<'_>, memory: &mut Self::Memory, chosen: &mut Chosen) -> Guidance;

    /// The service that was found sleeps: wake it for this client, or what is said to it instead. `say` is empty, and is to
    /// hold what `Say` and `Farewell` send.
    fn asleep(
        &mut self,
        _shown: &Shown<'_>,
        _memory: &mut Self::Memory,
        _chosen: &Chosen,
        _say: &mut Vec<u8>,
    ) -> Asleep {
        Asleep::Wake
    }

    /// What a client is told, in its protocol, whose service does not come; nothing is as well.
    fn farewell(&mut self, _memory: &Self::Memory, _chosen: &Chosen, _why: Why, _say: &mut Vec<u8>) {}
}
