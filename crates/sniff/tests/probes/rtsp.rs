//! RTSP: requests, whole, in pieces, truncated, followed by more, oversized and contradictory.

use crate::support::{cases, settled};
use fourtuple_sniff::{Protocol, Sniffer};

#[test]
fn requests() {
    let long = format!("DESCRIBE rtsp://a.example/x RTSP/1.0\r\nCSeq: 1\r\nX: {}", "x".repeat(16_384));
    let texts: &[(&str, &str)] = &[
        (
            "OPTIONS rtsp://A.Example:8554/cam/1?x=y RTSP/1.0\r\nCSeq: 1\r\n\r\n",
            "rtsp name=a.example port=8554 path=/cam/1",
        ),
        (
            "DESCRIBE rtsp://a.example/cam RTSP/1.0\r\nCSeq: 2\r\nAccept: application/sdp\r\n\r\n",
            "rtsp name=a.example path=/cam",
        ),
        (
            "SETUP RTSPS://192.0.2.1/cam/track1 RTSP/2.0\nCSeq: 3\nSession:  4711abc ; timeout=60\n\n",
            "rtsp name=192.0.2.1 path=/cam/track1 client=4711abc",
        ),
        (
            "PLAY rtspu://[2001:db8::1]:554 RTSP/1.0\r\nsession: 1\r\n\r\n",
            "rtsp name=2001:db8::1 port=554 path=/ client=1",
        ),
        ("ANNOUNCE rtsp://a.example?live RTSP/1.0\r\n\r\nv=0\r\n", "rtsp name=a.example path=/"),
        (
            "SET_PARAMETER rtsp://admin:pa:ss@a.example:1/ RTSP/1.0\r\n\r\n",
            "rtsp name=a.example port=1 path=/ user=admin",
        ),
        ("GET_PARAMETER rtsp://a.example/../x RTSP/1.0\r\n\r\n", "rtsp name=a.example path=/../x"),
        ("OPTIONS * RTSP/1.0\r\nCSeq: 1\r\n\r\n", "rtsp path=* probe"),
        ("OPTIONS / RTSP/1.0\r\n\r\n", "rtsp path=/ probe"), // nmap
        ("OPTIONS rtsp:///x RTSP/1.0\r\n\r\n", "refused rtsp bad-name"),
        ("OPTIONS rtsp://a b/ RTSP/1.0\r\n\r\n", "refused rtsp malformed"),
        ("OPTIONS rtsp://u@v@a/ RTSP/1.0\r\n\r\n", "refused rtsp bad-name"),
        ("OPTIONS rtsp://a:99999/ RTSP/1.0\r\n\r\n", "refused rtsp bad-name"),
        ("OPTIONS http://a/ RTSP/1.0\r\n\r\n", "refused rtsp malformed"),
        ("OPTIONS a RTSP/1.0\r\n\r\n", "refused rtsp malformed"),
        ("OPTIONS  RTSP/1.0\r\n\r\n", "refused rtsp malformed"),
        ("OPTIONS rtsp://a/ RTSP/3.0\r\n\r\n", "refused rtsp malformed"),
        ("PLAY rtsp://a/ RTSP/1.0\r\nSession: 1\r\nSession: 1\r\n\r\n", "refused rtsp repeated"),
        ("PLAY rtsp://a/ RTSP/1.0\r\nSession : 1\r\n\r\n", "refused rtsp malformed"),
        ("PLAY rtsp://a/ RTSP/1.0\r\nCSeq: 1\r\n Session: 1\r\n\r\n", "refused rtsp malformed"),
        (&long, "refused rtsp too-long"),
        ("OPTIONS rtsp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", "no"),
        ("OPTIONS sip:nm SIP/2.0\r\n\r\n", "no"),
        ("GET / HTTP/1.1\r\n\r\n", "no"),
        ("PLAYS rtsp://a/ RTSP/1.0\r\n\r\n", "no"),
        ("REDIRECT rtsp://a/ RTSP/1.0\r\n\r\n", "no"), // of servers
        ("SET_", "more"),
        ("OPTIONS rtsp://a/ RTSP/1.0\r\n", "more"),
    ];
    let cases_as_bytes: Vec<_> = texts.iter().map(|(text, expected)| (text.as_bytes(), *expected)).collect();
    cases(Protocol::Rtsp, &cases_as_bytes);
}

/// Most of its requests could be HTTP's but for the end of their first line.
#[test]
fn beside_http() {
    let both = Sniffer::new([Protocol::Http, Protocol::Rtsp, Protocol::WebSocket, Protocol::Connect]);
    for (request, expected) in [
        ("OPTIONS rtsp://a/ RTSP/1.0\r\n\r\n", "rtsp name=a path=/"),
        ("OPTIONS rtsp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", "http name=a path=/ probe"),
        ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "http name=a path=* probe"),
        ("GET_PARAMETER rtsp://a/ RTSP/1.0\r\n\r\n", "rtsp name=a path=/"),
        ("OPTIONS rtsp://a/ GOPHER\r\n\r\n", "no"),
        ("OPTIONS ", "more"),
    ] {
        assert_eq!(settled(&both, request.as_bytes()), expected, "{request:?}");
    }
}
