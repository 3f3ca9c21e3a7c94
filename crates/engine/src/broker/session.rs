//! The record of a connection at the broker: both of its sides, what it is for, and how far it is.
//!
//! Decides the layout, which is what an idle relayed connection costs. Knows no transition.

use std::net::SocketAddr;

use super::ledger::Reason;
use crate::contract::{ConnId, Instant, ListenerId};
use crate::report::Counter;

/// The two sides of a session, as places in its arrays.
pub(super) const CLIENT: usize = 0;
pub(super) const SERVICE: usize = 1;

// What is true of a side.
/// The carrier has told of it and not told `Closed`.
pub(super) const OPEN: u8 = 1;
/// A `Send` to it is outstanding.
pub(super) const SENDING: u8 = 2;
/// It is not read from.
pub(super) const PAUSED: u8 = 4;
/// It has said that it will send no more.
pub(super) const FINISHED: u8 = 8;
/// It has been told that it will get no more.
pub(super) const SHUT: u8 = 16;
/// Its `Close` is given.
pub(super) const CLOSING: u8 = 32;
/// It has said that it will send no more, and receives no more, either.
pub(super) const GONE: u8 = 64;
/// Of the service: the guide hears what it says. Of the client: the guide has been told of it, and is to forget it.
pub(super) const OVERHEARD: u8 = 128;

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) enum State {
    #[default]
    Free,
    /// Its names or its first bytes are waited for.
    Sniffing,
    /// Its service is known and not reached.
    Delivering,
    /// Its service is reached, and asked for what the client was told in its name.
    Asking,
    /// It has its reason, and its client is being told.
    Leaving,
    /// Bytes go both ways.
    Relaying,
    /// It is halted, or about to be, and on its way to another process.
    Moving,
    /// It has its reason; what is open is being closed.
    Ending,
}

impl State {
    /// As it is told.
    pub(super) fn name(self) -> &'static str {
        match self {
            State::Free => "free",
            State::Sniffing => "sniffing",
            State::Delivering => "delivering",
            State::Asking => "asking",
            State::Leaving => "leaving",
            State::Relaying => "relaying",
            State::Moving => "moving",
            State::Ending => "ending",
        }
    }

    /// How many are in it.
    pub(super) fn gauge(self) -> Counter {
        match self {
            State::Sniffing => Counter::Sniffing,
            State::Delivering | State::Asking | State::Leaving => Counter::Delivering,
            State::Moving => Counter::Moving,
            State::Relaying | State::Ending | State::Free => Counter::Relaying,
        }
    }
}

/// One accepted connection, with the one to its service once that stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Session {
    pub(super) conns: [ConnId; 2],
    /// Bytes received from each side.
    pub(super) bytes: [u64; 2],
    /// Its name, too (`survey`).
    pub(super) accepted: Instant,
    pub(super) peer: Option<SocketAddr>,
    /// Before relaying its place among the waits; then its queues plus one, or 0.
    pub(super) extra: u32,
    /// Rows of the counts, plus one; 0 is none.
    pub(super) service: u32,
    pub(super) source: u32,
    pub(super) listener: ListenerId,
    pub(super) sides: [u8; 2],
    pub(super) state: State,
    /// Meaningful when leaving or ending.
    pub(super) reason: Reason,
    /// When ending or moving: `extra` is a place among the waits.
    pub(super) has_wait: bool,
    /// Another process has refused to take it over.
    pub(super) stays: bool,
}

impl Session {
    pub(super) fn begin(listener: ListenerId, conn: ConnId, wait: u32, now: Instant) -> Session {
        Session {
            conns: [conn, ConnId { index: 0, generation: 0 }],
            accepted: now,
            extra: wait,
            listener,
            sides: [OPEN, 0],
            state: State::Sniffing,
            ..Session::default()
        }
    }

    /// Whether it has a place among the waits.
    pub(super) fn waits(&self) -> bool {
        match self.state {
            State::Sniffing | State::Delivering | State::Asking | State::Leaving => true,
            State::Ending | State::Moving => self.has_wait,
            State::Relaying | State::Free => false,
        }
    }
}

impl Default for Session {
    fn default() -> Session {
        let nobody = ConnId { index: 0, generation: 0 };
        Session {
            conns: [nobody; 2],
            bytes: [0; 2],
            accepted: Instant(0),
            peer: None,
            extra: 0,
            service: 0,
            source: 0,
            listener: ListenerId(0),
            sides: [0; 2],
            state: State::Free,
            reason: Reason::default(),
            has_wait: false,
            stays: false,
        }
    }
}

/// Which session a connection belongs to, and as which side. A record of zeros is no connection.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Line {
    /// Session plus one.
    pub(super) session: u32,
    pub(super) generation: u16,
    pub(super) side: u8,
}

impl Line {
    pub(super) fn of(session: u32, side: usize, conn: ConnId) -> Line {
        Line { session: session + 1, generation: conn.generation, side: side as u8 }
    }
}

const _: () = assert!(
    size_of::<Session>() + 2 * size_of::<Line>() <= 112,
    "an idle relayed connection costs this much here, both sides, with its client's endpoint for the ledger"
);
