//! sim: a seeded carrier. A virtual network under a virtual clock runs client cores against server cores in one thread,
//! injects faults, and holds both sides to the contract after every step.
//!
//! Decides what a network and a kernel may do to a core: every order of events that the contract allows, chosen by one
//! seed, so that a failing run replays exactly. Knows no system call, and nothing of a core but its commands; only with
//! [`Script::strict`] it also knows that servers echo and that reports must add up.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use fourtuple_engine::report::Counter;
use fourtuple_engine::{
    Buf, Buffers, Command, ConnId, Core, Errno, Event, Instant, ListenerId, Order, Outbox, SourceChoice, Step,
};

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
}

/// All faults, in the order of `Faults::per_mille`.
pub const FAULTS: [Fault; 10] = [
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
    /// How long a tuple stays taken after a graceful end.
    pub time_wait: Duration,
    /// Bytes of a buffer.
    pub buffer_bytes: usize,
    /// Buffers to receive in, per core.
    pub receive_buffers: u32,
    /// Buffers to send with, per core.
    pub send_buffers: u32,
}

impl Default for Network {
    fn default() -> Network {
        Network {
            latency_us: (20, 200),
            window_bytes: 4096,
            ports: (32768, 60999),
            time_wait: Duration::ZERO,
            buffer_bytes: 2048,
            receive_buffers: 16,
            send_buffers: 16,
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
    /// Servers echo, reports add up, and commands for connections that are gone are wrong rather than ignored.
    pub strict: bool,
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
}

impl Sim {
    /// A simulator that does the same for the same seed.
    pub fn new(seed: u64, faults: Faults) -> Sim {
        Sim { seed, faults, network: Network::default() }
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

type Tuple = (SocketAddr, SocketAddr);
/// A link and which end of it: 0 connected, 1 was connected to.
type Place = (usize, usize);

#[derive(Debug)]
enum Happening {
    Start(usize),
    Order(usize, Order),
    Listen(usize, ListenerId, SocketAddr, u32, bool),
    Fail { host: usize, ticket: u32, serial: u64, step: Step, error: Errno },
    Syn { host: usize, ticket: u32, serial: u64, tries: u32 },
    Establish { host: usize, ticket: u32, serial: u64 },
    Accept(usize, ListenerId),
    Arrive(Place),
    Read(Place),
    Push(Place),
    TellSent(Place),
    TellClosed(Place),
    FreeTuple(Tuple),
}

#[derive(Debug)]
enum Packet {
    Bytes(Vec<u8>),
    Fin,
    Rst,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Its core does not know it yet.
    Unknown,
    Open,
    /// `Failed` is told.
    Failed,
    /// `Close` is given.
    Closing,
    /// `Closed` is told, or it was never known.
    Gone,
}

#[derive(Debug)]
struct End {
    host: usize,
    conn: ConnId,
    phase: Phase,
    /// The `Send` in progress and how much of it the kernel has.
    out: Option<(Buf, usize)>,
    /// From `Send` until `Sent`.
    sending: bool,
    /// On the way to this end.
    wire: VecDeque<Packet>,
    wire_bytes: usize,
    last_arrival: Instant,
    inbox: VecDeque<u8>,
    fin: bool,
    fin_told: bool,
    broken: bool,
    paused: bool,
    /// Received by a server and not sent back yet.
    unechoed: VecDeque<u8>,
}

impl End {
    fn new(host: usize) -> End {
        End {
            host,
            conn: ConnId { index: 0, generation: 0 },
            phase: Phase::Unknown,
            out: None,
            sending: false,
            wire: VecDeque::new(),
            wire_bytes: 0,
            last_arrival: Instant(0),
            inbox: VecDeque::new(),
            fin: false,
            fin_told: false,
            broken: false,
            paused: false,
            unechoed: VecDeque::new(),
        }
    }
}

#[derive(Debug)]
struct Link {
    tuple: Tuple,
    ends: [End; 2],
    /// It ended with RST somewhere: no TIME_WAIT.
    reset: bool,
}

#[derive(Debug)]
struct Attempt {
    serial: u64,
    tuple: Option<Tuple>,
    link: Option<usize>,
}

#[derive(Debug)]
struct Listener {
    local: SocketAddr,
    backlog: u32,
    accept: bool,
    queue: VecDeque<usize>,
    retry_pending: bool,
}

/// What the carrier keeps per core.
#[derive(Debug)]
struct Host {
    outbox: Outbox,
    started: bool,
    done: bool,
    attempts: HashMap<u32, Attempt>,
    listeners: HashMap<ListenerId, Listener>,
    /// By `ConnId::index`: generation, and who uses it.
    conns: Vec<(u16, Option<Place>)>,
    free: Vec<u32>,
    receive_free: Vec<u32>,
    attempted: u64,
    connected: u64,
    accepted: u64,
}

struct World<'a> {
    random: Random,
    faults: Faults,
    network: Network,
    script: &'a Script,
    client_count: usize,
    now: Instant,
    serial: u64,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    happenings: HashMap<u64, Happening>,
    hosts: Vec<Host>,
    links: Vec<Link>,
    tuples: HashSet<Tuple>,
    listening: HashMap<SocketAddr, Vec<(usize, ListenerId)>>,
    report: SimReport,
    current: usize,
}

type Rule = Result<(), String>;

impl<'a> World<'a> {
    fn new(sim: &Sim, script: &'a Script, client_count: usize, core_count: usize) -> World<'a> {
        let network = sim.network;
        let host = |_| {
            let per_chunk = network.receive_buffers.max(network.send_buffers);
            let mut buffers = Buffers::new(network.buffer_bytes, per_chunk, 1);
            let first = buffers.set_apart();
            Host {
                outbox: Outbox::new(buffers),
                started: false,
                done: false,
                attempts: HashMap::new(),
                listeners: HashMap::new(),
                conns: Vec::new(),
                free: Vec::new(),
                receive_free: (first..first + network.receive_buffers).collect(),
                attempted: 0,
                connected: 0,
                accepted: 0,
            }
        };
        World {
            random: Random::new(sim.seed),
            faults: sim.faults,
            network,
            script,
            client_count,
            now: Instant(0),
            serial: 0,
            queue: BinaryHeap::new(),
            happenings: HashMap::new(),
            hosts: (0..core_count).map(host).collect(),
            links: Vec::new(),
            tuples: HashSet::new(),
            listening: HashMap::new(),
            report: SimReport::default(),
            current: 0,
        }
    }

    // ---- the clock --------------------------------------------------------------------------------------------------

    fn run(&mut self, cores: &mut [&mut dyn Core]) -> Rule {
        for host in 0..cores.len() {
            // Servers first: a client that comes before its server is only refused, which is `Fault::Refusal`'s part.
            self.at(if host < self.client_count { 1_000_000 } else { 0 }, Happening::Start(host));
        }
        for &(when, host, order) in &self.script.orders {
            self.at(when.0, Happening::Order(host, order));
        }
        for host in 0..cores.len() {
            self.at(self.script.until.0, Happening::Order(host, Order::Close));
        }
        let mut servers_told = false;
        while !self.hosts.iter().all(|host| host.done) {
            if !servers_told && self.hosts[..self.client_count].iter().all(|host| host.done) {
                servers_told = true;
                for host in self.client_count..cores.len() {
                    self.soon(Happening::Order(host, Order::Close));
                }
            }
            self.report.steps += 1;
            if self.report.steps > self.script.most_steps {
                return Err(format!("no end after {} steps", self.script.most_steps));
            }
            self.step(cores)?;
        }
        self.report.ended = self.now;
        for (host, core) in cores.iter().enumerate() {
            self.current = host;
            self.check_end(host, &**core)?;
        }
        Ok(())
    }

    fn step(&mut self, cores: &mut [&mut dyn Core]) -> Rule {
        let next = self.queue.peek().map(|Reverse((when, _))| *when);
        let deadlines = cores.iter().zip(&self.hosts).enumerate().filter(|(_, (_, host))| host.started && !host.done);
        let due = deadlines.filter_map(|(host, (core, _))| core.poll_timeout().map(|when| (when, host))).min();
        if let Some((when, host)) = due
            && next.is_none_or(|next| when.max(self.now) <= next)
        {
            // A moment passes with every turn, so a deadline in the past cannot stop the clock.
            self.now = Instant(self.now.max(when).0 + 1000);
            self.current = host;
            cores[host].handle_timeout(self.now, &mut self.hosts[host].outbox);
            return self.after(host, cores);
        }
        let Some(Reverse((when, serial))) = self.queue.pop() else {
            return Err("nothing will ever happen, and not all is done".into());
        };
        self.now = self.now.max(when);
        match self.happenings.remove(&serial) {
            Some(happening) => self.happen(happening, cores),
            None => Ok(()),
        }
    }

    fn at(&mut self, when: u64, happening: Happening) {
        self.serial += 1;
        self.queue.push(Reverse((Instant(when), self.serial)));
        self.happenings.insert(self.serial, happening);
    }

    fn soon(&mut self, happening: Happening) {
        let delay = self.random.between(0, 20_000);
        self.at(self.now.0 + delay, happening);
    }

    fn after_latency(&mut self, happening: Happening) {
        let when = self.now.0 + self.latency_ns();
        self.at(when, happening);
    }

    fn after_ms(&mut self, ms: u64, happening: Happening) {
        self.at(self.now.0 + ms * 1_000_000, happening);
    }

    fn latency_ns(&mut self) -> u64 {
        let (low, high) = self.network.latency_us;
        self.random.between(low * 1000, high * 1000)
    }

    fn strikes(&mut self, fault: Fault) -> bool {
        let strikes = self.random.chance(self.faults.per_mille[fault as usize]);
        self.report.faults[fault as usize] += u64::from(strikes);
        strikes
    }

    // ---- telling cores, and what they answer ------------------------------------------------------------------------

    fn tell(&mut self, host: usize, event: Event, cores: &mut [&mut dyn Core]) -> Rule {
        self.current = host;
        if self.hosts[host].done {
            if let Event::Received { buf, .. } = event {
                self.hosts[host].outbox.buffers.release(buf);
            }
            return Ok(());
        }
        cores[host].handle(event, self.now, &mut self.hosts[host].outbox);
        self.after(host, cores)
    }

    fn after(&mut self, host: usize, cores: &mut [&mut dyn Core]) -> Rule {
        for command in std::mem::take(&mut self.hosts[host].outbox.commands) {
            self.obey(host, command)?;
        }
        let Host { outbox, receive_free, .. } = &mut self.hosts[host];
        receive_free.extend(outbox.buffers.drain_reclaimed());
        cores[host].check_invariants()?;
        if self.script.strict {
            self.check_report(host, cores[host])?;
        }
        if cores[host].is_done() {
            self.retire(host)?;
        }
        Ok(())
    }

    fn obey(&mut self, host: usize, command: Command) -> Rule {
        match command {
            Command::Listen { listener, local, backlog, accept, .. } => {
                if self.hosts[host].listeners.contains_key(&listener) {
                    return Err(format!("{listener:?} is in use"));
                }
                self.soon(Happening::Listen(host, listener, local, backlog, accept));
            }
            Command::Connect { ticket, source, destination, choice, range } => {
                self.connect(host, ticket, (source, destination), choice, range)?;
            }
            Command::CancelConnect { ticket } => self.cancel(host, ticket),
            Command::Send { conn, buf } => return self.send(host, conn, buf),
            Command::Pause { conn } => {
                if let Some((link, end)) = self.place(host, conn)? {
                    self.links[link].ends[end].paused = true;
                }
            }
            Command::Resume { conn } => {
                if let Some((link, end)) = self.place(host, conn)? {
                    self.links[link].ends[end].paused = false;
                    self.soon(Happening::Read((link, end)));
                }
            }
            Command::Close { conn, abort } => {
                if let Some(place) = self.place(host, conn)? {
                    self.leave(place, abort);
                    self.links[place.0].ends[place.1].phase = Phase::Closing;
                    self.soon(Happening::TellClosed(place));
                    // Bytes already on their way to the core may come between Close and Closed (rule 7).
                    self.soon(Happening::Read(place));
                }
            }
            Command::Unlisten { listener } => self.unlisten(host, listener),
        }
        Ok(())
    }

    /// Who the connection is; `None` if it is gone and that is allowed.
    fn place(&self, host: usize, conn: ConnId) -> Result<Option<Place>, String> {
        let known = self.hosts[host].conns.get(conn.index as usize);
        let place = known.filter(|known| known.0 == conn.generation).and_then(|known| known.1);
        match place {
            Some((link, end)) if self.links[link].ends[end].phase == Phase::Closing => match self.script.strict {
                true => Err(format!("a command for {conn:?} after its Close")),
                false => Ok(None),
            },
            None if self.script.strict => Err(format!("a command for {conn:?}, which is gone")),
            place => Ok(place),
        }
    }

    // ---- what happens -----------------------------------------------------------------------------------------------

    fn happen(&mut self, happening: Happening, cores: &mut [&mut dyn Core]) -> Rule {
        match happening {
            Happening::Start(host) => {
                self.current = host;
                self.hosts[host].started = true;
                cores[host].start(self.now, &mut self.hosts[host].outbox);
                self.after(host, cores)
            }
            Happening::Order(host, order) => self.tell(host, Event::Ordered(order), cores),
            Happening::Listen(host, listener, local, backlog, accept) => {
                let taken = self.listening.get(&local).is_some_and(|users| users.iter().any(|user| user.0 == host));
                if taken {
                    let (step, error) = (Step::Bind, Errno::EADDRINUSE);
                    return self.tell(host, Event::ListenFailed { listener, step, error }, cores);
                }
                let (queue, retry_pending) = (VecDeque::new(), false);
                let row = Listener { local, backlog, accept, queue, retry_pending };
                self.hosts[host].listeners.insert(listener, row);
                self.listening.entry(local).or_default().push((host, listener));
                self.tell(host, Event::Listening { listener, local }, cores)
            }
            Happening::Fail { host, ticket, serial, step, error } => {
                if self.attempt(host, ticket, serial).is_none() {
                    return Ok(());
                }
                let attempt = self.hosts[host].attempts.remove(&ticket);
                attempt.into_iter().for_each(|attempt| self.give_up(attempt));
                self.tell(host, Event::ConnectFailed { ticket, step, error }, cores)
            }
            Happening::Syn { host, ticket, serial, tries } => {
                self.syn(host, ticket, serial, tries);
                Ok(())
            }
            Happening::Establish { host, ticket, serial } => {
                let Some(link) = self.attempt(host, ticket, serial).and_then(|attempt| attempt.link) else {
                    return Ok(());
                };
                self.hosts[host].attempts.remove(&ticket);
                self.hosts[host].connected += 1;
                self.report.connections += 1;
                let conn = self.name((link, 0));
                self.tell(host, Event::Connected { ticket, conn }, cores)
            }
            Happening::Accept(host, listener) => self.accept(host, listener, cores),
            Happening::Arrive(place) => {
                self.arrive(place);
                Ok(())
            }
            Happening::Read(place) => self.read(place, cores),
            Happening::Push(place) => {
                self.push(place);
                Ok(())
            }
            Happening::TellSent((link, end)) => {
                let this = &mut self.links[link].ends[end];
                if this.phase != Phase::Open || this.broken {
                    return Ok(());
                }
                this.sending = false;
                let (host, conn) = (this.host, this.conn);
                self.tell(host, Event::Sent { conn }, cores)
            }
            Happening::TellClosed((link, end)) => {
                let this = &mut self.links[link].ends[end];
                if this.phase == Phase::Gone {
                    return Ok(());
                }
                this.phase = Phase::Gone;
                let (host, conn) = (this.host, this.conn);
                self.release_name(host, conn);
                self.forget(link);
                self.tell(host, Event::Closed { conn }, cores)
            }
            Happening::FreeTuple(tuple) => {
                self.tuples.remove(&tuple);
                Ok(())
            }
        }
    }

    fn attempt(&self, host: usize, ticket: u32, serial: u64) -> Option<&Attempt> {
        self.hosts[host].attempts.get(&ticket).filter(|attempt| attempt.serial == serial)
    }

    // ---- connecting and accepting -----------------------------------------------------------------------------------

    fn connect(&mut self, host: usize, ticket: u32, asked: Tuple, choice: SourceChoice, range: (u16, u16)) -> Rule {
        let serial = self.serial;
        let attempt = Attempt { serial, tuple: None, link: None };
        if self.hosts[host].attempts.insert(ticket, attempt).is_some() {
            return Err(format!("ticket {ticket} is in use"));
        }
        self.hosts[host].attempted += 1;
        let shortages = [
            (Fault::Emfile, Step::Socket, Errno::EMFILE),
            (Fault::Enfile, Step::Socket, Errno::ENFILE),
            (Fault::Enomem, Step::Connect, Errno::ENOMEM),
            (Fault::Enobufs, Step::Connect, Errno::ENOBUFS),
        ];
        for (fault, step, error) in shortages {
            if self.strikes(fault) {
                self.soon(Happening::Fail { host, ticket, serial, step, error });
                return Ok(());
            }
        }
        match self.choose(asked, choice, range) {
            Some(tuple) => {
                self.tuples.insert(tuple);
                self.hosts[host].attempts.entry(ticket).and_modify(|attempt| attempt.tuple = Some(tuple));
                self.after_latency(Happening::Syn { host, ticket, serial, tries: 0 });
            }
            None => {
                // __inet_check_established() and __inet_hash_connect(): EADDRNOTAVAIL, whoever chose (catalogue A1).
                let (step, error) = (Step::Connect, Errno::EADDRNOTAVAIL);
                self.soon(Happening::Fail { host, ticket, serial, step, error });
            }
        }
        Ok(())
    }

    /// A free tuple, as the kernel would find one.
    fn choose(&mut self, (source, destination): Tuple, choice: SourceChoice, range: (u16, u16)) -> Option<Tuple> {
        let address = match (source.ip().is_unspecified(), destination) {
            (false, _) => source.ip(),
            (true, SocketAddr::V4(_)) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            (true, SocketAddr::V6(_)) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        let (low, high) = match choice {
            SourceChoice::SinglePort | SourceChoice::Bind => (source.port(), source.port()),
            // A half outside of the sysctl's range is ignored (catalogue A4).
            SourceChoice::KernelRange => (range.0.max(self.network.ports.0), range.1.min(self.network.ports.1)),
            SourceChoice::Kernel | SourceChoice::KernelPort => self.network.ports,
        };
        let ports = (u32::from(high) + 1).checked_sub(u32::from(low)).filter(|&ports| ports > 0)?;
        let start = self.random.between(0, u64::from(ports) - 1) as u32;
        (0..ports)
            .map(|step| (SocketAddr::new(address, low + ((start + step) % ports) as u16), destination))
            .find(|tuple| !self.tuples.contains(tuple))
    }

    fn syn(&mut self, host: usize, ticket: u32, serial: u64, tries: u32) {
        let Some(tuple) = self.attempt(host, ticket, serial).and_then(|attempt| attempt.tuple) else { return };
        let lost = self.strikes(Fault::SynLost);
        let any = if tuple.1.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let users = [tuple.1, SocketAddr::new(any, tuple.1.port())];
        let users = users.iter().filter_map(|local| self.listening.get(local)).find(|users| !users.is_empty());
        let listener = users.map(|users| users[serial as usize % users.len()]);
        if !lost && (listener.is_none() || self.strikes(Fault::Refusal)) {
            let (step, error) = (Step::Connect, Errno::ECONNREFUSED);
            return self.after_latency(Happening::Fail { host, ticket, serial, step, error });
        }
        let row = listener.and_then(|(server, id)| Some((server, id, self.hosts[server].listeners.get_mut(&id)?)));
        let Some((server, id, row)) = row.filter(|row| !lost && row.2.queue.len() <= row.2.backlog as usize) else {
            // Lost, or the accept queue is full, which drops a SYN as well (catalogue D1).
            return match tries {
                0..6 => self.after_ms(1000 << tries, Happening::Syn { host, ticket, serial, tries: tries + 1 }),
                _ => self.soon(Happening::Fail { host, ticket, serial, step: Step::Connect, error: Errno::ETIMEDOUT }),
            };
        };
        let link = self.links.len();
        row.queue.push_back(link);
        let accepts = row.accept && !row.retry_pending;
        self.links.push(Link { tuple, ends: [End::new(host), End::new(server)], reset: false });
        self.hosts[host].attempts.entry(ticket).and_modify(|attempt| attempt.link = Some(link));
        self.after_latency(Happening::Establish { host, ticket, serial });
        if accepts {
            self.soon(Happening::Accept(server, id));
        }
    }

    /// Nothing is left of the attempt here; a server that knows of it is told by RST.
    fn give_up(&mut self, attempt: Attempt) {
        match (attempt.link, attempt.tuple) {
            (Some(link), _) => {
                self.leave((link, 0), true);
                self.links[link].ends[0].phase = Phase::Gone;
                self.forget(link);
            }
            (None, Some(tuple)) => drop(self.tuples.remove(&tuple)),
            (None, None) => {}
        }
    }

    fn cancel(&mut self, host: usize, ticket: u32) {
        let Some(attempt) = self.hosts[host].attempts.get(&ticket) else { return };
        let (serial, stands) = (attempt.serial, attempt.link.is_some());
        // With SYN-ACK on its way either may win.
        if !stands || self.random.chance(500) {
            let (step, error) = (Step::Connect, Errno::ECANCELED);
            self.soon(Happening::Fail { host, ticket, serial, step, error });
        }
    }

    fn accept(&mut self, host: usize, listener: ListenerId, cores: &mut [&mut dyn Core]) -> Rule {
        let strikes = self.strikes(Fault::Accept);
        let Some(row) = self.hosts[host].listeners.get_mut(&listener) else { return Ok(()) };
        row.retry_pending = false;
        if row.queue.is_empty() {
            return Ok(());
        }
        if strikes {
            row.retry_pending = true;
            self.after_ms(100, Happening::Accept(host, listener));
            let errors = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS];
            let error = errors[self.random.between(0, 3) as usize];
            return self.tell(host, Event::AcceptFailed { listener, error }, cores);
        }
        let Some(link) = row.queue.pop_front() else { return Ok(()) };
        if !row.queue.is_empty() {
            self.soon(Happening::Accept(host, listener));
        }
        self.hosts[host].accepted += 1;
        let conn = self.name((link, 1));
        self.tell(host, Event::Accepted { listener, conn }, cores)
    }

    fn unlisten(&mut self, host: usize, listener: ListenerId) {
        let Some(row) = self.hosts[host].listeners.remove(&listener) else { return };
        if let Some(users) = self.listening.get_mut(&row.local) {
            users.retain(|&user| user != (host, listener));
        }
        // inet_csk_listen_stop() resets what nobody accepted.
        for link in row.queue {
            self.leave((link, 1), true);
            self.links[link].ends[1].phase = Phase::Gone;
            self.forget(link);
        }
    }

    /// Give the end a place in its core's table, and let what has arrived be read.
    fn name(&mut self, place: Place) -> ConnId {
        let this = &mut self.links[place.0].ends[place.1];
        let host = &mut self.hosts[this.host];
        let index = host.free.pop().unwrap_or_else(|| {
            host.conns.push((0, None));
            host.conns.len() as u32 - 1
        });
        let row = &mut host.conns[index as usize];
        row.1 = Some(place);
        this.conn = ConnId { index, generation: row.0 };
        this.phase = Phase::Open;
        let conn = this.conn;
        self.soon(Happening::Read(place));
        conn
    }

    fn release_name(&mut self, host: usize, conn: ConnId) {
        let row = &mut self.hosts[host].conns[conn.index as usize];
        *row = (row.0.wrapping_add(1), None);
        self.hosts[host].free.push(conn.index);
    }

    // ---- bytes ------------------------------------------------------------------------------------------------------

    fn send(&mut self, host: usize, conn: ConnId, buf: Buf) -> Rule {
        let Some((link, end)) = self.place(host, conn)? else {
            self.hosts[host].outbox.buffers.release(buf);
            return Ok(());
        };
        let bytes = self.hosts[host].outbox.buffers.bytes(&buf);
        let this = &mut self.links[link].ends[end];
        if this.sending {
            return Err(format!("a second Send on {conn:?} while one is outstanding"));
        }
        if bytes.is_empty() {
            return Err(format!("a Send of nothing on {conn:?}"));
        }
        if self.script.strict && end == 1 && !bytes.iter().all(|&byte| this.unechoed.pop_front() == Some(byte)) {
            return Err(format!("{conn:?} sends back what it did not receive"));
        }
        this.sending = true;
        if this.broken || this.phase != Phase::Open {
            self.hosts[host].outbox.buffers.release(buf);
            return Ok(());
        }
        this.out = Some((buf, 0));
        self.soon(Happening::Push((link, end)));
        Ok(())
    }

    /// Hand bytes to the network as far as the receiver's window goes.
    fn push(&mut self, (link, end): Place) {
        let short = self.links[link].ends[end].out.is_some() && self.strikes(Fault::ShortWrite);
        let peer = &self.links[link].ends[1 - end];
        let room = self.network.window_bytes.saturating_sub(peer.inbox.len() + peer.wire_bytes);
        let this = &mut self.links[link].ends[end];
        let Some((buf, done)) = &mut this.out else { return };
        if room == 0 {
            return;
        }
        let buffers = &mut self.hosts[this.host].outbox.buffers;
        let rest = &buffers.bytes(buf)[*done..];
        let most = rest.len().min(room);
        let count = if short { self.random.between(1, most as u64) as usize } else { most };
        let bytes = rest[..count].to_vec();
        *done += count;
        let is_whole = *done == buf.len();
        if is_whole {
            if let Some((buf, _)) = this.out.take() {
                buffers.release(buf);
            }
            self.hosts[self.links[link].ends[end].host].reclaim();
            self.soon(Happening::TellSent((link, end)));
        } else if count < room {
            self.soon(Happening::Push((link, end)));
        }
        self.transmit((link, 1 - end), Packet::Bytes(bytes));
    }

    /// Put a packet on the wire to `place`, behind those already there.
    fn transmit(&mut self, place: Place, packet: Packet) {
        let arrival = Instant(self.now.0 + self.latency_ns());
        let to = &mut self.links[place.0].ends[place.1];
        to.last_arrival = to.last_arrival.max(arrival);
        if let Packet::Bytes(bytes) = &packet {
            to.wire_bytes += bytes.len();
            self.report.most_bytes_waiting = self.report.most_bytes_waiting.max(to.wire_bytes + to.inbox.len());
        }
        to.wire.push_back(packet);
        let when = to.last_arrival.0;
        self.at(when, Happening::Arrive(place));
    }

    fn arrive(&mut self, (link, end): Place) {
        let Some(packet) = self.links[link].ends[end].wire.pop_front() else { return };
        if self.strikes(Fault::Reset) {
            self.break_off((link, 0));
            return self.break_off((link, 1));
        }
        let this = &mut self.links[link].ends[end];
        match packet {
            Packet::Bytes(bytes) => {
                this.wire_bytes -= bytes.len();
                if matches!(this.phase, Phase::Closing | Phase::Gone) {
                    // tcp_rcv_state_process(): data for a socket that nobody reads is answered by RST.
                    return self.transmit((link, 1 - end), Packet::Rst);
                }
                this.inbox.extend(bytes);
            }
            Packet::Fin => this.fin = true,
            Packet::Rst => return self.break_off((link, end)),
        }
        self.soon(Happening::Read((link, end)));
    }

    /// The end is told that its connection broke, and its `Send` is over.
    fn break_off(&mut self, (link, end): Place) {
        self.links[link].reset = true;
        self.drop_bytes((link, end));
        self.links[link].ends[end].broken = true;
        self.soon(Happening::Read((link, end)));
    }

    /// Release what the end sends and forget what came for it.
    fn drop_bytes(&mut self, (link, end): Place) {
        let this = &mut self.links[link].ends[end];
        if let Some((buf, _)) = this.out.take() {
            self.hosts[this.host].outbox.buffers.release(buf);
            self.hosts[this.host].reclaim();
        }
        (this.wire_bytes, this.fin) = (0, false);
        this.wire.clear();
        this.inbox.clear();
    }

    /// Tell the core the next thing about its connection: it broke, bytes, or FIN.
    fn read(&mut self, (link, end): Place, cores: &mut [&mut dyn Core]) -> Rule {
        let (late, slow) = (self.random.chance(300), self.strikes(Fault::SlowReader));
        let this = &mut self.links[link].ends[end];
        let (host, conn) = (this.host, this.conn);
        let may_read = match this.phase {
            Phase::Open => !this.paused || late,
            Phase::Closing => late,
            Phase::Unknown | Phase::Failed | Phase::Gone => return Ok(()),
        };
        if this.broken && this.phase == Phase::Open {
            this.phase = Phase::Failed;
            let (step, error) = match this.sending {
                true => (Step::Send, Errno::EPIPE),
                false => (Step::Receive, Errno::ECONNRESET),
            };
            return self.tell(host, Event::Failed { conn, step, error }, cores);
        }
        if !may_read {
            return Ok(());
        }
        if slow {
            self.after_ms(20, Happening::Read((link, end)));
            return Ok(());
        }
        if !this.inbox.is_empty() {
            let most = this.inbox.len().min(self.network.buffer_bytes);
            let Some(id) = self.hosts[host].receive_free.pop() else {
                self.after_ms(1, Happening::Read((link, end)));
                return Ok(());
            };
            let count = if self.random.chance(500) { most } else { self.random.between(1, most as u64) as usize };
            let bytes: Vec<u8> = this.inbox.drain(..count).collect();
            let is_more = !this.inbox.is_empty() || this.fin;
            if self.script.strict && end == 1 && this.phase == Phase::Open {
                this.unechoed.extend(&bytes);
            }
            let buffers = &mut self.hosts[host].outbox.buffers;
            let buf = buffers.filled(id, count);
            buffers.memory(&buf)[..count].copy_from_slice(&bytes);
            self.report.bytes += count as u64;
            if is_more {
                self.soon(Happening::Read((link, end)));
            }
            self.soon(Happening::Push((link, 1 - end)));
            return self.tell(host, Event::Received { conn, buf }, cores);
        }
        if this.fin && !this.fin_told && this.phase == Phase::Open {
            this.fin_told = true;
            return self.tell(host, Event::Finished { conn }, cores);
        }
        Ok(())
    }

    // ---- ending -----------------------------------------------------------------------------------------------------

    /// The end stops taking part: FIN, or RST if it aborts or leaves bytes unread (tcp_close()).
    fn leave(&mut self, (link, end): Place, abort: bool) {
        let this = &mut self.links[link].ends[end];
        let with_rst = abort || !this.inbox.is_empty();
        let is_news = !this.broken;
        if let Some((buf, _)) = this.out.take() {
            self.hosts[this.host].outbox.buffers.release(buf);
            self.hosts[this.host].reclaim();
        }
        self.links[link].reset |= with_rst;
        if abort {
            self.drop_bytes((link, end));
        }
        if is_news {
            self.transmit((link, 1 - end), if with_rst { Packet::Rst } else { Packet::Fin });
        }
    }

    /// Free the tuple when both ends are gone: at once after RST, else after TIME_WAIT.
    fn forget(&mut self, link: usize) {
        let Link { tuple, ends, reset } = &self.links[link];
        if ends.iter().all(|end| end.phase == Phase::Gone) {
            let wait = if *reset { 0 } else { self.network.time_wait.as_nanos() as u64 };
            let (when, tuple) = (self.now.0 + wait, *tuple);
            self.at(when, Happening::FreeTuple(tuple));
        }
    }

    /// The core is done: a strict one has left nothing; for another the carrier closes what is left.
    fn retire(&mut self, host: usize) -> Rule {
        self.hosts[host].done = true;
        let left: Vec<Place> = self.hosts[host].conns.iter().filter_map(|row| row.1).collect();
        if self.script.strict && (!left.is_empty() || !self.hosts[host].attempts.is_empty()) {
            return Err(format!(
                "done with {} connections and {} attempts left",
                left.len(),
                self.hosts[host].attempts.len()
            ));
        }
        for place in left {
            self.leave(place, false);
            self.links[place.0].ends[place.1].phase = Phase::Gone;
            self.forget(place.0);
        }
        let attempts: Vec<Attempt> = self.hosts[host].attempts.drain().map(|(_, attempt)| attempt).collect();
        attempts.into_iter().for_each(|attempt| self.give_up(attempt));
        let mut listeners: Vec<ListenerId> = self.hosts[host].listeners.keys().copied().collect();
        listeners.sort_unstable_by_key(|listener| listener.0);
        listeners.into_iter().for_each(|listener| self.unlisten(host, listener));
        Ok(())
    }

    fn check_report(&self, host: usize, core: &dyn Core) -> Rule {
        let Host { attempted, connected, accepted, attempts, .. } = &self.hosts[host];
        let count = |counter| core.report().count(counter);
        let rules = [
            ("connects_attempted", count(Counter::Attempted), *attempted),
            ("connects_succeeded", count(Counter::Connected), *connected),
            ("connects_failed", count(Counter::ConnectFailed), attempted - connected - attempts.len() as u64),
            ("accepts_succeeded", count(Counter::Accepted), *accepted),
            ("open_now", count(Counter::Open), (self.hosts[host].conns.len() - self.hosts[host].free.len()) as u64),
            ("pings_wrong of an honest network", count(Counter::PingsWrong), 0),
        ];
        match rules.into_iter().find(|(_, said, seen)| said != seen) {
            Some((name, said, seen)) => Err(format!("{name} is {said}, the carrier counts {seen}")),
            None if count(Counter::PingsRight) > count(Counter::PingsSent) => Err("more tokens right than sent".into()),
            None => Ok(()),
        }
    }

    fn check_end(&self, host: usize, core: &dyn Core) -> Rule {
        core.check_invariants()?;
        match self.hosts[host].outbox.buffers.in_use() {
            0 => Ok(()),
            lost => Err(format!("{lost} buffers were neither sent nor released")),
        }
    }
}

impl Host {
    fn reclaim(&mut self) {
        self.receive_free.extend(self.outbox.buffers.drain_reclaimed());
    }
}
