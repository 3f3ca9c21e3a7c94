//! Redis: the first command, as an array of bulk strings or as a line (RESP, "Inline commands" of its specification).
//!
//! Decides who logs in, if the first command is HELLO or AUTH, and which database SELECT chooses. Any other command is
//! Redis as soon as its name is there. A line has no mark of its own, so it is Redis only if [`INLINE`] has its word.

use crate::cursor::{line_end, trim_end};
use crate::shown::Shown;
use crate::{Found, Progress, Protocol, Refusal};

/// How much of a command is read; a user name and a password fit.
pub(crate) const BYTES: usize = 4096;
/// "*", "$", up to ten digits, CR LF.
const COUNT_BYTES: usize = 13;
/// The longest name of a command: more than any has.
const NAME_BYTES: usize = 32;
/// HELLO 3 AUTH user password SETNAME name.
const MOST_WORDS: usize = 7;

/// What people and health checks type first.
pub(crate) const INLINE: [&[u8]; 14] = [
    b"AUTH", b"CLIENT", b"COMMAND", b"DBSIZE", b"ECHO", b"EXISTS", b"HELLO", b"INFO", b"KEYS", b"MONITOR", b"PING",
    b"QUIT", b"SELECT", b"TIME",
];

/// `at`: the next word, or how far a line was looked at; `mark`: words left; `phase`: words so far and one.
pub(crate) fn find(progress: &mut Progress, bytes: &[u8]) -> Found {
    match bytes.first() {
        None => Found::More(1),
        Some(b'*') => find_array(progress, bytes),
        Some(_) => find_line(progress, bytes),
    }
}

pub(crate) fn read(bytes: &[u8], end: usize) -> Result<Shown<'_>, Refusal> {
    let mut words = [b"".as_slice(); MOST_WORDS];
    let count = match bytes[0] {
        b'*' => array(&bytes[..end], &mut words)?,
        _ => line(trim_end(&bytes[..end]), &mut words)?,
    };
    let mut shown = Shown::new(Protocol::Redis, end);
    let [first, rest @ ..] = &words[..count] else { return Err(Refusal::Malformed) };
    if first.eq_ignore_ascii_case(b"auth") {
        shown.user = match rest {
            [_] => Some(b"default"), // AUTH password
            [user, _] => Some(user),
            _ => return Err(Refusal::Malformed),
        };
    } else if first.eq_ignore_ascii_case(b"select") {
        shown.database = rest.first().copied();
    } else if first.eq_ignore_ascii_case(b"hello") {
        hello(rest.get(1..).unwrap_or_default(), &mut shown)?;
    }
    Ok(shown)
}

/// [AUTH user password] [SETNAME name], in any order, each once.
fn hello<'a>(options: &[&'a [u8]], shown: &mut Shown<'a>) -> Result<(), Refusal> {
    match options {
        [] => Ok(()),
        [word, user, _, rest @ ..] if word.eq_ignore_ascii_case(b"auth") => match shown.user.replace(user) {
            None => hello(rest, shown),
            Some(_) => Err(Refusal::Repeated),
        },
        [word, name, rest @ ..] if word.eq_ignore_ascii_case(b"setname") => match shown.client.replace(name) {
            None => hello(rest, shown),
            Some(_) => Err(Refusal::Repeated),
        },
        _ => Err(Refusal::Malformed),
    }
}

/// Whether the words after this one say who is there.
fn says_more(name: &[u8]) -> bool {
    [b"auth".as_slice(), b"hello", b"select"].iter().any(|it| name.eq_ignore_ascii_case(it))
}

fn find_array(progress: &mut Progress, bytes: &[u8]) -> Found {
    if progress.phase == 0 {
        match Count::read(bytes, 0, b'*') {
            // Not Redis before the end of its first line: two characters say too little.
            Count::Wrong => return Found::No,
            Count::More => return Found::More(bytes.len() + 1),
            Count::Is(0, _) => return Found::No,
            Count::Is(words, end) => (progress.mark, progress.at) = (words as u32, end as u32),
        }
        progress.phase = 1;
    }
    loop {
        let at = progress.at as usize;
        let (size, begin) = match Count::read(bytes, at, b'$') {
            Count::Wrong if progress.phase == 1 => return Found::No,
            Count::Wrong => return Found::Refused(Refusal::Malformed),
            Count::More => return Found::More(bytes.len() + 1),
            Count::Is(size, begin) => (size, begin),
        };
        let end = begin + size + 2;
        if progress.phase == 1 && (size == 0 || size > NAME_BYTES) {
            return Found::No;
        }
        if end > BYTES - COUNT_BYTES {
            return Found::Refused(Refusal::TooLong);
        }
        if bytes.len() < end {
            return Found::More(end);
        }
        if &bytes[end - 2..end] != b"\r\n" {
            return Found::Refused(Refusal::Malformed);
        }
        let name = &bytes[begin..end - 2];
        if progress.phase == 1 && !says_more(name) {
            return if is_word(name) { Found::Whole(end) } else { Found::No };
        }
        if progress.mark <= 1 {
            return Found::Whole(end);
        }
        if progress.phase as usize == MOST_WORDS {
            return Found::Refused(Refusal::Malformed);
        }
        (progress.at, progress.mark, progress.phase) = (end as u32, progress.mark - 1, progress.phase + 1);
    }
}

fn find_line(progress: &mut Progress, bytes: &[u8]) -> Found {
    let bytes = &bytes[..bytes.len().min(BYTES)];
    let head = &bytes[..bytes.len().min(NAME_BYTES)];
    let count = head.iter().position(|byte| !byte.is_ascii_alphabetic());
    let name = &head[..count.unwrap_or(head.len())];
    let fits = |word: &&[u8]| word.get(..name.len()).is_some_and(|it| it.eq_ignore_ascii_case(name));
    let whole = |word: &&[u8]| word.eq_ignore_ascii_case(name);
    match count {
        None if INLINE.iter().any(fits) => return Found::More(bytes.len() + 1),
        None => return Found::No,
        Some(count) if !INLINE.iter().any(whole) || !b" \t\r\n".contains(&bytes[count]) => return Found::No,
        Some(_) => {}
    }
    match line_end(bytes, progress.at as usize) {
        Some(end) => Found::Whole(end),
        None if bytes.len() < BYTES => {
            progress.at = bytes.len() as u32;
            Found::More(bytes.len() + 1)
        }
        None => Found::Refused(Refusal::TooLong),
    }
}

/// The words of an array that was found whole; of one that was not, its name.
fn array<'a>(bytes: &'a [u8], words: &mut [&'a [u8]; MOST_WORDS]) -> Result<usize, Refusal> {
    let Count::Is(_, mut at) = Count::read(bytes, 0, b'*') else { return Err(Refusal::Malformed) };
    let mut count = 0;
    while at < bytes.len() {
        let Count::Is(size, begin) = Count::read(bytes, at, b'$') else { return Err(Refusal::Malformed) };
        *words.get_mut(count).ok_or(Refusal::Malformed)? = &bytes[begin..begin + size];
        (at, count) = (begin + size + 2, count + 1);
    }
    Ok(count)
}

/// The words of a line. Quotes would need unquoting, and are no way for a program to log in.
fn line<'a>(line: &'a [u8], words: &mut [&'a [u8]; MOST_WORDS]) -> Result<usize, Refusal> {
    let mut count = 0;
    for word in line.split(|byte| b" \t\r\0".contains(byte)).filter(|word| !word.is_empty()) {
        if count == 0 && !says_more(word) {
            words[0] = word;
            return Ok(1);
        }
        if word.iter().any(|byte| b"\"'".contains(byte)) {
            return Err(Refusal::Malformed);
        }
        *words.get_mut(count).ok_or(Refusal::Malformed)? = word;
        count += 1;
    }
    Ok(count)
}

fn is_word(name: &[u8]) -> bool {
    name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte))
}

/// A marker, a number in decimal, CR LF: the number, and where it ends.
enum Count {
    Is(usize, usize),
    More,
    Wrong,
}

impl Count {
    fn read(bytes: &[u8], at: usize, marker: u8) -> Self {
        let text = bytes.get(at..bytes.len().min(at + COUNT_BYTES)).unwrap_or_default();
        let digits = text.iter().skip(1).take_while(|byte| byte.is_ascii_digit()).count();
        let number = text.iter().skip(1).take(digits).fold(0u64, |it, digit| it * 10 + u64::from(digit - b'0'));
        match (text.first(), text.get(1 + digits), text.get(2 + digits)) {
            (Some(&first), ..) if first != marker => Self::Wrong,
            (_, Some(b'\r'), Some(b'\n')) if digits > 0 && number <= u64::from(u32::MAX) => {
                Self::Is(number as usize, at + digits + 3)
            }
            (_, None, _) | (_, Some(b'\r'), None) if text.len() < COUNT_BYTES => Self::More,
            _ => Self::Wrong,
        }
    }
}
