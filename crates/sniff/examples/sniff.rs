//! What it costs to look at a connection: nanoseconds per opening, whole and byte by byte.
//!
//! `cargo run --release -p fourtuple-sniff --example sniff`. One thread; the median of 31 rounds.

#[path = "../tests/probes/support.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod support;

use std::hint::black_box;
use std::time::{Duration, Instant};

use fourtuple_sniff::{Scratch, Sniffer, State, Verdict};
use support::{alpn, extension, hello, records, server_name};

fn main() {
    let modern = hello(&[
        extension(0x7a7a, b""),
        server_name(b"service-123456.apps.example.com"),
        extension(51, &[5; 1222]),
        alpn(&[b"h2", b"http/1.1"]),
        extension(21, &[0; 200]),
    ]);
    let small =
        hello(&[server_name(b"service-123456.apps.example.com"), alpn(&[b"h2", b"http/1.1"]), vec![0xff, 1, 0, 1, 0]]);
    let large = hello(&[extension(21, &[0; 60_000]), server_name(b"service-123456.apps.example.com")]);
    let http = b"GET /index.html?x=1 HTTP/1.1\r\nHost: service-123456.apps.example.com\r\nUser-Agent: curl/8.14.1\r\n\
        Accept: */*\r\nAccept-Encoding: gzip, deflate, br\r\nConnection: keep-alive\r\n\r\n";
    // RFC 7541 C.4.1 behind SETTINGS and WINDOW_UPDATE.
    let http2 =
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64\0\0\x04\x08\0\0\0\0\0\0\xff\0\0\
        \0\0\x11\x01\x05\0\0\0\x01\x82\x86\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff";
    let openings = [
        ("TLS hello, small", records(&small, 16_384)),
        ("TLS hello, ML-KEM", records(&modern, 16_384)),
        ("TLS hello, ML-KEM, records of 100", records(&modern, 100)),
        ("TLS hello, ML-KEM, records of 1", records(&modern, 1)),
        ("TLS hello, 60 kB", records(&large, 16_384)),
        ("HTTP/1 request", http.to_vec()),
        ("HTTP/2 request", http2.to_vec()),
        ("PostgreSQL startup", b"\0\0\0\x22\0\x03\0\0user\0alice\0database\0shop\0\0".to_vec()),
        ("Redis PING", b"*1\r\n$4\r\nPING\r\n".to_vec()),
        ("RTSP request", b"DESCRIBE rtsp://cam.example.com:8554/live/1 RTSP/1.0\r\nCSeq: 2\r\n\r\n".to_vec()),
        (
            "XMPP stream",
            b"<stream:stream to='a.example' xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>"
                .to_vec(),
        ),
        ("LDAP bind", b"\x30\x0d\x02\x01\x01\x60\x08\x02\x01\x03\x04\x01a\x80\0".to_vec()),
        ("Minecraft handshake", b"\x10\0\xfd\x05\x09a.example\x63\xdd\x02".to_vec()),
        ("SOCKS 4A request", b"\x04\x01\0P\0\0\0\x01\0a.example\0".to_vec()),
        ("tcpmux line", b"service-123456\r\n".to_vec()),
    ];
    println!("{:<36} {:>7} {:>10} {:>10} {:>14}", "opening", "bytes", "own probe", "all probes", "byte by byte");
    for (name, bytes) in openings {
        let mut scratch = Scratch::new();
        let Verdict::Match(shown) = Sniffer::all().sniff(&mut State::default(), &bytes, &mut scratch) else {
            panic!("{name} is not recognised")
        };
        let own = Sniffer::new([shown.protocol]);
        let whole = median(&own, &bytes, bytes.len());
        let all = median(&Sniffer::all(), &bytes, bytes.len());
        let every = median(&own, &bytes, 1).as_nanos() as f64 / bytes.len() as f64;
        let (whole, all) = (whole.as_nanos(), all.as_nanos());
        println!("{name:<36} {:>7} {whole:>7} ns {all:>7} ns {every:>9.1} ns/B", bytes.len());
    }
    println!(
        "state of a connection: {} bytes; scratch of a worker: {} bytes",
        size_of::<State>(),
        size_of::<Scratch>()
    );
}

/// The time for one connection whose bytes come in segments of this size.
#[expect(clippy::disallowed_methods, reason = "it measures; the crate itself knows no clock")]
fn median(sniffer: &Sniffer<'_>, bytes: &[u8], segment: usize) -> Duration {
    let mut scratch = Box::new(Scratch::new());
    let repeats = (200_000 / bytes.len().max(1)).clamp(1, 500) as u32;
    let mut rounds: Vec<Duration> = (0..31)
        .map(|_| {
            let begin = Instant::now();
            for _ in 0..repeats {
                let mut state = State::default();
                for end in (segment..=bytes.len()).step_by(segment) {
                    black_box(sniffer.sniff(&mut state, black_box(&bytes[..end]), &mut scratch));
                }
            }
            begin.elapsed() / repeats
        })
        .collect();
    rounds.sort();
    rounds[rounds.len() / 2]
}
