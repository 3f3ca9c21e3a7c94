//! The echo core: listen, accept, send back what came. Bounded: reads from a slow peer are paused, never buffered.
//!
//! Decides when a connection is read, answered and closed. Knows no socket. What comes is sent back in the buffer that it
//! came in; while that is under way, what follows waits in a side entry that only such a connection has. States and
//! transitions are in LIFECYCLE.md.

use std::collections::VecDeque;
use std::net::SocketAddr;

use crate::buffers::Buf;
use crate::contract::{Command, ConnId, Core, Errno, Event, Instant, ListenerId, Order, Outbox, Step};
use crate::pages::Pages;
use crate::report::{Counter, Phase, Report};

/// What an echo core is to do.
#[derive(Clone, Debug)]
pub struct EchoConfig {
    /// Where to listen; many, if many are asked for.
    pub listen: Vec<SocketAddr>,
    /// As for listen(2).
    pub backlog: u32,
    /// SO_REUSEPORT on every listener (more than one worker on the same endpoints).
    pub reuse_port: bool,
    /// Accept no more than this many at once; 0 is no bound of its own.
    pub most_connections: u64,
    /// If false, listen and never accept: what the accept queue alone holds (catalogue D1).
    pub accept: bool,
}

/// Listens under way at once, closes under way when all ends, and unlistens per turn, whatever the configuration asks.
const BURST: u32 = 256;
/// Records looked at per turn when all connections are closed.
const SCAN: u32 = 4096;
/// A peer that leaves so many buffers unread is not read from until they are gone.
const PAUSE_AT: usize = 2;

/// One connection. A record of zeros is no connection.
#[derive(Clone, Copy, Default, Debug)]
struct Line {
    /// Side entry plus one; 0 is none.
    side: u32,
    generation: u16,
    flags: u8,
}

const _: () = assert!(size_of::<Line>() <= 8, "an idle connection costs 8 bytes here");

const OPEN: u8 = 1;
const SENDING: u8 = 2;
const PAUSED: u8 = 4;
const FINISHED: u8 = 8;
const CLOSING: u8 = 16;

impl Line {
    fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// Listens, accepts and echoes.
#[derive(Debug)]
pub struct EchoCore {
    config: EchoConfig,
    report: Report,
    lines: Pages<Line>,
    /// Buffers that wait for the one under way, for connections that have such.
    sides: Vec<VecDeque<Buf>>,
    free_sides: Vec<u32>,
    next_listener: u32,
    listens_under_way: u32,
    /// One bit per listener: it accepts now.
    listening: Vec<u64>,
    /// One bit per listener: it has served a connection.
    served: Vec<u64>,
    /// When closing: the next listener and the next connection to look at.
    closing: Option<(u32, u32)>,
    /// `Close` commands not answered yet.
    closes_under_way: u32,
    /// Connections that are gone again.
    ended: u64,
}

impl EchoCore {
    /// A core that has done nothing yet.
    pub fn new(config: EchoConfig) -> EchoCore {
        let words = config.listen.len().div_ceil(64);
        EchoCore {
            config,
            report: Report::new(),
            lines: Pages::new(),
            sides: Vec::new(),
            free_sides: Vec::new(),
            next_listener: 0,
            listens_under_way: 0,
            listening: vec![0; words],
            served: vec![0; words],
            closing: None,
            closes_under_way: 0,
            ended: 0,
        }
    }

    fn listen_some(&mut self, outbox: &mut Outbox) {
        while self.listens_under_way < BURST
            && self.closing.is_none()
            && let Some(&local) = self.config.listen.get(self.next_listener as usize)
        {
            outbox.push(Command::Listen {
                listener: ListenerId(self.next_listener),
                local,
                backlog: self.config.backlog,
                reuse_port: self.config.reuse_port,
                accept: self.config.accept,
            });
            self.next_listener += 1;
            self.listens_under_way += 1;
        }
    }

    fn listening(&mut self, listener: ListenerId, local: SocketAddr, outbox: &mut Outbox) {
        self.listens_under_way -= 1;
        if listener.0 == 0 {
            self.report.listening_at = Some(local);
        }
        if self.closing.is_some() {
            outbox.push(Command::Unlisten { listener });
            return;
        }
        set_bit(&mut self.listening, listener.0);
        self.report.add(Counter::Listening, 1);
        self.listen_some(outbox);
    }

    fn listen_failed(&mut self, step: Step, error: Errno, outbox: &mut Outbox) {
        self.listens_under_way -= 1;
        self.report.add(Counter::ListenFailed, 1);
        self.report.failed(step, error);
        self.report.stopped_by = Some((step, error));
        self.listen_some(outbox);
    }

    fn accepted(&mut self, listener: ListenerId, conn: ConnId, outbox: &mut Outbox) {
        let open = self.report.count(Counter::Open);
        self.report.add(Counter::Accepted, 1);
        self.report.opened();
        if set_bit(&mut self.served, listener.0) {
            self.report.listeners_served += 1;
        }
        self.lines.write(conn.index, Line { side: 0, generation: conn.generation, flags: OPEN });
        let full = self.config.most_connections != 0 && open >= self.config.most_connections;
        if full || self.closing.is_some() {
            self.report.add(Counter::ClosedByUs, 1);
            self.close(conn, true, outbox);
        }
    }

    fn received(&mut self, conn: ConnId, buf: Buf, outbox: &mut Outbox) {
        let Some(mut line) = self.open_line(conn) else { return outbox.buffers.release(buf) };
        self.report.add(Counter::BytesIn, buf.len() as u64);
        if buf.is_empty() {
            return outbox.buffers.release(buf);
        }
        if !line.has(SENDING) {
            line.flags |= SENDING;
            self.send(conn, buf, outbox);
        } else {
            if line.side == 0 {
                line.side = self.free_sides.pop().unwrap_or_else(|| {
                    self.sides.push(VecDeque::new());
                    self.sides.len() as u32
                });
            }
            let waiting = &mut self.sides[line.side as usize - 1];
            waiting.push_back(buf);
            if waiting.len() >= PAUSE_AT && !line.has(PAUSED) {
                line.flags |= PAUSED;
                self.report.add(Counter::Pauses, 1);
                outbox.push(Command::Pause { conn });
            }
        }
        self.lines.write(conn.index, line);
    }

    fn sent(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let Some(mut line) = self.open_line(conn) else { return };
        if line.side != 0
            && let Some(buf) = self.sides[line.side as usize - 1].pop_front()
        {
            return self.send(conn, buf, outbox);
        }
        line.flags &= !SENDING;
        if line.side != 0 {
            self.free_sides.push(line.side);
            line.side = 0;
        }
        if line.has(PAUSED) {
            line.flags &= !PAUSED;
            outbox.push(Command::Resume { conn });
        }
        self.lines.write(conn.index, line);
        if line.has(FINISHED) {
            self.close(conn, false, outbox);
        }
    }

    fn finished(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let Some(mut line) = self.open_line(conn) else { return };
        if line.has(FINISHED) {
            return;
        }
        self.report.add(Counter::ClosedByPeer, 1);
        line.flags |= FINISHED;
        self.lines.write(conn.index, line);
        if !line.has(SENDING) {
            self.close(conn, false, outbox);
        }
    }

    fn failed(&mut self, conn: ConnId, step: Step, error: Errno, outbox: &mut Outbox) {
        let Some(line) = self.open_line(conn) else { return };
        self.report.failed(step, error);
        if !line.has(FINISHED) {
            self.report.add(Counter::Broken, 1);
        }
        self.close(conn, true, outbox);
    }

    fn closed(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let line = self.lines.read(conn.index);
        if line.has(OPEN) && line.generation == conn.generation {
            self.drop_waiting(line, outbox);
            if line.has(CLOSING) {
                self.closes_under_way -= 1;
            }
            self.lines.write(conn.index, Line::default());
            self.report.less(Counter::Open);
            self.ended += 1;
        }
    }

    /// Stop listening and close everything, a bounded number per turn.
    fn close_some(&mut self, outbox: &mut Outbox) {
        let Some((mut listener, mut index)) = self.closing else { return };
        let mut burst = BURST;
        while burst > 0 && listener < self.next_listener {
            if clear_bit(&mut self.listening, listener) {
                outbox.push(Command::Unlisten { listener: ListenerId(listener) });
                self.report.less(Counter::Listening);
                burst -= 1;
            }
            listener += 1;
        }
        let mut scan = SCAN;
        index = self.lines.skip_untouched(index);
        while self.closes_under_way < BURST && scan > 0 && index < self.lines.end() {
            let line = self.lines.read(index);
            if line.has(OPEN) && !line.has(CLOSING) {
                if !line.has(FINISHED) {
                    self.report.add(Counter::ClosedByUs, 1);
                }
                self.close(ConnId { index, generation: line.generation }, false, outbox);
            }
            (index, scan) = (index + 1, scan - 1);
        }
        self.closing = Some((listener, index));
    }

    /// Whether a turn can do more of it now; else `Closed` comes first.
    fn can_close_more(&self) -> bool {
        self.closing.is_some_and(|(listener, _)| listener < self.next_listener || self.closes_under_way < BURST)
            && self.has_more_to_close()
    }

    fn has_more_to_close(&self) -> bool {
        self.closing.is_some_and(|(listener, index)| listener < self.next_listener || index < self.lines.end())
    }

    fn close(&mut self, conn: ConnId, abort: bool, outbox: &mut Outbox) {
        let mut line = self.lines.read(conn.index);
        self.drop_waiting(line, outbox);
        line.side = 0;
        line.flags |= CLOSING;
        self.closes_under_way += 1;
        self.lines.write(conn.index, line);
        outbox.push(Command::Close { conn, abort });
    }

    fn drop_waiting(&mut self, line: Line, outbox: &mut Outbox) {
        if line.side != 0 {
            for buf in self.sides[line.side as usize - 1].drain(..) {
                outbox.buffers.release(buf);
            }
            self.free_sides.push(line.side);
        }
    }

    fn send(&mut self, conn: ConnId, buf: Buf, outbox: &mut Outbox) {
        self.report.add(Counter::BytesOut, buf.len() as u64);
        outbox.push(Command::Send { conn, buf });
    }

    /// The record of a connection that is open and not being closed.
    fn open_line(&self, conn: ConnId) -> Option<Line> {
        let line = self.lines.read(conn.index);
        (line.has(OPEN) && !line.has(CLOSING) && line.generation == conn.generation).then_some(line)
    }

    fn settle(&mut self) {
        let listens_pending = self.listens_under_way > 0 || (self.next_listener as usize) < self.config.listen.len();
        self.report.phase = match self.closing {
            Some(_) if self.has_more_to_close() || self.listens_under_way > 0 => Phase::Closing,
            Some(_) if self.report.count(Counter::Open) > 0 => Phase::Closing,
            Some(_) => Phase::Done,
            None if listens_pending => Phase::Ramping,
            // Nothing accepts and nothing ever will: there is nothing to wait for.
            None if self.report.count(Counter::Listening) == 0 && self.report.count(Counter::Open) == 0 => Phase::Done,
            None => Phase::Holding,
        };
    }
}

impl Core for EchoCore {
    fn start(&mut self, _now: Instant, outbox: &mut Outbox) {
        self.listen_some(outbox);
        self.settle();
    }

    fn handle(&mut self, event: Event, _now: Instant, outbox: &mut Outbox) {
        match event {
            Event::Listening { listener, local } => self.listening(listener, local, outbox),
            Event::ListenFailed { step, error, .. } => self.listen_failed(step, error, outbox),
            Event::Accepted { listener, conn, .. } => self.accepted(listener, conn, outbox),
            Event::AcceptFailed { error, .. } => {
                self.report.add(Counter::AcceptFailed, 1);
                self.report.failed(Step::Accept, error);
            }
            Event::Received { conn, buf } => self.received(conn, buf, outbox),
            Event::Sent { conn } => self.sent(conn, outbox),
            Event::Finished { conn, .. } => self.finished(conn, outbox),
            Event::Failed { conn, step, error } => self.failed(conn, step, error, outbox),
            Event::Closed { conn } => self.closed(conn, outbox),
            Event::Ordered(Order::Close) if self.closing.is_none() => {
                self.closing = Some((0, 0));
                self.close_some(outbox);
            }
            // An echo core connects to nobody and accepts streams only; the other orders are not for it.
            Event::Ordered(_) | Event::Connected { .. } | Event::ConnectFailed { .. } | Event::Disturbed { .. } => {}
            // Answers to what an echo core does not ask.
            Event::Unlistened { .. }
            | Event::Halted { .. }
            | Event::Shipped { .. }
            | Event::Landed { .. }
            | Event::FerryLost { .. }
            | Event::Named { .. }
            | Event::Peeked { .. }
            | Event::HandedOff { .. }
            | Event::Roomy { .. }
            | Event::HungUp { .. }
            | Event::HandOffFailed { .. } => {}
        }
        self.settle();
    }

    fn handle_timeout(&mut self, _now: Instant, outbox: &mut Outbox) {
        self.close_some(outbox);
        self.settle();
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.can_close_more().then_some(Instant(0))
    }

    fn is_done(&self) -> bool {
        self.report.phase == Phase::Done
    }

    fn report(&self) -> &Report {
        &self.report
    }

    fn check_invariants(&self) -> Result<(), String> {
        let open = self.lines.iter().filter(|line| line.has(OPEN)).count() as u64;
        let sides = self.lines.iter().filter(|line| line.side != 0).count();
        let listening: u32 = self.listening.iter().map(|word| word.count_ones()).sum();
        let served: u32 = self.served.iter().map(|word| word.count_ones()).sum();
        let count = |counter| self.report.count(counter);
        let closing = self.lines.iter().filter(|line| line.has(CLOSING)).count() as u32;
        let rules = [
            ("closes under way are counted", closing == self.closes_under_way),
            ("open_now is the number of open records", count(Counter::Open) == open),
            ("accepted = open + ended", count(Counter::Accepted) == open + self.ended),
            ("a side entry belongs to one connection or is free", sides + self.free_sides.len() == self.sides.len()),
            (
                "only a connection that sends has buffers waiting",
                self.lines.iter().all(|l| l.side == 0 || l.has(SENDING)),
            ),
            ("listening_now is the number of bits", count(Counter::Listening) == u64::from(listening)),
            ("listeners_served is the number of bits", self.report.listeners_served == u64::from(served)),
            ("nothing goes out that did not come in", count(Counter::BytesOut) <= count(Counter::BytesIn)),
            ("listens come in bursts", self.listens_under_way <= BURST),
        ];
        rules.iter().find(|(_, holds)| !holds).map_or(Ok(()), |(rule, _)| Err(format!("echo: {rule}")))
    }
}

/// Set a bit; true if it was clear. A bit beyond the table is nobody's.
fn set_bit(bits: &mut [u64], at: u32) -> bool {
    let Some(word) = bits.get_mut(at as usize / 64) else { return false };
    let was = *word;
    *word |= 1 << (at % 64);
    *word != was
}

/// Clear a bit; true if it was set.
fn clear_bit(bits: &mut [u64], at: u32) -> bool {
    let word = &mut bits[at as usize / 64];
    let was = *word;
    *word &= !(1 << (at % 64));
    *word != was
}
