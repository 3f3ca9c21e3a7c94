//! How sockets come into slots: connects in batches, listeners, and accepts that wait with a slot in hand.
//!
//! Decides which ring a socket goes to. Knows nothing of bytes.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use fourtuple_engine::{
    CarrierError, Core, Errno, Event, Given, Instant, ListenerId, Outbox, SourceChoice, Step, Transport,
};
use io_uring::types::{CancelBuilder, DestinationSlot, Fd, Fixed};
use io_uring::{opcode, squeue};

use super::ring::{Completion, Operation, Ring, user_data};
use super::{DATAGRAM, Machine, PEEKING};
use crate::sys::{self, RawAddress};

/// Sockets made, installed by one call and connected together; so many descriptors are open for a moment.
pub(super) const CONNECT_BATCH: usize = 64;
/// Accepts that wait, over all listeners that have a descriptor.
const ACCEPTS_WAITING: usize = 128;
/// Listeners that keep a descriptor and so can be accepted from in every ring; the others live in one ring's slots.
const PLAIN_LISTENERS: usize = 64;
/// Slots of a ring per listener that lives in it: itself, its waiting accept, and a connection at least.
const SLOTS_PER_LISTENER: u32 = 3;
/// After accept() failed for want of something, the listener is left alone for so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Request {
    pub(super) ticket: u32,
    pub(super) transport: Transport,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) choice: SourceChoice,
    pub(super) range: (u16, u16),
}

pub(super) struct Listening {
    id: ListenerId,
    socket: ListenerSocket,
    /// Accepts under way.
    waiting: u16,
    /// In `acceptless`.
    queued: bool,
    /// `Unlistened` is told.
    told: bool,
}

/// Accepts under way: for which listener, and memory for the peer's name, which stays where it is while the kernel may
/// write to it. As many places as were ever under way at once.
#[derive(Default)]
pub(super) struct Accepts {
    #[expect(clippy::vec_box, reason = "the kernel has their addresses")]
    places: Vec<Box<Waiting>>,
    free: Vec<u32>,
}

struct Waiting {
    listener: u32,
    peer: RawAddress,
    len: libc::socklen_t,
}

impl Accepts {
    fn begin(&mut self, listener: u32) -> u32 {
        let waiting =
            Waiting { listener, peer: RawAddress::unspecified(), len: size_of::<RawAddress>() as libc::socklen_t };
        match self.free.pop() {
            Some(place) => {
                *self.places[place as usize] = waiting;
                place
            }
            None => {
                self.places.push(Box::new(waiting));
                self.places.len() as u32 - 1
            }
        }
    }

    /// Its listener, and the peer if it has come about.
    fn end(&mut self, place: u32) -> (u32, Option<SocketAddr>) {
        self.free.push(place);
        let waiting = &self.places[place as usize];
        (waiting.listener, waiting.peer.socket_addr())
    }
}

pub(super) enum ListenerSocket {
    Plain(OwnedFd),
    Direct { ring: u32, slot: u16 },
    Gone,
}

impl Machine {
    /// Make the gathered connects' sockets, put them into slots, and connect them.
    pub(super) fn connect(&mut self) -> Result<(), CarrierError> {
        let mut made: Vec<(OwnedFd, Request)> = Vec::with_capacity(self.requests.len());
        for request in std::mem::take(&mut self.requests) {
            let Request { transport, source, destination, choice, range, .. } = request;
            match sys::outgoing(transport, source, destination, choice, range, 0) {
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
            let entry = match request.transport {
                Transport::Stream => opcode::Connect::new(Fixed(u32::from(slot)), address.as_ptr(), *len).build(),
                Transport::Datagram => {
                    // Connected already; but all attempts are answered in one place.
                    *self.flags_mut(number, slot) |= DATAGRAM;
                    opcode::Nop::new().build()
                }
            };
            self.rings[number].push(&entry.user_data(user_data(Operation::Connect, slot, request.ticket)))?;
        }
        // Before the addresses go: io_connect_prep() copies them.
        self.rings[number].submit()
    }

    /// A unix connection stands or does not, and only has to be put into a slot. (IORING_OP_CONNECT would wait in a thread
    /// of the kernel's while the backlog is full.)
    pub(super) fn reached(&mut self, ticket: u32, socket: Result<OwnedFd, (Step, Errno)>) -> Result<(), CarrierError> {
        let placed = socket.and_then(|socket| {
            sys::let_block(&socket);
            self.install(&socket).map_err(|error| (Step::Socket, error))
        });
        match placed {
            Ok((ring, slot)) => {
                let conn = self.begin(ring, slot);
                self.watch(ring, slot)?;
                self.happened.push_back(Event::Connected { ticket, conn });
            }
            Err((step, error)) => self.connect_failed(ticket, step, error),
        }
        Ok(())
    }

    /// Put a socket into a free slot.
    pub(super) fn install(&mut self, socket: &OwnedFd) -> Result<(usize, u16), Errno> {
        let ring = self.roomy_ring()?;
        let slot = self.rings[ring].free.take().ok_or(Errno::ENFILE)?;
        match self.rings[ring].install(slot, &[socket.as_raw_fd()]) {
            Ok(()) => Ok((ring, slot)),
            Err(error) => {
                self.release_slot(ring, slot);
                Err(error)
            }
        }
    }

    fn connect_failed(&mut self, ticket: u32, step: Step, error: Errno) {
        self.happened.push_back(Event::ConnectFailed { ticket, step, error });
    }

    pub(super) fn listen(
        &mut self,
        id: ListenerId,
        local: SocketAddr,
        backlog: u32,
        reuse_port: bool,
        accept: bool,
    ) -> Result<Result<SocketAddr, (Step, Errno)>, CarrierError> {
        let made = sys::listening(local, backlog, reuse_port, 0);
        Ok(made.and_then(|(socket, local)| {
            self.keep_listener(id, socket, accept)?;
            Ok(local)
        }))
    }

    /// Listen with a socket from outside. Whether it blocks is all the same to an accept that polls first.
    pub(super) fn adopt(&mut self, id: ListenerId, given: Given, backlog: u32) -> Result<SocketAddr, (Step, Errno)> {
        let socket = self.shelf.lend(given).map_err(|error| (Step::Socket, error))?;
        let local = sys::adopt_listener(&socket, backlog)?;
        self.keep_listener(id, socket, true)?;
        Ok(local)
    }

    fn keep_listener(&mut self, id: ListenerId, socket: OwnedFd, accept: bool) -> Result<(), (Step, Errno)> {
        let plain = self.listeners.iter().take(PLAIN_LISTENERS).count() < PLAIN_LISTENERS;
        let socket = if plain {
            ListenerSocket::Plain(socket)
        } else {
            self.settle_listener(&socket).map_err(|error| (Step::Socket, error))?
        };
        self.listeners.push(Listening { id, socket, waiting: 0, queued: !accept, told: false });
        if accept {
            self.queue_accept(self.listeners.len() as u32 - 1);
        }
        Ok(())
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

    pub(super) fn unlisten(&mut self, id: ListenerId) -> Result<(), CarrierError> {
        let is_it = |it: &Listening| it.id == id && !matches!(it.socket, ListenerSocket::Gone);
        let Some(number) = self.listeners.iter().position(is_it) else { return Ok(()) };
        let listener = &mut self.listeners[number];
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
        self.tell_unlistened(number);
        Ok(())
    }

    /// Once no accept is under way, nothing can come of the listener any more.
    fn tell_unlistened(&mut self, number: usize) {
        let listener = &mut self.listeners[number];
        if matches!(listener.socket, ListenerSocket::Gone) && listener.waiting == 0 && !listener.told {
            listener.told = true;
            self.happened.push_back(Event::Unlistened { listener: listener.id });
        }
    }

    /// Let every listener that may accept wait with as many accepts as it should, each with a slot in hand.
    pub(super) fn accept_waiting(&mut self, now: Instant) -> Result<(), CarrierError> {
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
                let place = self.accepts.begin(number);
                let waiting = &mut *self.accepts.places[place as usize];
                let (peer, len) = ((&raw mut waiting.peer).cast(), &raw mut waiting.len);
                let entry = match (socket, home) {
                    (Some(fd), _) => opcode::Accept::new(fd, peer, len).file_index(target).build(),
                    (None, Some((_, own))) => {
                        opcode::Accept::new(Fixed(u32::from(own)), peer, len).file_index(target).build()
                    }
                    (None, None) => break,
                };
                let mut entry = entry.user_data(user_data(Operation::Accept, slot, place));
                if self.polls_first {
                    poll_first(&mut entry);
                }
                self.rings[ring].push(&entry)?;
                self.listeners[number as usize].waiting += 1;
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

    pub(super) fn accepted(
        &mut self,
        ring: usize,
        completion: &Completion,
        core: &mut dyn Core,
        now: Instant,
        outbox: &mut Outbox,
    ) -> Result<(), CarrierError> {
        let (number, peer) = self.accepts.end(completion.detail);
        let listener = &mut self.listeners[number as usize];
        listener.waiting -= 1;
        let id = listener.id;
        self.queue_accept(number);
        match completion.outcome() {
            Ok(_) => {
                let conn = self.begin(ring, completion.slot);
                core.handle(Event::Accepted { listener: id, conn, peer }, now, outbox);
                self.obey(outbox)?;
                // One that is looked at first is watched only if nothing is there: most are handed over before.
                if let Some((ring, slot)) = self.open(conn)
                    && self.flags(ring, slot) & PEEKING == 0
                {
                    self.watch(ring, slot)?;
                }
            }
            Err(error) => {
                self.release_slot(ring, completion.slot);
                match error {
                    // accept(2): these belong to one connection that is no more; the next one may be well.
                    Errno::EINTR | Errno(libc::ECONNABORTED) | Errno(libc::EPROTO) | Errno::ECANCELED => {}
                    // io_accept_prep() before 6.10.
                    Errno(libc::EINVAL) if self.polls_first => self.polls_first = false,
                    // Another process was faster.
                    Errno::EAGAIN => {}
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
        self.tell_unlistened(number as usize);
        Ok(())
    }
}

/// Let an accept wait for a connection before it makes a file for it: else each one that is armed makes one in vain, which
/// costs as much as an accept that succeeds (io_accept(), do_accept()).
fn poll_first(entry: &mut squeue::Entry) {
    /// linux/io_uring.h, since 6.10.
    const IORING_ACCEPT_POLL_FIRST: u16 = 1 << 2;
    let entry: *mut squeue::Entry = entry;
    // SAFETY: an entry is an io_uring_sqe, whose third and fourth byte are `ioprio`, the flags of an accept.
    unsafe { entry.cast::<u16>().add(1).write(IORING_ACCEPT_POLL_FIRST) };
}

const _: () = assert!(size_of::<squeue::Entry>() == 64, "an entry is an io_uring_sqe and nothing else");
