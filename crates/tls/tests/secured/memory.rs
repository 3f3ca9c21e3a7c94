//! Secured speeches against a server in memory: whole, byte by byte, in random parts, with other bytes, with wrong ones.

use crate::peer::{Authority, Identity, Line, Server};
use fourtuple_engine::script::{Act, Script};
use fourtuple_engine::speech::{Failing, Part, Speech, Tokens, Wrong};
use fourtuple_tls::{Client, REASONS, Settings};
use proptest::prelude::*;
use rustls::version::{TLS12, TLS13};
use rustls::{ServerConfig, SupportedProtocolVersion};

static OLD: [&SupportedProtocolVersion; 1] = [&TLS12];
static NEW: [&SupportedProtocolVersion; 1] = [&TLS13];
const NOW: (i32, i32) = (2020, 2120);

fn tokens(token_bytes: u16) -> Tokens {
    Tokens { seed: 3, token_bytes }
}

/// Parts of the sizes given, over and over.
fn parts<'a>(bytes: &'a [u8], sizes: &'a [usize]) -> impl Iterator<Item = &'a [u8]> {
    let mut sizes = sizes.iter().cycle();
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let size = (*sizes.next()?).clamp(1, rest.len().max(1)).min(rest.len());
        let (part, after) = rest.split_at(size);
        rest = after;
        (!part.is_empty()).then_some(part)
    })
}

/// Let both sides speak until neither has anything to say; the server echoes if `echo`. `spoil` may change what comes
/// from the server.
fn play<S: Speech>(
    line: &mut Line<S>,
    server: &mut Server,
    sizes: &[usize],
    answer: &mut dyn FnMut(&mut Server),
    spoil: &mut dyn FnMut(&mut Vec<u8>),
) -> Result<(), Wrong> {
    loop {
        let out = line.say_all(sizes.iter().copied().max().unwrap_or(1));
        parts(&out, sizes).for_each(|part| server.take(part));
        answer(server);
        let mut back = server.wire();
        spoil(&mut back);
        if out.is_empty() && back.is_empty() {
            return Ok(());
        }
        for part in parts(&back, sizes) {
            line.hear(part)?;
        }
    }
}

fn echo(server: &mut Server) {
    let heard = std::mem::take(&mut server.heard);
    if !heard.is_empty() {
        server.say(&heard);
    }
}

fn whole<S: Speech>(line: &mut Line<S>, server: &mut Server, answer: &mut dyn FnMut(&mut Server)) -> Result<(), Wrong> {
    play(line, server, &[4096], answer, &mut |_| ())
}

fn world(versions: &[&'static SupportedProtocolVersion]) -> (Client, ServerConfig) {
    let authority = Authority::new();
    let client = Client::new(&authority.settings()).expect("a client");
    (client, authority.identity(&["localhost"], NOW).server(versions))
}

#[test]
fn tokens_come_back_in_whatever_parts() {
    for versions in [&[&TLS12][..], &[&TLS13]] {
        let (client, config) = world(versions);
        for (token_bytes, size) in [(16, 1), (16, 4096), (700, 3), (2048, 1), (2048, 2048)] {
            let mut line = Line::new(tokens(token_bytes), &client);
            let mut server = Server::new(config.clone());
            for round in 0..3 {
                assert_eq!(play(&mut line, &mut server, &[size], &mut echo, &mut |_| ()), Ok(()));
                assert!(line.is_over(), "round {round} of {token_bytes} bytes in parts of {size}, {versions:?}");
                line.speech.begin(&mut line.memory, Part::Round);
                assert!(!line.is_over());
            }
            assert_eq!(line.speech.sessions(), 1);
            line.speech.end(line.memory);
            assert_eq!(line.speech.sessions(), 0);
        }
    }
}

#[test]
fn an_inner_opening_follows_the_handshake() {
    let (client, config) = world(&[&TLS13]);
    let script = Script::new(
        vec![Act::Until(b"\n".to_vec(), 99), Act::Say(b"hello".to_vec()), Act::Expect(b"hi".to_vec())],
        vec![Act::Say(b"more".to_vec()), Act::Skip(100_000)],
    );
    let (mut line, mut server) = (Line::new(script.expect("a script"), &client), Server::new(config));
    server.tls.set_buffer_limit(None);
    let mut greeted = false;
    let mut answer = |server: &mut Server| {
        if !std::mem::replace(&mut greeted, true) {
            server.say(b"who speaks first\n");
        }
        match std::mem::take(&mut server.heard).as_slice() {
            b"hello" => server.say(b"hi"),
            // Records of 16 KiB, more than any buffer here.
            b"more" => server.say(&vec![b'x'; 100_000]),
            _ => {}
        }
    };
    assert_eq!(play(&mut line, &mut server, &[1500], &mut answer, &mut |_| ()), Ok(()));
    assert!(line.is_over());
    line.speech.begin(&mut line.memory, Part::Round);
    assert_eq!(play(&mut line, &mut server, &[1500, 7], &mut answer, &mut |_| ()), Ok(()));
    assert!(line.is_over());
}

#[test]
fn keys_change_in_the_middle() {
    let (client, config) = world(&[&TLS13]);
    let (mut line, mut server) = (Line::new(tokens(100), &client), Server::new(config));
    assert_eq!(whole(&mut line, &mut server, &mut echo), Ok(()));
    for _ in 0..5 {
        server.tls.refresh_traffic_keys().expect("TLS 1.3");
        line.speech.begin(&mut line.memory, Part::Round);
        assert_eq!(play(&mut line, &mut server, &[11], &mut echo, &mut |_| ()), Ok(()));
        assert!(line.is_over());
    }
}

#[test]
fn more_than_the_answer_is_wrong() {
    let (client, config) = world(&[&TLS13]);
    let (mut line, mut server) = (Line::new(tokens(64), &client), Server::new(config));
    assert_eq!(whole(&mut line, &mut server, &mut echo), Ok(()));
    line.speech.begin(&mut line.memory, Part::Round);
    let mut more = |server: &mut Server| {
        echo(server);
        server.say(b"!");
    };
    assert_eq!(whole(&mut line, &mut server, &mut more), Err(Wrong));
    assert_eq!(line.speech.why(&line.memory, Failing::Wrong), "wrong", "the words are, not their seal");
}

#[test]
fn an_end_is_said_and_understood() {
    let (client, config) = world(&[&TLS12, &TLS13]);
    let (mut line, mut server) = (Line::new(tokens(64), &client), Server::new(config));
    assert_eq!(whole(&mut line, &mut server, &mut echo), Ok(()));
    server.tls.send_close_notify();
    let wire = server.wire();
    assert_eq!(line.hear(&wire), Ok(()));
    for _ in 0..1000 {
        assert_eq!(line.hear(&[0x17; 2000]), Ok(()), "after the end nothing is kept");
    }
    assert!(!line.speech.has_last_word(&line.memory, true), "an RST would overtake it");
    assert!(line.speech.has_last_word(&line.memory, false));
    let mut buffer = [0; 256];
    let length = line.speech.last_word(&mut line.memory, &mut buffer);
    let mut bytes = &buffer[..length];
    server.tls.read_tls(&mut bytes).expect("memory");
    assert!(server.tls.process_new_packets().expect("a record").peer_has_closed());
}

/// The reason, and the alert that is said with it.
fn failure(settings: &Settings, config: ServerConfig) -> (&'static str, Option<String>) {
    let client = Client::new(settings).expect("a client");
    let (mut line, mut server) = (Line::new(tokens(16), &client), Server::new(config));
    assert_eq!(whole(&mut line, &mut server, &mut echo), Err(Wrong));
    let mut buffer = [0; 256];
    let alert = line.speech.has_last_word(&line.memory, true).then(|| {
        let length = line.speech.last_word(&mut line.memory, &mut buffer);
        let mut bytes = &buffer[..length];
        server.tls.read_tls(&mut bytes).expect("memory");
        server.tls.process_new_packets().expect_err("an alert").to_string()
    });
    (line.speech.why(&line.memory, Failing::Wrong), alert)
}

#[test]
fn each_failure_has_its_reason() {
    let (ours, other) = (Authority::new(), Authority::new());
    let settings = ours.settings();
    let named = |server_name: &str| Settings { server_name: server_name.to_owned(), ..settings.clone() };
    let server =
        |authority: &Authority, names: &[&str], years| authority.identity(names, years).server(&[&TLS12, &TLS13]);
    let with_alpn = |names: &[&[u8]]| {
        let mut config = server(&ours, &["localhost"], NOW);
        config.alpn_protocols = names.iter().map(|name| name.to_vec()).collect();
        config
    };
    let rows = [
        (settings.clone(), server(&other, &["localhost"], NOW), "certificate-issuer"),
        (settings.clone(), server(&ours, &["example.org"], NOW), "certificate-name"),
        (named("10.0.0.1"), server(&ours, &["10.0.0.2", "localhost"], NOW), "certificate-name"),
        (settings.clone(), server(&ours, &["localhost"], (2001, 2002)), "certificate-expired"),
        (settings.clone(), server(&ours, &["localhost"], (2110, 2120)), "certificate-early"),
        (Settings { alpn: vec![b"http/1.1".to_vec()], ..settings.clone() }, with_alpn(&[b"h2"]), "tls-alert-alpn"),
        (
            settings.clone(),
            ours.identity(&["localhost"], NOW).server_asking(&[&TLS12], Some(&ours)),
            "tls-alert-certificate",
        ),
    ];
    for (settings, config, reason) in rows {
        let (found, alert) = failure(&settings, config);
        let told = alert.as_ref().is_some_and(|text| text.contains("alert"));
        assert_eq!((found, told), (reason, reason.starts_with("certificate")), "{alert:?}");
        assert!(REASONS.contains(&found));
    }
}

#[test]
fn what_does_not_matter_is_accepted() {
    let (ours, other) = (Authority::new(), Authority::new());
    let both = [&TLS12, &TLS13];
    let identity = other.identity(&["client"], NOW);
    let address = Settings { server_name: "10.0.0.1".to_owned(), ..ours.settings() };
    let insecure = Settings { insecure: true, ca: None, ..ours.settings() };
    let with_identity =
        Settings { identity: Some((identity.certificate_pem.clone(), identity.key_pem.clone())), ..ours.settings() };
    let rows = [
        (address, ours.identity(&["10.0.0.1"], NOW).server(&both)),
        (insecure.clone(), other.identity(&["example.org"], (2001, 2002)).server(&[&TLS12])),
        (insecure, other.identity(&["example.org"], (2001, 2002)).server(&[&TLS13])),
        (with_identity, ours.identity(&["localhost"], NOW).server_asking(&both, Some(&other))),
    ];
    for (settings, config) in rows {
        let client = Client::new(&settings).expect("a client");
        let (mut line, mut server) = (Line::new(tokens(16), &client), Server::new(config));
        assert_eq!(whole(&mut line, &mut server, &mut echo), Ok(()));
        assert!(line.is_over() && !server.tls.is_handshaking());
    }
}

#[test]
fn what_cannot_work_is_refused_by_name() {
    let (ours, other) = (Authority::new(), Authority::new());
    let (one, another) = (other.identity(&["client"], NOW), other.identity(&["client"], NOW));
    let pair =
        |certificate: &Identity, key: &Identity| Some((certificate.certificate_pem.clone(), key.key_pem.clone()));
    let settings = ours.settings();
    let rows = [
        (Settings { server_name: "not a name".to_owned(), ..settings.clone() }, "server_name"),
        (Settings { ca: Some(b"nothing".to_vec()), ..settings.clone() }, "ca"),
        (Settings { ca: Some(one.key_pem.clone()), ..settings.clone() }, "ca"),
        (Settings { alpn: vec![Vec::new()], ..settings.clone() }, "alpn"),
        (Settings { identity: pair(&one, &another), ..settings.clone() }, "key"),
        (Settings { identity: Some((Vec::new(), one.key_pem.clone())), ..settings.clone() }, "cert"),
        (Settings { identity: Some((one.certificate_pem.clone(), Vec::new())), ..settings }, "key"),
    ];
    for (settings, setting) in rows {
        assert_eq!(Client::new(&settings).expect_err(setting).setting, setting);
    }
}

/// Whether a byte of a stream of records is one of those that a reader of TLS 1.3 does not look at: the version.
fn is_version(stream: &[u8], at: usize) -> bool {
    let mut start = 0;
    while start + 5 <= stream.len() {
        let end = start + 5 + usize::from(u16::from_be_bytes([stream[start + 3], stream[start + 4]]));
        if at < end {
            return matches!(at - start, 1 | 2);
        }
        start = end;
    }
    false
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn how_bytes_are_cut_changes_nothing(
        sizes in prop::collection::vec(1usize..3000, 1..6),
        token_bytes in 16u16..2048,
        records in prop::option::of(64usize..2000),
        old in any::<bool>(),
    ) {
        let (client, mut config) = world(if old { &OLD } else { &NEW });
        config.max_fragment_size = records;
        let (mut line, mut server) = (Line::new(tokens(token_bytes), &client), Server::new(config));
        for _ in 0..3 {
            prop_assert_eq!(play(&mut line, &mut server, &sizes, &mut echo, &mut |_| ()), Ok(()));
            prop_assert!(line.is_over());
            line.speech.begin(&mut line.memory, Part::Round);
        }
    }

    #[test]
    fn a_byte_that_was_changed_is_never_right(
        sizes in prop::collection::vec(1usize..3000, 1..4),
        at in 0usize..6000,
        flip in 1u8..=255,
        old in any::<bool>(),
    ) {
        let (client, config) = world(if old { &OLD } else { &NEW });
        let (mut line, mut server) = (Line::new(tokens(300), &client), Server::new(config));
        let (mut stream, mut changed) = (Vec::new(), false);
        let mut spoil = |back: &mut Vec<u8>| {
            if let Some(byte) = at.checked_sub(stream.len()).and_then(|place| back.get_mut(place)) {
                *byte ^= flip;
                changed = true;
            }
            stream.extend_from_slice(back);
        };
        let mut right = true;
        for _ in 0..4 {
            right &= play(&mut line, &mut server, &sizes, &mut echo, &mut spoil).is_ok() && line.is_over();
            if !right {
                break;
            }
            line.speech.begin(&mut line.memory, Part::Round);
        }
        if let Some(byte) = stream.get_mut(at).filter(|_| changed) {
            *byte ^= flip;
        }
        prop_assert!(right != changed || is_version(&stream, at), "changed at {at} of {}", stream.len());
    }

    #[test]
    fn whatever_comes_is_a_reason_and_no_panic(
        bytes in prop::collection::vec(any::<u8>(), 1..4000),
        like_tls in any::<bool>(),
        sizes in prop::collection::vec(1usize..3000, 1..4),
    ) {
        let (client, _) = world(&[&TLS13]);
        let mut line = Line::new(tokens(16), &client);
        line.say_all(4096);
        let mut bytes = bytes;
        if like_tls {
            let length = (bytes.len() as u16).to_be_bytes();
            bytes.splice(0..0, [0x16, 3, 3, length[0], length[1]]);
        }
        let heard = parts(&bytes, &sizes).try_for_each(|part| line.hear(part));
        prop_assert!(!line.is_over());
        if heard.is_err() {
            prop_assert!(REASONS.contains(&line.speech.why(&line.memory, Failing::Wrong)));
        }
    }
}

#[test]
fn plain_words_are_garbage() {
    let (client, _) = world(&[&TLS13]);
    for words in ["HTTP/1.1 400 Bad Request\r\n\r\n", "SSH-2.0-OpenSSH_9.2\r\n", "\0\0\0\0\0\0\0"] {
        let mut line = Line::new(tokens(16), &client);
        line.say_all(4096);
        assert_eq!(line.hear(words.as_bytes()), Err(Wrong));
        assert_eq!(line.speech.why(&line.memory, Failing::Wrong), "tls-garbage", "{words}");
    }
}
