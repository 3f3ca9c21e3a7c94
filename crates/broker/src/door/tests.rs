//! Whole conversations at each door, however the bytes are cut, and what services say to what they are told.

use super::*;

fn door(dialect: Dialect, requires_tls: bool) -> Door {
    Door { dialect, host: "mx.example.com".to_owned(), requires_tls }
}

/// What a client hears and gets that says these parts, each after it has been told something, so many bytes at a time.
fn conversation(door: &Door, parts: &[&[u8]], step: usize) -> String {
    let (mut standing, mut bytes, mut says, mut told) = (Standing::default(), Vec::new(), Vec::new(), String::new());
    let mut last = false;
    let mut coming: Vec<&[u8]> = parts.iter().flat_map(|part| part.chunks(step)).rev().collect();
    loop {
        let found = match door.look(&mut standing, &bytes, last, &mut says) {
            Move::More if last => return told + "more",
            Move::More => {
                match coming.pop() {
                    Some(piece) => bytes.extend_from_slice(piece),
                    None => last = true,
                }
                continue;
            }
            Move::Tell => {
                assert!(!says.is_empty(), "{told}");
                told += &format!("{} ", says.escape_ascii());
                continue;
            }
            Move::Tls => format!("tls behind {}", standing.answered),
            Move::Plain { user, database } => {
                let text = |bytes: Option<&[u8]>| bytes.map_or("-".to_owned(), |it| it.escape_ascii().to_string());
                format!("plain behind {} {} {}", standing.answered, text(user), text(database))
            }
            Move::Goodbye => return format!("{told}goodbye {}", says.escape_ascii()),
            Move::Garbage => "garbage".to_owned(),
        };
        let turns = if found.starts_with("tls") {
            door.before_tls(&standing, &bytes)
        } else if found.starts_with("plain") {
            door.before_plain(&standing, &bytes)
        } else {
            Vec::new()
        };
        let turns = turns.iter().map(|turn| format!(" [{}]", turn.say.escape_ascii()));
        return told + &found + &turns.collect::<String>();
    }
}

fn conversations(door: &Door, cases: &[(&[&[u8]], &str)]) {
    for (parts, expected) in cases {
        for step in [1, 2, 7, 5000] {
            assert_eq!(conversation(door, parts, step), *expected, "{parts:?} by {step}");
        }
    }
}

#[test]
fn smtp() {
    let open = "220 mx.example.com ESMTP\\r\\n ";
    let ehlo = "250-mx.example.com\\r\\n250 STARTTLS\\r\\n ";
    conversations(
        &door(Dialect::Smtp, false),
        &[
            (
                &[b"EHLO me\r\n", b"STARTTLS\r\n"],
                &format!("{open}{ehlo}220 begin\\r\\n tls behind 19 [] [EHLO me\\r\\n] [STARTTLS\\r\\n]"),
            ),
            (
                &[b"starttls\r\n"],
                &format!("{open}220 begin\\r\\n tls behind 10 [] [EHLO mx.example.com\\r\\n] [STARTTLS\\r\\n]"),
            ),
            (
                &[b"EHLO me\r\n", b"NOOP\r\n", b"MAIL FROM:<a@b>\r\n"],
                &format!("{open}{ehlo}250 OK\\r\\n plain behind 15 - - [] [EHLO me\\r\\n]"),
            ),
            (
                &[b"HELO me\r\n", b"VRFY a\r\n"],
                &format!("{open}250 mx.example.com\\r\\n plain behind 9 - - [] [HELO me\\r\\n]"),
            ),
            (
                &[b"STARTTLS now\r\n", b"QUIT\r\n"],
                &format!("{open}501 no parameters are allowed\\r\\n goodbye 221 mx.example.com\\r\\n"),
            ),
            (&[b"EHLO \r\n"], &format!("{open}501 a name is needed\\r\\n plain behind 7 - - []")),
            (&[], &format!("{open}plain behind 0 - - []")),
            // Neither a bare LF nor a bare CR ends a line, and nothing stands behind STARTTLS.
            (&[b"EHLO me\n"], &format!("{open}garbage")),
            (&[b"EHLO me\rQUIT\r\n"], &format!("{open}garbage")),
            (&[&[b'x'; 600]], &format!("{open}garbage")),
        ],
    );
    let both = door(Dialect::Smtp, false);
    assert!(conversation(&both, &[b"STARTTLS\r\nMAIL FROM:<a@b>\r\n"], 5000).ends_with("garbage"));
    conversations(
        &door(Dialect::Smtp, true),
        &[
            (
                &[b"MAIL FROM:<a@b>\r\n", b"STARTTLS\r\n"],
                &format!(
                    "{open}530 STARTTLS has to come first\\r\\n 220 begin\\r\\n tls behind 27 \
                     [] [EHLO mx.example.com\\r\\n] [STARTTLS\\r\\n]"
                ),
            ),
            (&[], &format!("{open}more")),
        ],
    );
}

#[test]
fn imap() {
    let open = "* OK [CAPABILITY IMAP4rev1 STARTTLS] mx.example.com is ready\\r\\n ";
    conversations(
        &door(Dialect::Imap, false),
        &[
            (
                &[b"a1 CAPABILITY\r\n", b"a2 StartTLS\r\n"],
                &format!(
                    "{open}* CAPABILITY IMAP4rev1 STARTTLS\\r\\na1 OK done\\r\\n a2 OK begin\\r\\n tls behind 28 \
                     [] [door STARTTLS\\r\\n]"
                ),
            ),
            (
                &[b"a ID (\"name\" \"x\")\r\n", b"b LOGIN alice secret\r\n"],
                &format!("{open}* ID NIL\\r\\na OK done\\r\\n plain behind 19 alice - []"),
            ),
            (&[b"b login \"al ice\" secret\r\n"], &format!("{open}plain behind 0 al ice - []")),
            (&[b"b login \"al\\\"ice\" secret\r\n"], &format!("{open}plain behind 0 - - []")),
            (&[b"b login {5}\r\n"], &format!("{open}plain behind 0 - - []")),
            (&[b"b AUTHENTICATE PLAIN\r\n"], &format!("{open}plain behind 0 - - []")),
            (&[b"b LOGOUT\r\n"], &format!("{open}goodbye * BYE mx.example.com\\r\\nb OK done\\r\\n")),
            // What is repeated to the client is a tag, and nothing else.
            (&[b"* OK\r\n"], &format!("{open}garbage")),
            (&[b"GET\r\n"], &format!("{open}garbage")),
        ],
    );
    let open = "* OK [CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED] mx.example.com is ready\\r\\n ";
    conversations(
        &door(Dialect::Imap, true),
        &[(
            &[b"a LOGIN alice secret\r\n", b"b STARTTLS\r\n"],
            &format!(
                "{open}a NO [PRIVACYREQUIRED] STARTTLS has to come first\\r\\n b OK begin\\r\\n tls behind 34 \
                 [] [door STARTTLS\\r\\n]"
            ),
        )],
    );
}

#[test]
fn pop3() {
    let open = "+OK mx.example.com is ready\\r\\n ";
    conversations(
        &door(Dialect::Pop3, false),
        &[
            (
                &[b"CAPA\r\n", b"STLS\r\n"],
                &format!("{open}+OK\\r\\nSTLS\\r\\nUSER\\r\\n.\\r\\n +OK begin\\r\\n tls behind 12 [] [STLS\\r\\n]"),
            ),
            (&[b"USER alice\r\n"], &format!("{open}plain behind 0 alice - []")),
            (&[b"AUTH\r\n"], &format!("{open}plain behind 0 - - []")),
            (&[b"quit\r\n"], &format!("{open}goodbye +OK\\r\\n")),
            (&[&[b'x'; 255]], &format!("{open}garbage")),
        ],
    );
    conversations(
        &door(Dialect::Pop3, true),
        &[(
            &[b"CAPA\r\n", b"USER alice\r\n"],
            &format!("{open}+OK\\r\\nSTLS\\r\\n.\\r\\n -ERR STLS has to come first\\r\\n more"),
        )],
    );
}

const START_TLS: &[u8] = b"\x30\x1d\x02\x01\x07\x77\x18\x80\x161.3.6.1.4.1.1466.20037";

#[test]
fn ldap() {
    let bind = b"\x30\x0c\x02\x01\x01\x60\x07\x02\x01\x03\x04\x00\x80\x00";
    let long = [&b"\x30\x84\x00\x00\x00\x1d"[..], &START_TLS[2..]].concat();
    let ours = "[0\\x1d\\x02\\x01\\x01w\\x18\\x80\\x161.3.6.1.4.1.1466.20037]";
    let yes = "0$\\x02\\x01\\x07x\\x1f\\n\\x01\\x00\\x04\\x00\\x04\\x00\\x8a\\x161.3.6.1.4.1.1466.20037";
    conversations(
        &door(Dialect::Ldap, false),
        &[
            (&[START_TLS], &format!("{yes} tls behind 31 {ours}")),
            (&[&long], &format!("{yes} tls behind 35 {ours}")),
            (&[bind], "plain behind 0 - -"),
            (&[], "plain behind 0 - -"),
            (&[b"\x30\x80"], "garbage"),
            (&[b"\x31"], "garbage"),
            (&[b"\x30\x84\x7f\xff\xff\xff"], "garbage"),
        ],
    );
    assert_eq!(conversation(&door(Dialect::Ldap, false), &[&[START_TLS, b"\x16"].concat()], 5000), "garbage");
    conversations(
        &door(Dialect::Ldap, true),
        &[(&[bind], "0\\x0c\\x02\\x01\\x01a\\x07\\n\\x01\\r\\x04\\x00\\x04\\x00 more")],
    );
}

/// What a client says: capabilities, the longest packet, a character set, zeros; then user, proof, database.
fn login(flags: u32, rest: &[u8]) -> Vec<u8> {
    let packet = [&flags.to_le_bytes()[..], &[0, 0, 0, 1, 45], &[0; 23], rest].concat();
    [&[packet.len() as u8, 0, 0, 1][..], &packet].concat()
}

#[test]
fn mysql() {
    let mysql = Door { host: "8.0.11-x".to_owned(), ..door(Dialect::Mysql, false) };
    let mut greeting = Vec::new();
    mysql.look(&mut Standing::default(), b"", false, &mut greeting);
    // Protocol 10, version, thread, salt, capabilities, character set, status, salt, plugin.
    assert_eq!(greeting.len(), 4 + 1 + 9 + 4 + 8 + 1 + 2 + 3 + 2 + 1 + 10 + 13 + 15);
    assert_eq!((&greeting[..5], greeting[4 + 10..].len()), (&[69, 0, 0, 0, 10][..], 59));
    assert_eq!(hears(mysql::GREETING_WITH_TLS, &greeting), Some(Heard::Yes), "a door sounds like a service");
    let open = format!("{} ", greeting.escape_ascii());
    let with_tls = login(0x0800 | 0x0200, b"");
    let shown = with_tls.escape_ascii();
    let database = 0x0008 | 0x0200 | 0x8000;
    conversations(
        &mysql,
        &[
            (&[&with_tls], &format!("{open}tls behind 36 [] [{shown}]")),
            // The hello may come with the request.
            (&[&[&with_tls[..], b"\x16\x03\x01"].concat()], &format!("{open}tls behind 36 [] [{shown}]")),
            (&[&login(database, b"alice\0\x03abcshop\0plugin\0")], &format!("{open}plain behind 0 alice shop []")),
            (&[&login(database | 0x20_0000, b"alice\0\x00shop\0")], &format!("{open}plain behind 0 alice shop []")),
            (&[&login(0x8200, b"alice\0\x00")], &format!("{open}plain behind 0 alice - []")),
            (&[&login(database, b"alice\0\x09abc")], &format!("{open}garbage")),
            (&[&login(0, b"alice\0\0")], &format!("{open}garbage")),
            (&[b"GET / HTTP/1.1\r\n"], &format!("{open}garbage")),
            (&[], &format!("{open}plain behind 0 - - []")),
        ],
    );
    let strict = Door { requires_tls: true, ..mysql };
    let refused = conversation(&strict, &[&login(0x8200, b"alice\0\x00")], 5000);
    assert!(refused.ends_with("\\xffW\\x0c#HY000TLS is needed"), "{refused}");
}

#[test]
fn what_services_say() {
    use Heard::{More, No, Yes};
    let mut bare = Vec::new();
    door(Dialect::Mysql, false).look(&mut Standing::default(), b"", false, &mut bare);
    let flags = bare.iter().position(|&byte| byte == 0x8f).unwrap();
    bare[flags + 1] &= !8;
    let ldap_yes = b"\x30\x0c\x02\x01\x01\x78\x07\x0a\x01\x00\x04\x00\x04\x00";
    let ldap_no = b"\x30\x0c\x02\x01\x01\x78\x07\x0a\x01\x02\x04\x00\x04\x00";
    let cases: [(u8, &[u8], Heard); 27] = [
        (smtp::READY, b"220 mx\r\n", Yes),
        (smtp::READY, b"220\r\n", Yes),
        (smtp::READY, b"220-a\r\n220-b\r\n220 c\r\n", Yes),
        (smtp::READY, b"220-a\r\n220-b\r\n", More),
        (smtp::READY, b"554 no\r\n", No),
        (smtp::READY, b"2200\r\n", No),
        // Said before it was asked: what is behind would be taken for an answer inside TLS (CVE-2011-0411).
        (smtp::READY, b"220 go\r\n250 OK\r\n", No),
        (smtp::DONE, b"250-a\r\n220 c\r\n", No),
        (imap::GREETING, b"* OK ready\r\n", Yes),
        (imap::GREETING, b"* PREAUTH hello\r\n", No),
        (imap::GREETING, b"* BYE full\r\n", No),
        (imap::TAGGED, b"* CAPABILITY x\r\ndoor OK begin\r\n", Yes),
        (imap::TAGGED, b"* BYE\r\n", No),
        (imap::TAGGED, b"door NO\r\n", No),
        (imap::TAGGED, b"door BAD\r\n", No),
        (pop3::FINE, b"+OK <1.2@x>\r\n", Yes),
        (pop3::FINE, b"-ERR\r\n", No),
        (pop3::FINE, b"+OK", More),
        (mysql::GREETING, &bare, Yes),
        (mysql::GREETING_WITH_TLS, &bare, No),
        (mysql::GREETING, b"\x10\0\0\0\xff\x10\x04Too many conn", No),
        (ldap::BEGIN, ldap_yes, Yes),
        (ldap::BEGIN, b"\x30\x84\x00\x00\x00\x0c\x02\x01\x01\x78\x07\x0a\x01\x00\x04\x00\x04\x00", Yes),
        (ldap::BEGIN, ldap_no, No),
        (ldap::BEGIN, b"", More),
        (ldap::BEGIN, &[&ldap_yes[..], b"\x30"].concat(), No),
        (ldap::BEGIN, &ldap_yes[..13], More),
    ];
    for (expect, said, heard) in cases {
        assert_eq!(hears(expect, said), Some(heard), "{expect}: {}", said.escape_ascii());
        for end in 0..said.len() {
            let early = hears(expect, &said[..end]);
            assert!(early == Some(More) || heard != Yes, "{expect}: {} of {}", end, said.escape_ascii());
        }
    }
    assert_eq!(hears(b'S', b"S"), None);
}

/// Any bytes, cut anywhere: what is answered has come, each answer takes something, and all of it ends.
#[test]
fn any_bytes_lead_to_an_end() {
    let pieces: [&[u8]; 12] = [
        b"EHLO me\r\n",
        b"a CAPABILITY\r\n",
        b"CAPA\r\n",
        b"NOOP\r\n",
        b"STARTTLS\r\n",
        b"a STARTTLS\r\n",
        b"STLS\r\n",
        b"QUIT\r\n",
        START_TLS,
        b"\x20\0\0\x01\x00\x0a\0\0",
        b"\r\n",
        b"\x16\x03\x01",
    ];
    let mut seed = 11_u64;
    let mut random = move |below: usize| {
        // xorshift64 (Marsaglia 2003).
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    let mut ends = [0; 4];
    for round in 0..20_000 {
        let door = door(DIALECTS[round % DIALECTS.len()].1, round % 3 == 0);
        let mut bytes = Vec::new();
        for _ in 0..random(8) {
            match random(6) {
                0 => (0..random(40)).for_each(|_| bytes.push(random(256) as u8)),
                _ => bytes.extend_from_slice(pieces[random(pieces.len())]),
            }
        }
        let (mut standing, mut says, mut shown) = (Standing::default(), Vec::new(), 0);
        let mut before = None;
        loop {
            let last = shown == bytes.len();
            let found = door.look(&mut standing, &bytes[..shown], last, &mut says);
            let answered = usize::from(standing.answered);
            assert!(answered <= shown, "{}", bytes.escape_ascii());
            match found {
                Move::Tell => assert!(before.replace(answered) != Some(answered), "an answer to nothing"),
                Move::More if !last => shown = (shown + 1 + random(30)).min(bytes.len()),
                end => {
                    ends[match end {
                        Move::More | Move::Tell | Move::Goodbye => 0,
                        Move::Garbage => 1,
                        Move::Tls => {
                            assert!(!door.before_tls(&standing, &bytes).is_empty());
                            2
                        }
                        Move::Plain { .. } => 3,
                    }] += 1;
                    break;
                }
            }
        }
    }
    assert!(ends.iter().all(|&count| count > 300), "{ends:?}");
}
