//! HTTP/2 with prior knowledge: frames in every order that is allowed, HPACK with the examples of RFC 7541.

use crate::support::{settled, truncated};
use fourtuple_sniff::{HTTP2_BYTES, Protocol, Sniffer};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A frame: type, flags, stream, payload.
type Sent<'a> = (u8, u8, u32, &'a [u8]);
const SETTINGS: Sent<'_> = (4, 0, 0, &[0, 3, 0, 0, 0, 100]);

fn sniffer() -> Sniffer<'static> {
    Sniffer::new([Protocol::Http2])
}

/// A connection of these frames.
fn connection(frames: &[Sent<'_>]) -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    for (kind, flags, stream, payload) in frames {
        bytes.extend(&(payload.len() as u32).to_be_bytes()[1..]);
        bytes.extend([*kind, *flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(*payload);
    }
    bytes
}

/// A request whose header block is in one frame.
fn request(block: &[u8]) -> String {
    settled(&sniffer(), &connection(&[SETTINGS, (1, 5, 1, block)]))
}

/// A field without indexing, its name and value as they are.
fn literal(name: &str, value: &str) -> Vec<u8> {
    [&[0, name.len() as u8], name.as_bytes(), &[value.len() as u8], value.as_bytes()].concat()
}

const GET: &[u8] = &[0x82];
const ROOT: &[u8] = &[0x84];

/// RFC 7541 C.3.1 and C.4.1: the same request, plain and with Huffman code.
#[test]
fn examples_of_the_rfc() {
    let plain = b"\x82\x86\x84\x41\x0fwww.example.com";
    let packed = b"\x82\x86\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff";
    assert_eq!(request(plain), "http2 name=www.example.com path=/");
    assert_eq!(request(packed), "http2 name=www.example.com path=/");
    truncated(&sniffer(), &connection(&[SETTINGS, (1, 5, 1, packed)]));
}

#[test]
fn fields() {
    let authority = |value: &str| literal(":authority", value);
    let path = |value: &str| literal(":path", value);
    let host = |value: &str| literal("host", value);
    let cases: &[(&[&[u8]], &str)] = &[
        (&[GET, &authority("A.Example:8443"), &path("/x/y?z")], "http2 name=a.example port=8443 path=/x/y"),
        (&[GET, &[0x85], &host("h.example")], "http2 name=h.example path=/index.html"),
        (&[GET, ROOT, &authority("a"), &host("A")], "http2 name=a path=/"),
        (&[GET, ROOT, &authority("a"), &host("b")], "refused http2 contradiction"),
        (&[GET, ROOT, &authority("a"), &authority("a")], "refused http2 repeated"),
        (&[GET, ROOT, &host("a"), &host("a")], "refused http2 repeated"),
        (&[GET, ROOT, ROOT], "refused http2 repeated"),
        (&[GET, ROOT, &literal("x", "y"), &authority("a")], "refused http2 malformed"),
        (&[GET, &authority("a")], "refused http2 malformed"), // no :path
        (&[ROOT, &authority("a")], "refused http2 malformed"), // no :method
        (&[&literal(":method", "CONNECT"), &authority("a:443")], "http2 name=a port=443"),
        (&[GET, ROOT], "http2 path=/ probe"),
        (&[&literal(":method", "HEAD"), ROOT, &authority("a")], "http2 name=a path=/ probe"),
        (&[&literal(":method", "OPTIONS"), ROOT, &authority("a")], "http2 name=a path=/ probe"),
        (
            &[&literal(":method", "OPTIONS"), ROOT, &authority("a"), &literal("access-control-request-method", "PUT")],
            "http2 name=a path=/",
        ),
        (&[GET, ROOT, &authority("a b")], "refused http2 bad-name"),
        (&[GET, ROOT, &authority("a\0")], "refused http2 bad-name"),
        (&[GET, ROOT, &authority("u@a")], "refused http2 bad-name"),
        // Index 0, and one that nothing has (RFC 7541 6.1).
        (&[GET, ROOT, &[0x80]], "refused http2 malformed"),
        (&[GET, ROOT, &[0xbe]], "refused http2 malformed"),
        // A string longer than the block, an integer without end, too long a padding, the end-of-string code.
        (&[GET, ROOT, &[0x41, 0x7f, 0x01, b'a']], "refused http2 malformed"),
        (&[GET, ROOT, &[0x41, 0x7f, 0xff, 0xff, 0xff, 0xff, 0x01]], "refused http2 too-long"),
        (&[GET, ROOT, &[0x41, 0x81, 0xff]], "refused http2 malformed"),
        (&[GET, ROOT, &[0x41, 0x82, 0x1f, 0xff]], "refused http2 malformed"),
        (&[GET, ROOT, &[0x41, 0x84, 0xff, 0xff, 0xff, 0xff]], "refused http2 malformed"),
        (&[GET, ROOT, &[0x41, 0x81, 0x1e]], "refused http2 malformed"), // zeros at the end
    ];
    for (parts, expected) in cases {
        assert_eq!(request(&parts.concat()), *expected, "{parts:02x?}");
    }
}

/// The dynamic table within one block: entries by index, the newest first; sizes; eviction (RFC 7541 2.3.2, 4).
#[test]
fn dynamic_table() {
    let keep = |name: &str, value: &str| {
        let mut bytes = literal(name, value);
        bytes[0] = 0x40;
        bytes
    };
    let authority = keep(":authority", "a.example");
    // 62 is what was put in last; a literal may take its name from there.
    assert_eq!(request(&[GET, &keep("host", "a.example"), &[0x7e, 1, b'x']].concat()), "refused http2 repeated");
    assert_eq!(
        request(&[GET, &keep(":path", "/p"), &keep(":authority", "a"), &[0xbe]].concat()),
        "refused http2 repeated"
    );
    assert_eq!(request(&[GET, ROOT, &authority, &keep("x", "y"), &[0xbe]].concat()), "http2 name=a.example path=/");
    // A table of zero bytes keeps nothing, so the index is of nothing.
    assert_eq!(request(&[&[0x20], GET, ROOT, &authority, &[0xbe]].concat()), "refused http2 malformed");
    assert_eq!(request(&[&[0x20, 0x3f, 0xe1, 0x1f], GET, ROOT, &authority].concat()), "http2 name=a.example path=/");
    assert_eq!(request(&[&[0x3f, 0xe2, 0x1f], GET, ROOT, &authority].concat()), "refused http2 malformed"); // 4,097
    assert_eq!(request(&[GET, &[0x20], ROOT, &authority].concat()), "refused http2 malformed"); // not at the beginning
    // 4,096 bytes have room for 120 entries of 34: of 121, the first is gone and the second is index 181.
    let many: Vec<u8> = (0..121).flat_map(|_| keep("x", "y")).collect();
    assert_eq!(request(&[GET, ROOT, &authority, &many, &[0xff, 181 - 127]].concat()), "http2 name=a.example path=/");
    assert_eq!(request(&[GET, ROOT, &authority, &many, &[0xff, 182 - 127]].concat()), "refused http2 malformed");
}

#[test]
fn frames() {
    let block = [GET, ROOT, &literal(":authority", "a.example")].concat();
    let (one, two) = block.split_at(7);
    let padded = [&[3][..], &[0x80, 0, 0, 0, 200], &block, &[0; 3]].concat();
    let ok = "http2 name=a.example path=/";
    let grease = (0x0b, 0xff, 0x8000_0003, b"whatever".as_slice());
    let cases: &[(&[Sent<'_>], &str)] = &[
        (&[SETTINGS, (8, 0, 0, &[0, 1, 0, 0]), (2, 0, 3, &[0; 5]), (6, 0, 0, &[0; 8]), grease, (1, 4, 1, &block)], ok),
        (&[SETTINGS, (4, 1, 0, b""), (1, 4, 1, &block)], ok),
        (&[SETTINGS, (1, 0x2c, 1, &padded)], ok),
        (&[SETTINGS, (1, 0, 1, one), (9, 0, 1, b""), (9, 4, 1, two)], ok),
        (&[SETTINGS, (1, 0, 1, b""), (9, 4, 1, &block)], ok),
        (&[SETTINGS, (1, 4, 0x8000_0001, &block)], ok), // the reserved bit is ignored (RFC 9113 4.1)
        (&[SETTINGS], "more"),
        (&[SETTINGS, (1, 0, 1, one)], "more"),
        (&[(1, 4, 1, &block)], "refused http2 malformed"),
        (&[(4, 1, 0, b"")], "refused http2 malformed"),
        (&[(4, 0, 1, b"")], "refused http2 malformed"),
        (&[(4, 0, 0, b"12345")], "refused http2 malformed"),
        (&[SETTINGS, (1, 4, 0, &block)], "refused http2 malformed"),
        (&[SETTINGS, (1, 4, 2, &block)], "refused http2 malformed"),
        (&[SETTINGS, (0, 1, 1, b"x")], "refused http2 malformed"),
        (&[SETTINGS, (9, 4, 1, &block)], "refused http2 malformed"),
        (&[SETTINGS, (1, 0, 1, one), (9, 4, 3, two)], "refused http2 malformed"),
        (&[SETTINGS, (1, 0, 1, one), (8, 0, 0, &[0; 4]), (9, 4, 1, two)], "refused http2 malformed"),
        (&[SETTINGS, (1, 0, 1, one), (1, 4, 1, two)], "refused http2 malformed"),
        (&[SETTINGS, (1, 0x0c, 1, &[5, 0x82])], "refused http2 malformed"), // more padding than there is
        (&[SETTINGS, (1, 0x24, 1, &[0, 0])], "refused http2 malformed"),
        (&[SETTINGS, (1, 0x0c, 1, b"")], "refused http2 malformed"),
        (&[SETTINGS, (6, 0, 0, &[0; 16_385])], "refused http2 too-long"),
        (&[SETTINGS, (1, 0, 1, &[0x82; 9000]), (9, 0, 1, &[0x82; 9000])], "refused http2 too-long"),
    ];
    for (frames, expected) in cases {
        let mut bytes = connection(frames);
        assert_eq!(settled(&sniffer(), &bytes), *expected, "{frames:02x?}");
        if *expected != "more" {
            bytes.extend([0xff; 300]);
            assert_eq!(settled(&sniffer(), &bytes), *expected, "{frames:02x?} and more");
        }
    }
    let flood: Vec<_> = std::iter::once(SETTINGS).chain(std::iter::repeat_n(SETTINGS, HTTP2_BYTES / 15)).collect();
    assert_eq!(settled(&sniffer(), &connection(&flood)), "refused http2 too-long");
}

#[test]
fn preface() {
    truncated(&sniffer(), PREFACE);
    assert_eq!(settled(&sniffer(), b"PRI * HTTP/2.0\r\n\r\nSN"), "no");
    assert_eq!(settled(&sniffer(), b"PRINT / HTTP/1.1\r\n"), "no");
    // Where HTTP/1 is looked for and HTTP/2 is not, it is no default's either.
    assert_eq!(settled(&Sniffer::new([Protocol::Http]), PREFACE), "refused http malformed");
}
