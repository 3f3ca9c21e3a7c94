//! One thread: one core on one carrier. Decides how the outside reaches it (orders in, numbers out, stop) and nothing of
//! what it does. Knows neither which core it runs nor how its carrier works.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use fourtuple_engine::report::{Phase, Report};
use fourtuple_engine::{Carrier, CarrierError, Core, Errno, Event, Instant, Order, Outbox, Until};

use crate::epoll::Epoll;
use crate::letterbox::Letterbox;
use crate::shelf::Shelf;
use crate::sys::Wake;
use crate::uring::Uring;

/// How stale a published number may be, and so how long a carrier may sleep.
pub(crate) const PUBLISH_EVERY: Duration = Duration::from_millis(50);

/// Which carrier a worker runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CarrierKind {
    /// io_uring with direct descriptors.
    Uring,
    /// epoll with plain descriptors.
    Epoll,
}

/// How large a carrier may become.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CarrierSettings {
    /// Most connections and listeners together.
    pub most_connections: u32,
    /// Workers of this process that share its descriptors. Means nothing to io_uring.
    pub workers: u32,
    /// Direct descriptors per ring; 0 is the soft RLIMIT_NOFILE, at most 32,768. Means nothing to epoll.
    pub slots_per_ring: u32,
    /// Bytes in each buffer.
    pub buffer_bytes: usize,
    /// Buffers in each chunk of the pool.
    pub buffers_per_chunk: u32,
    /// Most chunks in the pool. One is made, and its pages touched, only when all buffers of the others are in use.
    pub buffer_chunks: u32,
}

impl Default for CarrierSettings {
    fn default() -> CarrierSettings {
        CarrierSettings {
            most_connections: 1 << 20,
            workers: 1,
            slots_per_ring: 0,
            buffer_bytes: 2048,
            buffers_per_chunk: 64,
            buffer_chunks: 64,
        }
    }
}

/// What a carrier counts about itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CarrierReport {
    /// io_uring rings (epoll: 1 epoll descriptor).
    pub rings: u32,
    /// Direct descriptors that these rings have places for (epoll: places in the table).
    pub slots: u32,
    /// Places taken: connections, attempts, listeners, and accepts that wait with a place in hand.
    pub slots_in_use: u32,
    /// Calls of io_uring_enter and epoll_wait.
    pub enters: u64,
    /// Times that a receive was armed again because no buffer was free or the kernel ended it.
    pub receive_rearms: u64,
    /// Times that a completion queue overflowed (nothing is lost: the kernel keeps a list, and we flush it).
    pub cq_overflows: u64,
    /// Buffers held by the core or by sends under way.
    pub buffers_in_use: u64,
    /// Connections that the kernel had accepted and then closed for want of a descriptor.
    pub accept_lost: u64,
}

/// A worker's numbers at one moment.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// The core's.
    pub report: Report,
    /// The carrier's.
    pub carrier: CarrierReport,
}

/// Why a worker ended before its core was done or it was told to stop.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WorkerError {
    /// Its carrier could not go on.
    Carrier(CarrierError),
    /// A bug of ours, in its own words.
    Panicked(String),
}

/// What a worker shares with the outside, besides orders and numbers.
#[derive(Clone, Debug, Default)]
pub struct Doors {
    /// Descriptors laid ready for it.
    pub shelf: Shelf,
    /// Where what its core asks is put, and as whose; without one, nobody hears it.
    pub letterbox: Option<(u32, Arc<Letterbox>)>,
}

/// A running worker. Dropped without `join` it is told to stop and left to end by itself.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<(), WorkerError>>,
}

impl Worker {
    /// Start a thread, make the carrier in it, run `core` on it. An error of making the carrier comes back here. Nobody
    /// hears what the core asks.
    pub fn start(kind: CarrierKind, settings: CarrierSettings, core: Box<dyn Core>) -> Result<Worker, CarrierError> {
        Worker::start_with(kind, settings, core, Doors::default())
    }

    /// As `start`, with what it shares with the outside.
    pub fn start_with(
        kind: CarrierKind,
        settings: CarrierSettings,
        core: Box<dyn Core>,
        doors: Doors,
    ) -> Result<Worker, CarrierError> {
        let wake = Wake::new()?;
        let shared = Arc::new(Shared {
            orders: Mutex::default(),
            has_orders: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            published: Mutex::default(),
            wake,
            doors,
        });
        let (made, answer) = mpsc::channel();
        let inside = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("fourtuple-worker".into())
            .spawn(move || run(kind, settings, core, &inside, &made))
            .map_err(|error| CarrierError { what: "pthread_create", error: crate::sys::errno_of(&error) })?;
        match answer.recv() {
            Ok(Ok(())) => Ok(Worker { shared, thread }),
            Ok(Err(error)) => Err(error),
            // It ended without a word, which only a panic while the carrier was being made does.
            Err(mpsc::RecvError) => Err(CarrierError { what: "carrier", error: Errno::ECANCELED }),
        }
    }

    /// Hand an order to the core.
    pub fn order(&self, order: Order) {
        lock(&self.shared.orders).push(order);
        self.shared.has_orders.store(true, Ordering::Release);
        self.shared.wake.ring();
    }

    /// Where descriptors are laid that an order names.
    pub fn shelf(&self) -> &Shelf {
        &self.shared.doors.shelf
    }

    /// The newest numbers: at most 50 ms old while it runs, new at each change of phase, final once it has ended.
    pub fn published(&self) -> Published {
        lock(&self.shared.published).clone()
    }

    /// Whether the thread has not ended yet.
    pub fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Ask it to end soon, closing all connections, whatever its core has still to do.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.ring();
    }

    /// Wait for its end.
    pub fn join(self) -> Result<Published, WorkerError> {
        match self.thread.join() {
            Ok(Ok(())) => Ok(lock(&self.shared.published).clone()),
            Ok(Err(error)) => Err(error),
            Err(payload) => Err(WorkerError::Panicked(panic_text(payload.as_ref()))),
        }
    }
}

#[derive(Debug)]
struct Shared {
    orders: Mutex<Vec<Order>>,
    /// Spares a lock per turn.
    has_orders: AtomicBool,
    stop: AtomicBool,
    published: Mutex<Published>,
    wake: Wake,
    doors: Doors,
}

fn run(
    kind: CarrierKind,
    settings: CarrierSettings,
    mut core: Box<dyn Core>,
    shared: &Arc<Shared>,
    made: &mpsc::Sender<Result<(), CarrierError>>,
) -> Result<(), WorkerError> {
    let carrier_report = Rc::new(Cell::new(CarrierReport::default()));
    let carrier: Result<Box<dyn Carrier>, CarrierError> = match kind {
        CarrierKind::Uring => Uring::new(settings, &shared.wake, &shared.doors.shelf, &carrier_report)
            .map(|it| Box::new(it) as Box<dyn Carrier>),
        CarrierKind::Epoll => Epoll::new(settings, &shared.wake, &shared.doors.shelf, &carrier_report)
            .map(|it| Box::new(it) as Box<dyn Carrier>),
    };
    let answer = carrier.as_ref().map(|_| ()).map_err(Clone::clone);
    // The starter waits for this answer; were it gone, nobody would hold the worker and `stop` could not come either.
    if made.send(answer).is_err() {
        return Ok(());
    }
    let Ok(mut carrier) = carrier else { return Ok(()) };
    let mut outside = Outside { shared, carrier_report, next_publish: Instant(0), phase: core.report().phase };
    let ended = catch_unwind(AssertUnwindSafe(|| carrier.run(core.as_mut(), &mut outside)));
    outside.publish(core.as_ref());
    shared.doors.shelf.clear();
    match ended {
        Ok(result) => result.map_err(WorkerError::Carrier),
        Err(payload) => Err(WorkerError::Panicked(panic_text(payload.as_ref()))),
    }
}

/// The outside as the carrier's loop meets it.
struct Outside<'a> {
    shared: &'a Shared,
    carrier_report: Rc<Cell<CarrierReport>>,
    next_publish: Instant,
    /// As last published.
    phase: Phase,
}

impl Outside<'_> {
    fn publish(&self, core: &dyn Core) {
        let mut published = lock(&self.shared.published);
        published.report.clone_from(core.report());
        published.carrier = self.carrier_report.get();
    }
}

impl Until for Outside<'_> {
    fn turn(&mut self, core: &mut dyn Core, now: Instant, outbox: &mut Outbox) -> bool {
        if self.shared.has_orders.swap(false, Ordering::AcqRel) {
            let orders = std::mem::take(&mut *lock(&self.shared.orders));
            for order in orders {
                core.handle(Event::Ordered(order), now, outbox);
            }
        }
        let publishes = now >= self.next_publish;
        if outbox.questions.is_fresh() || publishes && outbox.questions.is_waiting() {
            match &self.shared.doors.letterbox {
                Some((worker, letterbox)) => letterbox.put(*worker, &mut outbox.questions),
                None => outbox.questions.drain(Some),
            }
        }
        // A change of phase is what others wait for, and rare.
        let phase = core.report().phase;
        if publishes || phase != self.phase {
            self.publish(core);
            self.phase = phase;
            self.next_publish = now.after(PUBLISH_EVERY);
        }
        !self.shared.stop.load(Ordering::Acquire)
    }
}

/// A panic elsewhere does not make plain numbers wrong.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    payload
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "a panic without words".to_owned())
}
