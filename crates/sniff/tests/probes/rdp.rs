//! RDP: connection requests, whole, in pieces, truncated, followed by more, oversized and contradictory.

use crate::support::cases;
use fourtuple_sniff::Protocol;

fn request(rest: &[u8]) -> Vec<u8> {
    let size = 11 + rest.len() as u16;
    [&[3, 0][..], &size.to_be_bytes(), &[(size - 5) as u8, 0xe0, 0, 0, 0x12, 0x34, 0], rest].concat()
}

const NEGOTIATION: &[u8] = &[1, 0, 8, 0, 3, 0, 0, 0];

#[test]
fn requests() {
    let after = |text: &[u8]| request(&[text, NEGOTIATION].concat());
    let correlation = [&[6, 0, 36, 0][..], &[7; 32]].concat();
    let restricted = [1, 8, 8, 0, 11, 0, 0, 0];
    // As nmap sends it: seven bytes of head, 0xe0 and no more.
    let bare = b"\x03\0\0\x0b\x06\xe0\0\0\0\0\0";
    let s7 = b"\x03\0\0\x16\x11\xe0\0\0\0\x14\0\xc1\x02\x01\0\xc2\x02\x01\x02\xc0\x01\x0a";
    let mut wrong = Vec::new();
    for at in [0, 1, 2, 4, 5, 6, 7, 10] {
        let mut bytes = after(b"Cookie: mstshash=alice\r\n");
        bytes[at] ^= 0x40;
        wrong.push(bytes);
    }
    let long = "x".repeat(216);
    let mut all: Vec<(&[u8], &str)> = wrong.iter().map(|bytes| (bytes.as_slice(), "no")).collect();
    let more: &[(Vec<u8>, &str)] = &[
        (request(NEGOTIATION), "rdp"),
        (request(b""), "rdp"),
        (bare.to_vec(), "rdp"),
        (after(b"Cookie: mstshash=alice\r\n"), "rdp user=alice"),
        (request(b"Cookie: mstshash=ALICE\r\n"), "rdp user=ALICE"),
        (after(b"Cookie: mstshash=EXAMPLE\\al\r\n"), "rdp user=EXAMPLE\\\\al"),
        (after(b"Cookie: mstshash=m\xfcller\r\n"), "rdp user=m\\xfcller"),
        (after(b"Cookie: mstshash=\r\n"), "rdp"),
        (request(b"Cookie: mstshash=nmap\r\n\x01\0\x08\0\x03\0\0\0"), "rdp user=nmap probe"),
        (request(&[b"Cookie: mstshash=a\r\n", &restricted[..], &correlation].concat()), "rdp user=a"),
        (request(&[NEGOTIATION, &correlation].concat()), "rdp"),
        (after(format!("Cookie: mstshash={long}\r\n").as_bytes()), &format!("rdp user={long}")),
        // 172.31.249.216, 3389.
        (
            after(b"Cookie: msts=3640205228.15629.0000\r\n"),
            "rdp name=172.31.249.216 port=3389 client=3640205228.15629.0000",
        ),
        (after(b"Cookie: msts=4294967296.15629.0000\r\n"), "rdp client=4294967296.15629.0000"),
        (after(b"Cookie: msts=1.65536.0000\r\n"), "rdp client=1.65536.0000"),
        (after(b"Cookie: msts=01.1.0000\r\n"), "rdp client=01.1.0000"),
        (after(b"Cookie: msts=1.1.0000.1\r\n"), "rdp client=1.1.0000.1"),
        (after(b"tsv://MS Terminal Services Plugin.1.Farm\r\n"), "rdp client=tsv://MS Terminal Services Plugin.1.Farm"),
        (s7.to_vec(), "no"),
        (request(b"Cookie: mstshash=alice"), "no"),
        (request(b"Cookie: mstshash=a\x01b\r\n"), "no"),
        (after(b"Cookie: mstshash=alice\r\nCookie: msts=1.1.0000\r\n"), "no"),
        (request(&[1, 0, 9, 0, 3, 0, 0, 0]), "no"),
        (request(&[2, 0, 8, 0, 3, 0, 0, 0]), "no"),
        (request(&[NEGOTIATION, b"x"].concat()), "no"),
        (request(&[NEGOTIATION, NEGOTIATION].concat()), "no"),
        (b"\x03\0\0\x0a\x05\xe0".to_vec(), "no"),
        (b"\x03\0\x01\0".to_vec(), "no"),
        (b"\x03\0\0\x13".to_vec(), "more"),
        (b"\x03".to_vec(), "more"),
    ];
    all.extend(more.iter().map(|(bytes, expected)| (bytes.as_slice(), *expected)));
    cases(Protocol::Rdp, &all);
}
