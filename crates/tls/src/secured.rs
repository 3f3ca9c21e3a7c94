//! Any speech, sealed: an opening is the handshake and then the other speech's opening, a round travels in records.
//!
//! Decides when a connection is ready, and what of TLS is kept for it: a session, a record that is not whole yet, bytes
//! that wait to be said. Knows neither carrier nor time. Sessions lie here and not in a connection's memory, which is
//! copied at every turn; each is made in `begin` and forgotten in `end`.

use std::fmt;

use fourtuple_engine::speech::{Failing, Part, Speech, Stray, Turn, Wrong};
use rustls::client::UnbufferedClientConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus};

use crate::client::Client;
use crate::reasons;

/// Another speech within TLS.
#[derive(Debug)]
pub struct Secured<S: Speech> {
    inner: S,
    client: Client,
    sessions: Vec<Option<Box<Session>>>,
    /// Places in `sessions` that nobody uses.
    free: Vec<u32>,
    /// What the inner speech says, for the moment of sealing it.
    said: Vec<u8>,
    /// What came, for the moment of opening it.
    came: Vec<u8>,
}

/// Where a connection's session lies, and how far the inner speech is.
#[derive(Clone, Copy, Default, Debug)]
pub struct Sealed<M> {
    /// One more than the place in `sessions`; 0 is none.
    place: u32,
    inner: M,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Handshaking,
    /// Ready, and the inner speech has begun nothing.
    Quiet,
    /// The inner speech has begun a part, which may be over.
    Speaking,
}

struct Session {
    tls: UnbufferedClientConnection,
    /// The beginning of a record, or of a message in several records.
    incomplete: Vec<u8>,
    /// Sealed, and not handed to the core yet.
    waiting: Vec<u8>,
    serial: u64,
    stage: Stage,
    /// The peer has said that nothing more follows.
    ended: bool,
    broken: Option<&'static str>,
}

impl<S: Speech> Secured<S> {
    /// This speech within sessions of that client.
    pub fn new(inner: S, client: Client) -> Secured<S> {
        Secured { inner, client, sessions: Vec::new(), free: Vec::new(), said: Vec::new(), came: Vec::new() }
    }

    /// Sessions kept now.
    pub fn sessions(&self) -> usize {
        self.sessions.len() - self.free.len()
    }

    fn session(&self, memory: &Sealed<S::Memory>) -> Option<&Session> {
        self.sessions.get((memory.place as usize).checked_sub(1)?)?.as_deref()
    }

    fn open(&mut self, memory: &mut Sealed<S::Memory>) {
        // The client began one when it was made; a failure now (no chance to be had) leaves a connection without.
        let Ok(tls) = self.client.begin() else { return };
        let mut session = Box::new(Session {
            tls,
            incomplete: Vec::new(),
            waiting: Vec::new(),
            serial: 0,
            stage: Stage::Handshaking,
            ended: false,
            broken: None,
        });
        session.write(Words::None);
        let place = self.free.pop().unwrap_or_else(|| {
            self.sessions.push(None);
            self.sessions.len() as u32 - 1
        });
        self.sessions[place as usize] = Some(session);
        memory.place = place + 1;
    }

    fn take_in(&mut self, memory: &mut Sealed<S::Memory>, bytes: &[u8]) -> Result<(), Wrong> {
        let Secured { inner, sessions, came, .. } = self;
        let session = session_mut(sessions, memory).ok_or(Wrong)?;
        if session.ended {
            return Ok(());
        }
        came.clear();
        came.extend_from_slice(&session.incomplete);
        came.extend_from_slice(bytes);
        let (took, heard) = session.read(came, inner, &mut memory.inner);
        session.incomplete = if session.ended { Vec::new() } else { came[took..].to_vec() };
        heard
    }
}

/// What to seal.
#[derive(Clone, Copy)]
enum Words<'a> {
    /// Only what TLS itself has to say.
    None,
    Some(&'a [u8]),
    /// That nothing more follows (RFC 8446 6.1).
    Last,
}

impl Session {
    /// Open what came, and let the inner speech hear it; returns how many bytes are done with.
    fn read<S: Speech>(
        &mut self,
        came: &mut [u8],
        inner: &mut S,
        memory: &mut S::Memory,
    ) -> (usize, Result<(), Wrong>) {
        let mut took = 0;
        loop {
            let UnbufferedStatus { mut discard, state } = self.tls.process_tls_records(&mut came[took..]);
            // Whether to go on.
            let mut heard = Ok(true);
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    self.stage = self.stage.readied(inner, memory);
                    while let Some(Ok(record)) = traffic.next_record() {
                        discard += record.discard;
                        // The first word that is wrong is the last one heard; the records behind it are taken all the same.
                        if heard.is_ok() {
                            heard = hear(self.stage, self.serial, record.payload, inner, memory).map(|()| true);
                        }
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    encode(&mut self.waiting, &mut data);
                }
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::PeerClosed) => {
                    self.ended = true;
                    if self.stage == Stage::Handshaking {
                        self.broken = Some(reasons::FINISHED);
                        heard = Err(Wrong);
                    }
                }
                Ok(ConnectionState::WriteTraffic(_)) => {
                    self.stage = self.stage.readied(inner, memory);
                    heard = Ok(false);
                }
                Ok(_) => heard = Ok(false),
                // Then once more: TLS's answer to an error is an alert.
                Err(error) if self.broken.is_none() => {
                    self.broken = Some(reasons::of(&error, self.stage == Stage::Handshaking));
                }
                Err(_) => heard = Ok(false),
            }
            took += discard;
            match heard {
                Ok(true) => {}
                Ok(false) => return (took, self.broken.map_or(Ok(()), |_| Err(Wrong))),
                Err(wrong) => return (took, Err(wrong)),
            }
        }
    }

    /// Seal words, behind what waits already.
    fn write(&mut self, words: Words<'_>) {
        loop {
            let UnbufferedStatus { discard, state } = self.tls.process_tls_records(&mut self.incomplete);
            let more = match state {
                Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut self.waiting, &mut data),
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    true
                }
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    let sealed = match words {
                        Words::None => true,
                        Words::Some(bytes) => append(&mut self.waiting, bytes.len() + RECORD_ROOM, |into| {
                            traffic.encrypt(bytes, into).map_err(room_for_records)
                        }),
                        Words::Last => append(&mut self.waiting, RECORD_ROOM, |into| {
                            traffic.queue_close_notify(into).map_err(room_for_records)
                        }),
                    };
                    if !sealed {
                        self.broken = Some(reasons::BROKEN);
                    }
                    false
                }
                _ => false,
            };
            self.incomplete.drain(..discard);
            if !more {
                return;
            }
        }
    }
}

impl Stage {
    /// The handshake is over: the inner speech begins, if it has an opening.
    fn readied<S: Speech>(self, inner: &mut S, memory: &mut S::Memory) -> Stage {
        match self {
            Stage::Handshaking if inner.has_opening() => {
                inner.begin(memory, Part::Opening);
                Stage::Speaking
            }
            Stage::Handshaking => Stage::Quiet,
            same => same,
        }
    }
}

impl<S: Speech> Speech for Secured<S> {
    type Memory = Sealed<S::Memory>;

    fn fit(&mut self, buffer_bytes: usize) {
        self.inner.fit(buffer_bytes);
        self.said = vec![0; buffer_bytes];
    }

    fn has_opening(&self) -> bool {
        true
    }

    fn begin(&mut self, memory: &mut Self::Memory, part: Part) {
        match part {
            Part::Opening => self.open(memory),
            Part::Round => {
                self.inner.begin(&mut memory.inner, Part::Round);
                if let Some(session) = session_mut(&mut self.sessions, memory) {
                    session.stage = Stage::Speaking;
                }
            }
        }
    }

    fn turn(&self, memory: &Self::Memory) -> Turn {
        match self.session(memory) {
            Some(session) if !session.waiting.is_empty() => Turn::Say,
            Some(Session { broken: None, stage, .. }) => match stage {
                Stage::Handshaking => Turn::Listen,
                Stage::Quiet => Turn::Over { refused: false },
                Stage::Speaking => self.inner.turn(&memory.inner),
            },
            _ => Turn::Over { refused: true },
        }
    }

    fn say(&mut self, memory: &mut Self::Memory, serial: u64, into: &mut [u8]) -> usize {
        let Some(session) = session_mut(&mut self.sessions, memory) else { return 0 };
        session.serial = serial;
        if session.waiting.is_empty() {
            let length = self.inner.say(&mut memory.inner, serial, &mut self.said);
            session.write(Words::Some(&self.said[..length]));
        }
        session.hand_over(into)
    }

    fn hear(&mut self, memory: &mut Self::Memory, _serial: u64, bytes: &[u8]) -> Result<usize, Wrong> {
        self.take_in(memory, bytes).map(|()| bytes.len())
    }

    fn overhear(&mut self, memory: &mut Self::Memory, bytes: &[u8]) -> Result<(), Wrong> {
        self.take_in(memory, bytes)
    }

    /// TLS is for streams: no datagram is ever given here.
    fn hear_datagram(&mut self, _memory: &mut Self::Memory, _serial: u64, _bytes: &[u8]) -> Result<(), Stray> {
        Err(Stray::Wrong)
    }

    fn waited(&mut self, memory: &mut Self::Memory) {
        self.inner.waited(&mut memory.inner);
    }

    fn owes(&self, memory: &Self::Memory) -> bool {
        self.session(memory).is_some_and(|session| {
            !session.waiting.is_empty()
                || (session.stage == Stage::Speaking && session.broken.is_none() && self.inner.owes(&memory.inner))
        })
    }

    fn why(&self, memory: &Self::Memory, failing: Failing) -> &'static str {
        let Some(session) = self.session(memory) else { return reasons::BROKEN };
        match (session.broken, session.stage, failing) {
            (Some(reason), _, _) => reason,
            (None, Stage::Handshaking, Failing::Late) => reasons::LATE,
            (None, Stage::Handshaking, Failing::Finished) => reasons::FINISHED,
            (None, Stage::Handshaking, Failing::Broke) => reasons::BROKE,
            (None, Stage::Handshaking, _) => reasons::BROKEN,
            (None, _, _) => self.inner.why(&memory.inner, failing),
        }
    }

    /// An alert, or that nothing more follows; the latter is lost on a peer that is sent an RST.
    fn has_last_word(&self, memory: &Self::Memory, abort: bool) -> bool {
        self.session(memory).is_some_and(|session| match session.broken {
            Some(_) => !session.waiting.is_empty(),
            None => !abort && session.waiting.is_empty() && session.stage != Stage::Handshaking,
        })
    }

    fn last_word(&mut self, memory: &mut Self::Memory, into: &mut [u8]) -> usize {
        let Some(session) = session_mut(&mut self.sessions, memory) else { return 0 };
        if session.broken.is_none() {
            session.write(Words::Last);
        }
        session.hand_over(into)
    }

    fn end(&mut self, memory: Self::Memory) {
        if let Some(place) = memory.place.checked_sub(1) {
            self.sessions[place as usize] = None;
            self.free.push(place);
        }
    }
}

impl Session {
    /// As much of what waits as there is room for.
    fn hand_over(&mut self, into: &mut [u8]) -> usize {
        let length = self.waiting.len().min(into.len());
        into[..length].copy_from_slice(&self.waiting[..length]);
        if length == self.waiting.len() {
            self.waiting = Vec::new();
        } else {
            self.waiting.drain(..length);
        }
        length
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Session")
            .field("stage", &self.stage)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

/// What a record adds to its words, whatever the version and cipher: a header of 5, a nonce of 8, a type, a tag of 16.
const RECORD_ROOM: usize = 64;
/// Room for a message of the handshake; most are smaller.
const MESSAGE_ROOM: usize = 512;

fn session_mut<'a, M>(sessions: &'a mut [Option<Box<Session>>], memory: &Sealed<M>) -> Option<&'a mut Session> {
    sessions.get_mut((memory.place as usize).checked_sub(1)?)?.as_deref_mut()
}

fn hear<S: Speech>(
    stage: Stage,
    serial: u64,
    bytes: &[u8],
    inner: &mut S,
    memory: &mut S::Memory,
) -> Result<(), Wrong> {
    let mut rest = bytes;
    while !rest.is_empty() {
        if stage != Stage::Speaking || inner.turn(memory) != Turn::Listen {
            return inner.overhear(memory, rest);
        }
        rest = &rest[inner.hear(memory, serial, rest)?..];
    }
    Ok(())
}

fn encode<D>(waiting: &mut Vec<u8>, data: &mut EncodeTlsData<'_, D>) -> bool {
    append(waiting, MESSAGE_ROOM, |into| {
        data.encode(into).map_err(|error| match error {
            EncodeError::InsufficientSize(size) => size.required_size,
            EncodeError::AlreadyEncoded => 0,
        })
    })
}

fn room_for_records(error: EncryptError) -> usize {
    match error {
        EncryptError::InsufficientSize(size) => size.required_size,
        EncryptError::EncryptExhausted => 0,
    }
}

/// Write behind what is there, in `room` bytes or in as many as `write` says it needs; false if it cannot be done.
fn append(waiting: &mut Vec<u8>, room: usize, mut write: impl FnMut(&mut [u8]) -> Result<usize, usize>) -> bool {
    let start = waiting.len();
    let mut room = room;
    loop {
        waiting.resize(start + room, 0);
        match write(&mut waiting[start..]) {
            Ok(length) => {
                waiting.truncate(start + length);
                return true;
            }
            Err(needed) if needed > room => room = needed,
            Err(_) => {
                waiting.truncate(start);
                return false;
            }
        }
    }
}
