//! Which of a program's listeners take their clients from a broker, and where; and what of a datagram is a broker's note
//! (docs/handoff.md). Knows no socket and no process.

use core::net::{IpAddr, SocketAddr};

/// Listeners; `fourtuple run` refuses more before a program starts.
pub(crate) const MOST_HANDOFFS: usize = 16;
/// No note is longer.
pub(crate) const MOST_NOTE_BYTES: usize = FIXED_NOTE_BYTES + 2 * 256;

/// A path in a sockaddr_un, with the zero byte that ends it (unix(7)).
const MOST_PATH_BYTES: usize = 107;
const FIXED_NOTE_BYTES: usize = 48;
const NOTE_VERSION: u8 = 1;

/// Why a text names no handoffs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// A part is not LISTENER=PATH.
    Form,
    /// A listener is neither ADDRESS:PORT nor an absolute path.
    Listener,
    /// A path is not absolute, too long for a socket, or the listener itself.
    Path,
    /// More than there is room for.
    TooMany,
}

impl Refused {
    /// The end of a sentence that begins with the text.
    pub(crate) fn why(self) -> &'static str {
        match self {
            Refused::Form => "needs LISTENER=PATH with commas between them",
            Refused::Listener => "has a listener that is neither ADDRESS:PORT nor an absolute path",
            Refused::Path => "has a path that is not absolute, longer than 107 bytes, or the listener's own",
            Refused::TooMany => "has more than 16 listeners",
        }
    }
}

/// An absolute path that a socket can be bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Path {
    bytes: [u8; MOST_PATH_BYTES + 1],
    length: usize,
}

impl Path {
    /// None if no socket can be bound to it, or it is relative.
    pub(crate) fn new(text: &[u8]) -> Option<Path> {
        let mut bytes = [0; MOST_PATH_BYTES + 1];
        if text.first() != Some(&b'/') || text.len() > MOST_PATH_BYTES || text.contains(&0) {
            return None;
        }
        bytes.get_mut(..text.len())?.copy_from_slice(text);
        Some(Path { bytes, length: text.len() })
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// With the zero byte behind it.
    pub(crate) fn with_end(&self) -> &[u8] {
        &self.bytes
    }
}

/// What a program listens on, as it says in bind().
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listener {
    Internet(IpAddr, u16),
    Unix(Path),
}

/// One listener, and where its clients come from instead.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Handoff {
    pub(crate) listener: Listener,
    pub(crate) path: Path,
}

/// All of a program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Handoffs([Option<Handoff>; MOST_HANDOFFS]);

impl Handoffs {
    /// Read "127.0.0.1:6379=/run/redis,[::1]:6379=/run/redis,/run/app.sock=/run/app".
    pub(crate) fn parse(text: &str) -> Result<Handoffs, Refused> {
        let mut handoffs = Handoffs([None; MOST_HANDOFFS]);
        for (place, part) in text.split(',').enumerate() {
            let (listener, path) = part.trim_ascii().split_once('=').ok_or(Refused::Form)?;
            let listener = listener_of(listener.trim_ascii()).ok_or(Refused::Listener)?;
            let path = Path::new(path.trim_ascii().as_bytes()).ok_or(Refused::Path)?;
            if listener == Listener::Unix(path) {
                return Err(Refused::Path);
            }
            *handoffs.0.get_mut(place).ok_or(Refused::TooMany)? = Some(Handoff { listener, path });
        }
        Ok(handoffs)
    }

    /// The handoff of what a program binds to.
    pub(crate) fn of(&self, listener: Listener) -> Option<&Handoff> {
        self.0.iter().flatten().find(|handoff| handoff.listener == listener)
    }

    /// The first handoff over this path: several listeners may share one.
    pub(crate) fn at(&self, path: &[u8]) -> Option<&Handoff> {
        self.0.iter().flatten().find(|handoff| handoff.path.as_bytes() == path)
    }
}

fn listener_of(text: &str) -> Option<Listener> {
    if text.starts_with('/') {
        return Path::new(text.as_bytes()).map(Listener::Unix);
    }
    match text.parse().ok()? {
        SocketAddr::V6(end) if end.scope_id() != 0 => None,
        end if end.port() == 0 => None,
        end => Some(Listener::Internet(end.ip().to_canonical(), end.port())),
    }
}

/// Whether it is a broker's note, whole.
pub(crate) fn is_note(bytes: &[u8]) -> bool {
    let Some((fixed, names)) = bytes.split_at_checked(FIXED_NOTE_BYTES) else { return false };
    let &[b'4', b'T', b'U', b'P', NOTE_VERSION, 0 | 4 | 6, high, low, ..] = fixed else { return false };
    usize::from(u16::from_be_bytes([high, low])) == bytes.len()
        && name(names).and_then(name).is_some_and(<[u8]>::is_empty)
}

/// What follows the name that begins here; None if there is no whole one.
fn name(bytes: &[u8]) -> Option<&[u8]> {
    let (&length, rest) = bytes.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(length))?;
    core::str::from_utf8(name).is_ok().then_some(rest)
}

#[cfg(test)]
mod tests {
    use std::string::String;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn note() -> Vec<u8> {
        let mut note = Vec::from(*b"4TUP\x01\x04\x00\x46\x03\xe8\x01\xbb\x00\x00\x02\x05");
        note.extend([0; 32]);
        note.extend(b"\x04shop\x10shop.example.com");
        note
    }

    #[test]
    fn every_form_of_a_listener_is_read() {
        let text = " 127.0.0.1:6379=/run/a , [::1]:6379=/run/a,[::ffff:10.0.0.1]:80=/run/b,/run/app.sock=/run/c ";
        let handoffs = Handoffs::parse(text).unwrap();
        let of =
            |listener| handoffs.of(listener).map(|found| String::from_utf8_lossy(found.path.as_bytes()).into_owned());
        assert_eq!(of(Listener::Internet("127.0.0.1".parse().unwrap(), 6379)).as_deref(), Some("/run/a"));
        assert_eq!(of(Listener::Internet("::1".parse().unwrap(), 6379)).as_deref(), Some("/run/a"));
        assert_eq!(of(Listener::Internet("10.0.0.1".parse().unwrap(), 80)).as_deref(), Some("/run/b"));
        assert_eq!(of(Listener::Unix(Path::new(b"/run/app.sock").unwrap())).as_deref(), Some("/run/c"));
        assert_eq!(of(Listener::Internet("127.0.0.1".parse().unwrap(), 6380)), None);
        assert_eq!(of(Listener::Internet("127.0.0.2".parse().unwrap(), 6379)), None);
        let shared = handoffs.at(b"/run/a").unwrap();
        assert_eq!(shared.listener, Listener::Internet("127.0.0.1".parse().unwrap(), 6379), "the first of them");
        assert!(handoffs.at(b"/run/app.sock").is_none());
        assert_eq!(shared.path.with_end().get(..7), Some(&b"/run/a\0"[..]));
    }

    #[test]
    fn each_mistake_has_its_name() {
        let long = std::format!("127.0.0.1:1=/{}", "a".repeat(107));
        let many = std::vec!["127.0.0.1:1=/a"; MOST_HANDOFFS + 1].join(",");
        for (text, why) in [
            ("", Refused::Form),
            ("127.0.0.1:80", Refused::Form),
            ("127.0.0.1:80=/a,", Refused::Form),
            ("127.0.0.1=/a", Refused::Listener),
            ("127.0.0.1:0=/a", Refused::Listener),
            ("127.0.0.1:65536=/a", Refused::Listener),
            ("localhost:80=/a", Refused::Listener),
            ("*:80=/a", Refused::Listener),
            ("::1:80=/a", Refused::Listener),
            ("[fe80::1%2]:80=/a", Refused::Listener),
            ("app.sock=/a", Refused::Listener),
            ("127.0.0.1:80=a", Refused::Path),
            ("127.0.0.1:80=", Refused::Path),
            ("/a=/a", Refused::Path),
            (long.as_str(), Refused::Path),
            (many.as_str(), Refused::TooMany),
        ] {
            assert_eq!(Handoffs::parse(text).err(), Some(why), "{text}");
        }
    }

    #[test]
    fn a_note_is_whole_or_none() {
        let whole = note();
        assert!(is_note(&whole));
        for length in 0..whole.len() {
            assert!(!is_note(&whole[..length]), "{length} bytes");
        }
        for (place, byte) in [(0, b'5'), (4, 2), (5, 5), (7, 0x47), (48, 3), (48, 255), (53, 0x11), (49, 0xff)] {
            let mut spoilt = whole.clone();
            spoilt[place] = byte;
            assert!(!is_note(&spoilt), "byte {place}");
        }
        let mut longer = whole;
        longer.push(0);
        assert!(!is_note(&longer));
        longer[7] += 1;
        assert!(!is_note(&longer), "bytes behind the names");
    }

    proptest! {
        #[test]
        fn any_text_is_handoffs_or_a_named_mistake(text in "[0-9a-f:./,=\\[\\] ]{0,60}|\\PC{0,40}") {
            if let Ok(handoffs) = Handoffs::parse(&text) {
                prop_assert!(handoffs.0.iter().flatten().count() > 0);
            }
        }

        #[test]
        fn any_bytes_are_a_note_or_not(place in 0usize..70, bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(!is_note(&bytes));
            let mut spoilt = note();
            spoilt.splice(place.., bytes);
            is_note(&spoilt);
        }
    }
}
