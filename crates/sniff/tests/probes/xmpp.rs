//! XMPP: heads of streams, whole, in pieces, truncated, followed by more, oversized and contradictory.

use crate::support::cases;
use fourtuple_sniff::Protocol;

const STREAM: &str = "xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'";

#[test]
fn heads() {
    let head = |attributes: &str| format!("<stream:stream {attributes} {STREAM} version='1.0'>");
    let slixmpp = "<stream:stream to='a.example' xmlns:stream='http://etherx.jabber.org/streams' xmlns='jabber:client' \
        xml:lang='en' version='1.0'>";
    let padded = format!("<stream:stream to='a.example' x='{}' {STREAM}>", "x".repeat(3900));
    let long = format!("<stream:stream to='a.example' {STREAM} x='{}", "x".repeat(4096));
    let texts: &[(&str, &str)] = &[
        (slixmpp, "xmpp name=a.example"),
        (&head("to='A.Example.'"), "xmpp name=a.example"),
        (&format!("<?xml version='1.0'?>{}", head("to=\"a.example\"")), "xmpp name=a.example"),
        (&format!("<?xml version=\"1.0\" encoding='UTF-8' ?>\r\n\t {}", head("to='a.example'")), "xmpp name=a.example"),
        (&format!("\n \r\n{}", head("to='a.example'")), "xmpp name=a.example"),
        (&head("from='juliet@a.example' to='a.example'"), "xmpp name=a.example user=juliet@a.example"),
        (&head("from=\"juliet@a.example/balcony/'x>\" to='a.example'"), "xmpp name=a.example user=juliet@a.example"),
        (&head("from='b.example' to='a.example'"), "xmpp name=a.example user=b.example"),
        (&head("from='' to='a.example'"), "xmpp name=a.example"),
        (&head("to  \n=\t 'a.example'\r\n"), "xmpp name=a.example"),
        (&head("id='>' to='a.example'"), "xmpp name=a.example"),
        (&head("x:to='b.example' to='a.example'"), "xmpp name=a.example"),
        (&head("to='192.0.2.1'"), "xmpp name=192.0.2.1"),
        (&head("to='[::1]'"), "xmpp name=::1"),
        (&head(""), "xmpp"),
        (&padded, "xmpp name=a.example"),
        // Any prefix, or none, so long as it means streams.
        (
            "<s:stream xmlns:s=\"http://etherx.jabber.org/streams\" xmlns='jabber:server' to='a.example'>",
            "xmpp name=a.example",
        ),
        ("<stream xmlns='http://etherx.jabber.org/streams' to='a.example'>", "xmpp name=a.example"),
        (&head("to='b.example' to='a.example'"), "refused xmpp repeated"),
        (&head("from='b.example' from='b.example'"), "refused xmpp repeated"),
        (&head("xmlns:stream='x'"), "refused xmpp repeated"),
        (&head("to=''"), "refused xmpp bad-name"),
        (&head("to='a b'"), "refused xmpp bad-name"),
        (&head("to='a&#46;example'"), "refused xmpp bad-name"),
        (&head("to='juliet@a.example'"), "refused xmpp bad-name"),
        (&head("from='o&apos;hara@a.example'"), "refused xmpp malformed"),
        (&head("from='a\tb@a.example'"), "refused xmpp malformed"),
        (&head("to=a.example"), "refused xmpp malformed"),
        (&head("to"), "refused xmpp malformed"),
        (&head("to='a.example'from='b'"), "refused xmpp malformed"),
        (&head("='a.example'"), "refused xmpp malformed"),
        ("<stream:stream to='a<b", "refused xmpp malformed"),
        ("<stream:stream <", "refused xmpp malformed"),
        (&format!("<stream:stream {STREAM}/>"), "refused xmpp malformed"),
        (&long, "refused xmpp too-long"),
        // Other XML.
        ("<stream:stream to='a.example' xmlns:stream='http://example.com/'>", "no"),
        ("<stream:stream xmlns='http://etherx.jabber.org/streams'>", "no"),
        ("<stream:stream>", "no"),
        ("<policy-file-request/>\0", "no"),
        ("<open xmlns='urn:ietf:params:xml:ns:xmpp-framing' to='a.example'/>", "no"),
        ("<?xml version='1.0'?><!DOCTYPE x>", "no"),
        ("<?xml version='1.0'?><?xml", "no"),
        ("<?xml version='1.0'><stream", "no"),
        ("<?php", "no"),
        ("<!", "no"),
        ("</stream:stream>", "no"),
        ("< stream", "no"),
        ("stream:stream", "no"),
        (&" ".repeat(17), "no"),
        (&format!("<{}", "x".repeat(70)), "no"),
        (&format!("<?xml {}", "x".repeat(80)), "no"),
        ("<stream:strea", "more"),
        ("<?xm", "more"),
        (&head("to='a.example'")[..60], "more"),
    ];
    let cases_as_bytes: Vec<_> = texts.iter().map(|(text, expected)| (text.as_bytes(), *expected)).collect();
    cases(Protocol::Xmpp, &cases_as_bytes);
    cases(
        Protocol::Xmpp,
        &[
            (&[&b"<stream:stream from='\xff@a' "[..], STREAM.as_bytes(), b">"].concat(), "refused xmpp malformed"),
            (&[&b"<stream:stream from='a\0@a' "[..], STREAM.as_bytes(), b">"].concat(), "refused xmpp malformed"),
            (b"\xef\xbb\xbf<stream:stream", "no"),
        ],
    );
}
