//! How connections come to be: listeners and what they accept, attempts and what comes of them.
//!
//! Decides how many are accepted in a turn, and when a listener rests.
//!
//! Listeners are level-triggered: accept() that finds an empty queue costs as much as one that does not (do_accept() makes
//! the file first), and twenty times an epoll_wait() that says so. So one connection is taken per turn, and when there is
//! another in the next turn, as many as the kernel then says that there are, which is asked every second time at most.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use fourtuple_engine::{
    Buffers, ConnId, Core, Errno, Event, Given, ListenerId, Outbox, SourceChoice, Step, Target, Transport,
};

use super::{CONNECTING, DATAGRAM, Epoll, KIND_LISTENER, Listening, OPEN, READABLE, WATCHED, WATCHED_OUT};
use crate::sys;

/// After accept() failed for want of something, it is left alone for so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Accepts per listener and turn, at most.
const ACCEPT_BATCH: u32 = 64;

impl Epoll {
    pub(super) fn listen(
        &mut self,
        listener: ListenerId,
        local: std::net::SocketAddr,
        backlog: u32,
        reuse_port: bool,
        accept: bool,
    ) -> Result<std::net::SocketAddr, (Step, Errno)> {
        let (socket, local) = sys::listening(local, backlog, reuse_port, libc::SOCK_NONBLOCK)?;
        if accept {
            self.watch_listener(listener, &socket).map_err(|error| (Step::Accept, error))?;
        }
        self.listeners.insert(listener.0, Listening { socket, asked_after: 0 });
        Ok(local)
    }

    pub(super) fn adopt(
        &mut self,
        listener: ListenerId,
        given: Given,
        backlog: u32,
    ) -> Result<std::net::SocketAddr, (Step, Errno)> {
        let socket = self.shelf.lend(given).map_err(|error| (Step::Socket, error))?;
        let local = sys::adopt_listener(&socket, backlog)?;
        // An accept() that another process was faster with must not wait.
        let watched = sys::never_block(&socket).and_then(|()| self.watch_listener(listener, &socket));
        watched.map_err(|error| (Step::Accept, error))?;
        self.listeners.insert(listener.0, Listening { socket, asked_after: 0 });
        Ok(local)
    }

    pub(super) fn watch_listener(&self, listener: ListenerId, socket: &OwnedFd) -> Result<(), Errno> {
        self.poller.add(socket.as_raw_fd(), libc::EPOLLIN, KIND_LISTENER | u64::from(listener.0))
    }

    pub(super) fn connect(
        &mut self,
        ticket: u32,
        transport: Transport,
        socket: OwnedFd,
        destination: std::net::SocketAddr,
    ) -> Result<(), (Step, Errno)> {
        let flags = match transport {
            Transport::Datagram => CONNECTING | DATAGRAM,
            Transport::Stream => match sys::connect(&socket, destination) {
                Ok(()) | Err(Errno(libc::EINPROGRESS)) => CONNECTING,
                Err(error) => return Err((Step::Connect, error)),
            },
        };
        self.watch_attempt(ticket, socket, flags)
    }

    /// Connected at once or not, the first edge says so: epoll_ctl looks at the socket when it adds it.
    pub(super) fn watch_attempt(&mut self, ticket: u32, socket: OwnedFd, flags: u16) -> Result<(), (Step, Errno)> {
        let place = self.settle(socket, flags).map_err(|error| (Step::Connect, error))?;
        self.watch_or_drop(place, true).map_err(|error| (Step::Connect, error))?;
        self.tickets.insert(place, ticket);
        self.attempts.insert(ticket, place);
        Ok(())
    }

    /// A connection to a unix socket stands at once.
    pub(super) fn reach(
        &mut self,
        ticket: u32,
        target: Target,
        buffers: &mut Buffers,
    ) -> Result<Option<ConnId>, (Step, Errno)> {
        match target {
            Target::Tcp(destination) => {
                let nowhere = sys::any_endpoint(destination);
                let (transport, choice) = (Transport::Stream, SourceChoice::Kernel);
                sys::outgoing(transport, nowhere, destination, choice, (0, 0), libc::SOCK_NONBLOCK)
                    .inspect(sys::send_at_once)
                    .and_then(|socket| self.connect(ticket, transport, socket, destination))
                    .map(|()| None)
            }
            Target::Unix(path) => {
                let socket = sys::unix_connection(buffers.bytes(&path));
                buffers.release(path);
                let place = self.settle(socket?, OPEN).map_err(|error| (Step::Connect, error))?;
                self.watch_or_drop(place, false).map_err(|error| (Step::Connect, error))?;
                Ok(Some(ConnId { index: place, generation: self.conns[place as usize].generation }))
            }
        }
    }

    pub(super) fn attempt_succeeded(&mut self, core: &mut dyn Core, place: u32, outbox: &mut Outbox) {
        let entry = &mut self.conns[place as usize];
        entry.flags = entry.flags & (DATAGRAM | WATCHED | WATCHED_OUT) | OPEN;
        let conn = ConnId { index: place, generation: entry.generation };
        if let Some(ticket) = self.tickets.remove(&place) {
            self.attempts.remove(&ticket);
            self.tell(core, Event::Connected { ticket, conn }, outbox);
        }
    }

    pub(super) fn attempt_failed(&mut self, place: u32, error: Errno) {
        self.drop_socket(place);
        self.retire(place);
        if let Some(ticket) = self.tickets.remove(&place) {
            self.attempts.remove(&ticket);
            self.happened.push_back(Event::ConnectFailed { ticket, step: Step::Connect, error });
        }
    }

    pub(super) fn accept(&mut self, core: &mut dyn Core, outbox: &mut Outbox) {
        if !self.resting.is_empty() && self.now >= self.accept_at {
            for listener in std::mem::take(&mut self.resting) {
                let Some(entry) = self.listeners.get(&listener.0) else { continue };
                if self.watch_listener(listener, &entry.socket).is_err() {
                    self.rest_listener(listener);
                }
            }
        }
        self.untold = 0;
        while let Some(listener) = self.acceptable.pop_front() {
            if let Err(error) = self.accept_some(core, listener, outbox) {
                if let Some(entry) = self.listeners.get(&listener.0) {
                    self.poller.remove(entry.socket.as_raw_fd());
                    self.rest_listener(listener);
                }
                self.tell(core, Event::AcceptFailed { listener, error }, outbox);
            }
        }
    }

    pub(super) fn rest_listener(&mut self, listener: ListenerId) {
        self.resting.push(listener);
        self.accept_at = self.now.after(ACCEPT_PAUSE);
    }

    /// Accept this turn's share.
    pub(super) fn accept_some(
        &mut self,
        core: &mut dyn Core,
        listener: ListenerId,
        outbox: &mut Outbox,
    ) -> Result<(), Errno> {
        let turn = self.counts.enters;
        let Some(entry) = self.listeners.get_mut(&listener.0) else { return Ok(()) };
        let batch = match entry.asked_after + 1 == turn {
            true => sys::accept_queue(&entry.socket).clamp(1, ACCEPT_BATCH),
            false => {
                entry.asked_after = turn;
                1
            }
        };
        for _ in 0..batch {
            let is_full = self.free.is_empty() && self.conns.len() as u32 == self.capacity;
            let in_use = (self.conns.len() - self.free.len()) as u32;
            // A core that looks at connections looks at these too, once it has been told: a backlog is taken in one turn.
            let looked_at = self.looked_at + if self.looks { self.untold } else { 0 };
            // One place for it and one for its service, if some are looked at; the first one may always come.
            if is_full || looked_at > 0 && in_use + looked_at + 2 > self.descriptors {
                // As with a full descriptor table: the connection stays in the queue.
                return Err(Errno::ENFILE);
            }
            let Some(entry) = self.listeners.get(&listener.0) else { return Ok(()) };
            let (socket, peer) = match sys::accept(&entry.socket) {
                Ok(accepted) => accepted,
                Err(Errno::EAGAIN) => return Ok(()),
                // accept(2): these belong to one connection that is no more; the next one may be well.
                Err(Errno::EINTR | Errno(libc::ECONNABORTED) | Errno(libc::EPROTO)) => continue,
                Err(error) => return Err(error),
            };
            let place = self.settle(socket, OPEN | READABLE)?;
            self.untold += 1;
            self.queue_read(place);
            let conn = ConnId { index: place, generation: self.conns[place as usize].generation };
            self.tell(core, Event::Accepted { listener, conn, peer }, outbox);
        }
        Ok(())
    }
}
