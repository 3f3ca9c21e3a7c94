//! HTTP/1 requests: whose host they name, and every way to name two.

use crate::support::{look, settled, truncated};
use fourtuple_sniff::{Protocol, Scratch, Sniffer, State, Verdict};
use proptest::prelude::*;

fn sniffer() -> Sniffer<'static> {
    Sniffer::new([Protocol::Connect, Protocol::WebSocket, Protocol::Http])
}

#[test]
fn targets_and_hosts() {
    let cases: &[(&str, &str)] = &[
        ("GET /a/b?c HTTP/1.1\r\nHost: A.Example:8080\r\n\r\n", "http name=a.example port=8080 path=/a/b"),
        ("GET / HTTP/1.1\nhost:\ta.example. \n\n", "http name=a.example path=/"),
        ("GET / HTTP/1.0\r\n\r\n", "http path=/ probe"),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", "http path=/ probe"),
        ("GET / HTTP/1.1\r\nAccept: */*\r\n\r\n", "http path=/ probe"),
        ("\r\n\r\nPOST /x HTTP/1.1\r\nHOST:a.example\r\n\r\nbody", "http name=a.example path=/x"),
        ("M-SEARCH * HTTP/1.1\r\nHost: a\r\n\r\n", "refused http malformed"),
        ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "http name=a path=* probe"),
        ("GET / HTTP/1.1\r\nHost: 192.0.2.1:80\r\n\r\n", "http name=192.0.2.1 port=80 path=/"),
        ("GET / HTTP/1.1\r\nHost: [2001:DB8:0::1]:80\r\n\r\n", "http name=2001:db8::1 port=80 path=/"),
        ("GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n", "http name=::1 path=/"),
        ("GET / HTTP/1.1\r\nHost: a:\r\n\r\n", "http name=a path=/"),
        // Absolute form: the target decides, and Host has to agree.
        ("GET http://a.example/x?y HTTP/1.1\r\nHost: a.example\r\n\r\n", "http name=a.example path=/x"),
        ("GET HTTP://A.example:80?q HTTP/1.1\r\nHost: a.EXAMPLE:80\r\n\r\n", "http name=a.example port=80 path=/"),
        ("GET http://a.example HTTP/1.0\r\n\r\n", "http name=a.example path=/"),
        ("GET http://a.example/ HTTP/1.1\r\nHost: b.example\r\n\r\n", "refused http contradiction"),
        ("GET http://a.example:81/ HTTP/1.1\r\nHost: a.example:82\r\n\r\n", "refused http contradiction"),
        ("GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n", "refused http bad-name"),
        ("GET http://u:p@a.example/ HTTP/1.1\r\n\r\n", "refused http bad-name"),
        // Tunnels.
        ("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n", "connect name=a.example port=443"),
        ("CONNECT [::1]:22 HTTP/1.1\r\n\r\n", "connect name=::1 port=22"),
        ("CONNECT a.example HTTP/1.1\r\n\r\n", "refused connect malformed"),
        ("CONNECT a.example: HTTP/1.1\r\n\r\n", "refused connect malformed"),
        ("CONNECT :443 HTTP/1.1\r\n\r\n", "refused connect malformed"),
        ("CONNECT a.example:0x50 HTTP/1.1\r\n\r\n", "refused connect bad-name"),
        ("CONNECT a.example:65536 HTTP/1.1\r\n\r\n", "refused connect bad-name"),
        ("CONNECT a.example:443 HTTP/1.1\r\nHost: b.example:443\r\n\r\n", "refused connect contradiction"),
        // WebSocket.
        (
            "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n\r\n",
            "websocket name=a path=/chat",
        ),
        ("GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n", "http name=a path=/chat"),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", "http name=a path=/"),
    ];
    for (request, expected) in cases {
        assert_eq!(settled(&sniffer(), request.as_bytes()), *expected, "{request:?}");
        truncated(&sniffer(), request.as_bytes());
        let followed = format!("{request}\r\nHost: other\r\n\r\nGET / HTTP/1.1\r\nHost: third\r\n\r\n");
        assert_eq!(settled(&sniffer(), followed.as_bytes()), *expected, "{followed:?}");
    }
}

/// What asks for nothing, or of nobody.
#[test]
fn intents() {
    let cases: &[(&str, &str)] = &[
        ("HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n", "http name=a path=/x probe"),
        ("OPTIONS / HTTP/1.1\r\nHost: a\r\n\r\n", "http name=a path=/ probe"),
        ("OPTIONS / HTTP/1.0\r\n\r\n", "http path=/ probe"), // HAProxy's health check, and nmap
        ("HEADER / HTTP/1.1\r\nHost: a\r\n\r\n", "http name=a path=/"),
        ("GET /HEAD HTTP/1.1\r\nHost: a\r\n\r\n", "http name=a path=/HEAD"),
        // A browser that is refused this one does not send what it is about.
        (
            "OPTIONS /x HTTP/1.1\r\nHost: a\r\nOrigin: http://b\r\naccess-control-request-method: PUT\r\n\r\n",
            "http name=a path=/x",
        ),
        ("HEAD / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", "http name=a path=/ probe"),
        ("GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", "websocket path=/ probe"),
    ];
    for (request, expected) in cases {
        assert_eq!(settled(&sniffer(), request.as_bytes()), *expected, "{request:?}");
    }
}

/// What two servers could read differently is refused, never given to a default.
#[test]
fn smuggling() {
    let cases: &[(&[u8], &str)] = &[
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "repeated"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\nhOST: a\r\n\r\n", "repeated"),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nHost\t: a\r\n\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", "malformed"), // obs-fold (RFC 9112 5.2)
        (b"GET / HTTP/1.1\r\nX: y\r\n\tHost: b\r\nHost: a\r\n\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: y\rHost: b\r\n\r\n", "malformed"), // a CR alone (RFC 9112 2.2)
        (b"GET / HTTP/1.1\r\r\nHost: a\r\n\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nnonsense\r\nHost: a\r\n\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\n: a\r\n\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nHo\x80st: a\r\n\r\n", "malformed"),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "malformed"),
        (b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", "malformed"),
        (b"GET / x HTTP/1.1\r\nHost: a\r\n\r\n", "malformed"),
        (b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", "malformed"),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", "malformed"),
        (b"GET / HTTP/1.10\r\nHost: a\r\n\r\n", "malformed"),
        (b"GET x HTTP/1.1\r\nHost: a\r\n\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "bad-name"),
        (b"GET / HTTP/1.1\r\nHost: a,b\r\n\r\n", "bad-name"),
        (b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", "bad-name"),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", "bad-name"),
        (b"GET / HTTP/1.1\r\nHost: ..\r\n\r\n", "bad-name"),
        (b"GET / HTTP/1.1\r\nHost: a%2eb\r\n\r\n", "bad-name"),
        (b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", "bad-name"),
        (b"GET / HTTP/1.1\r\nHost: [::1]x\r\n\r\n", "bad-name"),
        (b"GET / HTTP/1.1\r\nHost: [fe80::1%25eth0]\r\n\r\n", "bad-name"),
        (b"GET / HTTP/1.1\r\nHost: ::1\r\n\r\n", "bad-name"),
        (b"GET / HTTP/1.1\r\nHost: a:80:80\r\n\r\n", "bad-name"),
        (b"GET / HTTP/1.1\r\nHost: a:+80\r\n\r\n", "bad-name"),
    ];
    for (request, why) in cases {
        let verdict = settled(&sniffer(), request);
        assert!(verdict.starts_with("refused") && verdict.ends_with(why), "{verdict}: {}", request.escape_ascii());
        let all = Sniffer::all();
        assert!(look(&all, request).starts_with("refused"), "goes to another probe: {}", request.escape_ascii());
    }
}

#[test]
fn not_http() {
    for text in
        ["get / HTTP/1.1\r\n", "GET\r\n", "GET key\r\n", "GET /\r\n", "EHLO a.example\r\n", "{\"id\": 1}", "\0", " "]
    {
        assert_eq!(settled(&sniffer(), text.as_bytes()), "no", "{text:?}");
    }
    assert_eq!(look(&sniffer(), &[b'A'; 24]), "more");
    assert_eq!(look(&sniffer(), &[b'A'; 25]), "no");
}

#[test]
fn bounded() {
    for tail in ["", "\r\nHost: a\r\n\r\n"] {
        let request = |count: usize| format!("GET / HTTP/1.1\r\nX: {}{tail}", "y".repeat(count)).into_bytes();
        let fixed = request(0).len();
        let verdict = if tail.is_empty() { "more" } else { "http name=a path=/" };
        assert_eq!(settled(&sniffer(), &request(16_383 - fixed)), verdict);
        assert_eq!(settled(&sniffer(), &request(16_385 - fixed)), "refused http too-long");
    }
    let line = [b"GET /".as_slice(), &[b'x'; 20_000]].concat();
    assert_eq!(settled(&sniffer(), &line), "refused http too-long");
}

#[test]
fn plain_paths() {
    let mut scratch = Box::new(Scratch::new());
    let cases = [
        ("/", true),
        ("/a", true),
        ("/a/b/", true),
        ("/a.b/..c", true),
        ("/a/../b", false),
        ("/./a", false),
        ("//a", false),
        ("/a//b", false),
        ("/..", false),
        ("/%61dmin", false),
        ("/a\\..\\b", false),
        ("/a/?x=../%2e", true),
    ];
    for (path, plain) in cases {
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        let Verdict::Match(shown) = sniffer().sniff(&mut State::default(), request.as_bytes(), &mut scratch) else {
            panic!("{request:?} is a request")
        };
        assert_eq!(shown.path_is_plain(), plain, "{path}");
    }
}

proptest! {
    /// httparse as the oracle: what both read has the same one Host and the same target, and what httparse finds whole
    /// is never "more" here.
    #[test]
    fn agrees_with_httparse(
        method in "(GET|POST|PUT|M-SEARCH)",
        target in "/[a-z0-9/._~-]{0,12}(\\?[a-z=&]{0,5})?",
        fields in prop::collection::vec((
            "(Host|host|X-A|Accept|Connection|Upgrade|X\x00| Host|Host |)",
            "[ \t]{0,2}[a-z0-9.:]{0,12}[ \t\r\x00]{0,1}",
        ), 0..5),
        end in "(\r\n|\n)",
    ) {
        let fields: String = fields.iter().map(|(name, value)| format!("{name}:{value}{end}")).collect();
        let request = format!("{method} {target} HTTP/1.1{end}{fields}{end}");
        let mut room = [httparse::EMPTY_HEADER; 16];
        let mut parsed = httparse::Request::new(&mut room);
        let oracle = parsed.parse(request.as_bytes());
        let mut scratch = Box::new(Scratch::new());
        let http = Sniffer::new([Protocol::Http]);
        let verdict = http.sniff(&mut State::default(), request.as_bytes(), &mut scratch);
        prop_assert!(!matches!(verdict, Verdict::More(_) | Verdict::No | Verdict::Answer(_)), "{:?}", verdict);
        if let Verdict::Match(shown) = verdict {
            prop_assert_eq!(oracle, Ok(httparse::Status::Complete(shown.end)));
            let hosts: Vec<_> = parsed.headers.iter().filter(|it| it.name.eq_ignore_ascii_case("host")).collect();
            prop_assert!(hosts.len() < 2);
            let host = hosts.first().map_or("", |it| std::str::from_utf8(it.value).unwrap());
            let name = host.split(':').next().unwrap().trim_end_matches('.');
            prop_assert_eq!(shown.name.unwrap_or_default(), name);
            let path = parsed.path.unwrap().split('?').next().unwrap();
            prop_assert_eq!(shown.path.unwrap(), path.as_bytes());
        }
    }
}
