//! Connections that move between cores, and listening sockets that several hold.
//!
//! Decides when a message is sent and told, when a ferry breaks, and who of those who hold a connection is told what happens
//! to it: whoever took it last, or said `Resume`.

use std::collections::VecDeque;

use fourtuple_engine::{Buf, ConnId, Core, Errno, Event, Given};

use super::Fault;
use super::world::{Happening, Phase, Place, Rule, World};

/// A ferry; its ends in the order in which they were opened.
#[derive(Debug, Default)]
pub(super) struct Ferry {
    ends: [Option<FerryEnd>; 2],
    /// It is broken.
    cut: bool,
}

#[derive(Debug)]
struct FerryEnd {
    host: usize,
    is_open: bool,
    is_fetching: bool,
    cargo: Option<([Option<ConnId>; 2], Vec<u8>)>,
    inbox: VecDeque<(Vec<u8>, [Option<Place>; 2])>,
}

impl World<'_> {
    // ---- halting ----------------------------------------------------------------------------------------------------

    /// Take back what is being sent, and tell nothing more, once everything under way is told.
    pub(super) fn halted(&mut self, (link, end): Place, host: usize, cores: &mut [&mut dyn Core]) -> Rule {
        let this = &mut self.links[link].ends[end];
        if this.host != host || this.phase != Phase::Open || this.halted {
            return Ok(());
        }
        if this.sending && this.out.is_none() && !this.broken {
            // `Sent` is on its way.
            self.soon(Happening::Halt((link, end), host));
            return Ok(());
        }
        let conn = this.conn;
        (this.halted, this.paused) = (true, true);
        let rest = this.out.take().map(|(mut buf, done)| {
            this.sending = false;
            if done > 0 {
                self.hosts[host].outbox.buffers.cut(&mut buf, done);
            }
            buf
        });
        self.tell(host, Event::Halted { conn, rest }, cores)
    }

    /// The end is `host`'s to use again, by the name that it has there.
    pub(super) fn resume(&mut self, (link, end): Place, host: usize, conn: ConnId) -> Rule {
        let this = &mut self.links[link].ends[end];
        if this.conn != conn || this.host != host {
            let Some(place) = this.others.iter().position(|other| *other == (host, conn)) else {
                return Err(format!("{conn:?} is not held"));
            };
            this.others[place] = (this.host, this.conn);
            (this.host, this.conn) = (host, conn);
        }
        (this.halted, this.paused, this.watched) = (false, false, false);
        self.soon(Happening::Read((link, end)));
        Ok(())
    }

    /// One of several holders closes: nobody is told. Says whether there are others.
    pub(super) fn is_held_by_others(&mut self, (link, end): Place, host: usize, conn: ConnId) -> bool {
        let this = &mut self.links[link].ends[end];
        if this.others.is_empty() && this.in_flight == 0 {
            return false;
        }
        if (this.host, this.conn) == (host, conn) {
            match this.others.pop() {
                Some(other) => (this.host, this.conn) = other,
                // It is only in a message.
                None => this.phase = Phase::Unknown,
            }
            (this.halted, this.paused) = (true, true);
        } else {
            this.others.retain(|other| *other != (host, conn));
        }
        self.hosts[host].conns[conn.index as usize].1 = None;
        true
    }

    // ---- ferries ----------------------------------------------------------------------------------------------------

    pub(super) fn open_ferry(&mut self, host: usize, ferry: Given) {
        let opened = FerryEnd { host, is_open: true, is_fetching: false, cargo: None, inbox: VecDeque::new() };
        let strikes = self.strikes(Fault::FerryLost);
        let row = self.ferries.entry(ferry.0).or_default();
        let place = usize::from(row.ends[0].is_some());
        row.ends[place] = Some(opened);
        if strikes && place == 1 {
            let when = self.now.0 + self.random.between(0, 300_000);
            self.at(when, Happening::CutFerry(ferry));
        }
    }

    pub(super) fn cut_ferry(&mut self, ferry: Given) {
        if let Some(row) = self.ferries.get_mut(&ferry.0) {
            row.cut = true;
            [0, 1].into_iter().for_each(|end| self.soon(Happening::Fetch(ferry, end)));
        }
    }

    /// Which end of the ferry is the host's.
    fn end_of(&mut self, host: usize, ferry: Given) -> Option<usize> {
        let ends = &self.ferries.get(&ferry.0)?.ends;
        ends.iter().position(|end| end.as_ref().is_some_and(|end| end.host == host && end.is_open))
    }

    fn ferry_end(&mut self, ferry: Given, end: usize) -> Option<&mut FerryEnd> {
        self.ferries.get_mut(&ferry.0)?.ends[end].as_mut().filter(|end| end.is_open)
    }

    pub(super) fn close_ferry(&mut self, host: usize, ferry: Given) {
        let Some(end) = self.end_of(host, ferry) else { return };
        let Some(this) = self.ferry_end(ferry, end) else { return };
        this.is_open = false;
        let inbox = std::mem::take(&mut this.inbox);
        for place in inbox.into_iter().flat_map(|(_, places)| places).flatten() {
            self.links[place.0].ends[place.1].in_flight -= 1;
            self.let_go(place);
        }
        self.soon(Happening::Fetch(ferry, 1 - end));
    }

    /// Whoever held the end holds it no more; if nobody does, it ends.
    fn let_go(&mut self, place: Place) {
        let this = &mut self.links[place.0].ends[place.1];
        if this.phase == Phase::Unknown && this.others.is_empty() && this.in_flight == 0 {
            self.leave(place, false);
            self.links[place.0].ends[place.1].phase = Phase::Gone;
            self.forget(place.0);
        }
    }

    pub(super) fn ship(&mut self, host: usize, ferry: Given, conns: [Option<ConnId>; 2], message: Buf) -> Rule {
        let bytes = self.hosts[host].outbox.peeks.bytes(&message).to_vec();
        self.hosts[host].outbox.peeks.release(message);
        for conn in conns.into_iter().flatten() {
            match self.place(host, conn)? {
                Some((link, end)) if self.links[link].ends[end].halted => {}
                _ => return Err(format!("{conn:?} is shipped and was not halted")),
            }
        }
        let Some(end) = self.end_of(host, ferry) else { return Err(format!("{ferry:?} is not open")) };
        let late_ms = if self.strikes(Fault::FerryFull) { self.random.between(1, 20) } else { 0 };
        let this = self.ferry_end(ferry, end).ok_or("an end that was found")?;
        if this.cargo.replace((conns, bytes)).is_some() {
            return Err(format!("a second Ship on {ferry:?}"));
        }
        let delay = self.random.between(0, 20_000);
        self.at(self.now.0 + late_ms * 1_000_000 + delay, Happening::Ship(ferry, end));
        Ok(())
    }

    pub(super) fn ship_now(&mut self, ferry: Given, end: usize, cores: &mut [&mut dyn Core]) -> Rule {
        let cut = self.is_cut(ferry, 1 - end);
        let Some(this) = self.ferry_end(ferry, end) else { return Ok(()) };
        let (host, is_fetching) = (this.host, this.is_fetching);
        let Some((conns, bytes)) = this.cargo.take() else { return Ok(()) };
        if cut {
            // Whoever fetches is told when there are no more messages.
            return match is_fetching {
                true => Ok(()),
                false => self.tell(host, Event::FerryLost { ferry, error: Some(Errno::EPIPE) }, cores),
            };
        }
        let mut places = [None; 2];
        for (place, conn) in places.iter_mut().zip(conns) {
            if let Some(conn) = conn {
                *place = self.hosts[host]
                    .conns
                    .get(conn.index as usize)
                    .filter(|row| row.0 == conn.generation)
                    .and_then(|row| row.1);
                if place.is_none_or(|(link, end)| self.links[link].ends[end].phase != Phase::Open) {
                    return self.tell(host, Event::Shipped { ferry }, cores);
                }
            }
        }
        for (link, end) in places.into_iter().flatten() {
            self.links[link].ends[end].in_flight += 1;
        }
        if let Some(Some(other)) = self.ferries.get_mut(&ferry.0).map(|row| row.ends[1 - end].as_mut()) {
            other.inbox.push_back((bytes, places));
        }
        self.soon(Happening::Fetch(ferry, 1 - end));
        self.tell(host, Event::Shipped { ferry }, cores)
    }

    /// Whether what this end is sent does not come to it.
    fn is_cut(&self, ferry: Given, end: usize) -> bool {
        let Some(row) = self.ferries.get(&ferry.0) else { return true };
        row.cut || row.ends[end].as_ref().is_some_and(|end| !end.is_open)
    }

    pub(super) fn fetch(&mut self, host: usize, ferry: Given) -> Rule {
        let Some(end) = self.end_of(host, ferry) else { return Err(format!("{ferry:?} is not open")) };
        if let Some(this) = self.ferry_end(ferry, end)
            && std::mem::replace(&mut this.is_fetching, true)
        {
            return Err(format!("a second Fetch on {ferry:?}"));
        }
        self.soon(Happening::Fetch(ferry, end));
        Ok(())
    }

    pub(super) fn fetch_now(&mut self, ferry: Given, end: usize, cores: &mut [&mut dyn Core]) -> Rule {
        let over = self.is_cut(ferry, 1 - end);
        let Some(this) = self.ferry_end(ferry, end).filter(|end| end.is_fetching) else { return Ok(()) };
        let host = this.host;
        if this.inbox.is_empty() {
            if over {
                this.is_fetching = false;
                return self.tell(host, Event::FerryLost { ferry, error: None }, cores);
            }
            return Ok(());
        }
        let Some(mut message) = self.hosts[host].outbox.peeks.take() else {
            self.after_ms(1, Happening::Fetch(ferry, end));
            return Ok(());
        };
        let this = self.ferry_end(ferry, end).ok_or("an end that was found")?;
        this.is_fetching = false;
        let Some((bytes, places)) = this.inbox.pop_front() else { return Ok(()) };
        let peeks = &mut self.hosts[host].outbox.peeks;
        peeks.memory(&message)[..bytes.len()].copy_from_slice(&bytes);
        peeks.set_len(&mut message, bytes.len());
        let conns = places.map(|place| place.map(|place| self.take_in(place, host)));
        self.tell(host, Event::Landed { ferry, conns, message }, cores)
    }

    /// Another core holds the end, too, and is the one to be told.
    fn take_in(&mut self, (link, end): Place, host: usize) -> ConnId {
        let this = &mut self.links[link].ends[end];
        this.in_flight -= 1;
        if this.phase != Phase::Unknown {
            let before = (this.host, this.conn);
            this.others.push(before);
        }
        this.host = host;
        (this.halted, this.paused) = (true, true);
        (this.peeking, this.shown) = (false, 0);
        self.name((link, end))
    }

    // ---- listening sockets that several hold ------------------------------------------------------------------------

    /// What waits in the queue of a socket that somebody else holds stays there.
    pub(super) fn leave_queue(&mut self, given: Given, queue: VecDeque<usize>) {
        let heir = self.hosts.iter().enumerate().find_map(|(host, row)| {
            let (id, _) = row.listeners.iter().find(|(_, listener)| listener.given == Some(given))?;
            Some((host, *id))
        });
        match heir {
            Some((host, id)) => {
                if let Some(row) = self.hosts[host].listeners.get_mut(&id) {
                    row.queue.extend(queue);
                    row.retry_pending = false;
                }
                self.soon(Happening::Accept(host, id));
            }
            None => self.orphans.entry(given.0).or_default().extend(queue),
        }
    }
}
