//! The speech of the load core on its connections: openings and rounds, when they begin and how they end.
//!
//! Decides right, refused, wrong and missing. Knows nothing of how a connection came about, nor what is said.

use super::{BUFFER_PAUSE, Hold, LoadCore, Round, SCAN, State};
use crate::buffers::Buf;
use crate::contract::{Command, ConnId, Instant, Outbox};
use crate::report::Counter;
use crate::speech::{Failing, Part, Speech, Turn, Wrong};

impl<S: Speech> LoadCore<S> {
    /// Begin the opening of a connection that stands.
    pub(super) fn open(&mut self, conn: ConnId, mut hold: Hold<S::Memory>, now: Instant, outbox: &mut Outbox) {
        self.speech.begin(&mut hold.memory, Part::Opening);
        hold.ping = self.openings.begin(conn, now);
        self.report.add(Counter::Openings, 1);
        (hold.state, hold.opening) = (State::Awaiting, true);
        self.speak(conn, &mut hold, now, outbox);
        self.holds.write(conn.index, hold);
    }

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

    /// Begin a round; false if there is no buffer to begin it with.
    fn ping(&mut self, index: u32, mut hold: Hold<S::Memory>, now: Instant, outbox: &mut Outbox) -> bool {
        let Some(buf) = outbox.buffers.take() else { return false };
        let conn = ConnId { index, generation: hold.generation };
        self.speech.begin(&mut hold.memory, Part::Round);
        hold.ping = self.pings.begin(conn, now);
        (hold.state, hold.opening) = (State::Awaiting, false);
        self.report.add(Counter::PingsSent, 1);
        if self.speech.turn(&hold.memory) == Turn::Say {
            self.say(conn, &mut hold, buf, outbox);
        } else {
            outbox.buffers.release(buf);
            self.settle(conn, &mut hold, now, outbox);
        }
        self.holds.write(index, hold);
        true
    }

    pub(super) fn received(&mut self, conn: ConnId, buf: Buf, now: Instant, outbox: &mut Outbox) {
        let Some(mut hold) = self.open_hold(conn) else { return outbox.buffers.release(buf) };
        self.report.add(Counter::BytesIn, buf.len() as u64);
        let heard = match hold.state {
            State::Spoiled => Ok(()),
            _ => self.listen(&mut hold, outbox.buffers.bytes(&buf)),
        };
        outbox.buffers.release(buf);
        match heard {
            Ok(()) => self.speak(conn, &mut hold, now, outbox),
            Err(Wrong) => self.spoil(conn, &mut hold, outbox),
        }
        self.holds.write(conn.index, hold);
    }

    pub(super) fn sent(&mut self, conn: ConnId, now: Instant, outbox: &mut Outbox) {
        let Some(mut hold) = self.open_hold(conn) else { return };
        if !hold.sending {
            return;
        }
        hold.sending = false;
        if hold.state == State::Answered {
            self.end_part(&hold);
            hold.state = State::Idle;
        }
        self.speak(conn, &mut hold, now, outbox);
        self.holds.write(conn.index, hold);
    }

    /// Let those speak who waited for a buffer.
    pub(super) fn quench(&mut self, now: Instant, outbox: &mut Outbox) {
        for _ in 0..self.thirsty.len() {
            if now < self.thirsty_until {
                return;
            }
            let Some(conn) = self.thirsty.pop_front() else { return };
            let Some(mut hold) = self.open_hold(conn) else { continue };
            hold.thirsty = false;
            self.speak(conn, &mut hold, now, outbox);
            self.holds.write(conn.index, hold);
        }
    }

    pub(super) fn expire_openings(&mut self, now: Instant, outbox: &mut Outbox) {
        while let Some((ticket, began)) = self.openings.oldest()
            && began.after(self.config.connect_timeout) <= now
        {
            let Some(ended) = self.openings.end(ticket) else { break };
            self.report.less(Counter::Openings);
            let (conn, mut hold) = (ended.value, self.holds.read(ended.value.index));
            match hold.state {
                State::Answered => hold.state = State::Idle,
                _ => self.fail_opening(conn, &mut hold, Failing::Late, outbox),
            }
            self.holds.write(conn.index, hold);
        }
    }

    pub(super) fn expire_pings(&mut self, now: Instant) {
        while let Some((ticket, began)) = self.pings.oldest()
            && began.after(self.config.ping_timeout) <= now
        {
            let Some(ended) = self.pings.end(ticket) else { break };
            self.late(ended.value);
        }
    }

    /// The connection ends: a part being played is neither right nor wrong.
    pub(super) fn break_off(&mut self, hold: &Hold<S::Memory>) {
        if hold.state == State::Awaiting {
            *(if hold.opening { &mut self.openings_ended } else { &mut self.pings_ended }) += 1;
        }
        self.end_part(hold);
    }

    /// The connection ends: an opening being played has failed.
    pub(super) fn break_opening(&mut self, hold: &mut Hold<S::Memory>, failing: Failing) {
        if hold.state == State::Awaiting && hold.opening {
            self.report.opening_failed(self.speech.why(&hold.memory, failing));
            self.end_part(hold);
            hold.state = State::Spoiled;
        }
    }

    /// The last word before a close, if there is one. Nobody waits for it: a carrier that cannot send it at once may not
    /// send it at all.
    pub(super) fn say_last(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>, abort: bool, outbox: &mut Outbox) {
        if hold.sending || !self.speech.has_last_word(&hold.memory, abort) {
            return;
        }
        let Some(mut buf) = outbox.buffers.take() else { return };
        match self.speech.last_word(&mut hold.memory, outbox.buffers.memory(&buf)) {
            0 => outbox.buffers.release(buf),
            length => {
                outbox.buffers.set_len(&mut buf, length);
                self.report.add(Counter::BytesOut, length as u64);
                outbox.push(Command::Send { conn, buf });
            }
        }
    }

    fn listen(&mut self, hold: &mut Hold<S::Memory>, bytes: &[u8]) -> Result<(), Wrong> {
        let serial = self.serial(hold);
        let mut rest = bytes;
        while !rest.is_empty() {
            let playing = matches!(hold.state, State::Awaiting | State::Late);
            if !playing || self.speech.turn(&hold.memory) != Turn::Listen {
                return self.speech.overhear(&mut hold.memory, rest);
            }
            rest = &rest[self.speech.hear(&mut hold.memory, serial, rest)?..];
        }
        Ok(())
    }

    /// Say what is to be said now, if it is our turn; then see whether the part is over.
    fn speak(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>, now: Instant, outbox: &mut Outbox) {
        let playing = matches!(hold.state, State::Awaiting | State::Late);
        let our_turn = playing && self.speech.turn(&hold.memory) == Turn::Say;
        let owes = hold.state != State::Spoiled && self.speech.owes(&hold.memory);
        if (our_turn || owes) && !hold.sending && !hold.thirsty {
            match outbox.buffers.take() {
                Some(buf) => self.say(conn, hold, buf, outbox),
                None => {
                    self.report.add(Counter::BufferWaits, 1);
                    hold.thirsty = true;
                    self.thirsty.push_back(conn);
                    self.thirsty_until = now.after(BUFFER_PAUSE);
                }
            }
        }
        self.settle(conn, hold, now, outbox);
    }

    fn say(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>, mut buf: Buf, outbox: &mut Outbox) {
        let serial = self.serial(hold);
        let length = self.speech.say(&mut hold.memory, serial, outbox.buffers.memory(&buf));
        if length == 0 {
            // Whoever cannot speak any more says so in its next turn.
            return outbox.buffers.release(buf);
        }
        outbox.buffers.set_len(&mut buf, length);
        hold.sending = true;
        self.report.add(Counter::BytesOut, length as u64);
        outbox.push(Command::Send { conn, buf });
    }

    /// If the part is over, count how.
    fn settle(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>, now: Instant, outbox: &mut Outbox) {
        let Turn::Over { refused } = self.speech.turn(&hold.memory) else { return };
        match hold.state {
            State::Late => hold.state = State::Idle,
            State::Awaiting if hold.opening && refused => self.fail_opening(conn, hold, Failing::Refused, outbox),
            State::Awaiting => {
                let how = match (hold.opening, refused) {
                    (true, _) => Counter::OpeningsRight,
                    (false, true) => Counter::PingsRefused,
                    (false, false) => Counter::PingsRight,
                };
                self.report.add(how, 1);
                if hold.opening {
                    self.report.opening_ns.record(self.openings.age_ns(hold.ping, now));
                } else {
                    self.report.echo_ns.record(self.pings.age_ns(hold.ping, now));
                }
                if hold.sending {
                    // An answer may overtake the news that we have sent. The slot stays ours until both are in.
                    hold.state = State::Answered;
                } else {
                    self.end_part(hold);
                    hold.state = State::Idle;
                }
            }
            _ => {}
        }
    }

    fn spoil(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>, outbox: &mut Outbox) {
        match hold.state {
            State::Awaiting if hold.opening => return self.fail_opening(conn, hold, Failing::Wrong, outbox),
            State::Late => {}
            state => {
                self.report.round_wrong(self.speech.why(&hold.memory, Failing::Wrong));
                self.pings_unasked += u64::from(state != State::Awaiting);
            }
        }
        self.end_part(hold);
        hold.state = State::Spoiled;
    }

    /// A connection that did not become ready is of no use: it ends.
    fn fail_opening(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>, failing: Failing, outbox: &mut Outbox) {
        self.break_opening(hold, failing);
        self.close(conn, hold, Counter::ClosedByUs, self.config.abort_on_close, outbox);
    }

    fn late(&mut self, conn: ConnId) {
        let mut hold = self.holds.read(conn.index);
        hold.state = match hold.state {
            State::Answered => State::Idle,
            _ => {
                self.report.add(Counter::PingsMissing, 1);
                State::Late
            }
        };
        self.holds.write(conn.index, hold);
    }

    fn end_part(&mut self, hold: &Hold<S::Memory>) {
        if !matches!(hold.state, State::Awaiting | State::Answered) {
            return;
        }
        if !hold.opening {
            self.pings.end(hold.ping);
        } else if self.openings.end(hold.ping).is_some() {
            self.report.less(Counter::Openings);
        }
    }

    fn serial(&self, hold: &Hold<S::Memory>) -> u64 {
        u64::from(hold.serial).wrapping_mul(self.config.stride.max(1)).wrapping_add(self.config.first)
    }
}
