//! Lines of text that end in CR LF: one command, or a reply of several.
//!
//! Decides what a line is: a bare CR or LF is none, for the other side might think otherwise. Knows no command.

use fourtuple_engine::broker::guide::Heard;

/// The first line.
pub(super) enum Line<'a> {
    /// It is not there yet.
    More,
    /// Without its CR LF.
    Whole(&'a [u8]),
    /// Longer than `most`, or with a bare CR, LF or NUL in it.
    Broken,
}

/// The first line of `bytes`, of at most `most` bytes with its CR LF.
pub(super) fn first(bytes: &[u8], most: usize) -> Line<'_> {
    match bytes.iter().position(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
        None if bytes.len() < most => Line::More,
        Some(end) if end + 2 > most => Line::Broken,
        Some(end) => match &bytes[end..] {
            [b'\r'] => Line::More,
            [b'\r', b'\n', ..] => Line::Whole(&bytes[..end]),
            _ => Line::Broken,
        },
        None => Line::Broken,
    }
}

/// The first word, in upper case up to its length of 12, and what is behind the blank.
pub(super) fn word(line: &[u8]) -> (Vec<u8>, &[u8]) {
    let end = line.iter().position(|&byte| byte == b' ').unwrap_or(line.len());
    (line[..end.min(13)].to_ascii_uppercase(), line.get(end + 1..).unwrap_or_default())
}

/// Ask about each line of a reply in turn; the one that is a yes has to be the last thing said.
pub(super) fn hears(said: &[u8], judge: impl Fn(&[u8]) -> Heard) -> Heard {
    let mut rest = said;
    loop {
        let Some(end) = rest.iter().position(|&byte| byte == b'\n') else { return Heard::More };
        let (line, behind) = rest.split_at(end + 1);
        match judge(line) {
            Heard::More => rest = behind,
            Heard::Yes if behind.is_empty() => return Heard::Yes,
            Heard::Yes | Heard::No => return Heard::No,
        }
    }
}
