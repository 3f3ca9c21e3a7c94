//! The io_uring carrier: sockets in the direct-descriptor tables of many rings, so that RLIMIT_NOFILE bounds a ring and not
//! the process (limits catalogue B5), and an idle connection costs four bytes of ours.
//!
//! Decides which operations are under way on a slot and when the slot is free again. Knows no core.
//!
//! Two choices that are not the obvious ones:
//!
//! * *Readiness repeats, receives do not.* An armed multishot receive keeps a request, an io_async_msghdr and an async_poll
//!   in the kernel for every idle connection; a multishot poll keeps its request alone (256 bytes). So each connection has a
//!   multishot poll, and a receive that never waits is sent when the poll speaks. It makes `Pause` free (nothing has to be
//!   cancelled), and since it completes while it is submitted, one small pool of warm buffers serves all rings: provided
//!   buffers would be a hundred pools, each of which the kernel walks through from end to end.
//! * *An accept has its slot in hand.* A multishot accept that finds the table full closes the connection that it has just
//!   accepted (ENFILE), and a burst may be as long as the backlog. So single accepts wait, each with a slot of its own, and a
//!   ring is filled to its last slot before the next one is used: nothing to cancel, nothing to lose.

mod borrow;
mod bytes;
mod crossing;
mod making;
mod probe;
mod ring;

use std::cell::Cell;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use fourtuple_engine::{
    Buf, Buffers, Carrier, CarrierError, Command, ConnId, Core, Errno, Event, Instant, Outbox, SourceChoice, Step,
    Target, Transport, Until,
};
use io_uring::opcode;
use io_uring::types::Fixed;

use self::borrow::Purpose;
use self::bytes::{Transfer, Transfers, Way};
use self::making::{Accepts, CONNECT_BATCH, Listening, Request};
pub use self::probe::{UringAbilities, probe_uring};
use self::ring::{Completion, Operation, Ring, user_data};
use crate::ferries::Ferries;
use crate::messenger::Messenger;
use crate::shelf::Shelf;
use crate::sys::{self, Clock, Poller, Wake};
use crate::worker::{CarrierReport, CarrierSettings, PUBLISH_EVERY};

/// Most slots of one ring: what a slot's number has room for in an operation's name, with one bit to spare.
const MOST_SLOTS: u64 = 1 << 15;
/// When a message to another process could not be sent or taken.
const FERRY_PAUSE: Duration = Duration::from_millis(1);
/// Completions taken from one ring in one turn.
const REAP_BATCH: usize = 1024;

/// connect() to AF_UNSPEC is tcp_disconnect(): the peer is sent RST. (SO_LINGER would need setsockopt on a direct
/// descriptor, since 6.7.)
static NOWHERE: [u8; 16] = [0; 16];

// What is under way on a slot. A free slot has no flag.
/// Announced to the core, and `Closed` not told yet.
const OPEN: u16 = 1;
/// The multishot poll stands.
const POLLING: u16 = 1 << 1;
/// A receive is under way.
const RECEIVING: u16 = 1 << 2;
/// A send is under way.
const SENDING: u16 = 1 << 3;
/// The slot's close is under way.
const UNSLOTTING: u16 = 1 << 4;
/// The core, or a failed connect, has asked for the end.
const CLOSING: u16 = 1 << 5;
/// The core does not want bytes.
const PAUSED: u16 = 1 << 6;
/// The poll spoke while a receive was under way or unwanted: there may be more bytes.
const AGAIN: u16 = 1 << 7;
/// The poll said that the peer is done or gone: read on until recv() says which.
const HUNG_UP: u16 = 1 << 8;
/// `Finished` or `Failed` was told: nothing will be read.
const ENDED: u16 = 1 << 9;
/// `Failed` was told.
const FAILED: u16 = 1 << 10;
/// In `thirsty`.
const THIRSTY: u16 = 1 << 11;
/// Carries datagrams.
const DATAGRAM: u16 = 1 << 12;
/// Bytes are shown, not taken.
const PEEKING: u16 = 1 << 13;
/// A descriptor is on its way (`borrow`), or shown bytes are being discarded; `borrowing` counts them.
const BORROWING: u16 = 1 << 14;
/// The poll said that the peer receives no more.
const GONE: u16 = 1 << 15;
const UNDER_WAY: u16 = POLLING | RECEIVING | SENDING | UNSLOTTING | BORROWING;

/// Connections on direct descriptors.
pub struct Uring {
    // Dropped in this order: the rings let go of the buffers first.
    machine: Machine,
    outbox: Outbox,
}

impl Uring {
    /// A carrier with one ring; `report` is where it counts.
    pub(crate) fn new(
        settings: CarrierSettings,
        wake: &Wake,
        shelf: &Shelf,
        report: &Rc<Cell<CarrierReport>>,
    ) -> Result<Uring, CarrierError> {
        let buffers = Buffers::new(settings.buffer_bytes, settings.buffers_per_chunk, settings.buffer_chunks);
        let outbox = Outbox::new(buffers);
        let poller = Poller::new()?;
        poller
            .add(wake.fd(), libc::EPOLLIN | libc::EPOLLET, WAKE)
            .map_err(|error| CarrierError { what: "epoll_ctl", error })?;
        let slots_per_ring = match u64::from(settings.slots_per_ring) {
            0 => sys::descriptor_limit().min(MOST_SLOTS),
            slots => slots.min(MOST_SLOTS),
        };
        let mut machine = Machine {
            capacity: settings.most_connections.max(1),
            slots_per_ring: slots_per_ring.max(1) as u32,
            clock: Clock::start(),
            poller,
            wake: wake.clone(),
            shelf: shelf.clone(),
            messenger: Messenger::new(),
            ferries: Ferries::default(),
            halting: HashMap::new(),
            counts: CarrierReport::default(),
            report: Rc::clone(report),
            rings: Vec::new(),
            roomy_from: 0,
            attempts: HashMap::new(),
            requests: Vec::with_capacity(CONNECT_BATCH),
            transfers: Transfers::default(),
            reads: 0,
            notes: HashMap::new(),
            borrowing: HashMap::new(),
            thirsty: VecDeque::new(),
            listeners: Vec::new(),
            accepts: Accepts::default(),
            polls_first: true,
            acceptless: VecDeque::new(),
            accept_at: Instant(0),
            nameless: VecDeque::new(),
            tried: HashMap::new(),
            name_at: Instant(0),
            happened: VecDeque::new(),
        };
        machine.add_ring()?;
        Ok(Uring { machine, outbox })
    }
}

impl Carrier for Uring {
    fn capacity(&self) -> u32 {
        self.machine.capacity
    }

    fn run(&mut self, core: &mut dyn Core, until: &mut dyn Until) -> Result<(), CarrierError> {
        let result = self.machine.turns(core, until, &mut self.outbox);
        self.machine.count(&self.outbox.buffers);
        self.machine.listeners.clear();
        self.machine.rings.clear();
        result
    }
}

/// What the wake's epoll item stands for; a sender's is its number with this bit, and a ring's its number.
const WAKE: u64 = u64::MAX;
const SENDER: u64 = 1 << 48;
const FERRY: u64 = 1 << 49;

struct Machine {
    /// Slots over all rings, at most.
    capacity: u32,
    slots_per_ring: u32,
    clock: Clock,
    poller: Poller,
    wake: Wake,
    shelf: Shelf,
    messenger: Messenger,
    ferries: Ferries,
    /// Places that are to be halted, with what came back of a send.
    halting: HashMap<u32, Option<Buf>>,
    counts: CarrierReport,
    report: Rc<Cell<CarrierReport>>,
    rings: Vec<Ring>,
    /// No ring before this one has a free slot.
    roomy_from: usize,
    /// Connects under way: place by ticket.
    attempts: HashMap<u32, u32>,
    /// Connects gathered from one batch of commands.
    requests: Vec<Request>,
    /// Sends and receives under way.
    transfers: Transfers,
    /// Receives among them.
    reads: u32,
    /// Path and note of each handoff under way, by place.
    notes: HashMap<u32, (Buf, Buf)>,
    /// Descriptors on their way, by place.
    borrowing: HashMap<u32, u32>,
    /// Places whose socket holds bytes, and no buffer was free for them.
    thirsty: VecDeque<u32>,
    listeners: Vec<Listening>,
    /// Dropped after the rings, which write to it.
    accepts: Accepts,
    /// Whether the kernel knows accepts that wait before they try; taken back when it says that it does not.
    polls_first: bool,
    /// Listeners that want to accept and could not: no slot, or a pause.
    acceptless: VecDeque<u32>,
    accept_at: Instant,
    /// Connections whose names are to be asked for again, because no descriptor was to be had, and how often they were.
    nameless: VecDeque<(ConnId, u32)>,
    name_at: Instant,
    /// How often names were asked for before that are being asked for again, by place.
    tried: HashMap<u32, u32>,
    /// What happened while obeying commands: told after them.
    happened: VecDeque<Event>,
}

impl Machine {
    fn turns(&mut self, core: &mut dyn Core, until: &mut dyn Until, outbox: &mut Outbox) -> Result<(), CarrierError> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        let mut completions = Vec::with_capacity(REAP_BATCH);
        core.start(self.clock.now(), outbox);
        loop {
            let now = self.clock.now();
            self.count(&outbox.buffers);
            if !until.turn(core, now, outbox) || core.is_done() {
                return Ok(());
            }
            let phase = core.report().phase;
            if core.poll_timeout().is_some_and(|at| at <= now) {
                core.handle_timeout(now, outbox);
            }
            self.obey(outbox)?;
            // Only what has happened so far: a core that answers each failure with another attempt must not keep us here.
            for _ in 0..self.happened.len() {
                if let Some(event) = self.happened.pop_front() {
                    core.handle(event, now, outbox);
                }
            }
            self.obey(outbox)?;
            self.quench(outbox)?;
            let crossed = self.cross(outbox)?;
            self.accept_waiting(now)?;
            self.name_again(now)?;
            let reaped = self.submit_and_reap(core, outbox, &mut completions)?;
            // Questions and a change of phase are told at the next turn: somebody waits for them.
            let is_told = core.report().phase == phase && !outbox.questions.is_fresh();
            let is_idle = self.happened.is_empty() && outbox.commands.is_empty() && is_told;
            if reaped == 0 && !crossed && is_idle {
                self.counts.enters += 1;
                let woken = self
                    .poller
                    .wait(&mut events, self.nap(core))
                    .map_err(|error| CarrierError { what: "epoll_wait", error })?;
                for &libc::epoll_event { u64: data, .. } in &events[..woken] {
                    match data {
                        WAKE => self.wake.silence(),
                        FERRY => self.ferries.roused(),
                        _ if data & SENDER != 0 => {
                            let roomy = self.messenger.roomy(data as u32);
                            self.happened.extend(roomy.map(|conn| Event::Roomy { conn }));
                        }
                        _ => {}
                    }
                }
            }
        }
    }

    /// How long to sleep if no completion comes.
    fn nap(&self, core: &dyn Core) -> Duration {
        let now = self.clock.now();
        let mut nap = if self.ferries.is_waiting() { FERRY_PAUSE } else { PUBLISH_EVERY };
        if let Some(at) = core.poll_timeout() {
            nap = nap.min(at.since(now));
        }
        if !self.acceptless.is_empty() && self.accept_at > now {
            nap = nap.min(self.accept_at.since(now));
        }
        if !self.nameless.is_empty() {
            nap = nap.min(self.name_at.since(now));
        }
        nap
    }

    fn submit_and_reap(
        &mut self,
        core: &mut dyn Core,
        outbox: &mut Outbox,
        completions: &mut Vec<Completion>,
    ) -> Result<usize, CarrierError> {
        for ring in &mut self.rings {
            if !ring.is_idle() {
                ring.submit()?;
            }
        }
        let mut reaped = 0;
        for number in 0..self.rings.len() {
            let ring = &mut self.rings[number];
            ring.reap(REAP_BATCH, completions);
            if ring.overflowed() {
                self.counts.cq_overflows += 1;
                ring.flush_overflow()?;
            }
            if completions.is_empty() {
                continue;
            }
            reaped += completions.len();
            let now = self.clock.now();
            for completion in completions.drain(..) {
                self.completed(number, &completion, core, now, outbox)?;
            }
            self.obey(outbox)?;
        }
        Ok(reaped)
    }

    fn count(&mut self, buffers: &Buffers) {
        self.counts.buffers_in_use = buffers.in_use() as u64;
        let free: u32 = self.rings.iter().map(|ring| ring.free.count()).sum();
        self.counts.slots_in_use = self.counts.slots - free;
        let enters: u64 = self.rings.iter().map(|ring| ring.enters).sum();
        self.report.set(CarrierReport { enters: self.counts.enters + enters, ..self.counts });
    }

    // What the core wants.

    fn obey(&mut self, outbox: &mut Outbox) -> Result<(), CarrierError> {
        if outbox.commands.is_empty() {
            return Ok(());
        }
        let mut commands = std::mem::take(&mut outbox.commands);
        for command in commands.drain(..) {
            match command {
                Command::Connect { ticket, transport, source, destination, choice, range } => {
                    self.requests.push(Request { ticket, transport, source, destination, choice, range });
                    if self.requests.len() == CONNECT_BATCH {
                        self.connect()?;
                    }
                }
                Command::CancelConnect { ticket } => {
                    self.connect()?;
                    if let Some(place) = self.attempts.get(&ticket).copied() {
                        let (ring, slot) = self.locate(place);
                        self.cancel(ring, user_data(Operation::Connect, slot, ticket))?;
                    }
                }
                Command::Listen { listener, local, backlog, reuse_port, accept } => {
                    let event = match self.listen(listener, local, backlog, reuse_port, accept)? {
                        Ok(local) => Event::Listening { listener, local },
                        Err((step, error)) => Event::ListenFailed { listener, step, error },
                    };
                    self.happened.push_back(event);
                }
                Command::Adopt { listener, given, backlog } => {
                    let event = match self.adopt(listener, given, backlog) {
                        Ok(local) => Event::Listening { listener, local },
                        Err((step, error)) => Event::ListenFailed { listener, step, error },
                    };
                    self.happened.push_back(event);
                }
                Command::Unlisten { listener } => self.unlisten(listener)?,
                Command::Send { conn, buf } => match self.open(conn) {
                    Some((ring, slot)) if self.flags(ring, slot) & SENDING == 0 => {
                        let place = self.transfers.put(Transfer { buf, conn, way: Way::Out(0) });
                        self.send(ring, slot, place, &mut outbox.buffers)?;
                    }
                    _ => outbox.buffers.release(buf),
                },
                Command::Pause { conn } => {
                    if let Some((ring, slot)) = self.open(conn) {
                        *self.flags_mut(ring, slot) |= PAUSED;
                    }
                }
                Command::Resume { conn } => {
                    if let Some((ring, slot)) = self.open(conn) {
                        let flags = self.flags_mut(ring, slot);
                        *flags &= !PAUSED;
                        if *flags & AGAIN != 0 {
                            self.receive(ring, slot, outbox)?;
                        }
                    }
                }
                Command::Watch { conn } => {
                    if let Some((ring, slot)) = self.open(conn) {
                        match self.flags(ring, slot) & HUNG_UP {
                            0 => self.rest(ring, slot)?,
                            _ => self.happened.push_back(Event::HungUp { conn }),
                        }
                    }
                }
                Command::Reach { ticket, target: Target::Tcp(destination) } => {
                    let (source, choice, range) = (sys::any_endpoint(destination), SourceChoice::Kernel, (0, 0));
                    let transport = Transport::Stream;
                    self.requests.push(Request { ticket, transport, source, destination, choice, range });
                    if self.requests.len() == CONNECT_BATCH {
                        self.connect()?;
                    }
                }
                Command::Reach { ticket, target: Target::Unix(path) } => {
                    let socket = sys::unix_connection(outbox.buffers.bytes(&path));
                    outbox.buffers.release(path);
                    self.reached(ticket, socket)?;
                }
                Command::Peek { conn } => self.set_peeking(conn, true, outbox)?,
                Command::Take { conn } => self.set_peeking(conn, false, outbox)?,
                Command::Discard { conn, bytes } => {
                    if let Some((ring, slot)) = self.open(conn) {
                        self.discard(ring, slot, bytes)?;
                    }
                }
                Command::Name { conn } => {
                    if let Some((ring, slot)) = self.open(conn) {
                        self.borrow(ring, slot, Purpose::Name)?;
                    }
                }
                Command::Shutdown { conn } => {
                    if let Some((ring, slot)) = self.open(conn) {
                        self.borrow(ring, slot, Purpose::Shutdown)?;
                    }
                }
                Command::HandOff { conn, path, note } => match self.open(conn) {
                    Some((ring, slot)) if !self.notes.contains_key(&conn.index) => {
                        self.notes.insert(conn.index, (path, note));
                        self.borrow(ring, slot, Purpose::HandOff)?;
                    }
                    _ => [path, note].into_iter().for_each(|buf| outbox.buffers.release(buf)),
                },
                Command::Close { conn, abort } => {
                    if let Some((ring, slot)) = self.open(conn) {
                        let rest = self.halting.remove(&conn.index).flatten();
                        rest.into_iter().for_each(|buf| outbox.buffers.release(buf));
                        self.close(ring, slot, abort)?;
                    }
                }
                Command::Halt { conn } => {
                    if let Some((ring, slot)) = self.open(conn) {
                        self.halt(ring, slot)?;
                    }
                }
                Command::OpenFerry { ferry } => {
                    let lost = self.ferries.open(ferry, &self.shelf, &self.poller, FERRY);
                    self.happened.extend(lost);
                }
                Command::CloseFerry { ferry } => {
                    self.ferries.close(ferry, &self.shelf, &self.poller, &mut outbox.peeks);
                }
                Command::Ship { ferry, conns, message } => {
                    self.ferries.ship(ferry, conns, message, &mut outbox.peeks);
                    self.send_cargo(&mut outbox.peeks)?;
                }
                Command::Fetch { ferry } => self.ferries.fetch(ferry),
            }
        }
        self.connect()?;
        outbox.commands = commands;
        Ok(())
    }

    /// Cancel what waits on the slot and empty it. Its file lives until the last operation on it is gone, and only then is
    /// the FIN sent; so all must go.
    fn close(&mut self, ring: usize, slot: u16, abort: bool) -> Result<(), CarrierError> {
        let fixed = Fixed(u32::from(slot));
        let flags = self.flags(ring, slot);
        if abort && flags & DATAGRAM == 0 {
            let entry = opcode::Connect::new(fixed, NOWHERE.as_ptr().cast(), NOWHERE.len() as u32).build();
            self.rings[ring].push(&entry.user_data(user_data(Operation::Unheard, slot, 0)))?;
        }
        if flags & POLLING != 0 {
            self.cancel(ring, user_data(Operation::Poll, slot, 0))?;
        }
        if flags & SENDING != 0 {
            let conn = ConnId {
                index: self.place(ring, slot),
                generation: self.rings[ring].conns[usize::from(slot)].generation,
            };
            if let Some(place) = self.transfers.find_send(conn) {
                self.cancel(ring, user_data(Operation::Send, slot, place))?;
            }
        }
        *self.flags_mut(ring, slot) |= CLOSING | UNSLOTTING;
        let entry = opcode::Close::new(fixed).build();
        self.rings[ring].push(&entry.user_data(user_data(Operation::Close, slot, 0)))
    }

    fn cancel(&mut self, ring: usize, operation: u64) -> Result<(), CarrierError> {
        self.rings[ring].push(&opcode::AsyncCancel::new(operation).build())
    }

    // What the kernel says.

    fn completed(
        &mut self,
        ring: usize,
        completion: &Completion,
        core: &mut dyn Core,
        now: Instant,
        outbox: &mut Outbox,
    ) -> Result<(), CarrierError> {
        let slot = completion.slot;
        match completion.operation {
            Operation::Unheard => return Ok(()),
            Operation::Unlisten => {
                self.rings[ring].listeners -= 1;
                self.release_slot(ring, slot);
                return Ok(());
            }
            Operation::Connect => {
                let ticket = completion.detail;
                self.attempts.remove(&ticket);
                match completion.outcome() {
                    Ok(_) => {
                        let conn = self.begin(ring, slot);
                        self.watch(ring, slot)?;
                        core.handle(Event::Connected { ticket, conn }, now, outbox);
                    }
                    Err(error) => {
                        self.close(ring, slot, false)?;
                        core.handle(Event::ConnectFailed { ticket, step: Step::Connect, error }, now, outbox);
                    }
                }
                return Ok(());
            }
            Operation::Accept => return self.accepted(ring, completion, core, now, outbox),
            Operation::Poll => self.polled(ring, completion, outbox)?,
            Operation::Receive => self.received(ring, completion, core, now, outbox)?,
            Operation::Send => self.sent(ring, completion, core, now, outbox)?,
            Operation::Close => *self.flags_mut(ring, slot) &= !UNSLOTTING,
            Operation::Borrow => self.borrowed(ring, completion, core, now, outbox)?,
            Operation::Discard => self.discarded(ring, completion, core, now, outbox),
        }
        if !self.halting.is_empty() {
            self.settle_halt(ring, slot);
        }
        let entry = &mut self.rings[ring].conns[usize::from(slot)];
        if entry.flags & (CLOSING | UNDER_WAY) == CLOSING {
            let announced = entry.flags & OPEN != 0;
            let generation = entry.generation;
            entry.flags = 0;
            entry.generation = generation.wrapping_add(1);
            self.release_slot(ring, slot);
            if announced {
                let conn = ConnId { index: self.place(ring, slot), generation };
                core.handle(Event::Closed { conn }, now, outbox);
            }
        }
        Ok(())
    }

    /// The socket in the slot is a connection from now on; nobody watches it yet.
    fn begin(&mut self, ring: usize, slot: u16) -> ConnId {
        let flags = self.flags_mut(ring, slot);
        *flags = *flags & DATAGRAM | OPEN;
        ConnId { index: self.place(ring, slot), generation: self.rings[ring].conns[usize::from(slot)].generation }
    }

    /// The connection is broken; or, if it carries datagrams, disturbed.
    fn fail(&mut self, conn: ConnId, step: Step, error: Errno, core: &mut dyn Core, now: Instant, outbox: &mut Outbox) {
        let (ring, slot) = self.locate(conn.index);
        let flags = self.flags_mut(ring, slot);
        if *flags & DATAGRAM != 0 {
            core.handle(Event::Disturbed { conn, step, error }, now, outbox);
        } else if *flags & FAILED == 0 {
            *flags |= FAILED | ENDED;
            core.handle(Event::Failed { conn, step, error }, now, outbox);
        }
    }

    // What waits for a buffer or a slot.

    fn release_slot(&mut self, ring: usize, slot: u16) {
        self.rings[ring].free.give(slot);
        self.roomy_from = self.roomy_from.min(ring);
    }

    /// A ring with a free slot, made if there is none.
    fn roomy_ring(&mut self) -> Result<usize, Errno> {
        while let Some(ring) = self.rings.get(self.roomy_from) {
            if ring.free.count() > 0 {
                return Ok(self.roomy_from);
            }
            self.roomy_from += 1;
        }
        self.add_ring().map_err(|why| why.error)
    }

    fn add_ring(&mut self) -> Result<usize, CarrierError> {
        let slots = self.slots_per_ring.min(self.capacity - self.counts.slots);
        if slots == 0 {
            return Err(CarrierError { what: "most_connections", error: Errno::ENFILE });
        }
        let ring = Ring::new(slots)?;
        let number = self.rings.len();
        self.poller
            .add(ring.fd(), libc::EPOLLIN | libc::EPOLLET, number as u64)
            .map_err(|error| CarrierError { what: "epoll_ctl", error })?;
        self.rings.push(ring);
        self.counts.rings += 1;
        self.counts.slots += slots;
        Ok(number)
    }

    // Names.

    fn place(&self, ring: usize, slot: u16) -> u32 {
        ring as u32 * self.slots_per_ring + u32::from(slot)
    }

    fn locate(&self, place: u32) -> (usize, u16) {
        ((place / self.slots_per_ring) as usize, (place % self.slots_per_ring) as u16)
    }

    /// Where an open connection of this name is; nowhere if the name's time has passed.
    fn open(&self, conn: ConnId) -> Option<(usize, u16)> {
        let (ring, slot) = self.locate(conn.index);
        let entry = self.rings.get(ring)?.conns.get(usize::from(slot))?;
        (entry.generation == conn.generation && entry.flags & (OPEN | CLOSING) == OPEN).then_some((ring, slot))
    }

    fn flags(&self, ring: usize, slot: u16) -> u16 {
        self.rings[ring].conns[usize::from(slot)].flags
    }

    fn flags_mut(&mut self, ring: usize, slot: u16) -> &mut u16 {
        &mut self.rings[ring].conns[usize::from(slot)].flags
    }
}
