//! Taking connections over from another process: one message at a time, answered before anything is done with it.
//!
//! Decides what is believed, what is refused, and when a connection is this process's: once the answer is with the kernel.
//! Bytes that come with it need buffers; if none is free, the message waits, and with it all behind it. The other end is in
//! `ship`, the layout in `record`. Knows no socket.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use super::BrokerCore;
use super::counts::Prefix;
use super::guide::Guide;
use super::ledger::Ledger;
use super::record::{self, Message, Record, Unread};
use super::session::{CLIENT, FINISHED, GONE, Line, OPEN, SERVICE, SHUT, Session, State};
use super::ship::head_only;
use crate::buffers::{Buf, Buffers};
use crate::contract::{Command, ConnId, Given, Instant, ListenerId, Outbox};
use crate::report::Counter;

/// When no buffer is free.
const AGAIN: Duration = Duration::from_millis(1);
/// Bytes that come before a record, at most: no session has more waiting.
const MOST_BEFORE: usize = 4 << 20;

/// A ferry, as who takes.
#[derive(Debug)]
pub(super) struct Landing {
    ferry: Given,
    /// Bytes for each side of the connection whose record comes, and its serial.
    serial: u32,
    before: [VecDeque<Buf>; 2],
    now: Step,
}

#[derive(Debug)]
enum Step {
    /// A `Fetch` is outstanding.
    Fetching,
    /// A message waits for buffers until this moment.
    Waiting { until: Instant, conns: [Option<ConnId>; 2], message: Buf },
    /// An answer is on its way; what follows from it.
    Answering(Option<Box<Boarding>>),
}

/// A connection that is this process's once that is said.
#[derive(Debug)]
struct Boarding {
    is_relay: bool,
    conns: [Option<ConnId>; 2],
    listener: ListenerId,
    peer: Option<SocketAddr>,
    accepted: Instant,
    patience_ns: u64,
    sides: [u8; 2],
    bytes: [u64; 2],
    service: String,
    queued: [VecDeque<Buf>; 2],
}

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    /// Take what comes through this socket.
    pub(super) fn land(&mut self, ferry: Given, outbox: &mut Outbox) {
        if self.closing.is_some() {
            return outbox.push(Command::CloseFerry { ferry });
        }
        outbox.push(Command::OpenFerry { ferry });
        outbox.push(Command::Fetch { ferry });
        self.report.add(Counter::Ferries, 1);
        self.landings.push(Landing { ferry, serial: 0, before: Default::default(), now: Step::Fetching });
    }

    pub(super) fn landed(
        &mut self,
        ferry: Given,
        conns: [Option<ConnId>; 2],
        message: Buf,
        now: Instant,
        outbox: &mut Outbox,
    ) {
        for _ in conns.iter().flatten() {
            self.report.opened();
            self.strangers += 1;
        }
        if self.is_ferrying(ferry) {
            conns.into_iter().flatten().for_each(|conn| outbox.push(Command::Close { conn, abort: false }));
            self.ferry_answered(ferry, &message, now, outbox);
            return outbox.peeks.release(message);
        }
        match self.landings.iter().position(|landing| landing.ferry == ferry) {
            Some(place) => self.take(place, conns, message, now, outbox),
            None => outbox.peeks.release(message),
        }
    }

    /// Do what the message says, or let it wait.
    fn take(&mut self, place: usize, conns: [Option<ConnId>; 2], message: Buf, now: Instant, outbox: &mut Outbox) {
        let landing = &mut self.landings[place];
        let ferry = landing.ferry;
        let bytes = outbox.peeks.bytes(&message);
        // What does not belong together is not put together.
        let of = match record::read(bytes) {
            Ok(Message::Bytes { serial, .. } | Message::Relay(Record { serial, .. })) => serial,
            _ => 0,
        };
        if landing.serial != of {
            landing.serial = of;
            landing.before.iter_mut().for_each(|queue| release(queue, &mut outbox.buffers));
        }
        let refused = match record::read(bytes) {
            Ok(Message::Bytes { side, bytes, .. }) if conns == [None; 2] => {
                let held: usize = landing.before.iter().flatten().map(Buf::len).sum();
                if held + bytes.len() <= MOST_BEFORE {
                    if !append(&mut landing.before[side], bytes, &mut outbox.buffers) {
                        return self.wait(place, conns, message, now, outbox);
                    }
                    landing.now = Step::Fetching;
                    outbox.peeks.release(message);
                    return outbox.push(Command::Fetch { ferry });
                }
                // The record will not have what it says it has.
                landing.now = Step::Fetching;
                outbox.peeks.release(message);
                return outbox.push(Command::Fetch { ferry });
            }
            Ok(Message::Done) if conns == [None; 2] => {
                outbox.peeks.release(message);
                return self.end_landing(place, outbox);
            }
            Ok(Message::Relay(record)) => {
                let sum = |side: usize| landing.before[side].iter().map(|buf| buf.len() as u64).sum::<u64>();
                if conns.iter().all(Option::is_some) && record.before.map(u64::from) == [sum(0), sum(1)] {
                    let mut queued: [VecDeque<Buf>; 2] = Default::default();
                    let room =
                        [0, 1].iter().all(|&side| append(&mut queued[side], record.queued[side], &mut outbox.buffers));
                    let answer = if room { head_only(Message::Taken { serial: record.serial }, outbox) } else { None };
                    let Some(answer) = answer else {
                        queued.iter_mut().for_each(|queue| release(queue, &mut outbox.buffers));
                        return self.wait(place, conns, message, now, outbox);
                    };
                    let record = record::read(outbox.peeks.bytes(&message));
                    let Ok(Message::Relay(record)) = record else { unreachable!("it was one a moment ago") };
                    let mut boarding = Boarding::of(&record, true, conns);
                    boarding.queued = std::mem::take(&mut landing.before);
                    for (all, rest) in boarding.queued.iter_mut().zip(&mut queued) {
                        all.append(rest);
                    }
                    landing.now = Step::Answering(Some(Box::new(boarding)));
                    outbox.peeks.release(message);
                    return outbox.push(Command::Ship { ferry, conns: [None; 2], message: answer });
                }
                Some(record.serial)
            }
            Ok(Message::Fresh(record)) => {
                let is_known = (record.listener as usize) < self.config.listen.len();
                if is_known && conns[CLIENT].is_some() && conns[SERVICE].is_none() {
                    let boarding = Boarding::of(&record, false, conns);
                    let Some(answer) = head_only(Message::Taken { serial: record.serial }, outbox) else {
                        return self.wait(place, conns, message, now, outbox);
                    };
                    self.landings[place].now = Step::Answering(Some(Box::new(boarding)));
                    outbox.peeks.release(message);
                    return outbox.push(Command::Ship { ferry, conns: [None; 2], message: answer });
                }
                Some(record.serial)
            }
            Ok(Message::Taken { serial } | Message::Refused { serial } | Message::Bytes { serial, .. }) => Some(serial),
            Ok(Message::Done) => None,
            Err(Unread(serial)) => serial,
        };
        self.refuse(place, refused, conns, message, now, outbox);
    }

    /// What came with the message stays where it was.
    fn refuse(
        &mut self,
        place: usize,
        serial: Option<u32>,
        conns: [Option<ConnId>; 2],
        message: Buf,
        now: Instant,
        outbox: &mut Outbox,
    ) {
        let ferry = self.landings[place].ferry;
        let Some(serial) = serial else {
            // Nobody waits for an answer.
            self.report.add(Counter::LandingsRefused, 1);
            self.landings[place].now = Step::Fetching;
            conns.into_iter().flatten().for_each(|conn| outbox.push(Command::Close { conn, abort: false }));
            outbox.peeks.release(message);
            return outbox.push(Command::Fetch { ferry });
        };
        let Some(answer) = head_only(Message::Refused { serial }, outbox) else {
            return self.wait(place, conns, message, now, outbox);
        };
        self.report.add(Counter::LandingsRefused, 1);
        self.landings[place].now = Step::Answering(None);
        // Before the answer: whoever goes on with them there is then the only one who holds them.
        conns.into_iter().flatten().for_each(|conn| outbox.push(Command::Close { conn, abort: false }));
        outbox.peeks.release(message);
        outbox.push(Command::Ship { ferry, conns: [None; 2], message: answer });
    }

    fn wait(&mut self, place: usize, conns: [Option<ConnId>; 2], message: Buf, now: Instant, _: &mut Outbox) {
        self.report.add(Counter::BufferWaits, 1);
        self.landings[place].now = Step::Waiting { until: now.after(AGAIN), conns, message };
    }

    /// Try again what waits for buffers.
    pub(super) fn land_some(&mut self, now: Instant, outbox: &mut Outbox) {
        let mut place = 0;
        while place < self.landings.len() {
            let (count, landing) = (self.landings.len(), &mut self.landings[place]);
            let is_due = matches!(landing.now, Step::Waiting { until, .. } if until <= now);
            if is_due && let Step::Waiting { conns, message, .. } = std::mem::replace(&mut landing.now, Step::Fetching)
            {
                self.take(place, conns, message, now, outbox);
            }
            place += usize::from(self.landings.len() == count);
        }
    }

    /// When `land_some` has something to do.
    pub(super) fn landing_due(&self) -> Option<Instant> {
        let waiting = self.landings.iter().filter_map(|landing| match landing.now {
            Step::Waiting { until, .. } => Some(until),
            _ => None,
        });
        waiting.min()
    }

    /// The answer is with the kernel: what it speaks of is so.
    pub(super) fn answer_shipped(&mut self, ferry: Given, now: Instant, outbox: &mut Outbox) {
        let Some(landing) = self.landings.iter_mut().find(|landing| landing.ferry == ferry) else { return };
        let Step::Answering(boarding) = std::mem::replace(&mut landing.now, Step::Fetching) else { return };
        outbox.push(Command::Fetch { ferry });
        if let Some(boarding) = boarding {
            self.board(*boarding, now, outbox);
        }
    }

    fn board(&mut self, boarding: Boarding, now: Instant, outbox: &mut Outbox) {
        self.report.add(Counter::Landed, 1);
        let Some(client) = boarding.conns[CLIENT] else { return };
        self.strangers -= boarding.conns.iter().flatten().count() as u32;
        if !boarding.is_relay {
            // `begin` counts it as opened, and it has been counted.
            self.report.less(Counter::Open);
            let id = self.begin(boarding.listener, client, boarding.accepted);
            // It keeps its name.
            self.sessions[id as usize].accepted = boarding.accepted;
            let place = self.sessions[id as usize].extra;
            let due = now.after(self.config.listen[boarding.listener.0 as usize].sniff_timeout);
            let wait = self.waits.at(place);
            wait.deadline = due;
            wait.given_up = (boarding.patience_ns > 0).then(|| now.after(Duration::from_nanos(boarding.patience_ns)));
            self.waits.set_due(place, Some(due));
            outbox.push(Command::Name { conn: client });
            // Once it is resumed, what has come is taken unless somebody only looks at it.
            outbox.push(Command::Peek { conn: client });
            return outbox.push(Command::Resume { conn: client });
        }
        let Some(service) = boarding.conns[SERVICE] else { return };
        let id = self.free_sessions.pop().unwrap_or_else(|| {
            self.sessions.push(Session::default());
            self.sessions.len() as u32 - 1
        });
        let mut session = Session {
            conns: [client, service],
            bytes: boarding.bytes,
            accepted: boarding.accepted,
            peer: boarding.peer,
            listener: boarding.listener,
            sides: boarding.sides.map(told).map(|flags| flags | OPEN),
            state: State::Relaying,
            ..Session::default()
        };
        session.service = self.services.add(boarding.service.as_str()) + 1;
        if let Some(peer) = boarding.peer {
            session.source = self.sources.add(&Prefix::of(peer.ip())) + 1;
        }
        for (side, queue) in boarding.queued.into_iter().enumerate() {
            for buf in queue {
                // It came in here, too.
                self.report.add(Counter::BytesIn, buf.len() as u64);
                self.queues.push(&mut session.extra, side, buf);
            }
        }
        self.sessions[id as usize] = session;
        for (side, conn) in [(CLIENT, client), (SERVICE, service)] {
            self.lines.write(conn.index, Line::of(id, side, conn));
        }
        self.report.add(Counter::Relaying, 1);
        self.go_on(id, outbox);
    }

    /// Nobody is there any more; what was not answered is not this process's.
    pub(super) fn landing_lost(&mut self, ferry: Given, outbox: &mut Outbox) {
        let Some(place) = self.landings.iter().position(|landing| landing.ferry == ferry) else { return };
        self.report.add(Counter::FerriesLost, 1);
        self.end_landing(place, outbox);
    }

    fn end_landing(&mut self, place: usize, outbox: &mut Outbox) {
        let Landing { ferry, mut before, now, .. } = self.landings.remove(place);
        self.report.less(Counter::Ferries);
        before.iter_mut().for_each(|queue| release(queue, &mut outbox.buffers));
        let conns = match now {
            Step::Waiting { conns, message, .. } => {
                outbox.peeks.release(message);
                conns
            }
            Step::Answering(Some(mut boarding)) => {
                boarding.queued.iter_mut().for_each(|queue| release(queue, &mut outbox.buffers));
                boarding.conns
            }
            Step::Answering(None) | Step::Fetching => [None; 2],
        };
        conns.into_iter().flatten().for_each(|conn| outbox.push(Command::Close { conn, abort: false }));
        outbox.push(Command::CloseFerry { ferry });
    }

    /// All is to end: nothing more is taken.
    pub(super) fn stop_landing(&mut self, outbox: &mut Outbox) {
        while !self.landings.is_empty() {
            self.end_landing(0, outbox);
        }
    }
}

impl Boarding {
    fn of(record: &Record<'_>, is_relay: bool, conns: [Option<ConnId>; 2]) -> Boarding {
        Boarding {
            is_relay,
            conns,
            listener: ListenerId(record.listener),
            peer: record.peer,
            // The clock is the host's; only another time namespace has another one (time_namespaces(7)).
            accepted: Instant(record.accepted_ns),
            patience_ns: record.patience_ns,
            sides: record.sides,
            bytes: record.bytes,
            service: record.service.to_owned(),
            queued: Default::default(),
        }
    }
}

/// The flags of a side.
fn told(said: u8) -> u8 {
    let flags = [(record::FINISHED, FINISHED), (record::SHUT, SHUT), (record::GONE, GONE)];
    flags.iter().filter(|(known, _)| said & known != 0).map(|(_, flag)| flag).sum()
}

/// Put bytes behind others; all of them, or none if there are not enough buffers.
fn append(queue: &mut VecDeque<Buf>, bytes: &[u8], buffers: &mut Buffers) -> bool {
    let before = queue.len();
    for chunk in bytes.chunks(buffers.buffer_bytes()) {
        match buffers.write(chunk) {
            Some(buf) => queue.push_back(buf),
            None => {
                queue.drain(before..).for_each(|buf| buffers.release(buf));
                return false;
            }
        }
    }
    true
}

fn release(queue: &mut VecDeque<Buf>, buffers: &mut Buffers) {
    queue.drain(..).for_each(|buf| buffers.release(buf));
}
