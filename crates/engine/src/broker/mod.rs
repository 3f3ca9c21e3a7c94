//! The broker core: accept, look at the first bytes, ask the guide which service is meant, and bring the connection there,
//! by handing the socket over or by carrying the bytes.
//!
//! Decides how long to wait for what, how many may be open, when a delivery is tried again, and for which one reason each
//! connection ends. Knows no protocol and no route (`guide`), no file (`ledger`), no socket. States are in LIFECYCLE.md.

mod counts;
pub mod guide;
pub mod ledger;
pub mod note;
mod relay;
mod session;
mod waits;

use std::net::SocketAddr;
use std::time::Duration;

use self::counts::{Counts, Prefix};
use self::guide::{Address, Chosen, Delivery, Guidance, Guide, Shown};
use self::ledger::{Ended, Ledger, REASONS, Reason};
use self::relay::Queues;
use self::session::{CLIENT, CLOSING, FINISHED, GONE, Line, OPEN, SENDING, SERVICE, Session, State};
use self::waits::Waits;
use crate::buffers::Buf;
use crate::contract::{
    Command, ConnId, Core, Errno, Event, Instant, ListenerId, Order, Outbox, PEEK_BYTES, Step, Target,
};
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
    lines: Pages<Line>,
    sessions: Vec<Session>,
    free_sessions: Vec<u32>,
    waits: Waits<G::Memory>,
    queues: Queues,
    sources: Counts<Prefix>,
    services: Counts<String>,
    next_listener: u32,
    listens_under_way: u32,
    listening: Vec<bool>,
    /// The endpoint of each listener, where it is that of all its connections.
    locals: Vec<Option<SocketAddr>>,
    /// Accept no more.
    draining: bool,
    /// When closing: the next session to look at.
    closing: Option<u32>,
    closes_under_way: u32,
}

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    /// A core that has done nothing yet.
    pub fn new(config: BrokerConfig, guide: G, ledger: L) -> BrokerCore<G, L> {
        let (listening, locals) = (vec![false; config.listen.len()], vec![None; config.listen.len()]);
        BrokerCore {
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
            next_listener: 0,
            listens_under_way: 0,
            listening,
            locals,
            draining: false,
            closing: None,
            closes_under_way: 0,
        }
    }

    /// What was written about the connections that are gone.
    pub fn ledger(&self) -> &L {
        &self.ledger
    }

    // ---- listening and accepting ------------------------------------------------------------------------------------

    fn listen_some(&mut self, outbox: &mut Outbox) {
        while self.listens_under_way < BURST
            && !self.draining
            && let Some(&ListenAt { local, .. }) = self.config.listen.get(self.next_listener as usize)
        {
            outbox.push(Command::Listen {
                listener: ListenerId(self.next_listener),
                local,
                backlog: self.config.backlog,
                reuse_port: self.config.reuse_port,
                accept: true,
            });
            self.next_listener += 1;
            self.listens_under_way += 1;
        }
    }

    fn listening(&mut self, listener: ListenerId, local: SocketAddr, outbox: &mut Outbox) {
        self.listens_under_way -= 1;
        if listener.0 == 0 {
            self.report.listening_at = Some(local);
        }
        if self.draining {
            outbox.push(Command::Unlisten { listener });
            return;
        }
        self.listening[listener.0 as usize] = true;
        self.locals[listener.0 as usize] = (!local.ip().is_unspecified()).then_some(local);
        self.report.add(Counter::Listening, 1);
        self.listen_some(outbox);
    }

    fn listen_failed(&mut self, step: Step, error: Errno, outbox: &mut Outbox) {
        self.listens_under_way -= 1;
        self.report.add(Counter::ListenFailed, 1);
        self.report.failed(step, error);
        self.report.stopped_by = Some((step, error));
        self.listen_some(outbox);
    }

    fn stop_listening(&mut self, outbox: &mut Outbox) {
        self.draining = true;
        for (listener, listens) in (0..).zip(&mut self.listening) {
            if std::mem::take(listens) {
                outbox.push(Command::Unlisten { listener: ListenerId(listener) });
                self.report.less(Counter::Listening);
            }
        }
    }

    fn accepted(
        &mut self,
        listener: ListenerId,
        conn: ConnId,
        peer: Option<SocketAddr>,
        now: Instant,
        outbox: &mut Outbox,
    ) {
        self.report.add(Counter::Accepted, 1);
        let id = self.begin(listener, conn, now);
        let open = (self.sessions.len() - self.free_sessions.len()) as u64;
        if self.draining {
            return self.end(id, Reason::Stopped, true, outbox);
        }
        if self.config.most_connections != 0 && open > self.config.most_connections {
            return self.end(id, Reason::OverTotal, true, outbox);
        }
        let due = now.after(self.config.listen[listener.0 as usize].sniff_timeout);
        let place = self.sessions[id as usize].extra;
        self.waits.at(place).deadline = due;
        self.waits.set_due(place, Some(due));
        match peer.zip(self.locals[listener.0 as usize]) {
            None => outbox.push(Command::Name { conn }),
            names => self.named(conn, names, outbox),
        }
        if self.sessions[id as usize].state == State::Sniffing {
            outbox.push(Command::Peek { conn });
        }
    }

    fn begin(&mut self, listener: ListenerId, conn: ConnId, now: Instant) -> u32 {
        let id = self.free_sessions.pop().unwrap_or_else(|| {
            self.sessions.push(Session::default());
            self.sessions.len() as u32 - 1
        });
        let wait = self.waits.begin(id);
        self.sessions[id as usize] = Session::begin(listener, conn, wait, now);
        self.lines.write(conn.index, Line::of(id, CLIENT, conn));
        self.report.opened();
        self.report.add(Counter::Sniffing, 1);
        id
    }

    fn named(&mut self, conn: ConnId, names: Option<(SocketAddr, SocketAddr)>, outbox: &mut Outbox) {
        let Some((id, CLIENT)) = self.find(conn, State::Sniffing) else { return };
        let session = &mut self.sessions[id as usize];
        if let Some((peer, _)) = names {
            session.peer = Some(peer);
            // A proxy counts as whom it speaks for.
            if !self.guide.trusts(session.listener, peer) && !self.count_source(id, peer) {
                return self.end(id, Reason::OverSource, true, outbox);
            }
        }
        let wait = self.waits.at(self.sessions[id as usize].extra);
        (wait.names, wait.named) = (names, true);
        if std::mem::take(&mut wait.missed) {
            outbox.push(Command::Peek { conn });
        }
    }

    /// Count the connection to its source, once; false if that has too many then.
    fn count_source(&mut self, id: u32, peer: SocketAddr) -> bool {
        let row = self.sources.add(&Prefix::of(peer.ip()));
        self.sessions[id as usize].source = row + 1;
        let most = self.config.most_per_source;
        most == 0 || self.sources.count(row) <= most
    }

    // ---- looking ----------------------------------------------------------------------------------------------------

    fn peeked(&mut self, conn: ConnId, buf: Buf, now: Instant, outbox: &mut Outbox) {
        if let Some((id, CLIENT)) = self.find(conn, State::Sniffing) {
            let session = &self.sessions[id as usize];
            let wait = self.waits.at(session.extra);
            if !wait.named || session.sides[CLIENT] & SENDING != 0 {
                wait.missed = true;
                return outbox.peeks.release(buf);
            }
            self.look(id, outbox.peeks.bytes(&buf).len() as u32, Some(&buf), now, outbox);
        }
        outbox.peeks.release(buf);
    }

    /// Ask the guide about the bytes; without any, it is the last time.
    fn look(&mut self, id: u32, shown: u32, buf: Option<&Buf>, now: Instant, outbox: &mut Outbox) {
        let session = self.sessions[id as usize];
        let wait = self.waits.at(session.extra);
        wait.looked_at = wait.looked_at.saturating_add(shown.max(1));
        wait.shown = shown;
        let is_long = shown >= self.config.sniff_bytes.min(PEEK_BYTES as u32) || wait.looked_at >= LOOKED_AT_MOST;
        let bytes = buf.map_or(&[][..], |buf| outbox.peeks.bytes(buf));
        let last = is_long || wait.last_look || buf.is_none();
        let mut shown = Shown { listener: session.listener, names: wait.names, bytes, last };
        let mut before = wait.memory;
        let mut guidance = self.guide.guide(&shown, &mut wait.memory, &mut wait.chosen);
        if let Guidance::Speaks { names, header } = guidance {
            wait.names = names.or(wait.names);
            if let Some((peer, _)) = wait.names {
                self.sessions[id as usize].peer = Some(peer);
                if !self.count_source(id, peer) {
                    return self.end(id, Reason::OverSource, true, outbox);
                }
            }
            let wait = self.waits.at(session.extra);
            shown = Shown { names: wait.names, bytes: &bytes[header as usize..], ..shown };
            if header > 0 {
                wait.shown -= header;
                let conn = session.conns[CLIENT];
                outbox.commands.push(Command::Discard { conn, bytes: header });
                if shown.bytes.is_empty() && !last {
                    // An end right behind it has been announced already, and not been told.
                    outbox.commands.push(Command::Peek { conn });
                }
            }
            before = wait.memory;
            guidance = self.guide.guide(&shown, &mut wait.memory, &mut wait.chosen);
        }
        match guidance {
            Guidance::Found => self.found(id, now, outbox),
            Guidance::More if !last => {}
            Guidance::Answer(answer) if !last => self.answer(id, answer, before, now, outbox),
            // Who is to be answered at last cannot go on in time.
            Guidance::More | Guidance::Answer(_) if is_long => self.end(id, Reason::SniffTooLong, true, outbox),
            Guidance::More | Guidance::NoRoute | Guidance::Unproxied if session.sides[CLIENT] & FINISHED != 0 => {
                self.end(id, Reason::ClientLeft, false, outbox);
            }
            Guidance::More | Guidance::Answer(_) => self.end(id, Reason::SniffDeadline, true, outbox),
            Guidance::NoRoute if last && !is_long && shown.bytes.is_empty() => {
                self.end(id, Reason::SniffDeadline, true, outbox);
            }
            Guidance::NoRoute => self.end(id, Reason::NoRoute, true, outbox),
            Guidance::Garbage | Guidance::Speaks { .. } => self.end(id, Reason::Garbage, true, outbox),
            Guidance::Unproxied => self.end(id, Reason::Unproxied, true, outbox),
        }
    }

    /// Tell the client what it waits for. What it says is looked at only when that is with the kernel.
    fn answer(&mut self, id: u32, answer: &[u8], before: G::Memory, now: Instant, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        if let Some(buf) = outbox.buffers.write(answer) {
            session.sides[CLIENT] |= SENDING;
            return outbox.push(Command::Send { conn: session.conns[CLIENT], buf });
        }
        // The guide is to say it once more.
        self.report.add(Counter::BufferWaits, 1);
        let wait = self.waits.at(session.extra);
        wait.memory = before;
        let again = now.after(Duration::from_millis(BACKOFF_MS.0.into())).min(wait.deadline);
        self.waits.set_due(session.extra, Some(again));
    }

    /// The time for looking is over, unless it was only for a buffer to answer with.
    fn last_look(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let session = self.sessions[id as usize];
        let wait = self.waits.at(session.extra);
        if now < wait.deadline {
            let deadline = wait.deadline;
            self.waits.set_due(session.extra, Some(deadline));
            outbox.push(Command::Peek { conn: session.conns[CLIENT] });
        } else if session.sides[CLIENT] & SENDING != 0 {
            self.end(id, Reason::SniffDeadline, true, outbox);
        } else if wait.shown == 0 {
            self.look(id, 0, None, now, outbox);
        } else {
            // The bytes were not kept: they are asked for once more.
            wait.last_look = true;
            outbox.push(Command::Peek { conn: session.conns[CLIENT] });
        }
    }

    // ---- delivering -------------------------------------------------------------------------------------------------

    fn found(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        let wait = self.waits.at(session.extra);
        let row = self.services.add(wait.chosen.service.as_str());
        session.service = row + 1;
        let most = wait.chosen.most_connections.unwrap_or(self.config.most_per_service);
        if most != 0 && self.services.count(row) > most {
            return self.end(id, Reason::OverService, true, outbox);
        }
        session.state = State::Delivering;
        self.report.less(Counter::Sniffing);
        self.report.add(Counter::Delivering, 1);
        wait.deadline = now.after(wait.chosen.patience.unwrap_or(self.config.delivery_timeout));
        wait.backoff_ms = BACKOFF_MS.0;
        // What comes meanwhile waits in the kernel and is not looked at.
        let (place, conn) = (session.extra, session.conns[CLIENT]);
        outbox.push(Command::Pause { conn });
        let bytes = wait.chosen.skip.min(wait.shown);
        if bytes > 0 {
            wait.shown -= bytes;
            outbox.push(Command::Discard { conn, bytes });
        }
        let deadline = wait.deadline;
        if self.waits.has_line(row) && deadline > now {
            self.waits.stand_in_line(row, place);
            return self.waits.set_due(place, Some(deadline));
        }
        self.deliver(id, now, outbox);
    }

    fn deliver(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let session = &self.sessions[id as usize];
        let (place, conn) = (session.extra, session.conns[CLIENT]);
        if session.sides[CLIENT] & SENDING != 0 {
            return self.end(id, Reason::ClientLeft, true, outbox);
        }
        let wait = self.waits.at(place);
        let reply = wait.chosen.reply;
        if wait.chosen.delivery == Delivery::HandOff && !reply.is_empty() && !wait.replied {
            let Some(buf) = outbox.buffers.write(reply) else {
                self.report.add(Counter::BufferWaits, 1);
                return self.undelivered(id, Errno::ENOBUFS, now, outbox);
            };
            wait.replied = true;
            let deadline = wait.deadline;
            self.waits.set_due(place, Some(deadline));
            self.sessions[id as usize].sides[CLIENT] |= SENDING;
            return outbox.push(Command::Send { conn, buf });
        }
        let path = match &wait.chosen.address {
            Address::Tcp(address) => Ok(*address),
            Address::Unix(path) => Err(path.as_slice()),
        };
        let command = match (wait.chosen.delivery, path) {
            (Delivery::Relay, Ok(address)) => Some(Command::Reach { ticket: place, target: Target::Tcp(address) }),
            (_, Err(path)) if path.is_empty() || path.len() > outbox.buffers.buffer_bytes() => {
                return self.end(id, Reason::ServiceUnreachable, true, outbox);
            }
            (Delivery::Relay, Err(path)) => {
                outbox.buffers.write(path).map(|path| Command::Reach { ticket: place, target: Target::Unix(path) })
            }
            (Delivery::HandOff, Err(path)) => {
                let mut bytes = [0; note::MOST_BYTES];
                let Chosen { service, matched, .. } = &wait.chosen;
                let length = note::write(&mut bytes, wait.names, wait.shown, service, matched);
                // A pool of small buffers has no room for long names.
                let length = length.min(outbox.buffers.buffer_bytes());
                match (outbox.buffers.write(path), outbox.buffers.write(&bytes[..length])) {
                    (Some(path), Some(note)) => Some(Command::HandOff { conn, path, note }),
                    (path, note) => {
                        path.into_iter().chain(note).for_each(|buf| outbox.buffers.release(buf));
                        None
                    }
                }
            }
            // A socket can only be handed to somebody on this host.
            (Delivery::HandOff, Ok(_)) => return self.end(id, Reason::ServiceUnreachable, true, outbox),
        };
        match command {
            Some(command) => {
                wait.reaching = matches!(command, Command::Reach { .. });
                wait.handing = !wait.reaching;
                let due = wait.reaching.then_some(wait.deadline);
                self.waits.set_due(place, due);
                if matches!(command, Command::Reach { .. }) {
                    self.report.add(Counter::Attempted, 1);
                }
                outbox.push(command);
            }
            None => {
                self.report.add(Counter::BufferWaits, 1);
                self.undelivered(id, Errno::ENOBUFS, now, outbox);
            }
        }
    }

    /// It did not work: again later, or never.
    fn undelivered(&mut self, id: u32, error: Errno, now: Instant, outbox: &mut Outbox) {
        let Session { extra: place, service, .. } = self.sessions[id as usize];
        let wait = self.waits.at(place);
        wait.error = Some(error);
        // A full service is asked by the first in its line alone, and so more often.
        let is_full = error == Errno::EAGAIN;
        let most_ms = if is_full { FULL_BACKOFF_MS } else { BACKOFF_MS.1 };
        let again = now.after(Duration::from_millis(wait.backoff_ms.min(most_ms).into()));
        if !is_passing(error) || again > wait.deadline {
            return self.end(id, reason_of(error), true, outbox);
        }
        wait.backoff_ms = (wait.backoff_ms * 2).min(most_ms);
        if is_full && !self.waits.stand_in_line(service - 1, place) {
            let deadline = self.waits.at(place).deadline;
            return self.waits.set_due(place, Some(deadline));
        }
        self.report.add(Counter::DeliveryRetries, 1);
        self.waits.set_due(place, Some(again));
    }

    fn connected(&mut self, ticket: u32, conn: ConnId, outbox: &mut Outbox) {
        self.report.add(Counter::Connected, 1);
        let wait = self.waits.at(ticket);
        wait.reaching = false;
        let id = wait.session;
        self.lines.write(conn.index, Line::of(id, SERVICE, conn));
        self.report.opened();
        let session = &mut self.sessions[id as usize];
        session.conns[SERVICE] = conn;
        session.sides[SERVICE] = OPEN;
        if session.state != State::Delivering {
            self.closes_under_way += 1;
            session.sides[SERVICE] |= CLOSING;
            outbox.push(Command::Close { conn, abort: true });
            return;
        }
        let service = session.service - 1;
        let mut first = std::mem::take(&mut wait.chosen.preface);
        let (promise, deadline) = (wait.chosen.promise, wait.deadline);
        self.waits.leave_line(service, ticket);
        first.extend_from_slice(promise.map_or(b"", |(request, _)| request));
        if !self.begin_with(id, SERVICE, &first, outbox) {
            // Without it the service would take the proxy for the client.
            return self.end(id, Reason::ServiceUnreachable, true, outbox);
        }
        if promise.is_none() {
            return self.relay(id, outbox);
        }
        // Nothing goes behind the request before its answer: the service would have to refuse it (CVE-2021-23214).
        self.sessions[id as usize].state = State::Asking;
        self.waits.set_due(ticket, Some(deadline));
    }

    /// Send a side the first bytes that it gets, if there are any; false if no buffer is free.
    fn begin_with(&mut self, id: u32, side: usize, bytes: &[u8], outbox: &mut Outbox) -> bool {
        if bytes.is_empty() {
            return true;
        }
        let Some(buf) = outbox.buffers.write(bytes) else { return false };
        let session = &mut self.sessions[id as usize];
        session.sides[side] |= SENDING;
        outbox.push(Command::Send { conn: session.conns[side], buf });
        true
    }

    /// The service has answered what it was asked.
    pub(super) fn service_answered(&mut self, id: u32, buf: Buf, outbox: &mut Outbox) {
        let promise = self.waits.at(self.sessions[id as usize].extra).chosen.promise;
        let is_kept = promise.is_some_and(|(_, answer)| outbox.buffers.bytes(&buf) == [answer]);
        outbox.buffers.release(buf);
        match is_kept {
            true => self.relay(id, outbox),
            false => self.end(id, Reason::ServiceDeclined, true, outbox),
        }
    }

    /// Bytes go both ways from here on.
    fn relay(&mut self, id: u32, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        let place = std::mem::take(&mut session.extra);
        session.state = State::Relaying;
        let client = session.conns[CLIENT];
        let wait = self.waits.at(place);
        let reply = if wait.replied { b"" } else { wait.chosen.reply };
        self.waits.end(place);
        self.report.less(Counter::Delivering);
        self.report.add(Counter::Relaying, 1);
        if !self.begin_with(id, CLIENT, reply, outbox) {
            return self.end(id, Reason::ServiceUnreachable, true, outbox);
        }
        outbox.push(Command::Take { conn: client });
        outbox.push(Command::Resume { conn: client });
        self.pass_on_end(id, CLIENT, outbox);
    }

    /// What the client, or the service before relaying, was told is with the kernel.
    pub(super) fn told(&mut self, id: u32, side: usize, now: Instant, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        session.sides[side] &= !SENDING;
        match session.state {
            State::Sniffing => {
                // Also what came together with what is answered, from a client that does not wait.
                self.waits.at(session.extra).missed = false;
                outbox.push(Command::Peek { conn: session.conns[CLIENT] });
            }
            State::Delivering => self.deliver(id, now, outbox),
            State::Asking | State::Relaying | State::Ending | State::Free => {}
        }
    }

    fn connect_failed(&mut self, ticket: u32, step: Step, error: Errno, now: Instant, outbox: &mut Outbox) {
        self.report.add(Counter::ConnectFailed, 1);
        let wait = self.waits.at(ticket);
        wait.reaching = false;
        let (id, is_late) = (wait.session, now >= wait.deadline);
        let error = if error == Errno::ECANCELED && is_late { Errno::ETIMEDOUT } else { error };
        self.report.failed(step, error);
        match self.sessions[id as usize].state {
            State::Delivering => self.undelivered(id, error, now, outbox),
            _ => self.free(id, now),
        }
    }

    fn handed_off(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let Some((id, CLIENT)) = self.find(conn, State::Delivering) else { return };
        self.end(id, Reason::HandedOff, false, outbox);
    }

    fn hand_off_failed(&mut self, conn: ConnId, error: Errno, now: Instant, outbox: &mut Outbox) {
        let Some((id, CLIENT)) = self.find(conn, State::Delivering) else { return };
        self.report.failed(Step::HandOff, error);
        let wait = self.waits.at(self.sessions[id as usize].extra);
        wait.handing = false;
        if error == Errno::EPROTOTYPE {
            // Whoever listens there takes connections.
            wait.chosen.delivery = Delivery::Relay;
            self.report.add(Counter::FellBack, 1);
            return self.deliver(id, now, outbox);
        }
        self.undelivered(id, error, now, outbox);
    }

    /// Whoever is the first in the connection's line may try again.
    fn roomy(&mut self, conn: ConnId) {
        if let Some((id, CLIENT)) = self.find(conn, State::Delivering) {
            self.waits.try_first(self.sessions[id as usize].service - 1);
        }
    }

    // ---- ends -------------------------------------------------------------------------------------------------------

    /// Nothing more is done for the connection than closing what is open of it.
    fn end(&mut self, id: u32, reason: Reason, abort: bool, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        let gauge = match session.state {
            State::Sniffing => Counter::Sniffing,
            State::Delivering | State::Asking => Counter::Delivering,
            State::Relaying => Counter::Relaying,
            State::Ending | State::Free => return,
        };
        self.report.less(gauge);
        match session.state {
            State::Relaying => {
                self.queues.drop_all(session.extra, &mut outbox.buffers);
                session.extra = 0;
            }
            _ => {
                self.waits.set_due(session.extra, None);
                if let Some(row) = session.service.checked_sub(1) {
                    self.waits.leave_line(row, session.extra);
                }
                let wait = self.waits.at(session.extra);
                wait.handing = false;
                if wait.reaching {
                    outbox.push(Command::CancelConnect { ticket: session.extra });
                }
            }
        }
        session.has_wait = session.state != State::Relaying;
        session.state = State::Ending;
        session.reason = reason;
        for side in [CLIENT, SERVICE] {
            if session.sides[side] & (OPEN | CLOSING) == OPEN {
                session.sides[side] |= CLOSING;
                self.closes_under_way += 1;
                outbox.push(Command::Close { conn: session.conns[side], abort });
            }
        }
    }

    fn finished(&mut self, conn: ConnId, gone: bool, now: Instant, outbox: &mut Outbox) {
        let Some((id, side)) = self.whose(conn) else { return };
        let session = &mut self.sessions[id as usize];
        if session.sides[side] & (FINISHED | CLOSING) != 0 {
            return;
        }
        session.sides[side] |= if gone { FINISHED | GONE } else { FINISHED };
        match session.state {
            // It said nothing and will say nothing: only a service that speaks first can want it.
            State::Sniffing => self.look(id, 0, None, now, outbox),
            State::Relaying => self.pass_on_end(id, side, outbox),
            State::Asking if side == SERVICE => self.end(id, Reason::ServiceDeclined, true, outbox),
            State::Delivering | State::Asking | State::Ending | State::Free => {}
        }
    }

    fn failed(&mut self, conn: ConnId, step: Step, error: Errno, outbox: &mut Outbox) {
        let Some((id, side)) = self.whose(conn) else { return };
        let session = &self.sessions[id as usize];
        if session.sides[side] & CLOSING != 0 {
            return;
        }
        self.report.failed(step, error);
        let reason = match session.state {
            State::Relaying => relay::broke(side),
            State::Asking if side == SERVICE => Reason::ServiceDeclined,
            _ => Reason::ClientLeft,
        };
        self.end(id, reason, true, outbox);
    }

    fn closed(&mut self, conn: ConnId, now: Instant) {
        let Some((id, side)) = self.whose(conn) else { return };
        self.lines.write(conn.index, Line::default());
        let session = &mut self.sessions[id as usize];
        if session.sides[side] & CLOSING != 0 {
            self.closes_under_way -= 1;
        }
        session.sides[side] = 0;
        self.report.less(Counter::Open);
        self.free(id, now);
    }

    /// Forget the connection once nothing of it is left.
    fn free(&mut self, id: u32, now: Instant) {
        let session = self.sessions[id as usize];
        let reaching = session.has_wait && self.waits.at(session.extra).reaching;
        if session.state != State::Ending || session.sides.iter().any(|side| side & OPEN != 0) || reaching {
            return;
        }
        self.report.add(session.reason.counter(), 1);
        self.ledger.ended(&Ended {
            peer: session.peer,
            service: session.service.checked_sub(1).map_or("", |row| self.services.key(row)),
            reason: session.reason,
            accepted: session.accepted,
            ended: now,
            bytes_up: session.bytes[CLIENT],
            bytes_down: session.bytes[SERVICE],
        });
        if let Some(row) = session.service.checked_sub(1) {
            self.services.less(row);
        }
        if let Some(row) = session.source.checked_sub(1) {
            self.sources.less(row);
        }
        if session.has_wait {
            self.waits.end(session.extra);
        }
        self.sessions[id as usize] = Session::default();
        self.free_sessions.push(id);
    }

    /// Close what is open, a bounded number per turn.
    fn close_some(&mut self, outbox: &mut Outbox) {
        let Some(mut next) = self.closing else { return };
        let mut scan = BURST * 16;
        while self.closes_under_way < BURST && scan > 0 && (next as usize) < self.sessions.len() {
            self.end(next, Reason::Stopped, false, outbox);
            (next, scan) = (next + 1, scan - 1);
        }
        self.closing = Some(next);
    }

    fn has_more_to_close(&self) -> bool {
        self.closing.is_some_and(|next| (next as usize) < self.sessions.len())
    }

    // ---- names ------------------------------------------------------------------------------------------------------

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
        let is_empty = self.sessions.len() == self.free_sessions.len();
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
        match event {
            Event::Listening { listener, local } => self.listening(listener, local, outbox),
            Event::ListenFailed { step, error, .. } => self.listen_failed(step, error, outbox),
            Event::Accepted { listener, conn, peer } => self.accepted(listener, conn, peer, now, outbox),
            Event::AcceptFailed { error, .. } => {
                self.report.add(Counter::AcceptFailed, 1);
                self.report.failed(Step::Accept, error);
            }
            Event::Named { conn, names } => self.named(conn, names, outbox),
            Event::Peeked { conn, buf } => self.peeked(conn, buf, now, outbox),
            Event::Connected { ticket, conn } => self.connected(ticket, conn, outbox),
            Event::ConnectFailed { ticket, step, error } => self.connect_failed(ticket, step, error, now, outbox),
            Event::HandedOff { conn } => self.handed_off(conn, outbox),
            Event::HandOffFailed { conn, error } => self.hand_off_failed(conn, error, now, outbox),
            Event::Roomy { conn } => self.roomy(conn),
            Event::Received { conn, buf } => self.received(conn, buf, outbox),
            Event::Sent { conn } => self.sent(conn, now, outbox),
            Event::Finished { conn, gone } => self.finished(conn, gone, now, outbox),
            Event::Failed { conn, step, error } => self.failed(conn, step, error, outbox),
            Event::Closed { conn } => self.closed(conn, now),
            Event::Ordered(Order::Drain) => self.stop_listening(outbox),
            Event::Ordered(Order::Close) => {
                self.stop_listening(outbox);
                self.closing.get_or_insert(0);
                self.close_some(outbox);
            }
            // The other orders are not for a broker, and datagrams are not either.
            Event::Ordered(_) | Event::Disturbed { .. } => {}
        }
        self.settle();
    }

    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        for _ in 0..BURST {
            let Some(place) = self.waits.take_due(now) else { break };
            let wait = self.waits.at(place);
            let (id, reaching) = (wait.session, wait.reaching);
            match self.sessions[id as usize].state {
                State::Sniffing => self.last_look(id, now, outbox),
                State::Delivering if reaching => outbox.push(Command::CancelConnect { ticket: place }),
                State::Delivering if self.waits.is_behind(self.sessions[id as usize].service - 1, place) => {
                    self.end(id, Reason::ServiceFull, true, outbox);
                }
                State::Delivering => self.deliver(id, now, outbox),
                State::Asking => self.end(id, Reason::ServiceDeclined, true, outbox),
                State::Relaying | State::Ending | State::Free => {}
            }
        }
        self.close_some(outbox);
        self.settle();
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let more_to_close = self.has_more_to_close() && self.closes_under_way < BURST;
        if more_to_close { Some(Instant(0)) } else { self.waits.next_due() }
    }

    fn is_done(&self) -> bool {
        self.report.phase == Phase::Done
    }

    fn report(&self) -> &Report {
        &self.report
    }

    fn check_invariants(&self) -> Result<(), String> {
        let count = |counter| self.report.count(counter);
        let held: Vec<&Session> = self.sessions.iter().filter(|session| session.state != State::Free).collect();
        let in_state = |state| held.iter().filter(|session| session.state == state).count() as u64;
        let open = held.iter().flat_map(|session| session.sides).filter(|side| side & OPEN != 0).count() as u64;
        let closing = held.iter().flat_map(|session| session.sides).filter(|side| side & CLOSING != 0).count();
        let ended: u64 = REASONS.iter().map(|reason| count(reason.counter())).sum();
        let waiting = held.iter().filter(|session| session.state != State::Relaying && session.waits());
        let of_service = held.iter().filter(|session| session.service != 0).count() as u64;
        let of_source = held.iter().filter(|session| session.source != 0).count() as u64;
        let lines = self.lines.iter().filter(|line| line.session != 0).count() as u64;
        let due = |session: &&&Session| match self.waits.get(session.extra) {
            Some(wait) => wait.is_due() || wait.handing || wait.reaching || wait.last_look,
            None => false,
        };
        let on_the_way = |session: &&&Session| !matches!(session.state, State::Free | State::Relaying | State::Ending);
        let rules = [
            (
                "each accepted connection is held or has one reason",
                count(Counter::Accepted) == held.len() as u64 + ended,
            ),
            ("open_now is the number of open sides", count(Counter::Open) == open),
            ("each open side has its line", lines == open),
            ("closes under way are counted", closing as u32 == self.closes_under_way),
            ("sniffing_now", count(Counter::Sniffing) == in_state(State::Sniffing)),
            ("delivering_now", count(Counter::Delivering) == in_state(State::Delivering) + in_state(State::Asking)),
            ("relaying_now", count(Counter::Relaying) == in_state(State::Relaying)),
            ("a wait belongs to one session or is free", waiting.count() == self.waits.in_use()),
            ("who stands in a line is on the way to its service", {
                let delivering = held.iter().filter(|session| session.state == State::Delivering);
                delivering.filter(|it| self.waits.get(it.extra).is_some_and(|wait| wait.in_line)).count()
                    == self.waits.in_lines()
            }),
            ("services are counted", self.services.total() == of_service),
            ("sources are counted", self.sources.total() == of_source),
            ("something is due for each connection on its way", held.iter().filter(on_the_way).all(|it| due(&it))),
            ("queues belong to one session or are free", self.queues.check(held.iter().copied())),
            ("bytes out are no more than bytes in", count(Counter::BytesOut) <= count(Counter::BytesIn)),
        ];
        rules.iter().find(|(_, holds)| !holds).map_or(Ok(()), |(rule, _)| Err(format!("broker: {rule}")))
    }
}

/// Whether the same try may succeed a little later.
fn is_passing(error: Errno) -> bool {
    matches!(
        error,
        Errno::EAGAIN
            | Errno::ENOENT
            | Errno::ECONNREFUSED
            | Errno::ECONNRESET
            | Errno::EPIPE
            | Errno::EADDRNOTAVAIL
            | Errno::EMFILE
            | Errno::ENFILE
            | Errno::ENOMEM
            | Errno::ENOBUFS
            | Errno::ETOOMANYREFS
    )
}

fn reason_of(error: Errno) -> Reason {
    match error {
        // EPIPE, ECONNRESET: whoever was there is gone.
        Errno::ENOENT | Errno::ECONNREFUSED | Errno::EPIPE | Errno::ECONNRESET => Reason::ServiceAbsent,
        Errno::EAGAIN | Errno::ETIMEDOUT => Reason::ServiceFull,
        _ => Reason::ServiceUnreachable,
    }
}
