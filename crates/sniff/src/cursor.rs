//! Reads fields off the front of bytes. Every protocol here that counts its fields counts in network order.
//!
//! A field that is not there is malformed: readers run when the whole message is.

use crate::Refusal;

#[derive(Clone, Copy)]
pub(crate) struct Cursor<'a>(pub(crate) &'a [u8]);

impl<'a> Cursor<'a> {
    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], Refusal> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Refusal::Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Refusal> {
        Ok(self.take(1)?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Refusal> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// What follows its own length in one byte.
    pub(crate) fn short(&mut self) -> Result<Self, Refusal> {
        let count = self.u8()?;
        self.take(usize::from(count)).map(Cursor)
    }

    /// What follows its own length in two bytes.
    pub(crate) fn long(&mut self) -> Result<Self, Refusal> {
        let count = self.u16()?;
        self.take(usize::from(count)).map(Cursor)
    }

    /// What is before the next NUL, which is taken too.
    pub(crate) fn text(&mut self) -> Result<&'a [u8], Refusal> {
        let end = self.0.iter().position(|&byte| byte == 0).ok_or(Refusal::Malformed)?;
        let text = self.take(end)?;
        self.take(1)?;
        Ok(text)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The two bytes at `at`, which the caller has seen to be there.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]))
}

/// The four bytes at `at`, which the caller has seen to be there.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Whether what is there of `bytes` is a beginning of `expected`, or begins with it.
pub(crate) fn agrees(bytes: &[u8], expected: &[u8]) -> bool {
    let count = bytes.len().min(expected.len());
    bytes[..count] == expected[..count]
}

/// Where the line that holds position `from` ends: behind its LF.
pub(crate) fn line_end(bytes: &[u8], from: usize) -> Option<usize> {
    bytes.get(from..)?.iter().position(|&byte| byte == b'\n').map(|place| from + place + 1)
}

/// A line without its LF or CR LF.
pub(crate) fn trim_end(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}
