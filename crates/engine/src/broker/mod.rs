//! The broker core: accept, look at the first bytes, ask the guide which service is meant, and bring the connection there,
//! by handing the socket over or by carrying the bytes.
//!
//! Decides how long to wait for what, how many may be open, when a delivery is tried again, and for which one reason each
//! connection ends. Knows no protocol and no route (`guide`), no file (`ledger`), no socket. States are in LIFECYCLE.md.

mod accepting;
mod asleep;
mod consulting;
mod counts;
mod delivering;
mod ending;
mod errand;
pub mod guide;
mod invariants;
mod land;
pub mod ledger;
mod looking;
pub mod note;
pub mod record;
mod relay;
mod script;
mod session;
mod ship;
pub mod survey;
mod waits;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use self::asleep::Sleepers;
use self::consulting::Consulted;
use self::counts::{Counts, Prefix};
use self::guide::Guide;
use self::land::Landing;
use self::ledger::{Ledger, Reason};
use self::relay::Queues;
use self::session::{Line, Session, State};
use self::ship::{Ferrying, Move};
use self::survey::{Names, Past};
use self::waits::Waits;
use crate::contract::{Command, ConnId, Core, Event, Given, Instant, Order, Outbox, PEEK_BYTES, Step};
use crate::pages::Pages;
use crate::report::{Counter, Phase, Report};

/// One listener.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListenAt {
    /// Where.
    pub local: SocketAddr,
    /// After so long without knowing the service, what there is has to do.
    pub sniff_timeout: Duration,
}

/// What a broker is to do.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    /// Where to listen; a listener's place in this list is its `ListenerId`.
    pub listen: Vec<ListenAt>,
    /// As for listen(2).
    pub backlog: u32,
    /// SO_REUSEPORT on every listener (more than one worker on the same endpoints).
    pub reuse_port: bool,
    /// Bytes to look at, at most; a guide that then still wants more gets none.
    pub sniff_bytes: u32,
    /// A service that is absent or full is tried again for so long.
    pub delivery_timeout: Duration,
    /// Connections at once; 0 is no bound of its own.
    pub most_connections: u64,
    /// Connections at once from one IPv4 address or IPv6 /64; 0 is no bound.
    pub most_per_source: u32,
    /// Connections at once of one service, relayed or on their way; 0 is no bound.
    pub most_per_service: u32,
    /// Connections that may wait at once for services that sleep; 0 is no bound.
    pub most_parked: u32,
    /// The same, for one service.
    pub most_parked_per_service: u32,
    /// Bytes that all of them may have the kernel hold: what they have sent, and the window that each has; 0 is no bound.
    pub parked_bytes: u64,
    /// A client has to wait so long before its service is woken.
    pub settle: Duration,
    /// How long a client that is told something at its end has to hear it.
    pub linger: Duration,
    /// Which of the workers of its process the core is; names of connections say it.
    pub worker: u32,
    /// Who is given the sockets of services whose delivery is `Inetd`: a path as in `Address::Unix`.
    pub inetd_path: Vec<u8>,
}

impl Default for BrokerConfig {
    fn default() -> BrokerConfig {
        BrokerConfig {
            listen: Vec::new(),
            backlog: 4096,
            reuse_port: false,
            sniff_bytes: PEEK_BYTES as u32,
            delivery_timeout: Duration::from_secs(5),
            most_connections: 0,
            most_per_source: 0,
            most_per_service: 0,
            most_parked: 0,
            most_parked_per_service: 0,
            parked_bytes: 0,
            settle: Duration::ZERO,
            linger: Duration::from_secs(1),
            worker: 0,
            inetd_path: Vec::new(),
        }
    }
}

/// Closes under way when all ends, and sessions looked at per turn.
const BURST: u32 = 256;
/// The pauses between tries of a delivery double from the first to the last of these.
const BACKOFF_MS: (u32, u32) = (1, 128);
/// The longest of them for a service whose queue is full: what it has read meanwhile it cannot have said.
const FULL_BACKOFF_MS: u32 = 4;
/// Bytes looked at per connection, each time counted: a hello that comes in single bytes is looked at again for each of
/// them, and this is what that may cost. The longest of all, looked at in segments of 1,448 bytes, is 54 MB.
const LOOKED_AT_MOST: u32 = 144 * PEEK_BYTES as u32;

/// Accepts, looks, asks, delivers.
#[derive(Debug)]
pub struct BrokerCore<G: Guide, L> {
    config: BrokerConfig,
    guide: G,
    ledger: L,
    report: Report,
    /// Of the step that is being taken.
    now: Instant,
    names: Names,
    past: Past,
    lines: Pages<Line>,
    sessions: Vec<Session>,
    free_sessions: Vec<u32>,
    waits: Waits<G::Memory>,
    queues: Queues,
    sources: Counts<Prefix>,
    services: Counts<Arc<str>>,
    /// Sockets to listen with, by listener; where there is none, one is made.
    given: Vec<Option<Given>>,
    sleepers: Sleepers,
    consulted: Consulted,
    /// What the guide has for a client; empty between two steps.
    said: Vec<u8>,
    next_listener: u32,
    /// Answers outstanding to `Listen`, `Adopt` and `Unlisten`.
    listens_under_way: u32,
    listening: Vec<bool>,
    /// The endpoint of each listener, where it is that of all its connections.
    locals: Vec<Option<SocketAddr>>,
    /// Accept no more.
    draining: bool,
    /// Accept again as soon as nothing is under way.
    resuming: bool,
    /// When closing: the next session to look at.
    closing: Option<u32>,
    closes_under_way: u32,
    /// Where connections are moved to.
    ferrying: Option<Ferrying>,
    /// Sessions that are on their way there.
    moves: HashMap<u32, Move>,
    /// Where connections come from.
    landings: Vec<Landing>,
    /// Open connections that came from there and are no session's, or not yet.
    strangers: u32,
}

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    /// A core that has done nothing yet.
    pub fn new(config: BrokerConfig, guide: G, ledger: L) -> BrokerCore<G, L> {
        let (listening, locals) = (vec![false; config.listen.len()], vec![None; config.listen.len()]);
        BrokerCore {
            now: Instant(0),
            names: Names::of(config.worker),
            past: Past::default(),
            config,
            guide,
            ledger,
            report: Report::new(),
            lines: Pages::new(),
            sessions: Vec::new(),
            free_sessions: Vec::new(),
            waits: Waits::new(),
            queues: Queues::default(),
            sources: Counts::new(),
            services: Counts::new(),
            given: Vec::new(),
            consulted: Consulted::default(),
            sleepers: Sleepers::new(),
            said: Vec::new(),
            next_listener: 0,
            listens_under_way: 0,
            listening,
            locals,
            draining: false,
            resuming: false,
            closing: None,
            closes_under_way: 0,
            ferrying: None,
            moves: HashMap::new(),
            landings: Vec::new(),
            strangers: 0,
        }
    }

    /// Listen with these sockets, by listener, instead of making them.
    #[must_use]
    pub fn listening_with(mut self, given: Vec<Option<Given>>) -> BrokerCore<G, L> {
        self.given = given;
        self
    }

    /// What was written about the connections that are gone.
    pub fn ledger(&self) -> &L {
        &self.ledger
    }

    /// The session of a connection, and which side of it.
    fn whose(&self, conn: ConnId) -> Option<(u32, usize)> {
        let line = self.lines.read(conn.index);
        let id = line.session.checked_sub(1)?;
        (line.generation == conn.generation).then_some((id, usize::from(line.side)))
    }

    /// As `whose`, if the session is in that state.
    fn find(&self, conn: ConnId, state: State) -> Option<(u32, usize)> {
        self.whose(conn).filter(|(id, _)| self.sessions[*id as usize].state == state)
    }

    fn settle(&mut self) {
        let listens_pending = self.listens_under_way > 0 || (self.next_listener as usize) < self.config.listen.len();
        let is_empty = self.sessions.len() == self.free_sessions.len()
            && self.strangers == 0
            && self.ferrying.is_none()
            && self.landings.is_empty();
        self.report.phase = match (self.draining, is_empty) {
            (true, true) if self.listens_under_way == 0 => Phase::Done,
            (true, _) => Phase::Closing,
            (false, _) if listens_pending => Phase::Ramping,
            // Nothing accepts and nothing ever will: there is nothing to wait for.
            (false, true) if self.report.count(Counter::Listening) == 0 => Phase::Done,
            (false, _) => Phase::Holding,
        };
    }
}

impl<G: Guide, L: Ledger> Core for BrokerCore<G, L> {
    fn start(&mut self, _now: Instant, outbox: &mut Outbox) {
        self.listen_some(outbox);
        self.settle();
    }

    fn handle(&mut self, event: Event, now: Instant, outbox: &mut Outbox) {
        self.now = now;
        match event {
            Event::Listening { listener, local } => self.listening(listener, local, outbox),
            Event::ListenFailed { step, error, .. } => self.listen_failed(step, error, outbox),
            Event::Unlistened { .. } => self.unlistened(outbox),
            Event::Accepted { listener, conn, peer } => self.accepted(listener, conn, peer, now, outbox),
            Event::AcceptFailed { error, .. } => {
                self.report.add(Counter::AcceptFailed, 1);
                self.report.failed(Step::Accept, error);
            }
            Event::Named { conn, names } => self.named(conn, names, now, outbox),
            Event::Peeked { conn, buf } => self.peeked(conn, buf, now, outbox),
            Event::Connected { ticket, conn } => self.connected(ticket, conn, now, outbox),
            Event::ConnectFailed { ticket, step, error } => self.connect_failed(ticket, step, error, now, outbox),
            Event::HandedOff { conn } => self.handed_off(conn, outbox),
            Event::HandOffFailed { conn, error } => self.hand_off_failed(conn, error, now, outbox),
            Event::Roomy { conn } => self.roomy(conn),
            Event::HungUp { conn } => self.hung_up(conn),
            Event::Received { conn, buf } => self.received(conn, buf, now, outbox),
            Event::Sent { conn } => self.sent(conn, now, outbox),
            Event::Finished { conn, gone } => self.finished(conn, gone, now, outbox),
            Event::Failed { conn, step, error } => self.failed(conn, step, error, now, outbox),
            Event::Closed { conn } => self.closed(conn, now, outbox),
            Event::Halted { conn, rest } => self.halted(conn, rest, now, outbox),
            Event::Shipped { ferry } if self.is_ferrying(ferry) => self.shipped(now, outbox),
            Event::Shipped { ferry } => self.answer_shipped(ferry, now, outbox),
            Event::Landed { ferry, conns, message } => self.landed(ferry, conns, message, now, outbox),
            Event::FerryLost { ferry, .. } if self.is_ferrying(ferry) => self.ferry_lost(now, outbox),
            Event::FerryLost { ferry, .. } => self.landing_lost(ferry, outbox),
            Event::Ordered(Order::Ferry(ferry)) => self.ferry(ferry, outbox),
            Event::Ordered(Order::Land(ferry)) => self.land(ferry, outbox),
            Event::Ordered(Order::Drain) => self.stop_listening(outbox),
            Event::Ordered(Order::Resume) => {
                self.stop_ferrying();
                self.resume(outbox);
            }
            Event::Ordered(Order::Close) => {
                self.stop_listening(outbox);
                self.stop_landing(outbox);
                self.closing.get_or_insert(0);
                self.close_some(outbox);
            }
            Event::Ordered(Order::Opinion { ticket, opinion }) => self.opined(ticket, &opinion, outbox),
            Event::Ordered(Order::Answer(answer)) => self.answered(&answer, now, outbox),
            Event::Ordered(Order::Hold(service)) => self.hold(&service, now, outbox),
            Event::Ordered(Order::Usage { ticket, services }) => self.usage(ticket, &services, now, outbox),
            Event::Ordered(Order::Limits { most_connections, most_per_source, most_per_service }) => {
                let config = &mut self.config;
                let begins = config.most_per_source == 0 && most_per_source != 0;
                (config.most_connections, config.most_per_source) = (most_connections, most_per_source);
                config.most_per_service = most_per_service;
                if begins {
                    self.count_sources();
                }
            }
            Event::Ordered(order @ (Order::Survey { .. } | Order::Busiest { .. } | Order::End { .. })) => {
                self.looked_for(&order, now, outbox);
            }
            // The other orders are not for a broker, and datagrams are not either.
            Event::Ordered(_) | Event::Disturbed { .. } => {}
        }
        self.ferry_some(now, outbox);
        self.settle();
    }

    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        self.now = now;
        for _ in 0..BURST {
            let Some(place) = self.waits.take_due(now) else { break };
            let wait = self.waits.at(place);
            let (id, reaching) = (wait.session, wait.reaching);
            let (parted, is_parked) = (wait.parting, wait.parked_bytes != 0);
            match self.sessions[id as usize].state {
                State::Sniffing => self.last_look(id, now, outbox),
                State::Leaving => self.leave(id, outbox),
                State::Delivering if parted.is_some() => self.part(id, parted.unwrap_or_default(), now, outbox),
                State::Delivering if is_parked => self.waited(id, now, outbox),
                State::Delivering if reaching => outbox.push(Command::CancelConnect { ticket: place }),
                State::Delivering if self.waits.is_behind(self.sessions[id as usize].service - 1, place) => {
                    self.end(id, Reason::ServiceFull, true, outbox);
                }
                State::Delivering => self.try_again(id, now, outbox),
                State::Asking => self.turn_is_due(id, now, outbox),
                State::Relaying | State::Moving | State::Ending | State::Free => {}
            }
        }
        self.ask_again(now, outbox);
        self.close_some(outbox);
        self.land_some(now, outbox);
        self.ferry_some(now, outbox);
        self.settle();
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let more_to_close = self.has_more_to_close() && self.closes_under_way < BURST;
        if more_to_close {
            return Some(Instant(0));
        }
        let due = [self.waits.next_due(), self.sleepers.next_due(), self.ferry_due(), self.landing_due()];
        due.into_iter().flatten().min()
    }

    fn is_done(&self) -> bool {
        self.report.phase == Phase::Done
    }

    fn report(&self) -> &Report {
        &self.report
    }

    fn check_invariants(&self) -> Result<(), String> {
        self.check()
    }
}
