//! The two ends of the conversations that the broker's worlds are made of, and the guide between them.
//!
//! A talker names a service in its first line and how many bytes it will say and wants to hear; a replier checks every byte
//! and says as many. In half of the talks the replier waits for the talker's end of stream, which so must come through
//! while the other direction is still open.
//!
//! Before its line a talker may ask `?`, which the broker answers with `!` in the service's name and then has to ask the
//! service, too, as with PostgreSQL's TLS; or name its service in a line of its own and wait for `+`, as with tcpmux. Where
//! the broker trusts, all of it stands behind a line that says who it is.
//!
//! In some worlds nobody says anything before it is greeted: the broker greets in the service's name, and then has to hear
//! the service's own greeting. In some, each talk sends the broker on errands to other services first.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use fourtuple_engine::broker::guide::{
    Address, Asleep, Chosen, Delivery, Errand, Guidance, Guide, Heard, Shown, Turn, Why, Word,
};
use fourtuple_engine::broker::ledger::{Ended, Ledger, Reason};
use fourtuple_engine::report::{Counter, Phase, Report};
use fourtuple_engine::{Command, ConnId, Core, Event, Instant, ListenerId, Order, Outbox, SourceChoice, Transport};

/// The byte at a place of what is said.
fn pattern(place: u64) -> u8 {
    (place.wrapping_mul(31) ^ (place >> 8)) as u8
}

/// What is said first in a world where somebody has to.
const GREETING: &[u8] = b"**************************************************\n";
/// The expectation of it.
const GREETED: u8 = 1;
const ERRAND: &[u8] = b"x\n";

// ---- the guide and the ledger ---------------------------------------------------------------------------------------

/// A service as the guide knows it.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) delivery: Delivery,
    pub(crate) at: SocketAddr,
    /// By its TCP endpoint, not by its path.
    pub(crate) tcp: bool,
    /// It has to be started first.
    pub(crate) sleeps: bool,
}

impl Service {
    fn address(&self) -> Address {
        match self.tcp {
            true => Address::Tcp(self.at),
            false => Address::Unix(self.at.to_string().into_bytes()),
        }
    }
}

/// Reads "s<number> ", up to the end of the line, and what may stand in front of it.
pub(crate) struct FirstLine {
    pub(crate) services: Vec<Service>,
    /// Of the silent.
    pub(crate) default: Option<usize>,
    /// The listener whose peers say for whom they speak, if there is one.
    pub(crate) trusting: Option<ListenerId>,
    /// Everybody is greeted.
    pub(crate) greets: bool,
    /// Before each delivery there is something to be said to all services that are relayed to.
    pub(crate) errands: bool,
}

/// What a guide has read of a talk.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Read {
    /// Where the line begins, or what is asked.
    start: usize,
    source: Option<SocketAddr>,
    greeted: bool,
    asked: bool,
    /// A probe of a sleeper was told the first half.
    answered: bool,
    /// What a client is told that waited in vain.
    word: bool,
}

/// What a client is told then.
const WORD: &[u8] = b"\xff";

/// Whoever is source `number` of a proxy.
fn source(number: u8) -> SocketAddr {
    SocketAddr::new([10, 9, 0, number].into(), 1)
}

impl Guide for FirstLine {
    type Memory = Read;

    fn trusts(&self, listener: ListenerId, _: SocketAddr) -> bool {
        self.trusting == Some(listener)
    }

    fn speaks_first(&self, _: ListenerId) -> bool {
        self.greets
    }

    fn hears(&self, expect: u8, said: &[u8]) -> Heard {
        match expect {
            GREETED if said == GREETING => Heard::Yes,
            GREETED if GREETING.starts_with(said) => Heard::More,
            GREETED => Heard::No,
            _ => Heard::of_byte(expect, said),
        }
    }

    fn guide(&mut self, shown: &Shown<'_>, read: &mut Read, chosen: &mut Chosen) -> Guidance {
        if self.trusting == Some(shown.listener) && read.source.is_none() {
            return match shown.bytes {
                [b'p', number, b'\n', ..] => {
                    read.source = Some(source(*number));
                    Guidance::Speaks { names: Some((source(*number), source(0))), header: 3 }
                }
                [] | [b'p'] | [b'p', _] if !shown.last => Guidance::More,
                _ => Guidance::Unproxied,
            };
        }
        assert!(read.source.is_none_or(|it| shown.names == Some((it, source(0)))), "{shown:?} is another's");
        if self.greets && !read.greeted {
            read.greeted = true;
            chosen.told = GREETING.to_vec();
            return Guidance::Tell;
        }
        let mut skip = read.start;
        let name = match &shown.bytes[read.start..] {
            [] if shown.last && !read.asked => match self.default {
                Some(default) => default,
                None => return Guidance::NoRoute,
            },
            [] => return Guidance::More,
            [b'?'] if !read.asked => {
                (read.asked, read.start) = (true, read.start + 1);
                return Guidance::Answer(b"!");
            }
            [b's', rest @ ..] => match rest.iter().position(|&byte| byte == b' ') {
                Some(end) => std::str::from_utf8(&rest[..end]).unwrap().parse().unwrap(),
                None => return Guidance::More,
            },
            [b'@', rest @ ..] if !read.asked => match rest.iter().position(|&byte| byte == b'\n') {
                Some(end) => {
                    skip += end + 2;
                    chosen.reply = b"+";
                    std::str::from_utf8(&rest[..end]).unwrap().parse().unwrap()
                }
                None => return Guidance::More,
            },
            _ => return Guidance::Garbage,
        };
        let Some(service) = self.services.get(name) else { return Guidance::NoRoute };
        chosen.skip = skip as u32;
        if service.sleeps {
            chosen.start = Word::new("t");
        }
        read.word = name % 2 == 0;
        if self.greets && service.delivery == Delivery::Relay {
            chosen.script.push(Turn { say: b"".into(), expect: Some(GREETED) });
        }
        if self.errands {
            let relayed = self.services.iter().filter(|other| other.delivery == Delivery::Relay);
            let errand = |other: &Service| Errand { address: other.address(), say: ERRAND.to_vec() };
            chosen.errands = relayed.map(errand).collect();
        }
        if read.asked && service.delivery == Delivery::Relay {
            chosen.script.push(Turn { say: b"?".into(), expect: Some(b'!') });
        }
        chosen.service = format!("s{name}");
        chosen.matched = format!("line of s{name}");
        chosen.delivery = service.delivery;
        chosen.address = service.address();
        Guidance::Found
    }

    fn asleep(&mut self, shown: &Shown<'_>, read: &mut Read, _: &Chosen, say: &mut Vec<u8>) -> Asleep {
        match probed(shown.bytes.get(read.start..).unwrap_or_default()) {
            None => Asleep::Wake,
            Some(Err(())) => Asleep::More,
            // Half of them in two parts: what is unread is shown again, so the second comes with the last look at the latest.
            Some(Ok(hear)) => {
                let half = if read.answered { hear / 2 } else { 0 };
                let is_half = hear % 2 == 0 && hear > 2 && !read.answered && !shown.last;
                say.extend((half..if is_half { hear / 2 } else { hear }).map(pattern));
                read.answered = true;
                if is_half { Asleep::Say } else { Asleep::Farewell }
            }
        }
    }

    fn farewell(&mut self, read: &Read, _: &Chosen, _: Why, say: &mut Vec<u8>) {
        if read.word {
            say.extend(WORD);
        }
    }
}

/// How many bytes a probe wants to hear whose line is "s<number> p 0 <hear>"; None if it is none, or the line is not whole.
fn probed(line: &[u8]) -> Option<Result<u64, ()>> {
    let mut words = line.split(|&byte| byte == b' ');
    words.next()?;
    match words.next()? {
        b"p" => {}
        b"" => return Some(Err(())),
        _ => return None,
    }
    let Some(end) = line.iter().position(|&byte| byte == b'\n') else { return Some(Err(())) };
    let hear = std::str::from_utf8(&line[..end]).ok()?.rsplit(' ').next()?.parse().ok()?;
    Some(Ok(hear))
}

/// Keeps every entry.
#[derive(Default)]
pub(crate) struct Kept(pub(crate) Vec<(Reason, String, u64, u64)>);

impl Ledger for Kept {
    fn ended(&mut self, entry: &Ended<'_>) {
        self.0.push((entry.reason, entry.service.to_owned(), entry.bytes_up, entry.bytes_down));
    }
}

// ---- the talker -----------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Manner {
    /// Says its line, its bytes and its end, and hears the answer.
    Whole,
    /// The same, the line in single bytes.
    Slow,
    /// Says nothing.
    Silent,
    /// Says what is no line.
    Garbage,
    /// Says "s" and nothing more.
    Stuck,
    /// Never ends a line that is too long.
    Long,
}

/// What a talker does before it says its line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Opening {
    /// Nothing.
    None,
    /// Asks, and waits for the answer.
    Asks,
    /// Names its service, and waits until it is there.
    Names,
}

#[derive(Clone, Debug)]
pub(crate) struct Talk {
    pub(crate) manner: Manner,
    pub(crate) opening: Opening,
    /// The number of the source that is put in front.
    pub(crate) proxied: Option<u8>,
    pub(crate) service: usize,
    pub(crate) say: u64,
    pub(crate) hear: u64,
    /// The replier answers before it has heard the end.
    pub(crate) early: bool,
    /// It says nothing but its line, and a sleeper need not be woken for it.
    pub(crate) probe: bool,
    pub(crate) at: SocketAddr,
}

/// How a talk ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// Every byte heard, and the end.
    Right,
    /// It broke, or was refused.
    Broken,
}

#[derive(Default)]
struct Speaking {
    talk: usize,
    said: u64,
    heard: u64,
    line: Vec<u8>,
    line_said: usize,
    /// What is waited for when the line is said, and the line after that; the next last.
    then: Vec<(Vec<u8>, Vec<u8>)>,
    sending: bool,
    shut: bool,
    closing: bool,
    /// It was told that its service does not come.
    told: bool,
}

impl Talk {
    fn line(&self) -> String {
        let mode = match (self.probe, self.early) {
            (true, _) => 'p',
            (false, true) => 'e',
            (false, false) => 'l',
        };
        let asked = if self.opening == Opening::Asks { " ?" } else { "" };
        match self.manner {
            Manner::Whole | Manner::Slow => {
                format!("s{} {mode} {} {}{asked}\n", self.service, self.say, self.hear)
            }
            Manner::Silent => String::new(),
            Manner::Garbage => "GARBAGE".to_owned(),
            Manner::Stuck => "s".to_owned(),
            Manner::Long => format!("s{}", "9".repeat(10_000)),
        }
    }

    fn begin(&self, greeted: bool) -> Speaking {
        let line = self.line().into_bytes();
        let (first, mut then) = match self.opening {
            Opening::None => (line, Vec::new()),
            Opening::Asks => (b"?".to_vec(), vec![(b"!".to_vec(), line)]),
            Opening::Names => (format!("@{}\n", self.service).into_bytes(), vec![(b"+".to_vec(), line)]),
        };
        let header = self.proxied.map_or_else(Vec::new, |number| vec![b'p', number, b'\n']);
        if greeted {
            then.push((GREETING.to_vec(), first));
            return Speaking { line: header, then, ..Speaking::default() };
        }
        Speaking { line: [header, first].concat(), then, ..Speaking::default() }
    }
}

pub(crate) struct Talker {
    talks: Vec<Talk>,
    /// Waits to be greeted.
    greeted: bool,
    window: usize,
    until: Instant,
    next: usize,
    under_way: usize,
    started: BTreeMap<u32, Instant>,
    speaking: BTreeMap<u32, (ConnId, Speaking)>,
    report: Report,
    closed: bool,
    retry: Vec<ConnId>,
    retry_at: Instant,
    /// By talk: how and when it ended, from the connect on.
    pub(crate) outcomes: BTreeMap<usize, (Outcome, Duration)>,
    pub(crate) wrong: Option<String>,
}

impl Talker {
    pub(crate) fn new(talks: Vec<Talk>, greeted: bool, window: usize, until: Instant) -> Talker {
        Talker {
            talks,
            greeted,
            window,
            until,
            next: 0,
            under_way: 0,
            started: BTreeMap::new(),
            speaking: BTreeMap::new(),
            report: Report::new(),
            closed: false,
            retry: Vec::new(),
            retry_at: Instant(0),
            outcomes: BTreeMap::new(),
            wrong: None,
        }
    }

    fn go_on(&mut self, now: Instant, outbox: &mut Outbox) {
        while !self.closed && self.next < self.talks.len() && self.under_way < self.window {
            let destination = self.talks[self.next].at;
            let source = SocketAddr::new([0, 0, 0, 0].into(), 0);
            let (ticket, choice, range) = (self.next as u32, SourceChoice::Kernel, (0, 0));
            let transport = Transport::Stream;
            outbox.push(Command::Connect { ticket, transport, source, destination, choice, range });
            self.report.add(Counter::Attempted, 1);
            self.started.insert(ticket, now);
            self.next += 1;
            self.under_way += 1;
        }
        let over = self.next == self.talks.len() || self.closed;
        self.report.phase = if over && self.under_way == 0 { Phase::Done } else { Phase::Holding };
    }

    fn speak(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let Some((_, it)) = self.speaking.get_mut(&conn.index) else { return };
        let talk = &self.talks[it.talk];
        if it.shut || it.closing || it.sending {
            return;
        }
        let most = outbox.buffers.buffer_bytes();
        let bytes: Vec<u8> = if it.line_said < it.line.len() {
            let most = if talk.manner == Manner::Slow { 1 } else { most };
            it.line[it.line_said..].iter().take(most).copied().collect()
        } else if !it.then.is_empty() {
            return;
        } else if !matches!(talk.manner, Manner::Whole | Manner::Slow) {
            Vec::new()
        } else {
            (it.said..talk.say.min(it.said + most as u64)).map(pattern).collect()
        };
        if bytes.is_empty() {
            if matches!(talk.manner, Manner::Whole | Manner::Slow) {
                it.shut = true;
                outbox.push(Command::Shutdown { conn });
            }
            return;
        }
        let Some(buf) = outbox.buffers.write(&bytes) else {
            self.retry.push(conn);
            return;
        };
        match it.line_said < it.line.len() {
            true => it.line_said += bytes.len(),
            false => it.said += bytes.len() as u64,
        }
        it.sending = true;
        outbox.push(Command::Send { conn, buf });
    }

    fn close(&mut self, conn: ConnId, outcome: Outcome, now: Instant, outbox: &mut Outbox) {
        let Some((_, it)) = self.speaking.get_mut(&conn.index) else { return };
        if !it.closing {
            it.closing = true;
            let started = self.started[&(it.talk as u32)];
            self.outcomes.insert(it.talk, (outcome, now.since(started)));
            outbox.push(Command::Close { conn, abort: outcome == Outcome::Broken });
        }
    }
}

impl Core for Talker {
    fn start(&mut self, now: Instant, outbox: &mut Outbox) {
        self.go_on(now, outbox);
    }

    fn handle(&mut self, event: Event, now: Instant, outbox: &mut Outbox) {
        self.retry_at = now.after(Duration::from_millis(1));
        match event {
            Event::Connected { ticket, conn } => {
                self.report.add(Counter::Connected, 1);
                self.report.opened();
                let talk = &self.talks[ticket as usize];
                let it = Speaking { talk: ticket as usize, ..talk.begin(self.greeted) };
                self.speaking.insert(conn.index, (conn, it));
                match self.closed {
                    true => self.close(conn, Outcome::Broken, now, outbox),
                    false => self.speak(conn, outbox),
                }
            }
            Event::ConnectFailed { ticket, .. } => {
                self.report.add(Counter::ConnectFailed, 1);
                let took = now.since(self.started[&ticket]);
                self.outcomes.insert(ticket as usize, (Outcome::Broken, took));
                self.under_way -= 1;
            }
            Event::Sent { conn } => {
                if let Some((_, it)) = self.speaking.get_mut(&conn.index) {
                    it.sending = false;
                }
                self.speak(conn, outbox);
            }
            Event::Received { conn, buf } => {
                if let Some((_, it)) = self.speaking.get_mut(&conn.index)
                    && (it.told || it.heard == 0 && outbox.buffers.bytes(&buf) == WORD)
                {
                    if it.told {
                        self.wrong = Some(format!("talk {} was told more than that it is over", it.talk));
                    }
                    it.told = true;
                    outbox.buffers.release(buf);
                    return self.go_on(now, outbox);
                }
                if let Some((_, it)) = self.speaking.get_mut(&conn.index)
                    && it.line_said == it.line.len()
                    && let Some((answer, mut line)) = it.then.pop()
                {
                    let bytes = outbox.buffers.bytes(&buf);
                    match answer.strip_prefix(bytes) {
                        Some([]) => (it.line, it.line_said) = (std::mem::take(&mut line), 0),
                        Some(rest) => it.then.push((rest.to_vec(), line)),
                        None => self.wrong = Some(format!("talk {} heard no answer to what it asked", it.talk)),
                    }
                    outbox.buffers.release(buf);
                    self.speak(conn, outbox);
                    return self.go_on(now, outbox);
                }
                if let Some((_, it)) = self.speaking.get_mut(&conn.index) {
                    let right =
                        outbox.buffers.bytes(&buf).iter().zip(it.heard..).all(|(&byte, at)| byte == pattern(at));
                    it.heard += buf.len() as u64;
                    if !right || it.heard > self.talks[it.talk].hear {
                        self.wrong = Some(format!("talk {} heard what was not said", it.talk));
                    }
                }
                outbox.buffers.release(buf);
            }
            Event::Finished { conn, .. } => {
                let Some((_, it)) = self.speaking.get(&conn.index) else { return };
                let talk = &self.talks[it.talk];
                let whole = it.heard == talk.hear && (it.shut || talk.probe);
                let normal = matches!(self.talks[it.talk].manner, Manner::Whole | Manner::Slow);
                // A connection that is cut must look cut: only a whole answer ends in FIN.
                if normal && !whole && !it.told && now < self.until && !it.closing {
                    self.wrong = Some(format!("talk {}: an end after {} bytes", it.talk, it.heard));
                }
                let outcome = if normal && whole { Outcome::Right } else { Outcome::Broken };
                self.close(conn, outcome, now, outbox);
            }
            Event::Failed { conn, .. } => self.close(conn, Outcome::Broken, now, outbox),
            Event::Closed { conn } => {
                self.speaking.remove(&conn.index);
                self.report.less(Counter::Open);
                self.under_way -= 1;
            }
            Event::Ordered(Order::Close) => {
                self.closed = true;
                let open: Vec<ConnId> = self.speaking.values().map(|it| it.0).collect();
                open.into_iter().for_each(|conn| self.close(conn, Outcome::Broken, now, outbox));
            }
            _ => {}
        }
        self.go_on(now, outbox);
    }

    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        self.retry_at = now.after(Duration::from_millis(1));
        for conn in std::mem::take(&mut self.retry) {
            if self.speaking.get(&conn.index).is_some_and(|it| it.0 == conn) {
                self.speak(conn, outbox);
            }
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        (!self.retry.is_empty()).then_some(self.retry_at)
    }

    fn is_done(&self) -> bool {
        self.report.phase == Phase::Done
    }

    fn report(&self) -> &Report {
        &self.report
    }

    fn check_invariants(&self) -> Result<(), String> {
        self.wrong.clone().map_or(Ok(()), Err)
    }
}

// ---- the replier ----------------------------------------------------------------------------------------------------

#[derive(Default)]
struct Hearing {
    /// Was asked, and what it answers then.
    question: bool,
    answer: Option<u8>,
    /// So much of its greeting is said.
    greeted: usize,
    line: Vec<u8>,
    asked: Option<(bool, u64, u64)>,
    heard: u64,
    said: u64,
    finished: bool,
    sending: bool,
    closing: bool,
}

pub(crate) struct Replier {
    at: SocketAddr,
    backlog: u32,
    accept: bool,
    /// What it answers who asks: `!`, unless it does not do that.
    answer: u8,
    /// Connections that ask are to have asked it.
    relayed: bool,
    /// It speaks first to whoever is relayed.
    greets: bool,
    /// Also gets those that open too late to be understood by others.
    default: bool,
    /// Not before this.
    listen_from: Instant,
    asked_to_listen: bool,
    until: Instant,
    hearing: BTreeMap<u32, (ConnId, Hearing)>,
    report: Report,
    listens: bool,
    closed: bool,
    retry: Vec<ConnId>,
    retry_at: Instant,
    wrong: Option<String>,
}

impl Replier {
    pub(crate) fn new(service: &Service, backlog: u32, accept: bool, listen_from: Instant, until: Instant) -> Replier {
        Replier {
            at: service.at,
            backlog,
            accept,
            answer: b'!',
            relayed: service.delivery == Delivery::Relay,
            greets: false,
            default: false,
            listen_from,
            asked_to_listen: false,
            until,
            hearing: BTreeMap::new(),
            report: Report::new(),
            listens: false,
            closed: false,
            retry: Vec::new(),
            retry_at: Instant(0),
            wrong: None,
        }
    }

    /// One that does not do what it is asked for.
    pub(crate) fn declining(self) -> Replier {
        Replier { answer: b'N', ..self }
    }

    /// One that speaks first.
    pub(crate) fn greeting(self) -> Replier {
        Replier { greets: self.relayed, ..self }
    }

    /// The default.
    pub(crate) fn for_the_silent(self) -> Replier {
        Replier { default: true, ..self }
    }

    fn heard(&self, it: &mut Hearing, bytes: &[u8]) -> Result<(), String> {
        let Replier { answer, relayed, default, .. } = *self;
        if it.line.starts_with(b"x") || (it.asked.is_none() && it.line.is_empty() && bytes.starts_with(b"x")) {
            // Half of them leave it to the other side to close.
            it.line.extend_from_slice(bytes);
            it.finished |= self.at.port() % 2 == 0;
            return if ERRAND.starts_with(&it.line) { Ok(()) } else { Err("said more than the errand".to_owned()) };
        }
        if self.greets && it.greeted < GREETING.len() {
            return Err("spoke before it was greeted".to_owned());
        }
        if it.answer.is_some() || it.question && answer != b'!' {
            return Err("said more than the question before its answer, or after a no".to_owned());
        }
        if bytes.first() == Some(&b'?') && !it.question && it.line.is_empty() {
            (it.question, it.answer) = (true, Some(answer));
            return if bytes.len() == 1 { Ok(()) } else { Err("said more than the question".to_owned()) };
        }
        for &byte in bytes {
            match it.asked {
                None if byte == b'\n' => {
                    let line = String::from_utf8_lossy(&it.line).into_owned();
                    if default && line.starts_with('@') {
                        it.answer = Some(b'+');
                        it.line.clear();
                        continue;
                    }
                    if it.question != (relayed && line.ends_with('?')) && !default {
                        return Err(format!("{line:?} was asked for: {}", it.question));
                    }
                    let mut words = line.split(' ').skip(1);
                    let early = words.next() == Some("e");
                    let mut number = || words.next().and_then(|word| word.parse().ok()).ok_or(line.clone());
                    it.asked = Some((early, number()?, number()?));
                }
                None => it.line.push(byte),
                Some((_, say, _)) => {
                    if byte != pattern(it.heard) || it.heard >= say {
                        return Err(format!("byte {} is not what was said", it.heard));
                    }
                    it.heard += 1;
                }
            }
        }
        Ok(())
    }

    fn answer(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let Some((_, it)) = self.hearing.get_mut(&conn.index) else { return };
        if it.sending || it.closing {
            return;
        }
        if self.greets && it.greeted < GREETING.len() {
            let most = outbox.buffers.buffer_bytes();
            let rest = &GREETING[it.greeted..];
            match outbox.buffers.write(&rest[..rest.len().min(most).min(20)]) {
                Some(buf) => {
                    (it.greeted, it.sending) = (it.greeted + buf.len(), true);
                    outbox.push(Command::Send { conn, buf });
                }
                None => self.retry.push(conn),
            }
            return;
        }
        if let Some(answer) = it.answer {
            match outbox.buffers.write(&[answer]) {
                Some(buf) => {
                    (it.answer, it.sending) = (None, true);
                    outbox.push(Command::Send { conn, buf });
                }
                None => self.retry.push(conn),
            }
            return;
        }
        let ready = it.asked.filter(|(early, ..)| *early || it.finished);
        let bytes: Vec<u8> = match ready {
            Some((.., hear)) => {
                (it.said..hear.min(it.said + outbox.buffers.buffer_bytes() as u64)).map(pattern).collect()
            }
            None => Vec::new(),
        };
        if bytes.is_empty() {
            if it.finished {
                it.closing = true;
                outbox.push(Command::Close { conn, abort: false });
            }
            return;
        }
        let Some(buf) = outbox.buffers.write(&bytes) else {
            self.retry.push(conn);
            return;
        };
        (it.said, it.sending) = (it.said + bytes.len() as u64, true);
        outbox.push(Command::Send { conn, buf });
    }

    fn settle(&mut self) {
        self.report.phase = if self.closed && self.hearing.is_empty() { Phase::Done } else { Phase::Holding };
    }

    fn listen(&mut self, now: Instant, outbox: &mut Outbox) {
        if now >= self.listen_from && !self.asked_to_listen && !self.closed {
            self.asked_to_listen = true;
            let (listener, local, backlog, accept) = (ListenerId(0), self.at, self.backlog, self.accept);
            outbox.push(Command::Listen { listener, local, backlog, reuse_port: false, accept });
        }
    }
}

impl Core for Replier {
    fn start(&mut self, now: Instant, outbox: &mut Outbox) {
        self.listen(now, outbox);
        self.settle();
    }

    fn handle(&mut self, event: Event, now: Instant, outbox: &mut Outbox) {
        self.retry_at = now.after(Duration::from_millis(1));
        match event {
            Event::Listening { listener, .. } => {
                self.listens = true;
                if self.closed {
                    outbox.push(Command::Unlisten { listener });
                }
            }
            Event::Accepted { conn, .. } => {
                self.report.add(Counter::Accepted, 1);
                self.report.opened();
                self.hearing.insert(conn.index, (conn, Hearing { closing: self.closed, ..Hearing::default() }));
                match self.closed {
                    true => outbox.push(Command::Close { conn, abort: true }),
                    false => self.answer(conn, outbox),
                }
            }
            Event::Received { conn, buf } => {
                if let Some((conn, mut it)) = self.hearing.remove(&conn.index) {
                    let outcome = self.heard(&mut it, outbox.buffers.bytes(&buf));
                    self.wrong = outcome.err().or(self.wrong.take());
                    self.hearing.insert(conn.index, (conn, it));
                }
                outbox.buffers.release(buf);
                self.answer(conn, outbox);
            }
            Event::Sent { conn } => {
                if let Some((_, it)) = self.hearing.get_mut(&conn.index) {
                    it.sending = false;
                }
                self.answer(conn, outbox);
            }
            Event::Finished { conn, .. } => {
                if let Some((_, it)) = self.hearing.get_mut(&conn.index) {
                    it.finished = true;
                    let whole = it.asked.is_none_or(|(_, say, _)| it.heard == say);
                    if !whole && now < self.until && !it.closing {
                        self.wrong = Some(format!("an end after {} bytes", it.heard));
                    }
                }
                self.answer(conn, outbox);
            }
            Event::Failed { conn, .. } => {
                if let Some((_, it)) = self.hearing.get_mut(&conn.index)
                    && !it.closing
                {
                    it.closing = true;
                    outbox.push(Command::Close { conn, abort: true });
                }
            }
            Event::Closed { conn } => {
                self.hearing.remove(&conn.index);
                self.report.less(Counter::Open);
            }
            Event::Ordered(Order::Close) => {
                self.closed = true;
                if self.listens {
                    outbox.push(Command::Unlisten { listener: ListenerId(0) });
                }
                for (conn, it) in self.hearing.values_mut().filter(|it| !it.1.closing) {
                    it.closing = true;
                    outbox.push(Command::Close { conn: *conn, abort: true });
                }
            }
            _ => {}
        }
        self.settle();
    }

    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox) {
        self.retry_at = now.after(Duration::from_millis(1));
        self.listen(now, outbox);
        for conn in std::mem::take(&mut self.retry) {
            if self.hearing.get(&conn.index).is_some_and(|it| it.0 == conn) {
                self.answer(conn, outbox);
            }
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        match self.retry.is_empty() {
            false => Some(self.retry_at),
            true => (!self.asked_to_listen && !self.closed).then_some(self.listen_from),
        }
    }

    fn is_done(&self) -> bool {
        self.report.phase == Phase::Done
    }

    fn report(&self) -> &Report {
        &self.report
    }

    fn check_invariants(&self) -> Result<(), String> {
        self.wrong.clone().map_or(Ok(()), Err)
    }
}
