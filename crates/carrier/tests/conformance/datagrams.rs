//! Rule 8, on every carrier: a core that speaks in datagrams and notes all that it is told, and the peers that it speaks to.
//! In the simulator the network itself is the peer, an honest one.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant as Moment};

use fourtuple_carrier::sim::{Fault, Faults, Script, Sim};
use fourtuple_carrier::{CarrierKind, Worker};
use fourtuple_engine::report::Report;
use fourtuple_engine::{Command, ConnId, Core, Errno, Event, Instant, Outbox, SourceChoice, Step, Transport};

use crate::actors::{Shared, Tally, Watch};
use crate::pairs::settings;
use crate::sound;

/// An answer that has not come by then will not.
const ANSWER_WITHIN: Duration = Duration::from_millis(150);
const PATIENCE: Duration = Duration::from_secs(20);

/// What a caller does.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) destination: SocketAddr,
    pub(crate) source: SocketAddr,
    pub(crate) choice: SourceChoice,
    /// One after the other, all from the same source.
    pub(crate) flows: u32,
    /// Keep them all.
    pub(crate) hold: bool,
    /// Said on each, the next when something has come, or has not come in time.
    pub(crate) words: Vec<Vec<u8>>,
}

/// What was told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    /// In their order.
    pub(crate) heard: Vec<Vec<u8>>,
    pub(crate) disturbed: Vec<(Step, Errno)>,
    pub(crate) sent: u64,
}

/// The core.
pub(crate) struct Caller {
    call: Call,
    report: Report,
    watch: Watch,
    told: Shared<Told>,
    asked: u32,
    open: Vec<ConnId>,
    /// Which word comes next, and when at the latest.
    next: usize,
    due: Instant,
    closing: usize,
    ended: bool,
}

impl Caller {
    pub(crate) fn new(call: Call) -> Caller {
        Caller {
            call,
            report: Report::new(),
            watch: Watch::default(),
            told: Arc::default(),
            asked: 0,
            open: Vec::new(),
            next: 0,
            due: Instant(0),
            closing: 0,
            ended: false,
        }
    }

    fn connect(&mut self, outbox: &mut Outbox) {
        let Call { source, destination, choice, .. } = self.call;
        let (ticket, transport) = (self.asked, Transport::Datagram);
        self.asked += 1;
        self.watch.tickets.insert(ticket);
        outbox.push(Command::Connect { ticket, transport, source, destination, choice, range: (1024, 65_535) });
    }

    /// Say the next word on the newest flow, or end it.
    fn go_on(&mut self, now: Instant, outbox: &mut Outbox) {
        self.due = now.after(ANSWER_WITHIN);
        let Some(conn) = self.open.last().copied() else { return };
        if let Some(word) = self.call.words.get(self.next) {
            if !self.watch.is_sending(conn) {
                self.next += 1;
                let buf = outbox.buffers.write(word).expect("a buffer");
                self.watch.send(conn, buf, outbox);
            }
        } else if self.call.hold && self.asked < self.call.flows {
            self.connect(outbox);
        } else {
            while let Some(conn) = self.open.pop() {
                self.closing += 1;
                outbox.push(Command::Close { conn, abort: self.asked.is_multiple_of(2) });
            }
        }
    }

    fn after_one(&mut self, outbox: &mut Outbox) {
        if self.asked < self.call.flows {
            self.connect(outbox);
        } else {
            self.ended = true;
            self.watch.tally.lock().unwrap().buffers_left = outbox.buffers.in_use();
        }
    }
}

impl Core for Caller {
    fn start(&mut self, _: Instant, outbox: &mut Outbox) {
        self.connect(outbox);
    }

    fn handle(&mut self, event: Event, now: Instant, outbox: &mut Outbox) {
        self.watch.see(&event, outbox);
        match event {
            Event::Connected { conn, .. } => {
                self.open.push(conn);
                self.next = 0;
                self.go_on(now, outbox);
            }
            Event::ConnectFailed { .. } if !self.open.is_empty() => self.go_on(now, outbox),
            Event::ConnectFailed { .. } => self.after_one(outbox),
            Event::Received { buf, .. } => {
                self.told.lock().unwrap().heard.push(outbox.buffers.bytes(&buf).to_vec());
                outbox.buffers.release(buf);
                // Soon, not at once: others may be behind it.
                self.due = now.after(Duration::from_millis(20));
            }
            Event::Disturbed { step, error, .. } => self.told.lock().unwrap().disturbed.push((step, error)),
            Event::Sent { .. } => self.told.lock().unwrap().sent += 1,
            Event::Closed { .. } => {
                self.closing -= 1;
                if self.closing == 0 {
                    self.after_one(outbox);
                }
            }
            _ => {}
        }
    }

    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        self.go_on(now, outbox);
    }

    fn poll_timeout(&self) -> Option<Instant> {
        (!self.open.is_empty()).then_some(self.due)
    }

    fn is_done(&self) -> bool {
        self.ended
    }

    fn report(&self) -> &Report {
        &self.report
    }

    fn check_invariants(&self) -> Result<(), String> {
        Ok(())
    }
}

/// What answers a datagram.
pub(crate) type Answers = fn(&[u8]) -> Vec<Vec<u8>>;

/// A peer in a thread of its own, and where it is.
pub(crate) fn peer(answers: Answers) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok((count, from)) = socket.recv_from(&mut bytes) {
            for answer in answers(&bytes[..count]) {
                socket.send_to(&answer, from).unwrap();
            }
        }
    });
    at
}

/// Run the call on one of the kernel's carriers.
pub(crate) fn on_kernel(kind: CarrierKind, call: Call) -> (Tally, Told) {
    let caller = Caller::new(call);
    let (tally, told) = (Arc::clone(&caller.watch.tally), Arc::clone(&caller.told));
    let worker = Worker::start(kind, settings(), Box::new(caller)).unwrap();
    let started = Moment::now();
    while worker.is_running() {
        assert!(started.elapsed() < PATIENCE, "no end: {tally:?} {told:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    worker.join().unwrap();
    finish(&tally, &told)
}

/// Run it in the simulator, with this fault.
pub(crate) fn simulated(call: Call, fault: Option<Fault>) -> (Tally, Told) {
    let mut caller = Caller::new(call);
    let (tally, told) = (Arc::clone(&caller.watch.tally), Arc::clone(&caller.told));
    let script = Script { orders: Vec::new(), until: Instant(3_600_000_000_000), most_steps: 100_000, strict: false };
    let faults = fault.map_or(Faults::NONE, |fault| Faults::NONE.with(fault, 500));
    Sim::new(1, faults).run(&mut [&mut caller], &mut [], &script).unwrap();
    finish(&tally, &told)
}

fn finish(tally: &Shared<Tally>, told: &Shared<Told>) -> (Tally, Told) {
    let (tally, told) = (tally.lock().unwrap().clone(), told.lock().unwrap().clone());
    sound(&tally);
    assert_eq!((tally.finished, tally.failed.len()), (0, 0), "rule 8: no end and no failure");
    (tally, told)
}
