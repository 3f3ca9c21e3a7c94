//! Bytes at an offset: for protocols that no probe knows.
//!
//! Decides whether a rule's bytes stand where it says. Patterns are asked last and in their order, so that one further
//! into the stream cannot keep a hello waiting for bytes that its client does not send.

use crate::shown::Shown;
use crate::{Found, Progress, Protocol};

/// A rule: these bytes at that offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern<'p> {
    offset: u16,
    bytes: &'p [u8],
}

/// How far into the stream a pattern may end.
pub(crate) const BOUND: usize = 4096;

impl<'p> Pattern<'p> {
    /// None if it has no bytes, or ends more than 4,096 bytes into the stream.
    pub fn new(offset: u16, bytes: &'p [u8]) -> Option<Self> {
        let end = usize::from(offset) + bytes.len();
        (!bytes.is_empty() && end <= BOUND).then_some(Self { offset, bytes })
    }

    fn find(&self, bytes: &[u8]) -> Found {
        let end = usize::from(self.offset) + self.bytes.len();
        let there = bytes.get(usize::from(self.offset)..bytes.len().min(end)).unwrap_or_default();
        match self.bytes.starts_with(there) {
            false => Found::No,
            true if bytes.len() < end => Found::More(end),
            true => Found::Whole(end),
        }
    }
}

/// `mark`: the pattern that is being asked.
pub(crate) fn find(progress: &mut Progress, bytes: &[u8], patterns: &[Pattern<'_>]) -> Found {
    while let Some(pattern) = patterns.get(progress.mark as usize) {
        match pattern.find(bytes) {
            Found::No => progress.mark += 1,
            found => return found,
        }
    }
    Found::No
}

pub(crate) fn read(progress: &Progress, end: usize) -> Shown<'static> {
    let mut shown = Shown::new(Protocol::Pattern, end);
    shown.pattern = Some(progress.mark as u16);
    shown
}
