//! Listening, and what holds of a connection before its first byte: the bounds on all and on one source.
//!
//! Decides who is let in. Knows nothing of what a connection says.

use std::net::SocketAddr;

use super::counts::Prefix;
use super::guide::Guide;
use super::ledger::{self, Ledger, Reason};
use super::session::{CLIENT, Line, Session, State};
use super::{BURST, BrokerCore, ListenAt};
use crate::contract::{Command, ConnId, Errno, Instant, ListenerId, Outbox, Step};
use crate::report::Counter;

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    pub(super) fn listen_some(&mut self, outbox: &mut Outbox) {
        // Only when all that was said before is answered is it known what there is.
        if self.resuming && self.listens_under_way == 0 {
            (self.resuming, self.draining, self.next_listener) = (false, false, 0);
        }
        while self.listens_under_way < BURST
            && !self.draining
            && let Some(&ListenAt { local, .. }) = self.config.listen.get(self.next_listener as usize)
        {
            let (listener, backlog) = (ListenerId(self.next_listener), self.config.backlog);
            outbox.push(match self.given.get(self.next_listener as usize) {
                Some(&Some(given)) => Command::Adopt { listener, given, backlog },
                _ => Command::Listen { listener, local, backlog, reuse_port: self.config.reuse_port, accept: true },
            });
            self.next_listener += 1;
            self.listens_under_way += 1;
        }
    }

    pub(super) fn listening(&mut self, listener: ListenerId, local: SocketAddr, outbox: &mut Outbox) {
        self.listens_under_way -= 1;
        if listener.0 == 0 {
            self.report.listening_at = Some(local);
        }
        if self.draining {
            return self.unlisten(listener, outbox);
        }
        self.listening[listener.0 as usize] = true;
        self.locals[listener.0 as usize] = (!local.ip().is_unspecified()).then_some(local);
        self.report.add(Counter::Listening, 1);
        self.listen_some(outbox);
    }

    pub(super) fn listen_failed(&mut self, step: Step, error: Errno, outbox: &mut Outbox) {
        self.listens_under_way -= 1;
        self.report.add(Counter::ListenFailed, 1);
        self.report.failed(step, error);
        self.report.stopped_by = Some((step, error));
        self.listen_some(outbox);
    }

    pub(super) fn stop_listening(&mut self, outbox: &mut Outbox) {
        (self.draining, self.resuming) = (true, false);
        for (listener, listens) in (0..).zip(&mut self.listening) {
            if std::mem::take(listens) {
                outbox.push(Command::Unlisten { listener: ListenerId(listener) });
                self.listens_under_way += 1;
                self.report.less(Counter::Listening);
            }
        }
    }

    fn unlisten(&mut self, listener: ListenerId, outbox: &mut Outbox) {
        self.listens_under_way += 1;
        outbox.push(Command::Unlisten { listener });
    }

    pub(super) fn unlistened(&mut self, outbox: &mut Outbox) {
        self.listens_under_way -= 1;
        self.listen_some(outbox);
    }

    pub(super) fn resume(&mut self, outbox: &mut Outbox) {
        self.resuming = self.draining && self.closing.is_none();
        self.listen_some(outbox);
    }

    pub(super) fn accepted(
        &mut self,
        listener: ListenerId,
        conn: ConnId,
        peer: Option<SocketAddr>,
        now: Instant,
        outbox: &mut Outbox,
    ) {
        self.report.add(Counter::Accepted, 1);
        let id = self.begin(listener, conn, now);
        let open = (self.sessions.len() - self.free_sessions.len()) as u64;
        // While draining only if it was faster than that.
        if self.closing.is_some() {
            return self.end(id, Reason::Stopped, true, outbox);
        }
        if self.config.most_connections != 0 && open > self.config.most_connections {
            return self.end(id, Reason::OverTotal, true, outbox);
        }
        let due = now.after(self.config.listen[listener.0 as usize].sniff_timeout);
        // Where nothing more of it can be learned, as much is known all the same.
        self.sessions[id as usize].peer = peer;
        let place = self.sessions[id as usize].extra;
        self.waits.at(place).deadline = due;
        self.waits.set_due(place, Some(due));
        match peer.zip(self.locals[listener.0 as usize]) {
            None => outbox.push(Command::Name { conn }),
            names => self.named(conn, names, now, outbox),
        }
        if self.sessions[id as usize].state == State::Sniffing {
            outbox.push(Command::Peek { conn });
        }
    }

    pub(super) fn begin(&mut self, listener: ListenerId, conn: ConnId, now: Instant) -> u32 {
        let id = self.free_sessions.pop().unwrap_or_else(|| {
            self.sessions.push(Session::default());
            self.sessions.len() as u32 - 1
        });
        let wait = self.waits.begin(id);
        self.sessions[id as usize] = Session::begin(listener, conn, wait, self.names.next(now));
        self.lines.write(conn.index, Line::of(id, CLIENT, conn));
        self.report.opened();
        self.report.add(Counter::Sniffing, 1);
        id
    }

    pub(super) fn named(
        &mut self,
        conn: ConnId,
        names: Option<(SocketAddr, SocketAddr)>,
        now: Instant,
        outbox: &mut Outbox,
    ) {
        let Some((id, CLIENT)) = self.find(conn, State::Sniffing) else { return };
        let session = &mut self.sessions[id as usize];
        session.peer = names.map(|(peer, _)| peer).or(session.peer);
        if let Some(peer) = session.peer {
            self.passed(id, ledger::Passing::Accepted);
            let session = &self.sessions[id as usize];
            // A proxy counts as whom it speaks for.
            if !self.guide.trusts(session.listener, peer) && !self.count_source(id, peer) {
                return self.end(id, Reason::OverSource, true, outbox);
            }
        }
        let wait = self.waits.at(self.sessions[id as usize].extra);
        (wait.names, wait.named) = (names, true);
        if std::mem::take(&mut wait.missed) {
            outbox.push(Command::Peek { conn });
        }
        if self.guide.speaks_first(self.sessions[id as usize].listener) {
            self.look(id, None, false, now, outbox);
        }
    }

    /// There is a bound now that was not: who is connected already counts, too. Who has no names yet, or speaks for somebody
    /// else, is counted when that is known.
    pub(super) fn count_sources(&mut self) {
        for id in 0..self.sessions.len() {
            let Session { state, source, peer, listener, extra, .. } = self.sessions[id];
            let is_known = match state {
                State::Free | State::Ending => false,
                State::Sniffing => {
                    self.waits.at(extra).named && !peer.is_some_and(|peer| self.guide.trusts(listener, peer))
                }
                _ => true,
            };
            if let Some(peer) = peer.filter(|_| is_known && source == 0) {
                self.sessions[id].source = self.sources.add(&Prefix::of(peer.ip())) + 1;
            }
        }
    }

    /// Count the connection to its source, once, if there is a bound; false if that has too many then.
    pub(super) fn count_source(&mut self, id: u32, peer: SocketAddr) -> bool {
        let most = self.config.most_per_source;
        if most == 0 {
            return true;
        }
        let row = self.sources.add(&Prefix::of(peer.ip()));
        self.sessions[id as usize].source = row + 1;
        self.sources.count(row) <= most
    }
}
