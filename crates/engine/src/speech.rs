//! What a load core says on its connections, and what it makes of the answers.
//!
//! Decides the vocabulary between the core, which knows when to speak, and a speech, which knows what. Knows no time, no
//! buffer and no connection. [`Tokens`] is the echo test; [`crate::script::Script`] plays a dialogue.

use std::fmt::Debug;
use std::time::Duration;

use crate::token::{TOKEN_BYTES_MIN, Token};

/// Which part of a speech.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// Once, when the connection stands: what makes it ready.
    Opening,
    /// Each time that somebody asks for a round.
    Round,
}

/// Whose turn it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// Ours.
    Say,
    /// The peer's.
    Listen,
    /// Nobody's for so long; then `waited`.
    Wait(Duration),
    /// Nobody's: the part is over. `refused` when the peer's answer was whole and said no.
    Over {
        /// Whether it was a no.
        refused: bool,
    },
}

/// How a part can fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failing {
    /// The peer said what it should not have.
    Wrong,
    /// Its answer was whole and said no.
    Refused,
    /// It was not over by its deadline.
    Late,
    /// The peer sent FIN in the middle of it.
    Finished,
    /// The connection broke in the middle of it.
    Broke,
}

impl Failing {
    /// Its name among the reasons.
    pub fn name(self) -> &'static str {
        match self {
            Failing::Wrong => "wrong",
            Failing::Refused => "refused",
            Failing::Late => "late",
            Failing::Finished => "finished",
            Failing::Broke => "broke",
        }
    }
}

/// Why openings fail, as far as this crate knows: names that `fourtuple.load` explains.
pub const REASONS: &[&str] = &["wrong", "refused", "late", "finished", "broke", ACCEPT];

/// The answer to a WebSocket's opening does not prove that our key was read (RFC 6455 4.1).
pub(crate) const ACCEPT: &str = "accept";

/// The peer said what it should not have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wrong;

/// What to make of a datagram that is not the answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stray {
    /// It answers something that was said before.
    Late,
    /// The peer said what it should not have, as far as can be told.
    Wrong,
}

/// What is said on every connection of a core.
pub trait Speech: Send + Debug {
    /// How far a connection is; zeros before its first part.
    type Memory: Copy + Default + Debug + Send;

    /// What a buffer holds, told once before anything else.
    fn fit(&mut self, buffer_bytes: usize);
    /// Whether a connection has an opening to play before it counts as ready.
    fn has_opening(&self) -> bool;
    /// Start a part.
    fn begin(&mut self, memory: &mut Self::Memory, part: Part);
    /// Whose turn it is in the part that was begun.
    fn turn(&self, memory: &Self::Memory) -> Turn;
    /// Write what is to be said now, and go on; returns how many bytes. Only when it is our turn, or `owes`.
    fn say(&mut self, memory: &mut Self::Memory, serial: u64, into: &mut [u8]) -> usize;
    /// Hear bytes while it is the peer's turn; returns how many of them were the answer to this turn, at least one.
    fn hear(&mut self, memory: &mut Self::Memory, serial: u64, bytes: &[u8]) -> Result<usize, Wrong>;
    /// Hear a datagram while it is the peer's turn: wanted to its last byte, or a stray that leaves all as it was. `serial`
    /// names the connection in its lower half and the round in its upper half.
    fn hear_datagram(&mut self, memory: &mut Self::Memory, serial: u64, bytes: &[u8]) -> Result<(), Stray>;
    /// The wait that it was the turn for is over.
    fn waited(&mut self, memory: &mut Self::Memory);
    /// Hear bytes while no part is being played, or it is not the peer's turn.
    fn overhear(&mut self, memory: &mut Self::Memory, bytes: &[u8]) -> Result<(), Wrong>;
    /// Whether what was overheard wants an answer.
    fn owes(&self, memory: &Self::Memory) -> bool;

    /// Why the part has failed, once it has: one of `REASONS`, or of another crate's.
    fn why(&self, _memory: &Self::Memory, failing: Failing) -> &'static str {
        failing.name()
    }
    /// Whether it may have a last word. If not, `last_word` is not asked.
    fn has_last_word(&self, _memory: &Self::Memory, _abort: bool) -> bool {
        false
    }
    /// Write what is to be said before a connection is closed (`abort`: with RST); returns how many bytes.
    fn last_word(&mut self, _memory: &mut Self::Memory, _into: &mut [u8]) -> usize {
        0
    }
    /// The connection is over: forget what is kept of it anywhere but in its memory. Once for each that was begun.
    fn end(&mut self, _memory: Self::Memory) {}
}

/// Each round sends the connection's own token and wants the same bytes back.
#[derive(Clone, Copy, Debug)]
pub struct Tokens {
    /// Makes this run's tokens differ from any other's.
    pub seed: u64,
    /// Bytes of a token.
    pub token_bytes: u16,
}

/// Bytes of the token that have come back; 0 is nothing said yet, else one more than that.
#[derive(Clone, Copy, Default, Debug)]
pub struct Returned(u16);

impl Speech for Tokens {
    type Memory = Returned;

    fn fit(&mut self, buffer_bytes: usize) {
        let most = buffer_bytes.min(usize::from(u16::MAX - 1)) as u16;
        self.token_bytes = self.token_bytes.max(TOKEN_BYTES_MIN as u16).min(most);
    }

    fn has_opening(&self) -> bool {
        false
    }

    fn begin(&mut self, memory: &mut Returned, _part: Part) {
        *memory = Returned(0);
    }

    fn turn(&self, memory: &Returned) -> Turn {
        match memory.0 {
            0 => Turn::Say,
            more if more <= self.token_bytes => Turn::Listen,
            _ => Turn::Over { refused: false },
        }
    }

    fn say(&mut self, memory: &mut Returned, serial: u64, into: &mut [u8]) -> usize {
        let length = usize::from(self.token_bytes);
        Token { seed: self.seed, serial }.fill(&mut into[..length]);
        *memory = Returned(1);
        length
    }

    fn hear(&mut self, memory: &mut Returned, serial: u64, bytes: &[u8]) -> Result<usize, Wrong> {
        let returned = usize::from(memory.0 - 1);
        let took = bytes.len().min(usize::from(self.token_bytes) - returned);
        if !(Token { seed: self.seed, serial }).matches(returned, &bytes[..took]) {
            return Err(Wrong);
        }
        memory.0 += took as u16;
        Ok(took)
    }

    fn hear_datagram(&mut self, memory: &mut Returned, serial: u64, bytes: &[u8]) -> Result<(), Stray> {
        let is_token_of = |serial| (Token { seed: self.seed, serial }).matches(0, bytes);
        if bytes.len() != usize::from(self.token_bytes) {
            return Err(Stray::Wrong);
        }
        if is_token_of(serial) {
            *memory = Returned(self.token_bytes + 1);
            return Ok(());
        }
        // The lower half names the connection: of this one, and of another round.
        let said = bytes[8..16].try_into().map_or(0, u64::from_le_bytes);
        let of_this_connection = said as u32 == serial as u32 && is_token_of(said);
        Err(if of_this_connection { Stray::Late } else { Stray::Wrong })
    }

    fn waited(&mut self, _memory: &mut Returned) {}

    fn overhear(&mut self, _memory: &mut Returned, _bytes: &[u8]) -> Result<(), Wrong> {
        Err(Wrong)
    }

    fn owes(&self, _memory: &Returned) -> bool {
        false
    }
}
