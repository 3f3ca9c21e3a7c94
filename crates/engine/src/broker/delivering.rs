//! Bringing a connection to the service that it means: by handing the socket over, or by reaching the service and relaying.
//!
//! Decides how a delivery is tried, when it is tried again and when it is given up. Knows no route.

use std::time::Duration;

use super::guide::{Address, Chosen, Delivery, Guide};
use super::ledger::{Ledger, Passing, Reason};
use super::session::{CLIENT, CLOSING, Line, OPEN, OVERHEARD, SENDING, SERVICE, Session, State};
use super::waits::Wait;
use super::{BACKOFF_MS, BrokerCore, FULL_BACKOFF_MS, note};
use crate::contract::{Command, ConnId, Errno, Instant, Outbox, Step, Target};
use crate::report::Counter;

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    /// Count the connection to its service; None if that has too many then.
    pub(super) fn count_service(&mut self, id: u32) -> Option<u32> {
        let session = &mut self.sessions[id as usize];
        let chosen = &self.waits.at(session.extra).chosen;
        let row = self.services.add(chosen.service.as_str());
        session.service = row + 1;
        let most = chosen.most_connections.unwrap_or(self.config.most_per_service);
        (most == 0 || self.services.count(row) <= most).then_some(row)
    }

    /// The service is known, and the client is to be brought to it.
    pub(super) fn found(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        self.passed(id, Passing::Found);
        let session = &mut self.sessions[id as usize];
        let row = session.service - 1;
        let wait = self.waits.at(session.extra);
        session.state = State::Delivering;
        self.report.less(Counter::Sniffing);
        self.report.add(Counter::Delivering, 1);
        wait.deadline = now.after(wait.chosen.patience.unwrap_or(self.config.delivery_timeout));
        wait.deadline = wait.given_up.map_or(wait.deadline, |given_up| given_up.min(wait.deadline));
        wait.backoff_ms = BACKOFF_MS.0;
        // What comes meanwhile waits in the kernel and is not looked at.
        let (place, conn) = (session.extra, session.conns[CLIENT]);
        outbox.push(Command::Pause { conn });
        let bytes = wait.chosen.skip.min(wait.shown);
        if bytes > 0 {
            wait.shown -= bytes;
            wait.touched = true;
            outbox.push(Command::Discard { conn, bytes });
        }
        let deadline = wait.deadline;
        self.consult_no_more(place);
        if !self.is_awake(row, place) {
            return self.park(id, now, outbox);
        }
        // Errands come first: nobody is to wait in a line for them.
        if self.waits.has_line(row) && deadline > now && self.waits.at(place).chosen.errands.is_empty() {
            self.waits.stand_in_line(row, place);
            return self.waits.set_due(place, Some(deadline));
        }
        self.deliver(id, now, outbox);
    }

    /// Its time has come: to be tried again, or for the first time if its service was asleep.
    pub(super) fn try_again(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let Session { extra: place, service, .. } = self.sessions[id as usize];
        let row = service - 1;
        if !self.is_awake(row, place) {
            self.waits.leave_line(row, place);
            return self.park(id, now, outbox);
        }
        let Wait { deadline, in_line, .. } = *self.waits.at(place);
        if self.sessions[id as usize].sides[CLIENT] & SENDING != 0 && deadline > now {
            return self.waits.set_due(place, Some(deadline));
        }
        let has_errands = !self.waits.at(place).chosen.errands.is_empty();
        if !in_line && !has_errands && self.waits.has_line(row) && deadline > now {
            self.waits.stand_in_line(row, place);
            return self.waits.set_due(place, Some(deadline));
        }
        self.deliver(id, now, outbox);
    }

    /// Bring it to its service, unless that has fallen asleep meanwhile.
    fn go_on_to(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let Session { extra: place, service, .. } = self.sessions[id as usize];
        if self.is_awake(service - 1, place) {
            return self.deliver(id, now, outbox);
        }
        self.waits.leave_line(service - 1, place);
        self.park(id, now, outbox);
    }

    pub(super) fn deliver(&mut self, id: u32, now: Instant, outbox: &mut Outbox) {
        let session = &self.sessions[id as usize];
        let (place, conn) = (session.extra, session.conns[CLIENT]);
        if session.sides[CLIENT] & SENDING != 0 {
            return self.end(id, Reason::ClientLeft, true, outbox);
        }
        if self.runs_errand(id, now, outbox) {
            return;
        }
        let wait = self.waits.at(place);
        let reply = wait.chosen.reply;
        if wait.chosen.delivery != Delivery::Relay && !reply.is_empty() && !wait.replied {
            let Some(buf) = outbox.buffers.write(reply) else {
                self.report.add(Counter::BufferWaits, 1);
                return self.undelivered(id, Errno::ENOBUFS, now, outbox);
            };
            wait.replied = true;
            let deadline = wait.deadline;
            self.waits.set_due(place, Some(deadline));
            self.sessions[id as usize].sides[CLIENT] |= SENDING;
            return outbox.push(Command::Send { conn, buf });
        }
        let path = match (&wait.chosen.address, wait.chosen.delivery) {
            (_, Delivery::Inetd) => Err(self.config.inetd_path.as_slice()),
            (Address::Tcp(address), _) => Ok(*address),
            (Address::Unix(path), _) => Err(path.as_slice()),
        };
        let command = match (wait.chosen.delivery, path) {
            (Delivery::Relay, Ok(address)) => Some(Command::Reach { ticket: place, target: Target::Tcp(address) }),
            (_, Err(path)) if path.is_empty() || path.len() > outbox.buffers.buffer_bytes() => {
                return self.end(id, Reason::ServiceUnreachable, true, outbox);
            }
            (Delivery::Relay, Err(path)) => {
                outbox.buffers.write(path).map(|path| Command::Reach { ticket: place, target: Target::Unix(path) })
            }
            (Delivery::HandOff | Delivery::Inetd, Err(path)) => {
                let mut bytes = [0; note::MOST_BYTES];
                let Chosen { service, matched, .. } = &wait.chosen;
                let length = note::write(&mut bytes, wait.names, wait.shown, service, matched);
                // A pool of small buffers has no room for long names.
                let length = length.min(outbox.buffers.buffer_bytes());
                match (outbox.buffers.write(path), outbox.buffers.write(&bytes[..length])) {
                    (Some(path), Some(note)) => Some(Command::HandOff { conn, path, note }),
                    (path, note) => {
                        path.into_iter().chain(note).for_each(|buf| outbox.buffers.release(buf));
                        None
                    }
                }
            }
            // A socket can only be handed to somebody on this host.
            (Delivery::HandOff | Delivery::Inetd, Ok(_)) => {
                return self.end(id, Reason::ServiceUnreachable, true, outbox);
            }
        };
        match command {
            Some(command) => {
                wait.reaching = matches!(command, Command::Reach { .. });
                wait.handing = !wait.reaching;
                let due = wait.reaching.then_some(wait.deadline);
                self.waits.set_due(place, due);
                if matches!(command, Command::Reach { .. }) {
                    self.report.add(Counter::Attempted, 1);
                }
                outbox.push(command);
            }
            None => {
                self.report.add(Counter::BufferWaits, 1);
                self.undelivered(id, Errno::ENOBUFS, now, outbox);
            }
        }
    }

    /// It did not work: again later, or never.
    pub(super) fn undelivered(&mut self, id: u32, error: Errno, now: Instant, outbox: &mut Outbox) {
        let Session { extra: place, service, .. } = self.sessions[id as usize];
        let wait = self.waits.at(place);
        wait.error = Some(error);
        // A full service is asked by the first in its line alone, and so more often.
        let is_full = error == Errno::EAGAIN;
        let most_ms = if is_full { FULL_BACKOFF_MS } else { BACKOFF_MS.1 };
        let again = now.after(Duration::from_millis(wait.backoff_ms.min(most_ms).into()));
        if !is_passing(error) || again > wait.deadline {
            return self.end(id, reason_of(error), true, outbox);
        }
        wait.backoff_ms = (wait.backoff_ms * 2).min(most_ms);
        if is_full && !self.waits.stand_in_line(service - 1, place) {
            let deadline = self.waits.at(place).deadline;
            return self.waits.set_due(place, Some(deadline));
        }
        self.report.add(Counter::DeliveryRetries, 1);
        self.waits.set_due(place, Some(again));
    }

    pub(super) fn connected(&mut self, ticket: u32, conn: ConnId, now: Instant, outbox: &mut Outbox) {
        self.report.add(Counter::Connected, 1);
        let wait = self.waits.at(ticket);
        wait.reaching = false;
        let id = wait.session;
        self.lines.write(conn.index, Line::of(id, SERVICE, conn));
        self.report.opened();
        let session = &mut self.sessions[id as usize];
        session.conns[SERVICE] = conn;
        session.sides[SERVICE] = OPEN;
        if session.state != State::Delivering {
            self.closes_under_way += 1;
            session.sides[SERVICE] |= CLOSING;
            outbox.push(Command::Close { conn, abort: true });
            return;
        }
        if !wait.chosen.errands.is_empty() {
            return self.begin_errand(id, now, outbox);
        }
        let service = session.service - 1;
        let preface = wait.chosen.preface.clone();
        self.waits.leave_line(service, ticket);
        self.begin_script(id, preface, now, outbox);
    }

    /// Send a side the first bytes that it gets, if there are any; false if no buffer has room for them.
    pub(super) fn begin_with(&mut self, id: u32, side: usize, bytes: &[u8], outbox: &mut Outbox) -> bool {
        if bytes.is_empty() {
            return true;
        }
        if bytes.len() > outbox.buffers.buffer_bytes() {
            return false;
        }
        let Some(buf) = outbox.buffers.write(bytes) else { return false };
        let session = &mut self.sessions[id as usize];
        session.sides[side] |= SENDING;
        outbox.push(Command::Send { conn: session.conns[side], buf });
        true
    }

    /// Bytes go both ways from here on.
    pub(super) fn relay(&mut self, id: u32, outbox: &mut Outbox) {
        self.is_delivered(id);
        let session = &mut self.sessions[id as usize];
        let place = std::mem::take(&mut session.extra);
        session.state = State::Relaying;
        let client = session.conns[CLIENT];
        let wait = self.waits.at(place);
        let reply = if wait.replied { b"" } else { wait.chosen.reply };
        if wait.chosen.overheard {
            session.sides[SERVICE] |= OVERHEARD;
            session.sides[CLIENT] |= OVERHEARD;
            self.guide.relays(id, &wait.chosen);
        }
        self.waits.end(place);
        self.report.less(Counter::Delivering);
        self.report.add(Counter::Relaying, 1);
        if !self.begin_with(id, CLIENT, reply, outbox) {
            return self.end(id, Reason::ServiceUnreachable, true, outbox);
        }
        outbox.push(Command::Take { conn: client });
        outbox.push(Command::Resume { conn: client });
        self.pass_on_end(id, CLIENT, outbox);
    }

    /// It has reached its service.
    fn is_delivered(&mut self, id: u32) {
        let took = self.now.since(self.sessions[id as usize].accepted);
        self.report.opening_ns.record(took.as_nanos().min(u64::MAX.into()) as u64);
        self.passed(id, Passing::Delivered);
    }

    /// What the client, or the service before relaying, was told is with the kernel.
    pub(super) fn told(&mut self, id: u32, side: usize, now: Instant, outbox: &mut Outbox) {
        let session = &mut self.sessions[id as usize];
        session.sides[side] &= !SENDING;
        match session.state {
            State::Sniffing => {
                // Also what came together with what is answered, from a client that does not wait.
                self.waits.at(session.extra).missed = false;
                outbox.push(Command::Peek { conn: session.conns[CLIENT] });
            }
            State::Delivering if self.waits.at(session.extra).is_on_its_way() => self.go_on_to(id, now, outbox),
            State::Asking if side == SERVICE => self.say_turn(id, now, outbox),
            State::Leaving => self.told_farewell(id, outbox),
            State::Delivering | State::Asking | State::Relaying | State::Moving | State::Ending | State::Free => {}
        }
    }

    pub(super) fn connect_failed(&mut self, ticket: u32, step: Step, error: Errno, now: Instant, outbox: &mut Outbox) {
        self.report.add(Counter::ConnectFailed, 1);
        let wait = self.waits.at(ticket);
        wait.reaching = false;
        let (id, is_late) = (wait.session, now >= wait.deadline);
        let error = if error == Errno::ECANCELED && is_late { Errno::ETIMEDOUT } else { error };
        self.report.failed(step, error);
        match self.sessions[id as usize].state {
            State::Delivering if !self.waits.at(ticket).chosen.errands.is_empty() => {
                self.errand_failed(id, now, outbox)
            }
            State::Delivering => self.undelivered(id, error, now, outbox),
            _ => self.free(id, now),
        }
    }

    pub(super) fn handed_off(&mut self, conn: ConnId, outbox: &mut Outbox) {
        let Some((id, CLIENT)) = self.find(conn, State::Delivering) else { return };
        self.is_delivered(id);
        self.end(id, Reason::HandedOff, false, outbox);
    }

    pub(super) fn hand_off_failed(&mut self, conn: ConnId, error: Errno, now: Instant, outbox: &mut Outbox) {
        let Some((id, CLIENT)) = self.find(conn, State::Delivering) else { return };
        self.report.failed(Step::HandOff, error);
        let wait = self.waits.at(self.sessions[id as usize].extra);
        wait.handing = false;
        if error == Errno::EPROTOTYPE && wait.chosen.delivery == Delivery::HandOff {
            // Whoever listens there takes connections.
            wait.chosen.delivery = Delivery::Relay;
            self.report.add(Counter::FellBack, 1);
            return self.go_on_to(id, now, outbox);
        }
        self.undelivered(id, error, now, outbox);
    }

    /// Whoever is the first in the connection's line may try again.
    pub(super) fn roomy(&mut self, conn: ConnId) {
        if let Some((id, CLIENT)) = self.find(conn, State::Delivering) {
            self.waits.try_first(self.sessions[id as usize].service - 1);
        }
    }
}

/// Whether the same try may succeed a little later.
fn is_passing(error: Errno) -> bool {
    matches!(
        error,
        Errno::EAGAIN
            | Errno::ENOENT
            | Errno::ECONNREFUSED
            | Errno::ECONNRESET
            | Errno::EPIPE
            | Errno::EADDRNOTAVAIL
            // It still takes sockets, and the registry says already that it is to take connections.
            | Errno::EPROTOTYPE
            | Errno::EMFILE
            | Errno::ENFILE
            | Errno::ENOMEM
            | Errno::ENOBUFS
            | Errno::ETOOMANYREFS
    )
}

fn reason_of(error: Errno) -> Reason {
    match error {
        // EPIPE, ECONNRESET: whoever was there is gone.
        Errno::ENOENT | Errno::ECONNREFUSED | Errno::EPIPE | Errno::ECONNRESET => Reason::ServiceAbsent,
        Errno::EAGAIN | Errno::ETIMEDOUT => Reason::ServiceFull,
        _ => Reason::ServiceUnreachable,
    }
}
