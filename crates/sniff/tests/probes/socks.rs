//! SOCKS 4, 4A and 5: whole, in pieces, truncated, followed by more, oversized and contradictory; answered, and left.

use crate::support::{cases, converse, counted, feed, look, settled, truncated};
use fourtuple_sniff::{Prelude, Protocol, Scratch, Sniffer, State, Verdict};

const GRANTED: &str = "reply=\\x00Z\\x00\\x00\\x00\\x00\\x00\\x00";
const SUCCEEDED: &str = "reply=\\x05\\x00\\x00\\x01\\x00\\x00\\x00\\x00\\x00\\x00";

fn request4(command: u8, port: u16, address: [u8; 4], rest: &[u8]) -> Vec<u8> {
    [&[4, command][..], &port.to_be_bytes(), &address, rest].concat()
}

#[test]
fn version_4() {
    let named = |rest: &[u8]| request4(1, 443, [0, 0, 0, 1], rest);
    let long = "x".repeat(255);
    cases(
        Protocol::Socks4,
        &[
            (&request4(1, 80, [192, 0, 2, 1], b"\0"), &format!("socks4 name=192.0.2.1 port=80 {GRANTED}")),
            (
                &request4(1, 80, [192, 0, 2, 1], b"alice\0"),
                &format!("socks4 name=192.0.2.1 port=80 user=alice {GRANTED}"),
            ),
            (&named(b"\0A.Example.\0"), &format!("socks4 name=a.example port=443 {GRANTED}")),
            (&named(b"bob\0::1\0"), &format!("socks4 name=::1 port=443 user=bob {GRANTED}")),
            (&named(&[long.as_bytes(), b"\0a\0"].concat()), &format!("socks4 name=a port=443 user={long} {GRANTED}")),
            (&request4(1, 80, [0; 4], b"\0"), &format!("socks4 name=0.0.0.0 port=80 {GRANTED}")),
            (&named(b"\0\0"), "refused socks4 bad-name"),
            (&named(b"\0a..b\0"), "refused socks4 bad-name"),
            (&named(b"\0a/b\0"), "refused socks4 bad-name"),
            (&request4(2, 80, [192, 0, 2, 1], b"\0"), "refused socks4 unsupported"),
            (&named(&[long.as_bytes(), b"x\0a\0"].concat()), "no"),
            (&named(&[b"\0", long.as_bytes(), b"x\0"].concat()), "no"),
            (&named(b"a\nb\0a\0"), "no"),
            (&named(b"\x1b\0a\0"), "no"),
            (&request4(3, 80, [1; 4], b"\0"), "no"),
            (b"\x04\0", "no"),
            (b"\x04\x01", "more"),
            (b"\x04", "more"),
            (&named(b"alice\0a.exam"), "more"),
        ],
    );
}

/// A greeting with these methods, then a request.
fn dialogue(methods: &[u8], request: &[u8]) -> Vec<u8> {
    [&[5][..], &counted(1, methods), request].concat()
}

fn request5(command: u8, kind: u8, address: &[u8], port: u16) -> Vec<u8> {
    [&[5, command, 0, kind][..], address, &port.to_be_bytes()].concat()
}

#[test]
fn version_5() {
    let name = |name: &[u8]| request5(1, 3, &counted(1, name), 443);
    let long = format!("{0}.{0}.{0}.{1}", "a".repeat(63), "b".repeat(61));
    let cases: &[(Vec<u8>, &str)] = &[
        (dialogue(&[0], &name(b"A.Example")), &format!("answer \\x05\\x00 socks5 name=a.example port=443 {SUCCEEDED}")),
        (dialogue(&[2, 1, 0], &name(b"a")), &format!("answer \\x05\\x00 socks5 name=a port=443 {SUCCEEDED}")),
        (dialogue(&[0; 255], &name(b"a")), &format!("answer \\x05\\x00 socks5 name=a port=443 {SUCCEEDED}")),
        (dialogue(&[0], &name(long.as_bytes())), &format!("answer \\x05\\x00 socks5 name={long} port=443 {SUCCEEDED}")),
        (
            dialogue(&[0], &request5(1, 1, &[192, 0, 2, 1], 80)),
            &format!("answer \\x05\\x00 socks5 name=192.0.2.1 port=80 {SUCCEEDED}"),
        ),
        (
            dialogue(&[0], &request5(1, 4, &[&[0x20, 1, 0x0d, 0xb8][..], &[0; 11], &[7]].concat(), 80)),
            &format!("answer \\x05\\x00 socks5 name=2001:db8::7 port=80 {SUCCEEDED}"),
        ),
        (dialogue(&[0], &name(b"")), "answer \\x05\\x00 refused socks5 bad-name"),
        (dialogue(&[0], &name(b"a b")), "answer \\x05\\x00 refused socks5 bad-name"),
        (dialogue(&[0], &name(&[b'a'; 255])), "answer \\x05\\x00 refused socks5 bad-name"),
        (dialogue(&[0], &request5(2, 1, &[0; 4], 0)), "answer \\x05\\x00 refused socks5 unsupported"),
        (dialogue(&[0], &request5(3, 1, &[0; 4], 0)), "answer \\x05\\x00 refused socks5 unsupported"),
        (dialogue(&[0], &request5(4, 1, &[0; 4], 0)), "answer \\x05\\x00 refused socks5 malformed"),
        (dialogue(&[0], &request5(1, 2, &[0; 4], 0)), "answer \\x05\\x00 refused socks5 malformed"),
        (dialogue(&[0], b"\x05\x01\x01"), "answer \\x05\\x00 refused socks5 malformed"),
        (dialogue(&[0], b"GET / HTTP/1.1\r\n"), "answer \\x05\\x00 refused socks5 malformed"),
        (dialogue(&[0], b"\x01\x05alice\x02pw"), "answer \\x05\\x00 refused socks5 malformed"),
        (dialogue(&[2, 1], &name(b"a")), "refused socks5 unsupported"), // a password, or GSSAPI
        (dialogue(&[0], b""), "answer \\x05\\x00 more"),
        (dialogue(&[0], b"\x05\x01\0\x03\x09a.exa"), "answer \\x05\\x00 more"),
        (b"\x05\x03\0\x02".to_vec(), "more"),
        (b"\x05".to_vec(), "more"),
        (b"\x05\0".to_vec(), "no"),
        (b"\x05\x02\xff".to_vec(), "no"),
        (b"\x06\x01\0".to_vec(), "no"),
    ];
    let sniffer = Sniffer::new([Protocol::Socks5]);
    for (bytes, expected) in cases {
        assert_eq!(settled(&sniffer, bytes), *expected, "{}", bytes.escape_ascii());
        assert_eq!(converse(&sniffer, bytes), *expected, "{}", bytes.escape_ascii());
        truncated(&sniffer, bytes);
        if !expected.ends_with("more") && !expected.ends_with("no") {
            let more = [bytes, &b"\x05\x01\0GET / HTTP/1.1\r\n\r\n"[..]].concat();
            assert_eq!(settled(&sniffer, &more), *expected, "{}", more.escape_ascii());
        }
    }
}

/// What was answered is not for the service; where nothing is answered, everything is.
#[test]
fn answered_or_left() {
    let header = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 1080\r\n";
    let five = dialogue(&[0, 2], &request5(1, 3, &counted(1, b"a.example"), 80));
    let four = request4(1, 80, [0, 0, 0, 9], b"alice\0a.example\0");
    let answering = Sniffer::all().with_prelude(Prelude::Allowed);
    let leaving = answering.with_socks_answered(false);
    let mut scratch = Box::new(Scratch::new());
    for header in [&b""[..], header] {
        let bytes = [header, &five].concat();
        let mut state = State::default();
        assert!(matches!(answering.sniff(&mut state, &bytes, &mut scratch), Verdict::Answer(b"\x05\0")));
        let Verdict::Match(shown) = answering.sniff(&mut state, &bytes, &mut scratch) else { panic!("no match") };
        assert_eq!((shown.end, shown.reply.len()), (bytes.len(), 10));
        assert_eq!(state.start(), header.len() + 4);

        let mut state = State::default();
        let Verdict::Match(shown) = leaving.sniff(&mut state, &bytes, &mut scratch) else { panic!("no match") };
        assert_eq!((shown.protocol, shown.name, shown.reply.len()), (Protocol::Socks5, None, 0));
        assert_eq!((state.start(), shown.end), (header.len(), header.len() + 4));

        let bytes = [header, &four].concat();
        for (sniffer, reply) in [(&answering, 8), (&leaving, 0)] {
            let Verdict::Match(shown) = sniffer.sniff(&mut State::default(), &bytes, &mut scratch) else {
                panic!("no match")
            };
            let found = (shown.name, shown.user, shown.end, shown.reply.len());
            assert_eq!(found, (Some("a.example"), Some(&b"alice"[..]), bytes.len(), reply));
        }
    }
    // A client that insists on a password is for a service that has one.
    assert_eq!(look(&leaving, &dialogue(&[2], b"")), "socks5");
    assert_eq!(feed(&leaving, &dialogue(&[2], b""), [1, 2]), "socks5");
}
