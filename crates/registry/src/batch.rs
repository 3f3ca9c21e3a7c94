//! Many services in one transaction: sorted, so that pages are written once and in order.
//!
//! Decides the order of the writes and what happens to names that are there already. A batch is kept whole or not at all.

use heed::PutFlags;

use crate::failure::{Error, Result};
use crate::record::{Service, wide_port};
use crate::store::Store;

/// What happens to a name that is there already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// It is an error, and nothing of the batch is kept.
    Add,
    /// It is replaced; of several in a batch the last is kept.
    Set,
}

/// What a batch did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Names that were new.
    pub added: u64,
    /// Names that were there.
    pub replaced: u64,
}

/// Services that wait for their transaction, encoded.
#[derive(Default)]
pub struct Batch {
    bytes: Vec<u8>,
    rows: Vec<Row>,
}

struct Row {
    /// The first bytes of the name, so that most comparisons touch nothing else.
    head: u64,
    start: u64,
    name: u8,
    value: u16,
}

impl Batch {
    /// Take one more.
    pub fn push(&mut self, service: &Service) {
        let start = self.bytes.len();
        self.bytes.extend(service.name.bytes());
        let middle = self.bytes.len();
        service.encode(&mut self.bytes);
        let mut head = [0; 8];
        let shared = service.name.len().min(8);
        head[..shared].copy_from_slice(&service.name.as_bytes()[..shared]);
        self.rows.push(Row {
            head: u64::from_be_bytes(head),
            start: start as u64,
            name: (middle - start) as u8,
            value: (self.bytes.len() - middle) as u16,
        });
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Forget them.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.rows.clear();
    }

    /// Write them, durably, and forget them. After an error the store is as it was, and the batch is empty too.
    pub fn commit(&mut self, store: &Store, mode: Mode) -> Result<Counts> {
        if self.is_empty() {
            return Ok(Counts::default());
        }
        let done = self.sort(mode).and_then(|()| self.write(store, mode));
        self.clear();
        done
    }

    /// In the order of names, each once.
    fn sort(&mut self, mode: Mode) -> Result<()> {
        let bytes = &self.bytes;
        // Stable: of equal names the later one stays later.
        self.rows.sort_by(|one, other| one.head.cmp(&other.head).then_with(|| one.name(bytes).cmp(other.name(bytes))));
        let same = |one: &Row, other: &Row| one.head == other.head && one.name(bytes) == other.name(bytes);
        if mode == Mode::Add {
            return match self.rows.windows(2).find(|pair| same(&pair[0], &pair[1])) {
                Some(pair) => Err(there(pair[0].name(bytes))),
                None => Ok(()),
            };
        }
        self.rows.dedup_by(|later, earlier| {
            let twice = same(later, earlier);
            if twice {
                std::mem::swap(later, earlier);
            }
            twice
        });
        Ok(())
    }

    fn write(&self, store: &Store, mode: Mode) -> Result<Counts> {
        let (services, wide_ports, bytes) = (store.services, store.wide_ports, &self.bytes);
        store.change(|txn| {
            let mut counts = Counts::default();
            let last = services.last(txn)?.map(|(name, _)| name.to_vec()).unwrap_or_default();
            let within = self.rows.partition_point(|row| row.name(bytes) <= &*last);
            for row in &self.rows[..within] {
                let (name, value) = (row.name(bytes), row.value(bytes));
                let Some(port) = services.get_or_put(txn, name, value)?.map(wide_port) else {
                    counts.added += 1;
                    continue;
                };
                if mode == Mode::Add {
                    return Ok(Err(there(name)));
                }
                if let Some(port) = port {
                    wide_ports.delete(txn, &port.to_be_bytes())?;
                }
                services.put(txn, name, value)?;
                counts.replaced += 1;
            }
            for row in &self.rows[within..] {
                // Behind all that is there: pages are filled to the brim, and nothing is searched.
                services.put_with_flags(txn, PutFlags::APPEND, row.name(bytes), row.value(bytes))?;
                counts.added += 1;
            }
            // When all old ones have gone, so that services of one batch may exchange theirs.
            let ports = self.rows.iter().filter_map(|row| Some((wide_port(row.value(bytes))?, row.name(bytes))));
            let mut ports: Vec<_> = ports.collect();
            ports.sort_unstable();
            let last = wide_ports.last(txn)?.and_then(|(port, _)| port.try_into().ok()).map(u32::from_be_bytes);
            let mut before = last;
            for (port, name) in ports {
                let key = port.to_be_bytes();
                let taken = if before.is_none_or(|before| before < port) {
                    wide_ports.put_with_flags(txn, PutFlags::APPEND, &key, name)?;
                    before = Some(port);
                    None
                } else {
                    wide_ports.get_or_put(txn, &key, name)?
                };
                if let Some(owner) = taken {
                    let (owner, name) = (String::from_utf8_lossy(owner), String::from_utf8_lossy(name));
                    return Ok(Err(Error::bad("wide_port", format!("{port} of {name} belongs to {owner} already"))));
                }
            }
            Ok(Ok(counts))
        })
    }
}

impl Row {
    fn name<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        let start = self.start as usize;
        &bytes[start..start + usize::from(self.name)]
    }

    fn value<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        let start = self.start as usize + usize::from(self.name);
        &bytes[start..start + usize::from(self.value)]
    }
}

fn there(name: &[u8]) -> Error {
    Error::bad("name", format!("{} is there already; set replaces it", String::from_utf8_lossy(name)))
}
