//! How connections end: one reason each, both sides closed, one entry in the ledger, and nothing left of them.
//!
//! Decides what an end of stream and an error mean in each state. Knows no cause of its own.

use super::guide::Guide;
use super::ledger::{Ended, Ledger, Passed, Passing, Reason};
use super::session::{CLIENT, CLOSING, FINISHED, GONE, Line, OPEN, OVERHEARD, SERVICE, SHUT, Session, State};
use super::{BURST, BrokerCore, relay};
use crate::contract::{Command, ConnId, Errno, Instant, Outbox, Step};
use crate::report::Counter;

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    /// Nothing more is done for the connection than closing what is open of it.
    pub(super) fn end(&mut self, id: u32, reason: Reason, abort: bool, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        if matches!(session.state, State::Ending | State::Free) {
            return;
        }
        self.report.less(session.state.gauge());
        let carries = session.state == State::Relaying || session.state == State::Moving && !session.has_wait;
        if session.state == State::Moving {
            self.moves.remove(&id);
        }
        match carries {
            true => {
                self.queues.drop_all(session.extra, &mut outbox.buffers);
                session.extra = 0;
            }
            false => {
                self.waits.set_due(session.extra, None);
                let (place, row) = (session.extra, session.service.checked_sub(1));
                if let Some(row) = row {
                    self.waits.leave_line(row, place);
                    self.unpark(place, row);
                }
                self.consult_no_more(place);
                let wait = self.waits.at(place);
                wait.handing = false;
                if wait.reaching {
                    outbox.push(Command::CancelConnect { ticket: place });
                }
            }
        }
        let session = &mut self.sessions[id as usize];
        session.has_wait = !carries;
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

    pub(super) fn finished(&mut self, conn: ConnId, gone: bool, now: Instant, outbox: &mut Outbox) {
        let Some((id, side)) = self.whose(conn) else { return };
        let session = &mut self.sessions[id as usize];
        if session.sides[side] & (FINISHED | CLOSING) != 0 {
            return;
        }
        session.sides[side] |= if gone { FINISHED | GONE } else { FINISHED };
        match session.state {
            // It said nothing and will say nothing: only a service that speaks first can want it.
            State::Sniffing => self.look(id, None, true, now, outbox),
            State::Relaying => self.pass_on_end(id, side, outbox),
            State::Asking if side == SERVICE => match self.on_errand(id) {
                true => self.end_errand(id, now, outbox),
                false => self.end(id, Reason::ServiceDeclined, true, outbox),
            },
            // It has heard everything.
            State::Leaving if session.sides[side] & SHUT != 0 => self.leave(id, outbox),
            State::Delivering | State::Asking | State::Leaving | State::Moving | State::Ending | State::Free => {}
        }
    }

    /// The client has been told why it ends, as far as the kernel: no more is said, and it may close now.
    pub(super) fn told_farewell(&mut self, id: u32, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        session.sides[CLIENT] |= SHUT;
        if session.sides[CLIENT] & FINISHED != 0 {
            return self.leave(id, outbox);
        }
        outbox.push(Command::Shutdown { conn: session.conns[CLIENT] });
    }

    /// The client has closed, or had its time to.
    pub(super) fn leave(&mut self, id: u32, outbox: &mut Outbox) {
        let Session { reason, sides, .. } = self.sessions[id as usize];
        self.end(id, reason, sides[CLIENT] & SHUT == 0, outbox);
    }

    pub(super) fn failed(&mut self, conn: ConnId, step: Step, error: Errno, now: Instant, outbox: &mut Outbox) {
        let Some((id, side)) = self.whose(conn) else { return };
        let session = &self.sessions[id as usize];
        if session.sides[side] & CLOSING != 0 {
            return;
        }
        self.report.failed(step, error);
        if side == SERVICE && self.on_errand(id) {
            return self.end_errand(id, now, outbox);
        }
        let reason = match session.state {
            State::Relaying => relay::broke(side),
            State::Moving if !session.has_wait => relay::broke(side),
            State::Asking if side == SERVICE => Reason::ServiceDeclined,
            State::Leaving => session.reason,
            _ => Reason::ClientLeft,
        };
        self.end(id, reason, true, outbox);
    }

    pub(super) fn closed(&mut self, conn: ConnId, now: Instant, outbox: &mut Outbox) {
        let Some((id, side)) = self.whose(conn) else {
            self.strangers -= 1;
            return self.report.less(Counter::Open);
        };
        self.lines.write(conn.index, Line::default());
        let session = &mut self.sessions[id as usize];
        if session.sides[side] & CLOSING != 0 {
            self.closes_under_way -= 1;
        }
        session.sides[side] &= OVERHEARD;
        self.report.less(Counter::Open);
        if side == SERVICE && self.on_errand(id) {
            return self.errand_closed(id, now, outbox);
        }
        self.free(id, now);
    }

    /// Tell the ledger how far the connection has come.
    pub(super) fn passed(&mut self, id: u32, how_far: Passing) {
        let session = &self.sessions[id as usize];
        self.ledger.passed(&Passed {
            id: session.accepted.0,
            peer: session.peer,
            service: session.service.checked_sub(1).map_or("", |row| self.services.key(row)),
            how_far,
        });
    }

    /// Forget the connection once nothing of it is left.
    pub(super) fn free(&mut self, id: u32, now: Instant) {
        let session = self.sessions[id as usize];
        let reaching = session.has_wait && self.waits.at(session.extra).reaching;
        if session.state != State::Ending || session.sides.iter().any(|side| side & OPEN != 0) || reaching {
            return;
        }
        self.report.add(session.reason.counter(), 1);
        self.ledger.ended(&Ended {
            id: session.accepted.0,
            peer: session.peer,
            service: session.service.checked_sub(1).map_or("", |row| self.services.key(row)),
            reason: session.reason,
            accepted: session.accepted,
            ended: now,
            bytes_up: session.bytes[CLIENT],
            bytes_down: session.bytes[SERVICE],
        });
        if let Some(row) = session.service.checked_sub(1) {
            self.past.ended(self.services.key(row), session.bytes);
            if self.services.count(row) == 1 {
                self.sleepers.unused(self.services.tag(row), now);
            }
            self.services.less(row);
        }
        if let Some(row) = session.source.checked_sub(1) {
            self.sources.less(row);
        }
        if session.has_wait {
            self.waits.end(session.extra);
        }
        if session.sides[CLIENT] & OVERHEARD != 0 {
            self.guide.forgets(id);
        }
        self.sessions[id as usize] = Session::default();
        self.free_sessions.push(id);
    }

    /// Close what is open, a bounded number per turn.
    pub(super) fn close_some(&mut self, outbox: &mut Outbox) {
        let Some(mut next) = self.closing else { return };
        let mut scan = BURST * 16;
        while self.closes_under_way < BURST && scan > 0 && (next as usize) < self.sessions.len() {
            self.end(next, Reason::Stopped, false, outbox);
            (next, scan) = (next + 1, scan - 1);
        }
        self.closing = Some(next);
    }

    pub(super) fn has_more_to_close(&self) -> bool {
        self.closing.is_some_and(|next| (next as usize) < self.sessions.len())
    }
}
