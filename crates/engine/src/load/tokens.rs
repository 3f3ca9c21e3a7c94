//! The tokens of the load core: who is sent one, and what the bytes that come back are worth.
//!
//! Decides right, wrong and missing. Knows nothing of how a connection came about.

use super::{BUFFER_PAUSE, Hold, LoadCore, Round, SCAN, State};
use crate::buffers::Buf;
use crate::contract::{Command, ConnId, Instant, Outbox};
use crate::report::Counter;
use crate::token::Token;

impl LoadCore {
    pub(super) fn ping_some(&mut self, now: Instant, outbox: &mut Outbox) {
        if self.round.is_none() && self.rounds_waiting > 0 {
            self.rounds_waiting -= 1;
            self.round = Some(Round { next: 0, end: self.holds.end() });
        }
        let Some(mut round) = self.round else { return };
        self.starved_until = None;
        let mut scan = SCAN;
        round.next = self.holds.skip_untouched(round.next);
        while scan > 0 && round.next < round.end && !self.pings.is_full() {
            let hold = self.holds.read(round.next);
            if hold.state == State::Idle && !hold.sending && !self.ping(round.next, hold, now, outbox) {
                self.report.add(Counter::BufferWaits, 1);
                self.starved_until = Some(now.after(BUFFER_PAUSE));
                break;
            }
            (round.next, scan) = (round.next + 1, scan - 1);
        }
        self.round = (round.next < round.end || self.pings.under_way() > 0).then_some(round);
        if self.round.is_none() {
            self.next_round_at = (!self.config.ping_every.is_zero()).then(|| now.after(self.config.ping_every));
        }
    }

    /// Send the token; false if there is no buffer to send it in.
    pub(super) fn ping(&mut self, index: u32, mut hold: Hold, now: Instant, outbox: &mut Outbox) -> bool {
        let Some(mut buf) = outbox.buffers.take() else { return false };
        let length = self.token_bytes();
        self.token(hold).fill(&mut outbox.buffers.memory(&buf)[..length]);
        outbox.buffers.set_len(&mut buf, length);
        let conn = ConnId { index, generation: hold.generation };
        hold.ping = self.pings.begin(conn, now);
        (hold.state, hold.received, hold.sending) = (State::Awaiting, 0, true);
        self.holds.write(index, hold);
        self.report.add(Counter::PingsSent, 1);
        outbox.push(Command::Send { conn, buf });
        true
    }

    pub(super) fn received(&mut self, conn: ConnId, buf: Buf, now: Instant, outbox: &mut Outbox) {
        if let Some(mut hold) = self.open_hold(conn) {
            let bytes = outbox.buffers.bytes(&buf);
            self.report.add(Counter::BytesIn, bytes.len() as u64);
            if !bytes.is_empty() {
                self.check_bytes(&mut hold, bytes, now);
                self.holds.write(conn.index, hold);
            }
        }
        outbox.buffers.release(buf);
    }

    pub(super) fn check_bytes(&mut self, hold: &mut Hold, bytes: &[u8], now: Instant) {
        let owed = matches!(hold.state, State::Awaiting | State::Late);
        let received = usize::from(hold.received);
        let right = owed && bytes.len() <= self.token_bytes() - received && self.token(*hold).matches(received, bytes);
        if hold.state == State::Spoiled {
            return;
        }
        if !right {
            match hold.state {
                State::Awaiting => self.report.add(Counter::PingsWrong, 1),
                State::Late => {}
                _ => {
                    self.report.add(Counter::PingsWrong, 1);
                    self.pings_unasked += 1;
                }
            }
            self.end_ping(hold);
            hold.state = State::Spoiled;
            return;
        }
        hold.received += bytes.len() as u16;
        if usize::from(hold.received) < self.token_bytes() {
            return;
        }
        if hold.state == State::Late {
            hold.state = State::Idle;
            return;
        }
        self.report.add(Counter::PingsRight, 1);
        if hold.sending {
            // An echo may overtake the news that we have sent. The slot stays ours until both are in.
            hold.state = State::Answered;
            self.report.echo_ns.record(self.pings.age_ns(hold.ping, now));
        } else {
            self.report.echo_ns.record(self.pings.age_ns(hold.ping, now));
            self.end_ping(hold);
            hold.state = State::Idle;
        }
    }

    pub(super) fn sent(&mut self, conn: ConnId) {
        let Some(mut hold) = self.open_hold(conn) else { return };
        if !hold.sending {
            return;
        }
        hold.sending = false;
        self.report.add(Counter::BytesOut, self.token_bytes() as u64);
        if hold.state == State::Answered {
            self.end_ping(&mut hold);
            hold.state = State::Idle;
        }
        self.holds.write(conn.index, hold);
    }

    pub(super) fn expire_pings(&mut self, now: Instant) {
        while let Some((ticket, began)) = self.pings.oldest()
            && began.after(self.config.ping_timeout) <= now
        {
            let Some(ended) = self.pings.end(ticket) else { break };
            let mut hold = self.holds.read(ended.value.index);
            hold.state = match hold.state {
                State::Answered => State::Idle,
                _ => {
                    self.report.add(Counter::PingsMissing, 1);
                    State::Late
                }
            };
            self.holds.write(ended.value.index, hold);
        }
    }

    pub(super) fn end_ping(&mut self, hold: &mut Hold) {
        if matches!(hold.state, State::Awaiting | State::Answered) {
            self.pings.end(hold.ping);
        }
    }

    pub(super) fn token(&self, hold: Hold) -> Token {
        let serial = u64::from(hold.serial).wrapping_mul(self.config.stride.max(1)).wrapping_add(self.config.first);
        Token { seed: self.config.seed, serial }
    }

    pub(super) fn token_bytes(&self) -> usize {
        self.config.token_bytes as usize
    }
}
