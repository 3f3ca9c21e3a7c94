//! What can go wrong, as values. Knows no exception: the binding gives these Python's shape.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something was not done. Nothing of the transaction it happened in was kept.
#[derive(Debug)]
pub enum Error {
    /// A value that cannot be used: which field, and what is wrong with it and allowed instead.
    Bad {
        /// The field, option or line.
        field: String,
        /// The value and what is allowed.
        why: String,
    },
    /// There is no store at this path.
    Absent(PathBuf),
    /// The map is full: the store was opened for at most so many bytes.
    Full {
        /// Bytes it was opened for.
        most_bytes: u64,
    },
    /// All slots for readers are taken.
    Readers(u32),
    /// The operating system refused.
    Io(PathBuf, io::Error),
    /// The file is damaged, or LMDB met what it never should.
    Damaged(PathBuf, String),
}

impl Error {
    /// A value that cannot be used.
    pub fn bad(field: impl Into<String>, why: impl Into<String>) -> Error {
        Error::Bad { field: field.into(), why: why.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Bad { field, why } => write!(out, "{field}: {why}"),
            Error::Absent(path) => write!(out, "there is no registry at {}", path.display()),
            Error::Full { most_bytes } => write!(out, "the registry is full: it was opened for {most_bytes} bytes"),
            Error::Readers(most) => write!(out, "all {most} places for readers of the registry are taken"),
            Error::Io(path, error) => write!(out, "{}: {error}", path.display()),
            Error::Damaged(path, why) => write!(out, "the registry at {} is damaged: {why}", path.display()),
        }
    }
}

impl std::error::Error for Error {}

/// A value in a message: short, and harmless to a terminal.
pub(crate) fn shown(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    format!("{short:?}")
}
