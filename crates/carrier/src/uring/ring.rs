//! One io_uring: its direct-descriptor table and who may use which slot, and the packing of an operation's name into
//! 64 bits.
//!
//! Decides nothing about connections. Knows that a slot is used by one of them at a time, and that memory named by an
//! entry outlives the operation.

use std::os::fd::{AsRawFd, RawFd};

use fourtuple_engine::{CarrierError, Errno};
use io_uring::types::CancelBuilder;
use io_uring::{IoUring, cqueue, squeue};

use crate::sys::errno_of;

/// Entries of a submission queue. Each costs 64 bytes of resident memory once used; a fuller queue only means one
/// io_uring_enter more.
const SUBMISSION_ENTRIES: u32 = 256;
/// Entries of a completion queue, 16 bytes each. More than these wait in a list of the kernel's (IORING_FEAT_NODROP).
const COMPLETION_ENTRIES: u32 = 2048;
/// Refused submissions in a row after which the kernel is taken to have no memory for us at all.
const MOST_REFUSALS: u32 = 10_000;

/// What a completion is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Operation {
    /// Nobody waits for it: cancellations, and the disconnect before an abortive close.
    Unheard,
    Connect,
    Accept,
    Poll,
    Receive,
    Send,
    Close,
    Unlisten,
    /// A descriptor for a moment, to do what has no operation of its own; the detail says what.
    Borrow,
}

/// The name of an operation under way: what, on which slot, and 32 bits more (a ticket, a listener, a place among sends).
/// No generation: a slot is used again only when none of its operations is left.
pub(super) fn user_data(operation: Operation, slot: u16, detail: u32) -> u64 {
    (operation as u64) << 48 | u64::from(slot) << 32 | u64::from(detail)
}

/// One completion, unpacked.
#[derive(Clone, Copy)]
pub(super) struct Completion {
    pub(super) operation: Operation,
    pub(super) slot: u16,
    pub(super) detail: u32,
    pub(super) result: i32,
    pub(super) flags: u32,
}

impl Completion {
    fn unpack(entry: &cqueue::Entry) -> Completion {
        let name = entry.user_data();
        let operation = match name >> 48 {
            1 => Operation::Connect,
            2 => Operation::Accept,
            3 => Operation::Poll,
            4 => Operation::Receive,
            5 => Operation::Send,
            6 => Operation::Close,
            7 => Operation::Unlisten,
            8 => Operation::Borrow,
            _ => Operation::Unheard,
        };
        Completion {
            operation,
            slot: (name >> 32) as u16,
            detail: name as u32,
            result: entry.result(),
            flags: entry.flags(),
        }
    }

    /// The result, or the error that a negative one stands for.
    pub(super) fn outcome(&self) -> Result<u32, Errno> {
        if self.result < 0 { Err(Errno(-self.result)) } else { Ok(self.result as u32) }
    }

    /// Whether the operation goes on.
    pub(super) fn more(&self) -> bool {
        cqueue::more(self.flags)
    }
}

/// What we keep per slot.
#[derive(Clone, Copy, Default)]
pub(super) struct Conn {
    pub(super) generation: u16,
    pub(super) flags: u16,
}

const _: () = assert!(size_of::<Conn>() <= 4);

/// One io_uring and the slots of its table.
pub(super) struct Ring {
    uring: IoUring,
    /// Slots that nobody uses.
    pub(super) free: FreeSlots,
    /// By slot.
    pub(super) conns: Vec<Conn>,
    /// Listeners among the slots.
    pub(super) listeners: u32,
    /// Calls of io_uring_enter.
    pub(super) enters: u64,
}

impl Ring {
    /// A ring with `slots` direct descriptors.
    pub(super) fn new(slots: u32) -> Result<Ring, CarrierError> {
        let failed = |what| move |error: std::io::Error| CarrierError { what, error: errno_of(&error) };
        // COOP_TASKRUN, not DEFER_TASKRUN: with it any system call of this thread completes what is ready in all of its
        // rings; deferred work would cost an io_uring_enter for each of fifty rings.
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_submit_all()
            .setup_clamp()
            .setup_cqsize(COMPLETION_ENTRIES)
            .build(SUBMISSION_ENTRIES)
            .map_err(failed("io_uring_setup"))?;
        // io_sqe_files_register() compares with RLIMIT_NOFILE: EMFILE.
        uring.submitter().register_files_sparse(slots).map_err(failed("IORING_REGISTER_FILES2"))?;
        Ok(Ring {
            uring,
            free: FreeSlots::new(slots),
            conns: vec![Conn::default(); slots as usize],
            listeners: 0,
            enters: 0,
        })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }

    /// Put sockets into slots in a row from `first`. The ring then holds them; the descriptors may be closed.
    pub(super) fn install(&self, first: u16, sockets: &[RawFd]) -> Result<(), Errno> {
        self.uring
            .submitter()
            .register_files_update(u32::from(first), sockets)
            .map(drop)
            .map_err(|error| errno_of(&error))
    }

    /// Queue an operation. Memory that it names is the caller's to keep: until it completes, or, for an address, until
    /// `submit` has returned.
    pub(super) fn push(&mut self, entry: &squeue::Entry) -> Result<(), CarrierError> {
        if self.uring.submission().is_full() {
            self.submit()?;
        }
        // SAFETY: entries name memory that outlives them: buffers of the pool, which lives longer than its rings and is not
        // written to while a `Buf` is ours, addresses, which are submitted before they go, and those of `Accepts`, which
        // never move and outlive the rings.
        let pushed = unsafe { self.uring.submission().push(entry) };
        assert!(pushed.is_ok(), "submit() has emptied the queue");
        Ok(())
    }

    /// Hand every queued operation to the kernel.
    pub(super) fn submit(&mut self) -> Result<(), CarrierError> {
        let mut refusals = 0;
        while !self.uring.submission().is_empty() {
            self.enters += 1;
            match self.uring.submit() {
                Ok(count) if count > 0 => refusals = 0,
                // EAGAIN, ENOMEM: no memory for a request now. EBUSY: completions wait that must be taken first.
                Ok(_) | Err(_) if refusals < MOST_REFUSALS => {
                    refusals += 1;
                    std::thread::yield_now();
                }
                Ok(_) => return Err(CarrierError { what: "io_uring_enter", error: Errno::EAGAIN }),
                Err(error) => return Err(CarrierError { what: "io_uring_enter", error: errno_of(&error) }),
            }
        }
        Ok(())
    }

    pub(super) fn is_idle(&mut self) -> bool {
        self.uring.submission().is_empty()
    }

    /// Whether completions wait in the kernel's list because the queue was full.
    pub(super) fn overflowed(&mut self) -> bool {
        self.uring.submission().cq_overflow()
    }

    /// Have the kernel move its list into the queue (io_cqring_do_overflow_flush()), as far as there is room.
    pub(super) fn flush_overflow(&mut self) -> Result<(), CarrierError> {
        self.enters += 1;
        // The crate adds IORING_ENTER_GETEVENTS when the overflow flag is up.
        match self.uring.submit() {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                Err(CarrierError { what: "io_uring_enter", error: errno_of(&error) })
            }
            _ => Ok(()),
        }
    }

    /// Take at most `most` completions.
    pub(super) fn reap(&mut self, most: usize, into: &mut Vec<Completion>) {
        into.extend(self.uring.completion().take(most).map(|entry| Completion::unpack(&entry)));
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Closing a ring cancels in the background (io_ring_exit_work()); the sockets are to be gone, and the buffers
        // left alone, when this returns. Errors mean that there was nothing to cancel.
        let _ = self.uring.submitter().register_sync_cancel(None, CancelBuilder::any());
        let _ = self.uring.submitter().unregister_files();
    }
}

/// Which slots are free, lowest first, so that slots taken together lie together and are installed by one call.
pub(super) struct FreeSlots {
    /// A one for every free slot.
    words: Vec<u64>,
    count: u32,
    /// No free slot lies in a word before this one.
    from: usize,
}

impl FreeSlots {
    fn new(slots: u32) -> FreeSlots {
        let mut words = vec![u64::MAX; slots.div_ceil(64) as usize];
        if let (Some(last), rest @ 1..) = (words.last_mut(), slots % 64) {
            *last = (1 << rest) - 1;
        }
        FreeSlots { words, count: slots, from: 0 }
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    pub(super) fn take(&mut self) -> Option<u16> {
        if self.count == 0 {
            return None;
        }
        while self.words[self.from] == 0 {
            self.from += 1;
        }
        let word = &mut self.words[self.from];
        let bit = word.trailing_zeros();
        *word &= *word - 1;
        self.count -= 1;
        Some((self.from as u32 * 64 + bit) as u16)
    }

    /// Take at most `most` slots in a row from the lowest free one: the first, and how many. The caller knows that one is free.
    pub(super) fn take_row(&mut self, most: usize) -> (u16, usize) {
        let first = self.take().expect("a free slot");
        let mut count = 1;
        while count < most {
            let next = usize::from(first) + count;
            match self.words.get_mut(next / 64) {
                Some(word) if *word & 1 << (next % 64) != 0 => *word &= !(1 << (next % 64)),
                _ => break,
            }
            self.count -= 1;
            count += 1;
        }
        (first, count)
    }

    pub(super) fn give(&mut self, slot: u16) {
        let word = usize::from(slot) / 64;
        debug_assert!(self.words[word] & 1 << (slot % 64) == 0, "slot {slot} is free already");
        self.words[word] |= 1 << (slot % 64);
        self.count += 1;
        self.from = self.from.min(word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_slots_are_given_lowest_first_and_each_once() {
        for slots in [1, 63, 64, 65, 200] {
            let mut free = FreeSlots::new(slots);
            let taken: Vec<u16> = std::iter::from_fn(|| free.take()).collect();
            assert_eq!(taken, (0..slots as u16).collect::<Vec<_>>());
            assert_eq!(free.count(), 0);
            free.give(0);
            assert_eq!(free.take(), Some(0));
        }
    }

    #[test]
    fn a_row_ends_at_the_first_slot_in_use() {
        let mut free = FreeSlots::new(130);
        assert_eq!(free.take_row(100), (0, 100));
        assert_eq!(free.take_row(100), (100, 30));
        for slot in [3, 62, 63, 64, 65, 129] {
            free.give(slot);
        }
        assert_eq!(free.take_row(64), (3, 1));
        assert_eq!(free.take_row(64), (62, 4));
        assert_eq!(free.take_row(64), (129, 1));
        assert_eq!(free.count(), 0);
    }

    #[test]
    fn names_survive_the_packing() {
        for operation in [
            Operation::Unheard,
            Operation::Connect,
            Operation::Accept,
            Operation::Poll,
            Operation::Receive,
            Operation::Send,
            Operation::Close,
            Operation::Unlisten,
            Operation::Borrow,
        ] {
            let name = user_data(operation, 0xabcd, 0x1234_5678);
            assert_eq!(name >> 48, operation as u64);
            assert_eq!((name >> 32) as u16, 0xabcd);
            assert_eq!(name as u32, 0x1234_5678);
        }
    }
}
