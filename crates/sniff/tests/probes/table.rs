//! The table of probes and its order, and what holds for all bytes whatever they are.

use crate::support::{feed, hello, line, look, records, server_name, settled};
use fourtuple_sniff::{PROBES, Pattern, Prelude, Protocol, REFUSALS, Refusal, Sniffer};
use proptest::prelude::*;

/// One opening of each protocol.
fn openings() -> Vec<(Protocol, Vec<u8>)> {
    vec![
        (Protocol::Tls, records(&hello(&[server_name(b"a.example")]), 70)),
        (
            Protocol::Http2,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x06\x01\x05\0\0\0\x01\x82\x84\x41\x01a\x86"
                .to_vec(),
        ),
        (Protocol::Connect, b"CONNECT a:1 HTTP/1.1\r\n\r\n".to_vec()),
        (
            Protocol::WebSocket,
            b"GET /w HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n".to_vec(),
        ),
        (Protocol::Http, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()),
        (Protocol::Rtsp, b"OPTIONS rtsp://a/ RTSP/1.0\r\n\r\n".to_vec()),
        (Protocol::Xmpp, b"<s:stream to='a' xmlns:s='http://etherx.jabber.org/streams'>".to_vec()),
        (Protocol::Amqp, b"AMQP\0\0\x09\x01".to_vec()),
        (Protocol::Amqp1, b"AMQP\x03\x01\0\0".to_vec()),
        (Protocol::Ssh, b"SSH-2.0-x\r\n".to_vec()),
        (Protocol::Postgres, b"\0\0\0\x10\0\x03\0\0user\0a\0\0".to_vec()),
        (Protocol::Mqtt, b"\x10\x0d\0\x04MQTT\x04\x02\0\x3c\0\x01d".to_vec()),
        (Protocol::Rdp, b"\x03\0\0\x13\x0e\xe0\0\0\0\0\0\x01\0\x08\0\x03\0\0\0".to_vec()),
        (Protocol::Ldap, b"\x30\x0d\x02\x01\x01\x60\x08\x02\x01\x03\x04\x01a\x80\0".to_vec()),
        (Protocol::Minecraft, b"\x10\0\xfd\x05\x09a.example\x63\xdd\x02".to_vec()),
        (Protocol::Redis, b"*1\r\n$4\r\nPING\r\n".to_vec()),
        (Protocol::Socks5, b"\x05\x01\0\x05\x01\0\x03\x01a\0P".to_vec()),
        (Protocol::Socks4, b"\x04\x01\0P\0\0\0\x01\0a\0".to_vec()),
        (Protocol::Tcpmux, b"shop.example\r\n".to_vec()),
        (Protocol::Pattern, b"\xabmagic".to_vec()),
    ]
}

#[test]
fn rows_are_in_order_and_described() {
    for (row, probe) in PROBES.iter().enumerate() {
        assert_eq!(probe.protocol as usize, row);
        assert_eq!(probe.protocol.probe().name, probe.name);
        assert!(probe.bound > 0 && !probe.shows.is_empty());
        assert_eq!(PROBES.iter().filter(|it| it.name == probe.name).count(), 1);
    }
    assert_eq!(Refusal::Malformed.name(), REFUSALS[0].0);
    assert_eq!(Refusal::Unproxied.name(), REFUSALS[REFUSALS.len() - 1].0);
}

/// Each opening is its own protocol's with every probe enabled, and with any other one disabled.
#[test]
fn every_protocol_is_found_among_all() {
    let pattern = [Pattern::new(0, b"\xabmagic").unwrap()];
    for (protocol, bytes) in openings() {
        let expected = look(&Sniffer::new([protocol]).with_patterns(&pattern), &bytes);
        let name = protocol.probe().name;
        assert!(expected.split(' ').any(|word| word == name), "{expected}");
        assert_eq!(settled(&Sniffer::all().with_patterns(&pattern), &bytes), expected);
        for missing in PROBES.iter().map(|it| it.protocol).filter(|it| *it != protocol) {
            let others = PROBES.iter().map(|it| it.protocol).filter(|it| *it != missing);
            assert_eq!(settled(&Sniffer::new(others).with_patterns(&pattern), &bytes), expected, "without {missing:?}");
        }
    }
}

/// What other openings there are, of clients that people have.
fn more_openings() -> Vec<(Protocol, Vec<u8>)> {
    let texts: &[(Protocol, &[u8])] = &[
        (Protocol::Tls, include_bytes!("../hellos/chrome142.bin")),
        (Protocol::Tls, include_bytes!("../hellos/firefox144.bin")),
        (Protocol::Http, b"\r\n\r\nGET / HTTP/1.0\r\n\r\n"),
        (Protocol::Http, b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"),
        (Protocol::Rtsp, b"DESCRIBE rtsp://a:554/cam RTSP/1.0\r\nCSeq: 1\r\n\r\n"),
        (Protocol::Rtsp, b"GET_PARAMETER * RTSP/2.0\r\nCSeq: 1\r\n\r\n"),
        (Protocol::Xmpp, b"\n<?xml version='1.0'?>\n<stream:stream xmlns:stream='http://etherx.jabber.org/streams'>"),
        (Protocol::Amqp, b"AMQP\x01\x01\0\x09"),
        (Protocol::Amqp1, b"AMQP\0\x01\0\0"),
        (Protocol::Postgres, b"\0\0\0\x08\x04\xd2\x16\x2f"),
        (Protocol::Postgres, b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x01\0\0\0\x02"),
        (Protocol::Mqtt, b"\x10\x10\0\x06MQIsdp\x03\x02\0\x3c\0\x02id"),
        (Protocol::Mqtt, b"\x10\x0e\0\x04MQTT\x05\x02\0\x3c\0\0\x01d"),
        (Protocol::Rdp, b"\x03\0\0\x0b\x06\xe0\0\0\0\0\0"),
        (Protocol::Rdp, b"\x03\0\0\x2a\x25\xe0\0\0\0\0\0Cookie: mstshash=nmap\r\n\x01\0\x08\0\x03\0\0\0"),
        (Protocol::Ldap, b"\x30\x84\0\0\0\x10\x02\x01\x01\x60\x84\0\0\0\x07\x02\x01\x03\x04\0\x80\0"),
        (Protocol::Ldap, b"\x30\x1d\x02\x01\x01\x77\x18\x80\x161.3.6.1.4.1.1466.20037"),
        (Protocol::Minecraft, b"\x06\0\x05\0\0\0\x01"),
        (Protocol::Minecraft, b"\x06\0\0\0\0\0\x02"),
        (Protocol::Redis, b"*2\r\n$7\r\nCOMMAND\r\n$4\r\nDOCS\r\n"),
        (Protocol::Redis, b"QUIT\r\n"),
        (Protocol::Socks5, b"\x05\x02\0\x02"),
        (Protocol::Socks4, b"\x04\x01\0P\xc0\0\x02\x01alice\0"),
        (Protocol::Tcpmux, b"help\r\n"),
    ];
    texts.iter().map(|(protocol, bytes)| (*protocol, bytes.to_vec())).collect()
}

/// No probe takes another's opening, whether the other is enabled or not: the order of the table decides nothing but what
/// is named here. A Minecraft of the size of another's first byte has another second one.
#[test]
fn openings_exclude_each_other() {
    let pattern = [Pattern::new(0, b"\xabmagic").unwrap()];
    let both = |taken: &[Protocol]| taken.iter().map(|it| it.probe().name).collect::<Vec<_>>().join(" ");
    let lengths = (6..=126_u8).map(|size| {
        let host = usize::from(size) - 6;
        (Protocol::Minecraft, [&[size, 0, 5, host as u8][..], &vec![b'a'; host], &[0, 1, 2]].concat())
    });
    let mut most = 0;
    for (protocol, bytes) in openings().into_iter().chain(more_openings()).chain(lengths) {
        let takes = |it: &Protocol| settled(&Sniffer::new([*it]).with_patterns(&pattern), &bytes) != "no";
        let taken: Vec<Protocol> = PROBES.iter().map(|probe| probe.protocol).filter(takes).collect();
        let expected = match protocol {
            Protocol::Http2 => vec![Protocol::Http2, Protocol::Http], // which refuses it
            Protocol::Connect => vec![Protocol::Connect, Protocol::Http],
            Protocol::WebSocket => vec![Protocol::WebSocket, Protocol::Http],
            Protocol::Ssh => vec![Protocol::Ssh, Protocol::Tcpmux],
            Protocol::Redis if bytes[0] != b'*' => vec![Protocol::Redis, Protocol::Tcpmux],
            _ => vec![protocol],
        };
        assert_eq!(both(&taken), both(&expected), "{}", bytes.escape_ascii());
        most += 1;
    }
    assert!(most > 160);
}

/// Bytes that several probes know go to the first in the table.
#[test]
fn precedence() {
    let pattern = [Pattern::new(0, b"PING").unwrap()];
    let rows: &[(&[Protocol], &[u8], &str)] = &[
        (&[Protocol::Redis, Protocol::Tcpmux, Protocol::Pattern], b"PING\r\n", "redis"),
        (&[Protocol::Tcpmux, Protocol::Pattern], b"PING\r\n", "tcpmux name=ping reply=+\\r\\n"),
        (&[Protocol::Pattern], b"PING\r\n", "pattern pattern=0"),
        (&[Protocol::WebSocket], b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "no"),
        (&[Protocol::Connect], b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "no"),
        (&[Protocol::Http], b"CONNECT a:1 HTTP/1.1\r\n\r\n", "http name=a port=1"),
        (&[Protocol::Redis, Protocol::Http], b"TIME /x HTTP/1.1\r\nHost: a\r\n\r\n", "http name=a path=/x"),
        (&[Protocol::Redis, Protocol::Http], b"TIME /x\r\n", "redis"),
        // A name as long as a method is still both.
        (&[Protocol::Http, Protocol::Tcpmux], b"SHOP", "more"),
        (&[Protocol::Http, Protocol::Tcpmux], b"SHOP\r\n", "tcpmux name=shop reply=+\\r\\n"),
        (&[], b"anything", "no"),
    ];
    for (protocols, bytes, expected) in rows {
        let sniffer = Sniffer::new(protocols.iter().copied()).with_patterns(&pattern);
        assert_eq!(settled(&sniffer, bytes), *expected, "{}", bytes.escape_ascii());
    }
}

#[test]
fn silence_wants_more() {
    assert_eq!(look(&Sniffer::all(), b""), "more");
    assert_eq!(look(&Sniffer::all().with_prelude(Prelude::Required), b""), "more");
}

fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let all = [openings(), more_openings()].concat();
    let opening = prop::sample::select(all).prop_map(|(_, bytes)| bytes);
    (opening, prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4), any::<prop::sample::Index>())
        .prop_map(|(mut bytes, changes, cut)| {
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let cut = cut.index(bytes.len() * 2);
            bytes.truncate(cut);
            bytes
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// No panic, and one verdict however the bytes are cut, for openings with some bytes changed and for any bytes.
    #[test]
    fn one_verdict_for_all_cuts(
        bytes in prop_oneof![mutated(), prop::collection::vec(any::<u8>(), 0..80), "[A-Za-z0-9:/ \r\n*$.-]{0,60}".prop_map(String::into_bytes)],
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        prelude in prop::sample::select(vec![Prelude::None, Prelude::Allowed, Prelude::Required]),
    ) {
        let pattern = [Pattern::new(0, b"\xabmagic").unwrap()];
        let sniffer = Sniffer::all().with_prelude(prelude).with_patterns(&pattern);
        let whole = look(&sniffer, &bytes);

        let mut cuts: Vec<usize> = cuts.iter().map(|it| it.index(bytes.len() + 1)).collect();
        cuts.sort_unstable();
        let asks = bytes.get(4..8).is_some_and(|it| matches!(it, [4, 210, 22, 47 | 48]));
        if !asks {
            prop_assert_eq!(feed(&sniffer, &bytes, cuts), whole.clone());
            prop_assert_eq!(feed(&sniffer, &bytes, 0..bytes.len()), whole);
        }
    }
}

/// The one line of a verdict is what these tests compare, so it has to tell verdicts apart.
#[test]
fn lines_tell_apart() {
    use fourtuple_sniff::Verdict;
    let verdicts = [
        line(&Verdict::No),
        line(&Verdict::More(1)),
        line(&Verdict::Answer(b"S")),
        line(&Verdict::Refused(None, Refusal::Early)),
        line(&Verdict::Refused(Some(Protocol::Tls), Refusal::Early)),
    ];
    for (place, verdict) in verdicts.iter().enumerate() {
        assert!(!verdicts[place + 1..].contains(verdict));
    }
}
