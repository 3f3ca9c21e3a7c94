//! Bytes: read, shown or taken, and sent on.
//!
//! Decides how much of one connection is read in a turn, and what an error in the middle means.

use std::os::fd::RawFd;

use fourtuple_engine::{Buf, Buffers, ConnId, Core, Errno, Event, Outbox, Step};

use super::{CLOSING, Conn, DATAGRAM, ENDED, Epoll, GONE, HUNG_UP, OPEN, PAUSED, PEEKING, QUEUED, READABLE};
use crate::sys;

/// Buffers read per connection and turn.
const READ_BATCH: usize = 4;
/// Connections read per turn.
const READ_TURN: usize = 1024;

impl Epoll {
    /// Send `buf` from `taken` on; what the kernel does not take now waits for an edge.
    pub(super) fn send_on(&mut self, place: u32, buf: Buf, mut taken: usize, buffers: &mut Buffers) {
        let Conn { fd, generation, flags } = self.conns[place as usize];
        let conn = ConnId { index: place, generation };
        while taken < buf.len() {
            match sys::send(fd, &buffers.bytes(&buf)[taken..], buf.is_last()) {
                Ok(count) => taken += count,
                Err(Errno::EAGAIN) => match self.watch(place, true) {
                    Ok(()) => {
                        self.sending.insert(place, (buf, taken));
                        return;
                    }
                    Err(error) => {
                        buffers.release(buf);
                        return self.fail(conn, Step::Send, error);
                    }
                },
                Err(Errno::EINTR) => {}
                Err(error) if flags & DATAGRAM != 0 => {
                    self.happened.push_back(Event::Disturbed { conn, step: Step::Send, error });
                    if error != Errno::ECONNREFUSED {
                        break;
                    }
                    // What was said before was refused; this one has not been sent (sock_alloc_send_pskb()).
                }
                Err(error) => {
                    buffers.release(buf);
                    return self.fail(conn, Step::Send, error);
                }
            }
        }
        buffers.release(buf);
        self.happened.push_back(Event::Sent { conn });
    }

    pub(super) fn read(&mut self, core: &mut dyn Core, outbox: &mut Outbox) {
        self.dry = false;
        for _ in 0..self.readable.len().min(READ_TURN) {
            let Some(place) = self.readable.pop_front() else { return };
            let entry = &mut self.conns[place as usize];
            if entry.flags & QUEUED == 0 {
                continue; // closed, and perhaps another's place since
            }
            entry.flags &= !QUEUED;
            if entry.flags & (OPEN | PAUSED | ENDED | CLOSING) != OPEN {
                continue;
            }
            self.now = self.clock.now();
            if !self.read_one(core, place, outbox) {
                // No buffer: the rest waits as well.
                self.dry = true;
                self.counts.receive_rearms += 1;
                return self.queue_read(place);
            }
            // Only commands stop a connection, so they are obeyed before its next turn, and its next turn is after others'.
            self.obey(outbox);
        }
    }

    /// Read until nothing is left, or for this turn's share. Returns false if no buffer was free.
    pub(super) fn read_one(&mut self, core: &mut dyn Core, place: u32, outbox: &mut Outbox) -> bool {
        let Conn { fd, generation, flags } = self.conns[place as usize];
        let conn = ConnId { index: place, generation };
        if flags & PEEKING != 0 {
            return self.show(core, place, outbox);
        }
        if flags & DATAGRAM != 0 {
            return self.read_datagrams(core, conn, fd, outbox);
        }
        for _ in 0..READ_BATCH {
            if !self.is_open(conn) || self.conns[place as usize].flags & (PAUSED | ENDED) != 0 {
                return true;
            }
            let Some(mut buf) = outbox.buffers.take() else { return false };
            match sys::receive(fd, outbox.buffers.memory(&buf)) {
                Ok(0) => {
                    outbox.buffers.release(buf);
                    self.finish(core, conn, outbox);
                    return true;
                }
                Ok(count) => {
                    // epoll(7): a short read has emptied the socket, and what comes after it has an edge of its own.
                    let is_all = count < outbox.buffers.buffer_bytes();
                    outbox.buffers.set_len(&mut buf, count);
                    if is_all && flags & HUNG_UP != 0 {
                        buf.set_last();
                    }
                    self.tell(core, Event::Received { conn, buf }, outbox);
                    if is_all && flags & HUNG_UP == 0 {
                        self.conns[place as usize].flags &= !READABLE;
                        self.rest(conn);
                        return true;
                    }
                    // What is passed on goes before more comes, from a warm cache and without a queue.
                    self.go_on(core, outbox);
                }
                Err(error) => {
                    outbox.buffers.release(buf);
                    match error {
                        Errno::EAGAIN => {
                            self.conns[place as usize].flags &= !READABLE;
                            self.rest(conn);
                        }
                        Errno::EINTR => self.queue_read(place),
                        error => self.fail(conn, Step::Receive, error),
                    }
                    return true;
                }
            }
        }
        self.queue_read(place);
        true
    }

    /// Show what is there; the next edge is for more. Returns false if no buffer was free.
    pub(super) fn show(&mut self, core: &mut dyn Core, place: u32, outbox: &mut Outbox) -> bool {
        let Conn { fd, generation, .. } = self.conns[place as usize];
        let conn = ConnId { index: place, generation };
        let Some(mut buf) = outbox.peeks.take() else { return false };
        let outcome = sys::peek(fd, outbox.peeks.memory(&buf));
        if let Ok(count @ 1..) = outcome {
            outbox.peeks.set_len(&mut buf, count);
            self.tell(core, Event::Peeked { conn, buf }, outbox);
            self.obey(outbox);
            // Unless it goes on at once: then there is more to be read, or nothing to be waited for.
            if self.is_open(conn) && self.conns[place as usize].flags & (QUEUED | PAUSED | ENDED) == 0 {
                self.rest(conn);
            }
            return true;
        }
        outbox.peeks.release(buf);
        match outcome {
            Ok(_) => self.finish(core, conn, outbox),
            Err(Errno::EAGAIN) => self.rest(conn),
            Err(Errno::EINTR) => self.queue_read(place),
            Err(error) => self.fail(conn, Step::Receive, error),
        }
        true
    }

    /// The peer has said its last byte, and all have been read.
    pub(super) fn finish(&mut self, core: &mut dyn Core, conn: ConnId, outbox: &mut Outbox) {
        let entry = &mut self.conns[conn.index as usize];
        entry.flags |= ENDED;
        let gone = entry.flags & GONE != 0;
        self.tell(core, Event::Finished { conn, gone }, outbox);
    }

    /// As `read_one`; an empty datagram is no end, and an error neither.
    pub(super) fn read_datagrams(&mut self, core: &mut dyn Core, conn: ConnId, fd: RawFd, outbox: &mut Outbox) -> bool {
        for _ in 0..READ_BATCH {
            let Some(mut buf) = outbox.buffers.take() else { return false };
            let error = match sys::receive_datagram(fd, outbox.buffers.memory(&buf)) {
                Ok(count) if count <= outbox.buffers.buffer_bytes() => {
                    outbox.buffers.set_len(&mut buf, count);
                    self.tell(core, Event::Received { conn, buf }, outbox);
                    continue;
                }
                Ok(_) => Errno::EMSGSIZE,
                Err(error) => error,
            };
            outbox.buffers.release(buf);
            match error {
                Errno::EAGAIN => {
                    self.conns[conn.index as usize].flags &= !READABLE;
                    return true;
                }
                Errno::EINTR => {}
                error => self.tell(core, Event::Disturbed { conn, step: Step::Receive, error }, outbox),
            }
        }
        self.queue_read(conn.index);
        true
    }
}
