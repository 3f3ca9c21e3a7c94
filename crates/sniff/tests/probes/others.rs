//! SSH, PostgreSQL, MQTT, Redis, AMQP, tcpmux and patterns: whole, in pieces, truncated, too long and contradictory.

use crate::support::{cases, converse, counted, hello, look, records, server_name, settled};
use fourtuple_sniff::{Pattern, Prelude, Protocol, Scratch, Sniffer, State};

#[test]
fn ssh() {
    let long = [b"SSH-2.0-".as_slice(), &[b'x'; 246]].concat();
    cases(
        Protocol::Ssh,
        &[
            (b"SSH-2.0-OpenSSH_9.9p1 Debian-3\r\n", "ssh client=OpenSSH_9.9p1 Debian-3"),
            (b"SSH-1.99-x\n", "ssh client=x"),
            (b"SSH-2.0-\r\n", "ssh client="),
            (b"SSH-2.0\r\n", "refused ssh malformed"),
            (b"SSH-3.0-x\r\n", "refused ssh malformed"),
            (b"SSH-2.0-x\x1b[2J\r\n", "refused ssh malformed"),
            (b"SSH-2.0-x\0\r\n", "refused ssh malformed"),
            (b"ssh-2.0-x\r\n", "no"),
            (b"SSH", "more"),
            (&long, "more"),
            (&[&long[..], b"x"].concat(), "refused ssh too-long"),
            (&[&long[..], b"\n"].concat(), &format!("ssh client={}", "x".repeat(246))),
        ],
    );
}

fn startup(code: u32, rest: &[u8]) -> Vec<u8> {
    [&(rest.len() as u32 + 8).to_be_bytes()[..], &code.to_be_bytes(), rest].concat()
}

const TLS: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
const GSS: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 48];

#[test]
fn postgres() {
    let three = |rest: &[u8]| startup(3 << 16, rest);
    cases(
        Protocol::Postgres,
        &[
            (&three(b"user\0alice\0database\0shop\0\0"), "postgres user=alice database=shop"),
            (&three(b"user\0alice\0options\0-c x=y\0\0"), "postgres user=alice database=alice"),
            (&startup(3 << 16 | 2, b"database\0\0user\0bob\0\0"), "postgres user=bob database=bob"),
            (&three(b"user\0a\0user\0b\0\0"), "refused postgres repeated"),
            (&three(b"user\0a\0database\0b\0database\0c\0\0"), "refused postgres repeated"),
            (&three(b"database\0shop\0\0"), "refused postgres malformed"),
            (&three(b"user\0\0\0"), "refused postgres malformed"),
            (&three(b"user\0alice\0"), "refused postgres malformed"),
            (&three(b"user\0alice"), "refused postgres malformed"),
            (&three(b"user\0alice\0\0x"), "refused postgres malformed"),
            (&startup(80_877_102, b"\0\0\x04\xd2SECR"), "postgres cancel=\\x00\\x00\\x04\\xd2SECR"),
            (&startup(80_877_102, b"short"), "refused postgres malformed"),
            (&startup(80_877_103, b"x"), "refused postgres malformed"),
            (&[0, 0, 0, 4, 0, 3, 0, 0], "refused postgres malformed"),
            (&[0, 0, 0x27, 0x11, 0, 3, 0, 0], "refused postgres malformed"), // 10,001 bytes
            (&startup(2 << 16, b"user\0a\0\0"), "no"),
            (&[0, 1, 0, 0], "no"),
            (&[0, 0, 0], "more"),
        ],
    );
}

/// Requests that are answered before anything shows: the dialogues of libpq with sslmode and gssencmode.
#[test]
fn postgres_answers() {
    let hello = records(&hello(&[server_name(b"db.example")]), 100);
    let login = startup(3 << 16, b"user\0alice\0\0");
    let (tls, plain) =
        (Sniffer::new([Protocol::Postgres]), Sniffer::new([Protocol::Postgres]).with_postgres_tls(false));
    let cases: &[(&Sniffer<'_>, &[&[u8]], &str)] = &[
        (&tls, &[&TLS, &hello], "answer S postgres name=db.example"),
        (&tls, &[&GSS, &TLS, &hello], "answer N answer S postgres name=db.example"),
        (&tls, &[&GSS, &login], "answer N postgres user=alice database=alice"),
        (&tls, &[&GSS, &GSS], "answer N refused postgres repeated"),
        (&tls, &[&GSS], "answer N more"),
        (&tls, &[&TLS, &login], "answer S refused postgres malformed"),
        (&tls, &[&TLS, b"GET / HTTP/1.1\r\n"], "answer S refused postgres malformed"),
        (&tls, &[&GSS, b"GET / HTTP/1.1\r\n"], "answer N refused postgres malformed"),
        (&plain, &[&TLS, &login], "answer N postgres user=alice database=alice"),
        (&plain, &[&TLS, &GSS, &login], "answer N answer N postgres user=alice database=alice"),
        (&plain, &[&GSS, &TLS, &login], "answer N answer N postgres user=alice database=alice"),
        (&plain, &[&TLS, &GSS, &TLS], "answer N answer N refused postgres repeated"),
        (&plain, &[&TLS, &TLS], "answer N refused postgres repeated"),
    ];
    for (sniffer, parts, expected) in cases {
        assert_eq!(converse(sniffer, &parts.concat()), *expected, "{parts:02x?}");
    }
    // What is sent in the clear before the answer could be taken for what comes encrypted (CVE-2021-23214).
    assert_eq!(look(&tls, &[&TLS[..], &hello].concat()), "refused postgres early");
    assert_eq!(look(&tls, &[&GSS[..], b"x"].concat()), "refused postgres early");
}

/// What lies in front is not for the service; what was promised to the client, the service has to promise, too.
#[test]
fn postgres_promises() {
    let hello = records(&hello(&[server_name(b"db.example")]), 100);
    let login = startup(3 << 16, b"user\0alice\0\0");
    let header = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 5432\r\n";
    let tls = Sniffer::new([Protocol::Postgres]).with_prelude(Prelude::Allowed);
    let plain = tls.with_postgres_tls(false);
    type Case<'a> = (&'a Sniffer<'a>, &'a [&'a [u8]], Option<(&'a [u8], u8)>);
    let promise: Option<(&[u8], u8)> = Some((&TLS, b'S'));
    let cases: &[Case<'_>] = &[
        (&tls, &[&TLS, &hello], promise),
        (&tls, &[&GSS, &TLS, &hello], promise),
        (&tls, &[&GSS, &login], None),
        (&tls, &[&login], None),
        (&plain, &[&TLS, &login], None),
        (&plain, &[&TLS, &GSS, &login], None),
    ];
    let mut scratch = Box::new(Scratch::new());
    for (sniffer, parts, promised) in cases {
        for header in [&b""[..], header] {
            let (mut state, mut bytes) = (State::default(), header.to_vec());
            assert!(!state.knows_source());
            for part in *parts {
                bytes.extend_from_slice(part);
                sniffer.sniff(&mut state, &bytes, &mut scratch);
            }
            let last = parts.last().map_or(0, |part| part.len());
            assert_eq!((state.promised(), state.start()), (*promised, bytes.len() - last), "{parts:02x?}");
            assert_eq!((state.knows_source(), state.proxied(&bytes).is_some()), (true, !header.is_empty()));
        }
    }
}

/// A CONNECT packet: name and level, flags, what follows the keep alive.
fn connect(level: &[u8], flags: u8, rest: &[u8]) -> Vec<u8> {
    let body = [level, &[flags, 0, 60], rest].concat();
    let (low, high) = (body.len() % 128, body.len() / 128);
    let length = if high == 0 { vec![low as u8] } else { vec![low as u8 | 0x80, high as u8 | 0x80, (high >> 7) as u8] };
    [&[0x10][..], &length, &body].concat()
}

#[test]
fn mqtt() {
    let (v3, v4, v5) = (b"\0\x06MQIsdp\x03".as_slice(), b"\0\x04MQTT\x04".as_slice(), b"\0\x04MQTT\x05".as_slice());
    let text = |parts: &[&[u8]]| parts.iter().flat_map(|it| counted(2, it)).collect::<Vec<u8>>();
    let will_v5 =
        [&[5, 17, 0, 0, 0, 9][..], &text(&[b"dev"]), &[0], &text(&[b"topic", b"gone", b"bob", b"pw"])].concat();
    cases(
        Protocol::Mqtt,
        &[
            (b"\x10", "more"),
            (&connect(v4, 2, &text(&[b"dev-1"])), "mqtt client=dev-1"),
            (&connect(v4, 0xc2, &text(&[b"dev-1", b"alice", b"pw"])), "mqtt user=alice client=dev-1"),
            (&connect(v3, 2, &text(&[b""])), "mqtt client="),
            (&connect(v4, 0x86, &text(&[b"d", b"topic", b"\0\xff", b"bob"])), "mqtt user=bob client=d"),
            (&connect(v5, 0xc6, &will_v5), "mqtt user=bob client=dev"),
            (&connect(v5, 0x42, &[&[0][..], &text(&[b"d", b"pw"])].concat()), "mqtt client=d"),
            (&connect(v4, 0x42, &text(&[b"d", b"pw"])), "refused mqtt malformed"), // a password and no user
            (&connect(v4, 3, &text(&[b"d"])), "refused mqtt malformed"),
            (&connect(v4, 0x1e, &text(&[b"d", b"t", b"w"])), "refused mqtt malformed"), // QoS 3
            (&connect(v4, 0x22, &text(&[b"d"])), "refused mqtt malformed"),
            (&connect(v4, 2, &text(&[b"d", b"e"])), "refused mqtt malformed"),
            (&connect(v4, 0x82, &text(&[b"d"])), "refused mqtt malformed"),
            (&connect(v4, 2, b""), "refused mqtt malformed"),
            (&connect(v4, 2, &text(&[b"a\0b"])), "refused mqtt malformed"),
            (&connect(v4, 2, &text(&[b"\xff"])), "refused mqtt malformed"),
            (&connect(v5, 2, &[200, 1, 0]), "refused mqtt malformed"),
            (&connect(v4, 2, &text(&[&[b'x'; 40_000]])), &format!("mqtt client={}", "x".repeat(40_000))),
            (b"\x10\xff\xff\x7f\0\x04MQTT\x04", "refused mqtt too-long"),
            (b"\x10\xff\xff\xff\xff\x7f", "no"),
            (b"\x10\x0c\0\x04MQTT\x06", "no"),
            (b"\x10\x0c\0\x04HTTP", "no"),
            (b"\x20\x02\0\0", "no"),
        ],
    );
}

#[test]
fn redis() {
    cases(
        Protocol::Redis,
        &[
            (b"*1\r\n$4\r\nPING\r\n", "redis"),
            (b"*3\r\n$3\r\nSET\r\n", "redis"), // any other command is clear by its name
            (b"*2\r\n$4\r\nAUTH\r\n$2\r\npw\r\n", "redis user=default"),
            (b"*3\r\n$4\r\nauth\r\n$5\r\nalice\r\n$4\r\np\r\nw\r\n", "redis user=alice"),
            (b"*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n", "redis"),
            (
                b"*7\r\n$5\r\nHELLO\r\n$1\r\n3\r\n$7\r\nSETNAME\r\n$3\r\nweb\r\n$4\r\nAUTH\r\n$3\r\nbob\r\n$1\r\nx\r\n",
                "redis user=bob client=web",
            ),
            (b"*2\r\n$6\r\nSELECT\r\n$1\r\n7\r\n", "redis database=7"),
            (b"AUTH alice secret\r\n", "redis user=alice"),
            (b"hello 3 auth bob pw setname web\n", "redis user=bob client=web"),
            (b"PING\r\n", "redis"),
            (b"INFO \"x y\"\r\n", "redis"),
            (b"AUTH \"alice\" secret\r\n", "refused redis malformed"),
            (b"AUTH\r\n", "refused redis malformed"),
            (b"*1\r\n$4\r\nAUTH\r\n", "refused redis malformed"),
            (b"*4\r\n$5\r\nHELLO\r\n$1\r\n3\r\n$4\r\nAUTH\r\n$1\r\na\r\n", "refused redis malformed"),
            (b"*3\r\n$4\r\nAUTH\r\n$1\r\naXX$1\r\nb\r\n", "refused redis malformed"),
            (b"*3\r\n$4\r\nAUTH\r\n:1\r\n$1\r\nb\r\n", "refused redis malformed"),
            (b"*2\r\n$4\r\nAUTH\r\n$5000\r\n", "refused redis too-long"),
            (b"*9\r\n$5\r\nHELLO\r\n", "more"),
            (b"*0\r\n", "no"),
            (b"*-1\r\n", "no"),
            (b"*99999999999\r\n", "no"),
            (b"*1\r\n:1\r\n", "no"),
            (b"*1\r\n$0\r\n\r\n", "no"),
            (b"*1\r\n$4\r\nP NG\r\n", "no"),
            (b"PINGS\r\n", "no"),
            (b"GETs", "no"),
            (b"EHLO x\r\n", "no"),
            (b"PI", "more"),
        ],
    );
    let twice =
        b"*8\r\n$5\r\nHELLO\r\n$1\r\n3\r\n$4\r\nAUTH\r\n$1\r\na\r\n$1\r\nb\r\n$4\r\nAUTH\r\n$1\r\nc\r\n$1\r\nd\r\n";
    assert_eq!(settled(&Sniffer::new([Protocol::Redis]), twice), "refused redis malformed");
    let line = [b"AUTH ".as_slice(), &[b'x'; 5000]].concat();
    assert_eq!(settled(&Sniffer::new([Protocol::Redis]), &line), "refused redis too-long");
}

#[test]
fn tcpmux() {
    let long = format!("{0}.{0}.{0}.{1}", "a".repeat(63), "b".repeat(61));
    cases(
        Protocol::Tcpmux,
        &[
            (b"Shop.Example\r\n", "tcpmux name=shop.example reply=+\\r\\n"),
            (b"help\n", "tcpmux name=help reply=+\\r\\n"),
            (b"4294967295\r\n", "tcpmux name=4294967295 number=4294967295 reply=+\\r\\n"),
            (b"65537\r\n", "tcpmux name=65537 number=65537 reply=+\\r\\n"),
            (b"4294967296\r\n", "tcpmux name=4294967296 reply=+\\r\\n"),
            (b"007\r\n", "tcpmux name=007 reply=+\\r\\n"),
            (format!("{long}.\r\n").as_bytes(), &format!("tcpmux name={long} reply=+\\r\\n")),
            (format!("{long}cc\r\n").as_bytes(), "no"),
            (b"a b\r\n", "no"),
            (b"a/../b\r\n", "no"),
            (b"a..b\r\n", "no"),
            (b"\r\n", "no"),
            (b"a\0\r\n", "no"),
            (b"a\rb\r\n", "no"),
            ("\u{fc}\r\n".as_bytes(), "no"),
            (b"shop", "more"),
        ],
    );
}

#[test]
fn amqp() {
    cases(
        Protocol::Amqp,
        &[
            (b"AMQP\0\0\x09\x01", "amqp"),
            (b"AMQP\x01\x01\x08\0", "amqp"),
            (b"AMQP\x01\x01\0\x09", "amqp"),
            (b"AMQP\x01\x01\0\x0a", "amqp"),
            (b"AMQP\x01\x01\x09\x01", "amqp"),
            (b"AMQP\0\x01\0\0", "no"),
            (b"AMQP\x01\x01\x09\x09", "no"),
            (b"amqp\0\0\x09\x01", "no"),
            (b"AMQP", "more"),
            (b"A", "more"),
        ],
    );
    cases(
        Protocol::Amqp1,
        &[
            (b"AMQP\0\x01\0\0", "amqp1"),
            (b"AMQP\x02\x01\0\0", "amqp1 starttls"),
            (b"AMQP\x03\x01\0\0", "amqp1"),
            (b"AMQP\0\0\x09\x01", "no"),
            (b"AMQP\x01\x01\0\0", "no"),
            (b"AMQP\0\x02\0\0", "no"),
            (b"AMQP\x03", "more"),
        ],
    );
}

#[test]
fn patterns() {
    let patterns = [
        Pattern::new(4, b"\xfe\xedmagic").unwrap(),
        Pattern::new(0, b"\x05").unwrap(),
        Pattern::new(0, b"\x06x").unwrap(),
    ];
    let sniffer = Sniffer::new([Protocol::Pattern]).with_patterns(&patterns);
    let cases: &[(&[u8], &str)] = &[
        (b"....\xfe\xedmagic", "pattern pattern=0"),
        (b"\x05abc\xfe\xedmagic", "pattern pattern=0"), // in their order
        (b"\x05abcd", "pattern pattern=1"),
        (b"\x06xyz0", "pattern pattern=2"),
        (b"\x06xyz", "more"), // the first may still match
        (b"GET / HT", "no"),
    ];
    for (bytes, expected) in cases {
        assert_eq!(settled(&sniffer, bytes), *expected, "{}", bytes.escape_ascii());
    }
    for (offset, bytes, fits) in [
        (0, &b""[..], false),
        (4096, b"x", false),
        (4095, b"x", true),
        (4032, &[b'x'; 64], true),
        (0, &[b'x'; 65], false),
    ] {
        assert_eq!(Pattern::new(offset, bytes).is_some(), fits, "{} bytes at {offset}", bytes.len());
    }
}
