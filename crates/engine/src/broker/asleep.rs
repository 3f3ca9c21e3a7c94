//! Services that sleep until they are called: who waits for one (is *parked*), whether somebody has been asked to wake it,
//! and what becomes of those who wait.
//!
//! Decides the bounds on waiting, that each sleeper is asked for once, and the order in which those who wait are brought
//! to it. Knows no process: what becomes of a service, the outside says (`questions`).

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use super::counts::Prefix;
use super::guide::{Address, Asleep, Chosen, Guide, Why};
use super::ledger::{Ledger, Reason};
use super::session::{CLIENT, SENDING, State};
use super::{BrokerConfig, BrokerCore};
use crate::contract::{Command, ConnId, Instant, Outbox};
use crate::questions::{Answer, Names, Question, Usage};
use crate::report::Counter;

/// Between two tries to ask what had no room.
const ASK_AGAIN: Duration = Duration::from_millis(10);
/// What a client that waits may still send: the window that it is given before anybody reads (tcp_select_initial_window()).
const WINDOW_BYTES: u64 = 65_535;

/// What is known of a service that can be started; none at all is asleep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Standing {
    /// A free place.
    Free,
    /// Somebody waits, and nobody has been asked.
    Asleep,
    /// The outside has been asked.
    Asked,
    /// It listens.
    Up,
    /// The outside wants to stop it.
    Held,
}

#[derive(Debug)]
struct Sleeper {
    standing: Standing,
    /// In the counts of services.
    row: u32,
    /// Places of those who wait, first come first.
    parked: VecDeque<u32>,
    /// For whom it was asked.
    asked_for: Option<Prefix>,
    /// When its last connection ended.
    unused_since: Instant,
    /// In `unasked`.
    is_queued: bool,
}

/// All services that are not simply asleep.
#[derive(Debug)]
pub(super) struct Sleepers {
    places: Vec<Sleeper>,
    free: Vec<u32>,
    /// For whom there was no room to ask; places that have found it otherwise are passed over.
    unasked: VecDeque<u32>,
    ask_at: Instant,
    parked: u32,
    parked_bytes: u64,
}

impl Sleepers {
    pub(super) fn new() -> Sleepers {
        let (places, free, unasked) = (Vec::new(), Vec::new(), VecDeque::new());
        Sleepers { places, free, unasked, ask_at: Instant(0), parked: 0, parked_bytes: 0 }
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        (!self.unasked.is_empty()).then_some(self.ask_at)
    }

    /// A connection of the service is gone, and it was the last.
    pub(super) fn unused(&mut self, tag: u32, now: Instant) {
        if let Some(place) = tag.checked_sub(1) {
            self.places[place as usize].unused_since = now;
        }
    }

    /// How many wait.
    pub(super) fn parked(&self) -> u32 {
        self.parked
    }

    /// Its own bookkeeping.
    pub(super) fn check(&self) -> bool {
        let parked: usize = self.places.iter().map(|it| it.parked.len()).sum();
        let idle = self.places.iter().all(|it| match it.standing {
            Standing::Free | Standing::Up => it.parked.is_empty(),
            Standing::Asleep | Standing::Asked => !it.parked.is_empty(),
            Standing::Held => true,
        });
        parked == self.parked as usize && idle && (self.parked > 0 || self.parked_bytes == 0)
    }

    fn begin(&mut self, row: u32, standing: Standing, now: Instant) -> u32 {
        let parked = VecDeque::new();
        let it = Sleeper { standing, row, parked, asked_for: None, unused_since: now, is_queued: false };
        match self.free.pop() {
            Some(place) => {
                self.places[place as usize] = it;
                place
            }
            None => {
                self.places.push(it);
                self.places.len() as u32 - 1
            }
        }
    }
}

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    // ---- who waits ----------------------------------------------------------------------------------------------------

    /// Whether a connection of this service can be brought to it now, as far as is known.
    pub(super) fn is_awake(&self, row: u32, place: u32) -> bool {
        !self.waits.get(place).is_some_and(|wait| wait.chosen.can_sleep())
            || self
                .services
                .tag(row)
                .checked_sub(1)
                .is_some_and(|place| self.sleepers.places[place as usize].standing == Standing::Up)
    }

    /// What the guide wants for the client of a sleeper.
    pub(super) fn slept_on(&mut self, id: u32, manner: Asleep, last: bool, now: Instant, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        let wait = self.waits.at(session.extra);
        wait.is_asleep = manner != Asleep::Wake;
        match manner {
            Asleep::Wake => self.found(id, now, outbox),
            Asleep::More if !last => {}
            Asleep::Say if !last && !self.said.is_empty() && self.said.len() <= outbox.buffers.buffer_bytes() => {
                let Some(buf) = outbox.buffers.write(&self.said) else {
                    self.report.add(Counter::BufferWaits, 1);
                    return self.end(id, Reason::AnsweredAsleep, true, outbox);
                };
                wait.was_told = true;
                session.sides[CLIENT] |= SENDING;
                outbox.push(Command::Send { conn: session.conns[CLIENT], buf });
            }
            Asleep::More | Asleep::Say | Asleep::Farewell => self.take_leave(id, Reason::AnsweredAsleep, now, outbox),
        }
    }

    /// The connection waits until its service is up.
    pub(super) fn park(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let session = &self.sessions[id as usize];
        let (place, row, conn) = (session.extra, session.service - 1, session.conns[CLIENT]);
        let tag = self.services.tag(row);
        let sleeper = match tag.checked_sub(1) {
            Some(sleeper) => sleeper,
            None => {
                let sleeper = self.sleepers.begin(row, Standing::Asleep, now);
                self.services.set_tag(row, sleeper + 1);
                sleeper
            }
        };
        let wait = self.waits.at(place);
        let bytes = u64::from(wait.shown) + WINDOW_BYTES;
        let BrokerConfig { most_parked, most_parked_per_service, parked_bytes, settle, .. } = self.config;
        let here = self.sleepers.places[sleeper as usize].parked.len() as u64;
        if most_parked != 0 && self.sleepers.parked >= most_parked
            || most_parked_per_service != 0 && here >= u64::from(most_parked_per_service)
            || parked_bytes != 0 && self.sleepers.parked_bytes + bytes > parked_bytes
        {
            self.forget_if_idle(sleeper);
            return self.part(id, Reason::OverParked, now, outbox);
        }
        wait.parked_bytes = bytes;
        let settled = now.after(settle);
        let due = if settle.is_zero() { wait.deadline } else { wait.deadline.min(settled) };
        self.waits.set_due(place, Some(due));
        self.sleepers.parked += 1;
        self.sleepers.parked_bytes += bytes;
        self.sleepers.places[sleeper as usize].parked.push_back(place);
        self.report.add(Counter::Parked, 1);
        outbox.push(Command::Watch { conn });
        if settle.is_zero() {
            self.ask(sleeper, place, now, outbox);
        }
    }

    /// The connection waits no more.
    pub(super) fn unpark(&mut self, place: u32, row: u32) {
        let wait = self.waits.at(place);
        if wait.parked_bytes == 0 {
            return;
        }
        let bytes = std::mem::take(&mut wait.parked_bytes);
        let sleeper = self.services.tag(row) - 1;
        let parked = &mut self.sleepers.places[sleeper as usize].parked;
        // Deadlines mostly come in the order in which they came, so it is mostly the first.
        if let Some(at) = parked.iter().position(|&other| other == place) {
            parked.remove(at);
        }
        self.left(bytes);
        self.forget_if_idle(sleeper);
    }

    fn left(&mut self, bytes: u64) {
        self.sleepers.parked -= 1;
        self.sleepers.parked_bytes -= bytes;
        self.report.less(Counter::Parked);
    }

    /// A service for which nobody waits, and of which nothing is known, needs no place.
    fn forget_if_idle(&mut self, sleeper: u32) {
        let it = &mut self.sleepers.places[sleeper as usize];
        if it.parked.is_empty() && matches!(it.standing, Standing::Asleep | Standing::Asked) {
            self.forget(sleeper);
        }
    }

    fn forget(&mut self, sleeper: u32) {
        let it = &mut self.sleepers.places[sleeper as usize];
        it.standing = Standing::Free;
        self.services.set_tag(it.row, 0);
        self.sleepers.free.push(sleeper);
    }

    /// Something is due for a connection that waits: it is still there, or its patience is over.
    pub(super) fn waited(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let session = &self.sessions[id as usize];
        let (place, row) = (session.extra, session.service - 1);
        let deadline = self.waits.at(place).deadline;
        if now >= deadline {
            return self.part(id, Reason::ServiceAbsent, now, outbox);
        }
        if self.waits.at(place).hung_up {
            // It does not wait for an answer, as a scanner does not.
            return self.end(id, Reason::ClientLeft, true, outbox);
        }
        self.waits.set_due(place, Some(deadline));
        let sleeper = self.services.tag(row) - 1;
        self.ask(sleeper, place, now, outbox);
    }

    /// The client will send no more: it may still wait for an answer, or be gone.
    pub(super) fn hung_up(&mut self, conn: ConnId) {
        if let Some((id, CLIENT)) = self.find(conn, State::Delivering) {
            self.waits.at(self.sessions[id as usize].extra).hung_up = true;
        }
    }

    // ---- asking -------------------------------------------------------------------------------------------------------

    /// Ask for a sleeper in the name of the connection at `place`, unless somebody has.
    fn ask(&mut self, sleeper: u32, place: u32, now: Instant, outbox: &mut Outbox) {
        let it = &mut self.sleepers.places[sleeper as usize];
        if it.standing != Standing::Asleep || it.is_queued {
            return;
        }
        let wait = self.waits.at(place);
        let peer = self.sessions[wait.session as usize].peer;
        let Chosen { service, matched, address, start, protocol, delivery, .. } = &wait.chosen;
        let question = Question::Wake {
            service: service.clone(),
            start: start.as_str().to_owned(),
            target: shown(address),
            name: matched.clone(),
            protocol: protocol.as_str().to_owned(),
            delivery: *delivery,
            peer,
        };
        if outbox.questions.ask(question) {
            it.standing = Standing::Asked;
            it.asked_for = peer.map(|peer| Prefix::of(peer.ip()));
            return self.report.add(Counter::WakesAsked, 1);
        }
        it.is_queued = true;
        if self.sleepers.unasked.is_empty() {
            self.sleepers.ask_at = now.after(ASK_AGAIN);
        }
        self.sleepers.unasked.push_back(sleeper);
        self.report.add(Counter::QuestionWaits, 1);
    }

    /// Ask in the name of whoever waits longest.
    fn ask_for_first(&mut self, sleeper: u32, now: Instant, outbox: &mut Outbox) {
        let it = &mut self.sleepers.places[sleeper as usize];
        it.standing = Standing::Asleep;
        match it.parked.front() {
            Some(&place) => self.ask(sleeper, place, now, outbox),
            None => self.forget(sleeper),
        }
    }

    /// Ask what had no room before.
    pub(super) fn ask_again(&mut self, now: Instant, outbox: &mut Outbox) {
        if self.sleepers.next_due().is_none_or(|at| at > now) {
            return;
        }
        for _ in 0..self.sleepers.unasked.len() {
            let Some(sleeper) = self.sleepers.unasked.pop_front() else { break };
            let it = &mut self.sleepers.places[sleeper as usize];
            if std::mem::take(&mut it.is_queued) && it.standing == Standing::Asleep {
                self.ask_for_first(sleeper, now, outbox);
                if self.sleepers.places[sleeper as usize].is_queued {
                    break;
                }
            }
        }
        self.sleepers.ask_at = now.after(ASK_AGAIN);
    }

    // ---- what the outside says ----------------------------------------------------------------------------------------

    /// What became of a service.
    pub(super) fn answered(&mut self, answer: &Answer, now: Instant, outbox: &mut Outbox) {
        match answer {
            Answer::Up { service } => {
                let sleeper = self.sleeper(service, Standing::Up, now);
                let it = &mut self.sleepers.places[sleeper as usize];
                if it.standing != Standing::Up {
                    (it.standing, it.unused_since) = (Standing::Up, now);
                }
                self.release(sleeper, |_| true, None);
            }
            Answer::Slept { service } => {
                if let Some(sleeper) = self.known(service) {
                    self.ask_for_first(sleeper, now, outbox);
                }
            }
            Answer::Failed { service } => {
                if let Some(sleeper) = self.known(service) {
                    self.release(sleeper, |_| true, Some(Reason::StartFailed));
                    self.forget(sleeper);
                }
            }
            Answer::Refused { service, peer } => self.refused(service, *peer, now, outbox),
        }
    }

    fn refused(&mut self, service: &str, peer: Option<IpAddr>, now: Instant, outbox: &mut Outbox) {
        let Some(sleeper) = self.known(service) else { return };
        let prefix = peer.map(Prefix::of);
        let it = &self.sleepers.places[sleeper as usize];
        if !matches!(it.standing, Standing::Asleep | Standing::Asked) {
            return;
        }
        let asks_anew = it.standing == Standing::Asked && it.asked_for == prefix;
        self.release(sleeper, |of| of == prefix, Some(Reason::WakeRefused));
        if asks_anew || self.sleepers.places[sleeper as usize].parked.is_empty() {
            self.ask_for_first(sleeper, now, outbox);
        }
    }

    /// Those who wait and are `meant` wait no more: they are brought to their service, or ended for the reason, a bounded
    /// number per turn and in the order in which they came.
    fn release(&mut self, sleeper: u32, meant: impl Fn(Option<Prefix>) -> bool, parting: Option<Reason>) {
        let mut parked = std::mem::take(&mut self.sleepers.places[sleeper as usize].parked);
        let mut turn = 0;
        parked.retain(|&place| {
            let session = self.waits.at(place).session;
            let prefix = self.sessions[session as usize].peer.map(|peer| Prefix::of(peer.ip()));
            if !meant(prefix) {
                return true;
            }
            let wait = self.waits.at(place);
            wait.parting = parting;
            let bytes = std::mem::take(&mut wait.parked_bytes);
            // Long ago, so that it is now, and in this order.
            self.waits.set_due(place, Some(Instant(turn)));
            turn += 1;
            self.left(bytes);
            false
        });
        self.sleepers.places[sleeper as usize].parked = parked;
    }

    /// New connections of the service wait.
    pub(super) fn hold(&mut self, service: &str, now: Instant, outbox: &mut Outbox) {
        let sleeper = self.sleeper(service, Standing::Held, now);
        let it = &mut self.sleepers.places[sleeper as usize];
        it.standing = Standing::Held;
        let live = self.services.count(it.row) - it.parked.len() as u32;
        outbox.questions.reply(Question::Held { service: service.to_owned(), live });
    }

    /// How much these services are used.
    pub(super) fn usage(&self, ticket: u64, services: &Names, now: Instant, outbox: &mut Outbox) {
        let row = |service: &String| {
            let row = self.services.find(service.as_str());
            let all = row.map_or(0, |row| self.services.count(row));
            let sleeper = row.and_then(|row| self.services.tag(row).checked_sub(1));
            let sleeper = sleeper.map(|place| &self.sleepers.places[place as usize]);
            let parked = sleeper.map_or(0, |it| it.parked.len() as u32);
            let unused = sleeper.filter(|_| all == 0).map(|it| now.since(it.unused_since));
            Usage { service: service.clone(), live: all - parked, parked, unused }
        };
        outbox.questions.reply(Question::Usage { ticket, rows: services.iter().map(row).collect() });
    }

    fn known(&self, service: &str) -> Option<u32> {
        self.services.tag(self.services.find(service)?).checked_sub(1)
    }

    /// The service's place, made if there is none.
    fn sleeper(&mut self, service: &str, standing: Standing, now: Instant) -> u32 {
        self.known(service).unwrap_or_else(|| {
            let row = self.services.row(service);
            let sleeper = self.sleepers.begin(row, standing, now);
            self.services.set_tag(row, sleeper + 1);
            sleeper
        })
    }

    // ---- farewell -----------------------------------------------------------------------------------------------------

    /// End a connection whose service is not there: its client is told so, if its protocol has a word for it.
    pub(super) fn part(&mut self, id: u32, reason: Reason, now: Instant, outbox: &mut Outbox) {
        let why = match reason {
            Reason::StartFailed => Why::Failed,
            Reason::WakeRefused => Why::Refused,
            Reason::OverParked => Why::Full,
            _ => Why::Late,
        };
        let wait = self.waits.at(self.sessions[id as usize].extra);
        self.said.clear();
        self.guide.farewell(&wait.memory, &wait.chosen, why, &mut self.said);
        self.take_leave(id, reason, now, outbox);
    }

    /// Send what is in `said`, take what the client still says, and end when it has closed, or soon.
    pub(super) fn take_leave(&mut self, id: u32, reason: Reason, now: Instant, outbox: &mut Outbox) {
        let said = std::mem::take(&mut self.said);
        let session = &mut self.sessions[id as usize];
        let place = session.extra;
        let is_mute = said.is_empty() && !self.waits.at(place).was_told;
        if is_mute || session.sides[CLIENT] & SENDING != 0 || said.len() > outbox.buffers.buffer_bytes() {
            self.end(id, reason, true, outbox);
        } else if said.is_empty() {
            self.end(id, reason, false, outbox);
        } else if let Some(buf) = outbox.buffers.write(&said) {
            let conn = session.conns[CLIENT];
            if session.state == State::Sniffing {
                self.report.less(Counter::Sniffing);
                self.report.add(Counter::Delivering, 1);
            }
            session.state = State::Leaving;
            session.reason = reason;
            session.sides[CLIENT] |= SENDING;
            if let Some(row) = session.service.checked_sub(1) {
                self.waits.leave_line(row, place);
                self.unpark(place, row);
            }
            self.waits.set_due(place, Some(now.after(self.config.linger)));
            // What is unread when the socket closes would make that an RST, which destroys what was said
            // (RFC 9112 section 9.6, tcp_close()).
            outbox.push(Command::Take { conn });
            outbox.push(Command::Resume { conn });
            outbox.push(Command::Send { conn, buf });
        } else {
            self.report.add(Counter::BufferWaits, 1);
            self.end(id, reason, true, outbox);
        }
        self.said = said;
    }
}

/// A place as the registry writes it.
fn shown(address: &Address) -> String {
    match address {
        Address::Tcp(endpoint) => format!("tcp:{endpoint}"),
        Address::Unix(path) => match path.strip_prefix(b"\0") {
            Some(name) => format!("unix:@{}", String::from_utf8_lossy(name)),
            None => format!("unix:{}", String::from_utf8_lossy(path)),
        },
    }
}
