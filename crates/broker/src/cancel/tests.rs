use super::*;

fn message(kind: u8, content: &[u8]) -> Vec<u8> {
    [&[kind][..], &(content.len() as u32 + 4).to_be_bytes(), content].concat()
}

/// What a server says from AuthenticationOk to its key, which is these bytes.
fn begins(key: &[u8]) -> Vec<u8> {
    let parts = [message(b'R', &[0; 4]), message(b'S', b"server_version\x0017.2\0"), message(b'K', key)];
    [parts.concat(), message(b'Z', b"I")].concat()
}

/// What is told in the end if it comes so many bytes at a time.
fn told(said: &[u8], step: usize) -> Option<Vec<u8>> {
    let mut messages = Messages::default();
    for piece in said.chunks(step) {
        match messages.read(piece) {
            Told::More => {}
            Told::Key(key) => return Some(key.to_vec()),
            Told::Nothing => return None,
        }
    }
    None
}

#[test]
fn a_key_is_found_however_it_comes() {
    let long = [7; 260];
    let notice = [message(b'N', &[b'x'; 3000]), begins(b"\0\0\x12\x34abcd")].concat();
    let cases: [(Vec<u8>, Option<&[u8]>); 7] = [
        (begins(b"\0\0\x12\x34abcd"), Some(b"\0\0\x12\x34abcd")),
        (begins(&long), Some(&long)),
        (notice, Some(b"\0\0\x12\x34abcd")),
        (begins(&[7; 261]), None),
        (begins(b"short"), None),
        (message(b'E', b"SFATAL\0\0"), None),
        ([vec![b'R', 0, 0, 0, 3], begins(b"\0\0\x12\x34abcd")].concat(), None),
    ];
    for (said, expected) in cases {
        for step in [1, 2, 3, 7, 100, 10_000] {
            assert_eq!(told(&said, step).as_deref(), expected, "{} by {step}", said.escape_ascii());
        }
    }
}

#[test]
fn who_never_says_a_key_is_not_heard_for_ever() {
    let mut messages = Messages::default();
    let notice = message(b'N', &[b'x'; 995]);
    let read = (0..1000).take_while(|_| messages.read(&notice) == Told::More).count();
    assert_eq!(read, HEARD_MOST as usize / notice.len());
}

fn chosen(number: u8, delivery: Delivery) -> Chosen {
    let address = match delivery {
        Delivery::Relay => Address::Tcp(([127, 0, 0, 1], u16::from(number)).into()),
        Delivery::HandOff | Delivery::Inetd => Address::Unix(vec![b'/', number]),
    };
    Chosen { service: format!("s{number}"), address, delivery, ..Chosen::default() }
}

fn source(last: u8) -> Option<SocketAddr> {
    Some(([192, 0, 2, last], 1000).into())
}

/// Where a request from there goes, last.
fn goes(cancels: &Cancels, from: u8, key: &[u8]) -> Vec<String> {
    let request = [b"....", key].concat();
    let names = source(from).zip(source(99));
    let listener = fourtuple_engine::ListenerId(0);
    let shown = Shown { listener, names, bytes: &request, last: false };
    let mut found = Chosen::default();
    if !cancels.choose(&shown, (key, 0), &mut found, |version| vec![version]) {
        return Vec::new();
    }
    for errand in &found.errands {
        assert!(errand.say.ends_with(&request), "{errand:?}");
    }
    let port = |address: &Address| match address {
        Address::Tcp(endpoint) => format!("s{}", endpoint.port()),
        Address::Unix(path) => format!("handed to {}", path[1]),
    };
    found.errands.iter().map(|errand| port(&errand.address)).chain([port(&found.address)]).collect()
}

#[test]
fn a_request_goes_where_its_key_is_known_and_else_where_its_source_has_been() {
    let cancels = Cancels::default();
    assert_eq!(goes(&cancels, 1, b"process1"), [""; 0]);
    for number in [1, 2, 1, 3] {
        cancels.brought(source(1), Place::of(&chosen(number, Delivery::Relay), None));
    }
    assert_eq!(goes(&cancels, 1, b"process1"), ["s2", "s1", "s3"]);
    assert_eq!(goes(&cancels, 2, b"process1"), [""; 0]);
    let mut overheard = Overheard::at(Place::of(&chosen(7, Delivery::Relay), None));
    let said = begins(b"process1");
    assert!(cancels.said(&mut overheard, &said[..20]));
    assert!(!cancels.said(&mut overheard, &said[20..]));
    // Whoever says it, wherever from: that is what the key is for.
    assert_eq!(
        (goes(&cancels, 1, b"process1"), goes(&cancels, 2, b"process1")),
        (vec!["s7".into()], vec!["s7".into()])
    );
    assert_eq!(goes(&cancels, 1, b"process2"), ["s2", "s1", "s3"]);
    cancels.forget(overheard);
    assert_eq!(goes(&cancels, 2, b"process1"), [""; 0]);
    // A socket is handed over once, and last.
    for number in [4, 5] {
        cancels.brought(source(1), Place::of(&chosen(number, Delivery::HandOff), None));
    }
    assert_eq!(goes(&cancels, 1, b"process1"), ["s2", "s1", "s3", "handed to 4"]);
    // An address that is mapped into IPv6 is the same one.
    let mapped = Some(("::ffff:192.0.2.9".parse::<IpAddr>().unwrap(), 1).into());
    cancels.brought(mapped, Place::of(&chosen(6, Delivery::Relay), Some(2)));
    assert_eq!(goes(&cancels, 9, b"process1"), ["s6"]);
}

#[test]
fn the_same_key_of_two_connections_is_forgotten_with_the_right_one() {
    let cancels = Cancels::default();
    let mut both = [1, 2].map(|number| Overheard::at(Place::of(&chosen(number, Delivery::Relay), None)));
    for one in &mut both {
        cancels.said(one, &begins(b"process1"));
    }
    let [first, second] = both;
    cancels.forget(first);
    assert_eq!(goes(&cancels, 1, b"process1"), ["s2"]);
    cancels.forget(second);
    assert_eq!(goes(&cancels, 1, b"process1"), [""; 0]);
}

#[test]
fn tables_are_bounded() {
    let cancels = Cancels::default();
    for number in 0..100_000_u32 {
        let from = Some((IpAddr::from(number.to_be_bytes()), 1).into());
        cancels.brought(from, Place::of(&chosen(1, Delivery::Relay), None));
        cancels.brought(source(1), Place::of(&chosen((number % 200) as u8, Delivery::Relay), None));
        let mut overheard = Overheard::at(Place::of(&chosen(1, Delivery::Relay), None));
        cancels.said(&mut overheard, &begins(&[[0; 4], number.to_be_bytes()].concat()));
    }
    let tables = cancels.lock();
    assert_eq!(tables.keys.len(), MOST_KEYS);
    assert!(tables.new.len() + tables.old.len() <= 2 * MOST_SOURCES);
    drop(tables);
    assert_eq!(goes(&cancels, 1, b"process1").len(), MOST_PLACES);
}
