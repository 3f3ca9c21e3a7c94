//! How connections end at a broker: one reason each, and the entry that is written about it.
//!
//! Decides the table of reasons; their counters are in `report`. Knows no file and no format.

use std::net::SocketAddr;

use crate::contract::Instant;
use crate::report::{COUNTERS, Counter};

macro_rules! reasons {
    ($($variant:ident),+ $(,)?) => {
        /// Why a connection ended; the counter of the same name says what it means.
        #[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
        #[allow(missing_docs)]
        pub enum Reason { #[default] $($variant,)+ }

        /// Every reason.
        pub const REASONS: &[Reason] = &[$(Reason::$variant,)+];

        impl Reason {
            /// The counter of connections that ended so.
            pub fn counter(self) -> Counter {
                match self { $(Reason::$variant => Counter::$variant,)+ }
            }
        }
    };
}

reasons! {
    HandedOff, Relayed, ClientBroke, ServiceBroke, ClientLeft, NoRoute, SniffDeadline, SniffTooLong, Garbage, Unproxied,
    ServiceAbsent, ServiceFull, ServiceUnreachable, ServiceDeclined, OverTotal, OverSource, OverService, Moved, Stopped,
    StartFailed, WakeRefused, OverParked, AnsweredAsleep,
}

impl Reason {
    /// As it is written: the counter's name without its first word.
    pub fn name(self) -> &'static str {
        COUNTERS[self.counter() as usize].0.trim_start_matches("ended_")
    }
}

/// A connection that is gone.
#[derive(Clone, Copy, Debug)]
pub struct Ended<'a> {
    /// What it was called since it was accepted.
    pub id: u64,
    /// Who it was.
    pub peer: Option<SocketAddr>,
    /// The service it was for; empty if none was found.
    pub service: &'a str,
    /// Why it ended.
    pub reason: Reason,
    /// When it was accepted.
    pub accepted: Instant,
    /// When it was gone.
    pub ended: Instant,
    /// Bytes relayed to the service.
    pub bytes_up: u64,
    /// Bytes relayed to the client.
    pub bytes_down: u64,
}

/// How far a connection has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Passing {
    /// It is known whose it is, or who speaks for whom.
    Accepted,
    /// Its service is known.
    Found,
    /// It is handed over, or relayed from now on.
    Delivered,
}

impl Passing {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Passing::Accepted => "accepted",
            Passing::Found => "found",
            Passing::Delivered => "delivered",
        }
    }
}

/// A connection on its way.
#[derive(Clone, Copy, Debug)]
pub struct Passed<'a> {
    /// What it is called.
    pub id: u64,
    /// Who it is.
    pub peer: Option<SocketAddr>,
    /// The service it is for; empty if that is not known yet.
    pub service: &'a str,
    /// How far it has come.
    pub how_far: Passing,
}

/// Keeps what is written about connections.
pub trait Ledger: Send {
    /// A connection is gone.
    fn ended(&mut self, entry: &Ended<'_>);
    /// A connection has come so far.
    fn passed(&mut self, _entry: &Passed<'_>) {}
}

/// Keeps nothing.
#[derive(Clone, Copy, Debug)]
pub struct Unwritten;

impl Ledger for Unwritten {
    fn ended(&mut self, _entry: &Ended<'_>) {}
}
