//! What a core asks the outside, and what the outside says to it: the slow path beside events and commands.
//!
//! Decides the vocabulary, and that what a core asks of its own accord is bounded: a question that has no room stays with
//! the core, which asks again later. What answers the outside always has room, for the outside asked for it. Knows no
//! thread and no process: carriers' owners carry both.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::broker::guide::Delivery;
use crate::contract::ListenerId;

/// Questions of its own that a core may have waiting.
pub const MOST_QUESTIONS: usize = 1024;

/// What a core says to the outside.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Question {
    /// A connection speaks what nobody here knows.
    Sniff(Opening),
    /// A connection waits for a service that sleeps: start it, or say why not. Asked once for all who wait.
    Wake {
        /// The service's name, or the target of a route.
        service: String,
        /// How it is started: the name of a template.
        start: String,
        /// Where it will listen, as the registry writes it.
        target: String,
        /// What the connection showed: a server name, a host.
        name: String,
        /// In which protocol.
        protocol: String,
        /// How connections are brought there.
        delivery: Delivery,
        /// Whose connection it is.
        peer: Option<SocketAddr>,
    },
    /// The answer to `Order::Usage`.
    Usage {
        /// The order's.
        ticket: u64,
        /// A row for each service that was asked for, in that order.
        rows: Vec<Usage>,
    },
    /// The answer to `Order::Survey`.
    Surveyed {
        /// The order's.
        ticket: u64,
        /// Connections.
        rows: Vec<Seen>,
        /// From which place to go on; None is the end.
        next: Option<u32>,
    },
    /// The answer to `Order::Busiest`.
    Busiest {
        /// The order's.
        ticket: u64,
        /// Services.
        rows: Vec<Busy>,
        /// From which place to go on; None is the end.
        next: Option<u32>,
        /// What a service that was passed and is not among them may have.
        least: u64,
    },
    /// The answer to `Order::End`.
    Closed {
        /// The order's.
        ticket: u64,
        /// Whether the connection was there.
        found: bool,
        /// From which place to go on; None is the end.
        next: Option<u32>,
    },
    /// The answer to `Order::Hold`: new connections wait from now on.
    Held {
        /// The service.
        service: String,
        /// Connections of it that do not wait: on their way, or relayed.
        live: u32,
    },
}

/// How a connection begins that is asked about; answered by `Order::Opinion`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opening {
    /// Names the connection in the answer; this core's.
    pub ticket: u64,
    /// Through which listener it came.
    pub listener: ListenerId,
    /// Its first bytes.
    pub bytes: Vec<u8>,
    /// There will be no more, however many come.
    pub is_all: bool,
}

/// How much a service is used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Usage {
    /// Which.
    pub service: String,
    /// Connections that do not wait, as in `Held`. Sockets that were handed off are not seen any more.
    pub live: u32,
    /// Connections that wait for it to be up.
    pub parked: u32,
    /// How long there has been none of either; None if there are, or if nothing is known of it.
    pub unused: Option<Duration>,
}

/// A connection that a broker holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Its name, from accept to close.
    pub id: u64,
    /// The client.
    pub peer: Option<SocketAddr>,
    /// The service, if one was found.
    pub service: String,
    /// Where it stands.
    pub state: &'static str,
    /// Since it was accepted.
    pub age: Duration,
    /// Received from the client.
    pub bytes_up: u64,
    /// Received from the service.
    pub bytes_down: u64,
    /// Where it came in: the place of the listener in the broker's configuration.
    pub listener: u32,
}

/// Which connections are meant.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Filter {
    /// Of this service alone.
    pub service: Option<String>,
    /// From this prefix alone: an address, and bits of it.
    pub source: Option<(IpAddr, u8)>,
}

/// How busy services are compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum By {
    /// Connections now.
    Live,
    /// Connections that have ended.
    Total,
    /// Bytes that those carried, both ways.
    Bytes,
}

/// A busy service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Busy {
    /// Which.
    pub service: String,
    /// At most so much.
    pub amount: u64,
    /// Of which so much may be others'.
    pub over: u64,
}

/// What the outside says of a service that can be started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// It listens: who waits is delivered, and so is who comes.
    Up {
        /// Which.
        service: String,
    },
    /// It listens no more: who waits or comes asks for it anew.
    Slept {
        /// Which.
        service: String,
    },
    /// It could not be started: who waits is told so and ended. Who comes asks anew.
    Failed {
        /// Which.
        service: String,
    },
    /// It is not started for this peer: those of its prefix who wait are ended. If others wait, they ask anew.
    Refused {
        /// Which.
        service: String,
        /// For whom; None is whose address is not known.
        peer: Option<IpAddr>,
    },
}

/// What a core has said and nobody has taken yet.
#[derive(Debug, Default)]
pub struct Questions {
    waiting: VecDeque<Question>,
    /// Of its own accord.
    own: usize,
    /// Something came since somebody last looked.
    is_fresh: bool,
}

impl Questions {
    /// Ask, if there is room; says whether there was. If not, it is to be asked again later.
    pub fn ask(&mut self, question: Question) -> bool {
        let has_room = self.own < MOST_QUESTIONS;
        if has_room {
            self.own += 1;
            self.reply(question);
        }
        has_room
    }

    /// Answer what the outside has asked.
    pub fn reply(&mut self, question: Question) {
        self.is_fresh = true;
        self.waiting.push_back(question);
    }

    /// Whether something came since the last look.
    pub fn is_fresh(&self) -> bool {
        self.is_fresh
    }

    /// Whether there are any.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Look: `take` is given each, and gives back the one that it does not take, which is the last then.
    pub fn drain(&mut self, mut take: impl FnMut(Question) -> Option<Question>) {
        self.is_fresh = false;
        while let Some(question) = self.waiting.pop_front() {
            let own = usize::from(question.is_own());
            match take(question) {
                None => self.own -= own,
                Some(question) => return self.waiting.push_front(question),
            }
        }
    }
}

impl Question {
    /// Whether the core asks of its own accord, and so within bounds.
    pub fn is_own(&self) -> bool {
        match self {
            Question::Wake { .. } | Question::Sniff(_) => true,
            Question::Usage { .. }
            | Question::Held { .. }
            | Question::Surveyed { .. }
            | Question::Busiest { .. }
            | Question::Closed { .. } => false,
        }
    }
}

/// Names of services, shared by all workers that are asked about them.
pub type Names = Arc<[String]>;
