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
    ServiceAbsent, ServiceFull, ServiceUnreachable, ServiceDeclined, OverTotal, OverSource, OverService, Stopped,
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

/// Keeps what is written about connections.
pub trait Ledger: Send {
    /// A connection is gone.
    fn ended(&mut self, entry: &Ended<'_>);
}

/// Keeps nothing.
#[derive(Clone, Copy, Debug)]
pub struct Unwritten;

impl Ledger for Unwritten {
    fn ended(&mut self, _entry: &Ended<'_>) {}
}
