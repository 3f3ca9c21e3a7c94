//! The broker core on the simulator, by seed: ten thousand small random worlds, and wrong cores that must be caught.
//!
//! Every byte that comes out is one that went in, in order, in both directions; an end of stream comes through while the
//! other direction is open; each accepted connection has one reason and one entry; no buffer is lost; and a service that
//! is absent, late, full or stalled does not delay the others.
//!
//! `FOURTUPLE_SEEDS=n` changes how many; `FOURTUPLE_SEED=n` replays one.

#[path = "broker/outside.rs"]
mod outside;
#[path = "broker/talk.rs"]
mod talk;

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fourtuple_carrier::sim::{FAULTS, Fault, Faults, Network, Random, Script, Sim};
use fourtuple_engine::broker::guide::Delivery;
use fourtuple_engine::broker::ledger::{REASONS, Reason};
use fourtuple_engine::broker::{BrokerConfig, BrokerCore, ListenAt};
use fourtuple_engine::report::{Counter, Phase, Report};
use fourtuple_engine::{Answer, Command, ConnId, Core, Event, Given, Instant, ListenerId, Order, Outbox, Question};
use outside::{Outside, Sleep};
use talk::{FirstLine, Kept, Manner, Opening, Outcome, Replier, Service, Talk, Talker};

const DEFAULT_SEEDS: u64 = 2_000;
const UNTIL_MS: u64 = 60_000;

/// What a service does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Health {
    Well,
    /// Listens nowhere.
    Absent,
    /// Listens from this moment on, milliseconds.
    Late(u64),
    /// Listens and never accepts.
    Stalled,
    /// Says no when it is asked.
    Declining,
}

#[derive(Debug)]
struct World {
    talks: Vec<Vec<Talk>>,
    window: usize,
    services: Vec<(Service, Health, u32)>,
    default: Option<usize>,
    /// On the second listener everybody has to say who he is.
    trusting: bool,
    /// Nobody says anything before it is greeted.
    greets: bool,
    errands: bool,
    /// Of each service.
    sleeps: Vec<Sleep>,
    broker: BrokerConfig,
    network: Network,
    faults: Faults,
    drain_at_ms: Option<u64>,
    /// When all moves to another broker, each time; milliseconds.
    moves_at_ms: Vec<u64>,
}

fn endpoint(last: u8, port: u16) -> SocketAddr {
    SocketAddr::new([10, 0, 0, last].into(), port)
}

impl World {
    fn of(seed: u64) -> World {
        let mut random = Random::new(seed ^ 0x6272_6f6b_6572);
        let mut pick = |low: u64, high: u64| random.between(low, high);
        let service_count = pick(1, 5);
        let services = (0..service_count).map(|number| {
            let health = match pick(0, 8) {
                0 => Health::Absent,
                1 => Health::Late(pick(1, 3000)),
                2 => Health::Stalled,
                3 => Health::Declining,
                _ => Health::Well,
            };
            let delivery = if pick(0, 1) == 0 { Delivery::HandOff } else { Delivery::Relay };
            let tcp = delivery == Delivery::Relay && pick(0, 2) == 0;
            let service = Service { delivery, at: endpoint(100, 8000 + number as u16), tcp, sleeps: false };
            (service, health, pick(0, 8) as u32)
        });
        let mut services: Vec<(Service, Health, u32)> = services.collect();
        let manners = [
            Manner::Whole,
            Manner::Whole,
            Manner::Whole,
            Manner::Slow,
            Manner::Silent,
            Manner::Garbage,
            Manner::Stuck,
            Manner::Long,
        ];
        let trusting = pick(0, 1) == 0;
        let most_bytes = [10, 300, 5000, 20_000][pick(0, 3) as usize];
        let talkers = (0..pick(1, 2)).map(|_| {
            let talks = (0..pick(1, 25)).map(|_| {
                let port = 443 + pick(0, 1) as u16;
                let is_proxied = trusting && port == 444 && pick(0, 9) > 0;
                Talk {
                    manner: manners[pick(0, manners.len() as u64 - 1) as usize],
                    opening: [Opening::None, Opening::Asks, Opening::Names][pick(0, 2) as usize],
                    proxied: is_proxied.then(|| pick(1, 4) as u8),
                    // One more than there are: no route.
                    service: if pick(0, 9) == 0 { service_count as usize } else { pick(0, service_count - 1) as usize },
                    say: pick(0, most_bytes),
                    hear: pick(0, most_bytes),
                    early: pick(0, 1) == 0,
                    probe: false,
                    at: endpoint(1, port),
                }
            });
            talks.collect()
        });
        let mut talks: Vec<Vec<Talk>> = talkers.collect();
        let sniff_timeout = Duration::from_millis(pick(1, 3000));
        let mut broker = BrokerConfig {
            listen: [443, 444].map(|port| ListenAt { local: endpoint(1, port), sniff_timeout }).to_vec(),
            backlog: 64,
            reuse_port: false,
            sniff_bytes: pick(32, 4000) as u32,
            delivery_timeout: Duration::from_millis(pick(1, 8000)),
            most_connections: [0, 0, 10][pick(0, 2) as usize],
            most_per_source: [0, 0, 5][pick(0, 2) as usize],
            most_per_service: [0, 0, 3][pick(0, 2) as usize],
            ..BrokerConfig::default()
        };
        let network = Network {
            latency_us: (pick(1, 50), pick(50, 5_000)),
            // A first line that does not fit into the window could never be looked at whole.
            window_bytes: [64, 200, 8192][pick(0, 2) as usize] + pick(0, 100) as usize,
            buffer_bytes: pick(64, 2048) as usize,
            // Each connection to a service that reads nothing keeps a few: there must be enough of them for all.
            buffers: 400,
            ..Network::default()
        };
        let mut faults = Faults::NONE;
        if pick(0, 2) > 0 {
            for fault in FAULTS {
                let most = match fault {
                    Fault::Reset => 15,
                    Fault::ShortWrite | Fault::SlowReader => 400,
                    _ => 120,
                };
                if pick(0, 2) == 0 {
                    faults = faults.with(fault, pick(1, most) as u16);
                }
            }
        }
        let default = (pick(0, 1) == 0).then_some(0);
        let drain_at_ms = (pick(0, 4) == 0).then(|| pick(0, 2000));
        let window = pick(1, 12) as usize;
        let (greets, errands) = (pick(0, 3) == 0, pick(0, 7) == 0);
        // Whoever is sent on an errand goes there whether it sleeps or not.
        let may_sleep = pick(0, 1) == 0 && !errands;
        let sleeps = services.iter_mut().map(|(service, ..)| {
            let sleep = match pick(0, 7) {
                _ if !may_sleep => Sleep::Never,
                0 => Sleep::Fails(pick(0, 2000)),
                1 => Sleep::Silent,
                2 => Sleep::Picky(pick(0, 1000)),
                3 | 4 => Sleep::Flighty,
                5 => Sleep::Never,
                _ => Sleep::Wakes(pick(0, 1000)),
            };
            service.sleeps = sleep != Sleep::Never;
            sleep
        });
        let sleeps = sleeps.collect();
        if may_sleep {
            for talk in talks.iter_mut().flatten().filter(|talk| talk.opening == Opening::None && !greets) {
                if pick(0, 3) == 0 {
                    (talk.probe, talk.say, talk.hear) = (true, 0, talk.hear.min(60));
                }
            }
            broker.most_parked = [0, 0, 4][pick(0, 2) as usize];
            broker.most_parked_per_service = [0, 0, 2][pick(0, 2) as usize];
            broker.parked_bytes = [0, 0, 200_000][pick(0, 2) as usize];
            broker.settle = Duration::from_millis([0, 0, 1, 50][pick(0, 3) as usize]);
        }
        World {
            talks,
            window,
            services,
            default,
            trusting,
            greets,
            errands,
            sleeps,
            broker,
            network,
            faults,
            drain_at_ms,
            moves_at_ms: Vec::new(),
        }
    }

    /// The same, with brokers that take over from each other.
    fn moving(seed: u64) -> World {
        let mut random = Random::new(seed ^ 0x0066_6572_7279);
        let mut world = World::of(seed);
        world.drain_at_ms = None;
        // Each of these brokers would have an outside of its own, which knows nothing of the others.
        world.sleeps.fill(Sleep::Never);
        world.services.iter_mut().for_each(|row| row.0.sleeps = false);
        world.talks.iter_mut().flatten().for_each(|talk| talk.probe = false);
        // Few of these talks last long, and all begin at once.
        let most_ms = [2, 20, 400][random.between(0, 2) as usize];
        world.moves_at_ms = (0..random.between(1, 3)).map(|_| random.between(1, most_ms)).collect();
        world.moves_at_ms.sort_unstable();
        if random.between(0, 2) == 0 {
            world.faults = world.faults.with(Fault::FerryLost, 500);
        }
        world
    }

    fn is_peaceful(&self) -> bool {
        self.faults.per_mille.iter().all(|&often| often == 0) && self.drain_at_ms.is_none()
    }

    fn is_limited(&self) -> bool {
        let BrokerConfig { most_connections, most_per_source, most_per_service, .. } = self.broker;
        let BrokerConfig { most_parked, most_parked_per_service, parked_bytes, .. } = self.broker;
        let is_waiting_limited = most_parked != 0 || most_parked_per_service != 0 || parked_bytes != 0;
        most_connections != 0 || most_per_source != 0 || most_per_service != 0 || is_waiting_limited
    }

    fn run(&self, seed: u64, wrap: fn(Broker) -> Box<dyn Core>) -> Result<Outcomes, String> {
        let until = Instant(UNTIL_MS * 1_000_000);
        let services = self.services.iter().map(|row| row.0.clone()).collect();
        let trusting = self.trusting.then_some(ListenerId(1));
        let World { greets, errands, .. } = *self;
        let services: Vec<Service> = services;
        let broker = |_| {
            let guide = FirstLine { services: services.clone(), default: self.default, trusting, greets, errands };
            let core = BrokerCore::new(self.broker.clone(), guide, Kept::default());
            let is_moved = !self.moves_at_ms.is_empty();
            let core = wrap(if is_moved { core.listening_with(vec![Some(Given(0)), Some(Given(1))]) } else { core });
            let services = services.iter().cloned().zip(self.sleeps.iter().copied());
            Box::new(Outside::new(core, seed, services.collect())) as Box<dyn Core>
        };
        let mut brokers: Vec<Box<dyn Core>> = (0..=self.moves_at_ms.len()).map(broker).collect();
        let talkers = self.talks.iter().map(|talks| Talker::new(talks.clone(), greets, self.window, until));
        let mut talkers: Vec<Talker> = talkers.collect();
        let repliers = self.services.iter().enumerate().filter(|row| row.1.1 != Health::Absent);
        let repliers = repliers.map(|(number, (service, health, backlog))| {
            let from = if let Health::Late(ms) = health { ms * 1_000_000 } else { 0 };
            let replier = Replier::new(service, *backlog, *health != Health::Stalled, Instant(from), until);
            let replier = if greets { replier.greeting() } else { replier };
            match self.default == Some(number) {
                true => replier.for_the_silent(),
                false if *health == Health::Declining => replier.declining(),
                false => replier,
            }
        });
        let mut repliers: Vec<Replier> = repliers.collect();
        let mut clients: Vec<&mut dyn Core> = talkers.iter_mut().map(|core| core as &mut dyn Core).collect();
        let mut servers: Vec<&mut dyn Core> = brokers.iter_mut().map(|core| core.as_mut() as &mut dyn Core).collect();
        servers.extend(repliers.iter_mut().map(|core| core as &mut dyn Core));
        let broker_place = clients.len();
        let drain = self.drain_at_ms.map(|ms| (Instant(ms * 1_000_000), broker_place, Order::Drain));
        let mut orders: Vec<_> = drain.into_iter().collect();
        for (number, ms) in (0..).zip(&self.moves_at_ms) {
            let (at, ferry, old) = (Instant(ms * 1_000_000 + 1), Given(number), broker_place + number as usize);
            orders.push((at, old + 1, Order::Land(ferry)));
            orders.push((Instant(at.0 + 1), old, Order::Ferry(ferry)));
            // One whose ferry has broken serves on.
            orders.push((Instant(at.0 + 500_000_000), old, Order::Resume));
        }
        let script = Script { orders, until, most_steps: 3_000_000, strict: true, echoing: false };
        let mut sim = Sim::new(seed, self.faults);
        sim.network = self.network;
        sim.given = self.broker.listen.iter().map(|listener| listener.local).collect();
        let report = sim.run(&mut clients, &mut servers, &script).map_err(|broken| broken.to_string())?;
        let outcomes = talkers.into_iter().map(|talker| talker.outcomes.into_values().collect());
        let brokers = brokers.iter().map(|core| core.report().clone()).collect();
        Ok(Outcomes { brokers, outcomes: outcomes.collect(), bytes: report.bytes })
    }

    fn judge(&self, ran: &Outcomes) -> Result<(), String> {
        for broker in &ran.brokers {
            let count = |counter| broker.count(counter);
            let reasons: u64 = REASONS.iter().map(|reason| count(reason.counter())).sum();
            let came = count(Counter::Accepted) + count(Counter::Landed);
            if broker.phase != Phase::Done || reasons != came || count(Counter::LandingsRefused) != 0 {
                return Err(format!("{reasons} reasons for {came} connections, {:?}", broker.counts()));
            }
        }
        for pair in ran.brokers.windows(2) {
            let (gone, came) = (pair[0].count(Counter::Moved), pair[1].count(Counter::Landed));
            // Who takes one and is closed before it can say so has it all the same.
            if gone > came {
                return Err(format!("{gone} moved, {came} landed"));
            }
        }
        if !self.is_peaceful() || self.is_limited() {
            return Ok(());
        }
        for (talks, outcomes) in self.talks.iter().zip(&ran.outcomes) {
            for (talk, &(outcome, took)) in talks.iter().zip(outcomes) {
                let health = self.services.get(talk.service).map(|row| row.1);
                let patient = self.broker.delivery_timeout > Duration::from_millis(4000);
                let line = format!("p1@{}s{} e {} {}", talk.service, talk.service, talk.say, talk.hear).len();
                let is_known = !self.trusting || talk.at.port() == 443 || talk.proxied.is_some();
                // The name must fit into what is looked at, and come before the deadline.
                let sleep = self.sleeps.get(talk.service).copied().unwrap_or(Sleep::Never);
                let wakes = match sleep {
                    Sleep::Never => true,
                    // Who has said its end does not count as waiting.
                    Sleep::Wakes(_) | Sleep::Picky(_) if !self.broker.settle.is_zero() => false,
                    Sleep::Wakes(_) => true,
                    // Whoever comes together with another's question is refused with it only if it is of the same source.
                    Sleep::Picky(_) => talk.proxied.is_some_and(|number| number % 2 == 0),
                    Sleep::Fails(_) | Sleep::Silent | Sleep::Flighty => false,
                };
                let in_time = match talk.manner {
                    Manner::Whole => self.broker.listen[0].sniff_timeout > Duration::from_millis(100),
                    Manner::Slow => self.broker.listen[0].sniff_timeout > Duration::from_millis(50 * line as u64),
                    _ => false,
                } && is_known
                    && wakes;
                // Queues of healthy services are full for moments only.
                let served = match health {
                    Some(Health::Well) => patient,
                    Some(Health::Late(_)) => patient,
                    // It says no only to those that are relayed and ask.
                    Some(Health::Declining) => {
                        patient && (talk.opening != Opening::Asks || self.default == Some(talk.service))
                    }
                    _ => false,
                };
                if in_time && served && outcome != Outcome::Right {
                    return Err(format!("{talk:?} did not come through"));
                }
                if in_time && served && health == Some(Health::Well) && took > self.bound(talk) {
                    return Err(format!("{talk:?} took {took:?}, allowed are {:?}", self.bound(talk)));
                }
            }
        }
        Ok(())
    }

    /// How long a talk with a healthy service may take, whatever its neighbours do: its own round trips, twice (two
    /// connections) and the pauses of a backlog that is full for a moment.
    fn bound(&self, talk: &Talk) -> Duration {
        let window = self.network.window_bytes.min(self.network.buffer_bytes) as u64;
        let trips = 40 + 4 * (talk.say + talk.hear + 40) / window.max(1);
        let trip = Duration::from_micros(self.network.latency_us.1 + 100) * 4;
        let errands = if self.errands { self.services.len() as u64 } else { 0 };
        Duration::from_secs(4 + 2 * errands) + trip * u32::try_from(trips).unwrap_or(u32::MAX)
    }
}

type Broker = BrokerCore<FirstLine, Kept>;

impl Outcomes {
    fn count(&self, counter: Counter) -> u64 {
        self.brokers.iter().map(|broker| broker.count(counter)).sum()
    }
}

struct Outcomes {
    brokers: Vec<Report>,
    outcomes: Vec<Vec<(Outcome, Duration)>>,
    bytes: u64,
}

fn run_world(world: World, seed: u64, wrap: fn(Broker) -> Box<dyn Core>) -> Result<Outcomes, String> {
    match catch_unwind(AssertUnwindSafe(|| world.run(seed, wrap))) {
        Ok(Ok(ran)) => world.judge(&ran).map_err(|why| format!("seed {seed}: {why}")).map(|()| ran),
        Ok(Err(broken)) => Err(broken),
        Err(_) => Err(format!("seed {seed}: a core panicked")),
    }
}

fn plain(core: Broker) -> Box<dyn Core> {
    Box::new(Checked { core, entries: 0 })
}

#[test]
fn sweep() {
    let (seeds, ran) = swept(World::of, 1);
    for (reason, count) in REASONS.iter().zip(&ran.reasons) {
        println!("{reason:?}: {count}");
    }
    if seeds >= 1000 {
        // Nobody moves here.
        let came = |row: (&Reason, &u64)| *row.1 > 0 || *row.0 == Reason::Moved;
        assert!(REASONS.iter().zip(&ran.reasons).all(came), "a reason that never came proves nothing");
        assert!(ran.right > seeds, "worlds without whole talks prove nothing");
    }
}

#[test]
fn moved_sweep() {
    let (seeds, ran) = swept(World::moving, 4);
    let [moved, landed, returned, lost] = ran.moves;
    println!("{moved} moved, {landed} landed, {returned} returned, {lost} ferries lost");
    if seeds >= 500 {
        assert!(moved > seeds && returned > 0 && lost > 0, "worlds in which nobody moves prove nothing");
        assert!(ran.right > seeds, "worlds without whole talks prove nothing");
    }
}

#[derive(Default)]
struct Swept {
    reasons: Vec<u64>,
    /// Moved, landed, returned, ferries lost.
    moves: [u64; 4],
    right: u64,
    failures: Vec<String>,
}

/// A share of all seeds, in as many threads as there are CPUs; none breaks a rule.
fn swept(world: fn(u64) -> World, share: u64) -> (u64, Swept) {
    let seeds = std::env::var("FOURTUPLE_SEEDS")
        .map_or(DEFAULT_SEEDS, |text| text.parse().expect("FOURTUPLE_SEEDS is a number"))
        / share;
    let next = AtomicU64::new(0);
    let totals = Mutex::new((Swept { reasons: vec![0; REASONS.len()], ..Swept::default() }, 0u64));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                break;
            }
            let ran = run_world(world(seed), seed, plain);
            let mut totals = totals.lock().expect("no panic holds it");
            match ran {
                Ok(ran) => {
                    let counts = REASONS.iter().map(|reason| ran.count(reason.counter()));
                    totals.0.reasons.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
                    let moves = [Counter::Moved, Counter::Landed, Counter::MovesReturned, Counter::FerriesLost];
                    totals.0.moves.iter_mut().zip(moves).for_each(|(sum, counter)| *sum += ran.count(counter));
                    totals.1 += ran.bytes;
                    let right = ran.outcomes.iter().flatten().filter(|row| row.0 == Outcome::Right);
                    totals.0.right += right.count() as u64;
                }
                Err(text) => totals.0.failures.push(text),
            }
        }
    };
    std::thread::scope(|scope| {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        (0..workers).for_each(|_| drop(scope.spawn(work)));
    });
    let (ran, bytes) = totals.into_inner().expect("no panic");
    println!("{seeds} seeds, {bytes} bytes, {} talks came through whole", ran.right);
    let shown: Vec<&String> = ran.failures.iter().take(10).collect();
    assert!(ran.failures.is_empty(), "{} seeds broke a rule: {shown:#?}\nreplay: FOURTUPLE_SEED=n", ran.failures.len());
    (seeds, ran)
}

#[test]
fn replay() {
    let seed = std::env::var("FOURTUPLE_SEED").map_or(7, |text| text.parse().expect("FOURTUPLE_SEED is a number"));
    let world = if std::env::var_os("FOURTUPLE_MOVING").is_some() { World::moving } else { World::of };
    println!("{:#?}", world(seed));
    let counts = || {
        run_world(world(seed), seed, plain)
            .map(|ran| (ran.brokers.iter().map(|it| it.counts().to_vec()).collect::<Vec<_>>(), ran.outcomes))
    };
    let first = counts();
    println!("{first:?}");
    assert_eq!(first, counts(), "the same seed is the same run");
    assert!(first.is_ok(), "{first:?}");
}

// ---- wrong cores ----------------------------------------------------------------------------------------------------

/// A broker, watched: each connection has one entry.
struct Checked {
    core: Broker,
    entries: usize,
}

impl Core for Checked {
    fn start(&mut self, now: Instant, outbox: &mut Outbox) {
        self.core.start(now, outbox);
    }

    fn handle(&mut self, event: Event, now: Instant, outbox: &mut Outbox) {
        self.core.handle(event, now, outbox);
        self.entries = self.core.ledger().0.len();
    }

    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        self.core.handle_timeout(now, outbox);
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.core.poll_timeout()
    }

    fn is_done(&self) -> bool {
        self.core.is_done()
    }

    fn report(&self) -> &Report {
        self.core.report()
    }

    fn check_invariants(&self) -> Result<(), String> {
        let ended: u64 = REASONS.iter().map(|reason| self.report().count(reason.counter())).sum();
        let bytes: u64 = self.core.ledger().0.iter().map(|entry| entry.2 + entry.3).sum();
        // Who has come from elsewhere has brought his count along.
        let is_first = self.report().count(Counter::Landed) == 0;
        if self.entries as u64 != ended || is_first && bytes > self.report().count(Counter::BytesIn) {
            return Err(format!("{} entries for {ended} ends, {bytes} bytes", self.entries));
        }
        let late = [Reason::Relayed, Reason::ClientBroke, Reason::ServiceBroke, Reason::Moved];
        let early = |reason: Reason| !late.contains(&reason);
        if let Some(entry) = self
            .core
            .ledger()
            .0
            .iter()
            .find(|entry| early(entry.0) && entry.0 != Reason::Stopped && entry.2 + entry.3 > 0)
        {
            return Err(format!("{entry:?}: bytes without a relay"));
        }
        self.core.check_invariants()
    }
}

/// What a wrong broker does to its commands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flaw {
    /// Never passes on an end of stream.
    NoShutdown,
    /// Passes it on where it was not said.
    EarlyShutdown,
    /// Forgets to take after looking.
    NoTake,
    /// Forgets to close what it has handed off.
    NoClose,
    /// Sends a byte that did not come.
    WrongByte,
    /// Loses what it should send.
    LostBytes,
    /// Reads no more once it has paused.
    NoResume,
    /// Keeps the buffer of a look.
    LostPeek,
    /// Leaves what is not for the service in front of what is.
    NoDiscard,
    /// Takes a byte too few away.
    ShortDiscard,
    /// Takes away more than was shown.
    LongDiscard,
    /// Does not ask the service what was promised in its name.
    NotAsked,
    /// Takes a no for a yes.
    DeafToNo,
    /// Sends what the client said right behind the question.
    Pipelined,
    /// Does not hear that a service is up.
    DeafToUp,
    /// Takes a service for up once it has asked.
    WakesItself,
    /// Ends all who wait when one is refused.
    RefusesAll,
    /// Brings clients to a service that is being stopped.
    HoldsNothing,
    /// Loses what comes back of a send when a connection moves.
    LostRest,
    /// Ships what still goes on.
    NotHalted,
    /// Goes on with what it has shipped.
    Restless,
}

struct Flawed {
    core: Broker,
    flaw: Flaw,
    kept: Vec<fourtuple_engine::Buf>,
    /// Connections whose question was not asked.
    unasked: Vec<ConnId>,
    /// Connections that were not halted.
    unhalted: Vec<ConnId>,
}

impl Flawed {
    fn spoil(&mut self, outbox: &mut Outbox) {
        let commands = std::mem::take(&mut outbox.commands);
        for command in commands {
            match (self.flaw, command) {
                (Flaw::NoShutdown, Command::Shutdown { .. })
                | (Flaw::NoTake, Command::Take { .. })
                | (Flaw::NoResume, Command::Resume { .. })
                | (Flaw::NoClose, Command::Close { abort: false, .. }) => {}
                (Flaw::EarlyShutdown, Command::Take { conn }) => {
                    outbox.push(Command::Take { conn });
                    outbox.push(Command::Shutdown { conn });
                }
                (Flaw::WrongByte, Command::Send { conn, mut buf }) => {
                    let length = buf.len();
                    outbox.buffers.memory(&buf)[length - 1] ^= 1;
                    outbox.buffers.set_len(&mut buf, length);
                    outbox.push(Command::Send { conn, buf });
                }
                (Flaw::LostBytes, Command::Send { conn, mut buf }) if buf.len() > 1 => {
                    let length = buf.len() - 1;
                    outbox.buffers.set_len(&mut buf, length);
                    outbox.push(Command::Send { conn, buf });
                }
                (Flaw::NoDiscard, Command::Discard { .. }) => {}
                (Flaw::NotHalted, Command::Halt { conn }) => self.unhalted.push(conn),
                (Flaw::Restless, Command::Ship { ferry, conns, message }) => {
                    outbox.push(Command::Ship { ferry, conns, message });
                    conns.into_iter().flatten().for_each(|conn| outbox.push(Command::Resume { conn }));
                }
                (Flaw::ShortDiscard, Command::Discard { conn, bytes }) if bytes > 1 => {
                    outbox.push(Command::Discard { conn, bytes: bytes - 1 });
                }
                (Flaw::LongDiscard, Command::Discard { conn, bytes }) => {
                    outbox.push(Command::Discard { conn, bytes: bytes + 1000 });
                }
                (Flaw::NotAsked, Command::Send { conn, buf }) if outbox.buffers.bytes(&buf) == b"?" => {
                    outbox.buffers.release(buf);
                    self.unasked.push(conn);
                }
                (Flaw::Pipelined, Command::Send { conn, buf }) if outbox.buffers.bytes(&buf) == b"?" => {
                    outbox.buffers.release(buf);
                    if let Some(buf) = outbox.buffers.write(b"?s0 ") {
                        outbox.push(Command::Send { conn, buf });
                    }
                }
                (_, command) => outbox.push(command),
            }
        }
    }
}

impl Core for Flawed {
    fn start(&mut self, now: Instant, outbox: &mut Outbox) {
        self.core.start(now, outbox);
    }

    fn handle(&mut self, event: Event, now: Instant, outbox: &mut Outbox) {
        match event {
            Event::Peeked { buf, .. } if self.flaw == Flaw::LostPeek => self.kept.push(buf),
            Event::Halted { conn, rest: Some(buf) } if self.flaw == Flaw::LostRest => {
                outbox.buffers.release(buf);
                self.core.handle(Event::Halted { conn, rest: None }, now, outbox);
            }
            Event::Received { conn, mut buf } if self.flaw == Flaw::DeafToNo && outbox.buffers.bytes(&buf) == b"N" => {
                outbox.buffers.memory(&buf)[0] = b'!';
                outbox.buffers.set_len(&mut buf, 1);
                self.core.handle(Event::Received { conn, buf }, now, outbox);
            }
            Event::Ordered(Order::Answer(Answer::Up { .. })) if self.flaw == Flaw::DeafToUp => {}
            Event::Ordered(Order::Answer(Answer::Refused { service, .. })) if self.flaw == Flaw::RefusesAll => {
                self.core.handle(Event::Ordered(Order::Answer(Answer::Failed { service })), now, outbox);
            }
            Event::Ordered(Order::Hold(service)) if self.flaw == Flaw::HoldsNothing => {
                outbox.questions.reply(Question::Held { service, live: 0 });
            }
            event => self.core.handle(event, now, outbox),
        }
        if self.flaw == Flaw::WakesItself {
            let mut asked = Vec::new();
            outbox.questions.drain(|question| {
                asked.push(question);
                None
            });
            for question in asked {
                if let Question::Wake { service, .. } = &question {
                    let up = Answer::Up { service: service.clone() };
                    self.core.handle(Event::Ordered(Order::Answer(up)), now, outbox);
                }
                outbox.questions.ask(question);
            }
        }
        self.spoil(outbox);
        while let Some(conn) = self.unhalted.pop() {
            self.core.handle(Event::Halted { conn, rest: None }, now, outbox);
            self.spoil(outbox);
        }
        while let Some(conn) = self.unasked.pop() {
            self.core.handle(Event::Sent { conn }, now, outbox);
            if let Some(buf) = outbox.buffers.write(b"!") {
                self.core.handle(Event::Received { conn, buf }, now, outbox);
            }
            self.spoil(outbox);
        }
    }

    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        self.core.handle_timeout(now, outbox);
        self.spoil(outbox);
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.core.poll_timeout()
    }

    fn is_done(&self) -> bool {
        self.core.is_done()
    }

    fn report(&self) -> &Report {
        self.core.report()
    }

    fn check_invariants(&self) -> Result<(), String> {
        self.core.check_invariants()
    }
}

#[test]
fn wrong_brokers_are_caught() {
    type Wrap = fn(Broker) -> Box<dyn Core>;
    macro_rules! flawed {
        ($($flaw:ident),+) => { [$((Flaw::$flaw, (|core| {
            Box::new(Flawed { core, flaw: Flaw::$flaw, kept: Vec::new(), unasked: Vec::new(), unhalted: Vec::new() })
        }) as Wrap)),+] };
    }
    let wraps = flawed![
        NoShutdown,
        EarlyShutdown,
        NoTake,
        NoClose,
        WrongByte,
        LostBytes,
        NoResume,
        LostPeek,
        NoDiscard,
        ShortDiscard,
        LongDiscard,
        NotAsked,
        DeafToNo,
        Pipelined,
        DeafToUp,
        WakesItself,
        RefusesAll,
        HoldsNothing,
        LostRest,
        NotHalted,
        Restless
    ];
    for (flaw, wrap) in wraps {
        let world = match flaw {
            Flaw::LostRest | Flaw::NotHalted | Flaw::Restless => World::moving,
            _ => World::of,
        };
        let caught = (0..2_000).find_map(|seed| run_world(world(seed), seed, wrap).err());
        println!("{flaw:?}: {caught:?}");
        assert!(caught.is_some(), "{flaw:?} was not noticed in 2,000 worlds");
    }
}
