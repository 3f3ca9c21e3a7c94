//! Secured speeches in the load core, in the seeded simulator: against a server that ends TLS and echoes, with faults.
//!
//! TLS draws its own chance, so a seed gives the same world but not the same bytes in it.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::peer::{Authority, Server};
use fourtuple_carrier::sim::{FAULTS, Fault, Faults, Random, Script as Course, Sim};
use fourtuple_engine::load::{LoadConfig, LoadCore};
use fourtuple_engine::report::{Counter, Phase, Report};
use fourtuple_engine::script::{Act, Script};
use fourtuple_engine::space::{Addresses, Ports, Space};
use fourtuple_engine::speech::Tokens;
use fourtuple_engine::{Command, ConnId, Core, Event, Instant, ListenerId, Order, Outbox, SourceChoice, Transport};
use fourtuple_tls::{Client, REASONS, Secured};
use rustls::ServerConfig;
use rustls::version::{TLS12, TLS13};

/// Ends TLS, echoes what was within.
struct Terminator {
    config: ServerConfig,
    lines: HashMap<ConnId, Line>,
    report: Report,
    closing: bool,
}

struct Line {
    server: Server,
    waiting: VecDeque<u8>,
    sending: bool,
}

impl Terminator {
    fn new(config: ServerConfig) -> Terminator {
        Terminator { config, lines: HashMap::new(), report: Report::new(), closing: false }
    }

    fn speak(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let Some(line) = self.lines.get_mut(&conn) else { return };
        line.waiting.extend(line.server.wire());
        if line.sending || line.waiting.is_empty() {
            return;
        }
        let length = line.waiting.len().min(outbox.buffers.buffer_bytes());
        let bytes: Vec<u8> = line.waiting.iter().take(length).copied().collect();
        if let Some(buf) = outbox.buffers.write(&bytes) {
            line.waiting.drain(..length);
            line.sending = true;
            outbox.push(Command::Send { conn, buf });
        }
    }

    fn close(&mut self, conn: ConnId, outbox: &mut Outbox) {
        if self.lines.remove(&conn).is_some() {
            outbox.push(Command::Close { conn, abort: false });
        }
    }
}

impl Core for Terminator {
    fn start(&mut self, _now: Instant, outbox: &mut Outbox) {
        let local = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 443);
        let listener = ListenerId(0);
        outbox.push(Command::Listen { listener, local, backlog: 4096, reuse_port: false, accept: true });
    }

    fn handle(&mut self, event: Event, _now: Instant, outbox: &mut Outbox) {
        match event {
            Event::Accepted { conn, .. } => {
                let server = Server::new(self.config.clone());
                self.lines.insert(conn, Line { server, waiting: VecDeque::new(), sending: false });
                if self.closing {
                    self.close(conn, outbox);
                }
            }
            Event::Received { conn, buf } => {
                if let Some(line) = self.lines.get_mut(&conn) {
                    line.server.take(outbox.buffers.bytes(&buf));
                    let heard = std::mem::take(&mut line.server.heard);
                    line.server.say(&heard);
                }
                outbox.buffers.release(buf);
                self.speak(conn, outbox);
            }
            Event::Sent { conn } => {
                if let Some(line) = self.lines.get_mut(&conn) {
                    line.sending = false;
                }
                self.speak(conn, outbox);
            }
            Event::Finished { conn, .. } | Event::Failed { conn, .. } => self.close(conn, outbox),
            Event::Ordered(Order::Close) => {
                self.closing = true;
                for conn in self.lines.keys().copied().collect::<Vec<_>>() {
                    self.close(conn, outbox);
                }
            }
            _ => {}
        }
    }

    fn handle_timeout(&mut self, _now: Instant, _outbox: &mut Outbox) {}

    fn poll_timeout(&self) -> Option<Instant> {
        None
    }

    fn is_done(&self) -> bool {
        self.closing
    }

    fn report(&self) -> &Report {
        &self.report
    }

    fn check_invariants(&self) -> Result<(), String> {
        Ok(())
    }
}

fn config(connections: u64) -> LoadConfig {
    let addresses = vec![Addresses { first: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), count: 1 }];
    LoadConfig {
        space: Space {
            sources: addresses.clone(),
            source_ports: vec![Ports { first: 1024, last: 9000 }],
            destinations: addresses,
            destination_ports: vec![Ports { first: 443, last: 443 }],
        },
        first: 0,
        stride: 1,
        connections,
        choice: SourceChoice::Bind,
        window: 8,
        rate_per_s: 0,
        connect_timeout: Duration::from_millis(900),
        ping_timeout: Duration::from_millis(300),
        ping_window: 8,
        token_bytes: 300,
        seed: 1,
        ping_every: Duration::from_millis(50),
        give_up_after: 20,
        abort_on_close: false,
        keep_fill_curve: false,
        closed_loop: false,
        transport: Transport::Stream,
    }
}

fn run(seed: u64, faults: Faults, client: &mut dyn Core, server: &ServerConfig, buffer_bytes: usize) {
    let mut sim = Sim::new(seed, faults);
    sim.network.buffer_bytes = buffer_bytes;
    sim.network.buffers = 64;
    let course = Course {
        orders: vec![(Instant(400_000_000), 0, Order::Target(40))],
        until: Instant(1_500_000_000),
        most_steps: 3_000_000,
        strict: false,
        echoing: false,
    };
    let mut server = Terminator::new(server.clone());
    if let Err(broken) = sim.run(&mut [client], &mut [&mut server], &course) {
        panic!("{broken}");
    }
    assert_eq!(client.report().phase, Phase::Done);
    let known = [REASONS, fourtuple_engine::speech::REASONS].concat();
    let explained = client.report().opening_reasons.iter().all(|(name, _)| known.contains(name));
    assert!(explained, "{:?}", client.report().opening_reasons);
}

#[test]
fn nothing_fails_where_nothing_breaks() {
    let authority = Authority::new();
    let client = Client::new(&authority.settings()).expect("a client");
    for (version, buffer_bytes) in [(&TLS12, 2048), (&TLS13, 2048), (&TLS12, 300), (&TLS13, 300)] {
        let server = authority.identity(&["localhost"], (2020, 2120)).server(&[version]);
        let tokens = Tokens { seed: 1, token_bytes: 300 };
        let mut core = LoadCore::speaking(config(30), Secured::new(tokens, client.clone()));
        run(1, Faults::NONE, &mut core, &server, buffer_bytes);
        let count = |counter| core.report().count(counter);
        assert_eq!((count(Counter::OpeningsRight), count(Counter::OpenPeak)), (40, 40));
        assert_eq!((count(Counter::OpeningsFailed), count(Counter::PingsWrong), count(Counter::Broken)), (0, 0, 0));
        assert!(count(Counter::PingsRight) >= 40);
        assert_eq!(core.report().opening_ns.count(), 40);
    }
}

#[test]
fn whatever_a_network_does_is_counted() {
    let authority = Authority::new();
    let client = Client::new(&authority.settings()).expect("a client");
    let server = authority.identity(&["localhost"], (2020, 2120)).server(&[&TLS12, &TLS13]);
    let (mut right, mut failed) = (0, 0);
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let mut faults = Faults::NONE;
        for fault in FAULTS {
            let most = if matches!(fault, Fault::Reset) { 15 } else { 200 };
            faults = faults.with(fault, random.between(0, most) as u16);
        }
        let hello = || b"hello".to_vec();
        let script = Script::new(
            vec![Act::Say(hello()), Act::Expect(hello())],
            vec![Act::Say(vec![b'x'; 64]), Act::Skip(32), Act::Skip(32)],
        );
        let speech = Secured::new(script.expect("a script"), client.clone());
        let mut core = LoadCore::speaking(config(30), speech);
        run(seed, faults, &mut core, &server, random.between(64, 2048) as usize);
        right += core.report().count(Counter::PingsRight);
        failed += core.report().count(Counter::OpeningsFailed);
        assert_eq!(core.report().count(Counter::PingsWrong), 0, "seed {seed}");
    }
    assert!(right > 1000 && failed > 10, "{right} rounds right, {failed} openings failed");
}
