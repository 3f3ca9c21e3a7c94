//! sim: a seeded carrier. A virtual network under a virtual clock runs client cores against server cores in one thread,
//! injects faults, and holds both sides to the contract after every step.
//!
//! Datagrams have no server core: at every destination the network itself sends each one back.
//!
//! Decides what a network and a kernel may do to a core: every order of events that the contract allows, chosen by one
//! seed, so that a failing run replays exactly. Knows no system call, and nothing of a core but its commands; only with
//! [`Script::strict`] it also knows that reports must add up, and with [`Script::echoing`] that servers echo. In its kernel the
//! path of a unix socket is the text of an endpoint: whoever listens there listens on both.

mod datagrams;
mod ferries;
mod network;
mod world;

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use fourtuple_engine::{Core, Instant, Order};

use world::World;

/// What can be injected; `Faults` says how often, `SimReport::faults` how often it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The peer's host answers SYN with RST.
    Refusal,
    /// The connection breaks on both sides.
    Reset,
    /// socket(): the process's table is full.
    Emfile,
    /// socket(): the host's table is full.
    Enfile,
    /// connect(): no memory.
    Enomem,
    /// connect(): no buffer space.
    Enobufs,
    /// accept() fails with one of the four.
    Accept,
    /// A SYN is lost; it is sent again after 1, 2, 4 ... s as in tcp_retransmit_timer().
    SynLost,
    /// The kernel takes a part of what is sent.
    ShortWrite,
    /// What has arrived is not read for a while.
    SlowReader,
    /// A datagram or its echo is lost.
    DatagramLost,
    /// An echo comes twice.
    DatagramDoubled,
    /// An echo is overtaken by those after it.
    DatagramOvertaken,
    /// Nobody listens there: an ICMP message instead of the echo.
    DatagramRefused,
    /// A datagram cannot be sent.
    DatagramUnsent,
    /// A message to another process has to wait.
    FerryFull,
    /// A socket to another process breaks.
    FerryLost,
}

/// All faults, in the order of `Faults::per_mille`.
pub const FAULTS: [Fault; 17] = [
    Fault::Refusal,
    Fault::Reset,
    Fault::Emfile,
    Fault::Enfile,
    Fault::Enomem,
    Fault::Enobufs,
    Fault::Accept,
    Fault::SynLost,
    Fault::ShortWrite,
    Fault::SlowReader,
    Fault::DatagramLost,
    Fault::DatagramDoubled,
    Fault::DatagramOvertaken,
    Fault::DatagramRefused,
    Fault::DatagramUnsent,
    Fault::FerryFull,
    Fault::FerryLost,
];

/// How often each fault strikes where it could.
#[derive(Clone, Copy, Default, Debug)]
pub struct Faults {
    /// Per thousand occasions, by fault; below 1000.
    pub per_mille: [u16; FAULTS.len()],
}

impl Faults {
    /// A network that does nothing wrong.
    pub const NONE: Faults = Faults { per_mille: [0; FAULTS.len()] };

    /// With this fault so often.
    pub fn with(mut self, fault: Fault, per_mille: u16) -> Faults {
        assert!(per_mille < 1000, "a fault that always strikes leaves nothing to test");
        self.per_mille[fault as usize] = per_mille;
        self
    }
}

/// The virtual network and kernel.
#[derive(Clone, Copy, Debug)]
pub struct Network {
    /// One way, shortest and longest, microseconds.
    pub latency_us: (u64, u64),
    /// Bytes that a receiver's kernel holds, on the wire and arrived, before the sender must wait.
    pub window_bytes: usize,
    /// Ports that the kernel chooses from.
    pub ports: (u16, u16),
    /// Ports that another program holds for itself; none if the first is above the last.
    pub foreign_ports: (u16, u16),
    /// How long a tuple stays taken after a graceful end.
    pub time_wait: Duration,
    /// Bytes of a buffer.
    pub buffer_bytes: usize,
    /// Buffers to receive in and to send with, per core.
    pub buffers: u32,
}

impl Default for Network {
    fn default() -> Network {
        Network {
            latency_us: (20, 200),
            window_bytes: 4096,
            ports: (32768, 60999),
            foreign_ports: (1, 0),
            time_wait: Duration::ZERO,
            buffer_bytes: 2048,
            buffers: 32,
        }
    }
}

/// What happens from outside, and when it must be over.
#[derive(Clone, Debug)]
pub struct Script {
    /// When, to which core (clients first, then servers), what.
    pub orders: Vec<(Instant, usize, Order)>,
    /// Then everybody still running is told to close.
    pub until: Instant,
    /// A run that takes more steps has no end.
    pub most_steps: u64,
    /// Reports add up, and commands for connections that are gone are wrong rather than ignored.
    pub strict: bool,
    /// Servers send back what they receive, and nothing else.
    pub echoing: bool,
}

/// What a run was.
#[derive(Clone, Default, Debug)]
pub struct SimReport {
    /// Events and timeouts delivered.
    pub steps: u64,
    /// Connections that stood (as seen by clients).
    pub connections: u64,
    /// How often each fault struck, by [`FAULTS`].
    pub faults: [u64; FAULTS.len()],
    /// Bytes delivered to cores.
    pub bytes: u64,
    /// Most bytes in the virtual kernel for one direction of one connection.
    pub most_bytes_waiting: usize,
    /// Virtual time at the end.
    pub ended: Instant,
}

/// A rule that did not hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Broken {
    /// Runs it again.
    pub seed: u64,
    /// At which step.
    pub step: u64,
    /// By which core (clients first, then servers).
    pub core: usize,
    /// Which rule.
    pub rule: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Broken { seed, step, core, rule } = self;
        write!(out, "seed {seed}, step {step}, core {core}: {rule}")
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, seeded, and good enough to choose with.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of this seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next_u64() % (high - low + 1)
    }

    /// True `per_mille` times in a thousand.
    pub fn chance(&mut self, per_mille: u16) -> bool {
        per_mille > 0 && self.next_u64() % 1000 < u64::from(per_mille)
    }
}

/// The simulator.
#[derive(Clone, Debug)]
pub struct Sim {
    seed: u64,
    faults: Faults,
    /// The world of the next run.
    pub network: Network,
    /// Where listening sockets listen that somebody outside holds: what `Command::Adopt` names by their places here.
    pub given: Vec<SocketAddr>,
}

impl Sim {
    /// A simulator that does the same for the same seed.
    pub fn new(seed: u64, faults: Faults) -> Sim {
        Sim { seed, faults, network: Network::default(), given: Vec::new() }
    }

    /// Run clients against servers until all are done. All live in one network namespace. `Err` names a broken rule.
    pub fn run(
        &mut self,
        clients: &mut [&mut dyn Core],
        servers: &mut [&mut dyn Core],
        script: &Script,
    ) -> Result<SimReport, Broken> {
        let mut cores: Vec<&mut dyn Core> = Vec::new();
        let client_count = clients.len();
        for core in clients.iter_mut() {
            cores.push(&mut **core);
        }
        for core in servers.iter_mut() {
            cores.push(&mut **core);
        }
        let mut world = World::new(self, script, client_count, cores.len());
        world.run(&mut cores).map_err(|rule| Broken {
            seed: self.seed,
            step: world.report.steps,
            core: world.current,
            rule,
        })?;
        Ok(world.report)
    }
}
