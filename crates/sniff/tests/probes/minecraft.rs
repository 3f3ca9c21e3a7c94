//! Minecraft: handshakes and pings, whole, in pieces, truncated, followed by more, oversized and contradictory.

use crate::support::{cases, counted, look, truncated};
use fourtuple_sniff::{Protocol, Sniffer};

/// A number in as few bytes as it takes.
fn integer(mut number: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

fn handshake(version: &[u8], host: &[u8], port: u16, state: u8) -> Vec<u8> {
    let packet = [&[0][..], version, &integer(host.len()), host, &port.to_be_bytes(), &[state]].concat();
    [integer(packet.len()), packet].concat()
}

/// As a client of 1.6 has it.
fn ping(host: &str, port: u32) -> Vec<u8> {
    let wide = |text: &str| text.encode_utf16().flat_map(u16::to_be_bytes).collect::<Vec<u8>>();
    let count = host.encode_utf16().count() as u16;
    let rest = [&[0x4e][..], &count.to_be_bytes(), &wide(host), &port.to_be_bytes()].concat();
    [b"\xfe\x01\xfa\0\x0b".as_slice(), &wide("MC|PingHost"), &counted(2, &rest)].concat()
}

#[test]
fn handshakes() {
    let to = |host: &[u8]| handshake(&[0xfd, 5], host, 25_565, 2);
    let shown = "minecraft name=mc.example.com port=25565";
    let long = [b"mc.example.com///203.0.113.9:1///1700000000///".as_slice(), &[b'A'; 350]].concat();
    cases(
        Protocol::Minecraft,
        &[
            (&to(b"mc.example.com"), shown),
            (&to(b"MC.Example.Com."), shown),
            (&to(b"mc.example.com\0FML\0"), shown),
            (&to(b"mc.example.com.\0FML3\0"), shown),
            (&to(b"mc.example.com\x00203.0.113.9\x00069a79f444e94726a5befca90e38aaf5"), shown),
            (&to(b"_minecraft._tcp.mc.example.com."), shown),
            (&to(b"_MINECRAFT._TCP.mc.example.com\0FML2\0"), shown),
            (&to(&long), shown),
            (&to(b"203.0.113.9"), "minecraft name=203.0.113.9 port=25565"),
            (&to(b"2001:DB8:0::1"), "minecraft name=2001:db8::1 port=25565"),
            (&to(b"[::1]"), "minecraft name=::1 port=25565"),
            (&to(b""), "minecraft port=25565"),
            (&to(b"\0FML\0"), "minecraft port=25565"),
            (&handshake(&[0], b"a", 0, 3), "minecraft name=a port=0"),
            (&handshake(&[0xff, 0xff, 0xff, 0xff, 0x0f], b"a", 65_535, 1), "minecraft name=a port=65535 probe"),
            (&to(b"a b"), "refused minecraft bad-name"),
            (&to(b"../../run"), "refused minecraft bad-name"),
            (&to(b"mc..example.com"), "refused minecraft bad-name"),
            (&to(&[b'a'; 64]), "refused minecraft bad-name"),
            (&to("m\u{fc}nchen.example".as_bytes()), "refused minecraft bad-name"),
            // Whatever does not fit together is another protocol.
            (&handshake(&[0xfd, 5], b"a.example", 25_565, 0), "no"),
            (&handshake(&[0xfd, 5], b"a.example", 25_565, 4), "no"),
            (&handshake(&[0x80, 0x80, 0x80, 0x80, 0x80, 1], b"a.example", 25_565, 2), "no"),
            (&to(&[b'a'; 4096]), "no"),
            (b"\x10\0\xfd\x05\x08a.example\x63\xdd\x02", "no"),
            (b"\x10\x01\xfd\x05\x09a.example\x63\xdd\x02", "no"),
            (b"\x05\0\x05\0\0\0\x02", "no"),
            (b"\x06\0\x05\0\0\0\x02", "minecraft port=0"),
            (b"\x06\0\xff\xff\xff\xff\xff\xff", "no"),
            (b"\x06\0\xff\xff\xff\xff", "more"),
            (b"\xff\xff\xff\x01\0", "no"),
            (b"\x80\x80\0", "no"),
            (b"\x10", "more"),
            (b"", "more"),
        ],
    );
}

#[test]
fn pings() {
    let long = "a".repeat(256);
    cases(
        Protocol::Minecraft,
        &[
            (&ping("MC.Example.com", 25_565), "minecraft name=mc.example.com port=25565 probe"),
            (&ping("", 1), "minecraft port=1 probe"),
            (&ping("::1", 1), "minecraft name=::1 port=1 probe"),
            (&ping("a.example", 65_536), "refused minecraft malformed"),
            (&ping("a\u{161}", 1), "refused minecraft bad-name"),
            (&ping("\u{1f600}", 1), "refused minecraft bad-name"),
            (&ping(&long, 1), "refused minecraft too-long"),
            (b"\xfe\x01\xfa\0\x0b\0M\0C\0|\0P\0i\0n\0g\0H\0o\0s\0t\0\x06", "refused minecraft malformed"),
            (
                b"\xfe\x01\xfa\0\x0b\0M\0C\0|\0P\0i\0n\0g\0H\0o\0s\0t\0\x09\x4e\0\x02\0a\0\0\x63\xdd",
                "refused minecraft malformed",
            ),
            (b"\xfe\x01\xfa\0\x0b\0M\0C\0|\0S", "no"),
            (b"\xfe\x01", "more"), // of 1.5, if nothing comes behind it
            (b"\xfe", "more"),
        ],
    );
    truncated(&Sniffer::all(), &ping("a.example", 1));
    // A length of 254 begins as a ping does.
    let long = handshake(&[5], format!("{0}.{0}.{0}.{1}", "a".repeat(61), "b".repeat(61)).as_bytes(), 1, 2);
    assert_eq!(long[..3], [0xfe, 1, 0]);
    assert!(look(&Sniffer::new([Protocol::Minecraft]), &long).starts_with("minecraft name=aaa"));
}
