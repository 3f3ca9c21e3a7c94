//! PostgreSQL's requests to cancel: a connection of its own that says a key and names no service.
//!
//! Decides where such a request goes. Of connections that the broker relays in the clear it overhears the key
//! (BackendKeyData, "Message Flow"), and remembers whose it is while they live. Of the others, encrypted or handed over, it
//! knows only that they are there: a request with a key that nobody knows goes to each PostgreSQL service to which its
//! source has lately been brought. A wrong key is ignored by PostgreSQL (`processCancelRequest`).
//!
//! One table for all workers of an engine, for a request may come to another worker than its connection did. Locked when
//! a PostgreSQL connection begins or ends, never per byte.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fourtuple_engine::broker::guide::{Address, Chosen, Delivery, Errand, Shown};

/// Keys remembered at once. Connections beyond are as if encrypted.
const MOST_KEYS: usize = 65_536;
/// Sources in each of two generations, and services of each source: so many connections can one request become.
const MOST_SOURCES: usize = 16_384;
const MOST_PLACES: usize = 8;
/// What a server says before it is ready: settings, notices, questions for passwords.
const HEARD_MOST: u32 = 65_536;
/// The secret has up to 256 bytes, behind the number of a process (protocol 3.2).
const KEY_BYTES: std::ops::RangeInclusive<usize> = 8..=4 + 256;

/// Where a PostgreSQL service is, as far as a request to cancel needs it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    service: String,
    address: Address,
    delivery: Delivery,
    /// Version of the PROXY header that it wants.
    pub(crate) proxy: Option<u8>,
}

/// Whose keys are whose, for all workers.
#[derive(Default, Debug)]
pub struct Cancels(Mutex<Tables>);

#[derive(Default, Debug)]
struct Tables {
    keys: HashMap<Box<[u8]>, Arc<Place>>,
    /// The latest services last. When the new generation is full it becomes the old one.
    new: HashMap<IpAddr, VecDeque<Arc<Place>>>,
    old: HashMap<IpAddr, VecDeque<Arc<Place>>>,
}

/// What is overheard of one connection.
#[derive(Debug)]
pub(crate) struct Overheard {
    place: Arc<Place>,
    /// Once it is known.
    key: Option<Box<[u8]>>,
    messages: Messages,
}

/// The beginning of what a server says, read as far as its key.
#[derive(Default, Debug)]
pub struct Messages {
    /// Type and length of the message that has begun, and its content if that is a key.
    head: Vec<u8>,
    /// Bytes of it that do not matter.
    skip: usize,
    heard: u32,
}

/// How far that is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Told<'a> {
    /// No key yet.
    More,
    /// The key: process and secret.
    Key(&'a [u8]),
    /// There will be none.
    Nothing,
}

impl Messages {
    /// Read on; after `Key` or `Nothing` nothing more is to be read.
    pub fn read(&mut self, mut said: &[u8]) -> Told<'_> {
        self.heard = self.heard.saturating_add(said.len() as u32);
        loop {
            let skipped = self.skip.min(said.len());
            (self.skip, said) = (self.skip - skipped, &said[skipped..]);
            if said.is_empty() {
                return if self.heard > HEARD_MOST { Told::Nothing } else { Told::More };
            }
            self.head.push(said[0]);
            said = &said[1..];
            let Some((&kind, length)) = self.head.split_first() else { continue };
            let Some((length, key)) = length.split_first_chunk() else { continue };
            // The length counts itself.
            let Some(content) = (u32::from_be_bytes(*length) as usize).checked_sub(4) else { return Told::Nothing };
            match kind {
                b'K' if !KEY_BYTES.contains(&content) => return Told::Nothing,
                b'K' if key.len() < content => {}
                b'K' => return Told::Key(&self.head[5..]),
                // ReadyForQuery, ErrorResponse: it is past, or there will be none.
                b'Z' | b'E' => return Told::Nothing,
                _ => (self.skip, self.head) = (content, Vec::new()),
            }
        }
    }
}

impl Place {
    /// Of a service that has been chosen.
    pub(crate) fn of(chosen: &Chosen, proxy: Option<u8>) -> Place {
        let Chosen { service, address, delivery, .. } = chosen;
        Place { service: service.clone(), address: address.clone(), delivery: *delivery, proxy }
    }
}

impl Overheard {
    /// A connection that is relayed in the clear.
    pub(crate) fn at(place: Place) -> Overheard {
        Overheard { place: Arc::new(place), key: None, messages: Messages::default() }
    }
}

impl Cancels {
    /// A connection from `source` is brought there.
    pub(crate) fn brought(&self, source: Option<SocketAddr>, place: Place) {
        let Some(source) = source else { return };
        let mut tables = self.lock();
        let source = source.ip().to_canonical();
        let mut places = tables.new.remove(&source).or_else(|| tables.old.remove(&source)).unwrap_or_default();
        let known = places.iter().position(|other| **other == place);
        let place = known.and_then(|at| places.remove(at)).unwrap_or_else(|| Arc::new(place));
        if places.len() >= MOST_PLACES {
            places.pop_front();
        }
        places.push_back(place);
        if tables.new.len() >= MOST_SOURCES {
            tables.old = std::mem::take(&mut tables.new);
        }
        tables.new.insert(source, places);
    }

    /// Where a request goes: the last of these, and before it to the others. `key` is process and secret.
    fn places(&self, source: Option<SocketAddr>, key: &[u8]) -> Vec<Arc<Place>> {
        let tables = self.lock();
        if let Some(place) = tables.keys.get(key) {
            return vec![place.clone()];
        }
        let Some(source) = source.map(|source| source.ip().to_canonical()) else { return Vec::new() };
        let found = tables.new.get(&source).or_else(|| tables.old.get(&source));
        let mut places: Vec<_> = found.into_iter().flatten().cloned().collect();
        // The client's own socket can be handed over once, and last.
        places.sort_by_key(|place| place.delivery != Delivery::Relay);
        let first = places.iter().position(|place| place.delivery != Delivery::Relay);
        places.truncate(first.map_or(places.len(), |first| first + 1));
        places
    }

    /// Choose where a request goes; false if nobody knows. `preface` makes the PROXY header of a version.
    pub(crate) fn choose(
        &self,
        shown: &Shown<'_>,
        (key, skip): (&[u8], usize),
        chosen: &mut Chosen,
        preface: impl Fn(u8) -> Vec<u8>,
    ) -> bool {
        let places = self.places(shown.names.map(|(peer, _)| peer), key);
        let Some((last, others)) = places.split_last() else { return false };
        let begin = |place: &Place| place.proxy.map_or_else(Vec::new, &preface);
        let request = &shown.bytes[skip..];
        for place in others {
            let say = [begin(place), request.to_vec()].concat();
            chosen.errands.push(Errand { address: place.address.clone(), say });
        }
        (chosen.service, chosen.address) = (last.service.clone(), last.address.clone());
        (chosen.delivery, chosen.preface) = (last.delivery, begin(last));
        // A service that is full is one where something is to be cancelled.
        chosen.most_connections = Some(0);
        true
    }

    /// Its server has said this; whether more is wanted.
    pub(crate) fn said(&self, connection: &mut Overheard, said: &[u8]) -> bool {
        let key: Box<[u8]> = match connection.messages.read(said) {
            Told::More => return true,
            Told::Nothing => return false,
            Told::Key(key) => key.into(),
        };
        let mut tables = self.lock();
        if tables.keys.len() < MOST_KEYS {
            tables.keys.insert(key.clone(), connection.place.clone());
            connection.key = Some(key);
        }
        false
    }

    /// It has ended.
    pub(crate) fn forget(&self, connection: Overheard) {
        let Some(key) = connection.key else { return };
        let mut tables = self.lock();
        if tables.keys.get(&key).is_some_and(|place| Arc::ptr_eq(place, &connection.place)) {
            tables.keys.remove(&key);
        }
    }

    /// Nothing of what is done under the lock can leave a table half changed.
    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
