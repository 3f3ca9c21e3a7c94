//! The echo core by hand-written scripts.

mod script;

use std::net::{Ipv4Addr, SocketAddr};

use fourtuple_engine::echo::{EchoConfig, EchoCore};
use fourtuple_engine::report::{Counter, Phase};
use fourtuple_engine::{Command, Core, Errno, Event, ListenerId, Order, Step};
use script::{Played, conn};

fn endpoint(port: u16) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)
}

fn config(listeners: u32) -> EchoConfig {
    let listen = (0..listeners).map(|listener| endpoint(listener as u16)).collect();
    EchoConfig { listen, backlog: 16, reuse_port: false, most_connections: 0, accept: true }
}

/// A core that listens on one port and has accepted connection 0.
fn serving(config: EchoConfig) -> Played<EchoCore> {
    let mut played = Played::start(EchoCore::new(config), 8);
    let listener = ListenerId(0);
    played.tell(Event::Listening { listener, local: endpoint(4000) });
    played.tell(Event::Accepted { listener, conn: conn(0), peer: None });
    played.commands();
    played
}

fn count(played: &Played<EchoCore>, counter: Counter) -> u64 {
    played.core.report().count(counter)
}

#[test]
fn listening_65_600_comes_in_bursts_and_each_serves() {
    let mut played = Played::start(EchoCore::new(config(65_600)), 8);
    let mut commands = played.commands();
    let mut made = 0;
    while let Some(command) = commands.pop() {
        let Command::Listen { listener, local, accept: true, .. } = command else { panic!("{command:?}") };
        assert!(commands.len() < 256, "a bounded number under way");
        // The full check walks all bits: too slow for every one of 65,600 steps, so the core is driven directly.
        played.core.handle(Event::Listening { listener, local }, played.now, &mut played.outbox);
        commands.append(&mut played.outbox.commands);
        made += 1;
        played.core.handle(
            Event::Accepted { listener, conn: conn(listener.0), peer: None },
            played.now,
            &mut played.outbox,
        );
    }
    assert_eq!(
        (made, count(&played, Counter::Listening), played.core.report().listeners_served),
        (65_600, 65_600, 65_600)
    );
    assert_eq!(played.core.report().phase, Phase::Holding);
    assert_eq!(played.core.check_invariants(), Ok(()));
}

#[test]
fn listening_where_nothing_can_be_is_done_and_named() {
    let mut played = Played::start(EchoCore::new(config(1)), 8);
    assert_eq!(played.core.report().phase, Phase::Ramping);
    let (listener, step, error) = (ListenerId(0), Step::Bind, Errno::EADDRINUSE);
    played.tell(Event::ListenFailed { listener, step, error });
    assert!(played.core.is_done());
    assert_eq!(played.core.report().stopped_by, Some((step, error)));
}

#[test]
fn open_received_is_sent_back_in_its_own_buffer() {
    let mut played = serving(config(1));
    assert_eq!(played.core.report().listening_at, Some(endpoint(4000)));
    let commands = played.receive(conn(0), b"hello");
    assert_eq!(played.outbox.buffers.in_use(), 1, "no copy was made");
    assert_eq!(played.sent_bytes(commands), [b"hello"]);
    played.tell(Event::Sent { conn: conn(0) });
    assert_eq!((count(&played, Counter::BytesIn), count(&played, Counter::BytesOut)), (5, 5));
}

#[test]
fn sending_queues_pauses_and_resumes_in_order() {
    let mut played = serving(config(1));
    let mut out = Vec::new();
    let first = played.receive(conn(0), b"1");
    out.extend(played.sent_bytes(first));
    assert!(played.receive(conn(0), b"2").is_empty());
    assert!(matches!(played.receive(conn(0), b"3")[..], [Command::Pause { .. }]));
    assert!(played.receive(conn(0), b"4").is_empty(), "what was on its way still comes, and is not paused twice");
    for left in (0..4).rev() {
        let commands = played.tell(Event::Sent { conn: conn(0) });
        assert_eq!(commands.iter().any(|command| matches!(command, Command::Resume { .. })), left == 0);
        out.extend(played.sent_bytes(commands));
    }
    assert_eq!(out.concat(), b"1234");
    assert_eq!((count(&played, Counter::Pauses), played.outbox.buffers.in_use()), (1, 0));
}

#[test]
fn sending_finished_flushes_before_it_closes() {
    let mut played = serving(config(1));
    let first = played.receive(conn(0), b"1");
    played.sent_bytes(first);
    played.receive(conn(0), b"2");
    assert!(played.tell(Event::Finished { conn: conn(0), gone: false }).is_empty());
    let second = played.tell(Event::Sent { conn: conn(0) });
    assert_eq!(played.sent_bytes(second), [b"2"]);
    assert!(matches!(played.tell(Event::Sent { conn: conn(0) })[..], [Command::Close { abort: false, .. }]));
    played.tell(Event::Closed { conn: conn(0) });
    assert_eq!((count(&played, Counter::ClosedByPeer), count(&played, Counter::Open)), (1, 0));
}

#[test]
fn sending_failed_releases_what_waits() {
    let mut played = serving(config(1));
    let first = played.receive(conn(0), b"1");
    played.sent_bytes(first);
    played.receive(conn(0), b"2");
    let commands = played.tell(Event::Failed { conn: conn(0), step: Step::Send, error: Errno::ECONNRESET });
    assert!(matches!(commands[..], [Command::Close { .. }]));
    assert_eq!((count(&played, Counter::Broken), played.outbox.buffers.in_use()), (1, 0));
    assert!(played.receive(conn(0), b"late").is_empty());
    assert_eq!(played.outbox.buffers.in_use(), 0);
}

#[test]
fn open_more_than_allowed_are_closed_at_once() {
    let mut played = serving(EchoConfig { most_connections: 1, ..config(1) });
    let extra = played.tell(Event::Accepted { listener: ListenerId(0), conn: conn(1), peer: None });
    assert!(matches!(extra[..], [Command::Close { abort: true, .. }]));
    assert_eq!((count(&played, Counter::Accepted), count(&played, Counter::ClosedByUs)), (2, 1));
    played.tell(Event::Closed { conn: conn(1) });
    assert!(
        played.tell(Event::Accepted { listener: ListenerId(0), conn: conn(1), peer: None }).len() == 1,
        "one is still open"
    );
}

#[test]
fn open_order_close_ends_listeners_and_connections() {
    let mut played = serving(config(1));
    let commands = played.order(Order::Close);
    assert!(matches!(commands[..], [Command::Unlisten { .. }, Command::Close { abort: false, .. }]));
    let late = played.tell(Event::Accepted { listener: ListenerId(0), conn: conn(1), peer: None });
    assert!(matches!(late[..], [Command::Close { .. }]), "accepted while the order came");
    while played.core.poll_timeout().is_some() {
        played.wait_ms(0);
    }
    [0, 1].into_iter().for_each(|index| drop(played.tell(Event::Closed { conn: conn(index) })));
    assert!(played.core.is_done());
}

#[test]
fn accept_errors_are_counted_and_nothing_else() {
    let mut played = serving(config(1));
    assert!(played.tell(Event::AcceptFailed { listener: ListenerId(0), error: Errno::EMFILE }).is_empty());
    assert_eq!(count(&played, Counter::AcceptFailed), 1);
    assert_eq!(played.core.report().failures[0].error, Errno::EMFILE);
}
