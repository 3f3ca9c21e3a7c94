//! The load and echo cores on the simulator, by seed: ten thousand small random worlds, and wrong cores that must be caught.
//!
//! `FOURTUPLE_SEEDS=n` changes how many; `FOURTUPLE_SEED=n cargo test -p fourtuple-carrier --release --test simulation
//! replay` runs one again and says what it was.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fourtuple_carrier::sim::{Broken, FAULTS, Fault, Faults, Network, Random, Script, Sim, SimReport};
use fourtuple_engine::echo::{EchoConfig, EchoCore};
use fourtuple_engine::load::{LoadConfig, LoadCore};
use fourtuple_engine::report::{Counter, Phase, Report};
use fourtuple_engine::script::{Act, Script as Dialogue};
use fourtuple_engine::space::{Addresses, Ports, Space};
use fourtuple_engine::{Command, Core, Errno, Event, Instant, Order, Outbox, SourceChoice, Step, Transport};

const DEFAULT_SEEDS: u64 = 10_000;
const CHOICES: [SourceChoice; 5] = [
    SourceChoice::Kernel,
    SourceChoice::KernelPort,
    SourceChoice::KernelRange,
    SourceChoice::SinglePort,
    SourceChoice::Bind,
];

/// One random world.
#[derive(Debug)]
struct World {
    clients: Vec<LoadConfig>,
    /// None is tokens.
    dialogue: Option<Dialogue>,
    servers: Vec<EchoConfig>,
    network: Network,
    faults: Faults,
    script: Script,
}

impl World {
    fn of(seed: u64) -> World {
        let mut random = Random::new(seed ^ 0x666f_7572_7475_706c);
        let mut pick = |low: u64, high: u64| random.between(low, high);
        let six = pick(0, 3) == 0;
        let address = |last: u8| match six {
            true => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last))),
            false => IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)),
        };
        let any = if six { Ipv6Addr::UNSPECIFIED.into() } else { IpAddr::from(Ipv4Addr::UNSPECIFIED) };
        let first_port = pick(1024, 2000) as u16;
        let space = Space {
            sources: vec![Addresses { first: address(1), count: pick(1, 3) }],
            source_ports: vec![Ports { first: first_port, last: first_port + pick(0, 40) as u16 }],
            destinations: vec![Addresses { first: address(100), count: pick(1, 2) }],
            destination_ports: vec![Ports { first: 80, last: 80 + pick(0, 2) as u16 }],
        };
        let most = [8, 8, 8, 40, 200][pick(0, 4) as usize];
        let client_count = pick(1, 3);
        let buffer_bytes = [32, 64, 256, 2048][pick(0, 3) as usize];
        // A closed loop never rests: short, and not too fast.
        let closed_loop = pick(0, 3) == 0;
        let until_ms = if closed_loop { pick(50, 200) } else { pick(50, 3000) };
        let choice = CHOICES[pick(0, 4) as usize];
        let seed_of_tokens = pick(0, u64::MAX - 1);
        // Every fifth world is one of datagrams, which its servers never hear of.
        let transport = if seed.is_multiple_of(5) { Transport::Datagram } else { Transport::Stream };
        let clients = (0..client_count).map(|first| LoadConfig {
            transport,
            space: space.clone(),
            first,
            stride: client_count,
            connections: pick(1, most),
            choice,
            window: pick(1, 64) as u32,
            rate_per_s: [0, 0, 50, 1000, 20_000][pick(0, 4) as usize],
            connect_timeout: Duration::from_millis(pick(1, 2500)),
            ping_timeout: Duration::from_millis(pick(1, 500)),
            ping_window: pick(1, 32) as u32,
            token_bytes: pick(16, buffer_bytes) as u32,
            seed: seed_of_tokens.wrapping_add(first),
            ping_every: Duration::from_millis([0, until_ms / 3 + 1][pick(0, 1) as usize]),
            closed_loop,
            give_up_after: pick(1, 50) as u32,
            abort_on_close: pick(0, 1) == 0,
            keep_fill_curve: pick(0, 1) == 0,
        });
        let clients: Vec<LoadConfig> = clients.collect();
        let servers = (0..pick(1, 2)).map(|_| EchoConfig {
            listen: (80..=space.destination_ports[0].last).map(|port| SocketAddr::new(any, port)).collect(),
            backlog: pick(0, 64) as u32,
            reuse_port: true,
            most_connections: [0, 0, 20][pick(0, 2) as usize],
            accept: pick(0, 19) > 0,
        });
        let servers: Vec<EchoConfig> = servers.collect();
        let mut orders = Vec::new();
        for _ in 0..pick(0, 6) {
            let order = match pick(0, 5) {
                0 => Order::Rate(pick(0, 5000) as u32),
                1 => Order::Target(pick(0, most)),
                2 if pick(0, 2) == 0 => Order::Close,
                _ => Order::Ping,
            };
            let to_a_server = u64::from(pick(0, 9) == 0);
            let core = pick(0, client_count - 1 + to_a_server);
            orders.push((Instant(pick(0, until_ms) * 1_000_000), core as usize, order));
        }
        let network = Network {
            latency_us: (pick(1, 50) + 500 * u64::from(closed_loop), pick(50, 20_000) + 500),
            window_bytes: pick(1, 4096) as usize,
            ports: (first_port, first_port + pick(0, 60) as u16),
            foreign_ports: (first_port, first_port + pick(0, 3) as u16 - 1),
            time_wait: Duration::from_millis([0, 500][pick(0, 1) as usize]),
            buffer_bytes: buffer_bytes as usize,
            buffers: pick(1, 16) as u32,
        };
        let mut faults = Faults::NONE;
        for fault in FAULTS {
            let most = match fault {
                Fault::Reset => 15,
                Fault::ShortWrite | Fault::SlowReader | Fault::DatagramDoubled | Fault::DatagramOvertaken => 400,
                _ => 120,
            };
            if pick(0, 2) == 0 {
                faults = faults.with(fault, pick(1, most) as u16);
            }
        }
        let until = Instant(until_ms * 1_000_000);
        let script = Script { orders, until, most_steps: 2_000_000, strict: true, echoing: true };
        World { clients, dialogue: dialogue(seed, transport), servers, network, faults, script }
    }

    fn clients(&self) -> Vec<Box<dyn Core>> {
        let core = |config: &LoadConfig| match &self.dialogue {
            Some(dialogue) => Box::new(LoadCore::playing(config.clone(), dialogue.clone())) as Box<dyn Core>,
            None => Box::new(LoadCore::new(config.clone())),
        };
        self.clients.iter().map(core).collect()
    }

    fn run(&self, seed: u64) -> Result<(SimReport, Vec<Report>), Broken> {
        let mut clients = self.clients();
        let mut servers: Vec<EchoCore> = self.servers.iter().cloned().map(EchoCore::new).collect();
        let mut client_cores: Vec<&mut dyn Core> =
            clients.iter_mut().map(|core| core.as_mut() as &mut dyn Core).collect();
        let mut server_cores: Vec<&mut dyn Core> = servers.iter_mut().map(|core| core as &mut dyn Core).collect();
        let mut sim = Sim::new(seed, self.faults);
        sim.network = self.network;
        let report = sim.run(&mut client_cores, &mut server_cores, &self.script)?;
        let clients = clients.iter().map(|core| core.report().clone());
        Ok((report, clients.chain(servers.iter().map(|core| core.report().clone())).collect()))
    }
}

impl World {
    /// What must be true of the reports in the end, whatever happened.
    fn judge(&self, reports: &[Report]) -> Result<(), String> {
        for (client, (config, report)) in self.clients.iter().zip(reports).enumerate() {
            let targets = self.script.orders.iter().filter_map(|(_, core, order)| match *order {
                Order::Target(connections) if *core == client => Some(connections),
                _ => None,
            });
            let asked = targets.chain([config.connections]).max().unwrap_or(0);
            let count = |counter| report.count(counter);
            let settled = [Counter::PingsRight, Counter::PingsRefused, Counter::PingsMissing].map(count);
            let settled = settled.iter().sum::<u64>();
            if count(Counter::OpenPeak) > asked {
                return Err(format!("client {client} held {} of {asked}", count(Counter::OpenPeak)));
            }
            // No peer here says other bytes than it was sent, however slowly and in whatever parts; but a datagram may be
            // refused by its host.
            let refused = match config.transport {
                Transport::Stream => count(Counter::PingsRefused) + count(Counter::Strays),
                Transport::Datagram => 0,
            };
            if count(Counter::PingsWrong) + refused > 0 {
                return Err(format!("client {client} heard what nobody said: {report:?}"));
            }
            if report.phase != Phase::Done || settled > count(Counter::PingsSent) {
                return Err(format!("client {client} ended as {report:?}"));
            }
            let failures: u64 = report.failures.iter().map(|row| row.count).sum();
            if failures < count(Counter::ConnectFailed) {
                return Err(format!("client {client}: a failure has no row"));
            }
        }
        Ok(())
    }
}

/// In every other world, a dialogue in which an echo answers as it should; in half of those, with an opening. Over
/// datagrams a round has one answer, so that one that is late cannot be wrong.
fn dialogue(seed: u64, transport: Transport) -> Option<Dialogue> {
    let long: Vec<u8> = (0..31).collect();
    let think = |us| Act::Wait(Duration::from_micros(us));
    let opening =
        vec![think(300), Act::Say(b"hello".to_vec()), Act::Skip(2), Act::Until(b"lo".to_vec(), 3), think(2_000)];
    let ask = [Act::Say(b"one".to_vec()), Act::Skip(1), Act::Expect(b"ne".to_vec())];
    let tell = [Act::Say(long.clone()), Act::Expect(long)];
    let round = match (transport, seed % 3) {
        (Transport::Datagram, 0) => vec![think(700), ask[0].clone(), Act::Rest, think(90_000)],
        (Transport::Datagram, _) => ask.to_vec(),
        (Transport::Stream, 0) => [&ask[..], &[think(700)], &tell, &[think(90_000)]].concat(),
        (Transport::Stream, _) => [&ask[..], &tell].concat(),
    };
    if transport == Transport::Datagram {
        return seed.is_multiple_of(2).then(|| Dialogue::new(Vec::new(), round).expect("a script"));
    }
    match seed % 4 {
        1 => Dialogue::new(opening, round).ok(),
        3 => Dialogue::new(Vec::new(), round).ok(),
        _ => None,
    }
}

/// Run a seed; a panic in a core is a broken rule like any other.
fn run_seed(seed: u64) -> Result<SimReport, String> {
    match catch_unwind(AssertUnwindSafe(|| World::of(seed).run(seed))) {
        Ok(Ok((report, reports))) => {
            World::of(seed).judge(&reports).map_err(|why| format!("seed {seed}: {why}")).map(|()| report)
        }
        Ok(Err(broken)) => Err(broken.to_string()),
        Err(_) => Err(format!("seed {seed}: a core panicked")),
    }
}

#[test]
fn sweep() {
    let seeds = std::env::var("FOURTUPLE_SEEDS")
        .map_or(DEFAULT_SEEDS, |text| text.parse().expect("FOURTUPLE_SEEDS is a number"));
    let (next, total, failures) = (AtomicU64::new(0), Mutex::new(SimReport::default()), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                break;
            }
            match run_seed(seed) {
                Ok(report) => {
                    let mut total = total.lock().expect("no panic holds it");
                    total.steps += report.steps;
                    total.connections += report.connections;
                    total.bytes += report.bytes;
                    total.faults.iter_mut().zip(report.faults).for_each(|(sum, count)| *sum += count);
                }
                Err(text) => failures.lock().expect("no panic holds it").push(text),
            }
        }
    };
    std::thread::scope(|scope| {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        (0..workers).for_each(|_| drop(scope.spawn(work)));
    });
    let (total, failures) = (total.into_inner().expect("no panic"), failures.into_inner().expect("no panic"));
    println!("{seeds} seeds, {} steps, {} connections, {} bytes", total.steps, total.connections, total.bytes);
    for (fault, count) in FAULTS.iter().zip(total.faults) {
        println!("{fault:?}: {count}");
    }
    let shown: Vec<&String> = failures.iter().take(20).collect();
    assert!(failures.is_empty(), "{} seeds broke a rule: {shown:#?}\nreplay: FOURTUPLE_SEED=n", failures.len());
    if seeds >= 1000 {
        // Nobody moves to another process here.
        let struck = |row: (&Fault, u64)| row.1 > 0 || matches!(row.0, Fault::FerryFull | Fault::FerryLost);
        assert!(FAULTS.iter().zip(total.faults).all(struck), "a fault that never struck proves nothing");
        assert!(total.connections > 10 * seeds, "worlds without connections prove nothing");
    }
}

#[test]
fn replay() {
    let seed = std::env::var("FOURTUPLE_SEED").map_or(7, |text| text.parse().expect("FOURTUPLE_SEED is a number"));
    println!("{:#?}", World::of(seed));
    let (first, again) = (World::of(seed).run(seed), World::of(seed).run(seed));
    let facts = |run: Result<(SimReport, Vec<Report>), Broken>| match run {
        Ok((report, reports)) => {
            let counts: Vec<Vec<u64>> = reports.iter().map(|report| report.counts().to_vec()).collect();
            format!("{report:?} {counts:?}")
        }
        Err(broken) => broken.to_string(),
    };
    let (first_facts, again_facts) = (facts(first.clone()), facts(again));
    println!("{first_facts}");
    assert_eq!(first_facts, again_facts, "the same seed is the same run");
    assert!(first.is_ok(), "{first_facts}");
}

// ---- exactness, without faults --------------------------------------------------------------------------------------

fn load_config(choice: SourceChoice, connections: u64, ports: u16, sources: u64) -> LoadConfig {
    let addresses = |last, count| vec![Addresses { first: IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)), count }];
    LoadConfig {
        transport: Transport::Stream,
        space: Space {
            sources: addresses(1, sources),
            source_ports: vec![Ports { first: 40_000, last: 40_000 + ports - 1 }],
            destinations: addresses(100, 1),
            destination_ports: vec![Ports { first: 80, last: 80 }],
        },
        first: 0,
        stride: 1,
        connections,
        choice,
        window: 16,
        rate_per_s: 0,
        connect_timeout: Duration::from_secs(5),
        ping_timeout: Duration::from_secs(5),
        ping_window: 16,
        token_bytes: 48,
        seed: 1,
        ping_every: Duration::ZERO,
        closed_loop: false,
        give_up_after: 20,
        abort_on_close: true,
        keep_fill_curve: true,
    }
}

fn echo_config() -> EchoConfig {
    let listen = vec![SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 80)];
    EchoConfig { listen, backlog: 4096, reuse_port: false, most_connections: 0, accept: true }
}

fn peaceful(clients: Vec<LoadConfig>, servers: Vec<EchoConfig>, orders: &[(Instant, usize, Order)]) -> World {
    let network = Network { ports: (40_000, 40_099), ..Network::default() };
    let until = Instant(3_000_000_000);
    let script = Script { orders: orders.to_vec(), until, most_steps: 1_000_000, strict: true, echoing: true };
    World { clients, dialogue: None, servers, network, faults: Faults::NONE, script }
}

#[test]
fn every_choice_reaches_exactly_what_the_tuples_allow() {
    for choice in CHOICES {
        for (ports, sources) in [(1, 1), (37, 1), (100, 1), (50, 3)] {
            let config = load_config(choice, 10_000, ports, sources);
            let mut world = peaceful(vec![config], vec![echo_config()], &[]);
            world.network.ports.1 = 40_000 + ports - 1;
            let (_, reports) = world.run(1).expect("no rule broken");
            let expected = u64::from(ports) * if choice == SourceChoice::Kernel { 1 } else { sources };
            assert_eq!(reports[0].count(Counter::OpenPeak), expected, "{choice:?} {ports} ports {sources} sources");
            let ours = matches!(choice, SourceChoice::SinglePort | SourceChoice::Bind);
            let stopped_by = (!ours).then_some((Step::Connect, Errno::EADDRNOTAVAIL));
            assert_eq!(reports[0].stopped_by, stopped_by, "{choice:?}");
            let curve = &reports[0].fill_curve;
            assert_eq!(
                curve.iter().map(|row| row.1).sum::<u64>(),
                expected,
                "{choice:?}: the curve has every connection"
            );
            assert!(curve.len() <= 100);
        }
    }
}

#[test]
fn ports_of_another_program_are_counted_and_passed_over() {
    for (choice, failure) in [
        (SourceChoice::Bind, (Step::Bind, Errno::EADDRINUSE)),
        (SourceChoice::SinglePort, (Step::Connect, Errno::EADDRNOTAVAIL)),
        (SourceChoice::KernelPort, (Step::Connect, Errno::EADDRNOTAVAIL)),
    ] {
        let mut world = peaceful(vec![load_config(choice, 1000, 100, 2)], vec![echo_config()], &[]);
        world.network.foreign_ports = (40_010, 40_019);
        let (_, reports) = world.run(6).expect("no rule broken");
        assert_eq!(reports[0].count(Counter::OpenPeak), 180, "{choice:?}");
        assert_eq!(reports[0].stopped_by, Some(failure), "{choice:?}");
        let busy = if choice == SourceChoice::KernelPort { 0 } else { 20 };
        assert_eq!(reports[0].count(Counter::TupleBusy), busy, "{choice:?}");
    }
}

#[test]
fn workers_that_share_a_pair_reach_together_what_it_allows() {
    let workers = |first| LoadConfig { first, stride: 3, ..load_config(SourceChoice::KernelPort, 10_000, 100, 1) };
    let world = peaceful((0..3).map(workers).collect(), vec![echo_config()], &[]);
    let (_, reports) = world.run(2).expect("no rule broken");
    assert_eq!(reports[..3].iter().map(|report| report.count(Counter::OpenPeak)).sum::<u64>(), 100);
}

#[test]
fn every_token_comes_back_right_where_nothing_breaks() {
    let orders = [Order::Ping, Order::Ping, Order::Ping].map(|order| (Instant(1_000_000_000), 0, order));
    let config = load_config(SourceChoice::SinglePort, 500, 500, 1);
    let mut world = peaceful(vec![config], vec![echo_config()], &orders);
    world.network.window_bytes = 7;
    world.faults = Faults::NONE.with(Fault::ShortWrite, 300).with(Fault::SlowReader, 100);
    let (_, reports) = world.run(3).expect("no rule broken");
    let count = |counter| reports[0].count(counter);
    assert_eq!((count(Counter::OpenPeak), count(Counter::PingsSent), count(Counter::PingsRight)), (500, 1500, 1500));
    assert_eq!((count(Counter::Broken), reports[0].phase), (0, Phase::Done));
    assert_eq!(reports[1].count(Counter::BytesOut), 1500 * 48);
}

#[test]
fn a_shortage_ends_the_making_and_is_named() {
    let config = load_config(SourceChoice::SinglePort, 500, 500, 1);
    let mut world = peaceful(vec![config], vec![echo_config()], &[]);
    world.faults = Faults::NONE.with(Fault::Emfile, 999);
    let (_, reports) = world.run(4).expect("no rule broken");
    assert_eq!(reports[0].stopped_by, Some((Step::Socket, Errno::EMFILE)));
}

// ---- wrong cores: the simulator must catch each ---------------------------------------------------------------------

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wrong {
    SendsTwice,
    ForgetsBuffers,
    ClosesTwice,
    AnswersOtherBytes,
    ReusesTickets,
    NeverCloses,
    SendsAfterClose,
}

/// An echo or load core that does one thing wrong.
struct WrongCore<C> {
    inner: C,
    wrong: Wrong,
}

impl<C: Core> WrongCore<C> {
    fn spoil(&self, outbox: &mut Outbox) {
        for command in std::mem::take(&mut outbox.commands) {
            match (self.wrong, command) {
                (Wrong::SendsTwice, Command::Send { conn, buf }) => {
                    let copy = outbox.buffers.bytes(&buf).to_vec();
                    outbox.push(Command::Send { conn, buf });
                    outbox
                        .buffers
                        .write(&copy)
                        .into_iter()
                        .for_each(|buf| outbox.commands.push(Command::Send { conn, buf }));
                }
                (Wrong::ForgetsBuffers, Command::Send { conn, buf }) if conn.index % 2 == 1 => {
                    drop(buf);
                }
                (Wrong::ClosesTwice, Command::Close { conn, abort }) => {
                    outbox.push(Command::Close { conn, abort });
                    outbox.push(Command::Close { conn, abort });
                }
                (Wrong::SendsAfterClose, Command::Close { conn, abort }) => {
                    outbox.push(Command::Close { conn, abort });
                    outbox
                        .buffers
                        .write(b"late")
                        .into_iter()
                        .for_each(|buf| outbox.commands.push(Command::Send { conn, buf }));
                }
                (Wrong::AnswersOtherBytes, Command::Send { conn, buf }) => {
                    outbox.buffers.memory(&buf)[0] ^= 1;
                    outbox.push(Command::Send { conn, buf });
                }
                (Wrong::ReusesTickets, Command::Connect { transport, source, destination, choice, range, .. }) => {
                    outbox.push(Command::Connect { ticket: 7, transport, source, destination, choice, range });
                }
                (Wrong::NeverCloses, Command::Close { .. }) => {}
                (_, command) => outbox.push(command),
            }
        }
    }
}

impl<C: Core> Core for WrongCore<C> {
    fn start(&mut self, now: Instant, outbox: &mut Outbox) {
        self.inner.start(now, outbox);
        self.spoil(outbox);
    }
    fn handle(&mut self, event: Event, now: Instant, outbox: &mut Outbox) {
        self.inner.handle(event, now, outbox);
        self.spoil(outbox);
    }
    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        self.inner.handle_timeout(now, outbox);
        self.spoil(outbox);
    }
    fn poll_timeout(&self) -> Option<Instant> {
        self.inner.poll_timeout()
    }
    fn is_done(&self) -> bool {
        self.inner.is_done()
    }
    fn report(&self) -> &Report {
        self.inner.report()
    }
    fn check_invariants(&self) -> Result<(), String> {
        self.inner.check_invariants()
    }
}

#[test]
fn wrong_cores_are_caught() {
    let (client, server) = (load_config(SourceChoice::SinglePort, 20, 20, 1), echo_config());
    let script = Script {
        orders: vec![(Instant(100_000_000), 0, Order::Ping)],
        until: Instant(1_000_000_000),
        most_steps: 100_000,
        strict: true,
        echoing: true,
    };
    let run = |client: &mut dyn Core, server: &mut dyn Core| {
        Sim::new(5, Faults::NONE).run(&mut [client], &mut [server], &script).map_err(|broken| broken.rule)
    };
    let right = run(&mut LoadCore::new(client.clone()), &mut EchoCore::new(server.clone()));
    assert!(right.is_ok_and(|report| report.connections == 20), "the same world without a wrong core is fine");
    for (wrong, on_server, rule) in [
        (Wrong::SendsTwice, true, "a second Send"),
        (Wrong::SendsTwice, false, "a second Send"),
        (Wrong::ForgetsBuffers, true, "buffers were neither sent nor released"),
        (Wrong::ClosesTwice, true, "after its Close"),
        (Wrong::ClosesTwice, false, "after its Close"),
        (Wrong::AnswersOtherBytes, true, "sends back what it did not receive"),
        (Wrong::ReusesTickets, false, "ticket 7 is in use"),
        (Wrong::NeverCloses, true, ""),
        (Wrong::SendsAfterClose, false, "after its Close"),
    ] {
        let answer = match on_server {
            true => {
                let mut bad = WrongCore { inner: EchoCore::new(server.clone()), wrong };
                run(&mut LoadCore::new(client.clone()), &mut bad)
            }
            false => {
                let mut bad = WrongCore { inner: LoadCore::new(client.clone()), wrong };
                run(&mut bad, &mut EchoCore::new(server.clone()))
            }
        };
        let said = answer.map(|report| format!("{report:?}"));
        assert!(said.as_ref().is_err_and(|text| text.contains(rule)), "{wrong:?} on server {on_server}: {said:?}");
    }
}
