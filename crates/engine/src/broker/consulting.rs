//! Asking the outside what a connection speaks that the guide does not know: the slow path of looking.
//!
//! Decides how many may be asked about at once, and that nobody waits for an answer longer than for its own first bytes:
//! the connection stays `Sniffing`, and at its deadline the guide has to do without. Knows nothing of what is asked.

use std::collections::HashMap;

use super::BrokerCore;
use super::guide::{Guide, Opinion};
use super::ledger::Ledger;
use super::session::{CLIENT, State};
use crate::contract::{Command, Outbox};
use crate::questions::{Opening, Question};
use crate::report::Counter;

/// Connections asked about at once.
const MOST: usize = 256;
/// Of a connection's first bytes, so many are shown.
pub(super) const OPENING_BYTES: usize = 4_096;

/// Whose answers are outstanding.
#[derive(Debug, Default)]
pub(super) struct Consulted {
    /// The place of each, by its ticket.
    places: HashMap<u64, u32>,
    next: u64,
}

impl<G: Guide, L: Ledger> BrokerCore<G, L> {
    /// Ask about these bytes, unless that is being asked already. Where there is no room, nobody knows.
    pub(super) fn consult(&mut self, id: u32, bytes: Vec<u8>, outbox: &mut Outbox) {
        let session = &self.sessions[id as usize];
        let (place, conn) = (session.extra, session.conns[CLIENT]);
        let listener = session.listener;
        let wait = self.waits.at(place);
        if wait.ticket != 0 {
            return;
        }
        let ticket = self.consulted.next + 1;
        let is_all = bytes.len() >= OPENING_BYTES;
        let opening = Opening { ticket, listener, bytes, is_all };
        if self.consulted.places.len() >= MOST || !outbox.questions.ask(Question::Sniff(opening)) {
            wait.chosen.opinion = Opinion::Nothing;
            self.report.add(Counter::QuestionWaits, 1);
            return outbox.commands.push(Command::Peek { conn });
        }
        self.consulted.next = ticket;
        wait.ticket = ticket;
        self.consulted.places.insert(ticket, place);
    }

    /// The outside's opinion of a connection; of one that is on its way, or gone, it is nothing to anybody.
    pub(super) fn opined(&mut self, ticket: u64, opinion: &Opinion, outbox: &mut Outbox) {
        let Some(place) = self.consulted.places.remove(&ticket) else { return };
        let wait = self.waits.at(place);
        if wait.ticket != ticket {
            return;
        }
        wait.ticket = 0;
        wait.chosen.opinion = opinion.clone();
        let session = &self.sessions[wait.session as usize];
        if session.state == State::Sniffing {
            outbox.push(Command::Peek { conn: session.conns[CLIENT] });
        }
    }

    /// Nobody waits for an answer any more.
    pub(super) fn consult_no_more(&mut self, place: u32) {
        let ticket = std::mem::take(&mut self.waits.at(place).ticket);
        if ticket != 0 {
            self.consulted.places.remove(&ticket);
        }
    }
}
