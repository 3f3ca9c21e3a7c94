//! What is said to a service before it gets the client's bytes: turns of telling it something and hearing the right answer,
//! because the client has been told that answer in the service's name already.
//!
//! Decides when a turn is over, and that a service which says anything else, more than was asked, too much or nothing in
//! time is declined. What an answer means is the guide's. Nothing goes behind a turn before its answer: the service would
//! have to refuse it (CVE-2021-23214, CVE-2011-0411).

use std::time::Duration;

use super::guide::{Guide, Heard, Turn};
use super::ledger::{Ledger, Reason};
use super::session::{SENDING, SERVICE, State};
use super::{BACKOFF_MS, BrokerCore};
use crate::buffers::Buf;
use crate::contract::{Instant, Outbox};
use crate::report::Counter;

/// What a service may say in one turn: a reply of SMTP has some twenty lines of at most 512 bytes (RFC 5321 4.5.3.1.5).
const HEARD_MOST: usize = 10_240;

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    /// The service is reached, and what goes first (`preface`) is with nobody yet.
    pub(super) fn begin_script(&mut self, id: u32, mut preface: Vec<u8>, now: Instant, outbox: &mut Outbox) {
        let place = self.sessions[id as usize].extra;
        let wait = self.waits.at(place);
        let first = wait.chosen.script.first();
        preface.extend_from_slice(first.map_or(b"", |turn| &turn.say));
        let (waits, deadline) = (first.is_some_and(|turn| turn.expect.is_some()), wait.deadline);
        if !self.begin_with(id, SERVICE, &preface, outbox) {
            // Without it the service would take the proxy for the client.
            return self.end(id, Reason::ServiceUnreachable, true, outbox);
        }
        self.sessions[id as usize].state = State::Asking;
        self.waits.set_due(place, Some(deadline));
        if !waits {
            self.next_turn(id, now, outbox);
        }
    }

    /// A turn is over, if there was one.
    fn next_turn(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let wait = self.waits.at(self.sessions[id as usize].extra);
        wait.heard.clear();
        wait.turn += 1;
        if wait.turn >= wait.chosen.script.len() {
            return self.relay(id, outbox);
        }
        wait.unsaid = true;
        self.say_turn(id, now, outbox);
    }

    /// The service has said something in a turn.
    pub(super) fn service_answered(&mut self, id: u32, buf: Buf, now: Instant, outbox: &mut Outbox) {
        let wait = self.waits.at(self.sessions[id as usize].extra);
        if wait.on_errand {
            return outbox.buffers.release(buf);
        }
        let bytes = outbox.buffers.bytes(&buf);
        let heard = match wait.chosen.script.get(wait.turn) {
            Some(Turn { expect: Some(expect), .. }) if wait.heard.len() + bytes.len() <= HEARD_MOST => {
                wait.heard.extend_from_slice(bytes);
                self.guide.hears(*expect, &wait.heard)
            }
            Some(_) | None => Heard::No,
        };
        outbox.buffers.release(buf);
        match heard {
            Heard::More => {}
            Heard::No => self.end(id, Reason::ServiceDeclined, true, outbox),
            Heard::Yes => self.next_turn(id, now, outbox),
        }
    }

    /// Say what the turn begins with, unless what was said before is still on its way.
    pub(super) fn say_turn(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let session = &self.sessions[id as usize];
        let place = session.extra;
        let is_sending = session.sides[SERVICE] & SENDING != 0;
        let wait = self.waits.at(place);
        let Some(turn) = wait.chosen.script.get(wait.turn).filter(|_| wait.unsaid && !is_sending) else { return };
        let (say, waits, deadline) = (turn.say.clone(), turn.expect.is_some(), wait.deadline);
        wait.unsaid = false;
        if say.len() > outbox.buffers.buffer_bytes() {
            return self.end(id, Reason::ServiceUnreachable, true, outbox);
        }
        let mut due = deadline;
        if !self.begin_with(id, SERVICE, &say, outbox) {
            self.report.add(Counter::BufferWaits, 1);
            self.waits.at(place).unsaid = true;
            due = now.after(Duration::from_millis(BACKOFF_MS.0.into())).min(deadline);
        } else if !waits {
            return self.next_turn(id, now, outbox);
        }
        self.waits.set_due(place, Some(due));
    }

    /// The time for a turn is over, unless it was only for a buffer.
    pub(super) fn turn_is_due(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        if self.on_errand(id) {
            return self.end_errand(id, now, outbox);
        }
        let place = self.sessions[id as usize].extra;
        let wait = self.waits.at(place);
        let (deadline, unsaid) = (wait.deadline, wait.unsaid);
        if now >= deadline {
            return self.end(id, Reason::ServiceDeclined, true, outbox);
        }
        self.waits.set_due(place, Some(deadline));
        if unsaid {
            self.say_turn(id, now, outbox);
        }
    }
}
