//! The speech of the load core on its connections: openings and rounds, when they begin and how they end.
//!
//! Decides right, refused, wrong and missing. Knows nothing of how a connection came about, nor what is said.

use super::{BUFFER_PAUSE, Hold, LoadCore, Part, Round, SCAN, State};
use crate::buffers::Buf;
use crate::contract::{Command, ConnId, Instant, Outbox, Transport};
use crate::report::Counter;
use crate::speech::{self, Failing, Speech, Turn, Wrong};

impl<S: Speech> LoadCore<S> {
    /// Begin the opening of a connection that stands.
    pub(super) fn open(&mut self, conn: ConnId, mut hold: Hold<S::Memory>, now: Instant, outbox: &mut Outbox) {
        self.speech.begin(&mut hold.memory, speech::Part::Opening);
        hold.ping = self.openings.begin(Part { conn, doubted: false }, now);
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
        let Some(mut round) = self.round else { return self.loop_on(now, outbox) };
        self.starved_until = None;
        let mut scan = SCAN;
        round.next = self.holds.skip_untouched(round.next);
        while scan > 0 && round.next < round.end && !self.pings.is_full() {
            let hold = self.holds.read(round.next);
            if hold.state == State::Idle && !hold.sending && !self.ping(round.next, hold, now, outbox) {
                self.starve(now);
                break;
            }
            (round.next, scan) = (round.next + 1, scan - 1);
        }
        let is_over =
            round.next >= round.end && (self.looping || self.pings.under_way() == 0 && self.thinking.rounds == 0);
        self.round = (!is_over).then_some(round);
        if self.round.is_none() {
            self.next_round_at = (!self.config.ping_every.is_zero()).then(|| now.after(self.config.ping_every));
        }
    }

    /// No buffer is free to begin a round with.
    pub(super) fn starve(&mut self, now: Instant) {
        self.report.add(Counter::BufferWaits, 1);
        self.starved_until = Some(now.after(BUFFER_PAUSE));
    }

    /// Begin a round; false if there is no buffer to begin it with.
    pub(super) fn ping(&mut self, index: u32, mut hold: Hold<S::Memory>, now: Instant, outbox: &mut Outbox) -> bool {
        let Some(buf) = outbox.buffers.take() else { return false };
        let conn = ConnId { index, generation: hold.generation };
        self.speech.begin(&mut hold.memory, speech::Part::Round);
        hold.ping = self.pings.begin(Part { conn, doubted: false }, now);
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
        if self.config.transport == Transport::Datagram {
            self.hear_datagram(&mut hold, outbox.buffers.bytes(&buf));
            outbox.buffers.release(buf);
            self.speak(conn, &mut hold, now, outbox);
            return self.holds.write(conn.index, hold);
        }
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
        let is_lost = hold.state == State::Late && self.config.transport == Transport::Datagram;
        if hold.state == State::Answered || is_lost {
            self.end_part(&hold);
            hold.state = State::Idle;
            self.rest(conn);
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
            let conn = ended.value.conn;
            let mut hold = self.holds.read(conn.index);
            match hold.state {
                State::Answered => {
                    hold.state = State::Idle;
                    self.report.less(Counter::Openings);
                    self.rest(conn);
                }
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
        if matches!(hold.state, State::Awaiting | State::Thinking) {
            *(if hold.opening { &mut self.openings_ended } else { &mut self.pings_ended }) += 1;
        }
        self.end_part(hold);
    }

    /// The connection ends: an opening being played has failed.
    pub(super) fn break_opening(&mut self, hold: &mut Hold<S::Memory>, failing: Failing) {
        if matches!(hold.state, State::Awaiting | State::Thinking) && hold.opening {
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
    pub(super) fn speak(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>, now: Instant, outbox: &mut Outbox) {
        // Nobody thinks in a part that is late already.
        while hold.state == State::Late && matches!(self.speech.turn(&hold.memory), Turn::Wait(_)) {
            self.speech.waited(&mut hold.memory);
        }
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

    /// If the part is over, count how; if it is to wait, let it.
    fn settle(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>, now: Instant, outbox: &mut Outbox) {
        let refused = match self.speech.turn(&hold.memory) {
            Turn::Over { refused } => refused,
            Turn::Wait(time) => return self.think(conn, hold, now.after(time), time),
            Turn::Say | Turn::Listen => return,
        };
        match hold.state {
            State::Late => {
                hold.state = State::Idle;
                self.rest(conn);
            }
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
                self.answered(conn, hold);
            }
            _ => {}
        }
    }

    /// The part is over and counted.
    pub(super) fn answered(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>) {
        if hold.sending {
            // An answer may overtake the news that we have sent. The slot stays ours until both are in.
            hold.state = State::Answered;
        } else {
            self.end_part(hold);
            hold.state = State::Idle;
            self.rest(conn);
        }
    }

    fn spoil(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>, outbox: &mut Outbox) {
        match hold.state {
            State::Awaiting | State::Thinking if hold.opening => {
                return self.fail_opening(conn, hold, Failing::Wrong, outbox);
            }
            State::Late => {}
            state => {
                self.report.round_wrong(self.speech.why(&hold.memory, Failing::Wrong));
                self.pings_unasked += u64::from(!matches!(state, State::Awaiting | State::Thinking));
            }
        }
        self.end_part(hold);
        hold.state = State::Spoiled;
    }

    /// A connection that did not become ready is of no use: it ends.
    pub(super) fn fail_opening(
        &mut self,
        conn: ConnId,
        hold: &mut Hold<S::Memory>,
        failing: Failing,
        outbox: &mut Outbox,
    ) {
        self.break_opening(hold, failing);
        self.close(conn, hold, Counter::ClosedByUs, self.config.abort_on_close, outbox);
    }

    fn late(&mut self, Part { conn, doubted }: Part) {
        let mut hold = self.holds.read(conn.index);
        hold.state = match hold.state {
            State::Answered => State::Idle,
            _ => {
                if doubted {
                    self.report.round_wrong(self.speech.why(&hold.memory, Failing::Wrong));
                } else {
                    self.report.add(Counter::PingsMissing, 1);
                }
                // A lost datagram is not awaited: the next round may begin, once nothing is being sent.
                let is_lost = self.config.transport == Transport::Datagram && !hold.sending;
                if is_lost { State::Idle } else { State::Late }
            }
        };
        if hold.state == State::Idle {
            self.rest(conn);
        }
        self.holds.write(conn.index, hold);
    }

    pub(super) fn end_part(&mut self, hold: &Hold<S::Memory>) {
        match hold.state {
            State::Thinking if hold.opening => self.thinking.openings -= 1,
            State::Thinking => self.thinking.rounds -= 1,
            State::Awaiting | State::Answered => {
                let window = if hold.opening { &mut self.openings } else { &mut self.pings };
                window.end(hold.ping);
            }
            _ => return,
        }
        if hold.opening {
            self.report.less(Counter::Openings);
        }
    }

    /// The serial of what is said now. Of a datagram it names the round, too (the ticket, in the upper half): a late answer
    /// is known as one. There the seed, which is the worker's own, tells workers apart.
    pub(super) fn serial(&self, hold: &Hold<S::Memory>) -> u64 {
        if self.config.transport == Transport::Datagram {
            return u64::from(hold.ping) << 32 | u64::from(hold.serial);
        }
        u64::from(hold.serial).wrapping_mul(self.config.stride.max(1)).wrapping_add(self.config.first)
    }
}
