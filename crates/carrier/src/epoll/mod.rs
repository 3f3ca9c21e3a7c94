//! The epoll carrier: plain descriptors, one epoll instance, edge-triggered. Serves where io_uring is absent or refused;
//! RLIMIT_NOFILE then bounds the process (limits catalogue B1), and every connection costs an epitem (B7).
//!
//! Decides when to try a system call again. Knows no core and no ring.
//!
//! Edge-triggered, so a connection costs one epoll_ctl in its life: what an edge said is kept in flags, and work that
//! could not be finished in a turn (a long read, no buffer) waits in a queue for the next one. A new connection is read
//! from before it is watched: one that is handed over or closed at once costs no epoll_ctl at all. Room to send is
//! watched for only once a send has found none: a unix socket says so whenever its peer reads (unix_write_space()).

mod bytes;
mod making;

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use fourtuple_engine::{
    Buf, Buffers, Carrier, CarrierError, Command, ConnId, Core, Errno, Event, Instant, ListenerId, Outbox, Step, Until,
};

use crate::ferries::Ferries;
use crate::messenger::Messenger;
use crate::shelf::Shelf;
use crate::sys::{self, Clock, Poller, Wake};
use crate::worker::{CarrierReport, CarrierSettings, PUBLISH_EVERY};

/// When no buffer is free: those that come back do so with an edge, or because the core has thought again.
const BUFFER_PAUSE: Duration = Duration::from_millis(1);
/// How often, between two waits, what commands have led to is told and read: an accepted connection is handed over, or
/// relayed and its first bytes with it, in one turn.
const ROUNDS: usize = 4;
/// Descriptors that a process has beside its connections.
const DESCRIPTORS_BESIDE: u64 = 24;

/// What is watched of a connection, with EPOLLOUT where somebody waits for room.
const EDGES: i32 = libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET;

/// Connections on plain descriptors.
pub struct Epoll {
    capacity: u32,
    /// Descriptors that connections of this worker may have.
    descriptors: u32,
    /// Connections that are looked at. Each may want a descriptor more, for its service, and accept() leaves it: else
    /// whoever waits for a service keeps the one that its service needs.
    looked_at: u32,
    /// Accepted in this turn, and not counted there yet; and whether they will be.
    untold: u32,
    looks: bool,
    clock: Clock,
    /// What cores are told; looked up once per connection read and per round, not per event.
    now: Instant,
    poller: Poller,
    wake: Wake,
    shelf: Shelf,
    messenger: Messenger,
    ferries: Ferries,
    counts: CarrierReport,
    report: Rc<Cell<CarrierReport>>,
    conns: Vec<Conn>,
    free: Vec<u32>,
    /// Attempts under way: ticket by place, and back.
    tickets: HashMap<u32, u32>,
    attempts: HashMap<u32, u32>,
    /// Sends that the kernel has not wholly taken, with the bytes that it has.
    sending: HashMap<u32, (Buf, usize)>,
    listeners: HashMap<u32, Listening>,
    /// Listeners whose queue holds a connection.
    acceptable: VecDeque<ListenerId>,
    /// Listeners that are not watched until `accept_at`, because accept() failed for want of something.
    resting: Vec<ListenerId>,
    accept_at: Instant,
    /// Places whose socket may hold bytes.
    readable: VecDeque<u32>,
    /// The last read found no buffer.
    dry: bool,
    /// What happened while obeying commands: told after them.
    happened: VecDeque<Event>,
    outbox: Option<Outbox>,
}

struct Listening {
    socket: OwnedFd,
    /// The turn after which it is asked how many connections it has, if it has one.
    asked_after: u64,
}

#[derive(Clone, Copy)]
struct Conn {
    fd: RawFd,
    generation: u16,
    flags: u16,
}

const _: () = assert!(size_of::<Conn>() <= 8);

/// Announced to the core and not yet told `Closed`.
const OPEN: u16 = 1;
/// An attempt under way.
const CONNECTING: u16 = 1 << 1;
/// In `readable`.
const QUEUED: u16 = 1 << 2;
/// The core does not want bytes.
const PAUSED: u16 = 1 << 3;
/// No more bytes will come: told `Finished` or `Failed`.
const ENDED: u16 = 1 << 4;
/// Told `Failed`.
const FAILED: u16 = 1 << 5;
/// Closed, `Closed` is in `happened`.
const CLOSING: u16 = 1 << 6;
/// An edge came while the core did not want bytes.
const READABLE: u16 = 1 << 7;
/// Carries datagrams.
const DATAGRAM: u16 = 1 << 8;
/// Bytes are shown, not taken.
const PEEKING: u16 = 1 << 9;
/// In the epoll set; with `WATCHED_OUT` for room to send, too.
const WATCHED: u16 = 1 << 10;
const WATCHED_OUT: u16 = 1 << 11;
/// An edge said that there is an end or an error behind the bytes.
const HUNG_UP: u16 = 1 << 12;
/// An edge said that the peer receives no more, either.
const GONE: u16 = 1 << 13;

/// What an epoll item stands for: kind, generation, place or listener.
const KIND_CONN: u64 = 0;
const KIND_LISTENER: u64 = 1 << 48;
const KIND_WAKE: u64 = 2 << 48;
const KIND_SENDER: u64 = 4 << 48;
const KIND_FERRY: u64 = 8 << 48;

impl Epoll {
    /// A carrier with nothing in it; `report` is where it counts.
    pub(crate) fn new(
        settings: CarrierSettings,
        wake: &Wake,
        shelf: &Shelf,
        report: &Rc<Cell<CarrierReport>>,
    ) -> Result<Epoll, CarrierError> {
        let poller = Poller::new()?;
        poller
            .add(wake.fd(), libc::EPOLLIN | libc::EPOLLET, KIND_WAKE)
            .map_err(|error| CarrierError { what: "epoll_ctl", error })?;
        let buffers = Buffers::new(settings.buffer_bytes, settings.buffers_per_chunk, settings.buffer_chunks);
        let descriptors =
            sys::descriptor_limit().saturating_sub(DESCRIPTORS_BESIDE) / u64::from(settings.workers.max(1));
        Ok(Epoll {
            capacity: settings.most_connections,
            descriptors: u32::try_from(descriptors).unwrap_or(u32::MAX),
            looked_at: 0,
            untold: 0,
            looks: false,
            clock: Clock::start(),
            now: Instant(0),
            poller,
            wake: wake.clone(),
            shelf: shelf.clone(),
            messenger: Messenger::new(),
            ferries: Ferries::default(),
            counts: CarrierReport { rings: 1, ..CarrierReport::default() },
            report: Rc::clone(report),
            conns: Vec::new(),
            free: Vec::new(),
            tickets: HashMap::new(),
            attempts: HashMap::new(),
            sending: HashMap::new(),
            listeners: HashMap::new(),
            acceptable: VecDeque::new(),
            resting: Vec::new(),
            accept_at: Instant(0),
            readable: VecDeque::new(),
            dry: false,
            happened: VecDeque::new(),
            outbox: Some(Outbox::new(buffers)),
        })
    }

    fn turns(&mut self, core: &mut dyn Core, until: &mut dyn Until, outbox: &mut Outbox) -> Result<(), CarrierError> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 256];
        core.start(self.clock.now(), outbox);
        loop {
            self.now = self.clock.now();
            self.count(outbox);
            if !until.turn(core, self.now, outbox) || core.is_done() {
                return Ok(());
            }
            let phase = core.report().phase;
            self.accept(core, outbox);
            for _ in 0..ROUNDS {
                let crossed = self.cross(outbox);
                if core.poll_timeout().is_some_and(|at| at <= self.now) {
                    core.handle_timeout(self.now, outbox);
                }
                self.go_on(core, outbox);
                self.read(core, outbox);
                if self.happened.is_empty() && !crossed && (self.readable.is_empty() || self.dry) {
                    break;
                }
            }
            // What the core asks is taken at the next turn, and a change of phase told: somebody waits, so that comes at once.
            let is_told = core.report().phase == phase && !outbox.questions.is_fresh();
            let nap = if is_told { self.nap(core) } else { Duration::ZERO };
            self.counts.enters += 1;
            let count =
                self.poller.wait(&mut events, nap).map_err(|error| CarrierError { what: "epoll_wait", error })?;
            self.now = self.clock.now();
            for event in &events[..count] {
                self.edge(core, event.u64, event.events as i32, outbox);
            }
        }
    }

    /// Do what is wanted, and tell what has come of it.
    fn go_on(&mut self, core: &mut dyn Core, outbox: &mut Outbox) {
        self.obey(outbox);
        // Only what has happened so far: a core that answers each failure with another attempt must not keep us here.
        for _ in 0..self.happened.len() {
            if let Some(event) = self.happened.pop_front() {
                self.tell(core, event, outbox);
            }
        }
        self.obey(outbox);
    }

    /// How long to sleep if no edge comes.
    fn nap(&self, core: &dyn Core) -> Duration {
        if !self.happened.is_empty() || (!self.readable.is_empty() && !self.dry) {
            return Duration::ZERO;
        }
        let now = self.clock.now();
        let mut nap = if self.dry || self.ferries.is_waiting() { BUFFER_PAUSE } else { PUBLISH_EVERY };
        if let Some(at) = core.poll_timeout() {
            nap = nap.min(at.since(now));
        }
        if !self.resting.is_empty() {
            nap = nap.min(self.accept_at.since(now));
        }
        nap
    }

    fn count(&mut self, outbox: &Outbox) {
        self.counts.slots = self.conns.len() as u32;
        self.counts.slots_in_use = (self.conns.len() - self.free.len() + self.listeners.len()) as u32;
        self.counts.buffers_in_use = outbox.buffers.in_use() as u64;
        self.report.set(self.counts);
    }

    // What the core wants.

    fn obey(&mut self, outbox: &mut Outbox) {
        let mut commands = std::mem::take(&mut outbox.commands);
        for command in commands.drain(..) {
            match command {
                Command::Listen { listener, local, backlog, reuse_port, accept } => {
                    let event = match self.listen(listener, local, backlog, reuse_port, accept) {
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
                Command::Connect { ticket, transport, source, destination, choice, range } => {
                    let attempt = sys::outgoing(transport, source, destination, choice, range, libc::SOCK_NONBLOCK)
                        .and_then(|socket| self.connect(ticket, transport, socket, destination));
                    if let Err((step, error)) = attempt {
                        self.happened.push_back(Event::ConnectFailed { ticket, step, error });
                    }
                }
                Command::CancelConnect { ticket } => {
                    if let Some(place) = self.attempts.get(&ticket).copied() {
                        self.attempt_failed(place, Errno::ECANCELED);
                    }
                }
                Command::Send { conn, buf } => {
                    if self.is_open(conn) && !self.sending.contains_key(&conn.index) {
                        self.send_on(conn.index, buf, 0, &mut outbox.buffers);
                    } else {
                        outbox.buffers.release(buf);
                    }
                }
                Command::Pause { conn } => {
                    if self.is_open(conn) {
                        self.conns[conn.index as usize].flags |= PAUSED;
                    }
                }
                Command::Resume { conn } => {
                    if self.is_open(conn) {
                        let entry = &mut self.conns[conn.index as usize];
                        entry.flags &= !PAUSED;
                        if entry.flags & READABLE != 0 {
                            self.queue_read(conn.index);
                        }
                    }
                }
                Command::Close { conn, abort } => {
                    if self.is_open(conn) {
                        self.close(conn, abort, &mut outbox.buffers);
                    }
                }
                Command::Unlisten { listener } => {
                    if let Some(entry) = self.listeners.remove(&listener.0) {
                        // Somebody else may hold the socket: then it stays watched when it is closed here.
                        self.poller.remove(entry.socket.as_raw_fd());
                        self.resting.retain(|&resting| resting != listener);
                        self.happened.push_back(Event::Unlistened { listener });
                    }
                }
                Command::Reach { ticket, target } => match self.reach(ticket, target, &mut outbox.buffers) {
                    Ok(None) => {}
                    Ok(Some(conn)) => self.happened.push_back(Event::Connected { ticket, conn }),
                    Err((step, error)) => self.happened.push_back(Event::ConnectFailed { ticket, step, error }),
                },
                Command::Name { conn } => {
                    if self.is_open(conn) {
                        let names = sys::names(self.conns[conn.index as usize].fd);
                        self.happened.push_back(Event::Named { conn, names });
                    }
                }
                Command::Peek { conn } => {
                    if self.is_open(conn) {
                        let flags = &mut self.conns[conn.index as usize].flags;
                        self.looks = true;
                        self.looked_at += u32::from(*flags & PEEKING == 0);
                        *flags |= PEEKING;
                        self.queue_read(conn.index);
                    }
                }
                Command::Watch { conn } => {
                    if self.is_open(conn) {
                        match self.conns[conn.index as usize].flags & HUNG_UP {
                            0 => self.rest(conn),
                            _ => self.hung_up(conn),
                        }
                    }
                }
                Command::Discard { conn, bytes } => {
                    if self.is_open(conn) {
                        match sys::discard(self.conns[conn.index as usize].fd, bytes as usize) {
                            Ok(count) if count == bytes as usize => {}
                            outcome => self.fail(conn, Step::Receive, outcome.err().unwrap_or(Errno::EAGAIN)),
                        }
                    }
                }
                Command::Take { conn } => {
                    if self.is_open(conn) {
                        let entry = &mut self.conns[conn.index as usize];
                        self.looked_at -= u32::from(entry.flags & PEEKING != 0);
                        entry.flags = entry.flags & !PEEKING | READABLE;
                        self.queue_read(conn.index);
                    }
                }
                Command::Shutdown { conn } => {
                    if self.is_open(conn) {
                        sys::shutdown(self.conns[conn.index as usize].fd);
                    }
                }
                Command::Halt { conn } => {
                    if self.is_open(conn) {
                        let rest = self.halt(conn, &mut outbox.buffers);
                        self.happened.push_back(Event::Halted { conn, rest });
                    }
                }
                Command::OpenFerry { ferry } => {
                    let lost = self.ferries.open(ferry, &self.shelf, &self.poller, KIND_FERRY);
                    self.happened.extend(lost);
                }
                Command::CloseFerry { ferry } => {
                    self.ferries.close(ferry, &self.shelf, &self.poller, &mut outbox.peeks);
                }
                Command::Ship { ferry, conns, message } => {
                    self.ferries.ship(ferry, conns, message, &mut outbox.peeks);
                    self.send_cargo(&mut outbox.peeks);
                }
                Command::Fetch { ferry } => self.ferries.fetch(ferry),
                Command::HandOff { conn, path, note } => {
                    if self.is_open(conn) {
                        let fd = self.conns[conn.index as usize].fd;
                        let (buffers, now) = (&outbox.buffers, self.now);
                        let (path, note) = (buffers.bytes(&path), buffers.bytes(&note));
                        let room = (&self.poller, KIND_SENDER);
                        let event = match self.messenger.hand_off(conn, fd, (path, note), now, room) {
                            Ok(()) => {
                                let entry = &mut self.conns[conn.index as usize];
                                if entry.flags & WATCHED != 0 {
                                    self.poller.remove(fd);
                                }
                                entry.flags |= ENDED;
                                // At once: of a service that is quick ours would be the last descriptor, and its FIN
                                // ours to send.
                                self.drop_socket(conn.index);
                                Event::HandedOff { conn }
                            }
                            Err(error) => Event::HandOffFailed { conn, error },
                        };
                        self.happened.push_back(event);
                    }
                    outbox.buffers.release(path);
                    outbox.buffers.release(note);
                }
            }
        }
        outbox.commands = commands;
    }

    /// Give a socket a place.
    fn settle(&mut self, socket: OwnedFd, flags: u16) -> Result<u32, Errno> {
        let place = match self.free.pop() {
            Some(place) => place,
            None if self.conns.len() as u32 == self.capacity => return Err(Errno::ENFILE),
            None => {
                self.conns.push(Conn { fd: -1, generation: 0, flags: 0 });
                self.conns.len() as u32 - 1
            }
        };
        let entry = &mut self.conns[place as usize];
        (entry.fd, entry.flags) = (socket.into_raw_fd(), flags);
        Ok(place)
    }

    /// Have a connection watched, also for room to send if `out`. What is there already is told by the next wait.
    fn watch(&mut self, place: u32, out: bool) -> Result<(), Errno> {
        let entry = &mut self.conns[place as usize];
        let wanted = if out { WATCHED | WATCHED_OUT } else { WATCHED };
        if entry.flags & wanted == wanted {
            return Ok(());
        }
        let edges = if out { EDGES | libc::EPOLLOUT } else { EDGES };
        let data = KIND_CONN | u64::from(entry.generation) << 32 | u64::from(place);
        match entry.flags & WATCHED {
            0 => self.poller.add(entry.fd, edges, data)?,
            _ => self.poller.change(entry.fd, edges, data)?,
        }
        entry.flags |= wanted;
        Ok(())
    }

    /// As `watch`, of a connection that nobody knows yet; nothing is left of it if that fails.
    fn watch_or_drop(&mut self, place: u32, out: bool) -> Result<(), Errno> {
        self.watch(place, out).inspect_err(|_| {
            self.drop_socket(place);
            self.retire(place);
        })
    }

    /// The end of a connection that is not read from.
    fn hung_up(&mut self, conn: ConnId) {
        match sys::pending_error(self.conns[conn.index as usize].fd) {
            Errno(0) => self.happened.push_back(Event::HungUp { conn }),
            error => self.fail(conn, Step::Receive, error),
        }
    }

    /// As `watch`, when there is nothing to be read.
    fn rest(&mut self, conn: ConnId) {
        if let Err(error) = self.watch(conn.index, false) {
            self.fail(conn, Step::Receive, error);
        }
    }

    fn close(&mut self, conn: ConnId, abort: bool, buffers: &mut Buffers) {
        let Conn { fd, flags, .. } = self.conns[conn.index as usize];
        if abort && flags & DATAGRAM == 0 {
            sys::reset_on_close(fd);
        }
        self.looked_at -= u32::from(flags & PEEKING != 0);
        self.drop_socket(conn.index);
        self.conns[conn.index as usize].flags |= CLOSING;
        if let Some((buf, _)) = self.sending.remove(&conn.index) {
            buffers.release(buf);
        }
        self.happened.push_back(Event::Closed { conn });
    }

    // Moving.

    /// Nothing is told of it until somebody says `Resume`; then it is read from first, and watched when there is nothing.
    fn halt(&mut self, conn: ConnId, buffers: &mut Buffers) -> Option<Buf> {
        let entry = &mut self.conns[conn.index as usize];
        if entry.flags & WATCHED != 0 {
            // Closing would not do it while the other process holds the socket.
            self.poller.remove(entry.fd);
        }
        entry.flags = entry.flags & !(WATCHED | WATCHED_OUT) | PAUSED | READABLE;
        let (mut buf, taken) = self.sending.remove(&conn.index)?;
        buffers.cut(&mut buf, taken);
        Some(buf)
    }

    /// Send and receive over ferries what can be; says whether that was anything.
    fn cross(&mut self, outbox: &mut Outbox) -> bool {
        let before = self.happened.len();
        self.send_cargo(&mut outbox.peeks);
        for place in 0..self.ferries.len() {
            let room = (self.capacity as usize).saturating_sub(self.conns.len() - self.free.len());
            if room < 2 && self.ferries.at(place).is_fetching() {
                continue;
            }
            match self.ferries.at(place).receive(&mut outbox.peeks) {
                None => {}
                Some(Err(lost)) => self.happened.push_back(lost),
                Some(Ok((message, sockets))) => {
                    let mut conns = [None; 2];
                    for (conn, socket) in conns.iter_mut().zip(sockets) {
                        *conn = self
                            .settle(socket, OPEN | PAUSED | READABLE)
                            .ok()
                            .map(|index| ConnId { index, generation: self.conns[index as usize].generation });
                    }
                    let ferry = self.ferries.at(place).name;
                    self.happened.push_back(Event::Landed { ferry, conns, message });
                }
            }
        }
        self.happened.len() > before
    }

    fn send_cargo(&mut self, peeks: &mut Buffers) {
        for place in 0..self.ferries.len() {
            let Some(cargo) = &self.ferries.at(place).cargo else { continue };
            let conns = cargo.conns;
            let is_whole = conns.iter().flatten().all(|conn| self.is_open(*conn));
            let descriptors: Vec<RawFd> =
                conns.iter().flatten().map(|conn| self.conns[conn.index as usize].fd).collect();
            let ferry = self.ferries.at(place);
            let told = if is_whole { ferry.send(&descriptors, peeks) } else { ferry.unload(peeks) };
            self.happened.extend(told);
        }
    }

    // What the kernel says.

    fn edge(&mut self, core: &mut dyn Core, data: u64, edges: i32, outbox: &mut Outbox) {
        if data == KIND_WAKE {
            return self.wake.silence();
        }
        if data & KIND_SENDER != 0 {
            if let Some(conn) = self.messenger.roomy(data as u32) {
                self.happened.push_back(Event::Roomy { conn });
            }
            return;
        }
        if data & KIND_FERRY != 0 {
            return self.ferries.roused();
        }
        if data & KIND_LISTENER != 0 {
            return self.acceptable.push_back(ListenerId(data as u32));
        }
        let place = data as u32;
        let entry = self.conns[place as usize];
        if entry.generation != (data >> 32) as u16 || entry.flags & CLOSING != 0 || entry.flags & WATCHED == 0 {
            return; // closed or halted earlier in this turn
        }
        if entry.flags & CONNECTING != 0 {
            match sys::pending_error(entry.fd) {
                Errno(0) if edges & libc::EPOLLOUT != 0 => self.attempt_succeeded(core, place, outbox),
                Errno(0) => return,
                error => return self.attempt_failed(place, error),
            }
        }
        if edges & (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) != 0 {
            let hung_up = edges & (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) != 0;
            let gone = edges & libc::EPOLLHUP != 0;
            self.conns[place as usize].flags |=
                READABLE | if hung_up { HUNG_UP } else { 0 } | if gone { GONE } else { 0 };
            if hung_up && entry.flags & (PEEKING | PAUSED | ENDED) == PEEKING | PAUSED {
                self.hung_up(ConnId { index: place, generation: entry.generation });
            }
            self.queue_read(place);
        }
        if edges & (libc::EPOLLOUT | libc::EPOLLERR) != 0
            && let Some((buf, taken)) = self.sending.remove(&place)
        {
            self.send_on(place, buf, taken, &mut outbox.buffers);
        }
    }

    // Bookkeeping.

    fn tell(&mut self, core: &mut dyn Core, event: Event, outbox: &mut Outbox) {
        let closed = match &event {
            Event::Closed { conn } => Some(conn.index),
            _ => None,
        };
        core.handle(event, self.now, outbox);
        if let Some(place) = closed {
            self.retire(place);
        }
    }

    fn fail(&mut self, conn: ConnId, step: Step, error: Errno) {
        let entry = &mut self.conns[conn.index as usize];
        if entry.flags & FAILED == 0 {
            entry.flags |= FAILED | ENDED;
            self.happened.push_back(Event::Failed { conn, step, error });
        }
    }

    fn is_open(&self, conn: ConnId) -> bool {
        self.conns
            .get(conn.index as usize)
            .is_some_and(|entry| entry.generation == conn.generation && entry.flags & (OPEN | CLOSING) == OPEN)
    }

    fn queue_read(&mut self, place: u32) {
        let entry = &mut self.conns[place as usize];
        if entry.flags & (QUEUED | PAUSED | ENDED) == 0 {
            entry.flags |= QUEUED;
            self.readable.push_back(place);
        }
    }

    fn drop_socket(&mut self, place: u32) {
        let fd = std::mem::replace(&mut self.conns[place as usize].fd, -1);
        // One that was handed off is closed already.
        if fd >= 0 {
            sys::close(fd);
        }
    }

    /// The place is free for another connection.
    fn retire(&mut self, place: u32) {
        let entry = &mut self.conns[place as usize];
        entry.flags = 0;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(place);
    }
}

impl Carrier for Epoll {
    fn capacity(&self) -> u32 {
        self.capacity
    }

    fn run(&mut self, core: &mut dyn Core, until: &mut dyn Until) -> Result<(), CarrierError> {
        let Some(mut outbox) = self.outbox.take() else { return Ok(()) };
        let result = self.turns(core, until, &mut outbox);
        self.close_all();
        self.count(&outbox);
        result
    }
}

impl Epoll {
    fn close_all(&mut self) {
        for place in 0..self.conns.len() as u32 {
            self.drop_socket(place);
        }
        self.listeners.clear();
    }
}

impl Drop for Epoll {
    fn drop(&mut self) {
        self.close_all();
    }
}
