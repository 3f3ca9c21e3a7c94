//! The load core by hand-written scripts: one test per row of LIFECYCLE.md that the simulator reaches only by chance.

mod script;

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use fourtuple_engine::load::{LoadConfig, LoadCore};
use fourtuple_engine::report::{Counter, Phase};
use fourtuple_engine::space::{Addresses, Ports, Space};
use fourtuple_engine::{Command, ConnId, Core, Errno, Event, Order, SourceChoice, Step, Transport};
use script::{Played, conn};

fn config(connections: u64) -> LoadConfig {
    let addresses = |last| vec![Addresses { first: IpAddr::V4(Ipv4Addr::new(127, 0, 0, last)), count: 1 }];
    LoadConfig {
        transport: Transport::Stream,
        space: Space {
            sources: addresses(1),
            source_ports: vec![Ports { first: 1000, last: 60_000 }],
            destinations: addresses(2),
            destination_ports: vec![Ports { first: 80, last: 80 }],
        },
        first: 0,
        stride: 1,
        connections,
        choice: SourceChoice::SinglePort,
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

fn tickets(commands: &[Command]) -> Vec<u32> {
    let ticket = |command: &Command| match command {
        Command::Connect { ticket, .. } => Some(*ticket),
        _ => None,
    };
    commands.iter().filter_map(ticket).collect()
}

fn closes(commands: &[Command]) -> usize {
    commands.iter().filter(|command| matches!(command, Command::Close { .. })).count()
}

/// A core that holds `count` connections, indices from 0.
fn holding(config: LoadConfig, count: u32, send_buffers: u32) -> Played<LoadCore> {
    let mut played = Played::start(LoadCore::new(config), send_buffers);
    let mut commands = played.commands();
    let mut index = 0;
    while index < count {
        let asked = tickets(&commands);
        assert!(!asked.is_empty(), "the core wants {count}");
        commands.clear();
        for ticket in asked {
            commands.extend(played.tell(Event::Connected { ticket, conn: conn(index) }));
            index += 1;
        }
    }
    played
}

fn count(played: &Played<LoadCore>, counter: Counter) -> u64 {
    played.core.report().count(counter)
}

#[test]
fn ramping_window_bounds_attempts_under_way() {
    let mut played = Played::start(LoadCore::new(config(10)), 8);
    let first = tickets(&played.commands());
    assert_eq!(first.len(), 4);
    let next = tickets(&played.tell(Event::Connected { ticket: first[0], conn: conn(0) }));
    assert_eq!(next.len(), 1, "one answered, one more");
    assert_ne!(next[0], first[0], "a ticket is not used again at once");
    assert!(
        played.tell(Event::ConnectFailed { ticket: first[0], step: Step::Connect, error: Errno::EMFILE }).is_empty()
    );
    assert_eq!(count(&played, Counter::ConnectFailed), 0, "a stale answer hits nobody");
}

#[test]
fn ramping_rate_spreads_attempts() {
    let mut played = Played::start(LoadCore::new(LoadConfig { rate_per_s: 100, window: 1000, ..config(1000) }), 8);
    let mut attempts = tickets(&played.commands()).len();
    for _ in 0..1000 {
        attempts += tickets(&played.wait_ms(1)).len();
    }
    assert!((100..=103).contains(&attempts), "{attempts} in a second at 100 per second");
    played.order(Order::Rate(0));
    assert_eq!(count(&played, Counter::Attempted), 1000, "0 is as fast as possible");
}

#[test]
fn ramping_timeout_cancels_and_counts_etimedout() {
    let mut played = Played::start(LoadCore::new(config(1)), 8);
    let ticket = tickets(&played.commands())[0];
    assert!(played.wait_ms(99).is_empty());
    assert!(matches!(played.wait_ms(1)[..], [Command::CancelConnect { ticket: cancelled }] if cancelled == ticket));
    let again = played.tell(Event::ConnectFailed { ticket, step: Step::Connect, error: Errno::ECANCELED });
    assert_eq!(tickets(&again).len(), 1, "the next tuple is tried");
    let failure = played.core.report().failures[0];
    assert_eq!((failure.step, failure.error, failure.count), (Step::Connect, Errno::ETIMEDOUT, 1));
}

#[test]
fn ramping_busy_tuples_never_make_it_give_up() {
    let mut played = Played::start(LoadCore::new(config(1)), 8);
    let mut asked = tickets(&played.commands());
    for _ in 0..100 {
        let busy = Event::ConnectFailed { ticket: asked[0], step: Step::Connect, error: Errno::EADDRNOTAVAIL };
        asked = tickets(&played.tell(busy));
        assert_eq!(asked.len(), 1);
    }
    assert_eq!((count(&played, Counter::TupleBusy), played.core.report().stopped_by), (100, None));
}

#[test]
fn ramping_shortage_pauses_then_gives_up_and_holds() {
    let mut played = Played::start(LoadCore::new(config(10)), 8);
    let burst = tickets(&played.commands());
    let fail = |ticket| Event::ConnectFailed { ticket, step: Step::Socket, error: Errno::EMFILE };
    for ticket in burst {
        assert!(played.tell(fail(ticket)).is_empty(), "paused, and one burst counts once");
    }
    for _ in 0..2 {
        let asked = tickets(&played.wait_ms(20));
        assert!(!asked.is_empty(), "tried again after the pause");
        asked.into_iter().for_each(|ticket| drop(played.tell(fail(ticket))));
    }
    assert_eq!(played.core.report().stopped_by, Some((Step::Socket, Errno::EMFILE)));
    assert_eq!(played.core.report().phase, Phase::Holding);
    assert!(played.wait_ms(1000).is_empty() && played.core.poll_timeout().is_none());
    assert!(!tickets(&played.order(Order::Target(10))).is_empty() || !tickets(&played.wait_ms(20)).is_empty());
}

#[test]
fn ramping_shortage_halves_the_window_and_success_widens_it() {
    let mut played = Played::start(LoadCore::new(config(100)), 8);
    for ticket in tickets(&played.commands()) {
        played.tell(Event::ConnectFailed { ticket, step: Step::Socket, error: Errno::ENFILE });
    }
    let asked = tickets(&played.wait_ms(20));
    assert_eq!(asked.len(), 2, "half of 4");
    let more = tickets(&played.tell(Event::Connected { ticket: asked[0], conn: conn(0) }));
    assert_eq!(more.len(), 2, "one for the one that stands, one for the wider window");
}

#[test]
fn ramping_success_between_failures_starts_the_count_again() {
    let mut played = Played::start(LoadCore::new(LoadConfig { window: 1, ..config(100) }), 8);
    let mut asked = tickets(&played.commands());
    for round in 0..4 {
        for _ in 0..2 {
            let (ticket, error) = (asked[0], Errno::ECONNREFUSED);
            asked = tickets(&played.tell(Event::ConnectFailed { ticket, step: Step::Connect, error }));
        }
        asked = tickets(&played.tell(Event::Connected { ticket: asked[0], conn: conn(round) }));
    }
    assert_eq!((played.core.report().stopped_by, count(&played, Counter::ConnectFailed)), (None, 8));
}

#[test]
fn idle_ping_answered_in_pieces_is_right() {
    let mut played = holding(config(1), 1, 8);
    let commands = played.order(Order::Ping);
    let token = played.sent_bytes(commands).remove(0);
    assert_eq!((token.len(), &token[..8]), (24, &9u64.to_le_bytes()[..]));
    played.now.0 += 500;
    token.chunks(5).for_each(|piece| assert!(played.receive(conn(0), piece).is_empty()));
    assert_eq!(
        (count(&played, Counter::PingsRight), played.core.report().phase),
        (1, Phase::Pinging),
        "Sent is awaited"
    );
    played.tell(Event::Sent { conn: conn(0) });
    assert_eq!((played.core.report().phase, count(&played, Counter::BytesOut)), (Phase::Holding, 24));
    assert_eq!(played.core.report().echo_ns.max(), 500);
    assert_eq!(played.outbox.buffers.in_use(), 0);
}

#[test]
fn awaiting_other_or_extra_bytes_are_wrong() {
    for extra in [false, true] {
        let mut played = holding(config(1), 1, 8);
        let commands = played.order(Order::Ping);
        let mut bytes = played.sent_bytes(commands).remove(0);
        if extra {
            bytes.push(0)
        } else {
            bytes[23] ^= 1
        }
        played.receive(conn(0), &bytes);
        assert_eq!((count(&played, Counter::PingsWrong), count(&played, Counter::PingsRight)), (1, 0));
        played.tell(Event::Sent { conn: conn(0) });
        assert!(played.order(Order::Ping).is_empty(), "nothing more is asked of it");
    }
}

#[test]
fn idle_bytes_that_nobody_asked_for_are_wrong() {
    let mut played = holding(config(1), 1, 8);
    played.receive(conn(0), b"220 mail.example");
    assert_eq!((count(&played, Counter::PingsWrong), count(&played, Counter::PingsSent)), (1, 0));
}

#[test]
fn awaiting_too_long_is_missing_and_late_is_no_surprise() {
    let mut played = holding(config(1), 1, 8);
    let commands = played.order(Order::Ping);
    let token = played.sent_bytes(commands).remove(0);
    played.tell(Event::Sent { conn: conn(0) });
    played.wait_ms(50);
    assert_eq!(count(&played, Counter::PingsMissing), 1);
    played.receive(conn(0), &token);
    assert_eq!((count(&played, Counter::PingsRight), count(&played, Counter::PingsWrong)), (0, 0));
    assert_eq!(played.order(Order::Ping).len(), 1, "it may be asked again");
}

#[test]
fn late_other_bytes_spoil_but_count_once() {
    let mut played = holding(config(1), 1, 8);
    let commands = played.order(Order::Ping);
    played.sent_bytes(commands);
    played.tell(Event::Sent { conn: conn(0) });
    played.wait_ms(50);
    played.receive(conn(0), b"other bytes");
    assert_eq!((count(&played, Counter::PingsMissing), count(&played, Counter::PingsWrong)), (1, 0));
    assert!(played.order(Order::Ping).is_empty(), "nothing more is asked of it");
}

#[test]
fn pinging_window_and_a_second_round() {
    let mut played = holding(config(6), 6, 8);
    let mut commands = played.order(Order::Ping);
    commands.extend(played.order(Order::Ping));
    for _ in 0..12 {
        let outstanding: Vec<ConnId> = commands
            .iter()
            .filter_map(|command| if let Command::Send { conn, .. } = command { Some(*conn) } else { None })
            .collect();
        assert!(outstanding.len() <= 2, "ping_window is 2");
        let tokens = played.sent_bytes(std::mem::take(&mut commands));
        for (conn, token) in outstanding.into_iter().zip(tokens) {
            commands.extend(played.tell(Event::Sent { conn }));
            commands.extend(played.receive(conn, &token));
        }
        commands.extend(played.wait_ms(0));
    }
    assert_eq!((count(&played, Counter::PingsSent), count(&played, Counter::PingsRight)), (12, 12));
}

#[test]
fn pinging_without_a_buffer_waits_and_goes_on() {
    let mut played = holding(config(1), 1, 0);
    assert!(played.order(Order::Ping).is_empty());
    assert_eq!(count(&played, Counter::BufferWaits), 1);
    assert_eq!(played.core.poll_timeout().map(|at| at.0), Some(1_000_000), "not in the past: no busy loop");
}

#[test]
fn holding_pings_by_itself() {
    let mut played = holding(LoadConfig { ping_every: Duration::from_millis(10), ..config(1) }, 1, 8);
    assert!(played.wait_ms(9).is_empty());
    assert_eq!(played.wait_ms(1).len(), 1);
}

#[test]
fn awaiting_end_of_the_connection_ends_the_token() {
    for event in [
        Event::Finished { conn: conn(0), gone: false },
        Event::Failed { conn: conn(0), step: Step::Receive, error: Errno::ECONNRESET },
    ] {
        let mut played = holding(config(1), 1, 8);
        let commands = played.order(Order::Ping);
        played.sent_bytes(commands);
        assert_eq!(closes(&played.tell(event)), 1);
        assert!(played.receive(conn(0), b"late").is_empty() && played.tell(Event::Sent { conn: conn(0) }).is_empty());
        played.tell(Event::Closed { conn: conn(0) });
        assert_eq!((count(&played, Counter::Open), count(&played, Counter::PingsMissing)), (0, 0));
        assert_eq!(count(&played, Counter::ClosedByPeer) + count(&played, Counter::Broken), 1);
        assert_eq!(played.core.report().phase, Phase::Holding);
        assert_eq!(tickets(&played.order(Order::Target(1))).len(), 1, "asked again, it is replaced");
    }
}

#[test]
fn holding_order_close_ends_all_in_bursts() {
    let mut played = holding(config(1000), 1000, 8);
    let mut commands = played.order(Order::Close);
    assert_eq!(closes(&commands), 256);
    assert_eq!(played.core.poll_timeout(), None, "no more before some are closed");
    while !commands.is_empty() {
        let mut next = Vec::new();
        for command in commands {
            let Command::Close { conn, abort: true } = command else { panic!("{command:?}") };
            assert!(played.tell(Event::Closed { conn }).is_empty(), "turn by turn, not event by event");
        }
        next.extend(played.wait_ms(0));
        assert!(closes(&next) <= 256, "a bounded number per turn");
        commands = next;
    }
    assert!(played.core.is_done());
    assert_eq!(count(&played, Counter::ClosedByUs), 1000);
}

#[test]
fn ramping_order_close_cancels_and_closes_what_comes_late() {
    let mut played = Played::start(LoadCore::new(config(2)), 8);
    let asked = tickets(&played.commands());
    let cancels = played.order(Order::Close);
    assert_eq!(cancels.iter().filter(|command| matches!(command, Command::CancelConnect { .. })).count(), 2);
    assert_eq!(closes(&played.tell(Event::Connected { ticket: asked[0], conn: conn(5) })), 1);
    played.tell(Event::ConnectFailed { ticket: asked[1], step: Step::Connect, error: Errno::ECANCELED });
    assert!(!played.core.is_done());
    played.tell(Event::Closed { conn: conn(5) });
    played.wait_ms(0);
    assert!(played.core.is_done());
}

#[test]
fn any_event_of_a_past_generation_is_ignored() {
    let mut played = holding(config(1), 1, 8);
    let old = ConnId { index: 0, generation: 0 };
    assert!(played.tell(Event::Closed { conn: old }).is_empty());
    assert!(played.tell(Event::Failed { conn: old, step: Step::Send, error: Errno::EPIPE }).is_empty());
    assert!(played.receive(old, b"bytes").is_empty());
    assert_eq!((count(&played, Counter::Open), played.outbox.buffers.in_use()), (1, 0));
}
