//! What is under way: a bounded table whose entries wait in the order in which they began, so that one deadline serves
//! all. Decides tickets: a slot and its generation, so that a late answer cannot hit another entry. Knows no meaning.

use crate::contract::Instant;

const NONE: u32 = u32::MAX;
/// Slots that a ticket can name; the other half of its bits is the generation.
const MOST_SLOTS: u32 = 1 << 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    /// Under way and in the queue of deadlines.
    Waiting,
    /// Under way, given up, not answered yet.
    Expired,
}

#[derive(Debug)]
struct Slot<T> {
    value: T,
    began: Instant,
    before: u32,
    /// The next in the queue, or the next free slot.
    after: u32,
    generation: u16,
    state: State,
}

/// Entries under way.
#[derive(Debug)]
pub(crate) struct Window<T> {
    slots: Vec<Slot<T>>,
    most: u32,
    under_way: u32,
    free: u32,
    oldest: u32,
    newest: u32,
}

/// An entry that has ended.
pub(crate) struct Ended<T> {
    pub(crate) value: T,
    pub(crate) began: Instant,
    pub(crate) expired: bool,
}

impl<T: Copy> Window<T> {
    /// A window of `most` entries (at least one, at most what a ticket can name).
    pub(crate) fn new(most: u32) -> Window<T> {
        let most = most.clamp(1, MOST_SLOTS);
        Window { slots: Vec::new(), most, under_way: 0, free: NONE, oldest: NONE, newest: NONE }
    }

    pub(crate) fn most(&self) -> u32 {
        self.most
    }

    pub(crate) fn under_way(&self) -> u32 {
        self.under_way
    }

    pub(crate) fn is_full(&self) -> bool {
        self.under_way == self.most
    }

    /// A new entry; returns its ticket. The caller has asked `is_full`.
    pub(crate) fn begin(&mut self, value: T, now: Instant) -> u32 {
        assert!(!self.is_full(), "a full window takes nothing");
        let index = if self.free == NONE {
            self.slots.push(Slot { value, began: now, before: NONE, after: NONE, generation: 0, state: State::Free });
            self.slots.len() as u32 - 1
        } else {
            let index = self.free;
            self.free = self.slots[index as usize].after;
            index
        };
        let before = self.newest;
        let slot = &mut self.slots[index as usize];
        (slot.value, slot.began, slot.before, slot.after, slot.state) = (value, now, before, NONE, State::Waiting);
        let ticket = u32::from(slot.generation) << 16 | index;
        match before {
            NONE => self.oldest = index,
            _ => self.slots[before as usize].after = index,
        }
        self.newest = index;
        self.under_way += 1;
        ticket
    }

    /// The entry is answered; `None` if the ticket is not under way.
    pub(crate) fn end(&mut self, ticket: u32) -> Option<Ended<T>> {
        let index = self.slot_of(ticket)?;
        if self.slots[index as usize].state == State::Waiting {
            self.leave_queue(index);
        }
        let free = self.free;
        let slot = &mut self.slots[index as usize];
        let ended = Ended { value: slot.value, began: slot.began, expired: slot.state == State::Expired };
        slot.generation = slot.generation.wrapping_add(1);
        (slot.state, slot.after) = (State::Free, free);
        self.free = index;
        self.under_way -= 1;
        Some(ended)
    }

    /// The entry that began first, of those not given up.
    pub(crate) fn oldest(&self) -> Option<(u32, Instant)> {
        let slot = self.slots.get(self.oldest as usize)?;
        Some((u32::from(slot.generation) << 16 | self.oldest, slot.began))
    }

    /// What is kept of the entry; `None` if the ticket is not under way.
    pub(crate) fn value_mut(&mut self, ticket: u32) -> Option<&mut T> {
        let index = self.slot_of(ticket)?;
        Some(&mut self.slots[index as usize].value)
    }

    /// How long ago the entry began; zero if it is not under way.
    pub(crate) fn age_ns(&self, ticket: u32, now: Instant) -> u64 {
        self.slot_of(ticket).map_or(0, |index| now.0.saturating_sub(self.slots[index as usize].began.0))
    }

    /// Give up on the entry; it stays under way until `end`.
    pub(crate) fn expire(&mut self, ticket: u32) {
        if let Some(index) = self.slot_of(ticket)
            && self.slots[index as usize].state == State::Waiting
        {
            self.leave_queue(index);
            self.slots[index as usize].state = State::Expired;
        }
    }

    /// The bookkeeping held against itself.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut queued = 0;
        let (mut before, mut index, mut began) = (NONE, self.oldest, Instant(0));
        while let Some(slot) = self.slots.get(index as usize) {
            if slot.before != before || slot.state != State::Waiting || slot.began < began {
                return Err(format!("the queue of deadlines is broken at slot {index}"));
            }
            (before, began, index, queued) = (index, slot.began, slot.after, queued + 1);
        }
        let count = |state| self.slots.iter().filter(|slot| slot.state == state).count() as u32;
        if before != self.newest || queued != count(State::Waiting) {
            return Err(format!("{queued} in the queue, {} waiting", count(State::Waiting)));
        }
        match count(State::Waiting) + count(State::Expired) {
            all if all == self.under_way && all <= self.most => Ok(()),
            all => Err(format!("{all} slots in use, {} under way, {} allowed", self.under_way, self.most)),
        }
    }

    fn slot_of(&self, ticket: u32) -> Option<u32> {
        let index = ticket & (MOST_SLOTS - 1);
        let slot = self.slots.get(index as usize)?;
        (slot.state != State::Free && u32::from(slot.generation) == ticket >> 16).then_some(index)
    }

    fn leave_queue(&mut self, index: u32) {
        let (before, after) = (self.slots[index as usize].before, self.slots[index as usize].after);
        match before {
            NONE => self.oldest = after,
            _ => self.slots[before as usize].after = after,
        }
        match after {
            NONE => self.newest = before,
            _ => self.slots[after as usize].before = before,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stale_ticket_hits_nobody() {
        let mut window = Window::new(1);
        let first = window.begin('a', Instant(1));
        assert!(window.is_full());
        assert_eq!(window.end(first).map(|ended| ended.value), Some('a'));
        let second = window.begin('b', Instant(2));
        assert!(window.end(first).is_none());
        assert_eq!(window.end(second).map(|ended| (ended.value, ended.expired)), Some(('b', false)));
    }

    #[test]
    fn an_expired_entry_stays_under_way() {
        let mut window = Window::new(2);
        let ticket = window.begin((), Instant(1));
        window.expire(ticket);
        assert_eq!((window.oldest(), window.under_way()), (None, 1));
        assert!(window.end(ticket).is_some_and(|ended| ended.expired));
    }

    proptest! {
        #[test]
        fn any_sequence_keeps_the_queue_in_order(steps in prop::collection::vec((0u8..4, 0usize..8), 0..200)) {
            let mut window = Window::new(8);
            let mut under_way: Vec<u32> = Vec::new();
            for (at, (step, which)) in steps.into_iter().enumerate() {
                match step {
                    0 | 1 if !window.is_full() => under_way.push(window.begin(at, Instant(at as u64))),
                    2 if which < under_way.len() => window.expire(under_way[which]),
                    3 if which < under_way.len() => prop_assert!(window.end(under_way.swap_remove(which)).is_some()),
                    _ => {}
                }
                prop_assert_eq!(window.check(), Ok(()));
                prop_assert_eq!(window.under_way() as usize, under_way.len());
            }
        }
    }
}
