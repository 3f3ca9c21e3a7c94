//! The PROXY protocol in front of other protocols: read, written, and read again.

use std::net::SocketAddr;

use crate::support::{hello, look, records, server_name, settled, truncated};
use fourtuple_sniff::proxy::{self, tlv};
use fourtuple_sniff::{Prelude, Protocol, Scratch, Sniffer, State, Verdict};
use proptest::prelude::*;

fn sniffer(prelude: Prelude) -> Sniffer<'static> {
    Sniffer::all().with_prelude(prelude)
}

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// A header of version 2: version and command, family, the rest.
fn binary(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    [SIGNATURE, &[command, family], &(rest.len() as u16).to_be_bytes(), rest].concat()
}

#[test]
fn lines() {
    let cases: &[(&str, &str)] = &[
        ("PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n", "proxied=1:192.0.2.7:56324>198.51.100.1:443"),
        ("PROXY TCP6 2001:db8::7 2001:db8::1 1 65535\r\n", "proxied=1:[2001:db8::7]:1>[2001:db8::1]:65535"),
        ("PROXY UNKNOWN\r\n", "proxied=1:-"),
        ("PROXY UNKNOWN whatever there is\r\n", "proxied=1:-"),
        ("PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\n", ""),
        ("PROXY TCP4 192.0.2.7 198.51.100.1 56324 443 \r\n", ""),
        ("PROXY TCP4 192.0.2.7  198.51.100.1 56324 443\r\n", ""),
        ("PROXY TCP4 192.0.2.07 198.51.100.1 56324 443\r\n", ""),
        ("PROXY TCP4 192.0.2.7 198.51.100.1 056324 443\r\n", ""),
        ("PROXY TCP4 192.0.2.7 198.51.100.1 65536 443\r\n", ""),
        ("PROXY TCP4 192.0.2.7 198.51.100.1 -1 443\r\n", ""),
        ("PROXY TCP4 2001:db8::7 198.51.100.1 1 443\r\n", ""),
        ("PROXY TCP4 192.0.2.7 198.51.100.1 1\r\n", ""),
        ("PROXY UDP4 192.0.2.7 198.51.100.1 1 443\r\n", ""),
        ("PROXY \r\n", ""),
    ];
    for (line, shown) in cases {
        let stream = [line.as_bytes(), b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"].concat();
        let expected = match *shown {
            "" => "refused proxy malformed".to_owned(),
            shown => format!("http name=a path=/ {shown}"),
        };
        assert_eq!(settled(&sniffer(Prelude::Allowed), &stream), expected, "{line:?}");
        assert_eq!(settled(&sniffer(Prelude::Required), &stream), expected, "{line:?}");
        truncated(&sniffer(Prelude::Required), &stream);
        // From a source that is not trusted it is no header.
        assert!(!look(&sniffer(Prelude::None), &stream).contains("proxied"), "{line:?}");
    }
    let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(92));
    assert_eq!(settled(&sniffer(Prelude::Required), long.as_bytes()), "refused proxy too-long");
    assert_eq!(settled(&sniffer(Prelude::Required), b"GET / HTTP/1.1\r\n\r\n"), "refused proxy unproxied");
    assert_eq!(settled(&sniffer(Prelude::Allowed), b"GET / HTTP/1.1\r\n\r\n"), "http path=/ probe");
    assert_eq!(settled(&sniffer(Prelude::Allowed), b"PROXIES / HTTP/1.1\r\n\r\n"), "http path=/ probe");
}

#[test]
fn headers() {
    let ipv4 = [192, 0, 2, 7, 198, 51, 100, 1, 0xdc, 4, 1, 187];
    let with = |tlv: &[u8]| [&ipv4[..], tlv].concat();
    let inner = records(&hello(&[server_name(b"a.example")]), 50);
    let from = "proxied=2:192.0.2.7:56324>198.51.100.1:443";
    let cases: &[(Vec<u8>, &str)] = &[
        (binary(0x21, 0x11, &ipv4), from),
        (binary(0x21, 0x11, &with(&[1, 0, 2, b'h', b'2', 4, 0, 0, 0xee, 0, 1, 9])), from),
        (binary(0x21, 0x11, &with(&[5, 0, 3, 1, 2, 3])), from),
        (binary(0x20, 0, &[]), "proxied=2:-"),
        (binary(0x20, 0x11, &[1, 2, 3]), "proxied=2:-"), // LOCAL: all of it is discarded
        (binary(0x21, 0, &[]), "proxied=2:-"),
        (binary(0x21, 0x12, &ipv4), "proxied=2:-"), // datagrams
        (binary(0x21, 0x31, &[b'/'; 216]), "proxied=2:-"),
        (binary(0x21, 0x31, &[b'/'; 215]), "malformed"),
        (binary(0x21, 0x11, &ipv4[..11]), "malformed"),
        (binary(0x21, 0x21, &[0; 35]), "malformed"),
        (binary(0x21, 0x11, &with(&[1, 0])), "malformed"),
        (binary(0x21, 0x11, &with(&[1, 0, 9, 0])), "malformed"),
        (binary(0x21, 0x11, &with(&[3, 0, 4, 0, 0, 0, 0])), "malformed"), // a wrong checksum
        (binary(0x21, 0x11, &with(&[3, 0, 3, 0, 0, 0])), "malformed"),
        (binary(0x21, 0x11, &with(&[&[5, 0, 129][..], &[1; 129]].concat())), "too-long"),
        (binary(0x22, 0x11, &ipv4), "malformed"),
        (binary(0x11, 0x11, &ipv4), "malformed"),
        (binary(0x21, 0x11, &[0; 5000]), "too-long"),
    ];
    for (header, shown) in cases {
        let stream = [&header[..], &inner].concat();
        let expected = match shown.split_once('=') {
            Some(_) => format!("tls name=a.example {shown}"),
            None => format!("refused proxy {shown}"),
        };
        assert_eq!(settled(&sniffer(Prelude::Required), &stream), expected, "{}", header.escape_ascii());
        truncated(&sniffer(Prelude::Allowed), &stream);
        assert_eq!(look(&sniffer(Prelude::None), &stream), "no", "{}", header.escape_ascii());
    }
    // A header in front of a header is none: one proxy is trusted, whom it passes on is not.
    let twice = [&b"PROXY UNKNOWN\r\n"[..], &binary(0x21, 0x11, &ipv4), &inner].concat();
    assert_eq!(settled(&sniffer(Prelude::Required), &twice), "no");
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        from in any::<SocketAddr>(), to in any::<SocketAddr>(), local in any::<bool>(),
        unique_id in prop::collection::vec(any::<u8>(), 0..=128), authority in "[a-z]{1,20}(\\.[a-z]{1,9})?",
    ) {
        let endpoints = (!local).then_some((from, to));
        let six = |it: SocketAddr| match it {
            SocketAddr::V4(it) => SocketAddr::from((it.ip().to_ipv6_mapped(), it.port())),
            SocketAddr::V6(it) => SocketAddr::from((*it.ip(), it.port())),
        };
        let expected = endpoints.map(|(from, to)| if from.is_ipv4() && to.is_ipv4() { (from, to) } else { (six(from), six(to)) });
        let tlvs = [(tlv::UNIQUE_ID, &unique_id[..]), (tlv::AUTHORITY, authority.as_bytes())];
        let (mut line, mut header, mut scratch) = ([0; 107], [0; 512], Box::new(Scratch::new()));
        let line_bytes = proxy::write_line(endpoints, &mut line).unwrap();
        let header_bytes = proxy::write(endpoints, &tlvs, &mut header).unwrap();
        let ssh = Sniffer::new([Protocol::Ssh]).with_prelude(Prelude::Required);
        for written in [&line[..line_bytes], &header[..header_bytes]] {
            let stream = [written, b"SSH-2.0-x\r\n"].concat();
            let Verdict::Match(shown) = ssh.sniff(&mut State::default(), &stream, &mut scratch) else {
                panic!("not read: {}", stream.escape_ascii())
            };
            let read = shown.proxied.unwrap();
            prop_assert_eq!(read.endpoints, expected);
            if read.version == 2 && !local {
                prop_assert_eq!(read.tlv(tlv::UNIQUE_ID), Some(&unique_id[..]));
                prop_assert_eq!(read.tlv(tlv::AUTHORITY), Some(authority.as_bytes()));
                prop_assert!(read.tlv(tlv::CRC32C).is_some());
                // One bit wrong anywhere in the addresses, and the checksum shows it.
                let mut bad = stream.clone();
                bad[17] ^= 1;
                prop_assert_eq!(look(&ssh, &bad), "refused proxy malformed");
            }
        }
        prop_assert_eq!(proxy::write(endpoints, &tlvs, &mut [0; 15]), None);
        prop_assert_eq!(proxy::write_line(endpoints, &mut [0; 10]), None);
    }
}
