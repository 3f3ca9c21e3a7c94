//! Bytes at an offset: for protocols that no probe knows.
//!
//! Decides whether a rule's bytes stand where it says. A rule has its bytes in itself, so that whoever keeps some needs no
//! second thing that they borrow from. Patterns are asked last and in their order, so that one further
//! into the stream cannot keep a hello waiting for bytes that its client does not send.

use crate::shown::Shown;
use crate::{Found, Progress, Protocol};

/// A rule: these bytes at that offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    offset: u16,
    length: u8,
    bytes: [u8; PATTERN_BYTES],
}

/// Bytes of one pattern, at most.
pub const PATTERN_BYTES: usize = 64;

/// How far into the stream a pattern may end.
pub(crate) const BOUND: usize = 4096;

impl Pattern {
    /// None if it has no bytes or more than 64, or ends more than 4,096 bytes into the stream.
    pub fn new(offset: u16, bytes: &[u8]) -> Option<Self> {
        let end = usize::from(offset) + bytes.len();
        if bytes.is_empty() || bytes.len() > PATTERN_BYTES || end > BOUND {
            return None;
        }
        let mut kept = [0; PATTERN_BYTES];
        kept[..bytes.len()].copy_from_slice(bytes);
        Some(Self { offset, length: bytes.len() as u8, bytes: kept })
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    /// `compared`: how many of its bytes were seen to be right.
    fn find(&self, bytes: &[u8], compared: &mut u32) -> Found {
        let begin = usize::from(self.offset);
        let end = begin + self.bytes().len();
        let there = bytes.get(begin..bytes.len().min(end)).unwrap_or_default();
        let from = *compared as usize;
        if !self.bytes()[from..].starts_with(&there[from..]) {
            return Found::No;
        }
        *compared = there.len() as u32;
        if bytes.len() < end { Found::More(end) } else { Found::Whole(end) }
    }
}

/// `mark`: the pattern that is being asked; `at`: how many of its bytes are right.
pub(crate) fn find(progress: &mut Progress, bytes: &[u8], patterns: &[Pattern]) -> Found {
    while let Some(pattern) = patterns.get(progress.mark as usize) {
        match pattern.find(bytes, &mut progress.at) {
            Found::No => (progress.mark, progress.at) = (progress.mark + 1, 0),
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
