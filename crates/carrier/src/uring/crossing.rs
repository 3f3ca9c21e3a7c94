//! Connections that go to other processes and come from them: halting, lending a descriptor for a message, taking a slot.
//!
//! Decides when nothing is under way on a slot. Knows nothing of what is said over a ferry.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use fourtuple_engine::{Buffers, CarrierError, ConnId, Errno, Event, Outbox};

use super::borrow::Purpose;
use super::bytes::Way;
use super::ring::{Operation, user_data};
use super::{AGAIN, BORROWING, Machine, PAUSED, POLLING, RECEIVING, SENDING};
use crate::sys;

impl Machine {
    /// Stop what is under way on the slot. A receive never waits and so ends by itself; the poll is cancelled, and so is a send,
    /// which says then how much went (io_sendrecv_fail()).
    pub(super) fn halt(&mut self, ring: usize, slot: u16) -> Result<(), CarrierError> {
        let index = self.place(ring, slot);
        let flags = self.flags_mut(ring, slot);
        *flags |= PAUSED | AGAIN;
        let (is_sending, is_polling) = (*flags & SENDING != 0, *flags & POLLING != 0);
        let conn = ConnId { index, generation: self.rings[ring].conns[usize::from(slot)].generation };
        if is_sending && let Some(place) = self.transfers.find_send(conn) {
            self.cancel(ring, user_data(Operation::Send, slot, place))?;
        }
        if is_polling {
            self.cancel(ring, user_data(Operation::Poll, slot, 0))?;
        }
        self.halting.insert(index, None);
        self.settle_halt(ring, slot);
        Ok(())
    }

    /// Say so when nothing is under way any more.
    pub(super) fn settle_halt(&mut self, ring: usize, slot: u16) {
        let index = self.place(ring, slot);
        if self.flags(ring, slot) & (POLLING | RECEIVING | SENDING | BORROWING) == 0
            && let Some(rest) = self.halting.remove(&index)
        {
            *self.flags_mut(ring, slot) |= AGAIN;
            let generation = self.rings[ring].conns[usize::from(slot)].generation;
            self.happened.push_back(Event::Halted { conn: ConnId { index, generation }, rest });
        }
    }

    /// Whether a send was cut short by `halt`: then its rest is kept for `Halted`.
    pub(super) fn sent_in_part(
        &mut self,
        place: u32,
        conn: ConnId,
        outcome: Result<u32, Errno>,
        buffers: &mut Buffers,
    ) -> bool {
        let Some(kept) = self.halting.get_mut(&conn.index) else { return false };
        let transfer = self.transfers.at(place);
        let Way::Out(before) = transfer.way else { return false };
        let taken = match outcome {
            Ok(count) => before + count as usize,
            Err(Errno::ECANCELED | Errno::EINTR | Errno::EAGAIN) => before,
            Err(_) => return false,
        };
        if taken == transfer.buf.len() {
            return false;
        }
        let mut buf = self.transfers.take(place).buf;
        if taken > 0 {
            buffers.cut(&mut buf, taken);
        }
        *kept = Some(buf);
        true
    }

    /// Send and receive over ferries what can be; says whether that was anything.
    pub(super) fn cross(&mut self, outbox: &mut Outbox) -> Result<bool, CarrierError> {
        let before = self.happened.len();
        if self.ferries.is_empty() {
            return Ok(false);
        }
        self.send_cargo(&mut outbox.peeks)?;
        for place in 0..self.ferries.len() {
            if self.ferries.at(place).is_fetching() && !self.has_room_for_two() {
                continue;
            }
            match self.ferries.at(place).receive(&mut outbox.peeks) {
                None => {}
                Some(Err(lost)) => self.happened.push_back(lost),
                Some(Ok((message, sockets))) => {
                    let mut conns = [None; 2];
                    for (conn, socket) in conns.iter_mut().zip(sockets) {
                        *conn = self.take_in(&socket).ok();
                    }
                    let ferry = self.ferries.at(place).name;
                    self.happened.push_back(Event::Landed { ferry, conns, message });
                }
            }
        }
        Ok(self.happened.len() > before)
    }

    fn has_room_for_two(&self) -> bool {
        let free: u32 = self.rings.iter().map(|ring| ring.free.count()).sum();
        free >= 2 || self.capacity - self.counts.slots >= 2
    }

    /// A slot for a socket that has come; the descriptor goes.
    fn take_in(&mut self, socket: &OwnedFd) -> Result<ConnId, Errno> {
        sys::let_block(socket);
        let (ring, slot) = self.install(socket)?;
        let conn = self.begin(ring, slot);
        *self.flags_mut(ring, slot) |= PAUSED | AGAIN;
        Ok(conn)
    }

    /// Send what can be sent. A connection is lent a descriptor first; at RLIMIT_NOFILE that is asked for again.
    pub(super) fn send_cargo(&mut self, peeks: &mut Buffers) -> Result<(), CarrierError> {
        for number in 0..self.ferries.len() {
            let Some(cargo) = &mut self.ferries.at(number).cargo else { continue };
            let conns = cargo.conns;
            if conns.iter().flatten().any(|conn| self.open(*conn).is_none()) {
                let told = self.ferries.at(number).unload(peeks);
                self.happened.extend(told);
                continue;
            }
            for (side, conn) in conns.into_iter().enumerate() {
                let (Some(conn), Some(cargo)) = (conn, &mut self.ferries.at(number).cargo) else { continue };
                if cargo.lent[side].is_none() && !std::mem::replace(&mut cargo.asked[side], true) {
                    let (ring, slot) = self.locate(conn.index);
                    self.borrow(ring, slot, Purpose::Ship)?;
                }
            }
            let Some(cargo) = &self.ferries.at(number).cargo else { continue };
            let descriptors: Vec<RawFd> = cargo.lent.iter().flatten().map(AsRawFd::as_raw_fd).collect();
            if descriptors.len() < conns.iter().flatten().count() {
                continue;
            }
            let told = self.ferries.at(number).send(&descriptors, peeks);
            self.happened.extend(told);
        }
        Ok(())
    }

    /// The descriptor that a message waits for, or none.
    pub(super) fn lent(&mut self, conn: ConnId, socket: Option<OwnedFd>) {
        if let Some((cargo, place)) = self.ferries.cargo_with(conn) {
            cargo.asked[place] = socket.is_some();
            cargo.lent[place] = socket;
        }
    }
}
