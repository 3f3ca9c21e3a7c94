//! The precedence of routes as one table: each row beats every row below it on a connection that fulfils them all.

mod support;

use fourtuple_registry::{Delivery, Mode, Outcome, Resolved, Route, Seen, Store, Target};
use proptest::prelude::*;
use support::{Folder, put, route, service};

/// Conditions from the strongest to the weakest. `SERVICE` rows are the services themselves.
const TABLE: &[&[(&str, &str)]] = &[
    &[("wide_port", "70000"), ("name", "a.b.example.com"), ("path", "/x")],
    &[("wide_port", "70000"), ("name", "a.b.example.com")],
    &[("wide_port", "70000"), ("name", "*.b.example.com")],
    &[("wide_port", "70000"), ("name", "**.b.example.com")],
    &[("wide_port", "70000"), ("name", "**.example.com")],
    &[("wide_port", "70000"), ("source_port", "40000")],
    &[("wide_port", "70000")],
    &[], // the service with that wide port
    &[("name", "a.b.example.com"), ("path", "/x/y")],
    &[("name", "a.b.example.com"), ("path", "/x")],
    &[("name", "a.b.example.com"), ("path", "/")],
    &[("name", "a.b.example.com"), ("protocol", "tls"), ("alpn", "h2")],
    &[("name", "a.b.example.com"), ("protocol", "tls")],
    &[("name", "a.b.example.com"), ("alpn", "h2"), ("database", "orders")],
    &[("name", "a.b.example.com"), ("alpn", "h2")],
    &[("name", "a.b.example.com"), ("database", "orders"), ("user", "eve")],
    &[("name", "a.b.example.com"), ("database", "orders")],
    &[("name", "a.b.example.com"), ("database", "*")],
    &[("name", "a.b.example.com"), ("user", "eve")],
    &[("name", "a.b.example.com"), ("client", "meter-7")],
    &[("name", "a.b.example.com"), ("destination", "192.0.2.1")],
    &[("name", "a.b.example.com"), ("destination", "192.0.2.0/24"), ("destination_port", "443")],
    &[("name", "a.b.example.com"), ("destination", "192.0.2.0/24")],
    &[("name", "a.b.example.com"), ("destination_port", "443"), ("source", "10.0.0.0/8")],
    &[("name", "a.b.example.com"), ("destination_port", "443")],
    &[("name", "a.b.example.com"), ("source", "10.1.2.3")],
    &[("name", "a.b.example.com"), ("source", "10.0.0.0/8")],
    &[("name", "a.b.example.com"), ("source", "0.0.0.0/0")],
    &[("name", "a.b.example.com"), ("source_port", "40000")],
    &[("name", "a.b.example.com")],
    &[], // the service of that name
    &[("name", "*.b.example.com"), ("path", "/x")],
    &[("name", "*.b.example.com")],
    &[("name", "**.b.example.com")],
    &[("name", "**.example.com"), ("path", "/x")],
    &[("name", "**.example.com")],
    &[("name", "**.com")],
    &[("name", "**"), ("path", "/x")],
    &[("name", "**")],
    &[("database", "orders"), ("user", "eve")],
    &[("database", "orders")],
    &[("user", "eve")],
    &[("client", "meter-7")],
    &[("path", "/x")],
    &[("path", "/")],
    &[("protocol", "tls")],
    &[("alpn", "http/1.1")],
    &[("database", "*")],
    &[("user", "*")],
    &[("client", "*")],
    &[("destination", "192.0.2.0/24")],
    &[("destination_port", "443")],
    &[("source", "10.0.0.0/8")],
    &[("source_port", "40000")],
    &[], // the route without conditions
];
const BY_WIDE_PORT: usize = 7;
const BY_NAME: usize = 30;

fn seen() -> Seen<'static> {
    Seen {
        wide_port: Some(70_000),
        name: Some(b"A.b.Example.com."),
        path: Some(b"/x/y?z"),
        protocol: Some("tls"),
        alpn: Some(b"\x02h2\x08http/1.1"),
        user: Some(b"eve"),
        database: Some(b"orders"),
        client: Some(b"meter-7"),
        source: Some("10.1.2.3:40000".parse().unwrap()),
        destination: Some("[::ffff:192.0.2.1]:443".parse().unwrap()),
    }
}

fn row(number: usize) -> Route {
    route(TABLE[number], &format!("unix:/row/{number}"))
}

fn winner(store: &std::sync::Arc<Store>) -> String {
    match store.reader().unwrap().resolve(&seen()).unwrap() {
        Outcome::Found(Resolved { target: Target::Unix(path), .. }) => path,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_row_beats_those_below() {
    let folder = Folder::new();
    let store = folder.store();
    let wide = || fourtuple_registry::Service {
        wide_port: Some(70_000),
        ..service("wide", &format!("unix:/row/{BY_WIDE_PORT}"))
    };
    let named = || service("a.b.example.com", &format!("unix:/row/{BY_NAME}"));
    // From the weakest up: each row, when it comes, is the one.
    for number in (0..TABLE.len()).rev() {
        match number {
            BY_WIDE_PORT => put(&store, Mode::Add, &[wide()]).map(|_| ()),
            BY_NAME => put(&store, Mode::Add, &[named()]).map(|_| ()),
            _ => store.add_routes(&[row(number)], false),
        }
        .unwrap();
        assert_eq!(winner(&store), format!("/row/{number}"), "{:?}", TABLE[number]);
    }
    // And from the strongest down: when it goes, the next one is.
    for (number, conditions) in TABLE.iter().enumerate().take(TABLE.len() - 1) {
        match number {
            BY_WIDE_PORT => assert_eq!(
                store.remove(&["wide"].map(|name| fourtuple_registry::Name::parse(name.as_bytes()).unwrap())).unwrap(),
                [""; 0]
            ),
            BY_NAME => assert_eq!(
                store.remove(&[fourtuple_registry::Name::parse(b"a.b.example.com").unwrap()]).unwrap(),
                [""; 0]
            ),
            _ => assert!(store.remove_route(&row(number).conditions).unwrap()),
        }
        assert_eq!(winner(&store), format!("/row/{}", number + 1), "{conditions:?}");
    }
}

#[test]
fn the_list_is_in_the_order_of_precedence() {
    let folder = Folder::new();
    let store = folder.store();
    let routes: Vec<_> = (0..TABLE.len()).filter(|number| ![BY_WIDE_PORT, BY_NAME].contains(number)).map(row).collect();
    let mut other_way: Vec<_> = routes.clone();
    other_way.reverse();
    store.add_routes(&other_way, false).unwrap();
    let mut listed = Vec::new();
    store
        .reader()
        .unwrap()
        .routes(|route| {
            listed.push(route);
            Ok(true)
        })
        .unwrap();
    // Anchors of one kind follow their bytes, so wildcards of different suffixes may stand otherwise.
    let anchored = |route: &&Route| !route.conditions.fields().iter().any(|(_, text)| text.starts_with('*'));
    assert_eq!(listed.iter().filter(anchored).collect::<Vec<_>>(), routes.iter().filter(anchored).collect::<Vec<_>>());
}

#[test]
fn conditions_that_do_not_hold() {
    let folder = Folder::new();
    let store = folder.store();
    put(&store, Mode::Add, &[service("a.b.example.com", "unix:/named")]).unwrap();
    for (condition, other) in [
        ("wide_port", "70001"),
        ("name", "b.example.com"),
        ("name", "*.example.com"),
        ("path", "/x/"),
        ("path", "/x/yy"),
        ("protocol", "http1"),
        ("alpn", "h"),
        ("user", "ev"),
        ("database", "Orders"),
        ("client", "meter-77"),
        ("destination", "192.0.2.2"),
        ("destination", "::ffff:0:0/96"),
        ("destination_port", "80"),
        ("source", "11.0.0.0/8"),
        ("source_port", "1"),
    ] {
        if (condition, other) == ("path", "/x/") {
            continue; // the same as /x
        }
        let one = route(&[("name", "a.b.example.com"), (condition, other)], "unix:/route");
        if condition == "name" {
            store.add_routes(&[route(&[(condition, other)], "unix:/route")], false).unwrap();
        } else {
            store.add_routes(&[one], false).unwrap();
        }
        assert_eq!(winner(&store), "/named", "{condition} {other}");
    }
}

#[test]
fn a_silent_connection_gets_the_default_alone() {
    let folder = Folder::new();
    let store = folder.store();
    store
        .add_routes(&[route(&[("name", "**")], "unix:/any-name"), route(&[("user", "*")], "unix:/any-user")], false)
        .unwrap();
    let look = |seen: &Seen<'_>| store.reader().unwrap().resolve(seen).unwrap();
    assert_eq!(look(&Seen::default()), Outcome::NoRoute);
    for no_name in [b"".as_slice(), b"..", b"a/b", b"[::1]", b"a:443", &[b'a'; 300]] {
        assert_eq!(look(&Seen { name: Some(no_name), ..Seen::default() }), Outcome::NoRoute);
    }
    store.add_routes(&[route(&[], "unix:/default")], false).unwrap();
    assert!(matches!(look(&Seen::default()), Outcome::Found(_)));
    let long_user = [b'a'; 300];
    assert!(matches!(look(&Seen { user: Some(&long_user), ..Seen::default() }), Outcome::Found(_)));
}

#[test]
fn templates() {
    let folder = Folder::new();
    let store = folder.store();
    store
        .add_routes(
            &[
                route(&[("name", "*.pg.example.com")], "unix:/run/pg/{label}.sock"),
                route(&[("name", "**.long")], "unix:/run/{name}"),
                route(&[("name", "*.to")], "service:{label}.there"),
                route(&[("database", "*"), ("user", "*")], "unix:/db/{database}/{user}"),
            ],
            false,
        )
        .unwrap();
    put(&store, Mode::Add, &[service("x.there", "tcp:127.0.0.1:1")]).unwrap();
    let look = |seen: &Seen<'_>| store.reader().unwrap().resolve(seen).unwrap();
    let named = |name: &'static str| Seen { name: Some(name.as_bytes()), ..Seen::default() };
    let target = |outcome| match outcome {
        Outcome::Found(Resolved { target, delivery: Delivery::Relay, .. }) => target.to_string(),
        other => panic!("{other:?}"),
    };
    assert_eq!(target(look(&named("Orders.PG.example.com"))), "unix:/run/pg/orders.sock");
    assert_eq!(target(look(&named("x.to"))), "tcp:127.0.0.1:1");
    assert_eq!(look(&named("y.to")), Outcome::NoService("y.there".to_owned()));
    let long = format!("{}.{}.long", "a".repeat(63), "b".repeat(63));
    assert!(
        matches!(look(&Seen { name: Some(long.as_bytes()), ..Seen::default() }), Outcome::Refused(_)),
        "no room in a path"
    );
    let sent = |database: &'static [u8]| Seen { database: Some(database), user: Some(b"eve"), ..Seen::default() };
    assert_eq!(target(look(&sent(b"Orders_2"))), "unix:/db/Orders_2/eve");
    for hostile in
        [b"".as_slice(), b".", b"..", b"../../etc", b"a/b", b"a\0", b"\xff", b"-x", b".hidden", b"a b", &[b'a'; 64]]
    {
        assert!(matches!(look(&sent(hostile)), Outcome::Refused(_)), "{hostile:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Whatever a client sends, the target of a template stays in its folder.
    #[test]
    fn nothing_escapes(names in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 20), users in proptest::collection::vec("\\PC{0,40}", 20)) {
        let folder = Folder::new();
        let store = folder.store();
        store.add_routes(&[route(&[("name", "**")], "unix:/run/{label}/{name}"), route(&[("user", "*")], "unix:/run/a/{user}")], false).unwrap();
        let reader = store.reader().unwrap();
        for (name, user) in names.iter().zip(&users) {
            for seen in [Seen { name: Some(name), ..Seen::default() }, Seen { user: Some(user.as_bytes()), ..Seen::default() }] {
                if let Outcome::Found(Resolved { target: Target::Unix(path), .. }) = reader.resolve(&seen).unwrap() {
                    prop_assert!(path.starts_with("/run/") && path.split('/').count() == 4 && !path.contains(['\0', '\n']));
                    prop_assert!(!path.split('/').any(|part| part == ".." || part == "."));
                }
            }
        }
    }
}
