//! What a connection needs until it is delivered, and when something is due for it. Freed at delivery: an idle relayed
//! connection has none of this.
//!
//! Decides places, the order of deadlines, and the order of those who wait for one service. Knows no meaning of a deadline.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;

use super::guide::Chosen;
use super::ledger::Reason;
use crate::contract::{Errno, Instant};

/// A connection on its way to its service.
#[derive(Clone, Default, Debug)]
pub(super) struct Wait<M> {
    /// Whose it is; meaningless in a free place.
    pub(super) session: u32,
    pub(super) names: Option<(SocketAddr, SocketAddr)>,
    /// `Named` has come.
    pub(super) named: bool,
    /// Bytes were shown before that, or before the client could hear an answer.
    pub(super) missed: bool,
    pub(super) chosen: Chosen,
    /// The guide's.
    pub(super) memory: M,
    /// When the next thing is to be done for it.
    due: Option<Instant>,
    /// When looking, then when delivery is given up.
    pub(super) deadline: Instant,
    pub(super) backoff_ms: u32,
    /// Bytes looked at so far, each time counted.
    pub(super) looked_at: u32,
    /// Bytes that the last look showed.
    pub(super) shown: u32,
    /// The next look is the last.
    pub(super) last_look: bool,
    /// A `Reach` that is not answered.
    pub(super) reaching: bool,
    /// A `HandOff` that is not answered.
    pub(super) handing: bool,
    /// The client was told that its service is reached.
    pub(super) replied: bool,
    /// Something was sent to the client, or taken off its stream.
    pub(super) touched: bool,
    /// It has waited before, in another process: delivery is given up then.
    pub(super) given_up: Option<Instant>,
    /// In the line of its service.
    pub(super) in_line: bool,
    /// The turn of the script that the service is in.
    pub(super) turn: usize,
    /// What it has said in it, if that is not all.
    pub(super) heard: Vec<u8>,
    /// It is still to be told what the turn begins with.
    pub(super) unsaid: bool,
    /// Of the question about its bytes that is not answered; 0 is none.
    pub(super) ticket: u64,
    /// The other side is that of an errand.
    pub(super) on_errand: bool,
    /// Why the last try failed.
    pub(super) error: Option<Errno>,
    /// Its service was found asleep, and is not to be woken for it: what it shows is for `Guide::asleep`.
    pub(super) is_asleep: bool,
    /// It was told something then.
    pub(super) was_told: bool,
    /// What its waiting for a sleeper counts; 0 is not parked.
    pub(super) parked_bytes: u64,
    /// Its client has said that it will send no more.
    pub(super) hung_up: bool,
    /// It is to be ended for this reason when its turn comes.
    pub(super) parting: Option<Reason>,
}

impl<M> Wait<M> {
    /// Whether a moment is set for it.
    pub(super) fn is_due(&self) -> bool {
        self.due.is_some()
    }

    /// Whether nothing but its service is in its way.
    pub(super) fn is_on_its_way(&self) -> bool {
        self.parked_bytes == 0 && self.parting.is_none()
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Waits<M> {
    places: Vec<Wait<M>>,
    free: Vec<u32>,
    due: BTreeSet<(Instant, u32)>,
    /// Who waits for a service that has no room, in the order in which they came; by the service's row.
    lines: HashMap<u32, VecDeque<u32>>,
}

impl<M: Default> Waits<M> {
    pub(super) fn new() -> Waits<M> {
        Waits { places: Vec::new(), free: Vec::new(), due: BTreeSet::new(), lines: HashMap::new() }
    }

    pub(super) fn begin(&mut self, session: u32) -> u32 {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push(Wait::default());
            self.places.len() as u32 - 1
        });
        self.places[place as usize] = Wait { session, ..Wait::default() };
        place
    }

    pub(super) fn at(&mut self, place: u32) -> &mut Wait<M> {
        &mut self.places[place as usize]
    }

    pub(super) fn get(&self, place: u32) -> Option<&Wait<M>> {
        self.places.get(place as usize)
    }

    pub(super) fn set_due(&mut self, place: u32, due: Option<Instant>) {
        let before = std::mem::replace(&mut self.places[place as usize].due, due);
        if let Some(before) = before {
            self.due.remove(&(before, place));
        }
        if let Some(due) = due {
            self.due.insert((due, place));
        }
    }

    pub(super) fn end(&mut self, place: u32) {
        self.set_due(place, None);
        self.free.push(place);
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// The place whose moment has come longest ago; it is due no more.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<u32> {
        let &(due, place) = self.due.first()?;
        if due > now {
            return None;
        }
        self.set_due(place, None);
        Some(place)
    }

    /// Whether somebody waits for the service.
    pub(super) fn has_line(&self, service: u32) -> bool {
        self.lines.contains_key(&service)
    }

    /// Stand in the service's line; says whether nobody is before it.
    pub(super) fn stand_in_line(&mut self, service: u32, place: u32) -> bool {
        let line = self.lines.entry(service).or_default();
        if !std::mem::replace(&mut self.places[place as usize].in_line, true) {
            line.push_back(place);
        }
        line.front() == Some(&place)
    }

    /// Whether it stands in the service's line and is not its first.
    pub(super) fn is_behind(&self, service: u32, place: u32) -> bool {
        self.places[place as usize].in_line && self.lines.get(&service).is_some_and(|line| line.front() != Some(&place))
    }

    /// Leave the service's line. If another is its first now, that one is due at once: there may be room.
    pub(super) fn leave_line(&mut self, service: u32, place: u32) {
        if !std::mem::take(&mut self.places[place as usize].in_line) {
            return;
        }
        let Some(line) = self.lines.get_mut(&service) else { return };
        // Deadlines mostly come in the order of the line, so it is mostly the first.
        let at = line.iter().position(|&other| other == place);
        at.map(|at| line.remove(at));
        if line.is_empty() {
            self.lines.remove(&service);
        } else if at == Some(0) {
            self.try_first(service);
        }
    }

    /// The first in the service's line is due at once, unless it is being delivered.
    pub(super) fn try_first(&mut self, service: u32) {
        if let Some(&first) = self.lines.get(&service).and_then(VecDeque::front)
            && self.places[first as usize].is_due()
        {
            self.set_due(first, Some(Instant(0)));
        }
    }

    /// How many stand in a line.
    pub(super) fn in_lines(&self) -> usize {
        self.lines.values().map(VecDeque::len).sum()
    }

    pub(super) fn in_use(&self) -> usize {
        self.places.len() - self.free.len()
    }
}
