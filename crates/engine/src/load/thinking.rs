//! Connections of the load core that wait for a moment (an act that waits) or for a place in a window.
//!
//! Decides who goes on next, first come first served. Knows nothing of what is said. One queue per distinct duration is in
//! the order of its deadlines by itself, because durations are constants of the script: no timer per connection.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Hold, LoadCore, Part, SCAN, State};
use crate::contract::{ConnId, Instant, Outbox};
use crate::report::Counter;
use crate::speech::Speech;

/// Who waits.
#[derive(Default, Debug)]
pub(super) struct Thinking {
    /// By duration: until when, and who.
    naps: Vec<(Duration, VecDeque<(Instant, ConnId)>)>,
    /// Whose moment has come, and who need a place in the window of openings, or of rounds.
    awake_openings: VecDeque<ConnId>,
    awake_rounds: VecDeque<ConnId>,
    /// In a closed loop: whose last round is over.
    rested: VecDeque<ConnId>,
    /// Connections that are `Thinking` in an opening, and in a round.
    pub(super) openings: u64,
    pub(super) rounds: u64,
}

impl Thinking {
    /// When the first of those who wait for a moment goes on.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.naps.iter().filter_map(|(_, queue)| queue.front()).map(|&(due, _)| due).min()
    }

    fn nap(&mut self, conn: ConnId, due: Instant, time: Duration) {
        let place = self.naps.iter().position(|(other, _)| *other == time).unwrap_or_else(|| {
            self.naps.push((time, VecDeque::new()));
            self.naps.len() - 1
        });
        self.naps[place].1.push_back((due, conn));
    }

    /// Somebody whose moment has come.
    fn woken(&mut self, now: Instant) -> Option<ConnId> {
        let queue =
            self.naps.iter_mut().map(|(_, queue)| queue).find(|queue| queue.front().is_some_and(|it| it.0 <= now))?;
        queue.pop_front().map(|(_, conn)| conn)
    }
}

impl<S: Speech> LoadCore<S> {
    /// The part waits: neither its deadline nor the latency of its answer goes on meanwhile.
    pub(super) fn think(&mut self, conn: ConnId, hold: &mut Hold<S::Memory>, due: Instant, time: Duration) {
        if hold.state != State::Awaiting {
            return;
        }
        self.end_part(hold);
        hold.state = State::Thinking;
        if hold.opening {
            self.thinking.openings += 1;
            self.report.add(Counter::Openings, 1);
        } else {
            self.thinking.rounds += 1;
        }
        self.thinking.nap(conn, due, time);
    }

    /// Let those go on whose moment has come, as far as there are places.
    pub(super) fn think_on(&mut self, now: Instant, outbox: &mut Outbox) {
        while let Some(conn) = self.thinking.woken(now) {
            match self.open_hold(conn).filter(|hold| hold.state == State::Thinking) {
                Some(hold) if hold.opening => self.thinking.awake_openings.push_back(conn),
                Some(_) => self.thinking.awake_rounds.push_back(conn),
                None => {}
            }
        }
        while self.has_room()
            && let Some(conn) = self.thinking.awake_openings.pop_front()
        {
            self.wake(conn, now, outbox);
        }
        while !self.pings.is_full()
            && let Some(conn) = self.thinking.awake_rounds.pop_front()
        {
            self.wake(conn, now, outbox);
        }
    }

    fn wake(&mut self, conn: ConnId, now: Instant, outbox: &mut Outbox) {
        let Some(mut hold) = self.open_hold(conn).filter(|hold| hold.state == State::Thinking) else { return };
        self.end_part(&hold);
        let part = Part { conn, doubted: false };
        hold.ping = if hold.opening {
            self.report.add(Counter::Openings, 1);
            self.openings.begin(part, now)
        } else {
            self.pings.begin(part, now)
        };
        hold.state = State::Awaiting;
        self.speech.waited(&mut hold.memory);
        self.speak(conn, &mut hold, now, outbox);
        self.holds.write(conn.index, hold);
    }

    /// The connection is `Idle`: in a closed loop its next round is due.
    pub(super) fn rest(&mut self, conn: ConnId) {
        if self.looping {
            self.thinking.rested.push_back(conn);
        }
    }

    /// Begin rounds on those whose last is over.
    pub(super) fn loop_on(&mut self, now: Instant, outbox: &mut Outbox) {
        if self.starved_until.is_some_and(|until| now < until) {
            return;
        }
        self.starved_until = None;
        // A round that is over at once comes back to the queue: not more than those who are there now.
        for _ in 0..self.thinking.rested.len().min(SCAN as usize) {
            if self.pings.is_full() {
                return;
            }
            let Some(conn) = self.thinking.rested.pop_front() else { return };
            let Some(hold) = self.open_hold(conn).filter(|hold| hold.state == State::Idle && !hold.sending) else {
                continue;
            };
            if !self.ping(conn.index, hold, now, outbox) {
                self.thinking.rested.push_front(conn);
                return self.starve(now);
            }
        }
    }

    /// Whether a turn can begin a round now.
    pub(super) fn can_begin(&self) -> bool {
        self.round.is_none() && !self.thinking.rested.is_empty() && !self.pings.is_full()
    }
}
