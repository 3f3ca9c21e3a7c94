//! The broker's bookkeeping held against itself: what the simulator asks after every step.

use super::BrokerCore;
use super::guide::Guide;
use super::ledger::{Ledger, REASONS};
use super::session::{CLOSING, OPEN, Session, State};
use crate::report::Counter;

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    /// Which rule is broken, if one is.
    pub(super) fn check(&self) -> Result<(), String> {
        let count = |counter| self.report.count(counter);
        let held: Vec<&Session> = self.sessions.iter().filter(|session| session.state != State::Free).collect();
        let in_state = |state| held.iter().filter(|session| session.state == state).count() as u64;
        let open = held.iter().flat_map(|session| session.sides).filter(|side| side & OPEN != 0).count() as u64;
        let closing = held.iter().flat_map(|session| session.sides).filter(|side| side & CLOSING != 0).count();
        let ended: u64 = REASONS.iter().map(|reason| count(reason.counter())).sum();
        let waiting = held.iter().filter(|session| session.state != State::Relaying && session.waits());
        let of_service = held.iter().filter(|session| session.service != 0).count() as u64;
        let of_source = held.iter().filter(|session| session.source != 0).count() as u64;
        let lines = self.lines.iter().filter(|line| line.session != 0).count() as u64;
        let due = |session: &&&Session| match self.waits.get(session.extra) {
            Some(wait) => wait.is_due() || wait.handing || wait.reaching || wait.last_look,
            None => false,
        };
        let on_the_way = |session: &&&Session| {
            !matches!(session.state, State::Free | State::Relaying | State::Moving | State::Ending)
        };
        let rules = [
            (
                "each accepted connection is held or has one reason",
                count(Counter::Accepted) + count(Counter::Landed) == held.len() as u64 + ended,
            ),
            ("open_now is the number of open sides", count(Counter::Open) == open + u64::from(self.strangers)),
            ("each open side has its line", lines == open),
            ("closes under way are counted", closing as u32 == self.closes_under_way),
            ("sniffing_now", count(Counter::Sniffing) == in_state(State::Sniffing)),
            (
                "delivering_now",
                count(Counter::Delivering)
                    == in_state(State::Delivering) + in_state(State::Asking) + in_state(State::Leaving),
            ),
            ("relaying_now", count(Counter::Relaying) == in_state(State::Relaying)),
            ("moving_now", count(Counter::Moving) == in_state(State::Moving)),
            ("who moves is known", self.moves.len() as u64 == in_state(State::Moving)),
            ("a wait belongs to one session or is free", waiting.count() == self.waits.in_use()),
            ("who stands in a line is on the way to its service", {
                let delivering = held.iter().filter(|session| session.state == State::Delivering);
                delivering.filter(|it| self.waits.get(it.extra).is_some_and(|wait| wait.in_line)).count()
                    == self.waits.in_lines()
            }),
            (
                "who is parked waits for a sleeper",
                self.sleepers.check() && {
                    let waits = held
                        .iter()
                        .filter(|it| it.state == State::Delivering)
                        .filter_map(|it| self.waits.get(it.extra));
                    waits.filter(|wait| wait.parked_bytes != 0).count() as u32 == self.sleepers.parked()
                },
            ),
            ("parked_now", count(Counter::Parked) == u64::from(self.sleepers.parked())),
            ("services are counted", self.services.total() == of_service),
            ("sources are counted", self.sources.total() == of_source),
            ("something is due for each connection on its way", held.iter().filter(on_the_way).all(|it| due(&it))),
            ("queues belong to one session or are free", self.queues.check(held.iter().copied())),
            ("bytes out are no more than bytes in", count(Counter::BytesOut) <= count(Counter::BytesIn)),
        ];
        rules.iter().find(|(_, holds)| !holds).map_or(Ok(()), |(rule, _)| Err(format!("broker: {rule}")))
    }
}
