//! Moving connections to another process: which ones, when, and what becomes of those that it does not take.
//!
//! Decides the order: a connection is halted, shipped with its record and with every byte that is on its way here, and
//! closed here only when the other process has said that it has it. Until then it can go on here as if nothing had been.
//! The other end is in `land`, the layout in `record`. Knows no socket.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use super::BrokerCore;
use super::guide::Guide;
use super::ledger::{Ledger, Reason};
use super::record::{self, Message, Record};
use super::session::{CLIENT, FINISHED, GONE, OPEN, PAUSED, SENDING, SERVICE, SHUT, Session, State};
use crate::buffers::Buf;
use crate::contract::{Command, ConnId, Given, Instant, Outbox};
use crate::report::Counter;

/// Connections on their way at once. Each has two descriptors in flight, of which RLIMIT_NOFILE bounds the sum per user.
const AT_ONCE: usize = 64;
/// Sessions looked at per step.
const SCAN: u32 = 1024;
/// Those that cannot be moved yet are looked at again after so long; so is a want of buffers.
const AGAIN: Duration = Duration::from_millis(5);

/// A ferry, as who sends.
#[derive(Debug)]
pub(super) struct Ferrying {
    ferry: Given,
    /// The last record's.
    serial: u32,
    /// Sessions by the serial of their record, which is not answered.
    unanswered: HashMap<u32, u32>,
    /// Sessions that are halted and not shipped.
    ready: VecDeque<u32>,
    /// A `Ship` is outstanding.
    shipping: bool,
    /// The next session to look at.
    next: u32,
    /// When to look at them again from the first on, or for a buffer again.
    again: Option<Instant>,
    /// Nothing more is moved than what is on its way.
    stopped: bool,
    /// `Done` is said.
    done: bool,
}

/// A session on its way; it is in state `Moving`.
#[derive(Debug)]
pub(super) struct Move {
    /// What it was.
    from: State,
    /// Answers outstanding to `Halt`.
    halts: u8,
    /// Bytes for each side that went before the record.
    before: [u32; 2],
    /// The record's, once one is begun.
    serial: u32,
}

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    /// Move what there is to whoever is at the other end.
    pub(super) fn ferry(&mut self, ferry: Given, outbox: &mut Outbox) {
        if self.ferrying.is_some() || self.closing.is_some() {
            return outbox.push(Command::CloseFerry { ferry });
        }
        self.stop_listening(outbox);
        // Whoever was refused before may be taken by another one.
        self.sessions.iter_mut().for_each(|session| session.stays = false);
        outbox.push(Command::OpenFerry { ferry });
        outbox.push(Command::Fetch { ferry });
        self.report.add(Counter::Ferries, 1);
        self.ferrying = Some(Ferrying {
            ferry,
            serial: 0,
            unanswered: HashMap::new(),
            ready: VecDeque::new(),
            shipping: false,
            next: 0,
            again: None,
            stopped: false,
            done: false,
        });
    }

    /// Move nothing more than what is on its way.
    pub(super) fn stop_ferrying(&mut self) {
        if let Some(ferrying) = &mut self.ferrying {
            ferrying.stopped = true;
        }
    }

    /// Halt what can be moved, ship what is halted, and say when all is done; a bounded part of it.
    pub(super) fn ferry_some(&mut self, now: Instant, outbox: &mut Outbox) {
        let Some(ferrying) = &mut self.ferrying else { return };
        if ferrying.again.is_some_and(|again| again <= now) {
            ferrying.again = None;
            if ferrying.next as usize >= self.sessions.len() {
                ferrying.next = 0;
            }
        }
        for _ in 0..SCAN {
            let Some(ferrying) = &mut self.ferrying else { return };
            if ferrying.stopped || self.moves.len() >= AT_ONCE || ferrying.next as usize >= self.sessions.len() {
                break;
            }
            let id = ferrying.next;
            ferrying.next += 1;
            if self.is_movable(id) {
                self.halt(id, outbox);
            }
        }
        self.ship_next(now, outbox);
        let held = self.sessions.len() - self.free_sessions.len();
        let Some(ferrying) = &mut self.ferrying else { return };
        let is_idle = self.moves.is_empty() && !ferrying.shipping && !ferrying.done;
        if is_idle && (ferrying.stopped || held == 0 && self.listens_under_way == 0) {
            let Some(buf) = head_only(Message::Done, outbox) else {
                ferrying.again = Some(now.after(AGAIN));
                return;
            };
            (ferrying.done, ferrying.shipping) = (true, true);
            outbox.push(Command::Ship { ferry: ferrying.ferry, conns: [None; 2], message: buf });
        } else if ferrying.next as usize >= self.sessions.len() && held > self.moves.len() {
            ferrying.again.get_or_insert(now.after(AGAIN));
        }
    }

    /// When `ferry_some` has something to do that no event tells.
    pub(super) fn ferry_due(&self) -> Option<Instant> {
        let ferrying = self.ferrying.as_ref()?;
        let more = !ferrying.stopped && self.moves.len() < AT_ONCE && (ferrying.next as usize) < self.sessions.len();
        if more { Some(Instant(0)) } else { ferrying.again }
    }

    /// A relay at any time; before that whoever has been told nothing, has lost no byte, and for whom nothing is under way.
    fn is_movable(&self, id: u32) -> bool {
        let Session { state, sides, extra, stays, .. } = self.sessions[id as usize];
        let is_untouched = || {
            sides[CLIENT] & SENDING == 0
                && self.waits.get(extra).is_some_and(|wait| {
                    let is_free = !wait.reaching && !wait.handing && !wait.last_look && wait.parting.is_none();
                    let is_talked_to =
                        wait.touched || wait.replied || wait.is_asleep || wait.was_told || wait.on_errand;
                    is_free && wait.named && !is_talked_to
                })
        };
        !stays
            && match state {
                State::Relaying => true,
                State::Sniffing | State::Delivering => is_untouched(),
                State::Asking | State::Leaving | State::Moving | State::Ending | State::Free => false,
            }
    }

    fn halt(&mut self, id: u32, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        let from = session.state;
        self.report.less(from.gauge());
        self.report.add(Counter::Moving, 1);
        session.has_wait = from != State::Relaying;
        session.state = State::Moving;
        let (place, service, has_wait) = (session.extra, session.service, session.has_wait);
        if has_wait {
            self.waits.set_due(place, None);
            self.consult_no_more(place);
            if let Some(row) = service.checked_sub(1) {
                self.waits.leave_line(row, place);
                self.unpark(place, row);
            }
        }
        let session = &self.sessions[id as usize];
        let mut halts = 0;
        for side in [CLIENT, SERVICE] {
            if session.sides[side] & OPEN != 0 {
                halts += 1;
                outbox.push(Command::Halt { conn: session.conns[side] });
            }
        }
        self.moves.insert(id, Move { from, halts, before: [0; 2], serial: 0 });
    }

    pub(super) fn halted(&mut self, conn: ConnId, rest: Option<Buf>, now: Instant, outbox: &mut Outbox) {
        let found = self.find(conn, State::Moving);
        let Some((id, side, moving)) = found.and_then(|(id, side)| Some((id, side, self.moves.get_mut(&id)?))) else {
            rest.into_iter().for_each(|buf| outbox.buffers.release(buf));
            return;
        };
        moving.halts -= 1;
        let is_still = moving.halts == 0;
        let session = &mut self.sessions[id as usize];
        session.sides[side] &= !SENDING;
        if let Some(buf) = rest {
            self.queues.push_front(&mut session.extra, side, buf);
        }
        match &mut self.ferrying {
            Some(ferrying) if is_still => ferrying.ready.push_back(id),
            // The ferry is gone meanwhile.
            None if is_still => self.go_on_here(id, now, outbox),
            _ => {}
        }
    }

    /// Ship a part of the first that is ready, unless something is being shipped.
    fn ship_next(&mut self, now: Instant, outbox: &mut Outbox) {
        let Some(ferrying) = &mut self.ferrying else { return };
        while !ferrying.shipping
            && let Some(&id) = ferrying.ready.front()
        {
            let Some(moving) = self.moves.get_mut(&id).filter(|it| it.halts == 0) else {
                // It has ended, and another may be in its place.
                ferrying.ready.pop_front();
                continue;
            };
            let Some(mut buf) = outbox.peeks.take() else {
                ferrying.again = Some(now.after(AGAIN));
                return;
            };
            if moving.serial == 0 {
                ferrying.serial = ferrying.serial.wrapping_add(1).max(1);
                moving.serial = ferrying.serial;
            }
            let session = &self.sessions[id as usize];
            let (length, is_last) = match moving.from {
                State::Relaying => {
                    let service = session.service.checked_sub(1).map_or("", |row| self.services.key(row));
                    let record = record_of(session, moving, service);
                    let queued = [CLIENT, SERVICE].map(|side| self.queues.waiting(session.extra, side));
                    let (memory, buffers) = (outbox.peeks.memory(&buf), &outbox.buffers);
                    pack(memory, &record, moving, queued.map(|queue| queue.map(|buf| buffers.bytes(buf))))
                }
                _ => {
                    let mut record = record_of(session, moving, "");
                    let wait = self.waits.at(session.extra);
                    if moving.from == State::Delivering {
                        // It is looked at again, and waits no longer for that.
                        record.patience_ns = wait.deadline.0.saturating_sub(now.0).max(1);
                    }
                    (record::write_record(outbox.peeks.memory(&buf), false, &record, [0; 2]), true)
                }
            };
            outbox.peeks.set_len(&mut buf, length);
            let conns = [CLIENT, SERVICE]
                .map(|side| (is_last && session.sides[side] & OPEN != 0).then_some(session.conns[side]));
            if is_last {
                ferrying.ready.pop_front();
                ferrying.unanswered.insert(moving.serial, id);
            }
            ferrying.shipping = true;
            outbox.push(Command::Ship { ferry: ferrying.ferry, conns, message: buf });
        }
    }

    /// Whether it is the ferry of this core's own connections.
    pub(super) fn is_ferrying(&self, ferry: Given) -> bool {
        self.ferrying.as_ref().is_some_and(|it| it.ferry == ferry)
    }

    pub(super) fn shipped(&mut self, now: Instant, outbox: &mut Outbox) {
        let Some(ferrying) = &mut self.ferrying else { return };
        ferrying.shipping = false;
        if ferrying.done {
            let ferry = ferrying.ferry;
            self.end_ferry(ferry, outbox);
            return;
        }
        self.ship_next(now, outbox);
    }

    fn end_ferry(&mut self, ferry: Given, outbox: &mut Outbox) {
        self.ferrying = None;
        self.report.less(Counter::Ferries);
        outbox.push(Command::CloseFerry { ferry });
    }

    /// What the other process says of a connection.
    pub(super) fn ferry_answered(&mut self, ferry: Given, message: &Buf, now: Instant, outbox: &mut Outbox) {
        let said = match record::read(outbox.peeks.bytes(message)) {
            Ok(Message::Taken { serial }) => Some((serial, true)),
            Ok(Message::Refused { serial }) => Some((serial, false)),
            _ => None,
        };
        outbox.push(Command::Fetch { ferry });
        let Some((serial, is_taken)) = said else { return self.report.add(Counter::LandingsRefused, 1) };
        let id = self.ferrying.as_mut().and_then(|ferrying| ferrying.unanswered.remove(&serial));
        let Some(id) = id.filter(|id| self.moves.get(id).is_some_and(|it| it.serial == serial)) else { return };
        if is_taken {
            return self.end(id, Reason::Moved, false, outbox);
        }
        self.sessions[id as usize].stays = true;
        self.report.add(Counter::MovesReturned, 1);
        self.go_on_here(id, now, outbox);
    }

    /// Nobody takes any more: all that is on its way goes on here.
    pub(super) fn ferry_lost(&mut self, now: Instant, outbox: &mut Outbox) {
        let Some(Ferrying { ferry, unanswered, done, .. }) = self.ferrying.take() else { return };
        self.ferrying = None;
        self.report.less(Counter::Ferries);
        self.report.add(Counter::FerriesLost, u64::from(!done));
        outbox.push(Command::CloseFerry { ferry });
        let shipped =
            unanswered.iter().filter(|(serial, id)| self.moves.get(id).is_some_and(|it| it.serial == **serial));
        self.report.add(Counter::MovesReturned, shipped.count() as u64);
        let mut still: Vec<u32> = self.moves.iter().filter(|(_, it)| it.halts == 0).map(|(id, _)| *id).collect();
        still.sort_unstable();
        for id in still {
            self.go_on_here(id, now, outbox);
        }
    }

    /// The session is not moved: it goes on where it was.
    fn go_on_here(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let Some(Move { from, .. }) = self.moves.remove(&id) else { return };
        self.report.less(Counter::Moving);
        self.report.add(from.gauge(), 1);
        let session = &mut self.sessions[id as usize];
        (session.state, session.has_wait) = (from, false);
        let (place, conn) = (session.extra, session.conns[CLIENT]);
        match from {
            State::Relaying => self.go_on(id, outbox),
            State::Delivering => self.waits.set_due(place, Some(now)),
            _ => {
                let deadline = self.waits.at(place).deadline;
                self.waits.set_due(place, Some(deadline));
                outbox.push(Command::Resume { conn });
                if session.sides[CLIENT] & FINISHED != 0 {
                    return self.look(id, None, true, now, outbox);
                }
                outbox.push(Command::Peek { conn });
            }
        }
    }

    /// Carry bytes again between two sides that are halted: first what waits for them.
    pub(super) fn go_on(&mut self, id: u32, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        for to in [CLIENT, SERVICE] {
            if let Some(buf) = self.queues.pop(&mut session.extra, to) {
                session.sides[to] |= SENDING;
                self.report.add(Counter::BytesOut, buf.len() as u64);
                outbox.push(Command::Send { conn: session.conns[to], buf });
            }
            let from = 1 - to;
            if self.queues.waiting(session.extra, to).next().is_some() {
                session.sides[from] |= PAUSED;
            } else {
                session.sides[from] &= !PAUSED;
                outbox.push(Command::Resume { conn: session.conns[from] });
            }
        }
        for from in [CLIENT, SERVICE] {
            if self.sessions[id as usize].state == State::Relaying {
                self.pass_on_end(id, from, outbox);
            }
        }
    }
}

fn record_of<'a>(session: &Session, moving: &Move, service: &'a str) -> Record<'a> {
    let told = |side: usize| {
        let flags = [(FINISHED, record::FINISHED), (SHUT, record::SHUT), (GONE, record::GONE)];
        flags.iter().filter(|(flag, _)| session.sides[side] & flag != 0).map(|(_, said)| said).sum()
    };
    Record {
        serial: moving.serial,
        listener: session.listener.0,
        peer: session.peer,
        accepted_ns: session.accepted.0,
        patience_ns: 0,
        sides: [told(CLIENT), told(SERVICE)],
        bytes: session.bytes,
        before: moving.before,
        service,
        queued: [b""; 2],
    }
}

/// The record with the bytes that are left, or as many of those as a message holds; its length, and whether it was the record.
fn pack<'a>(
    memory: &mut [u8],
    record: &Record<'_>,
    moving: &mut Move,
    queued: [impl Iterator<Item = &'a [u8]> + Clone; 2],
) -> (usize, bool) {
    let counts = [0, 1].map(|side| queued[side].clone().map(<[u8]>::len).sum::<usize>() as u32 - moving.before[side]);
    let room = record::MOST_BYTES.min(memory.len());
    let all = counts.iter().map(|count| *count as usize).sum::<usize>();
    let most_head = record::MOST_NAME_BYTES + 128;
    let is_last = all + most_head <= room;
    let side = usize::from(counts[0] == 0);
    let (start, wanted) = match is_last {
        true => (record::write_record(memory, true, record, counts), counts.map(|count| count as usize)),
        false => {
            let mut wanted = [0; 2];
            wanted[side] = (counts[side] as usize).min(room - most_head);
            (record::write_bytes(memory, record.serial, side), wanted)
        }
    };
    let mut end = start;
    for (side, queue) in queued.into_iter().enumerate() {
        let (mut passed, mut left) = (moving.before[side] as usize, wanted[side]);
        for bytes in queue {
            let skipped = passed.min(bytes.len());
            passed -= skipped;
            let taken = (bytes.len() - skipped).min(left);
            memory[end..end + taken].copy_from_slice(&bytes[skipped..skipped + taken]);
            (end, left) = (end + taken, left - taken);
        }
        if !is_last {
            moving.before[side] += wanted[side] as u32;
        }
    }
    (end, is_last)
}

/// A message of the head alone, if a buffer is free.
pub(super) fn head_only(message: Message<'_>, outbox: &mut Outbox) -> Option<Buf> {
    let mut buf = outbox.peeks.take()?;
    let length = record::write(outbox.peeks.memory(&buf), message);
    outbox.peeks.set_len(&mut buf, length);
    Some(buf)
}
