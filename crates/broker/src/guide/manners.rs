//! How the client of a service that sleeps is spoken to, in its own protocol: a probe is answered and wakes nothing, and
//! who has waited in vain is told so.
//!
//! Decides the bytes, and which connections are no reason to wake a service. Knows no service, socket or time. Protocols
//! without a word for it are closed in silence.

use fourtuple_engine::broker::guide::{Asleep, Why};
use fourtuple_sniff::Intent;

/// What is said for all services of a broker.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manners {
    /// What a person reads: the text of an HTTP answer, a line in Minecraft's list of servers. At most 256 bytes.
    pub motd: String,
    /// When an HTTP client may come again.
    pub retry_after_s: u32,
    /// Paths that are asked for to see whether a service is well: no reason to wake it.
    pub health_paths: Vec<String>,
}

impl Default for Manners {
    fn default() -> Manners {
        Manners {
            motd: "This service is asleep; it wakes when it is used.".to_owned(),
            retry_after_s: 5,
            health_paths: ["/healthz", "/livez", "/readyz"].map(str::to_owned).into(),
        }
    }
}

/// What is remembered of a client, to speak to it later.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Manner {
    speech: Speech,
    is_probe: bool,
    /// Bytes of its stream that have been answered.
    answered: u32,
}

/// In which protocol, with what an answer needs of the request.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Speech {
    #[default]
    Mute,
    Http {
        wants_body: bool,
    },
    Http2 {
        stream: u32,
    },
    Rtsp {
        sequence: u32,
    },
    Tls,
    Postgres,
    Redis,
    Mqtt {
        version: u8,
    },
    Ssh,
    Tcpmux,
    Minecraft {
        version: u32,
        wants_status: bool,
    },
    MinecraftPing,
}

impl Manner {
    /// Of a connection that shows `protocol`, in the words of a route, with `bytes`, which begin where that does.
    pub(super) fn of(protocol: &str, intent: Intent, path: Option<&[u8]>, bytes: &[u8], manners: &Manners) -> Manner {
        let speech = match protocol {
            "http1" | "websocket" | "connect" => Speech::Http { wants_body: !bytes.starts_with(b"HEAD ") },
            "http2" => Speech::Http2 { stream: first_request(bytes).unwrap_or(1) },
            "rtsp" => Speech::Rtsp { sequence: rtsp_sequence(bytes) },
            "tls" => Speech::Tls,
            // Inside the encryption that the client was told to begin.
            "postgres" if bytes.first() == Some(&HANDSHAKE) => Speech::Tls,
            "postgres" => Speech::Postgres,
            "redis" => Speech::Redis,
            "mqtt" => Speech::Mqtt { version: mqtt_version(bytes).unwrap_or(4) },
            "ssh" => Speech::Ssh,
            "tcpmux" => Speech::Tcpmux,
            "minecraft" => minecraft(bytes),
            _ => Speech::Mute,
        };
        let is_health = path.is_some_and(|path| manners.health_paths.iter().any(|one| one.as_bytes() == path));
        Manner { speech, is_probe: intent == Intent::Probe || is_health, answered: 0 }
    }

    /// Whether the service is to be woken for it, and else what it is told.
    pub(super) fn asleep(&mut self, bytes: &[u8], last: bool, manners: &Manners, say: &mut Vec<u8>) -> Asleep {
        if !self.is_probe {
            return Asleep::Wake;
        }
        match self.speech {
            Speech::Minecraft { version, wants_status: true } => self.status(version, bytes, last, manners, say),
            _ => {
                self.tell(&manners.motd, manners, say);
                Asleep::Farewell
            }
        }
    }

    /// What it is told that has waited in vain.
    pub(super) fn farewell(&self, why: Why, manners: &Manners, say: &mut Vec<u8>) {
        let text = match why {
            Why::Failed => "This service could not be started.",
            Why::Refused => "This service is not started for you.",
            Why::Late => "This service was not there in time.",
            Why::Full => "Too many wait for this service already.",
        };
        self.tell(text, manners, say);
    }

    fn tell(&self, text: &str, manners: &Manners, say: &mut Vec<u8>) {
        match self.speech {
            Speech::Mute => {}
            Speech::Http { wants_body } => http(wants_body, text, manners.retry_after_s, say),
            Speech::Http2 { stream } => http2(stream, manners.retry_after_s, say),
            Speech::Rtsp { sequence } => {
                let retry_after_s = manners.retry_after_s;
                let head = format!(
                    "RTSP/1.0 503 Service Unavailable\r\nCSeq: {sequence}\r\nRetry-After: {retry_after_s}\r\n\r\n"
                );
                say.extend(head.bytes());
            }
            Speech::Tls => say.extend(INTERNAL_ERROR),
            Speech::Postgres => postgres(text, say),
            // What a server says that reads its data first.
            Speech::Redis => say.extend(b"-LOADING Redis is loading the dataset in memory\r\n"),
            // CONNACK: 3.2.2.3 of version 3.1.1, "server unavailable"; 3.2.2.2 of version 5, the same with a reason code.
            Speech::Mqtt { version: ..=4 } => say.extend([0x20, 2, 0, 3]),
            Speech::Mqtt { .. } => say.extend([0x20, 3, 0, 0x88, 0]),
            Speech::Ssh => ssh(text, say),
            // RFC 1078: "-" and a text.
            Speech::Tcpmux => {
                say.push(b'-');
                say.extend(text.bytes().filter(|byte| !byte.is_ascii_control()));
                say.extend(b"\r\n");
            }
            Speech::Minecraft { version, wants_status: true } => {
                packet(0, &[&string(&status_text(version, text))], say);
            }
            Speech::Minecraft { .. } => packet(0, &[&string(&format!("{{\"text\":{}}}", quoted(text)))], say),
            Speech::MinecraftPing => kick(text, say),
        }
    }

    /// Minecraft's list of servers: the handshake, a request that is answered, a ping that is given back.
    fn status(&mut self, version: u32, bytes: &[u8], last: bool, manners: &Manners, say: &mut Vec<u8>) -> Asleep {
        while let Some((packet_bytes, id, data)) = next_packet(bytes.get(self.answered as usize..).unwrap_or_default())
        {
            let is_handshake = self.answered == 0;
            self.answered += packet_bytes as u32;
            match (id, data) {
                _ if is_handshake => {}
                (0, []) => packet(0, &[&string(&status_text(version, &manners.motd))], say),
                (1, token) if token.len() == 8 => {
                    packet(1, &[token], say);
                    return Asleep::Farewell;
                }
                _ => return Asleep::Farewell,
            }
        }
        match (last, say.is_empty()) {
            (true, _) => Asleep::Farewell,
            (false, true) => Asleep::More,
            (false, false) => Asleep::Say,
        }
    }
}

// ---- HTTP -----------------------------------------------------------------------------------------------------------

/// RFC 9110 15.6.4, 10.2.3; a HEAD gets the same head and no body (9.3.2).
fn http(wants_body: bool, text: &str, retry_after_s: u32, say: &mut Vec<u8>) {
    let length = text.len() + 1;
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\nRetry-After: {retry_after_s}\r\nConnection: close\r\nCache-Control: \
         no-store\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\n\r\n"
    );
    say.extend(head.bytes());
    if wants_body {
        say.extend(text.bytes());
        say.push(b'\n');
    }
}

const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;

/// Our SETTINGS, the answer to the client's, 503 for the request without a body, and that nothing more is heard
/// (RFC 9113 3.4, 6.5.3, 8.1, 6.8). The fields are literals with names out of HPACK's static table (RFC 7541 6.2.2): 8 is
/// `:status`, 53 `retry-after`.
fn http2(stream: u32, retry_after_s: u32, say: &mut Vec<u8>) {
    let frame = |say: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, data: &[u8]| {
        say.extend(&(data.len() as u32).to_be_bytes()[1..]);
        say.extend([kind, flags]);
        say.extend(stream.to_be_bytes());
        say.extend(data);
    };
    let after = retry_after_s.to_string();
    let fields = [b"\x08\x03503\x0f\x26".as_slice(), &[after.len() as u8], after.as_bytes()].concat();
    const ACK: u8 = 1;
    const END_STREAM_AND_HEADERS: u8 = 5;
    frame(say, SETTINGS, 0, 0, b"");
    frame(say, SETTINGS, ACK, 0, b"");
    frame(say, HEADERS, END_STREAM_AND_HEADERS, stream, &fields);
    frame(say, GOAWAY, 0, 0, &[stream.to_be_bytes(), [0; 4]].concat());
}

/// The stream of the first HEADERS frame behind the preface of 24 bytes.
fn first_request(bytes: &[u8]) -> Option<u32> {
    let mut rest = bytes.get(24..)?;
    loop {
        let (head, after) = rest.split_first_chunk::<9>()?;
        if head[3] == HEADERS {
            return Some(u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]));
        }
        rest = after.get(u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize..)?;
    }
}

/// RFC 2326 12.17.
fn rtsp_sequence(bytes: &[u8]) -> u32 {
    let lines = bytes.split(|&byte| byte == b'\n');
    let of_line = |line: &[u8]| {
        let (_, value) = line.split_at_checked(5).filter(|(name, _)| name.eq_ignore_ascii_case(b"cseq:"))?;
        std::str::from_utf8(value).ok()?.trim().parse().ok()
    };
    lines.filter_map(of_line).next().unwrap_or(0)
}

// ---- TLS, SSH -------------------------------------------------------------------------------------------------------

/// The content type of a hello.
const HANDSHAKE: u8 = 0x16;
/// A record with a fatal alert: internal_error, which is no fault of the peer (RFC 8446 6.2).
const INTERNAL_ERROR: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 80];

/// Who we are, and SSH_MSG_DISCONNECT before any keys (RFC 4253 4.2, 6, 11.1): SSH_DISCONNECT_SERVICE_NOT_AVAILABLE.
fn ssh(text: &str, say: &mut Vec<u8>) {
    say.extend(b"SSH-2.0-fourtuple\r\n");
    let payload =
        [&[1, 0, 0, 0, 7][..], &(text.len() as u32).to_be_bytes(), text.as_bytes(), &0u32.to_be_bytes()].concat();
    // All of it together in whole blocks of 8, with 4 bytes of padding at least.
    let padding = 4 + (8 - (5 + payload.len() + 4) % 8) % 8;
    say.extend(((1 + payload.len() + padding) as u32).to_be_bytes());
    say.push(padding as u8);
    say.extend(payload);
    say.extend(std::iter::repeat_n(0, padding));
}

// ---- PostgreSQL, MQTT -----------------------------------------------------------------------------------------------

/// ErrorResponse: 57P03 is cannot_connect_now, what a server says that starts up.
fn postgres(text: &str, say: &mut Vec<u8>) {
    let text: String = text.chars().filter(|&letter| letter != '\0').collect();
    let fields = format!("SFATAL\0VFATAL\0C57P03\0M{text}\0\0");
    say.push(b'E');
    say.extend((fields.len() as u32 + 4).to_be_bytes());
    say.extend(fields.bytes());
}

/// The protocol level of a CONNECT packet, behind its length and the protocol's name.
fn mqtt_version(bytes: &[u8]) -> Option<u8> {
    let length_bytes = bytes.get(1..5)?.iter().position(|byte| byte & 0x80 == 0)? + 1;
    let rest = bytes.get(1 + length_bytes..)?;
    let (name, rest) = rest.split_first_chunk::<2>()?;
    rest.get(usize::from(u16::from_be_bytes(*name))).copied()
}

// ---- Minecraft ------------------------------------------------------------------------------------------------------

fn minecraft(bytes: &[u8]) -> Speech {
    if bytes.first() == Some(&0xfe) {
        return Speech::MinecraftPing;
    }
    match next_packet(bytes) {
        Some((_, _, data)) => Speech::Minecraft {
            version: varint(data).map_or(0, |(version, _)| version),
            wants_status: data.last() == Some(&1),
        },
        None => Speech::Mute,
    }
}

/// The first packet, if it is whole: how many bytes it has, its id and what is behind that.
fn next_packet(bytes: &[u8]) -> Option<(usize, u32, &[u8])> {
    let (size, rest) = varint(bytes)?;
    let packet = rest.get(..usize::try_from(size).ok()?)?;
    let (id, data) = varint(packet)?;
    Some((bytes.len() - rest.len() + packet.len(), id, data))
}

/// Seven bits to a byte, the lowest first; five bytes at most.
fn varint(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let length = bytes.iter().take(5).position(|byte| byte & 0x80 == 0)? + 1;
    let value = bytes[..length].iter().rev().fold(0u32, |value, byte| value << 7 | u32::from(byte & 0x7f));
    Some((value, &bytes[length..]))
}

fn put_varint(mut value: u32, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn packet(id: u8, parts: &[&[u8]], say: &mut Vec<u8>) {
    put_varint(1 + parts.iter().map(|part| part.len() as u32).sum::<u32>(), say);
    say.push(id);
    parts.iter().for_each(|part| say.extend(*part));
}

fn string(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 2);
    put_varint(text.len() as u32, &mut out);
    out.extend(text.bytes());
    out
}

/// In the client's own version, or it would be told that the server is of another.
fn status_text(version: u32, text: &str) -> String {
    let (version, text) = (version as i32, quoted(text));
    format!(
        "{{\"version\":{{\"name\":\"asleep\",\"protocol\":{version}}},\"players\":{{\"max\":0,\"online\":0}},\
         \"description\":{{\"text\":{text}}}}}"
    )
}

/// What an old client reads: a kick whose text is UTF-16, its parts divided by NUL.
fn kick(text: &str, say: &mut Vec<u8>) {
    let text = text.replace('\0', " ");
    let units: Vec<u16> = format!("\u{a7}1\0127\0asleep\0{text}\00\00").encode_utf16().collect();
    say.push(0xff);
    say.extend((units.len() as u16).to_be_bytes());
    say.extend(units.iter().flat_map(|unit| unit.to_be_bytes()));
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests;
