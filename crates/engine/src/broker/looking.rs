//! Looking at the first bytes: when the guide is asked, what it may have the client told, and when it is the last time.
//!
//! Decides how much may be looked at and how long. Knows no protocol.

use std::time::Duration;

use super::guide::{Guidance, Guide, Shown};
use super::ledger::{Ledger, Reason};
use super::session::{CLIENT, FINISHED, SENDING, State};
use super::{BACKOFF_MS, BrokerCore, LOOKED_AT_MOST};
use crate::buffers::Buf;
use crate::contract::{Command, ConnId, Instant, Outbox, PEEK_BYTES};
use crate::report::Counter;

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    pub(super) fn peeked(&mut self, conn: ConnId, buf: Buf, now: Instant, outbox: &mut Outbox) {
        if let Some((id, CLIENT)) = self.find(conn, State::Sniffing) {
            let session = &self.sessions[id as usize];
            let wait = self.waits.at(session.extra);
            if !wait.named || session.sides[CLIENT] & SENDING != 0 {
                wait.missed = true;
                return outbox.peeks.release(buf);
            }
            self.look(id, Some(&buf), false, now, outbox);
        }
        outbox.peeks.release(buf);
    }

    /// Ask the guide about the bytes, or about none; `last` says that no more are waited for.
    pub(super) fn look(&mut self, id: u32, buf: Option<&Buf>, last: bool, now: Instant, outbox: &mut Outbox) {
        let session = self.sessions[id as usize];
        let wait = self.waits.at(session.extra);
        let shown = buf.map_or(0, Buf::len) as u32;
        wait.looked_at = wait.looked_at.saturating_add(shown.max(1));
        wait.shown = shown;
        let is_long = shown >= self.config.sniff_bytes.min(PEEK_BYTES as u32) || wait.looked_at >= LOOKED_AT_MOST;
        let bytes = buf.map_or(&[][..], |buf| outbox.peeks.bytes(buf));
        let last = is_long || wait.last_look || last;
        if wait.is_asleep {
            let shown = Shown { listener: session.listener, names: wait.names, bytes, last };
            self.said.clear();
            let manner = self.guide.asleep(&shown, &mut wait.memory, &wait.chosen, &mut self.said);
            return self.slept_on(id, manner, last, now, outbox);
        }
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
                wait.touched = true;
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
            Guidance::Found => {
                let Some(row) = self.count_service(id) else {
                    return self.end(id, Reason::OverService, true, outbox);
                };
                if self.is_awake(row, session.extra) {
                    return self.found(id, now, outbox);
                }
                let wait = self.waits.at(session.extra);
                self.said.clear();
                let manner = self.guide.asleep(&shown, &mut wait.memory, &wait.chosen, &mut self.said);
                self.slept_on(id, manner, last, now, outbox);
            }
            Guidance::More if !last => {}
            Guidance::Answer(answer) if !last => self.answer(id, answer, before, now, outbox),
            Guidance::Tell if !last => {
                let wait = self.waits.at(session.extra);
                // There may be more than what is answered now.
                wait.missed |= wait.shown > 0;
                let told = std::mem::take(&mut wait.chosen.told);
                self.answer(id, &told, before, now, outbox);
            }
            Guidance::Consult if !last => {
                let asked = shown.bytes;
                // Room for them is the outside's: they are copied.
                let copy = asked[..asked.len().min(super::consulting::OPENING_BYTES)].to_vec();
                self.consult(id, copy, outbox);
            }
            Guidance::Goodbye => {
                self.said = std::mem::take(&mut self.waits.at(session.extra).chosen.told);
                self.take_leave(id, Reason::ClientLeft, now, outbox);
            }
            // Who is to be answered at last cannot go on in time.
            Guidance::More | Guidance::Answer(_) | Guidance::Tell | Guidance::Consult if is_long => {
                self.end(id, Reason::SniffTooLong, true, outbox);
            }
            Guidance::More | Guidance::NoRoute | Guidance::Unproxied if session.sides[CLIENT] & FINISHED != 0 => {
                self.end(id, Reason::ClientLeft, false, outbox);
            }
            Guidance::More | Guidance::Answer(_) | Guidance::Tell | Guidance::Consult => {
                self.end(id, Reason::SniffDeadline, true, outbox);
            }
            Guidance::NoRoute if last && !is_long && shown.bytes.is_empty() => {
                self.end(id, Reason::SniffDeadline, true, outbox);
            }
            Guidance::NoRoute => self.end(id, Reason::NoRoute, true, outbox),
            Guidance::Garbage | Guidance::Speaks { .. } => self.end(id, Reason::Garbage, true, outbox),
            Guidance::Unproxied => self.end(id, Reason::Unproxied, true, outbox),
        }
    }

    /// Tell the client what it waits for. What it says is looked at only when that is with the kernel.
    pub(super) fn answer(&mut self, id: u32, answer: &[u8], before: G::Memory, now: Instant, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        if answer.len() > outbox.buffers.buffer_bytes() {
            return self.end(id, Reason::SniffTooLong, true, outbox);
        }
        if let Some(buf) = outbox.buffers.write(answer) {
            session.sides[CLIENT] |= SENDING;
            self.waits.at(session.extra).touched = true;
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
    pub(super) fn last_look(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let session = self.sessions[id as usize];
        let wait = self.waits.at(session.extra);
        if now < wait.deadline {
            let deadline = wait.deadline;
            self.waits.set_due(session.extra, Some(deadline));
            outbox.push(Command::Peek { conn: session.conns[CLIENT] });
        } else if session.sides[CLIENT] & SENDING != 0 {
            self.end(id, Reason::SniffDeadline, true, outbox);
        } else if wait.shown == 0 {
            self.look(id, None, true, now, outbox);
        } else {
            // The bytes were not kept: they are asked for once more.
            wait.last_look = true;
            outbox.push(Command::Peek { conn: session.conns[CLIENT] });
        }
    }
}
