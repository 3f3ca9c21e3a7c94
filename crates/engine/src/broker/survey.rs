//! What a broker core tells of the connections that it holds: how each is called, pages of them, the busiest services.
//!
//! Decides names that cost no byte, how much one look may cost, and that the busiest are found in bounded memory. Knows
//! nobody who asks: who does asks again for what comes next, so that no look is long.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::BrokerCore;
use super::counts::Counts;
use super::guide::Guide;
use super::ledger::{Ledger, Reason};
use super::session::{CLIENT, SERVICE, Session, State};
use crate::contract::{Instant, Order, Outbox};
use crate::questions::{Busy, By, Filter, Question, Seen};

/// Rows of one answer, at most.
pub const MOST_ROWS: u32 = 256;
/// Sessions, or services, that one look passes, at most.
pub const MOST_PASSED: u32 = 4_096;
/// Bits of a name that say which worker accepted the connection.
const WORKER_BITS: u32 = 10;
/// Services that are remembered for having had many connections, or bytes.
const REMEMBERED: usize = 256;

/// Names connections: the moment at which each was accepted, which is kept anyway, with the worker in its last bits. Never
/// the same twice in one worker: where the clock is too coarse, the next moment is taken.
#[derive(Default, Debug)]
pub(super) struct Names {
    worker: u64,
    last: u64,
}

impl Names {
    pub(super) fn of(worker: u32) -> Names {
        Names { worker: u64::from(worker) & ((1 << WORKER_BITS) - 1), last: 0 }
    }

    pub(super) fn next(&mut self, now: Instant) -> Instant {
        self.last = (now.0 >> WORKER_BITS).max(self.last + 1);
        Instant(self.last << WORKER_BITS | self.worker)
    }
}

/// The heaviest of very many keys, in bounded memory: the space-saving algorithm (Metwally, Agrawal, El Abbadi 2005). What
/// takes another's place inherits its amount, and how much that was is kept as the most by which it is too high.
#[derive(Default, Debug)]
pub(super) struct Heaviest {
    places: HashMap<Arc<str>, usize>,
    keys: Vec<Arc<str>>,
    amounts: Vec<u64>,
    overs: Vec<u64>,
}

impl Heaviest {
    pub(super) fn add(&mut self, key: &str, weight: u64) {
        if weight == 0 {
            return;
        }
        if let Some(&place) = self.places.get(key) {
            self.amounts[place] = self.amounts[place].saturating_add(weight);
            return;
        }
        let key: Arc<str> = key.into();
        if self.keys.len() < REMEMBERED {
            self.places.insert(Arc::clone(&key), self.keys.len());
            self.keys.push(key);
            self.amounts.push(weight);
            self.overs.push(0);
            return;
        }
        let least = self.least();
        let place = self.amounts.iter().position(|&amount| amount == least).unwrap_or(0);
        self.places.remove(&self.keys[place]);
        self.places.insert(Arc::clone(&key), place);
        (self.keys[place], self.overs[place]) = (key, least);
        self.amounts[place] = least.saturating_add(weight);
    }

    /// What a key that is not among them may have had.
    fn least(&self) -> u64 {
        if self.keys.len() < REMEMBERED { 0 } else { self.amounts.iter().copied().min().unwrap_or(0) }
    }

    fn rows(&self) -> Vec<Busy> {
        let rows = self.keys.iter().zip(&self.amounts).zip(&self.overs);
        rows.map(|((key, &amount), &over)| Busy { service: key.to_string(), amount, over }).collect()
    }
}

/// What is remembered of services whose connections have ended.
#[derive(Default, Debug)]
pub(super) struct Past {
    connections: Heaviest,
    bytes: Heaviest,
}

impl Past {
    /// A connection of the service is gone.
    pub(super) fn ended(&mut self, service: &str, bytes: [u64; 2]) {
        self.connections.add(service, 1);
        self.bytes.add(service, bytes[0].saturating_add(bytes[1]));
    }
}

/// One look at sessions or services: what was found, and where to go on; None is the end.
pub(super) type Look<T> = (Vec<T>, Option<u32>);

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    /// One of the orders that ask for a look.
    pub(super) fn looked_for(&mut self, order: &Order, now: Instant, outbox: &mut Outbox) {
        let reply = match *order {
            Order::Survey { ticket, ref filter, from, most } => {
                let (rows, next) = self.survey(filter, from, most, now);
                Question::Surveyed { ticket, rows, next }
            }
            Order::Busiest { ticket, by, from, most } => {
                let ((rows, next), least) = self.busiest(by, from, most);
                Question::Busiest { ticket, rows, next, least }
            }
            Order::End { ticket, name, from } => {
                let (found, next) = self.end_named(name, from, outbox);
                Question::Closed { ticket, found, next }
            }
            _ => return,
        };
        outbox.questions.reply(reply);
    }

    /// Sessions from place `from` on: at most so many rows, and a bounded number passed.
    pub(super) fn survey(&self, filter: &Filter, from: u32, most: u32, now: Instant) -> Look<Seen> {
        let mut rows = Vec::new();
        let wanted = match &filter.service {
            None => None,
            Some(service) => match self.services.find(service.as_str()) {
                None => return (rows, None),
                row => row,
            },
        };
        let most = most.min(MOST_ROWS) as usize;
        let mut place = from;
        for session in self.sessions.iter().skip(from as usize).take(MOST_PASSED as usize) {
            if rows.len() >= most {
                return (rows, Some(place));
            }
            place += 1;
            let is_meant = session.state != State::Free
                && wanted.is_none_or(|row| session.service == row + 1)
                && filter.source.is_none_or(|prefix| session.peer.is_some_and(|peer| is_within(peer.ip(), prefix)));
            if is_meant {
                rows.push(self.seen(session, now));
            }
        }
        (rows, ((place as usize) < self.sessions.len()).then_some(place))
    }

    fn seen(&self, session: &Session, now: Instant) -> Seen {
        Seen {
            id: session.accepted.0,
            peer: session.peer,
            service: session.service.checked_sub(1).map_or_else(String::new, |row| self.services.key(row).to_string()),
            state: session.state.name(),
            age: now.since(session.accepted),
            bytes_up: session.bytes[CLIENT],
            bytes_down: session.bytes[SERVICE],
            listener: session.listener.0,
        }
    }

    /// End the connection of that name, if it is among a bounded number of sessions from place `from` on. Gives back
    /// whether it was, or else where to look next.
    pub(super) fn end_named(&mut self, name: u64, from: u32, outbox: &mut Outbox) -> (bool, Option<u32>) {
        let end = (from.saturating_add(MOST_PASSED) as usize).min(self.sessions.len());
        for place in from as usize..end {
            let session = &self.sessions[place];
            if session.accepted.0 == name && session.state != State::Free {
                self.end(place as u32, Reason::Stopped, true, outbox);
                return (true, None);
            }
        }
        (false, (end < self.sessions.len()).then_some(end as u32))
    }

    /// The busiest services; of those with connections now, the busiest among a bounded number of rows from `from` on. With
    /// what a service that is not among them may have.
    pub(super) fn busiest(&self, by: By, from: u32, most: u32) -> (Look<Busy>, u64) {
        match by {
            By::Live => busiest_of(&self.services, from, most.min(MOST_ROWS) as usize),
            By::Total => ((self.past.connections.rows(), None), self.past.connections.least()),
            By::Bytes => ((self.past.bytes.rows(), None), self.past.bytes.least()),
        }
    }
}

fn busiest_of(services: &Counts<std::sync::Arc<str>>, from: u32, most: usize) -> (Look<Busy>, u64) {
    let mut rows: Vec<(u32, u32)> = Vec::new();
    let mut place = from;
    while place - from < MOST_PASSED
        && let Some(count) = services.count_at(place)
    {
        if count > 0 {
            rows.push((count, place));
        }
        place += 1;
    }
    rows.sort_unstable_by(|one, other| other.cmp(one));
    let least = rows.get(most).map_or(0, |row| u64::from(row.0));
    rows.truncate(most);
    let busy =
        |(count, row): (u32, u32)| Busy { service: services.key(row).to_string(), amount: count.into(), over: 0 };
    let next = services.count_at(place).map(|_| place);
    ((rows.into_iter().map(busy).collect(), next), least)
}

fn is_within(address: IpAddr, (prefix, bits): (IpAddr, u8)) -> bool {
    match (address.to_canonical(), prefix) {
        (IpAddr::V4(address), IpAddr::V4(prefix)) => {
            (u32::from(address) ^ u32::from(prefix)).checked_shr(32 - u32::from(bits.min(32))).unwrap_or(0) == 0
        }
        (IpAddr::V6(address), IpAddr::V6(prefix)) => {
            (u128::from(address) ^ u128::from(prefix)).checked_shr(128 - u32::from(bits.min(128))).unwrap_or(0) == 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_rise_and_say_their_worker() {
        let mut names = Names::of(3);
        let moments = [5_000, 5_000, 5_001, 9_000_000, 1];
        let given: Vec<u64> = moments.into_iter().map(|now| names.next(Instant(now)).0).collect();
        assert!(given.is_sorted_by(|one, other| one < other), "{given:?}");
        assert!(given.iter().all(|name| name & 1_023 == 3));
        assert!(given[3].abs_diff(9_000_000) < 1_024);
    }

    #[test]
    fn the_heaviest_of_many_are_among_them_and_no_amount_is_wrong_by_more_than_it_says() {
        let mut heaviest = Heaviest::default();
        let mut true_amounts: HashMap<String, u64> = HashMap::new();
        // One key in ten is one of three, the others are 5,000 that come in turn.
        for number in 0..200_000_u64 {
            let key =
                if number % 10 == 0 { format!("much{}", number / 10 % 3) } else { format!("little{}", number % 5_000) };
            heaviest.add(&key, 1 + number % 2);
            *true_amounts.entry(key).or_default() += 1 + number % 2;
        }
        let mut rows = heaviest.rows();
        assert_eq!(rows.len(), REMEMBERED);
        rows.sort_by_key(|row| std::cmp::Reverse(row.amount));
        assert!(rows[..3].iter().all(|row| row.service.starts_with("much")), "{:?}", &rows[..4]);
        for Busy { service, amount, over } in rows {
            let held = true_amounts[&service];
            assert!(amount >= held && amount - over <= held, "{service}: {amount} - {over}, {held}");
        }
        assert!(
            true_amounts
                .iter()
                .all(|(key, &held)| heaviest.places.contains_key(key.as_str()) || held <= heaviest.least())
        );
    }

    #[test]
    fn prefixes() {
        let within =
            |address: &str, prefix: &str, bits| is_within(address.parse().unwrap(), (prefix.parse().unwrap(), bits));
        assert!(within("192.0.2.7", "192.0.2.0", 24) && !within("192.0.3.7", "192.0.2.0", 24));
        assert!(within("192.0.2.7", "0.0.0.0", 0) && !within("::1", "0.0.0.0", 0));
        assert!(within("::ffff:192.0.2.7", "192.0.2.7", 32));
        assert!(within("2001:db8::5", "2001:db8::", 64) && !within("2001:db8:0:1::5", "2001:db8::", 64));
    }
}
