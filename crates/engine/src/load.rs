//! The load core: connect, hold, play rounds, close. Knows no socket; leaves tuples to the walk and words to the speech.
//!
//! Decides when to try, when to speak and when to stop. Connections that end are not replaced (a peer
//! that closes at once would keep us busy for ever) until `Order::Target` asks again. States and transitions are in
//! LIFECYCLE.md. Per event the work is bounded; walks over all connections go on turn by turn.

mod datagrams;
mod ramp;
mod rounds;
mod thinking;

use std::collections::VecDeque;
use std::time::Duration;

use crate::contract::{Command, ConnId, Core, Errno, Event, Instant, Order, Outbox, SourceChoice, Step, Transport};
use crate::histogram::Histogram;
use crate::pages::Pages;
use crate::report::{Counter, Phase, Report};
use crate::script::{Place, Script};
use crate::space::Space;
use crate::speech::{Failing, Returned, Speech, Tokens};
use crate::walk::Walk;
use crate::window::Window;
use thinking::Thinking;

/// What a load core is to do.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// What the connections carry.
    pub transport: Transport,
    /// All tuples of the engine; this core uses every `stride`-th from `first`, so that workers never meet.
    pub space: Space,
    /// First index of this worker's share.
    pub first: u64,
    /// Number of workers that share the space.
    pub stride: u64,
    /// Connections that this core is to hold.
    pub connections: u64,
    /// How the local endpoint comes about. For the kernel's choices the space is walked over sources and destinations
    /// only, each pair until the kernel says EADDRNOTAVAIL; every worker walks all pairs, from a start of its own, because
    /// there the kernel keeps the workers apart.
    pub choice: SourceChoice,
    /// Attempts under way at once, at most.
    pub window: u32,
    /// New connections per second; 0 is as fast as possible.
    pub rate_per_s: u32,
    /// After this an attempt is given up (ETIMEDOUT), and an opening has failed.
    pub connect_timeout: Duration,
    /// After this a token that has not come back, or a round that is not over, is missing.
    pub ping_timeout: Duration,
    /// Tokens or rounds under way at once, at most.
    pub ping_window: u32,
    /// Bytes of a token, 16 to the size of a buffer: (serial, seed) and then a pattern of both.
    pub token_bytes: u32,
    /// Makes this run's tokens differ from any other's.
    pub seed: u64,
    /// Ping every connection at this interval while holding; zero is never.
    pub ping_every: Duration,
    /// From the first `Order::Ping` on, each connection begins its next round as soon as its last is over.
    pub closed_loop: bool,
    /// Stop making connections after this many failures in a row that say that a limit is reached (EMFILE, ENFILE, ENOMEM,
    /// ENOBUFS, EADDRNOTAVAIL, EADDRINUSE, timeouts ...). A busy tuple of a chosen port does not count as long as others are left.
    pub give_up_after: u32,
    /// Close with RST instead of FIN.
    pub abort_on_close: bool,
    /// Keep `Report::fill_curve`.
    pub keep_fill_curve: bool,
}

/// When all ends: closes under way at once, and cancels per turn, whatever the number of connections.
const BURST: u32 = 256;
/// Records looked at per turn of a walk over all connections.
const SCAN: u32 = 4096;
/// How long to wait when no buffer is free to send with.
const BUFFER_PAUSE: Duration = Duration::from_millis(1);
/// After a resource ran out: the first pause, and the longest.
const RESOURCE_PAUSE: Duration = Duration::from_millis(1);
const RESOURCE_PAUSE_MOST: Duration = Duration::from_millis(20);
/// What a core that fell behind its rate may catch up at once.
const RATE_SLACK_NS: u64 = 10_000_000;

/// Where a connection stands; the table of transitions is in LIFECYCLE.md.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(u8)]
enum State {
    /// No connection.
    #[default]
    Free,
    /// Open, owed nothing.
    Idle,
    /// A part of the speech is being played.
    Awaiting,
    /// In a part, at an act that waits: it has no deadline and no place in a window.
    Thinking,
    /// The part is over, but `Sent` has not come yet.
    Answered,
    /// The round was not over in time; what still comes of it is no surprise.
    Late,
    /// Other bytes than the speech wants came; nothing more is asked of it.
    Spoiled,
    /// `Close` is given.
    Closing,
}

/// One connection. A record of zeros is no connection.
#[derive(Clone, Copy, Default, Debug)]
struct Hold<M> {
    /// Which connection of this core it is; with `first` and `stride` the serial of its token.
    serial: u32,
    /// Ticket in the window of openings or of rounds, while `Awaiting` or `Answered`.
    ping: u32,
    generation: u16,
    state: State,
    /// A `Send` is outstanding.
    sending: bool,
    /// The part played last is the opening.
    opening: bool,
    /// It waits for a buffer to speak with.
    thirsty: bool,
    memory: M,
}

const _: () = assert!(size_of::<Hold<Returned>>() <= 16, "a connection costs 16 bytes here");
const _: () = assert!(size_of::<Hold<Place>>() <= 32, "a connection with a dialogue costs 32 bytes here");

/// A part being played: whose, and what is known of it beyond the connection's own record.
#[derive(Clone, Copy, Debug)]
struct Part {
    conn: ConnId,
    /// A datagram came that is not the answer: without one by the deadline, the part is wrong and not missing.
    doubted: bool,
}

/// A walk over all connections that begins a round on each.
#[derive(Clone, Copy, Debug)]
struct Round {
    next: u32,
    end: u32,
}

/// Connects, holds, speaks and closes.
#[derive(Debug)]
pub struct LoadCore<S: Speech = Tokens> {
    config: LoadConfig,
    speech: S,
    report: Report,
    holds: Pages<Hold<S::Memory>>,
    walk: Walk,
    attempts: Window<()>,
    /// Attempts allowed under way now; at most `config.window`, less after a resource ran out.
    width: u32,
    /// Connections to make in all, those included that ended since.
    goal: u64,
    /// False when a limit made us stop.
    making: bool,
    /// The last failure that says that a tuple or a pair is used up.
    used_up: Option<(Step, Errno)>,
    failures_in_row: u32,
    /// When a resource ran out last: attempts begun before say nothing new.
    ran_out_at: Option<Instant>,
    paused_until: Instant,
    /// When the rate allows the next attempt.
    rate_next: Instant,
    /// Openings being played; with the attempts at most `width`.
    openings: Window<Part>,
    /// Rounds being played.
    pings: Window<Part>,
    /// Those that wait for a moment or for a place in a window.
    thinking: Thinking,
    /// Each connection goes from round to round.
    looping: bool,
    /// Those whose turn it is to speak while no buffer is free, and when to try again.
    thirsty: VecDeque<ConnId>,
    thirsty_until: Instant,
    round: Option<Round>,
    rounds_waiting: u32,
    /// When no buffer was free: when to try again.
    starved_until: Option<Instant>,
    next_round_at: Option<Instant>,
    /// When closing: the next connection to look at.
    closing: Option<u32>,
    /// `Close` commands not answered yet.
    closes_under_way: u32,
    /// Connections that are gone again.
    ended: u64,
    /// Openings and rounds that were being played when their connection ended.
    openings_ended: u64,
    pings_ended: u64,
    /// Wrong bytes on connections that awaited none: counted as wrong, never sent.
    pings_unasked: u64,
    /// For the fill curve: times of the hundredth in progress.
    fill: Option<Histogram>,
}

impl Tokens {
    /// The tokens that the configuration asks for.
    pub fn of(config: &LoadConfig) -> Tokens {
        Tokens { seed: config.seed, token_bytes: config.token_bytes.min(u16::MAX.into()) as u16 }
    }
}

impl LoadCore<Tokens> {
    /// A core that has done nothing yet, and will ping with tokens.
    pub fn new(config: LoadConfig) -> LoadCore<Tokens> {
        let speech = Tokens::of(&config);
        LoadCore::speaking(config, speech)
    }
}

impl LoadCore<Script> {
    /// A core that has done nothing yet, and will play this script on every connection.
    pub fn playing(config: LoadConfig, script: Script) -> LoadCore<Script> {
        LoadCore::speaking(config, script)
    }
}

impl<S: Speech> LoadCore<S> {
    /// A core that has done nothing yet, and will hold this speech on every connection.
    pub fn speaking(config: LoadConfig, speech: S) -> LoadCore<S> {
        let attempts = Window::new(config.window);
        LoadCore {
            speech,
            report: Report::new(),
            holds: Pages::new(),
            walk: Walk::new(config.space.clone(), config.choice, config.first, config.stride),
            width: attempts.most(),
            attempts,
            goal: config.connections,
            making: true,
            used_up: None,
            failures_in_row: 0,
            ran_out_at: None,
            paused_until: Instant(0),
            rate_next: Instant(0),
            openings: Window::new(config.window),
            pings: Window::new(config.ping_window),
            thinking: Thinking::default(),
            looping: false,
            thirsty: VecDeque::new(),
            thirsty_until: Instant(0),
            round: None,
            rounds_waiting: 0,
            starved_until: None,
            next_round_at: None,
            closing: None,
            closes_under_way: 0,
            ended: 0,
            openings_ended: 0,
            pings_ended: 0,
            pings_unasked: 0,
            fill: config.keep_fill_curve.then(Histogram::new),
            config,
        }
    }

    fn failed(&mut self, conn: ConnId, step: Step, error: Errno, outbox: &mut Outbox) {
        let Some(mut hold) = self.open_hold(conn) else { return };
        self.report.failed(step, error);
        self.break_opening(&mut hold, Failing::Broke);
        self.close(conn, &mut hold, Counter::Broken, true, outbox);
    }

    fn finished(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let Some(mut hold) = self.open_hold(conn) else { return };
        self.break_opening(&mut hold, Failing::Finished);
        self.close(conn, &mut hold, Counter::ClosedByPeer, self.config.abort_on_close, outbox);
    }

    fn close(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>, why: Counter, abort: bool, outbox: &mut Outbox) {
        self.break_off(hold);
        if why != Counter::Broken {
            self.say_last(conn, hold, abort, outbox);
        }
        self.speech.end(std::mem::take(&mut hold.memory));
        (hold.state, hold.thirsty) = (State::Closing, false);
        self.holds.write(conn.index, *hold);
        self.closes_under_way += 1;
        self.report.add(why, 1);
        outbox.push(Command::Close { conn, abort });
    }

    fn closed(&mut self, conn: ConnId) {
        let hold = self.holds.read(conn.index);
        if hold.state == State::Free || hold.generation != conn.generation {
            return;
        }
        self.break_off(&hold);
        if hold.state == State::Closing {
            self.closes_under_way -= 1;
        } else {
            self.speech.end(hold.memory);
        }
        self.holds.write(conn.index, Hold::default());
        self.report.less(Counter::Open);
        self.ended += 1;
    }

    fn close_some(&mut self, outbox: &mut Outbox) {
        let Some(mut index) = self.closing else { return };
        let mut scan = SCAN;
        index = self.holds.skip_untouched(index);
        while self.closes_under_way < BURST && scan > 0 && index < self.holds.end() {
            let mut hold = self.holds.read(index);
            if !matches!(hold.state, State::Free | State::Closing) {
                let conn = ConnId { index, generation: hold.generation };
                self.close(conn, &mut hold, Counter::ClosedByUs, self.config.abort_on_close, outbox);
            }
            (index, scan) = (index + 1, scan - 1);
        }
        self.closing = Some(index);
    }

    fn ordered(&mut self, order: Order, now: Instant, outbox: &mut Outbox) {
        match order {
            Order::Ping => {
                self.rounds_waiting = self.rounds_waiting.saturating_add(1);
                self.looping = self.config.closed_loop;
            }
            Order::Rate(rate_per_s) => {
                self.config.rate_per_s = rate_per_s;
                self.rate_next = Instant(0);
            }
            Order::Target(connections) => {
                let made = self.report.count(Counter::Connected);
                let open = self.report.count(Counter::Open);
                self.goal = connections.max(open).saturating_add(made - open);
                if self.walk.is_at_end() && self.ended > 0 {
                    self.walk.rewind();
                }
                if !self.walk.is_at_end() {
                    (self.making, self.failures_in_row, self.report.stopped_by) = (true, 0, None);
                }
            }
            Order::Close if self.closing.is_none() => {
                self.closing = Some(0);
                (self.round, self.rounds_waiting) = (None, 0);
                self.expire_attempts(now, outbox);
                self.close_some(outbox);
            }
            // A broker's, or already under way.
            _ => {}
        }
    }

    /// Do what can be done now, and say where we stand.
    fn go_on(&mut self, now: Instant, outbox: &mut Outbox) {
        if self.closing.is_none() {
            self.think_on(now, outbox);
            self.connect_some(now, outbox);
            self.quench(now, outbox);
            self.ping_some(now, outbox);
        }
        let readying = self.attempts.under_way() + self.openings.under_way() > 0 || self.thinking.openings > 0;
        let ramping = self.wants_more() || readying;
        if !ramping && self.report.phase == Phase::Ramping {
            self.end_fill();
            if self.report.count(Counter::Connected) < self.goal && self.walk.is_at_end() {
                self.report.stopped_by = self.report.stopped_by.or(self.used_up);
            }
        }
        let phase = match self.closing {
            Some(index) if index < self.holds.end() || self.attempts.under_way() > 0 => Phase::Closing,
            Some(_) if self.report.count(Counter::Open) > 0 => Phase::Closing,
            Some(_) => Phase::Done,
            None if ramping => Phase::Ramping,
            None if self.round.is_some() => Phase::Pinging,
            None => Phase::Holding,
        };
        if phase == Phase::Holding && self.next_round_at.is_none() && !self.config.ping_every.is_zero() {
            self.next_round_at = Some(now.after(self.config.ping_every));
        }
        self.report.phase = phase;
    }

    /// The record of a connection that is open and not being closed.
    fn open_hold(&self, conn: ConnId) -> Option<Hold<S::Memory>> {
        let hold = self.holds.read(conn.index);
        let open = !matches!(hold.state, State::Free | State::Closing) && hold.generation == conn.generation;
        open.then_some(hold)
    }
}

impl<S: Speech> Core for LoadCore<S> {
    fn start(&mut self, now: Instant, outbox: &mut Outbox) {
        self.speech.fit(outbox.buffers.buffer_bytes());
        self.go_on(now, outbox);
    }

    fn handle(&mut self, event: Event, now: Instant, outbox: &mut Outbox) {
        match event {
            Event::Connected { ticket, conn } => self.connected(ticket, conn, now, outbox),
            Event::ConnectFailed { ticket, step, error } => self.connect_failed(ticket, step, error, now),
            Event::Received { conn, buf } => self.received(conn, buf, now, outbox),
            Event::Sent { conn } => self.sent(conn, now, outbox),
            Event::Finished { conn, .. } => self.finished(conn, outbox),
            Event::Failed { conn, step, error } => self.failed(conn, step, error, outbox),
            Event::Disturbed { conn, step, error } => self.disturbed(conn, step, error, outbox),
            Event::Closed { conn } => self.closed(conn),
            Event::Ordered(order) => self.ordered(order, now, outbox),
            // A load core listens nowhere, and does not ask for the rest.
            Event::Listening { .. }
            | Event::ListenFailed { .. }
            | Event::Unlistened { .. }
            | Event::Halted { .. }
            | Event::Shipped { .. }
            | Event::Landed { .. }
            | Event::FerryLost { .. }
            | Event::Accepted { .. }
            | Event::AcceptFailed { .. }
            | Event::Named { .. }
            | Event::Peeked { .. }
            | Event::HandedOff { .. }
            | Event::Roomy { .. }
            | Event::HungUp { .. }
            | Event::HandOffFailed { .. } => {}
        }
        self.go_on(now, outbox);
    }

    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        self.expire_attempts(now, outbox);
        self.close_some(outbox);
        self.expire_openings(now, outbox);
        self.expire_pings(now);
        if self.next_round_at.is_some_and(|at| at <= now) && self.report.phase == Phase::Holding {
            (self.next_round_at, self.rounds_waiting) = (None, self.rounds_waiting + 1);
        }
        self.go_on(now, outbox);
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let at_once = Some(Instant(0));
        if let Some(index) = self.closing {
            let can_close = index < self.holds.end() && self.closes_under_way < BURST;
            return (can_close || self.attempts.oldest().is_some()).then_some(Instant(0));
        }
        let has_room = self.wants_more() && self.has_room();
        let blocked_by_time = has_room.then(|| self.paused_until.max(self.rate_next)).filter(|&at| at > Instant(0));
        let round = self.round.filter(|round| round.next < round.end && !self.pings.is_full());
        [
            self.attempts.oldest().map(|(_, began)| began.after(self.config.connect_timeout)),
            self.openings.oldest().map(|(_, began)| began.after(self.config.connect_timeout)),
            self.pings.oldest().map(|(_, began)| began.after(self.config.ping_timeout)),
            blocked_by_time.filter(|_| !self.walk.waits(self.attempts.under_way())),
            Some(self.thirsty_until).filter(|_| !self.thirsty.is_empty()),
            self.thinking.next_due(),
            self.starved_until.or(at_once).filter(|_| self.can_begin()),
            round.and(self.starved_until.or(at_once)),
            at_once.filter(|_| self.round.is_none() && self.rounds_waiting > 0),
            self.next_round_at.filter(|_| self.report.phase == Phase::Holding),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn is_done(&self) -> bool {
        self.report.phase == Phase::Done
    }

    fn report(&self) -> &Report {
        &self.report
    }

    fn check_invariants(&self) -> Result<(), String> {
        self.attempts.check()?;
        self.openings.check()?;
        self.pings.check()?;
        let count = |counter| self.report.count(counter);
        let in_state = |state| self.holds.iter().filter(|hold| hold.state == state).count() as u64;
        let playing = |state, opening| {
            self.holds.iter().filter(|hold| (hold.state, hold.opening) == (state, opening)).count() as u64
        };
        let open = self.holds.iter().filter(|hold| hold.state != State::Free).count() as u64;
        let (attempts, pings) = (u64::from(self.attempts.under_way()), u64::from(self.pings.under_way()));
        let openings = u64::from(self.openings.under_way());
        let settled = [Counter::PingsRight, Counter::PingsRefused, Counter::PingsWrong, Counter::PingsMissing];
        let settled = settled.into_iter().map(count).sum::<u64>();
        let opened = count(Counter::OpeningsRight) + count(Counter::OpeningsFailed);
        let (out, opening) = (playing(State::Awaiting, false), playing(State::Awaiting, true));
        let sum = |reasons: &[(&str, u64)]| reasons.iter().map(|row| row.1).sum::<u64>();
        let (failed, wrong) = (sum(&self.report.opening_reasons), sum(&self.report.round_reasons));
        let ends = count(Counter::ClosedByUs) + count(Counter::ClosedByPeer) + count(Counter::Broken);
        let connected = count(Counter::Connected);
        let rules = [
            (
                "attempted = connected + failed + under way",
                count(Counter::Attempted) == connected + count(Counter::ConnectFailed) + attempts,
            ),
            ("open_now is the number of open records", count(Counter::Open) == open),
            ("connected = open + ended", connected == open + self.ended),
            ("closes under way are counted", in_state(State::Closing) == u64::from(self.closes_under_way)),
            ("each end has one cause", ends == self.ended + in_state(State::Closing)),
            (
                "pings sent + unasked = right + refused + wrong + missing + out + thinking + ended",
                count(Counter::PingsSent) + self.pings_unasked
                    == settled + out + self.thinking.rounds + self.pings_ended,
            ),
            ("those who think in a round are counted", self.thinking.rounds == playing(State::Thinking, false)),
            ("those who think in an opening are counted", self.thinking.openings == playing(State::Thinking, true)),
            ("every round out has its slot", pings == out + playing(State::Answered, false)),
            ("every opening has its slot", openings == opening + playing(State::Answered, true)),
            ("openings_now is their number", count(Counter::Openings) == openings + self.thinking.openings),
            ("each opening that failed has a reason", failed == count(Counter::OpeningsFailed)),
            ("each round that was wrong has a reason", wrong == count(Counter::PingsWrong)),
            ("an opening ends once", opened + opening + self.thinking.openings + self.openings_ended <= connected),
            ("the window bounds openings", attempts + openings <= u64::from(self.attempts.most())),
            (
                "who waits for a buffer is in the queue",
                self.holds.iter().filter(|hold| hold.thirsty).count() <= self.thirsty.len(),
            ),
            ("nothing is out when done", !self.is_done() || attempts + pings + openings + open == 0),
        ];
        rules.iter().find(|(_, holds)| !holds).map_or(Ok(()), |(rule, _)| Err(format!("load: {rule}")))
    }
}
