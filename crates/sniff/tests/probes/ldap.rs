//! LDAP: first requests, whole, in pieces, truncated, followed by more, oversized and contradictory.

use crate::support::{cases, counted};
use fourtuple_sniff::Protocol;

/// Tag, length in the shortest form, contents.
fn element(tag: u8, contents: &[u8]) -> Vec<u8> {
    let size = match contents.len() {
        0..=0x7f => counted(1, contents),
        0x80..=0xff => [&[0x81][..], &counted(1, contents)].concat(),
        _ => [&[0x82][..], &counted(2, contents)].concat(),
    };
    [&[tag][..], &size].concat()
}

/// As clients of Windows have it: every length in four bytes.
fn element_at_length(tag: u8, contents: &[u8]) -> Vec<u8> {
    [&[tag, 0x84][..], &counted(4, contents)].concat()
}

fn message(request: &[u8]) -> Vec<u8> {
    element(0x30, &[&[2, 1, 1][..], request].concat())
}

fn bind(name: &[u8]) -> Vec<u8> {
    message(&element(0x60, &[&[2, 1, 3][..], &element(4, name), &element(0x80, b"secret")].concat()))
}

#[test]
fn requests() {
    let dn = b"cn=admin,dc=example,dc=com";
    let long = [b"cn=".as_slice(), &[b'x'; 4000]].concat();
    let windows = [&[2, 1, 3][..], &element_at_length(4, dn), &element_at_length(0x80, b"secret")].concat();
    let windows = element_at_length(0x30, &[&[2, 1, 12][..], &element_at_length(0x60, &windows)].concat());
    let sasl = element(0xa3, &element(4, b"EXTERNAL"));
    let extended = |name: &[u8]| message(&element(0x77, &element(0x80, name)));
    let controlled = [&[2, 2, 1, 0][..], &element(0x60, b"\x02\x01\x03\x04\x01a\x80\0"), &element(0xa0, b"")].concat();
    cases(
        Protocol::Ldap,
        &[
            (&bind(dn), "ldap user=cn=admin,dc=example,dc=com"),
            (&windows, "ldap user=cn=admin,dc=example,dc=com"),
            (&bind(b""), "ldap"),
            (&bind("cn=m\u{fc}ller".as_bytes()), "ldap user=cn=m\\xc3\\xbcller"),
            (&bind(&long), &format!("ldap user=cn={}", "x".repeat(4000))),
            (&message(&element(0x60, &[&[2, 1, 3, 4, 0][..], &sasl].concat())), "ldap"),
            (&element(0x30, &controlled), "ldap user=a"),
            (b"\x30\x0c\x02\x01\x01\x60\x07\x02\x01\x02\x04\0\x80\0", "ldap"), // nmap: a bind of version 2
            (&extended(b"1.3.6.1.4.1.1466.20037"), "ldap starttls"),
            (&extended(b"1.3.6.1.4.1.4203.1.11.3"), "ldap"), // who am I
            (b"\x30\x05\x02\x01\x01\x42\0", "ldap"),
            (&message(&element(0x63, b"\x04\0\x0a\x01\0")), "ldap"),
            (&bind(&[b'x'; 5000]), "refused ldap too-long"),
            (&bind(b"cn=\xff"), "refused ldap malformed"),
            (&bind(b"cn=\0"), "refused ldap malformed"),
            (&message(&element(0x60, b"\x02\x02\0\x03\x04\0")), "refused ldap malformed"),
            (&message(&element(0x60, b"\x02\x01\x03\x0a\x01a")), "refused ldap malformed"),
            (b"\x30\x0c\x02\x01\x01\x60\x08\x02\x01\x03\x04\0\x80\0", "refused ldap malformed"),
            (b"\x30\x0c\x02\x01\x01\x60\x07\x02\x01\x03\x04\x03abc", "refused ldap malformed"),
            (b"\x30\x0c\x02\x01\x01\x60\x80\x02", "refused ldap malformed"),
            (b"\x30\x0c\x02\x01\0\x60", "no"),
            (b"\x30\x0c\x02\x01\x81\x60", "no"),
            (b"\x30\x0c\x02\x05\x01\x01\x01\x01\x01\x60", "no"),
            (b"\x30\x0c\x02\0\x60", "no"),
            (b"\x30\x80\x02\x01\x01", "no"),
            (b"\x30\x85\0\0\0\0\x10", "no"),
            (b"\x30\x26\x02\x01\x01\x04\x06public", "no"), // SNMP
            (b"\x30\x0c\x02\x01\x01\x61", "no"),           // an answer
            (b"\x30\x0c\x02\x01\x01", "more"),
            (b"\x30\x84\0\0", "more"),
            (b"\x30", "more"),
        ],
    );
}
