//! Whole conversations with a guide, the bytes at once or a few at a time: what is answered, for whom a proxy speaks, and
//! what of it the service is not to get.

use fourtuple_registry::{Batch, Conditions, Mode, Route, Service};

use super::*;

fn service(name: &str, target: &str) -> Service {
    let target = Target::checked("target", target).unwrap();
    let (delivery, options) = (fourtuple_registry::Delivery::Relay, Options::default());
    Service { name: name.to_owned(), target, delivery, wide_port: None, options }
}

const DATABASE: &str = "db.example.com";
const TLS: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 47];
const GSS: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 48];
const LOGIN: &[u8] = b"\0\0\0\x14\0\x03\0\0user\0alice\0\0";
const GREETING: &[u8] = &[5, 1, 0];
const HEADER: &[u8] = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 5432\r\n";

/// A ClientHello that names a host and nothing else, in records of so many bytes.
fn hello(host: &str, record: usize) -> Vec<u8> {
    let short = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes(), bytes].concat();
    let name = short(&[&[0][..], &short(host.as_bytes())].concat());
    let extensions = short(&[&[0, 0][..], &short(&name)].concat());
    let body = [&[3, 3][..], &[7; 32], &[0], &short(&[0x13, 1]), &[1, 0], &extensions].concat();
    let message = [&[1, 0][..], &short(&body)].concat();
    message.chunks(record).flat_map(|part| [&[22, 3, 1][..], &short(part)].concat()).collect()
}

fn open_guide(folder: &crate::Folder, rules: Rules, fallback: Option<Fallback>) -> BrokerGuide {
    let store = Store::open(folder.path(), true, Some(1 << 24)).unwrap();
    let mut batch = Batch::default();
    batch.push(&Service { wide_port: Some(70_000), ..service(DATABASE, "unix:/run/db") });
    batch.push(&service("behind.example.com", "unix:/run/behind"));
    batch.push(&service("all", "unix:/run/all"));
    batch.commit(&store, Mode::Set).unwrap();
    let route = |conditions: &[(&'static str, &str)], to: &str| {
        let conditions = Conditions::checked(conditions.iter().copied()).unwrap();
        let (delivery, options) = (fourtuple_registry::Delivery::Relay, Options::default());
        Route { conditions, to: format!("service:{to}"), delivery, options }
    };
    let routes = [
        route(&[("user", "alice")], DATABASE),
        route(&[("protocol", "postgres")], "all"),
        route(&[("protocol", "ssh"), ("source", "192.0.2.0/24")], "behind.example.com"),
    ];
    store.add_routes(&routes, true).unwrap();
    let protocols =
        [Protocol::Tls, Protocol::Ssh, Protocol::Postgres, Protocol::Socks5, Protocol::Socks4, Protocol::Tcpmux];
    BrokerGuide::new(store, vec![Looking::new(protocols, [], fallback).under(rules)])
}

/// What a client of 10.0.0.5 sees and gets that says these parts, each after an answer, so many bytes at a time; then
/// nothing more.
fn conversation(guide: &mut BrokerGuide, parts: &[&[u8]], step: usize) -> String {
    let peer: SocketAddr = "10.0.0.5:1000".parse().unwrap();
    let mut names = Some((peer, "10.0.0.1:5432".parse().unwrap()));
    let (mut memory, mut chosen, mut told) = (Reading::default(), Chosen::default(), String::new());
    let mut bytes = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        let answers = told.matches("answer").count();
        for piece in part.chunks(step) {
            bytes.extend_from_slice(piece);
            let listener = ListenerId(0);
            let shown = Shown { listener, names, bytes: &bytes, last: false };
            let mut guidance = guide.guide(&shown, &mut memory, &mut chosen);
            if let Guidance::Speaks { names: another, header } = guidance {
                names = another.or(names);
                told += &format!("for {} ", names.unwrap().0.ip());
                bytes.drain(..header as usize);
                let shown = Shown { listener, names, bytes: &bytes, last: false };
                guidance = guide.guide(&shown, &mut memory, &mut chosen);
            }
            match guidance {
                Guidance::More => {}
                Guidance::Answer(answer) => told += &format!("answer {} ", answer.escape_ascii()),
                guidance => return told + &end(guidance, &chosen),
            }
        }
        assert!(number + 1 == parts.len() || told.matches("answer").count() == answers + 1, "{told}");
    }
    let shown = Shown { listener: ListenerId(0), names, bytes: &bytes, last: true };
    let mut guidance = guide.guide(&shown, &mut memory, &mut chosen);
    if let Guidance::Speaks { .. } = guidance {
        told += "for itself ";
        guidance = guide.guide(&shown, &mut memory, &mut chosen);
    }
    told + "last " + &end(guidance, &chosen)
}

fn end(guidance: Guidance, chosen: &Chosen) -> String {
    let Chosen { service, skip, script, reply, .. } = chosen;
    match guidance {
        Guidance::Found => {
            let expected = script.iter().filter_map(|turn| turn.expect);
            let promise: String = expected.map(|answer| format!(" promise {}", answer as char)).collect();
            let reply = if reply.is_empty() { String::new() } else { format!(" reply {}", reply.escape_ascii()) };
            format!("{service} without {skip}{promise}{reply}")
        }
        guidance => format!("{guidance:?}"),
    }
}

/// However the bytes come.
fn conversations(rules: &Rules, cases: &[(&[&[u8]], &str)]) {
    conversations_or(None, rules, cases);
}

/// As `conversations`, with a default.
fn conversations_or(fallback: Option<&Fallback>, rules: &Rules, cases: &[(&[&[u8]], &str)]) {
    let folder = crate::Folder::new();
    let mut guide = open_guide(&folder, rules.clone(), fallback.cloned());
    for (parts, expected) in cases {
        for step in [1, 2, 7, 1000] {
            assert_eq!(conversation(&mut guide, parts, step), *expected, "{parts:02x?} by {step}");
        }
    }
}

#[test]
fn a_postgres_client_is_told_what_its_listener_says() {
    let (hello, other) = (hello(DATABASE, 30), hello("nobody.example.com", 1000));
    conversations(
        &Rules::default(),
        &[
            (&[TLS, &hello], "answer S db.example.com without 8 promise S"),
            (&[GSS, TLS, &hello], "answer N answer S db.example.com without 16 promise S"),
            (&[GSS, LOGIN], "answer N db.example.com without 8"),
            (&[LOGIN], "db.example.com without 0"),
            (&[TLS, &other], "answer S all without 8 promise S"),
            // Neither who goes on otherwise nor who goes on no more gets anything.
            (&[TLS, LOGIN], "answer S Garbage"),
            (&[GSS, GSS], "answer N Garbage"),
            (&[TLS], "answer S last More"),
            (&[GSS], "answer N last More"),
        ],
    );
    conversations(
        &Rules { postgres_tls: PostgresTls::Declined, ..Rules::default() },
        &[(&[TLS, LOGIN], "answer N db.example.com without 8"), (&[TLS, &hello], "answer N Garbage")],
    );
    conversations(
        &Rules { postgres_tls: PostgresTls::Left, ..Rules::default() },
        &[(&[TLS], "all without 0"), (&[GSS], "all without 0"), (&[LOGIN], "db.example.com without 0")],
    );
}

#[test]
fn a_tcpmux_line_that_leads_somewhere_is_answered_and_kept() {
    conversations(
        &Rules::default(),
        &[
            (&[b"DB.example.com\r\n"], "db.example.com without 16 reply +\\r\\n"),
            (&[b"70000\r\n"], "db.example.com without 7 reply +\\r\\n"),
            (&[b"nobody\r\n"], "NoRoute"),
        ],
    );
    let fallback = Fallback::Target(Target::checked("default", "unix:/run/default").unwrap());
    conversations_or(
        Some(&fallback),
        &Rules::default(),
        &[(&[b"nobody\r\n"], "unix:/run/default without 0"), (&[], "last unix:/run/default without 0")],
    );
}

/// To port 5432.
fn socks5(host: &str) -> Vec<u8> {
    [&[5, 1, 0, 3, host.len() as u8][..], host.as_bytes(), &[0x15, 0x38]].concat()
}

fn socks4(user: &str, host: &str) -> Vec<u8> {
    [&[4, 1, 0x15, 0x38, 0, 0, 0, 1][..], user.as_bytes(), b"\0", host.as_bytes(), b"\0"].concat()
}

/// What is left to one protocol's services is not left to another's.
#[test]
fn socks_is_answered_where_postgres_is_not() {
    conversations(
        &Rules { postgres_tls: PostgresTls::Left, ..Rules::default() },
        &[(&[GREETING, &socks5("nobody.example.com")], r"answer \x05\x00 NoRoute"), (&[TLS], "all without 0")],
    );
}

#[test]
fn a_socks_client_is_told_and_what_it_asked_for_is_kept() {
    let (granted, succeeded) = (r"\x00Z\x00\x00\x00\x00\x00\x00", r"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00");
    let hello = hello("shop.example.com", 1000);
    let (five, other) = (socks5("DB.Example.com"), socks5("nobody.example.com"));
    let insisting: &[u8] = &[5, 1, 2];
    let rules = Rules::default();
    conversations(
        &rules,
        &[
            (&[&socks4("", DATABASE)], &format!("db.example.com without 24 reply {granted}")),
            (&[&socks4("alice", "nobody.example.com")], &format!("db.example.com without 33 reply {granted}")),
            (&[&socks4("", "nobody.example.com")], "NoRoute"),
            (&[&[4, 2, 0, 80, 1, 1, 1, 1, 0]], "Garbage"),
            (&[GREETING, &five], &format!(r"answer \x05\x00 db.example.com without 24 reply {succeeded}")),
            // Neither side has to wait.
            (
                &[GREETING, &[&five, &hello[..]].concat()],
                &format!(r"answer \x05\x00 db.example.com without 24 reply {succeeded}"),
            ),
            (&[GREETING, &other], r"answer \x05\x00 NoRoute"),
            (&[GREETING, &hello], r"answer \x05\x00 Garbage"),
            (&[GREETING], r"answer \x05\x00 last More"),
            (&[insisting], "Garbage"),
        ],
    );
    // The default gets what comes behind, as every service does: it could make nothing of half a dialogue.
    let fallback = Fallback::Target(Target::checked("default", "unix:/run/default").unwrap());
    conversations_or(
        Some(&fallback),
        &rules,
        &[
            (&[GREETING, &other], &format!(r"answer \x05\x00 unix:/run/default without 28 reply {succeeded}")),
            (&[&socks4("", "nobody.example.com")], &format!("unix:/run/default without 28 reply {granted}")),
        ],
    );
    conversations_or(
        Some(&fallback),
        &Rules { leaves_socks: true, ..rules },
        &[
            (&[&[GREETING, &other].concat()], "unix:/run/default without 0"),
            (&[insisting], "unix:/run/default without 0"),
            (&[&socks4("", DATABASE)], "db.example.com without 0"),
        ],
    );
}

#[test]
fn a_trusted_proxy_says_who_comes_and_nobody_else_does() {
    let proxied = |parts: &[u8]| [HEADER, parts].concat();
    let (ssh, silent) = (proxied(b"SSH-2.0-x\r\n"), proxied(b""));
    let unknown = b"PROXY UNKNOWN\r\nSSH-2.0-x\r\n";
    let trusting =
        |from: &str| Rules { proxies: vec![Prefix::checked("proxy_from", from).unwrap()], ..Rules::default() };
    let fallback = Fallback::Target(Target::checked("default", "unix:/run/default").unwrap());
    let required = trusting("10.0.0.0/8");
    conversations(
        &required,
        &[
            (&[&ssh], "for 192.0.2.7 behind.example.com without 0"),
            (&[&proxied(TLS), &hello(DATABASE, 50)], "for 192.0.2.7 answer S db.example.com without 8 promise S"),
            (&[&proxied(b"70000\r\n")], "for 192.0.2.7 db.example.com without 7 reply +\\r\\n"),
            // A connection of the proxy's own.
            (&[unknown], "for 10.0.0.5 NoRoute"),
            (&[&silent], "for 192.0.2.7 last NoRoute"),
            (&[b"SSH-2.0-x\r\n"], "Unproxied"),
            (&[b"PROXY TCP4 192.0.2.7 nonsense\r\n"], "Unproxied"),
            (&[&HEADER[..20]], "last Unproxied"),
            (&[], "last Unproxied"),
        ],
    );
    conversations_or(Some(&fallback), &required, &[(&[&silent], "for 192.0.2.7 last unix:/run/default without 0")]);
    conversations(
        &Rules { postgres_tls: PostgresTls::Left, ..required.clone() },
        &[(&[&proxied(TLS)], "for 192.0.2.7 all without 0")],
    );
    conversations_or(
        Some(&fallback),
        &Rules { may_be_direct: true, ..required },
        &[
            (&[&ssh], "for 192.0.2.7 behind.example.com without 0"),
            (&[LOGIN], "for 10.0.0.5 db.example.com without 0"),
            (&[], "for itself last unix:/run/default without 0"),
            (&[b"PROXY TCP4 192.0.2.7 nonsense\r\n"], "Unproxied"),
            (&[&HEADER[..20]], "last Unproxied"),
        ],
    );
    // From elsewhere a header is only bytes, here of no protocol that is enabled.
    conversations(&trusting("192.0.2.0/24"), &[(&[&ssh], "NoRoute"), (&[unknown], "NoRoute")]);
}

/// Pieces of what clients say, and noise, in any order and cut anywhere: an answer is given at most twice and only a trusted
/// peer speaks for others, once; what is kept from a service has come; and all of it ends.
#[test]
fn any_bytes_lead_to_an_end() {
    let hello = hello(DATABASE, 40);
    let pieces = [
        TLS,
        GSS,
        LOGIN,
        HEADER,
        &hello,
        b"DB.example.com\r\n",
        GREETING,
        b"\x05\x01\0\x03\x0edb.example.com\x15\x38",
        b"\x04\x01\x15\x38\0\0\0\x01alice\0DB.example.com\0",
        b"SSH-2.0-x\r\n",
        b"\r\n\r\n\0\r\nQUIT\n",
        b"\x16\x03",
    ];
    let mut seed = 7_u64;
    let mut random = move |below: usize| {
        // xorshift64 (Marsaglia 2003).
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    let proxies = vec![Prefix::checked("proxy_from", "10.0.0.0/8").unwrap()];
    let folder = crate::Folder::new();
    let mut guide = open_guide(&folder, Rules::default(), None);
    let mut ends = [0; 4];
    for round in 0..20_000 {
        let postgres_tls = [PostgresTls::Offered, PostgresTls::Declined, PostgresTls::Left][round % 3];
        let trusts = round % 2 == 0;
        let proxies = if trusts { proxies.clone() } else { Vec::new() };
        guide.looking[0].rules =
            Rules { proxies, may_be_direct: round % 4 == 0, postgres_tls, leaves_socks: round % 5 == 0 };
        let mut bytes: Vec<u8> = Vec::new();
        for _ in 0..random(5) {
            match random(4) {
                0 => (0..random(12)).for_each(|_| bytes.push(random(256) as u8)),
                _ => bytes.extend_from_slice(pieces[random(pieces.len())]),
            }
        }
        if random(4) == 0 && !bytes.is_empty() {
            let at = random(bytes.len());
            bytes[at] = random(256) as u8;
        }
        let (mut memory, mut chosen) = (Reading::default(), Chosen::default());
        let (mut answers, mut speaks, mut shown_bytes) = (0, 0, 0);
        let names = Some(("10.0.0.5:1000".parse().unwrap(), "10.0.0.1:5432".parse().unwrap()));
        let end = loop {
            let last = shown_bytes == bytes.len();
            let shown = Shown { listener: ListenerId(0), names, bytes: &bytes[..shown_bytes], last };
            match guide.guide(&shown, &mut memory, &mut chosen) {
                Guidance::Speaks { header, .. } => {
                    speaks += 1;
                    bytes.drain(..header as usize);
                    shown_bytes -= header as usize;
                }
                Guidance::Answer(answer) => {
                    assert!(matches!(answer, b"S" | b"N" | b"\x05\0"));
                    answers += 1;
                }
                Guidance::More if !last => shown_bytes = (shown_bytes + 1 + random(40)).min(bytes.len()),
                end => break end,
            }
            assert!(answers <= 2 && speaks <= usize::from(trusts), "{}", bytes.escape_ascii());
        };
        match end {
            Guidance::Found => {
                assert!(chosen.skip as usize <= shown_bytes, "{}", bytes.escape_ascii());
                assert!(chosen.script.is_empty() || answers > 0);
                ends[0] += 1;
            }
            Guidance::Garbage => ends[1] += 1,
            Guidance::NoRoute | Guidance::More => ends[2] += 1,
            Guidance::Unproxied => ends[3] += 1,
            Guidance::Answer(_) | Guidance::Consult | Guidance::Tell | Guidance::Goodbye | Guidance::Speaks { .. } => {
                unreachable!("those are not ends")
            }
        }
        assert!(end != Guidance::Unproxied || trusts);
    }
    assert!(ends.iter().all(|&count| count > 500), "{ends:?}");
}
