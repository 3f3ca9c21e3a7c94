//! The virtual kernel and network: tuples, handshakes, accept queues, windows, FIN and RST.
//!
//! Decides what a connection goes through. Knows no clock but the time it is given, and tells cores through `world`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use fourtuple_engine::{Buf, ConnId, Core, Errno, Event, Instant, ListenerId, SourceChoice, Step, Target, Transport};

use super::Fault;
use super::world::{Attempt, End, Happening, Link, Packet, Phase, Place, Rule, Tuple, World};

impl World<'_> {
    // ---- connecting and accepting -----------------------------------------------------------------------------------

    pub(super) fn connect(
        &mut self,
        host: usize,
        ticket: u32,
        transport: Transport,
        asked: Tuple,
        choice: SourceChoice,
        range: (u16, u16),
    ) -> Rule {
        let serial = self.serial;
        let attempt = Attempt { serial, tuple: None, link: None };
        if self.hosts[host].attempts.insert(ticket, attempt).is_some() {
            return Err(format!("ticket {ticket} is in use"));
        }
        self.hosts[host].attempted += 1;
        let shortages = [
            (Fault::Emfile, Step::Socket, Errno::EMFILE),
            (Fault::Enfile, Step::Socket, Errno::ENFILE),
            (Fault::Enomem, Step::Connect, Errno::ENOMEM),
            (Fault::Enobufs, Step::Connect, Errno::ENOBUFS),
        ];
        for (fault, step, error) in shortages {
            if self.strikes(fault) {
                self.soon(Happening::Fail { host, ticket, serial, step, error });
                return Ok(());
            }
        }
        match self.choose(asked, choice, range) {
            Ok(tuple) => {
                self.tuples.insert(tuple);
                self.hosts[host].attempts.entry(ticket).and_modify(|attempt| attempt.tuple = Some(tuple));
                match transport {
                    Transport::Stream => self.after_latency(Happening::Syn { host, ticket, serial, tries: 0 }),
                    Transport::Datagram => self.open_flow(host, ticket, serial, tuple),
                }
            }
            Err((step, error)) => self.soon(Happening::Fail { host, ticket, serial, step, error }),
        }
        Ok(())
    }

    /// A free tuple, as the kernel would find one.
    fn choose(
        &mut self,
        (source, destination): Tuple,
        choice: SourceChoice,
        range: (u16, u16),
    ) -> Result<Tuple, (Step, Errno)> {
        let address = match (source.ip().is_unspecified(), destination) {
            (false, _) => source.ip(),
            (true, SocketAddr::V4(_)) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            (true, SocketAddr::V6(_)) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        let (foreign_low, foreign_high) = self.network.foreign_ports;
        let is_foreign = |port: u16| (foreign_low..=foreign_high).contains(&port);
        if choice == SourceChoice::Bind && is_foreign(source.port()) {
            // inet_csk_get_port(): the port is held without SO_REUSEADDR.
            return Err((Step::Bind, Errno::EADDRINUSE));
        }
        let (low, high) = match choice {
            SourceChoice::SinglePort | SourceChoice::Bind => (source.port(), source.port()),
            // A half outside of the sysctl's range is ignored (catalogue A4).
            SourceChoice::KernelRange => (range.0.max(self.network.ports.0), range.1.min(self.network.ports.1)),
            SourceChoice::Kernel | SourceChoice::KernelPort => self.network.ports,
        };
        let ports = (u32::from(high) + 1).saturating_sub(u32::from(low));
        let start = self.random.between(0, u64::from(ports.max(1)) - 1) as u32;
        (0..ports)
            .map(|step| (SocketAddr::new(address, low + ((start + step) % ports) as u16), destination))
            .find(|tuple| !is_foreign(tuple.0.port()) && !self.tuples.contains(tuple))
            // __inet_check_established() and __inet_hash_connect(): EADDRNOTAVAIL, whoever chose (catalogue A1).
            .ok_or((Step::Connect, Errno::EADDRNOTAVAIL))
    }

    pub(super) fn syn(&mut self, host: usize, ticket: u32, serial: u64, tries: u32) {
        let Some(tuple) = self.attempt(host, ticket, serial).and_then(|attempt| attempt.tuple) else { return };
        let lost = self.strikes(Fault::SynLost);
        let any = if tuple.1.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let users = [tuple.1, SocketAddr::new(any, tuple.1.port())];
        let users = users.iter().filter_map(|local| self.listening.get(local)).find(|users| !users.is_empty());
        let listener = users.map(|users| users[serial as usize % users.len()]);
        let orphaned = self.given.iter().position(|local| *local == tuple.1).filter(|_| listener.is_none());
        if !lost && (listener.is_none() && orphaned.is_none() || self.strikes(Fault::Refusal)) {
            let (step, error) = (Step::Connect, Errno::ECONNREFUSED);
            return self.after_latency(Happening::Fail { host, ticket, serial, step, error });
        }
        if let Some(given) = orphaned.filter(|_| !lost) {
            // Nobody listens with the socket at this moment; but it is open, and has its queue.
            let link = self.links.len();
            let ends = [End::new(host), End::new(self.client_count)];
            self.links.push(Link { tuple, transport: Transport::Stream, ends, reset: false });
            self.hosts[host].attempts.entry(ticket).and_modify(|attempt| attempt.link = Some(link));
            self.after_latency(Happening::Establish { host, ticket, serial });
            return self.orphans.entry(given as u32).or_default().push_back(link);
        }
        let row = listener.and_then(|(server, id)| Some((server, id, self.hosts[server].listeners.get_mut(&id)?)));
        let Some((server, id, _)) = row.filter(|row| !lost && row.2.queue.len() <= row.2.backlog as usize) else {
            // Lost, or the accept queue is full, which drops a SYN as well (catalogue D1).
            return match tries {
                0..6 => self.after_ms(1000 << tries, Happening::Syn { host, ticket, serial, tries: tries + 1 }),
                _ => self.soon(Happening::Fail { host, ticket, serial, step: Step::Connect, error: Errno::ETIMEDOUT }),
            };
        };
        let link = self.links.len();
        let ends = [End::new(host), End::new(server)];
        self.links.push(Link { tuple, transport: Transport::Stream, ends, reset: false });
        self.hosts[host].attempts.entry(ticket).and_modify(|attempt| attempt.link = Some(link));
        self.after_latency(Happening::Establish { host, ticket, serial });
        self.enqueue(link, server, id);
    }

    /// connect() to a unix socket: it stands at once, or not at all (unix_stream_connect()).
    pub(super) fn reach(&mut self, host: usize, ticket: u32, target: Target) -> Rule {
        let path = match target {
            Target::Tcp(destination) => {
                let any =
                    if destination.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
                let asked = (SocketAddr::new(any, 0), destination);
                return self.connect(host, ticket, Transport::Stream, asked, SourceChoice::Kernel, (0, 0));
            }
            Target::Unix(path) => path,
        };
        let at = self.endpoint_of(host, path);
        let serial = self.serial;
        if self.hosts[host].attempts.insert(ticket, Attempt { serial, tuple: None, link: None }).is_some() {
            return Err(format!("ticket {ticket} is in use"));
        }
        self.hosts[host].attempted += 1;
        let (server, id) = match self.unix_listener(at) {
            Ok(found) => found,
            Err(error) => {
                self.soon(Happening::Fail { host, ticket, serial, step: Step::Connect, error });
                return Ok(());
            }
        };
        let nobody = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
        let link = self.links.len();
        let ends = [End::new(host), End::new(server)];
        self.links.push(Link { tuple: (nobody, nobody), transport: Transport::Stream, ends, reset: true });
        self.hosts[host].attempts.entry(ticket).and_modify(|attempt| attempt.link = Some(link));
        self.enqueue(link, server, id);
        self.soon(Happening::Establish { host, ticket, serial });
        Ok(())
    }

    /// The endpoint that a path stands for, if it stands for any; the buffer is given back.
    pub(super) fn endpoint_of(&mut self, host: usize, path: Buf) -> Option<SocketAddr> {
        let buffers = &mut self.hosts[host].outbox.buffers;
        let at = std::str::from_utf8(buffers.bytes(&path)).ok().and_then(|text| text.parse().ok());
        buffers.release(path);
        at
    }

    /// Who takes connections there, or why nobody does.
    fn unix_listener(&mut self, at: Option<SocketAddr>) -> Result<(usize, ListenerId), Errno> {
        let at = at.ok_or(Errno::ENOENT)?;
        if self.strikes(Fault::Refusal) {
            return Err(Errno::ECONNREFUSED);
        }
        let &(server, id) = self.listening.get(&at).and_then(|users| users.first()).ok_or(Errno::ECONNREFUSED)?;
        let row = &self.hosts[server].listeners[&id];
        if row.queue.len() > row.backlog as usize { Err(Errno::EAGAIN) } else { Ok((server, id)) }
    }

    fn enqueue(&mut self, link: usize, server: usize, id: ListenerId) {
        if let Some(row) = self.hosts[server].listeners.get_mut(&id) {
            row.queue.push_back(link);
            if row.accept && !row.retry_pending {
                self.soon(Happening::Accept(server, id));
            }
        }
    }

    /// The end of a link moves to another core, with all that has come for it.
    pub(super) fn hand_off(&mut self, (link, end): Place, at: Option<SocketAddr>, cores: &mut [&mut dyn Core]) -> Rule {
        let End { host, conn, phase, .. } = self.links[link].ends[end];
        if phase != Phase::Open {
            return Ok(());
        }
        if self.links[link].ends[end].sending || end == 0 {
            return Err(format!("{conn:?} is handed off while it sends, or was not accepted"));
        }
        let (server, id) = match self.unix_listener(at) {
            Ok(found) => found,
            Err(error) => {
                if error == Errno::EAGAIN && self.random.chance(500) {
                    let after_ms = self.random.between(0, 3);
                    self.after_ms(after_ms, Happening::TellRoomy((link, end)));
                }
                return self.tell(host, Event::HandOffFailed { conn, error }, cores);
            }
        };
        self.hosts[host].conns[conn.index as usize].1 = None;
        self.hosts[host].handed.insert(conn);
        let this = &mut self.links[link].ends[end];
        (this.host, this.phase) = (server, Phase::Unknown);
        (this.peeking, this.paused, this.shown, this.halted) = (false, false, 0, false);
        self.enqueue(link, server, id);
        self.tell(host, Event::HandedOff { conn }, cores)
    }

    /// Nothing is left of the attempt here; a server that knows of it is told by RST.
    pub(super) fn give_up(&mut self, attempt: Attempt) {
        match (attempt.link, attempt.tuple) {
            (Some(link), _) => {
                self.leave((link, 0), true);
                self.links[link].ends[0].phase = Phase::Gone;
                self.forget(link);
            }
            (None, Some(tuple)) => drop(self.tuples.remove(&tuple)),
            (None, None) => {}
        }
    }

    pub(super) fn cancel(&mut self, host: usize, ticket: u32) {
        let Some(attempt) = self.hosts[host].attempts.get(&ticket) else { return };
        let (serial, stands) = (attempt.serial, attempt.link.is_some());
        // With SYN-ACK on its way either may win.
        if !stands || self.random.chance(500) {
            let (step, error) = (Step::Connect, Errno::ECANCELED);
            self.soon(Happening::Fail { host, ticket, serial, step, error });
        }
    }

    pub(super) fn accept(&mut self, host: usize, listener: ListenerId, cores: &mut [&mut dyn Core]) -> Rule {
        let strikes = self.strikes(Fault::Accept);
        let Some(row) = self.hosts[host].listeners.get_mut(&listener) else { return Ok(()) };
        row.retry_pending = false;
        if row.queue.is_empty() {
            return Ok(());
        }
        if strikes {
            row.retry_pending = true;
            self.after_ms(100, Happening::Accept(host, listener));
            let errors = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS];
            let error = errors[self.random.between(0, 3) as usize];
            return self.tell(host, Event::AcceptFailed { listener, error }, cores);
        }
        let Some(link) = row.queue.pop_front() else { return Ok(()) };
        if !row.queue.is_empty() {
            self.soon(Happening::Accept(host, listener));
        }
        self.hosts[host].accepted += 1;
        self.links[link].ends[1].host = host;
        let conn = self.name((link, 1));
        // A carrier may know the peer at once or not.
        let peer = self.random.chance(500).then_some(self.links[link].tuple.0);
        self.tell(host, Event::Accepted { listener, conn, peer }, cores)
    }

    pub(super) fn unlisten(&mut self, host: usize, listener: ListenerId) {
        let Some(row) = self.hosts[host].listeners.remove(&listener) else { return };
        if let Some(users) = self.listening.get_mut(&row.local) {
            users.retain(|&user| user != (host, listener));
        }
        if let Some(given) = row.given {
            return self.leave_queue(given, row.queue);
        }
        // inet_csk_listen_stop() resets what nobody accepted.
        for link in row.queue {
            self.leave((link, 1), true);
            self.links[link].ends[1].phase = Phase::Gone;
            self.forget(link);
        }
    }

    /// Give the end a place in its core's table, and let what has arrived be read.
    pub(super) fn name(&mut self, place: Place) -> ConnId {
        let this = &mut self.links[place.0].ends[place.1];
        let host = &mut self.hosts[this.host];
        let index = host.free.pop().unwrap_or_else(|| {
            host.conns.push((0, None));
            host.conns.len() as u32 - 1
        });
        let row = &mut host.conns[index as usize];
        row.1 = Some(place);
        this.conn = ConnId { index, generation: row.0 };
        this.phase = Phase::Open;
        let conn = this.conn;
        self.soon(Happening::Read(place));
        conn
    }

    pub(super) fn release_name(&mut self, host: usize, conn: ConnId) {
        let row = &mut self.hosts[host].conns[conn.index as usize];
        *row = (row.0.wrapping_add(1), None);
        self.hosts[host].free.push(conn.index);
    }

    // ---- bytes ------------------------------------------------------------------------------------------------------

    pub(super) fn send(&mut self, host: usize, conn: ConnId, buf: Buf) -> Rule {
        let Some((link, end)) = self.place(host, conn)? else {
            self.hosts[host].outbox.buffers.release(buf);
            return Ok(());
        };
        let bytes = self.hosts[host].outbox.buffers.bytes(&buf);
        let this = &mut self.links[link].ends[end];
        if this.sending {
            return Err(format!("a second Send on {conn:?} while one is outstanding"));
        }
        if bytes.is_empty() {
            return Err(format!("a Send of nothing on {conn:?}"));
        }
        if self.script.echoing && end == 1 && !bytes.iter().all(|&byte| this.unechoed.pop_front() == Some(byte)) {
            return Err(format!("{conn:?} sends back what it did not receive"));
        }
        this.sending = true;
        if self.links[link].transport == Transport::Datagram {
            return self.send_datagram((link, end), buf);
        }
        let this = &mut self.links[link].ends[end];
        if this.broken || this.phase != Phase::Open {
            self.hosts[host].outbox.buffers.release(buf);
            return Ok(());
        }
        this.out = Some((buf, 0));
        self.soon(Happening::Push((link, end)));
        Ok(())
    }

    /// Hand bytes to the network as far as the receiver's window goes.
    pub(super) fn push(&mut self, (link, end): Place) {
        let short = self.links[link].ends[end].out.is_some() && self.strikes(Fault::ShortWrite);
        let peer = &self.links[link].ends[1 - end];
        let room = self.network.window_bytes.saturating_sub(peer.inbox.len() + peer.wire_bytes);
        let this = &mut self.links[link].ends[end];
        let Some((buf, done)) = &mut this.out else { return };
        if room == 0 {
            return;
        }
        let buffers = &mut self.hosts[this.host].outbox.buffers;
        let rest = &buffers.bytes(buf)[*done..];
        let most = rest.len().min(room);
        let count = if short { self.random.between(1, most as u64) as usize } else { most };
        let bytes = rest[..count].to_vec();
        *done += count;
        let is_whole = *done == buf.len();
        if is_whole {
            if let Some((buf, _)) = this.out.take() {
                buffers.release(buf);
            }
            self.soon(Happening::TellSent((link, end)));
        } else if count < room {
            self.soon(Happening::Push((link, end)));
        }
        self.transmit((link, 1 - end), Packet::Bytes(bytes));
    }

    /// Put a packet on the wire to `place`, behind those already there.
    pub(super) fn transmit(&mut self, place: Place, packet: Packet) {
        let arrival = Instant(self.now.0 + self.latency_ns());
        let to = &mut self.links[place.0].ends[place.1];
        to.last_arrival = to.last_arrival.max(arrival);
        if let Packet::Bytes(bytes) = &packet {
            to.wire_bytes += bytes.len();
            self.report.most_bytes_waiting = self.report.most_bytes_waiting.max(to.wire_bytes + to.inbox.len());
        }
        to.wire.push_back(packet);
        let when = to.last_arrival.0;
        self.at(when, Happening::Arrive(place));
    }

    pub(super) fn arrive(&mut self, (link, end): Place) {
        let Some(packet) = self.links[link].ends[end].wire.pop_front() else { return };
        if self.strikes(Fault::Reset) {
            self.break_off((link, 0));
            return self.break_off((link, 1));
        }
        let this = &mut self.links[link].ends[end];
        match packet {
            Packet::Bytes(bytes) => {
                this.wire_bytes -= bytes.len();
                if matches!(this.phase, Phase::Closing | Phase::Gone) {
                    // tcp_rcv_state_process(): data for a socket that nobody reads is answered by RST.
                    return self.transmit((link, 1 - end), Packet::Rst);
                }
                this.inbox.extend(bytes);
            }
            Packet::Fin => this.fin = true,
            Packet::Rst => return self.break_off((link, end)),
        }
        self.soon(Happening::Read((link, end)));
    }

    /// The end is told that its connection broke, and its `Send` is over.
    pub(super) fn break_off(&mut self, (link, end): Place) {
        self.links[link].reset = true;
        self.drop_bytes((link, end));
        self.links[link].ends[end].broken = true;
        self.soon(Happening::Read((link, end)));
    }

    /// Release what the end sends and forget what came for it.
    pub(super) fn drop_bytes(&mut self, (link, end): Place) {
        let this = &mut self.links[link].ends[end];
        if let Some((buf, _)) = this.out.take() {
            self.hosts[this.host].outbox.buffers.release(buf);
        }
        (this.wire_bytes, this.fin) = (0, false);
        this.wire.clear();
        this.inbox.clear();
    }

    /// Tell the core the next thing about its connection: it broke, bytes, or FIN.
    pub(super) fn read(&mut self, (link, end): Place, cores: &mut [&mut dyn Core]) -> Rule {
        let (late, slow) = (self.random.chance(300), self.strikes(Fault::SlowReader));
        let this = &mut self.links[link].ends[end];
        if this.halted {
            return Ok(());
        }
        let (host, conn) = (this.host, this.conn);
        let may_read = match this.phase {
            Phase::Open => !this.paused || late,
            Phase::Closing => late,
            Phase::Unknown | Phase::Failed | Phase::Gone => return Ok(()),
        };
        if this.broken && this.phase == Phase::Open {
            this.phase = Phase::Failed;
            let (step, error) = match this.sending {
                true => (Step::Send, Errno::EPIPE),
                false => (Step::Receive, Errno::ECONNRESET),
            };
            return self.tell(host, Event::Failed { conn, step, error }, cores);
        }
        if this.watched && this.paused && this.peeking && this.fin && !this.fin_told && this.phase == Phase::Open {
            this.watched = false;
            return self.tell(host, Event::HungUp { conn }, cores);
        }
        if !may_read {
            return Ok(());
        }
        if slow {
            self.after_ms(20, Happening::Read((link, end)));
            return Ok(());
        }
        if this.peeking && !this.inbox.is_empty() {
            return self.show((link, end), cores);
        }
        if !this.inbox.is_empty() {
            let most = this.inbox.len().min(self.network.buffer_bytes);
            let Some(mut buf) = self.hosts[host].outbox.buffers.take() else {
                self.after_ms(1, Happening::Read((link, end)));
                return Ok(());
            };
            let count = if self.random.chance(500) { most } else { self.random.between(1, most as u64) as usize };
            let bytes: Vec<u8> = this.inbox.drain(..count).collect();
            let is_more = !this.inbox.is_empty() || this.fin;
            if self.script.echoing && end == 1 && this.phase == Phase::Open {
                this.unechoed.extend(&bytes);
            }
            let buffers = &mut self.hosts[host].outbox.buffers;
            buffers.set_len(&mut buf, count);
            buffers.memory(&buf)[..count].copy_from_slice(&bytes);
            self.report.bytes += count as u64;
            if is_more {
                self.soon(Happening::Read((link, end)));
            }
            self.soon(Happening::Push((link, 1 - end)));
            return self.tell(host, Event::Received { conn, buf }, cores);
        }
        if this.fin && !this.fin_told && this.phase == Phase::Open {
            this.fin_told = true;
            // A unix socket tells a closed peer from one that only sends no more.
            let (nobody, Link { tuple, ends, .. }) =
                (SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0), &self.links[link]);
            let gone = *tuple == (nobody, nobody) && matches!(ends[1 - end].phase, Phase::Closing | Phase::Gone);
            return self.tell(host, Event::Finished { conn, gone }, cores);
        }
        Ok(())
    }

    /// Show the core what has come and was not shown yet.
    fn show(&mut self, (link, end): Place, cores: &mut [&mut dyn Core]) -> Rule {
        let this = &mut self.links[link].ends[end];
        if this.inbox.len() <= this.shown && !this.show_again {
            return Ok(());
        }
        let (host, conn) = (this.host, this.conn);
        let peeks = &mut self.hosts[host].outbox.peeks;
        let Some(mut buf) = peeks.take() else {
            self.after_ms(1, Happening::Read((link, end)));
            return Ok(());
        };
        let count = this.inbox.len().min(peeks.buffer_bytes());
        let bytes: Vec<u8> = this.inbox.iter().take(count).copied().collect();
        peeks.memory(&buf)[..count].copy_from_slice(&bytes);
        peeks.set_len(&mut buf, count);
        (this.shown, this.show_again) = (this.inbox.len(), false);
        self.tell(host, Event::Peeked { conn, buf }, cores)
    }

    /// Take shown bytes off the stream.
    pub(super) fn discard(&mut self, (link, end): Place, bytes: usize) -> Rule {
        let this = &mut self.links[link].ends[end];
        if this.broken || this.phase != Phase::Open {
            return Ok(());
        }
        if bytes == 0 || bytes > this.shown {
            return Err(format!("{:?} is to lose {bytes} bytes, and was shown {}", this.conn, this.shown));
        }
        this.inbox.drain(..bytes);
        this.shown -= bytes;
        // The window opens.
        self.soon(Happening::Push((link, 1 - end)));
        Ok(())
    }

    /// FIN behind the last byte sent.
    pub(super) fn shutdown(&mut self, (link, end): Place) -> Rule {
        let this = &mut self.links[link].ends[end];
        if this.sending && !this.broken {
            return Err(format!("Shutdown on {:?} while a Send is outstanding", this.conn));
        }
        if !this.shut && !this.broken {
            this.shut = true;
            self.transmit((link, 1 - end), Packet::Fin);
        }
        Ok(())
    }

    // ---- ending -----------------------------------------------------------------------------------------------------

    /// The end stops taking part: FIN, or RST if it aborts or leaves bytes unread (tcp_close()).
    pub(super) fn leave(&mut self, (link, end): Place, abort: bool) {
        let this = &mut self.links[link].ends[end];
        let with_rst = abort || !this.inbox.is_empty();
        let is_news = !this.broken && (with_rst || !this.shut);
        if let Some((buf, _)) = this.out.take() {
            self.hosts[this.host].outbox.buffers.release(buf);
        }
        self.links[link].reset |= with_rst;
        if abort {
            self.drop_bytes((link, end));
        }
        if is_news && self.links[link].transport == Transport::Stream {
            self.transmit((link, 1 - end), if with_rst { Packet::Rst } else { Packet::Fin });
        }
    }

    /// Free the tuple when both ends are gone: at once after RST, else after TIME_WAIT.
    pub(super) fn forget(&mut self, link: usize) {
        let Link { tuple, ends, reset, .. } = &self.links[link];
        if ends.iter().all(|end| end.phase == Phase::Gone) {
            let wait = if *reset { 0 } else { self.network.time_wait.as_nanos() as u64 };
            let (when, tuple) = (self.now.0 + wait, *tuple);
            match self.links[link].transport {
                Transport::Stream => self.at(when, Happening::FreeTuple(tuple)),
                // Nothing of a flow outlives its socket.
                Transport::Datagram => drop(self.tuples.remove(&tuple)),
            }
        }
    }
}
