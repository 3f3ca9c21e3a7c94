//! TLS hellos in every cut: the matrix of records, segments and sizes, then each way to be wrong.

use crate::support::{alpn, counted, extension, feed, hello, look, records, server_name, settled, truncated};
use fourtuple_sniff::{HELLO_BYTES, Protocol, Sniffer};

fn sniffer() -> Sniffer<'static> {
    Sniffer::new([Protocol::Tls])
}

/// A hello of exactly so many bytes, with the name behind the padding: nothing is found before the end.
fn hello_of(size: usize) -> Vec<u8> {
    let tail = [server_name(b"deep.example"), alpn(&[b"h2", b"http/1.1"])].concat();
    let plain = hello(std::slice::from_ref(&tail)).len();
    // Three pads, for an extension's data has 65,535 bytes at most and so have all together.
    let padding = match size - plain {
        0 => vec![],
        pad => extension(21, &vec![0; pad - 4]),
    };
    let hello = hello(&[padding, tail]);
    assert_eq!(hello.len(), size);
    hello
}

/// HAProxy and sslh send a hello over two records to the default backend, nginx closes those above 16 kB, Envoy and
/// caddy-l4 cap at 16 kB: every cell here is one that another sniffer has got wrong, or might.
#[test]
fn matrix_of_records_segments_and_sizes() {
    let plain = hello(&[server_name(b"deep.example"), alpn(&[b"h2", b"http/1.1"])]).len();
    let sizes = [plain, 512, 517, 1216, 1800, 4096, 16_383, 16_384, 16_385, 32_768, 65_535, HELLO_BYTES];
    let mut cells = 0;
    for size in sizes {
        let message = hello_of(size);
        for record in [1, 2, 3, 4, 5, 100, 511, 1460, 16_383, 16_384] {
            let stream = records(&message, record);
            for segment in [1, 2, 5, 6, 536, 1460, 16_384, stream.len()] {
                let verdict = feed(&sniffer(), &stream, (segment..stream.len()).step_by(segment));
                assert_eq!(verdict, "tls name=deep.example alpn=h2,http/1.1", "{size} bytes by {record}, {segment}");
                cells += 1;
            }
        }
    }
    println!("{cells} cells");
}

/// Hellos of browsers, in records and segments of each size.
#[test]
fn browsers() {
    let hellos: [(&[u8], &str); 3] = [
        (include_bytes!("../hellos/chrome142.bin"), "tls name=service.example alpn=h2,http/1.1 ech"),
        (include_bytes!("../hellos/firefox144.bin"), "tls name=service.example alpn=h2,http/1.1 ech"),
        (include_bytes!("../hellos/safari260.bin"), "tls name=service.example alpn=h2,http/1.1"),
    ];
    for (hello, expected) in hellos {
        assert!(hello.windows(2).any(|it| it == [0x11, 0xec]), "no X25519MLKEM768");
        assert_eq!(look(&sniffer(), hello), expected);
        truncated(&sniffer(), hello);
        for record in [1, 2, 5, 64, 100, 536, 1000, 16_384] {
            let stream = records(&hello[5..], record);
            for segment in [1, 7, 536, 1448] {
                assert_eq!(feed(&sniffer(), &stream, (1..stream.len()).step_by(segment)), expected);
            }
        }
    }
}

#[test]
fn every_truncation_wants_more_and_trailing_bytes_change_nothing() {
    for record in [1, 7, 16_384] {
        let mut stream = records(&hello_of(300), record);
        truncated(&sniffer(), &stream);
        let verdict = settled(&sniffer(), &stream);
        stream.extend(b"\x17\x03\x03\x00\x10early data, or not");
        assert_eq!(settled(&sniffer(), &stream), verdict);
        stream.extend([0xff; 70_000]);
        assert_eq!(settled(&sniffer(), &stream), verdict);
    }
}

/// Chrome's shape: GREASE first and last, a key share of X25519MLKEM768 with 1,216 bytes, ECH, padding.
#[test]
fn post_quantum_grease_and_ech() {
    let key_share = counted(2, &[&[0x5a, 0x5a, 0, 1, 0][..], &[0x11, 0xec], &counted(2, &[3; 1216])].concat());
    let parts = [
        extension(0x7a7a, b""),
        server_name(b"public.example"),
        extension(51, &key_share),
        alpn(&[b"\x2a\x2a", b"h2"]),
        extension(0xfe0d, &[0; 186]),
        extension(0x8a8a, b"\0"),
    ];
    let stream = records(&hello(&parts), 16_384);
    assert_eq!(settled(&sniffer(), &stream), "tls name=public.example alpn=**,h2 ech");
}

#[test]
fn names() {
    let long = format!("{0}.{0}.{0}.{1}", "a".repeat(63), "b".repeat(61));
    let cases: &[(&[u8], &str)] = &[
        (b"A.Example", "tls name=a.example"), // curl sends what was typed
        (b"_acme.x--y.example.", "tls name=_acme.x--y.example"),
        (b"localhost", "tls name=localhost"),
        (long.as_bytes(), &format!("tls name={long}")),
        // RFC 6066 3 forbids addresses, OpenSSL sends them: no name, as rustls has it.
        (b"192.0.2.1", "tls probe"),
        (b"2001:db8::1", "tls probe"),
        (b"[2001:db8::1]", "refused tls bad-name"),
        (b"", "refused tls bad-name"),
        (b".", "refused tls bad-name"),
        (b"a..example", "refused tls bad-name"),
        (b".example", "refused tls bad-name"),
        (b"a.example..", "refused tls bad-name"),
        (b"a.example\0", "refused tls bad-name"),
        (b"../../run/x", "refused tls bad-name"),
        (b"*.example", "refused tls bad-name"),
        (b"a.example:443", "refused tls bad-name"),
        ("bücher.example".as_bytes(), "refused tls bad-name"),
        (&[b'a'; 64], "refused tls bad-name"),
        (&[b'a'; 255], "refused tls bad-name"),
        (&[b'a'; 5000], "refused tls bad-name"),
    ];
    for (name, expected) in cases {
        assert_eq!(
            settled(&sniffer(), &records(&hello(&[server_name(name)]), 33)),
            *expected,
            "{}",
            name.escape_ascii()
        );
    }
    let longer = format!("{long}c");
    assert_eq!(look(&sniffer(), &records(&hello(&[server_name(longer.as_bytes())]), 400)), "refused tls bad-name");
}

#[test]
fn without_a_name() {
    assert_eq!(settled(&sniffer(), &records(&hello(&[]), 100)), "tls probe");
    assert_eq!(settled(&sniffer(), &records(&hello(&[alpn(&[b"ssh"])]), 100)), "tls alpn=ssh probe");
    let body = [&[3, 1][..], &[0; 32], b"\0", &counted(2, &[0, 5]), &counted(1, &[0])].concat(); // of 1999
    assert_eq!(settled(&sniffer(), &records(&[&[1][..], &counted(3, &body)].concat(), 9)), "tls probe");
}

/// Which versions a hello offers: by its own field, or by the extension that takes its place (RFC 8446 4.2.1).
#[test]
fn old_versions_are_probes() {
    let versions = |versions: &[u8]| extension(43, &counted(1, versions));
    let cases: &[(u8, Option<Vec<u8>>, &str)] = &[
        (0, None, "tls name=a.example probe"),
        (1, None, "tls name=a.example probe"),
        (2, None, "tls name=a.example probe"),
        (3, None, "tls name=a.example"),
        (3, Some(versions(&[3, 4])), "tls name=a.example"),
        (1, Some(versions(&[3, 1, 3, 4])), "tls name=a.example"),
        (3, Some(versions(&[0x0a, 0x0a, 3, 4, 3, 3])), "tls name=a.example"),
        (3, Some(versions(&[3, 2, 3, 1])), "tls name=a.example probe"),
        (3, Some(versions(&[0xfa, 0xfa, 3, 2])), "tls name=a.example probe"),
        (3, Some(versions(&[])), "tls name=a.example probe"),
        (3, Some(extension(43, &[])), "tls name=a.example probe"),
        (3, Some(extension(43, &[9, 3])), "tls name=a.example probe"),
    ];
    for (minor, extension, expected) in cases {
        let mut message = hello(&[server_name(b"a.example"), extension.clone().unwrap_or_default()]);
        message[5] = *minor;
        assert_eq!(settled(&sniffer(), &records(&message, 40)), *expected, "3.{minor}, {extension:02x?}");
    }
}

#[test]
fn said_twice_or_badly() {
    let name = || server_name(b"a.example");
    let two_names = [&[0][..], &counted(2, b"a.example"), &[0], &counted(2, b"b.example")].concat();
    let other_kind = [&[9][..], &counted(2, b"?"), &[0], &counted(2, b"a.example")].concat();
    let cases: &[(Vec<Vec<u8>>, &str)] = &[
        (vec![name(), server_name(b"b.example")], "refused tls repeated"),
        (vec![name(), name()], "refused tls repeated"),
        (vec![alpn(&[b"h2"]), alpn(&[b"h2"])], "refused tls repeated"),
        (vec![extension(0, &counted(2, &two_names))], "refused tls repeated"),
        (vec![extension(0, &counted(2, &other_kind))], "tls name=a.example"),
        (vec![extension(0, &counted(2, b""))], "refused tls malformed"),
        (vec![extension(0, b"")], "refused tls malformed"),
        (vec![extension(0, &[0, 12, 0, 0, 10, b'a', b'.', b'b'])], "refused tls malformed"),
        (vec![extension(16, &counted(2, b""))], "refused tls malformed"),
        (vec![extension(16, &counted(2, b"\0"))], "refused tls malformed"),
        (vec![extension(16, &counted(2, b"\x05h2"))], "refused tls malformed"),
        (vec![name(), vec![0, 16, 0]], "refused tls malformed"),
        (vec![name(), vec![0, 99, 0, 50, 1]], "refused tls malformed"),
    ];
    for (extensions, expected) in cases {
        assert_eq!(settled(&sniffer(), &records(&hello(extensions), 50)), *expected, "{extensions:02x?}");
    }
}

#[test]
fn not_tls_or_not_like_this() {
    let good = records(&hello(&[server_name(b"a.example")]), 60);
    let with = |at: usize, byte: u8| {
        let mut bad = good.clone();
        bad[at] = byte;
        bad
    };
    let second = 5 + 60; // the head of the second record
    let cases: &[(Vec<u8>, &str)] = &[
        (b"GET / HTTP/1.1\r\n".to_vec(), "no"),
        (with(0, 0x80), "no"), // an SSLv2 hello (RFC 6176)
        (with(1, 2), "no"),
        (with(2, 0x7f), "tls name=a.example"), // the minor version is ignored (RFC 8446 5.1)
        (with(5, 2), "refused tls malformed"), // a ServerHello
        (with(6, 1), "refused tls too-long"),  // more than 65,536 bytes
        (with(second, 21), "refused tls malformed"), // an alert in between
        (with(second, 23), "refused tls malformed"),
        ([&[22, 3, 1, 0, 0][..], &good].concat(), "refused tls malformed"), // an empty fragment
        ([&[22, 3, 1, 0x40, 1][..], &[1; 0x4001]].concat(), "refused tls malformed"), // 2^14 and one
        (with(5 + 4 + 34, 33), "refused tls malformed"),                    // a session of 33 bytes
    ];
    for (bytes, expected) in cases {
        assert_eq!(settled(&sniffer(), bytes), *expected, "{}", bytes[..bytes.len().min(80)].escape_ascii());
    }
    // One byte past the bound is refused by its length alone, one byte less waits.
    let head = |size: usize| [&[22, 3, 1, 0, 4, 1][..], &((size - 4) as u32).to_be_bytes()[1..]].concat();
    assert_eq!(look(&sniffer(), &head(HELLO_BYTES)), "more");
    assert_eq!(look(&sniffer(), &head(HELLO_BYTES + 1)), "refused tls too-long");
}
