//! Dialogues on the load core by hand-written scripts: one test per row of LIFECYCLE.md that only a dialogue reaches.

mod script;

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use fourtuple_engine::load::{LoadConfig, LoadCore};
use fourtuple_engine::report::{Counter, Phase};
use fourtuple_engine::script::{Act, Script};
use fourtuple_engine::space::{Addresses, Ports, Space};
use fourtuple_engine::{Command, ConnId, Core, Errno, Event, Order, SourceChoice, Step, Transport};
use script::{Played, conn};

type Playing = Played<LoadCore<Script>>;

fn config(connections: u64) -> LoadConfig {
    let addresses = vec![Addresses { first: IpAddr::V4(Ipv4Addr::LOCALHOST), count: 1 }];
    LoadConfig {
        transport: Transport::Stream,
        space: Space {
            sources: addresses.clone(),
            source_ports: vec![Ports { first: 1000, last: 60_000 }],
            destinations: addresses,
            destination_ports: vec![Ports { first: 80, last: 80 }],
        },
        first: 0,
        stride: 1,
        connections,
        choice: SourceChoice::KernelPort,
        window: 4,
        rate_per_s: 0,
        connect_timeout: Duration::from_millis(100),
        ping_timeout: Duration::from_millis(50),
        ping_window: 8,
        token_bytes: 16,
        seed: 0,
        ping_every: Duration::ZERO,
        closed_loop: false,
        give_up_after: 3,
        abort_on_close: false,
        keep_fill_curve: false,
    }
}

fn say(text: &str) -> Act {
    Act::Say(text.as_bytes().to_vec())
}

fn expect(text: &str) -> Act {
    Act::Expect(text.as_bytes().to_vec())
}

/// A core with one connection, the script played as far as the connection's coming.
fn connected(opening: Vec<Act>, round: Vec<Act>, send_buffers: u32) -> (Playing, Vec<Vec<u8>>) {
    let script = Script::new(opening, round).expect("a script");
    let mut played = Played::start(LoadCore::playing(config(1), script), send_buffers);
    let said = connect(&mut played, 0);
    (played, said)
}

fn tickets(commands: &[Command]) -> Vec<u32> {
    let ticket = |command: &Command| match command {
        Command::Connect { ticket, .. } => Some(*ticket),
        _ => None,
    };
    commands.iter().filter_map(ticket).collect()
}

fn connect(played: &mut Playing, index: u32) -> Vec<Vec<u8>> {
    let ticket = tickets(&played.commands())[0];
    let commands = played.tell(Event::Connected { ticket, conn: conn(index) });
    played.sent_bytes(commands)
}

fn hear(played: &mut Playing, bytes: &[u8]) -> Vec<Vec<u8>> {
    let commands = played.receive(conn(0), bytes);
    played.sent_bytes(commands)
}

fn sent(played: &mut Playing) -> Vec<Vec<u8>> {
    let commands = played.tell(Event::Sent { conn: conn(0) });
    played.sent_bytes(commands)
}

fn order_ping(played: &mut Playing) -> Vec<Vec<u8>> {
    let commands = played.order(Order::Ping);
    played.sent_bytes(commands)
}

fn count(played: &Playing, counter: Counter) -> u64 {
    played.core.report().count(counter)
}

#[test]
fn an_opening_comes_first_and_only_once() {
    let (mut played, said) = connected(vec![say("hello"), expect("hi")], vec![say("ping"), expect("pong")], 8);
    assert_eq!(said, [b"hello"]);
    assert_eq!(played.core.report().phase, Phase::Ramping, "not ready before its opening is over");
    sent(&mut played);
    hear(&mut played, b"h");
    hear(&mut played, b"i");
    assert_eq!((played.core.report().phase, count(&played, Counter::OpeningsRight)), (Phase::Holding, 1));
    for round in 1..=3 {
        assert_eq!(order_ping(&mut played), [b"ping"]);
        sent(&mut played);
        hear(&mut played, b"pong");
        assert_eq!((count(&played, Counter::PingsRight), count(&played, Counter::PingsWrong)), (round, 0));
    }
    assert_eq!(played.core.report().echo_ns.count(), 3);
}

#[test]
fn the_next_word_waits_for_the_last_to_be_sent() {
    let (mut played, _) = connected(vec![], vec![say("a"), expect("1"), say("b"), expect("2")], 8);
    assert_eq!(order_ping(&mut played), [b"a"]);
    assert!(hear(&mut played, b"1").is_empty(), "one send at a time");
    assert_eq!(sent(&mut played), [b"b"]);
    hear(&mut played, b"2");
    assert_eq!(count(&played, Counter::PingsRight), 1, "the answer overtook the news");
    assert!(order_ping(&mut played).is_empty(), "not before it is sent");
    sent(&mut played);
    assert_eq!(order_ping(&mut played), [b"a"]);
}

#[test]
fn a_refused_round_is_counted_apart_and_the_next_goes_on() {
    let (mut played, _) = connected(vec![], vec![say("GET"), Act::Response(200, 399)], 8);
    for (response, right, refused) in [
        ("HTTP/1.1 503 No\r\nContent-Length: 1\r\n\r\n!", 0, 1),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 1, 1),
    ] {
        order_ping(&mut played);
        sent(&mut played);
        for part in response.as_bytes().chunks(5) {
            hear(&mut played, part);
        }
        assert_eq!((count(&played, Counter::PingsRight), count(&played, Counter::PingsRefused)), (right, refused));
    }
}

#[test]
fn a_failed_opening_ends_the_connection_and_is_named() {
    let opening = || vec![say("hello"), Act::Upgrade(vec![b'='; 28])];
    let rows = [
        ("HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", "refused"),
        ("HTTP/1.1 101 Yes\r\nSec-WebSocket-Accept: other\r\n\r\n", "accept"),
        ("garbage", "wrong"),
    ];
    for (answer, reason) in rows {
        let (mut played, _) = connected(opening(), vec![say("ping"), expect("pong")], 8);
        sent(&mut played);
        assert_eq!(count(&played, Counter::Openings), 1);
        let closes = answer.as_bytes().chunks(9).flat_map(|part| played.receive(conn(0), part)).collect::<Vec<_>>();
        assert!(matches!(closes[..], [Command::Close { .. }]), "{closes:?}");
        assert_eq!((count(&played, Counter::OpeningsFailed), count(&played, Counter::OpeningsRight)), (1, 0));
        assert_eq!(played.core.report().opening_reasons, [(reason, 1)]);
        assert_eq!((played.core.report().phase, count(&played, Counter::Openings)), (Phase::Holding, 0));
        assert!(order_ping(&mut played).is_empty(), "nothing more is asked of it");
    }
    let (mut played, _) = connected(opening(), vec![say("ping")], 8);
    assert!(played.wait_ms(99).is_empty());
    assert_eq!(count(&played, Counter::OpeningsFailed), 0);
    assert!(matches!(played.wait_ms(1)[..], [Command::Close { .. }]));
    assert_eq!((count(&played, Counter::OpeningsFailed), played.core.report().phase), (1, Phase::Holding));
    assert_eq!(played.core.report().opening_reasons, [("late", 1)]);
    sent(&mut played);
    assert!(hear(&mut played, b"HTTP/1.1 101 Late\r\n\r\n").is_empty());
}

#[test]
fn openings_take_places_in_the_window() {
    let script = Script::new(vec![say("hello"), expect("hi")], vec![]).expect("a script");
    let mut played = Played::start(LoadCore::playing(config(100), script), 8);
    let asked = tickets(&played.commands());
    assert_eq!(asked.len(), 4);
    for (index, ticket) in (0..).zip(asked) {
        let commands = played.tell(Event::Connected { ticket, conn: conn(index) });
        assert_eq!(commands.iter().filter(|command| matches!(command, Command::Connect { .. })).count(), 0);
        assert_eq!(played.sent_bytes(commands), [b"hello"]);
    }
    played.tell(Event::Sent { conn: conn(2) });
    let commands = played.receive(conn(2), b"hi");
    assert!(matches!(commands[..], [Command::Connect { .. }]), "one is ready, one more begins");
}

#[test]
fn who_finds_no_buffer_speaks_later() {
    let (mut played, said) = connected(vec![say("hello"), expect("hi")], vec![], 0);
    assert!(said.is_empty());
    assert!(count(&played, Counter::BufferWaits) > 0);
    let spare = Played::start(LoadCore::playing(config(0), Script::new(vec![], vec![]).expect("empty")), 8).outbox;
    played.outbox = spare;
    let commands = played.wait_ms(1);
    assert_eq!(played.sent_bytes(commands), [b"hello"]);
}

#[test]
fn a_server_that_pings_is_answered_between_rounds_and_in_one() {
    let (mut played, _) = connected(vec![], vec![say("\u{1}"), Act::Pong(b"me".to_vec())], 8);
    assert_eq!(hear(&mut played, b"\x89\x02ab"), [b"\x8a\x82\0\0\0\0ab"]);
    sent(&mut played);
    order_ping(&mut played);
    assert!(hear(&mut played, b"\x89\x01x\x81\x03one").is_empty(), "our own is not sent yet");
    assert_eq!(sent(&mut played), [b"\x8a\x81\0\0\0\0x"]);
    sent(&mut played);
    hear(&mut played, b"\x8a\x02me");
    assert_eq!((count(&played, Counter::PingsRight), count(&played, Counter::PingsWrong)), (1, 0));
    hear(&mut played, b"\x88\x00");
    assert_eq!(count(&played, Counter::PingsWrong), 1, "the server ends the dialogue");
}

#[test]
fn an_end_in_the_middle_fails_an_opening_and_leaves_a_round_open() {
    for opening in [true, false] {
        let acts = vec![say("a"), expect("1")];
        let (mut played, _) = if opening { connected(acts, vec![], 8) } else { connected(vec![], acts, 8) };
        order_ping(&mut played);
        let failed = Event::Failed { conn: conn(0), step: Step::Receive, error: Errno::ECONNRESET };
        assert!(matches!(played.tell(failed)[..], [Command::Close { abort: true, .. }]));
        assert!(played.receive(conn(0), b"1").is_empty());
        played.tell(Event::Closed { conn: conn(0) });
        let counted = [Counter::OpeningsRight, Counter::PingsRight, Counter::PingsWrong];
        assert!(counted.into_iter().all(|counter| count(&played, counter) == 0));
        let reasons = if opening { &[("broke", 1)][..] } else { &[] };
        assert_eq!(played.core.report().opening_reasons, reasons);
        assert_eq!(played.core.report().phase, Phase::Holding);
    }
}

#[test]
fn a_target_walks_a_used_up_space_again() {
    let (mut played, _) = connected(vec![], vec![], 8);
    let mut asked = tickets(&played.order(Order::Target(2)));
    assert_eq!(asked.len(), 1);
    while let Some(ticket) = asked.pop() {
        let refused = Event::ConnectFailed { ticket, step: Step::Connect, error: Errno::EADDRNOTAVAIL };
        asked = tickets(&played.tell(refused));
    }
    played.tell(Event::Finished { conn: conn(0), gone: false });
    played.tell(Event::Closed { conn: ConnId { index: 0, generation: 1 } });
    assert_eq!(tickets(&played.order(Order::Target(1))).len(), 1, "its port is free again");
}
