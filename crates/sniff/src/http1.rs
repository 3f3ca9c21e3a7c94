//! HTTP/1: which host a request is for, and whether it asks for a tunnel or a WebSocket (RFC 9112, RFC 9110, RFC 6455).
//!
//! Decides by the whole head, because a second Host header may stand in its last line. Knows no body and no answer.
//! A probe is HEAD; OPTIONS, unless a browser asks before the request that it means (Fetch 3.2.2: a preflight, told by
//! Access-Control-Request-Method), which it will not send if it is told no; and what names no host, as nmap and the health
//! checks of HAProxy do and no client since HTTP/1.1.
//!
//! What two servers could read differently is refused: the bytes go on as they are, so nothing can be put right here.

use crate::cursor::{agrees, line_end, trim_end};
use crate::name;
use crate::shown::{Intent, Scratch, Shown};
use crate::{Found, Progress, Protocol, Refusal};

/// The largest head that is read: request line and headers. nginx and HAProxy have 16 kB or less by default.
pub(crate) const HEAD_BYTES: usize = 16_384;
/// The longest method; the longest registered one has 17 letters.
const METHOD_BYTES: usize = 24;
/// Empty lines before a request that are overlooked (RFC 9112 2.2: at least one).
const LEADING_BYTES: usize = 4;

/// What a browser's question before a request has (Fetch 3.2.2).
pub(crate) const PREFLIGHT: &[u8] = b"access-control-request-method";

/// Phases of the search.
const REQUEST_LINE: u8 = 0;
const HEADERS: u8 = 1;

/// Any request. `mark`: the line that is being looked at; `at`: how far.
pub(crate) fn find(progress: &mut Progress, bytes: &[u8]) -> Found {
    let begin = leading(bytes);
    if progress.phase == REQUEST_LINE && !may_be_request(&bytes[begin..]) {
        return Found::No;
    }
    find_head(progress, bytes, begin, |line| Ok(RequestLine::read(line)?.is_some()))
}

/// A line that `is_line` accepts, then headers and an empty line.
pub(crate) fn find_head(
    progress: &mut Progress,
    bytes: &[u8],
    begin: usize,
    is_line: impl Fn(&[u8]) -> Result<bool, Refusal>,
) -> Found {
    if progress.phase == REQUEST_LINE {
        progress.at = progress.at.max(begin as u32);
        let end = match next_line(progress, bytes) {
            Ok(end) => end,
            Err(found) => return found,
        };
        match is_line(&bytes[begin..end]) {
            Ok(true) => *progress = Progress { at: end as u32, mark: end as u32, phase: HEADERS, ..*progress },
            Ok(false) => return Found::No,
            Err(why) => return Found::Refused(why),
        }
    }
    loop {
        match next_line(progress, bytes) {
            Ok(end) if trim_end(&bytes[progress.mark as usize..end]).is_empty() => return Found::Whole(end),
            Ok(end) => (progress.at, progress.mark) = (end as u32, end as u32),
            Err(found) => return found,
        }
    }
}

/// A request for a tunnel.
pub(crate) fn find_connect(progress: &mut Progress, bytes: &[u8]) -> Found {
    let begin = leading(bytes);
    if agrees(&bytes[begin..], b"CONNECT ") { find(progress, bytes) } else { Found::No }
}

/// A request to upgrade to WebSocket.
pub(crate) fn find_websocket(progress: &mut Progress, bytes: &[u8]) -> Found {
    let begin = leading(bytes);
    if !agrees(&bytes[begin..], b"GET ") {
        return Found::No;
    }
    match find(progress, bytes) {
        Found::Whole(end) => match Head::read(&bytes[begin..end]) {
            Ok(head) if head.asks_websocket && head.asks_upgrade => Found::Whole(end),
            Ok(_) => Found::No,
            Err(why) => Found::Refused(why),
        },
        found => found,
    }
}

/// Read the head that ends at `end`.
pub(crate) fn read<'a>(
    protocol: Protocol,
    bytes: &'a [u8],
    end: usize,
    scratch: &'a mut Scratch,
) -> Result<Shown<'a>, Refusal> {
    let head = Head::read(&bytes[leading(bytes)..end])?;
    let mut shown = Shown::new(protocol, end);
    let meant = match (head.line.target.authority, head.host) {
        // RFC 9112 3.2.2: the target decides and Host is ignored. Not every server does, so they have to agree.
        (Some(target), Some(host)) if !name::same(target, host)? => return Err(Refusal::Contradiction),
        (Some(target), _) => Some(target),
        (None, host) => host,
    };
    if let Some(authority) = meant {
        (shown.name, shown.port) = name::authority(authority, &mut scratch.name)?;
    }
    if head.line.method == b"CONNECT" && (shown.name.is_none() || shown.port.is_none()) {
        return Err(Refusal::Malformed); // RFC 9112 3.2.3: an empty or invalid port
    }
    shown.path = head.line.target.path;
    shown.intent = Intent::probe_if(head.line.is_probe() && !head.is_preflight || shown.name.is_none());
    Ok(shown)
}

/// How many bytes of empty lines stand in front.
fn leading(bytes: &[u8]) -> usize {
    bytes.iter().take(LEADING_BYTES).take_while(|byte| matches!(byte, b'\r' | b'\n')).count()
}

/// Whether a request line may begin so: a method, white space, and the beginning of a target. Methods are case-sensitive
/// and all registered ones upper case (RFC 9110 9.1, 16.1.1).
fn may_be_request(line: &[u8]) -> bool {
    let method = line.iter().take(METHOD_BYTES + 1).take_while(|it| it.is_ascii_uppercase() || **it == b'-').count();
    match line.get(method) {
        None => method <= METHOD_BYTES,
        // Only a space is right; the others are kept so that the line can be refused (RFC 9112 3: lenient servers).
        Some(b' ' | b'\t' | 0x0b | 0x0c) => method > 0 && method <= METHOD_BYTES,
        Some(_) => false,
    }
}

/// Where the line ends that is being looked at.
fn next_line(progress: &mut Progress, bytes: &[u8]) -> Result<usize, Found> {
    match line_end(&bytes[..bytes.len().min(HEAD_BYTES)], progress.at as usize) {
        Some(end) => Ok(end),
        None if bytes.len() < HEAD_BYTES => {
            progress.at = bytes.len() as u32;
            Err(Found::More(bytes.len() + 1))
        }
        None => Err(Found::Refused(Refusal::TooLong)),
    }
}

#[derive(Clone, Copy)]
struct RequestLine<'a> {
    method: &'a [u8],
    target: Target<'a>,
}

impl<'a> RequestLine<'a> {
    /// None if this is no line of HTTP/1 at all; after its last word says HTTP, a fault is refused.
    fn read(line: &'a [u8]) -> Result<Option<Self>, Refusal> {
        let line = trim_end(line);
        let last = line.iter().rposition(|byte| matches!(byte, b' ' | b'\t' | 0x0b | 0x0c)).map_or(0, |at| at + 1);
        let version = &line[last..];
        if !version.starts_with(b"HTTP/") {
            return Ok(None); // also HTTP/0.9, which names no host
        }
        let [b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0'..=b'9'] = version else { return Err(Refusal::Malformed) };
        let mut words = line.split(|&byte| byte == b' '); // one space between words (RFC 9112 3)
        let (Some(method), Some(target), Some(_), None) = (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(Refusal::Malformed);
        };
        Ok(Some(Self { method, target: Target::read(method, target)? }))
    }

    fn is_probe(&self) -> bool {
        matches!(self.method, b"HEAD" | b"OPTIONS")
    }
}

/// What a request line asks for (RFC 9112 3.2).
#[derive(Clone, Copy)]
struct Target<'a> {
    authority: Option<&'a [u8]>,
    path: Option<&'a [u8]>,
}

impl<'a> Target<'a> {
    fn read(method: &[u8], target: &'a [u8]) -> Result<Self, Refusal> {
        if !target.iter().all(|&byte| byte > b' ' && byte != 0x7f) {
            return Err(Refusal::Malformed);
        }
        match target {
            _ if method == b"CONNECT" => Ok(Self { authority: Some(target), path: None }),
            [b'/', ..] => Ok(Self { authority: None, path: Some(without_query(target)) }),
            b"*" if method == b"OPTIONS" => Ok(Self { authority: None, path: Some(target) }),
            _ => Self::absolute(target),
        }
    }

    /// scheme "://" authority, then path or query or nothing.
    fn absolute(target: &'a [u8]) -> Result<Self, Refusal> {
        let colon = target.windows(3).position(|it| it == b"://").ok_or(Refusal::Malformed)?;
        let (scheme, rest) = (&target[..colon], &target[colon + 3..]);
        let of_scheme = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
        if !scheme.first().is_some_and(u8::is_ascii_alphabetic) || !scheme.iter().all(of_scheme) {
            return Err(Refusal::Malformed);
        }
        let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
        let path = without_query(&rest[end..]);
        // RFC 9110 4.2.1: an http URI with an empty host is invalid.
        let authority = Some(&rest[..end]).filter(|it| !it.is_empty()).ok_or(Refusal::BadName)?;
        Ok(Self { authority: Some(authority), path: Some(if path.is_empty() { b"/" } else { path }) })
    }
}

pub(crate) fn without_query(target: &[u8]) -> &[u8] {
    let end = target.iter().position(|byte| matches!(byte, b'?' | b'#')).unwrap_or(target.len());
    &target[..end]
}

/// What of a head decides where it goes.
struct Head<'a> {
    line: RequestLine<'a>,
    host: Option<&'a [u8]>,
    is_preflight: bool,
    asks_upgrade: bool,
    asks_websocket: bool,
}

impl<'a> Head<'a> {
    fn read(head: &'a [u8]) -> Result<Self, Refusal> {
        let mut lines = head.split_inclusive(|&byte| byte == b'\n');
        let line = RequestLine::read(lines.next().unwrap_or_default())?.ok_or(Refusal::Malformed)?;
        let mut found = Self { line, host: None, is_preflight: false, asks_upgrade: false, asks_websocket: false };
        for line in lines.map(trim_end).take_while(|line| !line.is_empty()) {
            let (name, value) = field(line)?;
            if name.eq_ignore_ascii_case(b"host") && found.host.replace(value).is_some() {
                return Err(Refusal::Repeated); // RFC 9112 3.2: answered with 400, even if they agree
            }
            found.is_preflight |= name.eq_ignore_ascii_case(PREFLIGHT);
            found.asks_upgrade |= name.eq_ignore_ascii_case(b"connection") && lists(value, b"upgrade");
            found.asks_websocket |= name.eq_ignore_ascii_case(b"upgrade") && lists(value, b"websocket");
        }
        Ok(found)
    }
}

/// Name and value of a header line.
pub(crate) fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    let colon = line.iter().position(|&byte| byte == b':').ok_or(Refusal::Malformed)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    // No space before the colon, and none in front, which would go on with the line before (RFC 9112 5.1, 5.2);
    // no CR alone and no NUL (RFC 9112 2.2, RFC 9110 5.5).
    if name.is_empty() || !name.iter().copied().all(is_token) || value.iter().any(|byte| matches!(byte, 0 | b'\r')) {
        return Err(Refusal::Malformed);
    }
    Ok((name, trim_space(value)))
}

/// RFC 9110 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Space and tab, the only white space around a value (RFC 9110 5.6.3).
fn trim_space(text: &[u8]) -> &[u8] {
    let space = |byte: &u8| matches!(byte, b' ' | b'\t');
    let begin = text.iter().position(|byte| !space(byte)).unwrap_or(text.len());
    let end = text.iter().rposition(|byte| !space(byte)).map_or(begin, |last| last + 1);
    &text[begin..end]
}

/// Whether a list between commas has this word (RFC 9110 5.6.1).
fn lists(value: &[u8], word: &[u8]) -> bool {
    value.split(|&byte| byte == b',').any(|item| trim_space(item).eq_ignore_ascii_case(word))
}
