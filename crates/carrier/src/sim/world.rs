//! The loop of the simulator: the clock, what is told to cores, and what is asked of them after every step.
//!
//! Decides when things happen and whether a core kept to the contract. How bytes and connections behave is `network`'s.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;

use fourtuple_engine::report::Counter;
use fourtuple_engine::{
    Buf, Buffers, Command, ConnId, Core, Errno, Event, Given, Instant, ListenerId, Order, Outbox, Step, Transport,
};

use super::ferries::Ferry;
use super::{Fault, Faults, Network, Random, Script, Sim, SimReport};

pub(super) type Tuple = (SocketAddr, SocketAddr);
/// A link and which end of it: 0 connected, 1 was connected to.
pub(super) type Place = (usize, usize);

#[derive(Debug)]
pub(super) enum Happening {
    Start(usize),
    Order(usize, Order),
    Listen(usize, ListenerId, SocketAddr, u32, bool, Option<Given>),
    Fail {
        host: usize,
        ticket: u32,
        serial: u64,
        step: Step,
        error: Errno,
    },
    Syn {
        host: usize,
        ticket: u32,
        serial: u64,
        tries: u32,
    },
    Establish {
        host: usize,
        ticket: u32,
        serial: u64,
    },
    Accept(usize, ListenerId),
    TellUnlistened(usize, ListenerId),
    Echo(Place, Vec<u8>),
    Disturb(Place, Step, Errno),
    Arrive(Place),
    Read(Place),
    Push(Place),
    TellSent(Place),
    TellClosed(Place),
    FreeTuple(Tuple),
    TellNamed(Place),
    TellRoomy(Place),
    HandOff(Place, Option<SocketAddr>),
    Halt(Place, usize),
    CutFerry(Given),
    /// At an end of a ferry.
    Ship(Given, usize),
    Fetch(Given, usize),
    /// Of a connection that was handed off, or is another's.
    TellClosedHere(usize, ConnId),
}

#[derive(Debug)]
pub(super) enum Packet {
    Bytes(Vec<u8>),
    Fin,
    Rst,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
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
pub(super) struct End {
    pub(super) host: usize,
    pub(super) conn: ConnId,
    pub(super) phase: Phase,
    /// The `Send` in progress and how much of it the kernel has.
    pub(super) out: Option<(Buf, usize)>,
    /// From `Send` until `Sent`.
    pub(super) sending: bool,
    /// On the way to this end.
    pub(super) wire: VecDeque<Packet>,
    pub(super) wire_bytes: usize,
    pub(super) last_arrival: Instant,
    pub(super) inbox: VecDeque<u8>,
    pub(super) fin: bool,
    pub(super) fin_told: bool,
    pub(super) broken: bool,
    pub(super) paused: bool,
    /// Paused, and its end is to be told.
    pub(super) watched: bool,
    /// Bytes are shown, not taken; how many were shown, and whether they are to be shown anyhow.
    pub(super) peeking: bool,
    pub(super) shown: usize,
    pub(super) show_again: bool,
    /// `Shutdown` is given.
    pub(super) shut: bool,
    /// Received by a server and not sent back yet.
    pub(super) unechoed: VecDeque<u8>,
    /// `Halted` is told, and `Resume` not said.
    pub(super) halted: bool,
    /// Who holds it besides `host`.
    pub(super) others: Vec<(usize, ConnId)>,
    /// Messages that hold it.
    pub(super) in_flight: u32,
    /// Whoever closes it last resets it.
    pub(super) aborted: bool,
}

impl End {
    pub(super) fn new(host: usize) -> End {
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
            watched: false,
            peeking: false,
            shown: 0,
            show_again: false,
            shut: false,
            unechoed: VecDeque::new(),
            halted: false,
            others: Vec::new(),
            in_flight: 0,
            aborted: false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) tuple: Tuple,
    pub(super) transport: Transport,
    pub(super) ends: [End; 2],
    /// It ended with RST somewhere: no TIME_WAIT.
    pub(super) reset: bool,
}

#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) serial: u64,
    pub(super) tuple: Option<Tuple>,
    pub(super) link: Option<usize>,
}

#[derive(Debug)]
pub(super) struct Listener {
    pub(super) local: SocketAddr,
    pub(super) backlog: u32,
    pub(super) accept: bool,
    pub(super) queue: VecDeque<usize>,
    pub(super) retry_pending: bool,
    /// The socket is somebody else's, too.
    pub(super) given: Option<Given>,
}

/// What the carrier keeps per core.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) outbox: Outbox,
    pub(super) started: bool,
    pub(super) done: bool,
    pub(super) attempts: HashMap<u32, Attempt>,
    pub(super) listeners: HashMap<ListenerId, Listener>,
    /// By `ConnId::index`: generation, and who uses it.
    pub(super) conns: Vec<(u16, Option<Place>)>,
    pub(super) free: Vec<u32>,
    /// Connections that were handed off and not closed yet.
    pub(super) handed: HashSet<ConnId>,
    pub(super) attempted: u64,
    pub(super) connected: u64,
    pub(super) accepted: u64,
}

pub(super) struct World<'a> {
    pub(super) random: Random,
    pub(super) faults: Faults,
    pub(super) network: Network,
    pub(super) script: &'a Script,
    pub(super) client_count: usize,
    pub(super) now: Instant,
    pub(super) serial: u64,
    pub(super) queue: BinaryHeap<Reverse<(Instant, u64)>>,
    pub(super) happenings: HashMap<u64, Happening>,
    pub(super) hosts: Vec<Host>,
    pub(super) links: Vec<Link>,
    pub(super) tuples: HashSet<Tuple>,
    pub(super) listening: HashMap<SocketAddr, Vec<(usize, ListenerId)>>,
    pub(super) report: SimReport,
    pub(super) current: usize,
    /// Where the listening sockets listen that cores are given.
    pub(super) given: Vec<SocketAddr>,
    /// What waits in the queues of those that nobody listens with.
    pub(super) orphans: HashMap<u32, VecDeque<usize>>,
    pub(super) ferries: HashMap<u32, Ferry>,
}

pub(super) type Rule = Result<(), String>;

impl<'a> World<'a> {
    pub(super) fn new(sim: &Sim, script: &'a Script, client_count: usize, core_count: usize) -> World<'a> {
        let network = sim.network;
        let host = |_| Host {
            outbox: Outbox::new(Buffers::new(network.buffer_bytes, network.buffers, 1)),
            started: false,
            done: false,
            attempts: HashMap::new(),
            listeners: HashMap::new(),
            conns: Vec::new(),
            free: Vec::new(),
            handed: HashSet::new(),
            attempted: 0,
            connected: 0,
            accepted: 0,
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
            given: sim.given.clone(),
            orphans: HashMap::new(),
            ferries: HashMap::new(),
        }
    }

    // ---- the clock --------------------------------------------------------------------------------------------------

    pub(super) fn run(&mut self, cores: &mut [&mut dyn Core]) -> Rule {
        for host in 0..cores.len() {
            // Servers first: a client that comes before its server is only refused, which is `Fault::Refusal`'s part.
            self.at(if host < self.client_count { 1_000_000 } else { 0 }, Happening::Start(host));
        }
        for &(when, host, ref order) in &self.script.orders {
            self.at(when.0, Happening::Order(host, order.clone()));
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

    pub(super) fn step(&mut self, cores: &mut [&mut dyn Core]) -> Rule {
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

    pub(super) fn at(&mut self, when: u64, happening: Happening) {
        self.serial += 1;
        self.queue.push(Reverse((Instant(when), self.serial)));
        self.happenings.insert(self.serial, happening);
    }

    pub(super) fn soon(&mut self, happening: Happening) {
        let delay = self.random.between(0, 20_000);
        self.at(self.now.0 + delay, happening);
    }

    pub(super) fn after_latency(&mut self, happening: Happening) {
        let when = self.now.0 + self.latency_ns();
        self.at(when, happening);
    }

    pub(super) fn after_ms(&mut self, ms: u64, happening: Happening) {
        self.at(self.now.0 + ms * 1_000_000, happening);
    }

    pub(super) fn latency_ns(&mut self) -> u64 {
        let (low, high) = self.network.latency_us;
        self.random.between(low * 1000, high * 1000)
    }

    pub(super) fn strikes(&mut self, fault: Fault) -> bool {
        let strikes = self.random.chance(self.faults.per_mille[fault as usize]);
        self.report.faults[fault as usize] += u64::from(strikes);
        strikes
    }

    // ---- telling cores, and what they answer ------------------------------------------------------------------------

    pub(super) fn tell(&mut self, host: usize, event: Event, cores: &mut [&mut dyn Core]) -> Rule {
        self.current = host;
        if self.hosts[host].done {
            match event {
                Event::Received { buf, .. } => self.hosts[host].outbox.buffers.release(buf),
                Event::Peeked { buf, .. } => self.hosts[host].outbox.peeks.release(buf),
                _ => {}
            }
            return Ok(());
        }
        cores[host].handle(event, self.now, &mut self.hosts[host].outbox);
        self.after(host, cores)
    }

    pub(super) fn after(&mut self, host: usize, cores: &mut [&mut dyn Core]) -> Rule {
        for command in std::mem::take(&mut self.hosts[host].outbox.commands) {
            self.obey(host, command)?;
        }
        cores[host].check_invariants()?;
        if self.script.strict {
            self.check_report(host, cores[host])?;
        }
        if cores[host].is_done() {
            self.retire(host)?;
        }
        Ok(())
    }

    pub(super) fn obey(&mut self, host: usize, command: Command) -> Rule {
        match command {
            Command::Listen { listener, local, backlog, accept, .. } => {
                if self.hosts[host].listeners.contains_key(&listener) {
                    return Err(format!("{listener:?} is in use"));
                }
                self.soon(Happening::Listen(host, listener, local, backlog, accept, None));
            }
            Command::Halt { conn } => {
                if let Some(place) = self.place(host, conn)? {
                    self.soon(Happening::Halt(place, host));
                }
            }
            Command::OpenFerry { ferry } => self.open_ferry(host, ferry),
            Command::CloseFerry { ferry } => self.close_ferry(host, ferry),
            Command::Ship { ferry, conns, message } => return self.ship(host, ferry, conns, message),
            Command::Fetch { ferry } => return self.fetch(host, ferry),
            Command::Adopt { listener, given, backlog } => {
                let Some(&local) = self.given.get(given.0 as usize) else {
                    return Err(format!("{given:?} is nothing to listen with"));
                };
                self.soon(Happening::Listen(host, listener, local, backlog, true, Some(given)));
            }
            Command::Connect { ticket, transport, source, destination, choice, range } => {
                self.connect(host, ticket, transport, (source, destination), choice, range)?;
            }
            Command::CancelConnect { ticket } => self.cancel(host, ticket),
            Command::Send { conn, buf } => return self.send(host, conn, buf),
            Command::Pause { conn } => {
                if let Some((link, end)) = self.place(host, conn)? {
                    self.links[link].ends[end].paused = true;
                }
            }
            Command::Watch { conn } => {
                if let Some((link, end)) = self.place(host, conn)? {
                    self.links[link].ends[end].watched = true;
                    self.soon(Happening::Read((link, end)));
                }
            }
            Command::Resume { conn } => {
                if let Some(place) = self.place(host, conn)? {
                    return self.resume(place, host, conn);
                }
            }
            Command::Close { conn, .. } if self.hosts[host].handed.remove(&conn) => {
                self.soon(Happening::TellClosedHere(host, conn));
            }
            Command::Close { conn, abort } => {
                if let Some(place) = self.place(host, conn)? {
                    let this = &mut self.links[place.0].ends[place.1];
                    let is_user = (this.host, this.conn) == (host, conn);
                    // SO_LINGER is the socket's, whoever sets it.
                    this.aborted |= abort && is_user;
                    let abort = this.aborted || abort;
                    if self.is_held_by_others(place, host, conn) {
                        self.soon(Happening::TellClosedHere(host, conn));
                        return if is_user || !abort { Ok(()) } else { Err(format!("{conn:?} is another's")) };
                    }
                    self.leave(place, abort);
                    self.links[place.0].ends[place.1].phase = Phase::Closing;
                    self.soon(Happening::TellClosed(place));
                    // Bytes already on their way to the core may come between Close and Closed (rule 7).
                    self.soon(Happening::Read(place));
                }
            }
            Command::Unlisten { listener } => {
                if self.hosts[host].listeners.contains_key(&listener) {
                    self.unlisten(host, listener);
                    self.soon(Happening::TellUnlistened(host, listener));
                }
            }
            Command::Reach { ticket, target } => self.reach(host, ticket, target)?,
            Command::Name { conn } => {
                if let Some(place) = self.place(host, conn)? {
                    self.soon(Happening::TellNamed(place));
                }
            }
            Command::Peek { conn } => {
                if let Some((link, end)) = self.place(host, conn)? {
                    let this = &mut self.links[link].ends[end];
                    (this.peeking, this.show_again) = (true, true);
                    self.soon(Happening::Read((link, end)));
                }
            }
            Command::Discard { conn, bytes } => {
                if let Some(place) = self.place(host, conn)? {
                    return self.discard(place, bytes as usize);
                }
            }
            Command::Take { conn } => {
                if let Some((link, end)) = self.place(host, conn)? {
                    let this = &mut self.links[link].ends[end];
                    (this.peeking, this.shown) = (false, 0);
                    self.soon(Happening::Read((link, end)));
                }
            }
            Command::Shutdown { conn } => {
                if let Some(place) = self.place(host, conn)? {
                    return self.shutdown(place);
                }
            }
            Command::HandOff { conn, path, note } => {
                let at = self.endpoint_of(host, path);
                self.hosts[host].outbox.buffers.release(note);
                if let Some(place) = self.place(host, conn)? {
                    self.soon(Happening::HandOff(place, at));
                }
            }
        }
        Ok(())
    }

    /// Who the connection is; `None` if it is gone and that is allowed.
    pub(super) fn place(&self, host: usize, conn: ConnId) -> Result<Option<Place>, String> {
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

    pub(super) fn happen(&mut self, happening: Happening, cores: &mut [&mut dyn Core]) -> Rule {
        match happening {
            Happening::Start(host) => {
                self.current = host;
                self.hosts[host].started = true;
                cores[host].start(self.now, &mut self.hosts[host].outbox);
                self.after(host, cores)
            }
            Happening::Order(host, order) => self.tell(host, Event::Ordered(order), cores),
            Happening::Listen(host, listener, local, backlog, accept, given) => {
                let taken = self.listening.get(&local).is_some_and(|users| users.iter().any(|user| user.0 == host));
                if taken {
                    let (step, error) = (Step::Bind, Errno::EADDRINUSE);
                    return self.tell(host, Event::ListenFailed { listener, step, error }, cores);
                }
                let queue = given.and_then(|given| self.orphans.remove(&given.0)).unwrap_or_default();
                if !queue.is_empty() {
                    self.soon(Happening::Accept(host, listener));
                }
                let row = Listener { local, backlog, accept, queue, retry_pending: false, given };
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
            Happening::TellUnlistened(host, listener) => self.tell(host, Event::Unlistened { listener }, cores),
            Happening::Accept(host, listener) => self.accept(host, listener, cores),
            Happening::Echo(place, bytes) => self.echo(place, bytes, cores),
            Happening::Disturb((link, end), step, error) => {
                let this = &self.links[link].ends[end];
                match this.phase {
                    Phase::Open => self.tell(this.host, Event::Disturbed { conn: this.conn, step, error }, cores),
                    _ => Ok(()),
                }
            }
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
            Happening::TellNamed((link, end)) => {
                let Link { tuple: (source, destination), ends, .. } = &self.links[link];
                let End { host, conn, phase, broken, .. } = ends[end];
                let names = if end == 1 { (*source, *destination) } else { (*destination, *source) };
                match phase {
                    Phase::Open => self.tell(host, Event::Named { conn, names: (!broken).then_some(names) }, cores),
                    _ => Ok(()),
                }
            }
            Happening::TellRoomy((link, end)) => {
                let End { host, conn, phase, .. } = self.links[link].ends[end];
                if phase == Phase::Open { self.tell(host, Event::Roomy { conn }, cores) } else { Ok(()) }
            }
            Happening::Halt(place, host) => self.halted(place, host, cores),
            Happening::CutFerry(ferry) => {
                self.cut_ferry(ferry);
                Ok(())
            }
            Happening::Ship(ferry, end) => self.ship_now(ferry, end, cores),
            Happening::Fetch(ferry, end) => self.fetch_now(ferry, end, cores),
            Happening::HandOff(place, at) => self.hand_off(place, at, cores),
            Happening::TellClosedHere(host, conn) => {
                self.release_name(host, conn);
                self.tell(host, Event::Closed { conn }, cores)
            }
        }
    }

    pub(super) fn attempt(&self, host: usize, ticket: u32, serial: u64) -> Option<&Attempt> {
        self.hosts[host].attempts.get(&ticket).filter(|attempt| attempt.serial == serial)
    }

    /// The core is done: a strict one has left nothing; for another the carrier closes what is left.
    pub(super) fn retire(&mut self, host: usize) -> Rule {
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
            let conn = self.hosts[host].conns.iter().enumerate().find(|(_, row)| row.1 == Some(place));
            let conn = conn.map(|(index, row)| ConnId { index: index as u32, generation: row.0 });
            if conn.is_some_and(|conn| self.is_held_by_others(place, host, conn)) {
                continue;
            }
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

    pub(super) fn check_report(&self, host: usize, core: &dyn Core) -> Rule {
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

    pub(super) fn check_end(&self, host: usize, core: &dyn Core) -> Rule {
        core.check_invariants()?;
        match self.hosts[host].outbox.buffers.in_use() + self.hosts[host].outbox.peeks.in_use() {
            0 => Ok(()),
            lost => Err(format!("{lost} buffers were neither sent nor released")),
        }
    }
}
