//! What other sniffers get wrong, or got: one test each, named after where it is told.

use fourtuple_sniff::{Prelude, Protocol, Sniffer};

use crate::support::{alpn, extension, feed, hello, look, records, server_name, settled};

fn with_name() -> Vec<u8> {
    hello(&[extension(51, &[4; 1222]), server_name(b"A.Example"), alpn(&[b"h2"])])
}

const NAMED: &str = "tls name=a.example alpn=h2";

/// HAProxy 3.5-dev5 and sslh send it to the default backend, past the rule for its name (traefik#12787, caddy-l4#346).
#[test]
fn a_hello_over_two_records() {
    let message = with_name();
    for at in [1, 4, 5, 100, 511] {
        let (one, two) = message.split_at(at);
        assert_eq!(settled(&Sniffer::all(), &[records(one, at), records(two, 1 << 14)].concat()), NAMED);
    }
}

/// Chrome 124 with Kyber in two segments: envoy#33850, ingress-nginx#11498, trafficserver#12290, tcpproxy#40.
#[test]
fn a_post_quantum_hello_over_two_segments() {
    let stream = records(&with_name(), 1 << 14);
    for cut in 1..stream.len() {
        assert_eq!(feed(&Sniffer::all(), &stream, [cut]), NAMED);
    }
}

/// nginx closes it at `preread_buffer_size`, Envoy (#39903) and caddy-l4 stop at 16 kB.
#[test]
fn a_hello_of_more_than_16_kb() {
    let large = hello(&[extension(21, &[0; 40_000]), server_name(b"a.example"), alpn(&[b"h2"])]);
    assert_eq!(feed(&Sniffer::all(), &records(&large, 1 << 14), (0..40_000).step_by(1448)), NAMED);
}

/// sozu#1368, rustls#601: upper case on one side of a comparison only.
#[test]
fn case_of_a_host() {
    let http = Sniffer::new([Protocol::Http]);
    assert_eq!(look(&http, b"GET / HTTP/1.1\r\nHOST: WWW.Example\r\n\r\n"), "http name=www.example path=/");
    assert_eq!(look(&Sniffer::all(), &records(&with_name(), 500)), NAMED);
}

/// tempesta#1911: a port behind the host keeps it from matching.
#[test]
fn port_of_a_host() {
    let verdict = look(&Sniffer::all(), b"GET / HTTP/1.1\r\nHost: debian:443\r\n\r\n");
    assert_eq!(verdict, "http name=debian port=443 path=/");
}

/// haproxy#2450: where a header may be left out, a client that is not the proxy can make one up.
#[test]
fn a_header_from_who_is_not_trusted() {
    let forged = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nSSH-2.0-x\r\n";
    assert_eq!(look(&Sniffer::new([Protocol::Ssh]), forged), "no");
    let trusted = Sniffer::new([Protocol::Ssh]).with_prelude(Prelude::Required);
    assert_eq!(look(&trusted, b"SSH-2.0-x\r\n"), "refused proxy unproxied");
}

/// cmux#35: two gigabytes while sniffing. Whatever comes, each probe has decided at its bound.
#[test]
fn bytes_without_end() {
    let begins: [&[u8]; 9] = [
        b"\x16\x03\x01\0\x01\x01\x16\x03\x01\0\x01\0",
        b"GET /",
        b"GET / HTTP/1.1\r\nX: ",
        b"SSH-",
        b"\x10\xff\xff\x03\0\x04MQTT\x05",
        b"AUTH ",
        b"*3\r\n$4\r\nAUTH\r\n$4000\r\n",
        b"PROXY ",
        b"\0\0\x27\x10\0\x03\0\0",
    ];
    for prelude in [Prelude::None, Prelude::Allowed] {
        let sniffer = Sniffer::all().with_prelude(prelude);
        for begin in begins {
            let endless = [begin, &vec![b'x'; sniffer.bound()]].concat();
            assert_ne!(settled(&sniffer, &endless), "more", "{}", begin.escape_ascii());
        }
    }
}

/// cmux#22: a client of gRPC that waits for SETTINGS shows nothing more; what it has shown is not mistaken.
#[test]
fn a_client_that_waits_for_settings() {
    let stream = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x04\x08\0\0\0\0\0\0\x0f\0\x01";
    assert_eq!(settled(&Sniffer::all(), stream), "more");
}
