//! What is said is well formed, whatever was heard; and what each protocol's document says.

use super::*;
use proptest::prelude::*;

const PROTOCOLS: [&str; 14] = [
    "http1",
    "websocket",
    "connect",
    "http2",
    "rtsp",
    "tls",
    "postgres",
    "redis",
    "mqtt",
    "ssh",
    "tcpmux",
    "minecraft",
    "unknown",
    "pattern:x",
];

fn told(protocol: &str, bytes: &[u8]) -> Vec<u8> {
    let (manners, mut say) = (Manners::default(), Vec::new());
    Manner::of(protocol, Intent::Use, None, bytes, &manners).farewell(Why::Failed, &manners, &mut say);
    say
}

/// A probe, shown these bytes; what is done and said.
fn probed(protocol: &str, bytes: &[u8], last: bool) -> (Asleep, Vec<u8>) {
    let (manners, mut say) = (Manners { motd: "zzz".to_owned(), ..Manners::default() }, Vec::new());
    let mut manner = Manner::of(protocol, Intent::Probe, None, bytes, &manners);
    (manner.asleep(bytes, last, &manners, &mut say), say)
}

#[test]
fn only_probes_and_health_paths_are_answered() {
    let (manners, mut say) = (Manners::default(), Vec::new());
    let bytes = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n";
    for (intent, path, wakes) in [
        (Intent::Use, &b"/"[..], true),
        (Intent::Use, b"/healthz", false),
        (Intent::Use, b"/healthz/more", true),
        (Intent::Probe, b"/", false),
    ] {
        let mut manner = Manner::of("http1", intent, Some(path), bytes, &manners);
        say.clear();
        let asleep = manner.asleep(bytes, false, &manners, &mut say);
        assert_eq!(asleep == Asleep::Wake, wakes, "{intent:?} {path:?}");
        assert_eq!(say.is_empty(), wakes);
    }
}

#[test]
fn http_says_503_and_a_head_gets_no_body() {
    let get = String::from_utf8(told("http1", b"GET / HTTP/1.1\r\n\r\n")).unwrap();
    let (head, body) = get.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 503 ") && head.contains("\r\nRetry-After: 5\r\n"), "{head}");
    assert!(head.contains("\r\nConnection: close") && head.ends_with(&format!("Content-Length: {}", body.len())));
    assert_eq!(body, "This service could not be started.\n");
    let head_only = String::from_utf8(told("http1", b"HEAD / HTTP/1.1\r\n\r\n")).unwrap();
    assert_eq!(head_only.split_once("\r\n\r\n").unwrap(), (head, ""));
}

#[test]
fn http2_answers_the_stream_that_asked() {
    let settings = b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64";
    let headers = b"\0\0\x01\x01\x05\0\0\0\x0d\x82";
    let bytes = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], settings, headers].concat();
    let say = told("http2", &bytes);
    let expected = [
        &b"\0\0\0\x04\0\0\0\0\0"[..],
        b"\0\0\0\x04\x01\0\0\0\0",
        b"\0\0\x09\x01\x05\0\0\0\x0d\x08\x03503\x0f\x26\x015",
        b"\0\0\x08\x07\0\0\0\0\0\0\0\0\x0d\0\0\0\0",
    ];
    assert_eq!(say, expected.concat());
}

#[test]
fn each_protocol_has_its_word() {
    assert_eq!(told("tls", b"\x16\x03\x01"), b"\x15\x03\x03\0\x02\x02\x50");
    assert_eq!(told("postgres", b"\x16\x03\x01"), b"\x15\x03\x03\0\x02\x02\x50");
    assert_eq!(told("redis", b"PING\r\n"), b"-LOADING Redis is loading the dataset in memory\r\n");
    assert_eq!(told("mqtt", b"\x10\x0c\0\x04MQTT\x04\x02\0\0\0\0"), b"\x20\x02\0\x03");
    assert_eq!(told("mqtt", b"\x10\x0d\0\x04MQTT\x05\x02\0\0\0\0\0"), b"\x20\x03\0\x88\0");
    assert_eq!(told("mqtt", b"\x10\x0e\0\x06MQIsdp\x03\x02\0\0\0\0"), b"\x20\x02\0\x03");
    assert_eq!(told("tcpmux", b"x\r\n"), b"-This service could not be started.\r\n");
    let rtsp = String::from_utf8(told("rtsp", b"OPTIONS rtsp://a/b RTSP/1.0\r\ncseq:  7 \r\n\r\n")).unwrap();
    assert!(rtsp.starts_with("RTSP/1.0 503 ") && rtsp.contains("\r\nCSeq: 7\r\n"), "{rtsp}");
    assert!(told("unknown", b"?").is_empty());
    let say = told("postgres", b"\0\0\0\x08\0\x03\0\0");
    assert_eq!(say[0], b'E');
    assert_eq!(u32::from_be_bytes(say[1..5].try_into().unwrap()) as usize, say.len() - 1);
    assert!(say.windows(6).any(|window| window == b"C57P03") && say.ends_with(b"\0\0"));
}

#[test]
fn ssh_is_a_whole_packet() {
    let say = told("ssh", b"SSH-2.0-x\r\n");
    let packet = say.strip_prefix(b"SSH-2.0-fourtuple\r\n").unwrap();
    let length = u32::from_be_bytes(packet[..4].try_into().unwrap()) as usize;
    assert_eq!((length + 4, packet.len() % 8), (packet.len(), 0));
    assert!(packet[4] >= 4, "padding");
    assert_eq!(packet[5..10], [1, 0, 0, 0, 7]);
}

/// A handshake for `a:25565`, of version 770.
fn handshake(next: u8) -> Vec<u8> {
    [&b"\x08\0\x82\x06\x01a\x63\xdd"[..], &[next]].concat()
}

#[test]
fn minecraft_lists_the_sleeper_and_gives_the_ping_back() {
    let (asleep, say) = probed("minecraft", &handshake(1), false);
    assert_eq!((asleep, say.len()), (Asleep::More, 0));
    let asked = [&handshake(1)[..], b"\x01\0"].concat();
    let (asleep, say) = probed("minecraft", &asked, false);
    assert_eq!(asleep, Asleep::Say);
    let (size, id, data) = next_packet(&say).unwrap();
    assert_eq!((size, id), (say.len(), 0));
    let (length, text) = varint(data).unwrap();
    assert_eq!(length as usize, text.len());
    let status: serde_json::Value = serde_json::from_slice(text).unwrap();
    assert_eq!((&status["version"]["protocol"], &status["description"]["text"]), (&770.into(), &"zzz".into()));
    let pinged = [&asked[..], b"\x09\x01abcdefgh"].concat();
    let (asleep, again) = probed("minecraft", &pinged, false);
    assert_eq!((asleep, again), (Asleep::Farewell, [&say[..], b"\x09\x01abcdefgh"].concat()));
    let login = told("minecraft", &[&handshake(2)[..], b"\x03\0\x01x"].concat());
    let (_, id, data) = next_packet(&login).unwrap();
    let reason: serde_json::Value = serde_json::from_slice(varint(data).unwrap().1).unwrap();
    assert_eq!((id, &reason["text"]), (0, &"This service could not be started.".into()));
    let old = told("minecraft", b"\xfe\x01\xfa");
    assert_eq!(usize::from(u16::from_be_bytes([old[1], old[2]])) * 2 + 3, old.len());
}

#[test]
fn minecraft_is_answered_the_same_byte_by_byte() {
    let manners = Manners { motd: "zzz".to_owned(), ..Manners::default() };
    let bytes = [&handshake(1)[..], b"\x01\0\x09\x01abcdefgh"].concat();
    let (_, whole) = probed("minecraft", &bytes, false);
    let mut manner = Manner::of("minecraft", Intent::Probe, None, &handshake(1), &manners);
    let mut said = Vec::new();
    for end in handshake(1).len()..=bytes.len() {
        let mut say = Vec::new();
        let asleep = manner.asleep(&bytes[..end], false, &manners, &mut say);
        assert_eq!(asleep == Asleep::Farewell, end == bytes.len());
        said.extend(say);
    }
    assert_eq!(said, whole);
}

proptest! {
    #[test]
    fn whatever_was_heard_the_answer_is_short(
        bytes in proptest::collection::vec(any::<u8>(), 0..200), which in 0..PROTOCOLS.len(), motd in "\\PC{0,80}",
        last in any::<bool>(),
    ) {
        let manners = Manners { motd, ..Manners::default() };
        let mut manner = Manner::of(PROTOCOLS[which], Intent::Probe, None, &bytes, &manners);
        let mut say = Vec::new();
        let asleep = manner.asleep(&bytes, last, &manners, &mut say);
        prop_assert!(asleep != Asleep::Wake && say.len() <= 2_048, "{} bytes", say.len());
        prop_assert!(asleep != Asleep::More || say.is_empty());
        say.clear();
        manner.farewell(Why::Late, &manners, &mut say);
        prop_assert!(say.len() <= 2_048);
    }

    #[test]
    fn any_text_is_json(text in any::<String>()) {
        let status: serde_json::Value = serde_json::from_str(&status_text(5, &text)).unwrap();
        prop_assert_eq!(&status["description"]["text"], &serde_json::Value::from(text));
    }

    #[test]
    fn numbers_come_back(value in any::<u32>()) {
        let mut out = Vec::new();
        put_varint(value, &mut out);
        prop_assert_eq!(varint(&out), Some((value, &b""[..])));
    }

    #[test]
    fn an_ssh_packet_is_whole_blocks(text in "[ -~]{0,200}") {
        let mut say = Vec::new();
        ssh(&text, &mut say);
        let packet = &say[b"SSH-2.0-fourtuple\r\n".len()..];
        prop_assert_eq!(packet.len() % 8, 0);
        prop_assert_eq!(u32::from_be_bytes(packet[..4].try_into().unwrap()) as usize + 4, packet.len());
        prop_assert!((4..12).contains(&packet[4]));
    }
}
