//! Names: DNS names in one spelling, and the patterns of routes.
//!
//! Decides what a name is: labels of letters, digits, hyphen and underscore (RFC 1123 2.1; underscores as in RFC 8552), 63
//! bytes each and 253 in all (RFC 1035 2.3.4), lower case, no dot at the end. So no name can be a path, hold a NUL or be
//! one of `.` and `..`. Only ASCII: Python encodes other scripts (RFC 5891) before they come here.

use std::ops::Deref;

use crate::failure::{Error, Result, shown};

/// Longest name without the dot at its end: 255 bytes on the wire (RFC 1035 2.3.4) less two.
pub const MOST_NAME_BYTES: usize = 253;
const MOST_LABEL_BYTES: usize = 63;

/// A name in its one spelling, on the stack: a lookup allocates nothing for it.
#[derive(Clone, Copy)]
pub struct Name {
    bytes: [u8; MOST_NAME_BYTES],
    used: u8,
}

impl Name {
    /// The one spelling of what a client sent or somebody wrote; the reason if it is no name.
    pub fn parse(text: &[u8]) -> std::result::Result<Name, &'static str> {
        let text = text.strip_suffix(b".").unwrap_or(text);
        if text.is_empty() {
            return Err("is empty");
        }
        if text.len() > MOST_NAME_BYTES {
            return Err("is longer than 253 bytes");
        }
        let mut name = Name { bytes: [0; MOST_NAME_BYTES], used: text.len() as u8 };
        let mut label_bytes = 0;
        let mut before = b'.';
        for (place, &byte) in name.bytes.iter_mut().zip(text) {
            match byte {
                b'.' if label_bytes == 0 => return Err("has an empty label"),
                b'.' if before == b'-' => return Err("has a label that ends with a hyphen"),
                b'.' => label_bytes = 0,
                b'-' if label_bytes == 0 => return Err("has a label that begins with a hyphen"),
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' if label_bytes == MOST_LABEL_BYTES => {
                    return Err("has a label longer than 63 bytes");
                }
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => label_bytes += 1,
                _ => return Err("may hold letters, digits, hyphens, underscores and dots only"),
            }
            before = byte;
            *place = byte.to_ascii_lowercase();
        }
        match before {
            b'.' => Err("has an empty label"),
            b'-' => Err("has a label that ends with a hyphen"),
            _ => Ok(name),
        }
    }

    /// As [`Name::parse`], with an error that names `field`.
    pub fn checked(field: &str, text: &str) -> Result<Name> {
        Name::parse(text.as_bytes()).map_err(|why| Error::bad(field, format!("{} {why}", shown(text))))
    }

    /// What follows the first label, then the second, down to nothing: the suffixes that a wildcard may have.
    pub(crate) fn suffixes(&self) -> impl Iterator<Item = &str> {
        let mut left = Some(&**self);
        std::iter::from_fn(move || {
            let rest = left?.split_once('.').map(|(_, rest)| rest);
            left = rest;
            Some(rest.unwrap_or(""))
        })
        .scan(false, |ended, suffix| (!std::mem::replace(ended, suffix.is_empty())).then_some(suffix))
    }

    /// The first label.
    pub(crate) fn label(&self) -> &str {
        self.split('.').next().unwrap_or_default()
    }
}

impl Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        // Names hold nothing but ASCII; the fallback is never taken.
        std::str::from_utf8(&self.bytes[..usize::from(self.used)]).unwrap_or_default()
    }
}

/// What the name condition of a route says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// This name.
    Exact(String),
    /// `*.suffix`: one label more than the suffix, as in certificates (RFC 6125 6.4.3). `*` alone: any name of one label.
    One(String),
    /// `**.suffix`: one label more, or several. `**` alone: any name.
    Many(String),
}

impl Pattern {
    /// `name`, `*.suffix`, `**.suffix`, `*` or `**`.
    pub fn checked(field: &str, text: &str) -> Result<Pattern> {
        let suffix = |rest: &str| match rest.strip_prefix('.') {
            None if rest.is_empty() => Ok(String::new()),
            Some(suffix) => Name::checked(field, suffix).map(|name| name.to_string()),
            None => Err(Error::bad(
                field,
                format!("{}; a star stands for whole labels: *.suffix or **.suffix", shown(text)),
            )),
        };
        if let Some(rest) = text.strip_prefix("**") {
            suffix(rest).map(Pattern::Many)
        } else if let Some(rest) = text.strip_prefix('*') {
            suffix(rest).map(Pattern::One)
        } else {
            Name::checked(field, text).map(|name| Pattern::Exact(name.to_string()))
        }
    }

    /// Whether a name is meant.
    pub(crate) fn matches(&self, name: &Name) -> bool {
        match self {
            Pattern::Exact(exact) => **name == **exact,
            Pattern::One(suffix) => name.suffixes().next() == Some(suffix),
            Pattern::Many(suffix) => name.suffixes().any(|one| one == suffix),
        }
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (stars, suffix) = match self {
            Pattern::Exact(name) => return out.write_str(name),
            Pattern::One(suffix) => ("*", suffix),
            Pattern::Many(suffix) => ("**", suffix),
        };
        write!(out, "{stars}{}{suffix}", if suffix.is_empty() { "" } else { "." })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_spelling() {
        for (text, name) in
            [("a", "a"), ("A.Example.COM.", "a.example.com"), ("_pg._tcp.x", "_pg._tcp.x"), ("10.0.0.1", "10.0.0.1")]
        {
            assert_eq!(&*Name::parse(text.as_bytes()).unwrap(), name);
        }
    }

    #[test]
    fn no_names() {
        let long_label = "a".repeat(64);
        let long = ["a".repeat(63).as_str(); 4].join(".");
        for text in [
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "a..",
            "-a",
            "a-",
            "a-.b",
            "a/b",
            "../a",
            "a\0b",
            "a b",
            "ä",
            "*.a",
            "a:80",
            "[::1]",
            "a\n",
            "%2e",
            &long_label,
            &long,
        ] {
            assert!(Name::parse(text.as_bytes()).is_err(), "{text:?}");
        }
        assert!(Name::parse(&long.as_bytes()[2..]).is_ok(), "253 bytes are a name");
    }

    #[test]
    fn suffixes_from_the_longest() {
        let name = Name::parse(b"a.b.c").unwrap();
        assert_eq!(name.suffixes().collect::<Vec<_>>(), ["b.c", "c", ""]);
        assert_eq!(Name::parse(b"a").unwrap().suffixes().collect::<Vec<_>>(), [""]);
    }

    #[test]
    fn patterns() {
        let name = Name::parse(b"a.b.c").unwrap();
        for (pattern, wanted) in [
            ("a.b.c", true),
            ("A.B.C.", true),
            ("b.c", false),
            ("*.b.c", true),
            ("*.c", false),
            ("**.c", true),
            ("**.b.c", true),
            ("**", true),
            ("*", false),
            ("**.a.b.c", false),
        ] {
            let read = Pattern::checked("name", pattern).unwrap();
            assert_eq!(read.matches(&name), wanted, "{pattern}");
        }
        for bad in ["*a.b", "a.*.b", "***.a", "*.", "**.-", "*.*.a"] {
            assert!(Pattern::checked("name", bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_name_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(name) = Name::parse(&bytes) {
                prop_assert!(name.len() <= MOST_NAME_BYTES && !name.contains(['/', '\0']) && !name.starts_with('.'));
                prop_assert!(name.split('.').all(|label| (1..=63).contains(&label.len())));
                let again = Name::parse(name.as_bytes()).unwrap();
                prop_assert_eq!(&*again, &*name);
            }
        }

        #[test]
        fn names_are_found_under_their_patterns(text in "[a-zA-Z0-9_]{1,9}(\\.[a-z0-9_]{1,9}){0,4}") {
            let name = Name::parse(text.as_bytes()).unwrap();
            for suffix in name.suffixes() {
                let pattern = Pattern::checked("name", &format!("**{}{suffix}", if suffix.is_empty() { "" } else { "." }));
                prop_assert!(pattern.unwrap().matches(&name));
            }
        }
    }
}
