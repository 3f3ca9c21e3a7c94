//! What the load core makes of datagrams: answers, strays, and errors that end no connection.
//!
//! Decides when a round on a datagram connection is right, refused, wrong or missing. A datagram may be lost, so nothing
//! is spoiled by one that does not come, nor by one that comes late: it is a stray, and the next round goes on. A round
//! without its answer by the deadline is *wrong* if something came that answers nothing, else *missing*.

use super::{Hold, LoadCore, State};
use crate::contract::{ConnId, Errno, Outbox, Step};
use crate::report::Counter;
use crate::speech::{Failing, Speech, Stray, Turn};

impl<S: Speech> LoadCore<S> {
    pub(super) fn hear_datagram(&mut self, hold: &mut Hold<S::Memory>, bytes: &[u8]) {
        let listens = hold.state == State::Awaiting && self.speech.turn(&hold.memory) == Turn::Listen;
        let serial = self.serial(hold);
        let heard = if listens { self.speech.hear_datagram(&mut hold.memory, serial, bytes) } else { Err(Stray::Late) };
        if let Err(stray) = heard {
            self.report.add(Counter::Strays, 1);
            if stray == Stray::Wrong {
                self.doubt(hold);
            }
        }
    }

    /// An error on a connection that lives on. An ICMP answer to what a round said is an answer, and says no.
    pub(super) fn disturbed(&mut self, conn: ConnId, step: Step, error: Errno, outbox: &mut Outbox) {
        let Some(mut hold) = self.open_hold(conn) else { return };
        self.report.failed(step, error);
        match (step, error, hold.state) {
            (Step::Receive, Errno::ECONNREFUSED, State::Awaiting) => {
                if hold.opening {
                    self.fail_opening(conn, &mut hold, Failing::Refused, outbox);
                } else {
                    self.report.add(Counter::PingsRefused, 1);
                    self.answered(conn, &mut hold);
                }
                self.holds.write(conn.index, hold);
            }
            (Step::Receive, Errno::EMSGSIZE, State::Awaiting) => self.doubt(&hold),
            _ => {}
        }
    }

    fn doubt(&mut self, hold: &Hold<S::Memory>) {
        let window = if hold.opening { &mut self.openings } else { &mut self.pings };
        if let Some(part) = window.value_mut(hold.ping) {
            part.doubted = true;
        }
    }
}
