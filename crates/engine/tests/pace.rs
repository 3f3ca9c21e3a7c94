//! The pace of rounds on the load core by hand-written scripts: acts that wait, and the closed loop.

mod script;

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use fourtuple_engine::load::{LoadConfig, LoadCore};
use fourtuple_engine::report::{Counter, Phase};
use fourtuple_engine::script::{Act, Script};
use fourtuple_engine::space::{Addresses, Ports, Space};
use fourtuple_engine::{Command, Core, Event, Order, SourceChoice, Transport};
use proptest::prelude::*;
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

fn say(text: &str) -> Act {
    Act::Say(text.as_bytes().to_vec())
}

fn expect(text: &str) -> Act {
    Act::Expect(text.as_bytes().to_vec())
}

fn wait(ms: u64) -> Act {
    Act::Wait(Duration::from_millis(ms))
}

/// A core with so many connections, and what they say first, as (connection, bytes).
fn held<C: Core>(core: C, count: u32) -> (Played<C>, Vec<(u32, Vec<u8>)>) {
    let mut played = Played::start(core, 64);
    let mut commands = played.commands();
    let (mut index, mut said) = (0, Vec::new());
    while let Some(place) = commands.iter().position(|command| matches!(command, Command::Connect { .. })) {
        let Command::Connect { ticket, .. } = commands.remove(place) else { unreachable!("it is one") };
        commands.extend(played.tell(Event::Connected { ticket, conn: conn(index) }));
        index += 1;
    }
    assert_eq!(index, count);
    said.extend(words(&mut played, commands));
    (played, said)
}

fn words<C: Core>(played: &mut Played<C>, commands: Vec<Command>) -> Vec<(u32, Vec<u8>)> {
    let mut said = Vec::new();
    for command in commands {
        if let Command::Send { conn, .. } = &command {
            let index = conn.index;
            said.push((index, played.sent_bytes(vec![command]).remove(0)));
        }
    }
    said
}

fn sent<C: Core>(played: &mut Played<C>, index: u32) -> Vec<(u32, Vec<u8>)> {
    let commands = played.tell(Event::Sent { conn: conn(index) });
    words(played, commands)
}

fn hear<C: Core>(played: &mut Played<C>, index: u32, bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let commands = played.receive(conn(index), bytes);
    words(played, commands)
}

fn pass<C: Core>(played: &mut Played<C>, ms: u64) -> Vec<(u32, Vec<u8>)> {
    let commands = played.wait_ms(ms);
    words(played, commands)
}

fn playing(connections: u64, opening: Vec<Act>, round: Vec<Act>) -> LoadCore<Script> {
    let config = LoadConfig { connections, ..config(Transport::Stream) };
    LoadCore::playing(config, Script::new(opening, round).expect("a script"))
}

fn count<C: Core>(played: &Played<C>, counter: Counter) -> u64 {
    played.core.report().count(counter)
}

#[test]
fn a_wait_is_no_part_of_the_answer_nor_of_its_deadline() {
    let (mut played, _) = held(playing(1, vec![], vec![say("a"), expect("1"), wait(200), say("b"), expect("2")]), 1);
    let commands = played.order(Order::Ping);
    assert_eq!(words(&mut played, commands), [(0, b"a".to_vec())]);
    sent(&mut played, 0);
    assert!(hear(&mut played, 0, b"1").is_empty());
    assert!(pass(&mut played, 199).is_empty());
    assert_eq!((count(&played, Counter::PingsMissing), played.core.report().phase), (0, Phase::Pinging));
    assert_eq!(pass(&mut played, 1), [(0, b"b".to_vec())]);
    sent(&mut played, 0);
    played.now.0 += 500;
    hear(&mut played, 0, b"2");
    assert_eq!((count(&played, Counter::PingsRight), played.core.report().phase), (1, Phase::Holding));
    assert_eq!(played.core.report().echo_ns.max(), 500);
}

#[test]
fn who_thinks_has_no_place_in_a_window() {
    // The window of rounds is two, that of openings four.
    let (mut played, said) = held(playing(9, vec![wait(30), say("o")], vec![wait(30), say("r"), expect("1")]), 9);
    assert!(said.is_empty() && played.core.report().phase == Phase::Ramping);
    let (mut spoke, mut said) = (Vec::new(), pass(&mut played, 30));
    assert_eq!(said.len(), 4, "so many openings at once");
    while !said.is_empty() {
        let (index, word) = said.remove(0);
        assert_eq!(word, b"o");
        spoke.push(index);
        said.extend(sent(&mut played, index));
    }
    assert_eq!((spoke, played.core.report().phase), ((0..9).collect(), Phase::Holding));
    played.order(Order::Ping);
    for _ in 0..5 {
        pass(&mut played, 0);
    }
    assert_eq!(count(&played, Counter::PingsSent), 9, "all of them think at once");
    let mut at_once = pass(&mut played, 30);
    while let Some((index, word)) = at_once.pop() {
        assert!(at_once.len() < 2, "and two at once speak");
        assert_eq!(word, b"r");
        sent(&mut played, index);
        at_once.extend(hear(&mut played, index, b"1"));
    }
    assert_eq!(count(&played, Counter::PingsRight), 9);
}

#[test]
fn what_comes_to_who_thinks_is_wrong_and_an_end_ends_it() {
    for ends in [true, false] {
        let (mut played, _) = held(playing(1, vec![], vec![wait(30), say("r")]), 1);
        played.order(Order::Ping);
        if ends {
            played.tell(Event::Finished { conn: conn(0), gone: false });
            played.tell(Event::Closed { conn: conn(0) });
        } else {
            hear(&mut played, 0, b"?");
        }
        assert!(pass(&mut played, 30).is_empty());
        assert_eq!(
            (count(&played, Counter::PingsWrong), played.core.report().phase),
            (u64::from(!ends), Phase::Holding)
        );
    }
}

#[test]
fn a_late_part_waits_for_nothing() {
    let (mut played, _) = held(playing(1, vec![], vec![say("a"), expect("1"), wait(200), say("b"), expect("2")]), 1);
    let commands = played.order(Order::Ping);
    words(&mut played, commands);
    sent(&mut played, 0);
    pass(&mut played, 50);
    assert_eq!(count(&played, Counter::PingsMissing), 1);
    assert_eq!(hear(&mut played, 0, b"1"), [(0, b"b".to_vec())]);
}

#[test]
fn in_a_closed_loop_each_goes_on_by_itself() {
    let config = LoadConfig { connections: 3, closed_loop: true, ping_window: 2, ..config(Transport::Stream) };
    let (mut played, _) = held(LoadCore::new(config), 3);
    assert!(pass(&mut played, 100).is_empty(), "not before it is asked to");
    let commands = played.order(Order::Ping);
    let mut out = words(&mut played, commands);
    let mut rounds = [0; 3];
    for _ in 0..60 {
        assert!(out.len() <= 2, "the window bounds it");
        let (index, token) = out.remove(0);
        rounds[index as usize] += 1;
        out.extend(sent(&mut played, index));
        out.extend(hear(&mut played, index, &token));
        out.extend(pass(&mut played, 0));
    }
    assert_eq!((rounds, count(&played, Counter::PingsRight)), ([20, 20, 20], 60));
    assert_eq!(count(&played, Counter::PingsSent), 62, "two are out");
    played.order(Order::Close);
    assert!(pass(&mut played, 0).is_empty());
}

#[test]
fn in_a_closed_loop_one_that_stands_later_joins_in() {
    let config = LoadConfig { closed_loop: true, ..config(Transport::Stream) };
    let (mut played, _) = held(LoadCore::new(config), 1);
    let commands = played.order(Order::Ping);
    words(&mut played, commands);
    let commands = played.order(Order::Target(2));
    let [Command::Connect { ticket, .. }] = commands[..] else { panic!("{commands:?}") };
    let commands = played.tell(Event::Connected { ticket, conn: conn(7) });
    let mut said = words(&mut played, commands);
    said.extend(pass(&mut played, 0));
    assert_eq!(said.iter().map(|row| row.0).collect::<Vec<_>>(), [7]);
}

proptest! {
    /// Whatever waits a script has, each connection speaks when its own waits are over, and not before.
    #[test]
    fn each_wait_is_as_long_as_it_says(
        waits in prop::collection::vec(1u64..40, 1..6), starts in prop::collection::vec(0u64..60, 1..4)
    ) {
        let round = waits.iter().map(|&ms| wait(ms)).chain([say("x")]).collect();
        let (mut played, _) = held(playing(starts.len() as u64, vec![], round), starts.len() as u32);
        // One after the other begins, by a round for each that is awake: here all of them, in one round.
        let (mut begun, total) = (0, waits.iter().sum::<u64>());
        for pause in starts {
            begun += pause;
            prop_assert!(pass(&mut played, pause).is_empty());
        }
        played.order(Order::Ping);
        for _ in 0..3 {
            pass(&mut played, 0);
        }
        let mut spoke = 0;
        for ms in 1..=total {
            let mut said = pass(&mut played, 1);
            while let Some((index, _)) = said.pop() {
                prop_assert_eq!(ms, total, "{} ms after {}", ms, begun);
                spoke += 1;
                said.extend(sent(&mut played, index));
            }
        }
        prop_assert_eq!(spoke, count(&played, Counter::PingsSent));
        prop_assert_eq!(spoke, count(&played, Counter::PingsRight));
    }
}
