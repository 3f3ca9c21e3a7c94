#![no_main]
//! From first bytes to a place: sniffers, registry and default together, as a broker asks them. However the bytes are cut,
//! the connection goes to one place, and what a client sends leads out of no folder.

use std::cell::RefCell;
use std::net::SocketAddr;

use fourtuple_broker::{BrokerGuide, Fallback, Looking};
use fourtuple_engine::ListenerId;
use fourtuple_engine::broker::guide::{Address, Chosen, Guidance, Guide, Shown};
use fourtuple_registry::{Batch, Conditions, Delivery, Mode, Options, Route, Service, Store, Target};
use fourtuple_sniff::Protocol;

const PROTOCOLS: [Protocol; 17] = [
    Protocol::Tls,
    Protocol::Http2,
    Protocol::Connect,
    Protocol::WebSocket,
    Protocol::Http,
    Protocol::Rtsp,
    Protocol::Xmpp,
    Protocol::Amqp,
    Protocol::Amqp1,
    Protocol::Ssh,
    Protocol::Postgres,
    Protocol::Mqtt,
    Protocol::Rdp,
    Protocol::Ldap,
    Protocol::Minecraft,
    Protocol::Redis,
    Protocol::Socks4,
];
/// SSLRequest and GSSENCRequest (PostgreSQL's "Message Formats") want an answer before anything else is said, so that
/// what is behind them changes the verdict.
const ASKS_FIRST: [&[u8]; 2] = [&80_877_103_u32.to_be_bytes(), &80_877_104_u32.to_be_bytes()];
const DEFAULT: &str = "@default";

thread_local!(static GUIDE: RefCell<BrokerGuide> = RefCell::new(guide()));

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((&segment, bytes)) = data.split_first() else { return };
    if bytes.get(4..8).is_some_and(|code| ASKS_FIRST.contains(&code)) {
        return;
    }
    GUIDE.with_borrow_mut(|guide| {
        let whole = ask(guide, bytes, [].into_iter());
        let segment = usize::from(segment) + 1;
        assert_eq!(ask(guide, bytes, (segment..bytes.len()).step_by(segment)), whole);
        let (guidance, place) = whole;
        assert!(guidance != Guidance::More || place.is_none());
        let Some(path) = place.as_deref().and_then(|place| place.strip_prefix("/run/")) else { return };
        let parts: Vec<&str> = path.split('/').collect();
        assert!(parts.len() <= 3 && !parts.iter().any(|part| part.is_empty() || part.starts_with('.')), "{path:?}");
    });
});

/// The last answer, and where to.
fn ask(guide: &mut BrokerGuide, bytes: &[u8], cuts: impl Iterator<Item = usize>) -> (Guidance, Option<String>) {
    let names: (SocketAddr, SocketAddr) = (([192, 0, 2, 1], 1).into(), ([192, 0, 2, 2], 443).into());
    let (mut memory, mut chosen) = (Default::default(), Chosen::default());
    let looks = cuts.map(|end| (end, false)).chain([(bytes.len(), false), (bytes.len(), true)]);
    let mut guidance = Guidance::More;
    for (end, last) in looks {
        let shown = Shown { listener: ListenerId(0), names: Some(names), bytes: &bytes[..end], last };
        guidance = guide.guide(&shown, &mut memory, &mut chosen);
        if guidance != Guidance::More {
            break;
        }
    }
    let place = (guidance == Guidance::Found).then(|| match chosen.address {
        Address::Tcp(endpoint) => endpoint.to_string(),
        Address::Unix(path) => String::from_utf8(path).expect("text"),
    });
    (guidance, place)
}

/// A route of each kind. The folder is removed at once: what is mapped stays.
fn guide() -> BrokerGuide {
    let folder = std::env::temp_dir().join(format!("fourtuple-fuzz-{}", std::process::id()));
    let store = Store::open(&folder, true, Some(1 << 24)).expect("a store");
    let (delivery, options) = (Delivery::Relay, Options { proxy: Some(2), ..Options::default() });
    let target = Target::checked("target", "unix:/run/shop").expect("a target");
    let mut batch = Batch::default();
    batch.push(&Service { name: "a.example".into(), target, delivery, wide_port: Some(70_000), options });
    batch.commit(&store, Mode::Set).expect("a service");
    let routes: [(&[(&str, &str)], &str); 9] = [
        (&[("name", "*.pg.example"), ("protocol", "tls")], "unix:/run/pg/{label}"),
        (&[("name", "**.b.example"), ("path", "/x")], "unix:/run/{name}"),
        (&[("name", "**"), ("alpn", "h2")], "tcp:127.0.0.1:2"),
        (&[("user", "*"), ("database", "*")], "unix:/run/{user}/{database}"),
        (&[("database", "postgres")], "tcp:127.0.0.1:3"),
        (&[("client", "*")], "unix:/run/mqtt/{client}"),
        (&[("protocol", "ssh"), ("source", "192.0.2.0/24")], "tcp:127.0.0.1:22"),
        (&[("protocol", "redis"), ("user", "*")], "service:{user}.example"),
        (&[("protocol", "http1"), ("path", "/a/b")], "service:a.example"),
    ];
    let routes = routes.map(|(conditions, to)| {
        let conditions = Conditions::checked(conditions.iter().copied()).expect("conditions");
        let (delivery, options) = (Delivery::Relay, Options::default());
        Route { conditions, to: to.into(), delivery, options }.checked().expect("a route")
    });
    store.add_routes(&routes, false).expect("routes");
    let fallback = Fallback::Target(Target::checked("default", &format!("unix:{DEFAULT}")).expect("a target"));
    let guide = BrokerGuide::new(store, vec![Looking::new(PROTOCOLS, [], Some(fallback))]);
    std::fs::remove_dir_all(folder).expect("a folder of ours");
    guide
}
