//! What has no operation on a direct descriptor (yet, or not without a thread of the kernel's): names, FIN, handing off. For
//! these a plain descriptor of the same socket is made (IORING_OP_FIXED_FD_INSTALL, since 6.8), used, and closed at once, so
//! that RLIMIT_NOFILE bounds none of it. IORING_OP_SHUTDOWN always runs in a worker thread (io_shutdown_prep() sets
//! REQ_F_FORCE_ASYNC), which costs more than the three calls here; it serves where no descriptor is to be had.
//!
//! Decides nothing about connections; knows that a slot is not free while one of these is under way.

use std::collections::hash_map::Entry;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use fourtuple_engine::{CarrierError, ConnId, Core, Errno, Event, Instant, Outbox};
use io_uring::opcode;
use io_uring::types::Fixed;

use super::ring::{Completion, Operation, user_data};
use super::{AGAIN, BORROWING, CLOSING, ENDED, Machine, PEEKING, SENDER};
use crate::sys;

/// What a descriptor is for.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Purpose {
    Name,
    Shutdown,
    HandOff,
    Ship,
}

/// How long there is between two tries to name connections while there is no descriptor, how many a connection has, and
/// for how many connections it is tried at a time: nothing but a name waits for it, and a flood of them must not be the
/// ring's whole work.
const NAME_PAUSE: Duration = Duration::from_millis(100);
const NAME_TRIES: u32 = 50;
const NAMED_AT_ONCE: usize = 1024;
const NAME: u32 = Purpose::Name as u32;
const SHUTDOWN: u32 = Purpose::Shutdown as u32;
const HAND_OFF: u32 = Purpose::HandOff as u32;
const SHIP: u32 = Purpose::Ship as u32;

impl Machine {
    /// Ask for a descriptor.
    pub(super) fn borrow(&mut self, ring: usize, slot: u16, purpose: Purpose) -> Result<(), CarrierError> {
        self.hold(ring, slot);
        let entry = opcode::FixedFdInstall::new(Fixed(u32::from(slot)), 0).build();
        self.rings[ring].push(&entry.user_data(user_data(Operation::Borrow, slot, purpose as u32)))
    }

    /// The slot is not free before as many `let_go` as `hold`.
    pub(super) fn hold(&mut self, ring: usize, slot: u16) {
        *self.flags_mut(ring, slot) |= BORROWING;
        *self.borrowing.entry(self.place(ring, slot)).or_default() += 1;
    }

    pub(super) fn let_go(&mut self, ring: usize, slot: u16) {
        if let Entry::Occupied(mut count) = self.borrowing.entry(self.place(ring, slot)) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
                *self.flags_mut(ring, slot) &= !BORROWING;
            }
        }
    }

    pub(super) fn borrowed(
        &mut self,
        ring: usize,
        completion: &Completion,
        core: &mut dyn Core,
        now: Instant,
        outbox: &mut Outbox,
    ) -> Result<(), CarrierError> {
        let slot = completion.slot;
        let index = self.place(ring, slot);
        self.let_go(ring, slot);
        let entry = &self.rings[ring].conns[usize::from(slot)];
        let conn = ConnId { index, generation: entry.generation };
        let is_closing = entry.flags & CLOSING != 0;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        let socket = completion.outcome().map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
        let fd = socket.as_ref().map(std::os::fd::AsRawFd::as_raw_fd).map_err(|error| *error);
        match completion.detail {
            NAME => {
                let tries = self.tried.remove(&index).unwrap_or(0) + 1;
                match fd {
                    _ if is_closing => {}
                    Err(error) if is_passing(error) && tries < NAME_TRIES => self.name_later(conn, tries, now),
                    fd => core.handle(Event::Named { conn, names: fd.ok().and_then(sys::names) }, now, outbox),
                }
            }
            SHUTDOWN => match fd {
                Ok(fd) => sys::shutdown(fd),
                Err(_) => {
                    let entry = opcode::Shutdown::new(Fixed(u32::from(slot)), libc::SHUT_WR).build();
                    self.rings[ring].push(&entry.user_data(user_data(Operation::Unheard, slot, 0)))?;
                }
            },
            HAND_OFF => {
                let Some((path, note)) = self.notes.remove(&index) else { return Ok(()) };
                let buffers = &mut outbox.buffers;
                let outcome = fd.and_then(|fd| match is_closing {
                    true => Ok(()),
                    false => {
                        let (path, note) = (buffers.bytes(&path), buffers.bytes(&note));
                        self.messenger.hand_off(conn, fd, (path, note), now, (&self.poller, SENDER))
                    }
                });
                [path, note].into_iter().for_each(|buf| buffers.release(buf));
                match outcome {
                    _ if is_closing => {}
                    Ok(()) => {
                        *self.flags_mut(ring, slot) |= ENDED;
                        core.handle(Event::HandedOff { conn }, now, outbox);
                    }
                    Err(error) => core.handle(Event::HandOffFailed { conn, error }, now, outbox),
                }
            }
            SHIP if !is_closing => self.lent(conn, socket.ok()),
            _ => {}
        }
        Ok(())
    }

    /// Its names are asked for once more: a client without an address would be treated as nobody's.
    fn name_later(&mut self, conn: ConnId, tries: u32, now: Instant) {
        if self.nameless.is_empty() {
            self.name_at = now.after(NAME_PAUSE);
        }
        self.nameless.push_back((conn, tries));
    }

    /// Ask for names that could not be had: whose turn it is, and who is still there.
    pub(super) fn name_again(&mut self, now: Instant) -> Result<(), CarrierError> {
        if self.nameless.is_empty() || now < self.name_at {
            return Ok(());
        }
        self.name_at = now.after(NAME_PAUSE);
        let mut left = NAMED_AT_ONCE;
        while left > 0
            && let Some((conn, tries)) = self.nameless.pop_front()
        {
            if let Some((ring, slot)) = self.open(conn) {
                self.tried.insert(conn.index, tries);
                self.borrow(ring, slot, Purpose::Name)?;
                left -= 1;
            }
        }
        Ok(())
    }

    /// Show from now on, or take; beginning with what is there.
    pub(super) fn set_peeking(&mut self, conn: ConnId, peeking: bool, outbox: &mut Outbox) -> Result<(), CarrierError> {
        let Some((ring, slot)) = self.open(conn) else { return Ok(()) };
        let flags = self.flags_mut(ring, slot);
        *flags = if peeking { *flags | PEEKING | AGAIN } else { *flags & !PEEKING | AGAIN };
        self.receive(ring, slot, outbox)
    }
}

fn is_passing(error: Errno) -> bool {
    matches!(error, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
}
