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

mod probe;
mod ring;

use std::cell::Cell;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use fourtuple_engine::{
    Buf, Buffers, Carrier, CarrierError, Command, ConnId, Core, Errno, Event, Instant, ListenerId, Outbox,
    SourceChoice, Step, Until,
};
use io_uring::types::{CancelBuilder, DestinationSlot, Fd, Fixed};
use io_uring::{cqueue, opcode};

pub use self::probe::{UringAbilities, probe_uring};
use self::ring::{Completion, Operation, Ring, user_data};
use crate::sys::{self, Clock, Poller, RawAddress, Wake};
use crate::worker::{CarrierReport, CarrierSettings, PUBLISH_EVERY};

/// Most slots of one ring: what a slot's number has room for in an operation's name, with one bit to spare.
const MOST_SLOTS: u64 = 1 << 15;
/// Sockets made, installed by one call and connected together; so many descriptors are open for a moment.
const CONNECT_BATCH: usize = 64;
/// Accepts that wait, over all listeners that have a descriptor.
const ACCEPTS_WAITING: usize = 128;
/// Listeners that keep a descriptor and so can be accepted from in every ring; the others live in one ring's slots.
const PLAIN_LISTENERS: usize = 64;
/// Slots of a ring per listener that lives in it: itself, its waiting accept, and a connection at least.
const SLOTS_PER_LISTENER: u32 = 3;
/// After accept() failed for want of something, the listener is left alone for so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Receives under way at once, and so buffers taken before the core has seen them.
const READS: u32 = 256;
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
const UNDER_WAY: u16 = POLLING | RECEIVING | SENDING | UNSLOTTING;

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
            counts: CarrierReport::default(),
            report: Rc::clone(report),
            rings: Vec::new(),
            roomy_from: 0,
            attempts: HashMap::new(),
            requests: Vec::with_capacity(CONNECT_BATCH),
            transfers: Transfers::default(),
            reads: 0,
            thirsty: VecDeque::new(),
            listeners: Vec::new(),
            acceptless: VecDeque::new(),
            accept_at: Instant(0),
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

/// What the wake's epoll item stands for; the rings' items are their numbers.
const WAKE: u64 = u64::MAX;

struct Machine {
    /// Slots over all rings, at most.
    capacity: u32,
    slots_per_ring: u32,
    clock: Clock,
    poller: Poller,
    wake: Wake,
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
    /// Places whose socket holds bytes, and no buffer was free for them.
    thirsty: VecDeque<u32>,
    listeners: Vec<Listening>,
    /// Listeners that want to accept and could not: no slot, or a pause.
    acceptless: VecDeque<u32>,
    accept_at: Instant,
    /// What happened while obeying commands: told after them.
    happened: VecDeque<Event>,
}

struct Request {
    ticket: u32,
    source: SocketAddr,
    destination: SocketAddr,
    choice: SourceChoice,
    range: (u16, u16),
}

struct Listening {
    id: ListenerId,
    socket: ListenerSocket,
    /// Accepts under way.
    waiting: u16,
    /// In `acceptless`.
    queued: bool,
}

enum ListenerSocket {
    Plain(OwnedFd),
    Direct { ring: u32, slot: u16 },
    Gone,
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
            self.quench(&mut outbox.buffers)?;
            self.accept_waiting(now)?;
            let reaped = self.submit_and_reap(core, outbox, &mut completions)?;
            if reaped == 0 && self.happened.is_empty() && outbox.commands.is_empty() {
                self.counts.enters += 1;
                let woken = self
                    .poller
                    .wait(&mut events, self.nap(core))
                    .map_err(|error| CarrierError { what: "epoll_wait", error })?;
                if events[..woken].iter().any(|event| event.u64 == WAKE) {
                    self.wake.silence();
                }
            }
        }
    }

    /// How long to sleep if no completion comes.
    fn nap(&self, core: &dyn Core) -> Duration {
        let now = self.clock.now();
        let mut nap = PUBLISH_EVERY;
        if let Some(at) = core.poll_timeout() {
            nap = nap.min(at.since(now));
        }
        if !self.acceptless.is_empty() && self.accept_at > now {
            nap = nap.min(self.accept_at.since(now));
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
        let buffers = &mut outbox.buffers;
        for command in commands.drain(..) {
            match command {
                Command::Connect { ticket, source, destination, choice, range } => {
                    self.requests.push(Request { ticket, source, destination, choice, range });
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
                Command::Unlisten { listener } => self.unlisten(listener)?,
                Command::Send { conn, buf } => match self.open(conn) {
                    Some((ring, slot)) if self.flags(ring, slot) & SENDING == 0 => {
                        let place = self.transfers.put(Transfer { buf, conn, way: Way::Out(0) });
                        self.send(ring, slot, place, buffers)?;
                    }
                    _ => buffers.release(buf),
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
                            self.receive(ring, slot, buffers)?;
                        }
                    }
                }
                Command::Close { conn, abort } => {
                    if let Some((ring, slot)) = self.open(conn) {
                        self.close(ring, slot, abort)?;
                    }
                }
            }
        }
        self.connect()?;
        outbox.commands = commands;
        Ok(())
    }

    /// Make the gathered connects' sockets, put them into slots, and connect them.
    fn connect(&mut self) -> Result<(), CarrierError> {
        let mut made: Vec<(OwnedFd, Request)> = Vec::with_capacity(self.requests.len());
        for request in std::mem::take(&mut self.requests) {
            match sys::outgoing(request.source, request.destination, request.choice, request.range, 0) {
                Ok(socket) => made.push((socket, request)),
                Err((step, error)) => self.connect_failed(request.ticket, step, error),
            }
        }
        let mut made = &made[..];
        while !made.is_empty() {
            let ring = match self.roomy_ring() {
                Ok(ring) => ring,
                Err(error) => {
                    for (_, request) in made {
                        self.connect_failed(request.ticket, Step::Socket, error);
                    }
                    return Ok(());
                }
            };
            let (first, count) = self.rings[ring].free.take_row(made.len());
            let (row, rest) = made.split_at(count);
            made = rest;
            self.connect_row(ring, first, row)?;
        }
        Ok(())
    }

    /// Connect sockets in slots in a row from `first`.
    fn connect_row(&mut self, number: usize, first: u16, row: &[(OwnedFd, Request)]) -> Result<(), CarrierError> {
        let sockets: Vec<RawFd> = row.iter().map(|(socket, _)| socket.as_raw_fd()).collect();
        if let Err(error) = self.rings[number].install(first, &sockets) {
            for (slot, (_, request)) in (first..).zip(row) {
                self.rings[number].free.give(slot);
                self.roomy_from = self.roomy_from.min(number);
                self.connect_failed(request.ticket, Step::Socket, error);
            }
            return Ok(());
        }
        let addresses: Vec<_> = row.iter().map(|(_, request)| RawAddress::new(request.destination)).collect();
        for ((slot, (_, request)), (address, len)) in (first..).zip(row).zip(&addresses) {
            self.attempts.insert(request.ticket, self.place(number, slot));
            let entry = opcode::Connect::new(Fixed(u32::from(slot)), address.as_ptr(), *len).build();
            self.rings[number].push(&entry.user_data(user_data(Operation::Connect, slot, request.ticket)))?;
        }
        // Before the addresses go: io_connect_prep() copies them.
        self.rings[number].submit()
    }

    fn connect_failed(&mut self, ticket: u32, step: Step, error: Errno) {
        self.happened.push_back(Event::ConnectFailed { ticket, step, error });
    }

    fn listen(
        &mut self,
        id: ListenerId,
        local: SocketAddr,
        backlog: u32,
        reuse_port: bool,
        accept: bool,
    ) -> Result<Result<SocketAddr, (Step, Errno)>, CarrierError> {
        let (socket, local) = match sys::listening(local, backlog, reuse_port, 0) {
            Ok(made) => made,
            Err(why) => return Ok(Err(why)),
        };
        let plain = self.listeners.iter().take(PLAIN_LISTENERS).count() < PLAIN_LISTENERS;
        let socket = if plain {
            ListenerSocket::Plain(socket)
        } else {
            match self.settle_listener(&socket) {
                Ok(direct) => direct,
                Err(error) => return Ok(Err((Step::Socket, error))),
            }
        };
        self.listeners.push(Listening { id, socket, waiting: 0, queued: !accept });
        if accept {
            self.queue_accept(self.listeners.len() as u32 - 1);
        }
        Ok(Ok(local))
    }

    /// A listener's slot, in the first ring that has room for it and for what it will accept.
    fn settle_listener(&mut self, socket: &OwnedFd) -> Result<ListenerSocket, Errno> {
        let most = self.slots_per_ring / SLOTS_PER_LISTENER;
        let roomy = |ring: &Ring| ring.listeners < most && ring.free.count() >= SLOTS_PER_LISTENER;
        let number = match self.rings.iter().rposition(roomy) {
            Some(number) => number,
            None => self.add_ring().map_err(|why| why.error)?,
        };
        let ring = &mut self.rings[number];
        let slot = ring.free.take().ok_or(Errno::ENFILE)?;
        if let Err(error) = ring.install(slot, &[socket.as_raw_fd()]) {
            ring.free.give(slot);
            return Err(error);
        }
        ring.listeners += 1;
        Ok(ListenerSocket::Direct { ring: number as u32, slot })
    }

    fn unlisten(&mut self, id: ListenerId) -> Result<(), CarrierError> {
        let Some(listener) = self
            .listeners
            .iter_mut()
            .find(|listener| listener.id == id && !matches!(listener.socket, ListenerSocket::Gone))
        else {
            return Ok(());
        };
        match std::mem::replace(&mut listener.socket, ListenerSocket::Gone) {
            ListenerSocket::Plain(socket) => {
                for ring in &mut self.rings {
                    let target = CancelBuilder::fd(Fd(socket.as_raw_fd())).all();
                    ring.push(&opcode::AsyncCancel2::new(target).build())?;
                    // Before the descriptor goes: the kernel finds the accepts by it.
                    ring.submit()?;
                }
            }
            ListenerSocket::Direct { ring, slot } => {
                let fixed = Fixed(u32::from(slot));
                let ring = &mut self.rings[ring as usize];
                ring.push(&opcode::AsyncCancel2::new(CancelBuilder::fd(fixed).all()).build())?;
                let close = opcode::Close::new(fixed).build();
                ring.push(&close.user_data(user_data(Operation::Unlisten, slot, 0)))?;
            }
            ListenerSocket::Gone => {}
        }
        Ok(())
    }

    fn send(&mut self, ring: usize, slot: u16, place: u32, buffers: &mut Buffers) -> Result<(), CarrierError> {
        let transfer = self.transfers.at(place);
        let Way::Out(taken) = transfer.way else { unreachable!("a receive is not sent") };
        let bytes = &buffers.bytes(&transfer.buf)[taken..];
        // MSG_WAITALL: io_send() goes on after a short write by itself.
        let entry = opcode::Send::new(Fixed(u32::from(slot)), bytes.as_ptr(), bytes.len() as u32)
            .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
            .build();
        *self.flags_mut(ring, slot) |= SENDING;
        self.rings[ring].push(&entry.user_data(user_data(Operation::Send, slot, place)))
    }

    /// Receive what is there, without waiting for more; or wait for a buffer.
    fn receive(&mut self, ring: usize, slot: u16, buffers: &mut Buffers) -> Result<(), CarrierError> {
        let index = self.place(ring, slot);
        let entry = &mut self.rings[ring].conns[usize::from(slot)];
        if entry.flags & (CLOSING | ENDED) != 0 {
            return Ok(());
        }
        entry.flags |= AGAIN;
        if entry.flags & (RECEIVING | PAUSED | THIRSTY) != 0 {
            return Ok(());
        }
        let buf = if self.reads < READS { buffers.take() } else { None };
        let Some(buf) = buf else {
            entry.flags |= THIRSTY;
            self.thirsty.push_back(index);
            self.counts.receive_rearms += 1;
            return Ok(());
        };
        entry.flags = entry.flags & !AGAIN | RECEIVING;
        let conn = ConnId { index, generation: entry.generation };
        let memory = buffers.memory(&buf);
        let entry = opcode::Recv::new(Fixed(u32::from(slot)), memory.as_mut_ptr(), memory.len() as u32)
            .flags(libc::MSG_DONTWAIT)
            .build();
        self.reads += 1;
        let place = self.transfers.put(Transfer { buf, conn, way: Way::In });
        self.rings[ring].push(&entry.user_data(user_data(Operation::Receive, slot, place)))
    }

    fn watch(&mut self, ring: usize, slot: u16) -> Result<(), CarrierError> {
        *self.flags_mut(ring, slot) |= POLLING;
        let entry =
            opcode::PollAdd::new(Fixed(u32::from(slot)), (libc::POLLIN | libc::POLLRDHUP) as u32).multi(true).build();
        self.rings[ring].push(&entry.user_data(user_data(Operation::Poll, slot, 0)))
    }

    /// Cancel what waits on the slot and empty it. Its file lives until the last operation on it is gone, and only then is
    /// the FIN sent; so all must go.
    fn close(&mut self, ring: usize, slot: u16, abort: bool) -> Result<(), CarrierError> {
        let fixed = Fixed(u32::from(slot));
        let flags = self.flags(ring, slot);
        if abort {
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
                        let conn = self.begin(ring, slot)?;
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
            Operation::Poll => self.polled(ring, completion, &mut outbox.buffers)?,
            Operation::Receive => self.received(ring, completion, core, now, outbox)?,
            Operation::Send => self.sent(ring, completion, core, now, outbox)?,
            Operation::Close => *self.flags_mut(ring, slot) &= !UNSLOTTING,
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

    fn accepted(
        &mut self,
        ring: usize,
        completion: &Completion,
        core: &mut dyn Core,
        now: Instant,
        outbox: &mut Outbox,
    ) -> Result<(), CarrierError> {
        let listener = &mut self.listeners[completion.detail as usize];
        listener.waiting -= 1;
        let id = listener.id;
        self.queue_accept(completion.detail);
        match completion.outcome() {
            Ok(_) => {
                let conn = self.begin(ring, completion.slot)?;
                core.handle(Event::Accepted { listener: id, conn }, now, outbox);
            }
            Err(error) => {
                self.release_slot(ring, completion.slot);
                match error {
                    // accept(2): these belong to one connection that is no more; the next one may be well.
                    Errno::EINTR | Errno(libc::ECONNABORTED) | Errno(libc::EPROTO) | Errno::ECANCELED => {}
                    error => {
                        if error == Errno::ENFILE {
                            self.counts.accept_lost += 1;
                        }
                        self.accept_at = now.after(ACCEPT_PAUSE);
                        core.handle(Event::AcceptFailed { listener: id, error }, now, outbox);
                    }
                }
            }
        }
        Ok(())
    }

    fn polled(&mut self, ring: usize, completion: &Completion, buffers: &mut Buffers) -> Result<(), CarrierError> {
        let slot = completion.slot;
        let flags = self.flags_mut(ring, slot);
        if !completion.more() {
            *flags &= !POLLING;
        }
        if *flags & (CLOSING | ENDED) != 0 {
            return Ok(());
        }
        // An error of the poll itself leaves the reading of it to recv(), as POLLERR does.
        let hung_up = (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) as u32;
        if completion.outcome().map_or(true, |events| events & hung_up != 0) {
            *flags |= HUNG_UP;
        }
        if !completion.more() {
            self.counts.receive_rearms += 1;
            self.watch(ring, slot)?;
        }
        self.receive(ring, slot, buffers)
    }

    fn received(
        &mut self,
        ring: usize,
        completion: &Completion,
        core: &mut dyn Core,
        now: Instant,
        outbox: &mut Outbox,
    ) -> Result<(), CarrierError> {
        let slot = completion.slot;
        self.reads -= 1;
        let Transfer { mut buf, conn, .. } = self.transfers.take(completion.detail);
        let flags = self.flags_mut(ring, slot);
        *flags &= !RECEIVING;
        let flags = *flags;
        let outcome = completion.outcome();
        if let (Ok(count @ 1..), false) = (outcome, flags & CLOSING != 0) {
            let count = count as usize;
            // The buffer full, more behind it, or an end to be read: the poll will not speak again for those.
            let more = cqueue::sock_nonempty(completion.flags) || count == outbox.buffers.buffer_bytes();
            outbox.buffers.set_len(&mut buf, count);
            core.handle(Event::Received { conn, buf }, now, outbox);
            if more || flags & (AGAIN | HUNG_UP) != 0 {
                // The core may have asked for a pause or the end: that goes first.
                self.obey(outbox)?;
                if self.open(conn).is_some() {
                    self.receive(ring, slot, &mut outbox.buffers)?;
                }
            }
            return Ok(());
        }
        outbox.buffers.release(buf);
        if flags & CLOSING != 0 {
            return Ok(());
        }
        match outcome {
            Ok(_) => {
                *self.flags_mut(ring, slot) |= ENDED;
                core.handle(Event::Finished { conn }, now, outbox);
            }
            Err(Errno::EAGAIN | Errno::EINTR) if flags & AGAIN == 0 => {}
            Err(Errno::EAGAIN | Errno::EINTR) => self.receive(ring, slot, &mut outbox.buffers)?,
            Err(error) => self.fail(conn, Step::Receive, error, core, now, outbox),
        }
        Ok(())
    }

    fn sent(
        &mut self,
        ring: usize,
        completion: &Completion,
        core: &mut dyn Core,
        now: Instant,
        outbox: &mut Outbox,
    ) -> Result<(), CarrierError> {
        let place = completion.detail;
        let flags = self.flags_mut(ring, completion.slot);
        *flags &= !SENDING;
        let closing = *flags & CLOSING != 0;
        let transfer = self.transfers.at(place);
        let conn = transfer.conn;
        let outcome = completion.outcome();
        if let (Way::Out(taken), Ok(count @ 1..), false) = (&mut transfer.way, outcome, closing) {
            *taken += count as usize;
            if *taken < transfer.buf.len() {
                return self.send(ring, completion.slot, place, &mut outbox.buffers);
            }
        }
        outbox.buffers.release(self.transfers.take(place).buf);
        if closing {
            return Ok(());
        }
        match outcome {
            Err(error) => self.fail(conn, Step::Send, error, core, now, outbox),
            Ok(_) => core.handle(Event::Sent { conn }, now, outbox),
        }
        Ok(())
    }

    /// The socket in the slot is a connection from now on.
    fn begin(&mut self, ring: usize, slot: u16) -> Result<ConnId, CarrierError> {
        *self.flags_mut(ring, slot) = OPEN;
        self.watch(ring, slot)?;
        Ok(ConnId { index: self.place(ring, slot), generation: self.rings[ring].conns[usize::from(slot)].generation })
    }

    fn fail(&mut self, conn: ConnId, step: Step, error: Errno, core: &mut dyn Core, now: Instant, outbox: &mut Outbox) {
        let (ring, slot) = self.locate(conn.index);
        let flags = self.flags_mut(ring, slot);
        if *flags & FAILED == 0 {
            *flags |= FAILED | ENDED;
            core.handle(Event::Failed { conn, step, error }, now, outbox);
        }
    }

    // What waits for a buffer or a slot.

    /// Let what waited for a buffer receive, as far as buffers are free again.
    fn quench(&mut self, buffers: &mut Buffers) -> Result<(), CarrierError> {
        for _ in 0..self.thirsty.len() {
            if self.reads >= READS {
                break;
            }
            let Some(place) = self.thirsty.pop_front() else { break };
            let (ring, slot) = self.locate(place);
            let flags = self.flags_mut(ring, slot);
            // Without the flag the slot was closed, and is perhaps another's since.
            if *flags & THIRSTY != 0 {
                *flags &= !THIRSTY;
                self.receive(ring, slot, buffers)?;
                if self.flags(ring, slot) & THIRSTY != 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    fn queue_accept(&mut self, listener: u32) {
        let entry = &mut self.listeners[listener as usize];
        if !entry.queued {
            entry.queued = true;
            self.acceptless.push_back(listener);
        }
    }

    /// Let every listener that may accept wait with as many accepts as it should, each with a slot in hand.
    fn accept_waiting(&mut self, now: Instant) -> Result<(), CarrierError> {
        if now < self.accept_at {
            return Ok(());
        }
        let each = (ACCEPTS_WAITING / self.listeners.len().clamp(1, ACCEPTS_WAITING)) as u16;
        for _ in 0..self.acceptless.len() {
            let Some(number) = self.acceptless.pop_front() else { break };
            self.listeners[number as usize].queued = false;
            loop {
                let listener = &self.listeners[number as usize];
                let (socket, home, wanted) = match &listener.socket {
                    ListenerSocket::Plain(socket) => (Some(Fd(socket.as_raw_fd())), None, each),
                    ListenerSocket::Direct { ring, slot } => (None, Some((*ring as usize, *slot)), 1),
                    ListenerSocket::Gone => break,
                };
                if listener.waiting >= wanted {
                    break;
                }
                let found = match home {
                    Some((ring, _)) => Ok(ring),
                    None => self.roomy_ring(),
                };
                let Some((ring, slot)) = found.ok().and_then(|ring| Some((ring, self.rings[ring].free.take()?))) else {
                    // No slot anywhere: the connections wait in the accept queue until one is free.
                    self.queue_accept(number);
                    break;
                };
                let target = DestinationSlot::try_from_slot_target(u32::from(slot)).ok();
                let null = std::ptr::null_mut();
                let entry = match (socket, home) {
                    (Some(fd), _) => opcode::Accept::new(fd, null, null.cast()).file_index(target).build(),
                    (None, Some((_, own))) => {
                        opcode::Accept::new(Fixed(u32::from(own)), null, null.cast()).file_index(target).build()
                    }
                    (None, None) => break,
                };
                self.rings[ring].push(&entry.user_data(user_data(Operation::Accept, slot, number)))?;
                self.listeners[number as usize].waiting += 1;
            }
        }
        Ok(())
    }

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

/// A send or receive under way.
struct Transfer {
    buf: Buf,
    conn: ConnId,
    way: Way,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    /// With the bytes that the kernel has.
    Out(usize),
}

/// The transfers under way, by place; as many places as were ever under way at once.
#[derive(Default)]
struct Transfers {
    places: Vec<Option<Transfer>>,
    free: Vec<u32>,
}

impl Transfers {
    fn put(&mut self, transfer: Transfer) -> u32 {
        if let Some(place) = self.free.pop() {
            self.places[place as usize] = Some(transfer);
            return place;
        }
        self.places.push(Some(transfer));
        self.places.len() as u32 - 1
    }

    fn at(&mut self, place: u32) -> &mut Transfer {
        self.places[place as usize].as_mut().expect("a transfer completes once")
    }

    fn take(&mut self, place: u32) -> Transfer {
        self.free.push(place);
        self.places[place as usize].take().expect("a transfer completes once")
    }

    /// A walk over all: only a close with its send still under way needs it.
    fn find_send(&self, conn: ConnId) -> Option<u32> {
        let is_it = |place: &Option<Transfer>| place.as_ref().is_some_and(|it| it.conn == conn && it.way != Way::In);
        self.places.iter().position(is_it).map(|place| place as u32)
    }
}
