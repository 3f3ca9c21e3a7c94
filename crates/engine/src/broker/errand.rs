//! Errands: what is said at other places before a connection is brought to its own, because it may be meant for any of
//! them. Each is a connection of its own that is told one thing and closed when it closes, or soon; what it says is nobody's.
//!
//! Decides how long an errand may take, and that none keeps a connection from its service. Knows nothing of what is said.

use std::time::Duration;

use super::BrokerCore;
use super::guide::{Address, Guide};
use super::ledger::Ledger;
use super::session::{CLOSING, OPEN, SERVICE, State};
use crate::contract::{Command, Instant, Outbox, Target};
use crate::report::Counter;

/// For reaching a place, and again for what is done there.
const PATIENCE: Duration = Duration::from_millis(500);

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    /// Go to where the next errand leads. Says whether there is one: then the connection is not delivered yet.
    pub(super) fn runs_errand(&mut self, id: u32, now: Instant, outbox: &mut Outbox) -> bool {
        let place = self.sessions[id as usize].extra;
        loop {
            let wait = self.waits.at(place);
            let Some(errand) = wait.chosen.errands.last() else { return false };
            let target = match &errand.address {
                Address::Tcp(endpoint) => Some(Target::Tcp(*endpoint)),
                Address::Unix(path) if path.is_empty() || path.len() > outbox.buffers.buffer_bytes() => None,
                Address::Unix(path) => outbox.buffers.write(path).map(Target::Unix),
            };
            let Some(target) = target else {
                self.errand_is_over(id, now);
                continue;
            };
            wait.reaching = true;
            self.waits.set_due(place, Some(now.after(PATIENCE)));
            self.report.add(Counter::Attempted, 1);
            outbox.push(Command::Reach { ticket: place, target });
            return true;
        }
    }

    /// The place of an errand is reached.
    pub(super) fn begin_errand(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let place = self.sessions[id as usize].extra;
        let wait = self.waits.at(place);
        wait.on_errand = true;
        let say = wait.chosen.errands.last_mut().map(|errand| std::mem::take(&mut errand.say)).unwrap_or_default();
        self.sessions[id as usize].state = State::Asking;
        self.waits.set_due(place, Some(now.after(PATIENCE)));
        if !self.begin_with(id, SERVICE, &say, outbox) {
            self.end_errand(id, now, outbox);
        }
    }

    /// Whoever was there has closed, or it has taken too long.
    pub(super) fn end_errand(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        let place = session.extra;
        if session.sides[SERVICE] & (OPEN | CLOSING) == OPEN {
            session.sides[SERVICE] |= CLOSING;
            self.closes_under_way += 1;
            outbox.push(Command::Close { conn: session.conns[SERVICE], abort: true });
        }
        self.waits.set_due(place, Some(now.after(PATIENCE)));
    }

    /// Its connection is gone: on to the next, or to the service.
    pub(super) fn errand_closed(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        self.sessions[id as usize].state = State::Delivering;
        self.errand_is_over(id, now);
        self.try_again(id, now, outbox);
    }

    /// One errand less. The service has all its time after the last.
    pub(super) fn errand_is_over(&mut self, id: u32, now: Instant) {
        let timeout = self.config.delivery_timeout;
        let wait = self.waits.at(self.sessions[id as usize].extra);
        wait.on_errand = false;
        wait.chosen.errands.pop();
        wait.deadline = now.after(wait.chosen.patience.unwrap_or(timeout));
    }

    /// Whether the connection's other side is that of an errand.
    pub(super) fn on_errand(&self, id: u32) -> bool {
        let session = &self.sessions[id as usize];
        session.state == State::Asking && self.waits.get(session.extra).is_some_and(|wait| wait.on_errand)
    }

    /// An answer to an errand's `Reach` that is a no.
    pub(super) fn errand_failed(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        self.errand_is_over(id, now);
        self.try_again(id, now, outbox);
    }
}
