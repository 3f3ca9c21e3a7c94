//! How bytes move: a poll that speaks many times, a receive that never waits when it has spoken, one send at a time.
//!
//! Decides when a receive is worth its submission. Knows nothing of how connections come about.

use fourtuple_engine::{Buf, Buffers, CarrierError, ConnId, Core, Errno, Event, Instant, Outbox, Step};
use io_uring::types::Fixed;
use io_uring::{cqueue, opcode};

use super::ring::{Completion, Operation, user_data};
use super::{
    AGAIN, CLOSING, DATAGRAM, ENDED, FAILED, GONE, HUNG_UP, Machine, PAUSED, PEEKING, POLLING, RECEIVING, SENDING,
    THIRSTY,
};

/// Receives under way at once, and so buffers taken before the core has seen them.
const READS: u32 = 256;

/// A send or receive under way.
pub(super) struct Transfer {
    pub(super) buf: Buf,
    pub(super) conn: ConnId,
    pub(super) way: Way,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    In,
    /// Shown, not taken: the buffer is one of `Outbox::peeks`.
    Shown,
    /// With the bytes that the kernel has.
    Out(usize),
}

/// The transfers under way, by place; as many places as were ever under way at once.
#[derive(Default)]
pub(super) struct Transfers {
    places: Vec<Option<Transfer>>,
    free: Vec<u32>,
}

impl Transfers {
    pub(super) fn put(&mut self, transfer: Transfer) -> u32 {
        if let Some(place) = self.free.pop() {
            self.places[place as usize] = Some(transfer);
            return place;
        }
        self.places.push(Some(transfer));
        self.places.len() as u32 - 1
    }

    pub(super) fn at(&mut self, place: u32) -> &mut Transfer {
        self.places[place as usize].as_mut().expect("a transfer completes once")
    }

    pub(super) fn take(&mut self, place: u32) -> Transfer {
        self.free.push(place);
        self.places[place as usize].take().expect("a transfer completes once")
    }

    /// A walk over all: only a close with its send still under way needs it.
    pub(super) fn find_send(&self, conn: ConnId) -> Option<u32> {
        let is_it = |place: &Option<Transfer>| {
            place.as_ref().is_some_and(|it| it.conn == conn && matches!(it.way, Way::Out(_)))
        };
        self.places.iter().position(is_it).map(|place| place as u32)
    }
}

impl Machine {
    pub(super) fn watch(&mut self, ring: usize, slot: u16) -> Result<(), CarrierError> {
        *self.flags_mut(ring, slot) |= POLLING;
        let entry =
            opcode::PollAdd::new(Fixed(u32::from(slot)), (libc::POLLIN | libc::POLLRDHUP) as u32).multi(true).build();
        self.rings[ring].push(&entry.user_data(user_data(Operation::Poll, slot, 0)))
    }

    pub(super) fn polled(
        &mut self,
        ring: usize,
        completion: &Completion,
        outbox: &mut Outbox,
    ) -> Result<(), CarrierError> {
        let slot = completion.slot;
        let index = self.place(ring, slot);
        let flags = &mut self.rings[ring].conns[usize::from(slot)].flags;
        if !completion.more() {
            *flags &= !POLLING;
            self.counts.receive_rearms += 1;
        }
        if *flags & (CLOSING | ENDED) != 0 || self.halting.contains_key(&index) {
            return Ok(());
        }
        // An error of the poll itself leaves the reading of it to recv(), as POLLERR does.
        let hung_up = (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) as u32;
        if completion.outcome().map_or(true, |events| events & hung_up != 0) {
            *flags |= HUNG_UP;
        }
        if completion.outcome().is_ok_and(|events| events & libc::POLLHUP as u32 != 0) {
            *flags |= GONE;
        }
        let flags = *flags;
        if flags & (PEEKING | PAUSED) == PEEKING | PAUSED && flags & HUNG_UP != 0 {
            let conn = ConnId {
                index: self.place(ring, slot),
                generation: self.rings[ring].conns[usize::from(slot)].generation,
            };
            let is_broken = completion.outcome().map_or(true, |events| events & libc::POLLERR as u32 != 0);
            if is_broken {
                // Which error it is, only a socket with a descriptor of its own could say.
                *self.flags_mut(ring, slot) |= FAILED | ENDED;
                self.happened.push_back(Event::Failed { conn, step: Step::Receive, error: Errno::ECONNRESET });
                return Ok(());
            }
            self.happened.push_back(Event::HungUp { conn });
        }
        self.receive(ring, slot, outbox)
    }

    /// Everything there has been received. The kernel ends a poll when the completion queue is full (io_poll_check_events());
    /// a new one is armed here and no sooner: while bytes wait it would speak at once, and fill the queue again. A
    /// connection that was looked at first has none before this.
    pub(super) fn rest(&mut self, ring: usize, slot: u16) -> Result<(), CarrierError> {
        if self.flags(ring, slot) & (POLLING | CLOSING | ENDED) != 0 {
            return Ok(());
        }
        self.watch(ring, slot)
    }

    /// Receive (or look at) what is there, without waiting for more; or wait for a buffer.
    pub(super) fn receive(&mut self, ring: usize, slot: u16, outbox: &mut Outbox) -> Result<(), CarrierError> {
        let index = self.place(ring, slot);
        let entry = &mut self.rings[ring].conns[usize::from(slot)];
        if entry.flags & (CLOSING | ENDED) != 0 {
            return Ok(());
        }
        entry.flags |= AGAIN;
        if entry.flags & (RECEIVING | PAUSED | THIRSTY) != 0 {
            return Ok(());
        }
        let peeking = entry.flags & PEEKING != 0;
        let (buffers, flags, way) = match peeking {
            true => (&mut outbox.peeks, libc::MSG_DONTWAIT | libc::MSG_PEEK, Way::Shown),
            false => (&mut outbox.buffers, libc::MSG_DONTWAIT, Way::In),
        };
        let buf = if self.reads < READS { buffers.take() } else { None };
        let Some(buf) = buf else {
            entry.flags |= THIRSTY;
            self.thirsty.push_back(index);
            self.counts.receive_rearms += 1;
            return Ok(());
        };
        entry.flags = entry.flags & !AGAIN | RECEIVING;
        let conn = ConnId { index, generation: entry.generation };
        // MSG_TRUNC: the length of a datagram, also of one that is longer than the buffer. Of a stream it drops bytes.
        let whole = if entry.flags & DATAGRAM != 0 { libc::MSG_TRUNC } else { 0 };
        let memory = buffers.memory(&buf);
        let entry = opcode::Recv::new(Fixed(u32::from(slot)), memory.as_mut_ptr(), memory.len() as u32)
            .flags(flags | whole)
            .build();
        self.reads += 1;
        let place = self.transfers.put(Transfer { buf, conn, way });
        self.rings[ring].push(&entry.user_data(user_data(Operation::Receive, slot, place)))
    }

    /// Take bytes off the stream. MSG_TRUNC copies none (tcp_recvmsg_locked()), and as they are there, this completes while it
    /// is submitted: before a descriptor that is asked for later, and before a later receive.
    pub(super) fn discard(&mut self, ring: usize, slot: u16, bytes: u32) -> Result<(), CarrierError> {
        self.hold(ring, slot);
        let entry = opcode::Recv::new(Fixed(u32::from(slot)), std::ptr::null_mut(), bytes)
            .flags(libc::MSG_DONTWAIT | libc::MSG_TRUNC)
            .build();
        self.rings[ring].push(&entry.user_data(user_data(Operation::Discard, slot, bytes)))
    }

    pub(super) fn discarded(
        &mut self,
        ring: usize,
        completion: &Completion,
        core: &mut dyn Core,
        now: Instant,
        outbox: &mut Outbox,
    ) {
        let slot = completion.slot;
        self.let_go(ring, slot);
        if self.flags(ring, slot) & CLOSING == 0 && completion.outcome() != Ok(completion.detail) {
            let conn = ConnId {
                index: self.place(ring, slot),
                generation: self.rings[ring].conns[usize::from(slot)].generation,
            };
            let error = completion.outcome().err().unwrap_or(Errno::EAGAIN);
            self.fail(conn, Step::Receive, error, core, now, outbox);
        }
    }

    pub(super) fn received(
        &mut self,
        ring: usize,
        completion: &Completion,
        core: &mut dyn Core,
        now: Instant,
        outbox: &mut Outbox,
    ) -> Result<(), CarrierError> {
        let slot = completion.slot;
        self.reads -= 1;
        let Transfer { mut buf, conn, way } = self.transfers.take(completion.detail);
        let flags = self.flags_mut(ring, slot);
        *flags &= !RECEIVING;
        let flags = *flags;
        let outcome = completion.outcome();
        if let (Ok(count @ 1..), Way::Shown, false) = (outcome, way, flags & CLOSING != 0) {
            outbox.peeks.set_len(&mut buf, count as usize);
            core.handle(Event::Peeked { conn, buf }, now, outbox);
            // The poll speaks when more comes; it has, if it spoke meanwhile, and they are to be taken, if somebody said so.
            self.obey(outbox)?;
            return match self.open(conn) {
                Some((ring, slot)) if self.flags(ring, slot) & AGAIN != 0 => self.receive(ring, slot, outbox),
                Some((ring, slot)) => self.rest(ring, slot),
                None => Ok(()),
            };
        }
        if flags & (DATAGRAM | CLOSING) == DATAGRAM {
            return self.received_datagram(
                ring,
                slot,
                Transfer { buf, conn, way: Way::In },
                outcome,
                core,
                now,
                outbox,
            );
        }
        if let (Ok(count @ 1..), false) = (outcome, flags & CLOSING != 0) {
            let count = count as usize;
            // The buffer full, more behind it, or an end to be read: the poll will not speak again for those.
            let more = cqueue::sock_nonempty(completion.flags) || count == outbox.buffers.buffer_bytes();
            outbox.buffers.set_len(&mut buf, count);
            if !more && flags & HUNG_UP != 0 {
                buf.set_last();
            }
            core.handle(Event::Received { conn, buf }, now, outbox);
            if more || flags & (AGAIN | HUNG_UP) != 0 {
                // The core may have asked for a pause or the end: that goes first.
                self.obey(outbox)?;
                if self.open(conn).is_some() {
                    self.receive(ring, slot, outbox)?;
                }
                return Ok(());
            }
            return self.rest(ring, slot);
        }
        match way {
            Way::Shown => outbox.peeks.release(buf),
            Way::In | Way::Out(_) => outbox.buffers.release(buf),
        }
        if flags & CLOSING != 0 {
            return Ok(());
        }
        match outcome {
            Ok(_) => {
                let flags = self.flags_mut(ring, slot);
                *flags |= ENDED;
                let gone = *flags & GONE != 0;
                core.handle(Event::Finished { conn, gone }, now, outbox);
            }
            Err(Errno::EAGAIN | Errno::EINTR) if flags & AGAIN == 0 => self.rest(ring, slot)?,
            Err(Errno::EAGAIN | Errno::EINTR) => self.receive(ring, slot, outbox)?,
            Err(error) => self.fail(conn, Step::Receive, error, core, now, outbox),
        }
        Ok(())
    }

    /// An empty datagram is no end, and an error neither. Only EAGAIN says that there is no more: the poll may have spoken
    /// once for many.
    #[expect(clippy::too_many_arguments, reason = "what `received` knows")]
    fn received_datagram(
        &mut self,
        ring: usize,
        slot: u16,
        Transfer { mut buf, conn, .. }: Transfer,
        outcome: Result<u32, Errno>,
        core: &mut dyn Core,
        now: Instant,
        outbox: &mut Outbox,
    ) -> Result<(), CarrierError> {
        let error = match outcome {
            Ok(count) if count as usize <= outbox.buffers.buffer_bytes() => {
                outbox.buffers.set_len(&mut buf, count as usize);
                core.handle(Event::Received { conn, buf }, now, outbox);
                None
            }
            failed => {
                outbox.buffers.release(buf);
                Some(failed.err().unwrap_or(Errno::EMSGSIZE))
            }
        };
        match error {
            Some(Errno::EAGAIN) if self.flags(ring, slot) & AGAIN == 0 => return self.rest(ring, slot),
            Some(Errno::EAGAIN | Errno::EINTR) | None => {}
            Some(error) => self.fail(conn, Step::Receive, error, core, now, outbox),
        }
        self.obey(outbox)?;
        if self.open(conn).is_some() {
            self.receive(ring, slot, outbox)?;
        }
        Ok(())
    }

    /// Let what waited for a buffer receive, as far as buffers are free again.
    pub(super) fn quench(&mut self, outbox: &mut Outbox) -> Result<(), CarrierError> {
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
                self.receive(ring, slot, outbox)?;
                if self.flags(ring, slot) & THIRSTY != 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    pub(super) fn send(
        &mut self,
        ring: usize,
        slot: u16,
        place: u32,
        buffers: &mut Buffers,
    ) -> Result<(), CarrierError> {
        let transfer = self.transfers.at(place);
        let Way::Out(taken) = transfer.way else { unreachable!("a receive is not sent") };
        let bytes = &buffers.bytes(&transfer.buf)[taken..];
        let more = if transfer.buf.is_last() { libc::MSG_MORE } else { 0 };
        // MSG_WAITALL: io_send() goes on after a short write by itself.
        let entry = opcode::Send::new(Fixed(u32::from(slot)), bytes.as_ptr(), bytes.len() as u32)
            .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL | more)
            .build();
        *self.flags_mut(ring, slot) |= SENDING;
        self.rings[ring].push(&entry.user_data(user_data(Operation::Send, slot, place)))
    }

    pub(super) fn sent(
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
        let (closing, is_datagram) = (*flags & CLOSING != 0, *flags & DATAGRAM != 0);
        let transfer = self.transfers.at(place);
        let conn = transfer.conn;
        let outcome = completion.outcome();
        if !self.halting.is_empty() && !closing && self.sent_in_part(place, conn, outcome, &mut outbox.buffers) {
            return Ok(());
        }
        let transfer = self.transfers.at(place);
        if let (Way::Out(taken), Ok(count @ 1..), false) = (&mut transfer.way, outcome, closing) {
            *taken += count as usize;
            if *taken < transfer.buf.len() {
                return self.send(ring, completion.slot, place, &mut outbox.buffers);
            }
        }
        if is_datagram && !closing && outcome == Err(Errno::ECONNREFUSED) {
            // What was said before was refused; this one has not been sent (sock_alloc_send_pskb()).
            self.fail(conn, Step::Send, Errno::ECONNREFUSED, core, now, outbox);
            return self.send(ring, completion.slot, place, &mut outbox.buffers);
        }
        outbox.buffers.release(self.transfers.take(place).buf);
        if closing {
            return Ok(());
        }
        if let Err(error) = outcome {
            self.fail(conn, Step::Send, error, core, now, outbox);
        }
        if outcome.is_ok() || is_datagram {
            core.handle(Event::Sent { conn }, now, outbox);
        }
        Ok(())
    }
}
