//! What every test and every fuzz target holds a sniffer to, and how a verdict is written down.
//!
//! `settled` is the invariant: the verdict does not depend on how the bytes were cut, stays once it is final, never asks
//! for what is there already nor for more than the bound.

use fourtuple_sniff::{Intent, Protocol, Scratch, Shown, Sniffer, State, Verdict};

/// The verdict on bytes that come at once, in one line, behind what was answered on the way.
pub(crate) fn look(sniffer: &Sniffer<'_>, bytes: &[u8]) -> String {
    feed(sniffer, bytes, [])
}

/// The verdict on bytes however they come; fails where it depends on that.
#[track_caller]
pub(crate) fn settled(sniffer: &Sniffer<'_>, bytes: &[u8]) -> String {
    let whole = look(sniffer, bytes);
    let step = 1 + bytes.len() / 4096; // byte by byte, or nearly
    let every = feed(sniffer, bytes, (1..bytes.len()).step_by(step));
    assert_eq!(every, whole, "in steps of {step}: {}", bytes.escape_ascii());
    for cut in [1, 2, 3, 5, 8, 16, bytes.len() / 2, bytes.len().saturating_sub(1)] {
        assert_eq!(feed(sniffer, bytes, [cut.min(bytes.len())]), whole, "cut at {cut}: {}", bytes.escape_ascii());
    }
    whole
}

/// The last verdict, with looks after so many bytes and at the end, behind what was answered on the way.
#[track_caller]
pub(crate) fn feed(sniffer: &Sniffer<'_>, bytes: &[u8], cuts: impl IntoIterator<Item = usize>) -> String {
    let mut scratch = Box::new(Scratch::new());
    let mut state = State::default();
    let (mut told, mut last) = (String::new(), String::from("more"));
    for end in cuts.into_iter().chain([bytes.len()]) {
        let now = loop {
            let verdict = sniffer.sniff(&mut state, &bytes[..end], &mut scratch);
            if let Verdict::More(needed) = verdict {
                assert!(needed > end, "{needed} bytes are there already, of {end}");
                assert!(needed <= sniffer.bound(), "asks for {needed}, past the bound");
            }
            match verdict {
                Verdict::Answer(answer) => told += &format!("answer {} ", answer.escape_ascii()),
                verdict => break line(&verdict),
            }
        };
        assert!(last == "more" || last == now, "{last}, then {now}, at {end}");
        last = now;
    }
    told + &last
}

/// Every beginning of the bytes looked at afresh wants more, or knows already what the whole is.
#[track_caller]
pub(crate) fn truncated(sniffer: &Sniffer<'_>, bytes: &[u8]) {
    let whole = look(sniffer, bytes);
    for end in 0..bytes.len() {
        let verdict = look(sniffer, &bytes[..end]);
        let so_far = verdict.strip_suffix("more").is_some_and(|told| whole.starts_with(told));
        assert!(so_far || verdict == whole, "{verdict} at {end}, not {whole}");
    }
}

/// Each of these openings of one protocol: in every cut, truncated, and with more behind it.
#[track_caller]
pub(crate) fn cases(protocol: Protocol, cases: &[(&[u8], &str)]) {
    let sniffer = Sniffer::new([protocol]);
    for (bytes, expected) in cases {
        assert_eq!(settled(&sniffer, bytes), *expected, "{}", bytes.escape_ascii());
        truncated(&sniffer, bytes);
        if !matches!(*expected, "more" | "no") {
            let more = [*bytes, b"\r\nmore of it \0\xff\r\n"].concat();
            assert_eq!(settled(&sniffer, &more), *expected, "{}", more.escape_ascii());
        }
    }
}

/// Bytes that are given out as they are asked for, as by a client that waits for answers; what was answered, and the end.
pub(crate) fn converse(sniffer: &Sniffer<'_>, bytes: &[u8]) -> String {
    let mut scratch = Box::new(Scratch::new());
    let mut state = State::default();
    let (mut told, mut end) = (String::new(), 0);
    loop {
        match sniffer.sniff(&mut state, &bytes[..end], &mut scratch) {
            Verdict::More(needed) if needed <= bytes.len() => end = needed,
            Verdict::More(_) if end < bytes.len() => end = bytes.len(), // enough for a no, maybe
            Verdict::Answer(answer) => told += &format!("answer {} ", answer.escape_ascii()),
            verdict => return told + &line(&verdict),
        }
    }
}

pub(crate) fn line(verdict: &Verdict<'_>) -> String {
    match verdict {
        Verdict::Match(shown) => shows(shown),
        Verdict::No => "no".into(),
        Verdict::More(_) => "more".into(),
        Verdict::Answer(bytes) => format!("answer {}", bytes.escape_ascii()),
        Verdict::Refused(protocol, why) => {
            format!("refused {} {}", protocol.map_or("proxy", |it| it.probe().name), why.name())
        }
    }
}

fn shows(shown: &Shown<'_>) -> String {
    let mut parts = vec![shown.protocol.probe().name.to_owned()];
    let mut text = |name: &str, value: Option<&[u8]>| {
        parts.extend(value.map(|value| format!("{name}={}", value.escape_ascii())));
    };
    text("name", shown.name.map(str::as_bytes));
    text("port", shown.port.map(|it| it.to_string()).as_deref().map(str::as_bytes));
    text("number", shown.number.map(|it| it.to_string()).as_deref().map(str::as_bytes));
    text("path", shown.path);
    text("user", shown.user);
    text("database", shown.database);
    text("client", shown.client);
    text("cancel", shown.cancel);
    text("pattern", shown.pattern.map(|it| it.to_string()).as_deref().map(str::as_bytes));
    let alpn: Vec<String> = shown.alpn.map(|it| it.escape_ascii().to_string()).collect();
    if !alpn.is_empty() {
        parts.push(format!("alpn={}", alpn.join(",")));
    }
    if shown.intent == Intent::Probe {
        parts.push("probe".into());
    }
    if shown.starttls {
        parts.push("starttls".into());
    }
    if shown.ech {
        parts.push("ech".into());
    }
    if !shown.reply.is_empty() {
        parts.push(format!("reply={}", shown.reply.escape_ascii()));
    }
    if let Some(header) = shown.proxied {
        parts.push(match header.endpoints {
            Some((from, to)) => format!("proxied={}:{from}>{to}", header.version),
            None => format!("proxied={}:-", header.version),
        });
    }
    parts.join(" ")
}

/// A value behind its length in `width` bytes.
pub(crate) fn counted(width: usize, value: &[u8]) -> Vec<u8> {
    let count = (value.len() as u64).to_be_bytes();
    [&count[8 - width..], value].concat()
}

/// A TLS extension.
pub(crate) fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &counted(2, data)].concat()
}

/// The server_name extension with one name.
pub(crate) fn server_name(name: &[u8]) -> Vec<u8> {
    extension(0, &counted(2, &[&[0][..], &counted(2, name)].concat()))
}

/// The ALPN extension.
pub(crate) fn alpn(names: &[&[u8]]) -> Vec<u8> {
    let names: Vec<u8> = names.iter().flat_map(|name| counted(1, name)).collect();
    extension(16, &counted(2, &names))
}

/// A ClientHello message with these extensions, without records.
pub(crate) fn hello(extensions: &[Vec<u8>]) -> Vec<u8> {
    let body = [
        &[3, 3][..],
        &[7; 32],                               // random
        &counted(1, &[9; 32]),                  // session
        &counted(2, &[0x1a, 0x1a, 0x13, 0x01]), // GREASE (RFC 8701) and TLS_AES_128_GCM_SHA256
        &counted(1, &[0]),
        &counted(2, &extensions.concat()),
    ]
    .concat();
    [&[1][..], &counted(3, &body)].concat()
}

/// A message in records of so many bytes.
pub(crate) fn records(message: &[u8], size: usize) -> Vec<u8> {
    message.chunks(size).flat_map(|part| [&[22, 3, 1][..], &counted(2, part)].concat()).collect()
}
