//! Datagrams on the load core by hand-written scripts: what a round makes of each thing that may come, or not.

mod script;

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use fourtuple_engine::load::{LoadConfig, LoadCore};
use fourtuple_engine::report::{Counter, Phase};
use fourtuple_engine::script::{Act, Script};
use fourtuple_engine::space::{Addresses, Ports, Space};
use fourtuple_engine::{Command, Core, Errno, Event, Order, SourceChoice, Step, Transport};
use script::{Played, conn};

fn config(transport: Transport) -> LoadConfig {
    let addresses = vec![Addresses { first: IpAddr::V4(Ipv4Addr::LOCALHOST), count: 1 }];
    LoadConfig {
        transport,
        space: Space {
            sources: addresses.clone(),
            source_ports: vec![Ports { first: 1000, last: 60_000 }],
            destinations: addresses,
            destination_ports: vec![Ports { first: 80, last: 80 }],
        },
        first: 0,
        stride: 1,
        connections: 1,
        choice: SourceChoice::Bind,
        window: 4,
        rate_per_s: 0,
        connect_timeout: Duration::from_millis(100),
        ping_timeout: Duration::from_millis(50),
        ping_window: 2,
        token_bytes: 24,
        seed: 9,
        ping_every: Duration::ZERO,
        closed_loop: false,
        give_up_after: 3,
        abort_on_close: true,
        keep_fill_curve: false,
    }
}

fn flow<C: Core>(core: C) -> Played<C> {
    let mut played = Played::start(core, 8);
    let commands = played.commands();
    let [Command::Connect { ticket, transport: Transport::Datagram, .. }] = commands[..] else {
        panic!("{commands:?}")
    };
    played.tell(Event::Connected { ticket, conn: conn(0) });
    played
}

fn tokens() -> Played<LoadCore> {
    flow(LoadCore::new(config(Transport::Datagram)))
}

fn dialogue(round: Vec<Act>) -> Played<LoadCore<Script>> {
    flow(LoadCore::playing(config(Transport::Datagram), Script::new(Vec::new(), round).expect("a script")))
}

/// Begin a round; what it says, which is sent at once.
fn round<C: Core>(played: &mut Played<C>) -> Vec<u8> {
    let commands = played.order(Order::Ping);
    let said = played.sent_bytes(commands).remove(0);
    played.tell(Event::Sent { conn: conn(0) });
    said
}

fn counts<C: Core>(played: &Played<C>) -> [u64; 5] {
    let counters =
        [Counter::PingsRight, Counter::PingsWrong, Counter::PingsMissing, Counter::PingsRefused, Counter::Strays];
    counters.map(|counter| played.core.report().count(counter))
}

#[test]
fn a_token_comes_back_whole_or_is_a_stray() {
    let mut played = tokens();
    let said = round(&mut played);
    for other in [&said[..20], &[], b"other bytes", &[&said[..], b"!"].concat()] {
        played.receive(conn(0), other);
    }
    assert_eq!(counts(&played), [0, 0, 0, 0, 4], "a stray ends no round");
    played.receive(conn(0), &said);
    assert_eq!(counts(&played), [1, 0, 0, 0, 4]);
    played.receive(conn(0), &said);
    assert_eq!(counts(&played), [1, 0, 0, 0, 5], "doubled");
    assert_eq!(played.core.report().phase, Phase::Holding);
}

#[test]
fn without_its_answer_a_round_is_missing_and_the_next_goes_on() {
    let mut played = tokens();
    let first = round(&mut played);
    played.wait_ms(50);
    assert_eq!(counts(&played), [0, 0, 1, 0, 0]);
    let second = round(&mut played);
    assert_ne!(first, second, "each round has a token of its own");
    played.receive(conn(0), &first);
    assert_eq!(counts(&played), [0, 0, 1, 0, 1], "late is late, and not the answer");
    played.receive(conn(0), &second);
    assert_eq!(counts(&played), [1, 0, 1, 0, 1]);
}

#[test]
fn with_other_bytes_only_a_round_is_wrong_and_the_next_goes_on() {
    let mut played = tokens();
    let mut said = round(&mut played);
    said[23] ^= 1;
    played.receive(conn(0), &said);
    played.wait_ms(50);
    assert_eq!(counts(&played), [0, 1, 0, 0, 1]);
    let said = round(&mut played);
    played.receive(conn(0), &said);
    assert_eq!(counts(&played), [1, 1, 0, 0, 1]);
    round(&mut played);
    played.tell(Event::Disturbed { conn: conn(0), step: Step::Receive, error: Errno::EMSGSIZE });
    played.wait_ms(50);
    assert_eq!(counts(&played), [1, 2, 0, 0, 1], "cut is wrong as well");
}

#[test]
fn icmp_refuses_the_round_and_the_flow_lives_on() {
    let mut played = tokens();
    let refused = |step| Event::Disturbed { conn: conn(0), step, error: Errno::ECONNREFUSED };
    round(&mut played);
    assert!(played.tell(refused(Step::Receive)).is_empty(), "nothing is closed");
    assert_eq!(counts(&played), [0, 0, 0, 1, 0]);
    let said = round(&mut played);
    played.tell(refused(Step::Send));
    assert_eq!(counts(&played), [0, 0, 0, 1, 0], "at a send it is about an earlier one");
    played.receive(conn(0), &said);
    assert_eq!(counts(&played), [1, 0, 0, 1, 0]);
    let failures = &played.core.report().failures;
    assert_eq!(
        failures.iter().map(|row| (row.step, row.error, row.count)).collect::<Vec<_>>(),
        [(Step::Receive, Errno::ECONNREFUSED, 1), (Step::Send, Errno::ECONNREFUSED, 1),]
    );
    played.tell(refused(Step::Receive));
    assert_eq!(counts(&played), [1, 0, 0, 1, 0], "between rounds it refuses none");
}

#[test]
fn a_lost_round_that_is_still_being_sent_waits_for_that_only() {
    let mut played = tokens();
    let commands = played.order(Order::Ping);
    played.sent_bytes(commands);
    played.wait_ms(50);
    assert_eq!(counts(&played), [0, 0, 1, 0, 0]);
    assert!(played.order(Order::Ping).is_empty(), "one send at a time");
    played.tell(Event::Sent { conn: conn(0) });
    assert_eq!(round(&mut played).len(), 24);
}

#[test]
fn acts_share_a_datagram_and_end_in_it() {
    let acts = || vec![Act::Say(b"q".to_vec()), Act::Expect(b"ab".to_vec()), Act::Skip(1), Act::Rest];
    let (right, wrong, missing) = ([1, 0, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0]);
    for (datagram, end) in [
        (&b"abc"[..], right),
        (b"abcdefgh", right),
        // The next act begins in the next datagram, which does not come.
        (b"ab", missing),
        (b"a", wrong),
        (b"xbc", wrong),
        (b"", wrong),
    ] {
        let mut played = dialogue(acts());
        assert_eq!(round(&mut played), b"q");
        played.receive(conn(0), datagram);
        played.wait_ms(50);
        assert_eq!(counts(&played), end, "{datagram:?}");
    }
    let mut played = dialogue(vec![Act::Say(b"q".to_vec()), Act::Rest, Act::Expect(b"2".to_vec())]);
    round(&mut played);
    for part in [&b""[..], b"3", b"2"] {
        played.receive(conn(0), part);
    }
    assert_eq!(counts(&played), [1, 0, 0, 0, 1], "what follows the rest is in the next datagram");
}
