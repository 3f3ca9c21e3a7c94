//! One suite for every carrier: the eight rules of the contract, held by watching everything that passes between a core and
//! its carrier. The same cases run on io_uring, on epoll and in the simulator's network; `cases!` lists them.
//!
//! The kernel's own are on 127.0.0.1 and ::1 with ports that the kernel chooses, and below 2,000 sockets.

#![allow(clippy::disallowed_methods, missing_docs)]

#[path = "conformance/actors.rs"]
mod actors;
#[path = "conformance/datagrams.rs"]
mod datagrams;
#[path = "conformance/pairs.rs"]
mod pairs;

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use actors::{Ending, Guest, Host, Manner, Plan, Tally};
use datagrams::{Call, Told, on_kernel, peer, simulated};
use fourtuple_carrier::sim::Fault;
use fourtuple_carrier::{CarrierKind, CarrierSettings, Worker, WorkerError};
use fourtuple_engine::report::Report;
use fourtuple_engine::{Core, Errno, Event, Instant, Order, Outbox, SourceChoice, Step};
use pairs::{Epoll, Pair, Simulated, Uring, settings};

macro_rules! cases {
    ($($(#[$attribute:meta])* $case:ident),+ $(,)?) => {
        mod uring { $(#[test] fn $case() { super::$case(&super::Uring(super::settings())); })+ }
        mod epoll { $(#[test] fn $case() { super::$case(&super::Epoll(super::settings())); })+ }
        mod sim { $(#[test] fn $case() { super::$case(&super::Simulated); })+ }
    };
}

cases! {
    echo_comes_back_in_order_and_whole,
    echo_over_ipv6,
    refusal_is_told_once,
    a_tuple_is_used_once,
    fin_is_told_as_finished,
    rst_is_told_as_failed,
    eight_megabytes_pass_a_slow_reader,
    close_takes_an_outstanding_send_back,
    a_name_whose_time_has_passed_is_ignored,
    places_are_used_again,
    a_connect_can_be_cancelled,
    many_connections_at_once,
    unlisten_ends_the_listener_only,
    a_taken_endpoint_cannot_be_listened_on,
    timeouts_come_when_asked_for,
}

// Rules 1 to 4, and 7.

fn echo_comes_back_in_order_and_whole(pair: &dyn Pair) {
    let plan = Plan { connections: 20, say: 50_000, ..Plan::default() };
    let (guest, host) = pair.run(Guest::new(plan), Host::new(Manner::Echo, pair.listen_at()));
    assert_eq!((guest.connected, guest.echoed_right, guest.closed), (20, 20, 20), "{guest:?}");
    assert_eq!((host.accepted, host.closed, host.bytes), (20, 20, 20 * 50_000), "{host:?}");
}

fn echo_over_ipv6(pair: &dyn Pair) {
    let plan = Plan { connections: 3, say: 5_000, source: "[::1]:0".parse().unwrap(), ..Plan::default() };
    let at = format!("[::1]:{}", pair.listen_at().port()).parse().unwrap();
    let (guest, _) = pair.run(Guest::new(plan), Host::new(Manner::Echo, at));
    assert_eq!((guest.echoed_right, guest.closed), (3, 3), "{guest:?}");
}

fn refusal_is_told_once(pair: &dyn Pair) {
    // The host listens on one port; nobody does on the port asked for.
    let plan = Plan { connections: 5, nobody_there: true, ..Plan::default() };
    let (guest, _) = pair.run(Guest::new(plan), Host::new(Manner::Echo, pair.listen_at()));
    assert_eq!(guest.connect_failed, vec![(Step::Connect, Errno::ECONNREFUSED); 5], "{guest:?}");
}

/// An endpoint that nothing on this host holds: a fixed one may be another program's, or another test's listener's.
fn free_endpoint() -> SocketAddr {
    TcpListener::bind("127.0.0.9:0").and_then(|listener| listener.local_addr()).unwrap()
}

fn a_tuple_is_used_once(pair: &dyn Pair) {
    for choice in [SourceChoice::Bind, SourceChoice::SinglePort] {
        let source = free_endpoint();
        let plan = Plan { connections: 3, choice, source, hold: true, ending: Ending::Abort, ..Plan::default() };
        let (guest, _) = pair.run(Guest::new(plan), Host::new(Manner::Echo, pair.listen_at()));
        assert_eq!(guest.connected, 1, "{choice:?} {guest:?}");
        assert_eq!(guest.connect_failed.len(), 2, "{choice:?} {guest:?}");
        let busy = [Errno::EADDRNOTAVAIL, Errno::EADDRINUSE];
        assert!(guest.connect_failed.iter().all(|(_, error)| busy.contains(error)), "{choice:?} {guest:?}");
    }
}

fn fin_is_told_as_finished(pair: &dyn Pair) {
    let plan = Plan { connections: 10, say: 1, ending: Ending::Theirs, ..Plan::default() };
    let (guest, host) = pair.run(Guest::new(plan), Host::new(Manner::HangUp { abort: false }, pair.listen_at()));
    assert_eq!((guest.finished, guest.closed, host.closed), (10, 10, 10), "{guest:?} {host:?}");
    assert!(guest.failed.is_empty(), "{guest:?}");
}

fn rst_is_told_as_failed(pair: &dyn Pair) {
    let plan = Plan { connections: 10, say: 1, ending: Ending::Theirs, ..Plan::default() };
    let (guest, _) = pair.run(Guest::new(plan), Host::new(Manner::HangUp { abort: true }, pair.listen_at()));
    assert_eq!(guest.failed, vec![Errno::ECONNRESET; 10], "{guest:?}");
    assert_eq!((guest.finished, guest.closed), (0, 10), "{guest:?}");
}

fn close_takes_an_outstanding_send_back(pair: &dyn Pair) {
    // The host never reads: the guest sends until a send stays outstanding, then closes.
    for ending in [Ending::Fin, Ending::Abort] {
        let plan = Plan { connections: 2, say_until_stuck: true, ending, ..Plan::default() };
        let (guest, _) = pair.run(Guest::new(plan), Host::new(Manner::Deaf, pair.listen_at()));
        assert_eq!((guest.closed, guest.stuck), (2, 2), "{ending:?} {guest:?}");
    }
}

// Rules 2 and 5.

fn a_name_whose_time_has_passed_is_ignored(pair: &dyn Pair) {
    let plan = Plan { connections: 6, one_by_one: true, use_old_names: true, say: 100, ..Plan::default() };
    let (guest, host) = pair.run(Guest::new(plan), Host::new(Manner::Echo, pair.listen_at()));
    assert_eq!((guest.echoed_right, guest.closed, host.closed), (6, 6, 6), "{guest:?} {host:?}");
}

fn places_are_used_again(pair: &dyn Pair) {
    // RST, so that no TIME_WAIT uses up the ports; 10,000 lives in few places.
    let plan = Plan { connections: 10_000, window: 8, say: 16, ending: Ending::Abort, ..Plan::default() };
    let (guest, host) = pair.run(Guest::new(plan), Host::new(Manner::Echo, pair.listen_at()));
    assert_eq!((guest.connected, guest.echoed_right, guest.closed), (10_000, 10_000, 10_000), "{guest:?}");
    assert_eq!(host.accepted, host.closed);
    assert!(guest.highest_index < 256, "{} places for 8 connections at once", guest.highest_index);
}

// Rule 6.

fn eight_megabytes_pass_a_slow_reader(pair: &dyn Pair) {
    const BYTES: u64 = 8 << 20;
    let plan = Plan { connections: 1, slow_reader: true, expect: BYTES, ..Plan::default() };
    let (guest, host) = pair.run(Guest::new(plan), Host::new(Manner::Flood(BYTES), pair.listen_at()));
    assert_eq!((guest.bytes, guest.wrong_bytes), (BYTES, 0), "{guest:?}");
    assert!(guest.pauses > 100, "{guest:?}");
    // After Pause at most what was on its way comes, and it is bounded by buffers, not by what the peer has sent.
    assert!(guest.most_buffers <= 8 && host.most_buffers <= 8, "{guest:?} {host:?}");
    assert!(guest.most_while_paused <= 64, "{guest:?}");
}

// Rule 1, when it is not the peer who answers.

fn a_connect_can_be_cancelled(pair: &dyn Pair) {
    // Nobody accepts, so the queue (backlog 1 holds two) fills and further SYNs are dropped without an answer.
    let plan = Plan { connections: 8, cancel_after: Some(Duration::from_millis(300)), hold: true, ..Plan::default() };
    let mut host = Host::new(Manner::Echo, pair.listen_at());
    (host.backlog, host.accept) = (1, false);
    let (guest, host) = pair.run(Guest::new(plan), host);
    assert_eq!(host.accepted, 0);
    assert_eq!(guest.connected, 2, "an accept queue holds backlog + 1 {guest:?}");
    assert_eq!(guest.connect_failed, vec![(Step::Connect, Errno::ECANCELED); 6], "{guest:?}");
}

fn many_connections_at_once(pair: &dyn Pair) {
    let plan = Plan { connections: 700, hold: true, say: 100, ..Plan::default() };
    let (guest, host) = pair.run(Guest::new(plan), Host::new(Manner::Echo, pair.listen_at()));
    assert_eq!((guest.most_open, guest.echoed_right, guest.closed), (700, 700, 700), "{guest:?}");
    assert_eq!((host.accepted, host.closed), (700, 700), "{host:?}");
}

fn unlisten_ends_the_listener_only(pair: &dyn Pair) {
    let plan = Plan { connections: 5, one_by_one: true, say: 100, ..Plan::default() };
    let mut host = Host::new(Manner::Echo, pair.listen_at());
    host.unlisten_after = Some(2);
    let (guest, host) = pair.run(Guest::new(plan), host);
    assert_eq!((guest.connected, guest.echoed_right), (2, 2), "{guest:?}");
    assert_eq!(guest.connect_failed, vec![(Step::Connect, Errno::ECONNREFUSED); 3], "{guest:?}");
    assert_eq!(host.closed, host.accepted);
}

fn a_taken_endpoint_cannot_be_listened_on(pair: &dyn Pair) {
    let mut host = Host::new(Manner::Echo, pair.listen_at());
    host.listen_twice = true;
    let (guest, host) = pair.run(Guest::new(Plan { connections: 1, say: 10, ..Plan::default() }), host);
    assert_eq!(host.listen_failed, vec![Errno::EADDRINUSE], "{host:?}");
    assert_eq!(guest.echoed_right, 1, "{guest:?}");
}

fn timeouts_come_when_asked_for(pair: &dyn Pair) {
    let plan = Plan { connections: 1, naps: 20, ..Plan::default() };
    let (guest, _) = pair.run(Guest::new(plan), Host::new(Manner::Echo, pair.listen_at()));
    assert_eq!(guest.naps, 20, "{guest:?}");
    assert!(guest.earliest_wake >= 0, "woken {} ns before the time", -guest.earliest_wake);
    assert!(guest.latest_wake < 200_000_000, "woken {} ns after the time", guest.latest_wake);
}

// Rule 8.

fn call(destination: SocketAddr, words: &[Vec<u8>]) -> Call {
    let source = std::net::UdpSocket::bind("127.0.0.8:0").and_then(|socket| socket.local_addr()).unwrap();
    Call { destination, source, choice: SourceChoice::Bind, flows: 1, hold: false, words: words.to_vec() }
}

/// On each carrier; the simulator's network is an echo wherever one calls.
fn everywhere(call: &Call, check: impl Fn(Tally, Told)) {
    for kind in KERNELS {
        let (tally, told) = on_kernel(kind, call.clone());
        check(tally, told);
    }
    let (tally, told) = simulated(call.clone(), None);
    check(tally, told);
}

#[test]
fn datagrams_come_whole_and_each_by_itself() {
    let words = [1, 2048, 16, 777, 1].map(|length| vec![length as u8; length]);
    for choice in [SourceChoice::Bind, SourceChoice::SinglePort, SourceChoice::KernelPort, SourceChoice::Kernel] {
        everywhere(&Call { choice, ..call(peer(|word| vec![word.to_vec()]), &words) }, |tally, told| {
            assert_eq!(told.heard, words, "{choice:?}");
            assert_eq!((tally.connected, tally.closed, told.sent), (1, 1, 5), "{choice:?}");
            assert!(told.disturbed.is_empty(), "{choice:?} {told:?}");
        });
    }
}

#[test]
fn the_tuple_of_a_flow_is_used_once_and_free_when_it_is_closed() {
    let flows = Call { flows: 5, words: vec![vec![7; 20]], ..call(peer(|word| vec![word.to_vec()]), &[]) };
    everywhere(&flows, |tally, told| {
        assert_eq!((tally.connected, tally.closed, told.heard.len()), (5, 5, 5), "{tally:?}");
    });
    everywhere(&Call { hold: true, ..flows }, |tally, _| {
        assert_eq!(tally.connected, 1, "{tally:?}");
        assert_eq!(tally.connect_failed, [(Step::Connect, Errno::EADDRNOTAVAIL); 4]);
    });
}

#[test]
fn a_refused_flow_lives_on() {
    let words = vec![vec![3; 30]; 6];
    let refused = |told: &Told| told.disturbed.iter().filter(|row| row.1 == Errno::ECONNREFUSED).count();
    for kind in KERNELS {
        let nobody = std::net::UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap();
        let (tally, told) = on_kernel(kind, call(nobody, &words));
        // Each was sent, though the one before it was refused.
        assert_eq!((refused(&told), told.sent, tally.closed), (6, 6, 1), "{kind:?} {told:?}");
    }
    let (tally, told) = simulated(call("127.0.0.1:9".parse().unwrap(), &words), Some(Fault::DatagramRefused));
    assert!(refused(&told) > 0 && !told.heard.is_empty(), "{told:?}");
    assert_eq!((refused(&told) + told.heard.len(), told.sent, tally.closed), (6, 6, 1), "{told:?}");
}

#[test]
fn what_cannot_be_sent_is_told_and_answered() {
    let (tally, told) =
        simulated(call("127.0.0.1:9".parse().unwrap(), &vec![vec![3; 30]; 9]), Some(Fault::DatagramUnsent));
    assert!(!told.disturbed.is_empty() && told.disturbed.iter().all(|row| row.0 == Step::Send), "{told:?}");
    assert_eq!((told.sent, told.heard.len() + told.disturbed.len(), tally.closed), (9, 9, 1));
}

#[test]
fn an_empty_datagram_is_no_end_and_a_long_one_is_cut_and_told() {
    for kind in KERNELS {
        let at = peer(|word| vec![Vec::new(), vec![9; 3000], word.to_vec()]);
        let (_, told) = on_kernel(kind, call(at, &[vec![1; 10], vec![2; 10]]));
        assert_eq!(told.heard, [vec![], vec![1; 10], vec![], vec![2; 10]], "{kind:?}");
        assert_eq!(told.disturbed, [(Step::Receive, Errno::EMSGSIZE); 2], "{kind:?}");
    }
}

#[test]
fn of_many_datagrams_at_once_none_is_left_behind() {
    for kind in KERNELS {
        let at = peer(|word| (0..100).map(|place| [word, &[place]].concat()).collect());
        let (_, told) = on_kernel(kind, call(at, &[vec![1; 10], vec![2; 10]]));
        let places: Vec<u8> = told.heard.iter().map(|datagram| datagram[10]).collect();
        assert_eq!(places, (0..100).chain(0..100).collect::<Vec<u8>>(), "{kind:?}");
    }
}

// What only a kernel has.

const KERNELS: [CarrierKind; 2] = [CarrierKind::Uring, CarrierKind::Epoll];

#[test]
fn rings_are_added_as_the_last_one_fills() {
    let small = CarrierSettings { slots_per_ring: 64, most_connections: 1000, ..settings() };
    let pair = Uring(small);
    many_connections_at_once(&pair);
    places_are_used_again(&pair);
    let plan = Plan { connections: 700, hold: true, ..Plan::default() };
    let (_, _, guest, host) = pair.run_and_report(Guest::new(plan), Host::new(Manner::Echo, pair.listen_at()));
    assert!((11..=16).contains(&guest.rings) && (11..=16).contains(&host.rings), "{guest:?} {host:?}");
    assert_eq!((guest.slots_in_use, guest.buffers_in_use), (0, 0), "{guest:?}");
    assert_eq!(host.accept_lost, 0);
}

#[test]
fn a_full_carrier_leaves_connections_in_the_accept_queue() {
    for kind in KERNELS {
        let few = CarrierSettings { most_connections: 10, ..settings() };
        let plan = Plan { connections: 60, window: 20, say: 100, ..Plan::default() };
        let pair = pairs::Kernel { kind, guest: settings(), host: few };
        let (guest, host) = pair.run(Guest::new(plan), Host::new(Manner::Echo, pair.listen_at()));
        assert_eq!((guest.echoed_right, host.closed), (60, 60), "{kind:?} {guest:?} {host:?}");
        assert!(host.highest_index < 10, "{kind:?} {host:?}");
    }
}

#[test]
fn a_full_carrier_refuses_to_connect() {
    for kind in KERNELS {
        let few = CarrierSettings { most_connections: 4, ..settings() };
        let plan = Plan { connections: 6, hold: true, ..Plan::default() };
        let pair = pairs::Kernel { kind, guest: few, host: settings() };
        let (guest, _) = pair.run(Guest::new(plan), Host::new(Manner::Echo, pair.listen_at()));
        assert_eq!((guest.connected, guest.connect_failed.len()), (4, 2), "{kind:?} {guest:?}");
        assert!(guest.connect_failed.iter().all(|(_, error)| *error == Errno::ENFILE), "{kind:?} {guest:?}");
    }
}

#[test]
fn a_completion_queue_that_overflows_loses_nothing() {
    let pair = Uring(settings());
    let plan = Plan { connections: 900, window: 900, hold: true, say: 100, ..Plan::default() };
    let (guest, host, carrier, _) = pair.run_and_report(Guest::new(plan), Host::new(Manner::Echo, pair.listen_at()));
    // All are closed in one turn, each with a poll to cancel: three completions, and the queue holds 2,048.
    assert!(carrier.cq_overflows > 0, "{carrier:?}");
    assert_eq!((guest.echoed_right, guest.closed, host.closed), (900, 900, 900), "{guest:?} {host:?}");
}

#[test]
fn connections_take_turns_when_buffers_are_few() {
    for kind in KERNELS {
        let few = CarrierSettings { buffers_per_chunk: 2, buffer_chunks: 1, ..settings() };
        let pair = pairs::Kernel { kind, guest: settings(), host: few };
        // Whether a third is ever wanted while both are out is up to the scheduler: play until it was, and be right each time.
        let was_short = (0..10).any(|_| {
            let plan = Plan { connections: 100, say: 5_000, ..Plan::default() };
            let (guest, host, _, carrier) =
                pair.run_and_report(Guest::new(plan), Host::new(Manner::EchoLater, pair.listen_at()));
            assert_eq!((guest.echoed_right, host.closed), (100, 100), "{kind:?} {guest:?}");
            assert!(host.most_buffers <= 2, "{kind:?} {carrier:?} {host:?}");
            carrier.receive_rearms > 0
        });
        assert!(was_short, "{kind:?}: ten runs, and never short of a buffer");
    }
}

#[test]
fn listeners_beyond_those_with_a_descriptor_accept_as_well() {
    for kind in KERNELS {
        let pair =
            pairs::Kernel { kind, guest: settings(), host: CarrierSettings { slots_per_ring: 128, ..settings() } };
        let mut host = Host::new(Manner::Echo, pair.listen_at());
        host.listeners = 300;
        let plan = Plan { connections: 600, say: 100, ..Plan::default() };
        let (guest, host) = pair.run(Guest::new(plan), host);
        assert_eq!((host.listening, guest.echoed_right, host.closed), (300, 600, 600), "{kind:?} {guest:?} {host:?}");
    }
}

#[test]
fn a_half_closed_connection_still_sends() {
    use std::io::{Read, Write};
    for kind in KERNELS {
        let host = Host::new(Manner::EchoAfterFin, "127.0.0.1:0".parse().unwrap());
        let (address, over, tally) = (host.address(), host.over(), host.tally());
        let worker = Worker::start(kind, settings(), Box::new(host)).unwrap();
        let mut client = std::net::TcpStream::connect(pairs::wait_for(&address)).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client.write_all(b"said before the end").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut heard = String::new();
        client.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "said before the end", "{kind:?}");
        over.store(true, std::sync::atomic::Ordering::Release);
        worker.join().unwrap();
        let tally = tally.lock().unwrap();
        assert_eq!((tally.finished, tally.closed), (1, 1), "{kind:?} {tally:?}");
    }
}

#[test]
fn stop_closes_everything() {
    use std::io::Read;
    for kind in KERNELS {
        let host = Host::new(Manner::Echo, "127.0.0.1:0".parse().unwrap());
        let address = host.address();
        let worker = Worker::start(kind, settings(), Box::new(host)).unwrap();
        let at = pairs::wait_for(&address);
        let mut client = std::net::TcpStream::connect(at).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        while worker.published().carrier.slots_in_use == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(100));
        worker.stop();
        worker.join().unwrap();
        let end = client.read(&mut [0; 16]);
        assert!(matches!(&end, Ok(0)) || end.is_err_and(|it| it.kind() == std::io::ErrorKind::ConnectionReset));
        assert!(std::net::TcpStream::connect(at).is_err(), "{kind:?} still listens");
    }
}

#[test]
fn a_panic_of_a_core_is_an_error_of_its_worker() {
    for kind in KERNELS {
        let worker = Worker::start(kind, settings(), Box::new(Fragile { report: Report::new() })).unwrap();
        worker.order(Order::Ping);
        let why = worker.join().unwrap_err();
        assert_eq!(why, WorkerError::Panicked("an order too many".to_owned()), "{kind:?}");
    }
}

#[test]
fn a_carrier_that_cannot_be_made_says_why() {
    let settings = CarrierSettings { slots_per_ring: 32_768, ..settings() };
    let Err(why) = Worker::start(CarrierKind::Uring, settings, Box::new(Fragile { report: Report::new() })) else {
        // RLIMIT_NOFILE is high enough here.
        return;
    };
    assert_eq!((why.what, why.error), ("IORING_REGISTER_FILES2", Errno::EMFILE));
}

#[test]
fn the_probe_finds_what_the_carrier_needs() {
    let abilities = fourtuple_carrier::probe_uring().unwrap();
    assert!(abilities.carries(), "{abilities:?}");
}

/// A core with a bug.
struct Fragile {
    report: Report,
}

impl Core for Fragile {
    fn start(&mut self, _: Instant, _: &mut Outbox) {}

    fn handle(&mut self, event: Event, _: Instant, _: &mut Outbox) {
        assert!(!matches!(event, Event::Ordered(_)), "an order too many");
    }

    fn handle_timeout(&mut self, _: Instant, _: &mut Outbox) {}

    fn poll_timeout(&self) -> Option<Instant> {
        None
    }

    fn is_done(&self) -> bool {
        false
    }

    fn report(&self) -> &Report {
        &self.report
    }

    fn check_invariants(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Every tally of every case is also free of broken rules and of lost buffers.
fn sound(tally: &Tally) {
    assert!(tally.broken.is_empty(), "{:?}", tally.broken);
    assert_eq!(tally.buffers_left, 0, "buffers left over: {tally:?}");
}
