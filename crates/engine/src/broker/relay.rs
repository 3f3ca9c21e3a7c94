//! Carrying bytes between the two sides of a session: one send outstanding per side, what comes meanwhile waits and its
//! sender is paused, an end of stream is passed on behind the last byte.
//!
//! Decides when a side is read, sent to, told of the end, and when both are done. Holds no buffer while nothing moves.

use std::collections::VecDeque;

use super::BrokerCore;
use super::guide::Guide;
use super::ledger::{Ledger, Reason};
use super::session::{CLIENT, CLOSING, FINISHED, GONE, OVERHEARD, PAUSED, SENDING, SERVICE, SHUT, Session, State};
use crate::buffers::{Buf, Buffers};
use crate::contract::{Command, ConnId, Instant, Outbox};
use crate::report::Counter;

/// Buffers that wait behind the one under way, for sessions that have such; by the side that they are for.
#[derive(Debug, Default)]
pub(super) struct Queues {
    places: Vec<[VecDeque<Buf>; 2]>,
    free: Vec<u32>,
}

impl Queues {
    /// Put `buf` behind the others for `side`; `extra` is the session's place, plus one.
    pub(super) fn push(&mut self, extra: &mut u32, side: usize, buf: Buf) {
        if *extra == 0 {
            *extra = self.free.pop().unwrap_or_else(|| {
                self.places.push(Default::default());
                self.places.len() as u32
            });
        }
        self.places[*extra as usize - 1][side].push_back(buf);
    }

    /// The next buffer for `side`. A place with nothing left for either side is given back.
    pub(super) fn pop(&mut self, extra: &mut u32, side: usize) -> Option<Buf> {
        let place = self.places.get_mut(extra.checked_sub(1)? as usize)?;
        let buf = place[side].pop_front();
        if place.iter().all(VecDeque::is_empty) {
            self.free.push(std::mem::take(extra));
        }
        buf
    }

    /// Put `buf` before the others for `side`.
    pub(super) fn push_front(&mut self, extra: &mut u32, side: usize, buf: Buf) {
        self.push(extra, side, buf);
        self.places[*extra as usize - 1][side].rotate_right(1);
    }

    /// What waits for `side`, in order.
    pub(super) fn waiting(&self, extra: u32, side: usize) -> impl Iterator<Item = &Buf> + Clone {
        let place = extra.checked_sub(1).and_then(|place| self.places.get(place as usize));
        place.into_iter().flat_map(move |place| place[side].iter())
    }

    pub(super) fn drop_all(&mut self, extra: u32, buffers: &mut Buffers) {
        if let Some(place) = extra.checked_sub(1) {
            self.places[place as usize]
                .iter_mut()
                .flat_map(|queue| queue.drain(..))
                .for_each(|buf| buffers.release(buf));
            self.free.push(extra);
        }
    }

    pub(super) fn check<'a>(&self, sessions: impl Iterator<Item = &'a Session>) -> bool {
        let carries = |session: &&Session| match session.state {
            State::Relaying => true,
            State::Moving => !session.has_wait,
            _ => false,
        };
        let used = sessions.filter(carries).filter(|session| session.extra != 0).count();
        used + self.free.len() == self.places.len()
    }
}

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    pub(super) fn received(&mut self, conn: ConnId, buf: Buf, now: Instant, outbox: &mut Outbox) {
        if let Some((id, SERVICE)) = self.find(conn, State::Asking) {
            return self.service_answered(id, buf, now, outbox);
        }
        let carries = |(id, _): &(u32, usize)| {
            let session = &self.sessions[*id as usize];
            session.state == State::Relaying || session.state == State::Moving && !session.has_wait
        };
        let Some((id, from)) = self.whose(conn).filter(|it| carries(it) && !buf.is_empty()) else {
            return outbox.buffers.release(buf);
        };
        let to = 1 - from;
        let session = &mut self.sessions[id as usize];
        session.bytes[from] += buf.len() as u64;
        self.report.add(Counter::BytesIn, buf.len() as u64);
        if session.sides[from] & OVERHEARD != 0 && from == SERVICE {
            let goes_on = self.guide.overhears(id, outbox.buffers.bytes(&buf));
            session.sides[SERVICE] &= if goes_on { !0 } else { !OVERHEARD };
        }
        if session.state == State::Moving {
            // It goes along.
            return self.queues.push(&mut session.extra, to, buf);
        }
        if session.sides[to] & SENDING == 0 {
            session.sides[to] |= SENDING;
            self.report.add(Counter::BytesOut, buf.len() as u64);
            outbox.push(Command::Send { conn: session.conns[to], buf });
            return;
        }
        self.queues.push(&mut session.extra, to, buf);
        if session.sides[from] & PAUSED == 0 {
            session.sides[from] |= PAUSED;
            self.report.add(Counter::Pauses, 1);
            outbox.push(Command::Pause { conn });
        }
    }

    pub(super) fn sent(&mut self, conn: ConnId, now: Instant, outbox: &mut Outbox) {
        let Some((id, to)) = self.whose(conn) else { return };
        if self.sessions[id as usize].state != State::Relaying {
            return self.told(id, to, now, outbox);
        }
        let from = 1 - to;
        let session = &mut self.sessions[id as usize];
        if let Some(buf) = self.queues.pop(&mut session.extra, to) {
            self.report.add(Counter::BytesOut, buf.len() as u64);
            outbox.push(Command::Send { conn, buf });
            return;
        }
        session.sides[to] &= !SENDING;
        if session.sides[from] & PAUSED != 0 {
            session.sides[from] &= !PAUSED;
            outbox.push(Command::Resume { conn: session.conns[from] });
        }
        self.pass_on_end(id, from, outbox);
    }

    /// If `from` has said its last byte and the other side has it, say so there; when both are done, so is the session. It
    /// is, too, when `from` takes no more: what the other side still says is answered by RST, as by the service itself.
    pub(super) fn pass_on_end(&mut self, id: u32, from: usize, outbox: &mut Outbox) {
        let to = 1 - from;
        let session = &mut self.sessions[id as usize];
        let is_over = |sides: [u8; 2], from: usize| sides[from] & FINISHED != 0 && sides[1 - from] & SENDING == 0;
        if !is_over(session.sides, from) || session.sides[to] & (SHUT | CLOSING) != 0 {
            return;
        }
        session.sides[to] |= SHUT;
        if session.sides[from] & (GONE | SENDING) == GONE | SENDING {
            return self.end(id, broke(from), true, outbox);
        }
        let both = is_over(session.sides, CLIENT) && is_over(session.sides, SERVICE);
        if both || session.sides[from] & GONE != 0 {
            // Closing sends the FIN.
            return self.end(id, Reason::Relayed, false, outbox);
        }
        outbox.push(Command::Shutdown { conn: session.conns[to] });
    }
}

/// Why a session ends whose side has broken off.
pub(super) fn broke(side: usize) -> Reason {
    if side == SERVICE { Reason::ServiceBroke } else { Reason::ClientBroke }
}
