//! The ramp of the load core: when to try the next tuple, what a failed attempt means, when to stop trying.
//!
//! Decides the pace: window, rate, pauses after a resource ran out. Knows nothing of what is said on a connection.

use std::time::Duration;

use super::{BURST, Hold, LoadCore, RATE_SLACK_NS, RESOURCE_PAUSE, RESOURCE_PAUSE_MOST, State};
use crate::contract::{Command, ConnId, Errno, Instant, Outbox, Step};
use crate::report::Counter;
use crate::speech::Speech;
use crate::walk::{Meaning, Next};

impl<S: Speech> LoadCore<S> {
    pub(super) fn wants_more(&self) -> bool {
        let on_the_way = self.report.count(Counter::Connected) + u64::from(self.attempts.under_way());
        self.making && self.closing.is_none() && on_the_way < self.goal
    }

    /// An opening under way takes a place in the window too: a peer that is slow to become ready slows the ramp.
    pub(super) fn has_room(&self) -> bool {
        self.attempts.under_way() + self.openings.under_way() < self.width
    }

    pub(super) fn connect_some(&mut self, now: Instant, outbox: &mut Outbox) {
        while self.wants_more() && self.has_room() && now >= self.paused_until && now >= self.rate_next {
            let (source, destination, range) = match self.walk.next(self.attempts.under_way()) {
                Next::Tuple { source, destination, range } => (source, destination, range),
                Next::Wait => break,
                Next::End => {
                    self.making = false;
                    break;
                }
            };
            self.spend_rate(now);
            let ticket = self.attempts.begin((), now);
            self.report.add(Counter::Attempted, 1);
            let (transport, choice) = (self.config.transport, self.config.choice);
            outbox.push(Command::Connect { ticket, transport, source, destination, choice, range });
        }
    }

    fn spend_rate(&mut self, now: Instant) {
        if self.config.rate_per_s > 0 {
            let earliest = Instant(now.0.saturating_sub(RATE_SLACK_NS));
            let step = Duration::from_nanos(1_000_000_000 / u64::from(self.config.rate_per_s));
            self.rate_next = self.rate_next.max(earliest).after(step);
        }
    }

    pub(super) fn connected(&mut self, ticket: u32, conn: ConnId, now: Instant, outbox: &mut Outbox) {
        let Some(attempt) = self.attempts.end(ticket) else {
            // Not a ticket of ours: nothing may stay open that nobody counts.
            return outbox.push(Command::Close { conn, abort: true });
        };
        let serial = self.report.count(Counter::Connected) as u32;
        self.report.add(Counter::Connected, 1);
        self.report.opened();
        self.walk.connected();
        self.failures_in_row = 0;
        self.width = (self.width + 1).min(self.attempts.most());
        let connect_ns = now.0.saturating_sub(attempt.began.0);
        self.report.connect_ns.record(connect_ns);
        self.record_fill(connect_ns);
        let mut hold = Hold { serial, generation: conn.generation, state: State::Idle, ..Hold::default() };
        self.holds.write(conn.index, hold);
        if self.closing.is_some() {
            self.close(conn, &mut hold, Counter::ClosedByUs, self.config.abort_on_close, outbox);
        } else if self.speech.has_opening() {
            self.open(conn, hold, now, outbox);
        } else {
            self.rest(conn);
        }
    }

    pub(super) fn connect_failed(&mut self, ticket: u32, step: Step, error: Errno, now: Instant) {
        let Some(attempt) = self.attempts.end(ticket) else { return };
        let timed_out = attempt.expired && error == Errno::ECANCELED && self.closing.is_none();
        let error = if timed_out { Errno::ETIMEDOUT } else { error };
        self.report.add(Counter::ConnectFailed, 1);
        self.report.failed(step, error);
        match self.walk.failed(step, error) {
            Meaning::TupleBusy => {
                self.report.add(Counter::TupleBusy, 1);
                self.used_up = Some((step, error));
            }
            Meaning::PairRefused => self.used_up = Some((step, error)),
            Meaning::Other => self.set_back(step, error, attempt.began, now),
        }
    }

    /// A failure that says nothing about tuples: slow down if a resource ran out, stop after too many in a row.
    fn set_back(&mut self, step: Step, error: Errno, began: Instant, now: Instant) {
        if matches!(error, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS) {
            if self.ran_out_at.is_some_and(|ran_out_at| began <= ran_out_at) {
                return;
            }
            let pause = RESOURCE_PAUSE * (1 << self.failures_in_row.min(8));
            self.ran_out_at = Some(now);
            self.paused_until = now.after(pause.min(RESOURCE_PAUSE_MOST));
            self.width = (self.width / 2).max(1);
        }
        self.failures_in_row += 1;
        if self.making && self.closing.is_none() && self.failures_in_row >= self.config.give_up_after.max(1) {
            self.making = false;
            self.report.stopped_by = Some((step, error));
        }
    }

    /// The curve's rows follow each other, so one histogram at a time is enough.
    fn record_fill(&mut self, connect_ns: u64) {
        let Some(fill) = &mut self.fill else { return };
        let done = u128::from(self.report.count(Counter::Connected) - 1);
        let hundredth = (done.saturating_mul(100) / self.walk.share().max(1)).min(99) as usize;
        if hundredth > self.report.fill_curve.len() {
            self.report.fill_curve.push((fill.quantile(0.5), fill.count()));
            self.report.fill_curve.resize(hundredth, (0, 0));
            fill.clear();
        }
        fill.record(connect_ns);
    }

    pub(super) fn end_fill(&mut self) {
        if let Some(fill) = self.fill.as_mut().filter(|fill| fill.count() > 0)
            && self.report.fill_curve.len() < 100
        {
            self.report.fill_curve.push((fill.quantile(0.5), fill.count()));
            fill.clear();
        }
    }

    pub(super) fn expire_attempts(&mut self, now: Instant, outbox: &mut Outbox) {
        let mut burst = if self.closing.is_some() { BURST } else { self.attempts.most() };
        while burst > 0
            && let Some((ticket, began)) = self.attempts.oldest()
            && (self.closing.is_some() || began.after(self.config.connect_timeout) <= now)
        {
            self.attempts.expire(ticket);
            outbox.push(Command::CancelConnect { ticket });
            burst -= 1;
        }
    }
}
