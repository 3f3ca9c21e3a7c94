//! The two cores of the suite: a guest that connects and a host that listens, each with a few manners, and a watcher that
//! both keep, which holds everything that the carrier tells to the rules of the contract.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use fourtuple_engine::report::Report;
use fourtuple_engine::{
    Buf, Command, ConnId, Core, Errno, Event, Instant, ListenerId, Outbox, SourceChoice, Step, Transport,
};

/// How often an actor looks at what it shares with the other.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// What an actor saw.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) connected: u64,
    pub(crate) accepted: u64,
    pub(crate) closed: u64,
    pub(crate) finished: u64,
    pub(crate) listening: u64,
    pub(crate) failed: Vec<Errno>,
    pub(crate) connect_failed: Vec<(Step, Errno)>,
    pub(crate) listen_failed: Vec<Errno>,
    pub(crate) bytes: u64,
    pub(crate) wrong_bytes: u64,
    pub(crate) echoed_right: u64,
    pub(crate) stuck: u64,
    pub(crate) pauses: u64,
    pub(crate) most_while_paused: u64,
    pub(crate) most_buffers: usize,
    pub(crate) most_open: usize,
    pub(crate) highest_index: u32,
    pub(crate) naps: u32,
    /// Nanoseconds from the moment asked for to the moment of the timeout.
    pub(crate) earliest_wake: i64,
    pub(crate) latest_wake: i64,
    pub(crate) buffers_left: usize,
    /// Rules that the carrier broke.
    pub(crate) broken: Vec<String>,
}

pub(crate) type Shared<T> = Arc<Mutex<T>>;

/// Holds what a carrier tells to rules 1, 2, 3, 5 and 7.
#[derive(Default)]
pub(crate) struct Watch {
    pub(crate) tickets: HashSet<u32>,
    /// Open connections, and whether a send is outstanding.
    open: HashMap<(u32, u16), bool>,
    indexes: HashSet<u32>,
    pub(crate) tally: Shared<Tally>,
}

impl Watch {
    pub(crate) fn see(&mut self, event: &Event, outbox: &Outbox) {
        let mut tally = self.tally.lock().unwrap();
        tally.most_buffers = tally.most_buffers.max(outbox.buffers.in_use());
        let key = |conn: &ConnId| (conn.index, conn.generation);
        let broken = match event {
            Event::Connected { ticket, .. } | Event::ConnectFailed { ticket, .. } if !self.tickets.remove(ticket) => {
                Some("rule 1: answered twice, or never asked")
            }
            Event::Accepted { conn, .. } | Event::Connected { conn, .. } => {
                let fresh = self.indexes.insert(conn.index);
                self.open.insert(key(conn), false);
                tally.highest_index = tally.highest_index.max(conn.index);
                tally.most_open = tally.most_open.max(self.open.len());
                (!fresh).then_some("rule 2: index used by two connections")
            }
            Event::Closed { conn } => {
                tally.closed += 1;
                self.indexes.remove(&conn.index);
                self.open.remove(&key(conn)).is_none().then_some("rule 2: closed twice, or never open")
            }
            Event::Sent { conn } => match self.open.insert(key(conn), false) {
                Some(true) => None,
                _ => Some("rule 3: sent, but nothing was being sent"),
            },
            Event::Received { conn, .. }
            | Event::Finished { conn, .. }
            | Event::Failed { conn, .. }
            | Event::Disturbed { conn, .. } => {
                (!self.open.contains_key(&key(conn))).then_some("rule 7: an event for a connection that is not open")
            }
            _ => None,
        };
        match event {
            Event::Connected { .. } => tally.connected += 1,
            Event::Accepted { .. } => tally.accepted += 1,
            Event::ConnectFailed { step, error, .. } => tally.connect_failed.push((*step, *error)),
            Event::ListenFailed { error, .. } => tally.listen_failed.push(*error),
            Event::Listening { .. } => tally.listening += 1,
            Event::Finished { .. } => tally.finished += 1,
            Event::Failed { error, .. } => tally.failed.push(*error),
            Event::Received { buf, .. } => tally.bytes += buf.len() as u64,
            _ => {}
        }
        if let Some(rule) = broken {
            tally.broken.push(format!("{rule}: {event:?}"));
        }
    }

    pub(crate) fn send(&mut self, conn: ConnId, buf: Buf, outbox: &mut Outbox) {
        self.open.insert((conn.index, conn.generation), true);
        outbox.push(Command::Send { conn, buf });
    }

    pub(crate) fn is_sending(&self, conn: ConnId) -> bool {
        self.open.get(&(conn.index, conn.generation)) == Some(&true)
    }
}

/// The byte at a place of what a guest says, or a host floods with.
fn pattern(place: u64) -> u8 {
    (place ^ place >> 8 ^ place >> 16) as u8
}

fn pattern_at(place: u64, len: usize) -> Vec<u8> {
    (place..place + len as u64).map(pattern).collect()
}

// The guest.

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ending {
    /// Close after the echo.
    Fin,
    /// Close with RST after the echo.
    Abort,
    /// Wait for the host to end it.
    Theirs,
}

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) connections: u64,
    /// Attempts and connections at once.
    pub(crate) window: u64,
    pub(crate) one_by_one: bool,
    pub(crate) choice: SourceChoice,
    pub(crate) source: SocketAddr,
    pub(crate) nobody_there: bool,
    /// Bytes to say and to have echoed.
    pub(crate) say: u64,
    pub(crate) say_until_stuck: bool,
    /// Bytes to be told.
    pub(crate) expect: u64,
    pub(crate) slow_reader: bool,
    /// Close none before all attempts are answered and all echoes are back.
    pub(crate) hold: bool,
    pub(crate) ending: Ending,
    pub(crate) use_old_names: bool,
    pub(crate) cancel_after: Option<Duration>,
    /// Timeouts to ask for before the end.
    pub(crate) naps: u32,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan {
            connections: 1,
            window: 1000,
            one_by_one: false,
            choice: SourceChoice::Kernel,
            source: "127.0.0.1:0".parse().unwrap(),
            nobody_there: false,
            say: 0,
            say_until_stuck: false,
            expect: 0,
            slow_reader: false,
            hold: false,
            ending: Ending::Fin,
            use_old_names: false,
            cancel_after: None,
            naps: 0,
        }
    }
}

#[derive(Clone, Copy)]
struct Talk {
    said: u64,
    heard: u64,
    /// When it last got on.
    moved: Instant,
    /// Reads again at this moment.
    paused_until: Option<Instant>,
    heard_paused: u64,
    done: bool,
    closing: bool,
}

pub(crate) struct Guest {
    plan: Plan,
    report: Report,
    watch: Watch,
    host: Arc<OnceLock<SocketAddr>>,
    over: Arc<AtomicBool>,
    asked: u64,
    answered: u64,
    started: BTreeMap<u32, Instant>,
    talks: BTreeMap<(u32, u16), Talk>,
    old_names: Vec<ConnId>,
    next_look: Instant,
    ended: bool,
}

impl Guest {
    pub(crate) fn new(plan: Plan) -> Guest {
        Guest {
            plan,
            report: Report::new(),
            watch: Watch::default(),
            host: Arc::default(),
            over: Arc::default(),
            asked: 0,
            answered: 0,
            started: BTreeMap::new(),
            talks: BTreeMap::new(),
            old_names: Vec::new(),
            next_look: Instant(0),
            ended: false,
        }
    }

    pub(crate) fn tally(&self) -> Shared<Tally> {
        Arc::clone(&self.watch.tally)
    }

    /// Learn where the host listens, and tell it when all is over.
    pub(crate) fn meet(&mut self, host: &Host) {
        self.host = host.address();
        self.over = host.over();
    }

    fn tallied<T>(&self, change: impl FnOnce(&mut Tally) -> T) -> T {
        change(&mut self.watch.tally.lock().unwrap())
    }

    fn connect_more(&mut self, now: Instant, outbox: &mut Outbox) {
        let Some(mut destination) = self.host.get().copied() else { return };
        if self.plan.nobody_there {
            destination.set_port(1);
        }
        let window = if self.plan.one_by_one { 1 } else { self.plan.window };
        let busy = |guest: &Guest| {
            let held = if guest.plan.hold && guest.plan.one_by_one { 0 } else { guest.talks.len() as u64 };
            guest.asked - guest.answered + held
        };
        while self.asked < self.plan.connections && busy(self) < window {
            let ticket = self.asked as u32;
            self.asked += 1;
            self.watch.tickets.insert(ticket);
            self.started.insert(ticket, now);
            let (source, choice) = (self.plan.source, self.plan.choice);
            let transport = Transport::Stream;
            outbox.push(Command::Connect { ticket, transport, source, destination, choice, range: (1024, 65_535) });
        }
    }

    fn talk(&mut self, conn: ConnId, now: Instant, outbox: &mut Outbox) {
        let key = (conn.index, conn.generation);
        let Some(talk) = self.talks.get(&key).copied() else { return };
        if talk.closing || self.watch.is_sending(conn) {
            return;
        }
        let left = if self.plan.say_until_stuck { u64::MAX } else { self.plan.say - talk.said };
        if left > 0 {
            // Odd sizes, so that pieces and buffers do not fall together.
            let len = left.min(1531) as usize;
            if let Some(buf) = outbox.buffers.write(&pattern_at(talk.said, len)) {
                self.watch.send(conn, buf, outbox);
                self.talks.entry(key).and_modify(|talk| (talk.said, talk.moved) = (talk.said + len as u64, now));
            }
        }
    }

    fn hear(&mut self, conn: ConnId, buf: Buf, now: Instant, outbox: &mut Outbox) {
        let key = (conn.index, conn.generation);
        let bytes = outbox.buffers.bytes(&buf).to_vec();
        outbox.buffers.release(buf);
        let Some(talk) = self.talks.get_mut(&key) else { return };
        let right = pattern_at(talk.heard, bytes.len());
        let wrong = bytes.iter().zip(&right).filter(|(is, should)| is != should).count() as u64;
        talk.heard += bytes.len() as u64;
        if talk.paused_until.is_some() {
            talk.heard_paused += 1;
        }
        let paused = talk.heard_paused;
        if self.plan.slow_reader && talk.paused_until.is_none() {
            // Most often a hundredth of a millisecond only, or the test takes minutes.
            talk.paused_until = Some(now.after(Duration::from_micros(if talk.heard % 64 == 0 { 2000 } else { 10 })));
            talk.heard_paused = 0;
            outbox.push(Command::Pause { conn });
            self.tallied(|tally| tally.pauses += 1);
        }
        self.tallied(|tally| {
            tally.wrong_bytes += wrong;
            tally.most_while_paused = tally.most_while_paused.max(paused);
        });
        self.settle(conn, outbox);
    }

    /// Close what has done its part.
    fn settle(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let Plan { say, expect, hold, ending, connections, say_until_stuck, .. } = self.plan;
        let Some(talk) = self.talks.get_mut(&(conn.index, conn.generation)) else { return };
        if !talk.done && !say_until_stuck && talk.heard >= say.max(expect) && ending != Ending::Theirs {
            talk.done = true;
            if say > 0 && talk.heard == say {
                self.tallied(|tally| tally.echoed_right += u64::from(tally.wrong_bytes == 0));
            }
        }
        if !hold {
            self.close_done(conn, outbox);
        } else if self.answered == connections && self.talks.values().all(|talk| talk.done) {
            let all: Vec<_> = self.talks.keys().copied().collect();
            for (index, generation) in all {
                self.close_done(ConnId { index, generation }, outbox);
            }
        }
    }

    fn close_done(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let Some(talk) = self.talks.get_mut(&(conn.index, conn.generation)) else { return };
        if talk.done && !talk.closing {
            talk.closing = true;
            outbox.push(Command::Close { conn, abort: self.plan.ending == Ending::Abort });
        }
    }

    /// Everything that must not work on a connection that is gone.
    fn misuse_old_names(&mut self, outbox: &mut Outbox) {
        for conn in self.old_names.clone() {
            outbox.push(Command::Pause { conn });
            outbox.push(Command::Close { conn, abort: true });
            if let Some(buf) = outbox.buffers.write(b"for nobody") {
                outbox.push(Command::Send { conn, buf });
            }
        }
    }

    fn look(&mut self, now: Instant, outbox: &mut Outbox) {
        self.connect_more(now, outbox);
        let talking: Vec<_> = self.talks.iter().map(|(key, talk)| (*key, *talk)).collect();
        for ((index, generation), talk) in talking {
            let conn = ConnId { index, generation };
            if talk.paused_until.is_some_and(|until| until <= now) {
                self.talks.entry((index, generation)).and_modify(|talk| talk.paused_until = None);
                outbox.push(Command::Resume { conn });
            }
            let stuck = now.since(talk.moved) > Duration::from_millis(300);
            if self.plan.say_until_stuck && !talk.closing && stuck && self.watch.is_sending(conn) {
                self.tallied(|tally| tally.stuck += 1);
                self.talks.entry((index, generation)).and_modify(|talk| talk.done = true);
                self.close_done(conn, outbox);
            } else {
                self.talk(conn, now, outbox);
            }
        }
        if let Some(after) = self.plan.cancel_after {
            let late: Vec<u32> =
                self.started.iter().filter(|(_, at)| now.since(**at) > after).map(|(ticket, _)| *ticket).collect();
            for ticket in late {
                self.started.remove(&ticket);
                outbox.push(Command::CancelConnect { ticket });
            }
        }
        let naps_left = self.tallied(|tally| tally.naps) < self.plan.naps;
        if self.answered == self.plan.connections && self.talks.is_empty() && !naps_left && !self.ended {
            self.ended = true;
            self.tallied(|tally| tally.buffers_left = outbox.buffers.in_use());
            self.over.store(true, Ordering::Release);
        }
    }
}

impl Core for Guest {
    fn start(&mut self, now: Instant, outbox: &mut Outbox) {
        self.next_look = now;
        self.look(now, outbox);
    }

    fn handle(&mut self, event: Event, now: Instant, outbox: &mut Outbox) {
        self.watch.see(&event, outbox);
        match event {
            Event::Connected { ticket, conn } => {
                self.answered += 1;
                self.started.remove(&ticket);
                let talk = Talk {
                    said: 0,
                    heard: 0,
                    moved: now,
                    paused_until: None,
                    heard_paused: 0,
                    done: false,
                    closing: false,
                };
                self.talks.insert((conn.index, conn.generation), talk);
                self.talk(conn, now, outbox);
                self.settle(conn, outbox);
                if self.plan.use_old_names {
                    self.misuse_old_names(outbox);
                }
            }
            Event::ConnectFailed { ticket, .. } => {
                self.answered += 1;
                self.started.remove(&ticket);
                if let Some((index, generation)) = self.talks.keys().next().copied() {
                    self.settle(ConnId { index, generation }, outbox);
                }
            }
            Event::Received { conn, buf } => self.hear(conn, buf, now, outbox),
            Event::Sent { conn } => {
                self.talks.entry((conn.index, conn.generation)).and_modify(|talk| talk.moved = now);
                self.talk(conn, now, outbox);
            }
            Event::Finished { conn, .. } | Event::Failed { conn, .. } => {
                self.talks.entry((conn.index, conn.generation)).and_modify(|talk| talk.done = true);
                self.settle(conn, outbox);
            }
            Event::Closed { conn } => {
                self.talks.remove(&(conn.index, conn.generation));
                self.old_names.push(conn);
                self.old_names.truncate(8);
            }
            _ => {}
        }
        self.connect_more(now, outbox);
    }

    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        let late = now.0 as i64 - self.next_look.0 as i64;
        self.tallied(|tally| {
            tally.naps += 1;
            tally.earliest_wake = tally.earliest_wake.min(late);
            tally.latest_wake = tally.latest_wake.max(late);
        });
        self.look(now, outbox);
        // Different lengths, so that a carrier that rounds is seen.
        self.next_look = now.after(if self.plan.slow_reader { Duration::from_micros(50) } else { LOOK_EVERY });
    }

    fn poll_timeout(&self) -> Option<Instant> {
        Some(self.next_look)
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

// The host.

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Manner {
    Echo,
    /// Echo what was heard only after the guest's FIN.
    EchoAfterFin,
    /// Keep what came until the next timeout.
    EchoLater,
    /// Close every connection as soon as it says something (earlier, and connect() itself may see the end).
    HangUp {
        abort: bool,
    },
    /// Never read.
    Deaf,
    /// Say so many bytes.
    Flood(u64),
}

pub(crate) struct Host {
    manner: Manner,
    listen: SocketAddr,
    pub(crate) backlog: u32,
    pub(crate) accept: bool,
    pub(crate) listeners: u32,
    pub(crate) listen_twice: bool,
    /// Unlisten when so many were accepted.
    pub(crate) unlisten_after: Option<u64>,
    address: Arc<OnceLock<SocketAddr>>,
    over: Arc<AtomicBool>,
    report: Report,
    watch: Watch,
    /// What waits to be echoed, and how much was flooded, by connection.
    waiting: BTreeMap<(u32, u16), (Vec<Buf>, u64, bool)>,
    accepted: u64,
    listening: u32,
    next_look: Instant,
    ended: bool,
}

impl Host {
    pub(crate) fn new(manner: Manner, listen: SocketAddr) -> Host {
        Host {
            manner,
            listen,
            backlog: 1024,
            accept: true,
            listeners: 1,
            listen_twice: false,
            unlisten_after: None,
            address: Arc::default(),
            over: Arc::default(),
            report: Report::new(),
            watch: Watch::default(),
            waiting: BTreeMap::new(),
            accepted: 0,
            listening: 0,
            next_look: Instant(0),
            ended: false,
        }
    }

    pub(crate) fn tally(&self) -> Shared<Tally> {
        Arc::clone(&self.watch.tally)
    }

    pub(crate) fn address(&self) -> Arc<OnceLock<SocketAddr>> {
        Arc::clone(&self.address)
    }

    /// Set when the guest has ended.
    pub(crate) fn over(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.over)
    }

    fn listen(&mut self, outbox: &mut Outbox, listener: u32, local: SocketAddr) {
        let (backlog, accept) = (self.backlog, self.accept);
        outbox.push(Command::Listen { listener: ListenerId(listener), local, backlog, reuse_port: false, accept });
    }

    /// Echo, or flood on.
    fn go_on(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let Some((waiting, flooded, finished)) = self.waiting.get_mut(&(conn.index, conn.generation)) else { return };
        if self.watch.is_sending(conn) || (self.manner == Manner::EchoAfterFin && !*finished) {
            return;
        }
        if let Manner::Flood(bytes) = self.manner {
            let len = (bytes - *flooded).min(2048) as usize;
            if len > 0 {
                if let Some(buf) = outbox.buffers.write(&pattern_at(*flooded, len)) {
                    *flooded += len as u64;
                    self.watch.send(conn, buf, outbox);
                }
            } else if *finished {
                self.close(conn, false, outbox);
            }
        } else if !waiting.is_empty() {
            let buf = waiting.remove(0);
            if waiting.is_empty() {
                outbox.push(Command::Resume { conn });
            }
            self.watch.send(conn, buf, outbox);
        } else if *finished {
            self.close(conn, false, outbox);
        }
    }

    fn close(&mut self, conn: ConnId, abort: bool, outbox: &mut Outbox) {
        if let Some((waiting, ..)) = self.waiting.remove(&(conn.index, conn.generation)) {
            waiting.into_iter().for_each(|buf| outbox.buffers.release(buf));
            outbox.push(Command::Close { conn, abort });
        }
    }
}

impl Core for Host {
    fn start(&mut self, _: Instant, outbox: &mut Outbox) {
        for listener in 0..self.listeners {
            self.listen(outbox, listener, self.listen);
        }
    }

    fn handle(&mut self, event: Event, _: Instant, outbox: &mut Outbox) {
        self.watch.see(&event, outbox);
        match event {
            Event::Listening { local, .. } => {
                self.listening += 1;
                self.listen = local;
                if self.listen_twice && self.listening == 1 {
                    self.listen(outbox, 1, local);
                } else if self.listening == self.listeners {
                    // The last one, which lives in a slot if there are many.
                    self.address.get_or_init(|| local);
                }
            }
            Event::ListenFailed { .. } if self.listen_twice => {
                self.address.get_or_init(|| self.listen);
            }
            Event::Accepted { listener, conn, .. } => {
                self.accepted += 1;
                self.waiting.insert((conn.index, conn.generation), (Vec::new(), 0, false));
                if self.unlisten_after == Some(self.accepted) {
                    outbox.push(Command::Unlisten { listener });
                }
                match self.manner {
                    Manner::Deaf => outbox.push(Command::Pause { conn }),
                    _ => self.go_on(conn, outbox),
                }
            }
            Event::Received { conn, buf } if matches!(self.manner, Manner::HangUp { .. }) => {
                outbox.buffers.release(buf);
                self.close(conn, self.manner == Manner::HangUp { abort: true }, outbox);
            }
            Event::Received { conn, buf } => match self.waiting.get_mut(&(conn.index, conn.generation)) {
                Some((waiting, ..)) if self.manner != Manner::Deaf => {
                    waiting.push(buf);
                    // The FIN is behind the bytes: who waits for it must go on reading.
                    if self.manner != Manner::EchoAfterFin {
                        outbox.push(Command::Pause { conn });
                    }
                    if self.manner != Manner::EchoLater {
                        self.go_on(conn, outbox);
                    }
                }
                _ => outbox.buffers.release(buf),
            },
            Event::Sent { conn } => self.go_on(conn, outbox),
            Event::Finished { conn, .. } => {
                if let Some((.., finished)) = self.waiting.get_mut(&(conn.index, conn.generation)) {
                    *finished = true;
                }
                self.go_on(conn, outbox);
            }
            Event::Failed { conn, .. } => self.close(conn, true, outbox),
            _ => {}
        }
    }

    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        self.next_look = now.after(LOOK_EVERY);
        if self.manner == Manner::EchoLater {
            let all: Vec<_> = self.waiting.keys().copied().collect();
            all.into_iter().for_each(|(index, generation)| self.go_on(ConnId { index, generation }, outbox));
        }
        if !self.over.load(Ordering::Acquire) || self.ended {
            return;
        }
        let all: Vec<_> = self.waiting.keys().copied().collect();
        if self.manner == Manner::Deaf {
            for (index, generation) in all {
                self.close(ConnId { index, generation }, true, outbox);
            }
        }
        if self.watch.open.is_empty() {
            self.ended = true;
            self.watch.tally.lock().unwrap().buffers_left = outbox.buffers.in_use();
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        Some(self.next_look)
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
