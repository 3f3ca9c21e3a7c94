//! Which tuple comes next, and what a failed attempt says about the tuples that are left.
//!
//! Decides the order and the end of the walk over a [`Space`]. Knows no connection and no time.
//!
//! Chosen tuples (`SinglePort`, `Bind`) are each tried once. Kernel choices walk over (source, destination) pairs, and a
//! pair is used up when the kernel refuses a *lone* attempt: with others under way a refusal proves nothing, because a
//! half-open connection that fails gives its port back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::contract::{Errno, SourceChoice, Step};
use crate::space::Space;

/// What to try next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Next {
    /// This.
    Tuple { source: SocketAddr, destination: SocketAddr, range: (u16, u16) },
    /// Nothing before all attempts under way are answered.
    Wait,
    /// Nothing is left.
    End,
}

/// What a failure means for the walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Meaning {
    /// That tuple is in use; others may not be.
    TupleBusy,
    /// The kernel finds no free port for the pair, as far as this attempt can tell.
    PairRefused,
    /// Nothing about tuples.
    Other,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pair {
    /// The kernel still gives ports.
    Giving,
    /// It refused; the attempts under way are awaited.
    Doubted,
    /// A lone attempt is under way.
    Probed,
}

/// The walk of one worker.
#[derive(Debug)]
pub(crate) struct Walk {
    space: Space,
    choice: SourceChoice,
    /// The next index (chosen tuples), or the pair in use counted from `first` (kernel choices).
    at: u128,
    first: u128,
    stride: u128,
    /// Steps in all.
    end: u128,
    pair: Pair,
}

impl Walk {
    /// The share of worker `first` of `stride`. Chosen tuples are divided among the workers; pairs are not: the kernel
    /// keeps workers apart there, so each walks all pairs, from a start of its own, and none is left half used.
    pub(crate) fn new(space: Space, choice: SourceChoice, first: u64, stride: u64) -> Walk {
        let stride = u128::from(stride.max(1));
        let (first, step, end) = match choice {
            SourceChoice::SinglePort | SourceChoice::Bind => (u128::from(first), stride, space.size()),
            SourceChoice::Kernel | SourceChoice::KernelPort | SourceChoice::KernelRange => {
                let pairs = pairs(&space, choice);
                ((pairs / stride).saturating_mul(u128::from(first)), 1, pairs)
            }
        };
        let at = if choice_is_ours(choice) { first } else { 0 };
        Walk { space, choice, at, first, stride: step, end, pair: Pair::Giving }
    }

    /// Tuples in this worker's share; for kernel choices all, because every worker may use all.
    pub(crate) fn share(&self) -> u128 {
        match self.choice {
            SourceChoice::SinglePort | SourceChoice::Bind => self.end.saturating_sub(self.first).div_ceil(self.stride),
            // The kernel has one source address of its own per destination.
            SourceChoice::Kernel if !self.space.sources.is_empty() => {
                self.space.size() / (self.space.pairs() / self.space.endpoints().max(1)).max(1)
            }
            _ => self.space.size(),
        }
    }

    /// What to try next, with `under_way` attempts not answered yet.
    pub(crate) fn next(&mut self, under_way: u32) -> Next {
        if self.at >= self.end {
            return Next::End;
        }
        if choice_is_ours(self.choice) {
            let tuple = self.space.nth(self.at);
            self.at = self.at.saturating_add(self.stride);
            return tuple.map_or(Next::End, |(source, destination)| Next::Tuple { source, destination, range: (0, 0) });
        }
        if self.pair != Pair::Giving {
            if self.waits(under_way) {
                return Next::Wait;
            }
            self.pair = Pair::Probed;
        }
        self.pair_tuple((self.first + self.at) % self.end).unwrap_or(Next::End)
    }

    /// An attempt stands.
    pub(crate) fn connected(&mut self) {
        if self.pair == Pair::Probed {
            self.pair = Pair::Giving;
        }
    }

    /// An attempt failed.
    pub(crate) fn failed(&mut self, step: Step, error: Errno) -> Meaning {
        if choice_is_ours(self.choice) {
            // bind() says EADDRNOTAVAIL when the address is not ours (inet_bind_conflict is EADDRINUSE): no port helps.
            return match (step, error) {
                (_, Errno::EADDRINUSE) => Meaning::TupleBusy,
                (step, Errno::EADDRNOTAVAIL) if step != Step::Bind => Meaning::TupleBusy,
                _ => Meaning::Other,
            };
        }
        match (error, self.pair) {
            (Errno::EADDRNOTAVAIL, Pair::Probed) => {
                self.at += 1;
                self.pair = Pair::Giving;
                Meaning::PairRefused
            }
            (Errno::EADDRNOTAVAIL, _) => {
                self.pair = Pair::Doubted;
                Meaning::PairRefused
            }
            _ => Meaning::Other,
        }
    }

    /// Whether nothing may be tried before the attempts under way are answered.
    pub(crate) fn waits(&self, under_way: u32) -> bool {
        self.pair != Pair::Giving && under_way > 0
    }

    /// Whether nothing is left to try.
    pub(crate) fn is_at_end(&self) -> bool {
        self.at >= self.end
    }

    /// From the start again: connections that ended since gave tuples back. Those still in use will say so.
    pub(crate) fn rewind(&mut self) {
        self.at = if choice_is_ours(self.choice) { self.first } else { 0 };
        self.pair = Pair::Giving;
    }

    fn pair_tuple(&self, at: u128) -> Option<Next> {
        if self.choice == SourceChoice::Kernel {
            let destination = self.space.nth_endpoint(at)?;
            let any = if destination.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            return Some(tuple(any, destination, (0, 0)));
        }
        let pairs = self.space.pairs();
        let (source, destination) = self.space.nth_pair(at % pairs)?;
        let range = match self.choice {
            SourceChoice::KernelRange => self.space.source_ports.get((at / pairs) as usize).map(|p| (p.first, p.last)),
            _ => None,
        };
        Some(tuple(source, destination, range.unwrap_or((0, 0))))
    }
}

fn tuple(source: IpAddr, destination: SocketAddr, range: (u16, u16)) -> Next {
    Next::Tuple { source: SocketAddr::new(source, 0), destination, range }
}

fn choice_is_ours(choice: SourceChoice) -> bool {
    matches!(choice, SourceChoice::SinglePort | SourceChoice::Bind)
}

/// Steps of a walk over pairs: the kernel's own choice knows no source, a range is one more dimension.
fn pairs(space: &Space, choice: SourceChoice) -> u128 {
    match choice {
        SourceChoice::Kernel => space.endpoints(),
        SourceChoice::KernelRange => space.pairs().saturating_mul(space.source_ports.len().max(1) as u128),
        _ => space.pairs(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::{Addresses, Ports};

    fn space() -> Space {
        Space {
            sources: vec![Addresses { first: "10.0.0.1".parse().expect("an address"), count: 2 }],
            source_ports: vec![Ports { first: 1000, last: 1002 }],
            destinations: vec![Addresses { first: "10.1.0.1".parse().expect("an address"), count: 1 }],
            destination_ports: vec![Ports { first: 80, last: 81 }],
        }
    }

    fn all(mut walk: Walk) -> Vec<Next> {
        std::iter::from_fn(|| Some(walk.next(0)).filter(|&next| next != Next::End)).collect()
    }

    #[test]
    fn workers_share_chosen_tuples_without_meeting() {
        let shares: Vec<Vec<Next>> =
            (0..5).map(|first| all(Walk::new(space(), SourceChoice::SinglePort, first, 5))).collect();
        let mut seen = shares.concat();
        assert_eq!(shares.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 2, 2, 2]);
        seen.sort_by_key(|next| format!("{next:?}"));
        seen.dedup();
        assert_eq!(seen.len(), 12);
        assert_eq!(Walk::new(space(), SourceChoice::Bind, 2, 5).share(), 2);
        assert_eq!(Walk::new(space(), SourceChoice::Bind, 99, 5).share(), 0);
    }

    #[test]
    fn a_pair_ends_with_a_lone_refusal_only() {
        let mut walk = Walk::new(space(), SourceChoice::KernelPort, 0, 1);
        let first = walk.next(0);
        assert_eq!(walk.failed(Step::Connect, Errno::EADDRNOTAVAIL), Meaning::PairRefused);
        assert_eq!(walk.next(1), Next::Wait);
        assert_eq!(walk.next(0), first, "asked again alone");
        walk.connected();
        assert_eq!(walk.next(5), first, "it gave: the pair is open again");
        walk.failed(Step::Connect, Errno::EADDRNOTAVAIL);
        assert_eq!(walk.next(0), first);
        walk.failed(Step::Connect, Errno::ECONNREFUSED);
        assert_eq!(walk.next(0), first, "a refusal by the peer proves nothing");
        walk.failed(Step::Connect, Errno::EADDRNOTAVAIL);
        assert_ne!(walk.next(0), first);
    }

    #[test]
    fn every_worker_walks_all_pairs_from_its_own_start() {
        let mut walk = Walk::new(space(), SourceChoice::KernelPort, 1, 2);
        let mut seen = Vec::new();
        while let next @ Next::Tuple { .. } = walk.next(0) {
            seen.push(next);
            walk.failed(Step::Connect, Errno::EADDRNOTAVAIL);
            walk.next(0);
            walk.failed(Step::Connect, Errno::EADDRNOTAVAIL);
        }
        assert_eq!((seen.len(), walk.is_at_end()), (4, true));
        assert_eq!(seen[0], Walk::new(space(), SourceChoice::KernelPort, 0, 1).pair_tuple(2).expect("inside"));
    }

    #[test]
    fn an_address_that_is_not_ours_is_no_busy_tuple() {
        let mut walk = Walk::new(space(), SourceChoice::Bind, 0, 1);
        assert_eq!(walk.failed(Step::Bind, Errno::EADDRINUSE), Meaning::TupleBusy);
        assert_eq!(walk.failed(Step::Connect, Errno::EADDRNOTAVAIL), Meaning::TupleBusy);
        assert_eq!(walk.failed(Step::Bind, Errno::EADDRNOTAVAIL), Meaning::Other);
    }
}
