//! Hold N connections to see what a carrier costs: one process listens, another connects, pings each once, and closes.
//!
//!     hold server uring|epoll WORKERS CONNECTIONS [LISTENERS]
//!     hold client uring|epoll WORKERS CONNECTIONS [kernel|port|range|single|bind [WINDOW]]
//!
//! Everything is on 127.0.0.0/8. More than a few thousand belong into a network namespace of their own.

// It drives carriers from outside, so the clock is its own (clippy.toml bans it in cores).
#![allow(clippy::disallowed_methods)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use fourtuple_carrier::{CarrierKind, CarrierReport, CarrierSettings, Worker};
use fourtuple_engine::echo::{EchoConfig, EchoCore};
use fourtuple_engine::load::{LoadConfig, LoadCore};
use fourtuple_engine::report::{Counter, Phase, Report};
use fourtuple_engine::space::{Addresses, Ports, Space};
use fourtuple_engine::{Core, Order, SourceChoice, Transport};

const PORT: u16 = 7777;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let word = |place: usize| arguments.get(place).map_or("", String::as_str);
    let number = |place: usize, default: u64| word(place).parse().unwrap_or(default);
    let kind = if word(1) == "epoll" { CarrierKind::Epoll } else { CarrierKind::Uring };
    let workers = number(2, 2);
    let connections = number(3, 1000);
    let listeners = if word(0) == "server" { number(4, 1) } else { 1 };
    let settings =
        CarrierSettings { most_connections: (connections + 3 * listeners) as u32 + 256, ..CarrierSettings::default() };
    let rss_before = rss_kilobytes();
    let started = Instant::now();
    let start = |core: Box<dyn Core>| Worker::start(kind, settings, core).expect("a carrier");
    let running: Vec<Worker> = (0..workers)
        .map(|worker| match word(0) {
            "server" => start(Box::new(EchoCore::new(echo(worker, workers, listeners)))),
            _ => start(Box::new(LoadCore::new(load(worker, workers, connections, word(4), number(5, 1024))))),
        })
        .collect();

    let mut pinged = false;
    let mut closed = word(0) == "server";
    let mut up_after = None;
    while running.iter().any(Worker::is_running) {
        std::thread::sleep(Duration::from_millis(200));
        let published: Vec<_> = running.iter().map(Worker::published).collect();
        let total = |counter| published.iter().map(|it| it.report.count(counter)).sum::<u64>();
        let every = |phase: Phase| published.iter().all(|it| it.report.phase == phase);
        let elapsed = started.elapsed().as_secs_f64();
        let carriers: Vec<CarrierReport> = published.iter().map(|it| it.carrier).collect();
        println!(
            "{elapsed:6.1} s open {} right {} wrong {} missing {} rss {:+} kB slots {:?} enters {:?} waits {:?} overflows {:?}",
            total(Counter::Open),
            total(Counter::PingsRight),
            total(Counter::PingsWrong),
            total(Counter::PingsMissing),
            rss_kilobytes() - rss_before,
            carriers.iter().map(|it| (it.rings, it.slots_in_use)).collect::<Vec<_>>(),
            carriers.iter().map(|it| it.enters).collect::<Vec<_>>(),
            carriers.iter().map(|it| it.receive_rearms).collect::<Vec<_>>(),
            carriers.iter().map(|it| it.cq_overflows).collect::<Vec<_>>(),
        );
        if word(0) == "server" && total(Counter::Open) == 0 && total(Counter::Accepted) > 0 {
            running.iter().for_each(Worker::stop);
        }
        if word(0) == "client" && every(Phase::Holding) && !pinged {
            up_after = Some(elapsed);
            println!("up {} in {elapsed:.1} s: {:.0}/s", total(Counter::Open), total(Counter::Open) as f64 / elapsed);
            running.iter().for_each(|worker| worker.order(Order::Ping));
            pinged = true;
        } else if pinged && !closed && every(Phase::Holding) && total(Counter::PingsSent) > 0 {
            println!("pinged in {:.1} s", elapsed - up_after.unwrap_or(elapsed));
            std::thread::sleep(Duration::from_secs(std::env::var("HOLD").map_or(0, |text| text.parse().unwrap_or(0))));
            running.iter().for_each(|worker| worker.order(Order::Close));
            closed = true;
        }
    }
    for worker in running {
        let last = worker.join().expect("a worker that ends well");
        println!("{:?} {:?}", brief(&last.report), last.carrier);
    }
}

fn brief(report: &Report) -> Vec<String> {
    let named = fourtuple_engine::report::COUNTERS.iter().zip(report.counts());
    let counts = named.filter(|(_, count)| **count > 0).map(|((name, ..), count)| format!("{name} {count}"));
    counts.chain(report.failures.iter().map(|failure| format!("{failure:?}"))).collect()
}

fn echo(worker: u64, workers: u64, listeners: u64) -> EchoConfig {
    let mine = (0..listeners).filter(|listener| listeners == 1 || listener % workers == worker);
    let address = |listener: u64| Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 0, 0, 1)) + (listener / 60_000) as u32);
    EchoConfig {
        listen: mine
            .map(|listener| SocketAddr::new(IpAddr::V4(address(listener)), PORT - 4000 + (listener % 60_000) as u16))
            .map(|listen| if listeners == 1 { SocketAddr::new(listen.ip(), PORT) } else { listen })
            .collect(),
        backlog: 65_535,
        reuse_port: listeners == 1,
        most_connections: 0,
        accept: true,
    }
}

fn load(worker: u64, workers: u64, connections: u64, choice: &str, window: u64) -> LoadConfig {
    let ports = Ports { first: 1024, last: 61_023 };
    let space = Space {
        sources: vec![Addresses {
            first: IpAddr::V4(Ipv4Addr::new(127, 1, 0, 1)),
            count: connections.div_ceil(60_000),
        }],
        source_ports: vec![ports],
        destinations: vec![Addresses { first: IpAddr::V4(Ipv4Addr::LOCALHOST), count: 1 }],
        destination_ports: vec![Ports { first: PORT, last: PORT }],
    };
    LoadConfig {
        transport: Transport::Stream,
        space,
        first: worker,
        stride: workers,
        connections: connections / workers + u64::from(worker < connections % workers),
        choice: match choice {
            "kernel" => SourceChoice::Kernel,
            "port" => SourceChoice::KernelPort,
            "range" => SourceChoice::KernelRange,
            "single" => SourceChoice::SinglePort,
            _ => SourceChoice::Bind,
        },
        window: window as u32,
        rate_per_s: 0,
        connect_timeout: Duration::from_secs(10),
        ping_timeout: Duration::from_secs(10),
        ping_window: 1024,
        token_bytes: 16,
        seed: 7,
        ping_every: Duration::ZERO,
        closed_loop: false,
        give_up_after: 1000,
        abort_on_close: std::env::var("ABORT").is_ok(),
        keep_fill_curve: false,
    }
}

fn rss_kilobytes() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kilobytes| kilobytes.parse().ok()).unwrap_or(0)
}
