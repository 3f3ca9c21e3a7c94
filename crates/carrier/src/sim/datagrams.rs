//! Datagrams in the virtual network: connected at once, sent back by whoever they were sent to; lost, doubled, overtaken
//! and refused by chance.
//!
//! Decides what becomes of a datagram. Knows no core but through `world`.

use fourtuple_engine::{Buf, ConnId, Core, Errno, Event, Step, Transport};

use super::Fault;
use super::world::{End, Happening, Link, Phase, Place, Rule, Tuple, World};

impl World<'_> {
    /// connect() of a datagram socket asks nobody.
    pub(super) fn open_flow(&mut self, host: usize, ticket: u32, serial: u64, tuple: Tuple) {
        let link = self.links.len();
        let nobody = End { phase: Phase::Gone, ..End::new(host) };
        // No TIME_WAIT: the tuple is free as soon as it is closed.
        let flow = Link { tuple, transport: Transport::Datagram, ends: [End::new(host), nobody], reset: true };
        self.links.push(flow);
        self.hosts[host].attempts.entry(ticket).and_modify(|attempt| attempt.link = Some(link));
        self.soon(Happening::Establish { host, ticket, serial });
    }

    pub(super) fn send_datagram(&mut self, (link, end): Place, buf: Buf) -> Rule {
        let buffers = &mut self.hosts[self.links[link].ends[end].host].outbox.buffers;
        let bytes = buffers.bytes(&buf).to_vec();
        buffers.release(buf);
        if self.strikes(Fault::DatagramUnsent) {
            let errors = [Errno(1), Errno::ENOBUFS, Errno::EMSGSIZE];
            let error = errors[self.random.between(0, 2) as usize];
            let when = self.now.0 + 1;
            self.at(when, Happening::Disturb((link, end), Step::Send, error));
            self.at(when + 1, Happening::TellSent((link, end)));
            return Ok(());
        }
        self.soon(Happening::TellSent((link, end)));
        if self.strikes(Fault::DatagramLost) {
            return Ok(());
        }
        if self.strikes(Fault::DatagramRefused) {
            self.after_latency(Happening::Disturb((link, end), Step::Receive, Errno::ECONNREFUSED));
            return Ok(());
        }
        if self.strikes(Fault::DatagramDoubled) {
            self.after_latency(Happening::Echo((link, end), bytes.clone()));
        }
        if self.strikes(Fault::DatagramOvertaken) {
            let ms = self.random.between(1, 600);
            self.after_ms(ms, Happening::Echo((link, end), bytes));
        } else {
            self.after_latency(Happening::Echo((link, end), bytes));
        }
        Ok(())
    }

    /// What was sent comes back to its sender; one that is longer than a buffer is only told of.
    pub(super) fn echo(&mut self, (link, end): Place, bytes: Vec<u8>, cores: &mut [&mut dyn Core]) -> Rule {
        let this = &self.links[link].ends[end];
        let (host, conn): (usize, ConnId) = (this.host, this.conn);
        if this.phase != Phase::Open {
            return Ok(());
        }
        let buffers = &mut self.hosts[host].outbox.buffers;
        let Some(mut buf) = (if this.paused { None } else { buffers.take() }) else {
            self.after_ms(1, Happening::Echo((link, end), bytes));
            return Ok(());
        };
        buffers.set_len(&mut buf, bytes.len());
        buffers.memory(&buf)[..bytes.len()].copy_from_slice(&bytes);
        self.report.bytes += bytes.len() as u64;
        self.tell(host, Event::Received { conn, buf }, cores)
    }
}
