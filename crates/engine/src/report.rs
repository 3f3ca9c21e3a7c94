//! What a core counts: the names, units and meanings of every number that leaves it.
//!
//! Decides the table of counters. Knows no core. `python/fourtuple/metrics.py` mirrors this table; a test holds them equal.

use std::net::SocketAddr;

use crate::contract::{Errno, Step};
use crate::histogram::Histogram;

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal, $unit:literal;)+) => {
        /// The counters. Totals since the core started, except the gauges, whose names end in `_now`.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Counter { $($(#[doc = $doc])+ $variant,)+ }

        /// One row per counter: name, unit, meaning.
        pub const COUNTERS: &[(&str, &str, &str)] = &[$(($name, $unit, concat!($($doc),+)),)+];

        const COUNTER_COUNT: usize = COUNTERS.len();
    };
}

counters! {
    /// connect attempts handed to the carrier
    Attempted = "connects_attempted", "connections";
    /// attempts that became connections
    Connected = "connects_succeeded", "connections";
    /// attempts that failed, for whatever reason
    ConnectFailed = "connects_failed", "connections";
    /// attempts that failed because that tuple was in use; another was taken
    TupleBusy = "tuples_busy", "connections";
    /// connections accepted
    Accepted = "accepts_succeeded", "connections";
    /// accept() errors (no connection behind them)
    AcceptFailed = "accepts_failed", "errors";
    /// connections open now
    Open = "open_now", "connections";
    /// most connections open at one moment
    OpenPeak = "open_peak", "connections";
    /// connections that ended because we closed them
    ClosedByUs = "closed_by_us", "connections";
    /// connections whose peer sent FIN first
    ClosedByPeer = "closed_by_peer", "connections";
    /// connections that broke
    Broken = "broken", "connections";
    /// listeners accepting now
    Listening = "listening_now", "listeners";
    /// listeners that could not be made
    ListenFailed = "listens_failed", "listeners";
    /// openings of a dialogue played to their end
    OpeningsRight = "openings_right", "openings";
    /// openings being played
    Openings = "openings_now", "openings";
    /// openings that the peer refused, broke off, answered with other bytes, or did not answer by the deadline
    OpeningsFailed = "openings_failed", "openings";
    /// tokens sent, or rounds of a dialogue begun
    PingsSent = "pings_sent", "tokens";
    /// tokens that came back right
    PingsRight = "pings_right", "tokens";
    /// rounds whose answer was whole and said no (an HTTP status that is an error)
    PingsRefused = "pings_refused", "tokens";
    /// tokens that came back with other bytes
    PingsWrong = "pings_wrong", "tokens";
    /// tokens that did not come back by the deadline
    PingsMissing = "pings_missing", "tokens";
    /// datagrams that answered nothing: late, doubled, unasked or with other bytes
    Strays = "datagrams_stray", "datagrams";
    /// payload bytes received
    BytesIn = "bytes_in", "bytes";
    /// payload bytes handed to the kernel
    BytesOut = "bytes_out", "bytes";
    /// times that no buffer was free to send with, and the work waited
    BufferWaits = "buffer_waits", "waits";
    /// times that a connection's reading was paused for back-pressure
    Pauses = "pauses", "pauses";
    /// connections whose first bytes a broker waits for or looks at
    Sniffing = "sniffing_now", "connections";
    /// connections that a broker is bringing to their service
    Delivering = "delivering_now", "connections";
    /// connections between whose two ends a broker carries bytes
    Relaying = "relaying_now", "connections";
    /// connections on their way to another process
    Moving = "moving_now", "connections";
    /// connections taken over from another process
    Landed = "landed", "connections";
    /// messages of another process that were not understood or not possible; what came with them stays there
    LandingsRefused = "landings_refused", "messages";
    /// moves that the other process refused or did not live to take; the connections live on here
    MovesReturned = "moves_returned", "connections";
    /// sockets to other processes over which connections move
    Ferries = "ferries_now", "ferries";
    /// ferries that ended before either side had said that it was done
    FerriesLost = "ferries_lost", "ferries";
    /// deliveries tried again because the service was absent or its queue full
    DeliveryRetries = "delivery_retries", "deliveries";
    /// handoffs that became relays, since the service takes connections
    FellBack = "handoffs_relayed", "deliveries";
    /// ended: the service was given the socket itself
    HandedOff = "ended_handed_off", "connections";
    /// ended: relayed, and both sides said that they were done
    Relayed = "ended_relayed", "connections";
    /// ended: relayed, and the client broke off
    ClientBroke = "ended_client_broke", "connections";
    /// ended: relayed, and the service broke off
    ServiceBroke = "ended_service_broke", "connections";
    /// ended: the client left before it was delivered
    ClientLeft = "ended_client_left", "connections";
    /// ended: what the client showed names no service
    NoRoute = "ended_no_route", "connections";
    /// ended: the client had not shown enough by the deadline, and its listener has no default
    SniffDeadline = "ended_sniff_deadline", "connections";
    /// ended: the client showed more than may be looked at without naming a service
    SniffTooLong = "ended_sniff_too_long", "connections";
    /// ended: what the client showed breaks its own protocol
    Garbage = "ended_garbage", "connections";
    /// ended: a trusted proxy sent no PROXY header, a broken one, or none by the deadline
    Unproxied = "ended_unproxied", "connections";
    /// ended: the service was absent until the deadline
    ServiceAbsent = "ended_service_absent", "connections";
    /// ended: the service's queue was full, or its connect did not come about, until the deadline
    ServiceFull = "ended_service_full", "connections";
    /// ended: the service could not be reached for another reason
    ServiceUnreachable = "ended_service_unreachable", "connections";
    /// ended: the service did not do what the client was told in its name (PostgreSQL: TLS), or not in time
    ServiceDeclined = "ended_service_declined", "connections";
    /// ended: more connections than may be open at once
    OverTotal = "ended_over_total", "connections";
    /// ended: more connections than one source prefix may have
    OverSource = "ended_over_source", "connections";
    /// ended: more connections than the service may have
    OverService = "ended_over_service", "connections";
    /// ended: another process has taken it over
    Moved = "ended_moved", "connections";
    /// ended: the broker was told to close
    Stopped = "ended_stopped", "connections";
    /// ended: the service slept and could not be started
    StartFailed = "ended_start_failed", "connections";
    /// ended: the service slept, and is not started for this client
    WakeRefused = "ended_wake_refused", "connections";
    /// ended: the service slept, and more connections waited, or more of their bytes, than may
    OverParked = "ended_over_parked", "connections";
    /// ended: the service slept, and the client was answered without it
    AnsweredAsleep = "ended_answered_asleep", "connections";
    /// connections that wait until their service has been started
    Parked = "parked_now", "connections";
    /// times that a broker asked for a service to be started
    WakesAsked = "wakes_asked", "questions";
    /// times that a question had no room and was asked later
    QuestionWaits = "question_waits", "questions";
}

/// Where a core stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Making connections (or listeners).
    Ramping,
    /// Nothing more to make: the target, the tuple space or a limit is reached.
    Holding,
    /// Sending tokens on every connection.
    Pinging,
    /// Closing all.
    Closing,
    /// Nothing left.
    Done,
}

/// Failures of one kind: at which step, which error, how many.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The step.
    pub step: Step,
    /// The error.
    pub error: Errno,
    /// How many.
    pub count: u64,
}

/// Everything that a core reports.
#[derive(Clone, Debug)]
pub struct Report {
    counters: [u64; COUNTER_COUNT],
    /// Where the core stands.
    pub phase: Phase,
    /// Failures by step and error; bounded by (steps x errnos).
    pub failures: Vec<Failure>,
    /// Why openings failed: names of reasons (`speech::REASONS` and those of other speeches), and how many of each.
    pub opening_reasons: Vec<(&'static str, u64)>,
    /// The same of rounds that were wrong.
    pub round_reasons: Vec<(&'static str, u64)>,
    /// The failure that made the core stop making connections, if one did.
    pub stopped_by: Option<(Step, Errno)>,
    /// Time from `Connect` to `Connected`, nanoseconds.
    pub connect_ns: Histogram,
    /// Time from `Connected` to the end of the opening, nanoseconds; of those that were right.
    pub opening_ns: Histogram,
    /// Time from sending a token to having it back, nanoseconds.
    pub echo_ns: Histogram,
    /// Connect time by fill: median nanoseconds and count per hundredth of this core's tuple space (empty unless asked for).
    pub fill_curve: Vec<(u64, u64)>,
    /// Connections up per listener, for engines with many (empty unless asked for): how many listeners have served one.
    pub listeners_served: u64,
    /// Where the first listener accepts, with the port that the kernel gave if 0 was asked for.
    pub listening_at: Option<SocketAddr>,
}

impl Report {
    /// All zero, ramping.
    pub fn new() -> Report {
        Report {
            counters: [0; COUNTER_COUNT],
            phase: Phase::Ramping,
            failures: Vec::new(),
            opening_reasons: Vec::new(),
            round_reasons: Vec::new(),
            stopped_by: None,
            connect_ns: Histogram::new(),
            opening_ns: Histogram::new(),
            echo_ns: Histogram::new(),
            fill_curve: Vec::new(),
            listeners_served: 0,
            listening_at: None,
        }
    }

    /// The value of a counter.
    pub fn count(&self, counter: Counter) -> u64 {
        self.counters[counter as usize]
    }

    /// All values, in the order of [`COUNTERS`].
    pub fn counts(&self) -> &[u64] {
        &self.counters
    }

    /// Add to a counter.
    pub fn add(&mut self, counter: Counter, by: u64) {
        self.counters[counter as usize] += by;
    }

    /// Take back what was counted too early. A reply of the broker's own was not counted, so there may be less than that.
    pub fn take_back(&mut self, counter: Counter, by: u64) {
        let count = &mut self.counters[counter as usize];
        *count = count.saturating_sub(by);
    }

    /// A connection more is open.
    pub fn opened(&mut self) {
        self.counters[Counter::Open as usize] += 1;
        let open = self.counters[Counter::Open as usize];
        let peak = &mut self.counters[Counter::OpenPeak as usize];
        *peak = (*peak).max(open);
    }

    /// A gauge goes down by one. Below zero is a bug of ours, and overflow checks say so.
    pub fn less(&mut self, counter: Counter) {
        self.counters[counter as usize] -= 1;
    }

    /// Count an opening that failed, by reason.
    pub fn opening_failed(&mut self, reason: &'static str) {
        self.add(Counter::OpeningsFailed, 1);
        one_more(&mut self.opening_reasons, reason);
    }

    /// Count a round that was wrong, by reason.
    pub fn round_wrong(&mut self, reason: &'static str) {
        self.add(Counter::PingsWrong, 1);
        one_more(&mut self.round_reasons, reason);
    }

    /// Count a failure by step and error.
    pub fn failed(&mut self, step: Step, error: Errno) {
        match self.failures.iter_mut().find(|row| row.step == step && row.error == error) {
            Some(row) => row.count += 1,
            None => self.failures.push(Failure { step, error, count: 1 }),
        }
    }
}

fn one_more(reasons: &mut Vec<(&'static str, u64)>, reason: &'static str) {
    match reasons.iter_mut().find(|row| row.0 == reason) {
        Some(row) => row.1 += 1,
        None => reasons.push((reason, 1)),
    }
}

impl Default for Report {
    fn default() -> Self {
        Report::new()
    }
}
