//! Where the targets of all services lie, in one walk: what a broker that is confined is left (a million take some 0.03 s),
//! and what another process may connect to for it.
//!
//! Decides what of a target counts: the folder of a unix socket, the port of a TCP target, that a name is abstract; or the
//! address with the port. Reads values as they lie in the file, without making services of them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use crate::record::{self, Lying};

/// Where targets lie.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// That hold unix sockets; of a path with a placeholder, the folder before the first.
    pub folders: BTreeSet<String>,
    /// Of TCP targets, in order.
    pub ports: Vec<u16>,
    /// Whether any is an abstract unix name.
    pub is_abstract: bool,
}

/// While values are looked at.
pub(crate) struct Walk {
    found: Reach,
    /// The bytes of the last folder, with its slash: most services lie beside another.
    last: Vec<u8>,
    ports: Vec<u64>,
    seen: u64,
}

impl Walk {
    pub(crate) fn new() -> Walk {
        Walk { found: Reach::default(), last: Vec::new(), ports: vec![0; 1 << 10], seen: 0 }
    }

    /// Look at one service; None if no `encode` wrote it.
    pub(crate) fn look(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        self.seen += 1;
        if record::plain_path(value).is_some_and(|path| self.is_beside_last(path)) {
            return Some(());
        }
        match record::lying(value)? {
            Lying::Port(port) => self.note(port),
            Lying::Address(packed) => self.note(u16::from_be_bytes(*packed.first_chunk()?)),
            Lying::Path([b'@', ..]) => self.found.is_abstract = true,
            Lying::Path(path) => {
                let fixed = path.split(|byte| *byte == b'{').next().unwrap_or(path);
                let folder = &fixed[..fixed.iter().rposition(|byte| *byte == b'/')?];
                // A NUL stands for the name, which has no slash.
                let text = String::from_utf8_lossy(folder).replace('\0', std::str::from_utf8(key).ok()?);
                self.found.folders.insert(if text.is_empty() { "/".to_owned() } else { text });
                self.last.clear();
                if !folder.contains(&0) {
                    self.last.extend(&fixed[..=folder.len()]);
                }
            }
        }
        Some(())
    }

    /// Whether a path lies in the last folder: its name may have a NUL or a placeholder in it, but no slash.
    fn is_beside_last(&self, path: &[u8]) -> bool {
        // Every byte is looked at, so that there is no branch for each.
        let has_slash = |name: &[u8]| name.iter().fold(false, |found, byte| found | (*byte == b'/'));
        !self.last.is_empty() && path.strip_prefix(&*self.last).is_some_and(|name| !has_slash(name))
    }

    fn note(&mut self, port: u16) {
        self.ports[usize::from(port >> 6)] |= 1 << (port & 63);
    }

    /// How many services it has looked at.
    pub(crate) fn seen(&self) -> u64 {
        self.seen
    }

    pub(crate) fn end(mut self) -> Reach {
        const ALL: RangeInclusive<u16> = 0..=u16::MAX;
        self.found.ports = ALL.filter(|port| self.ports[usize::from(port >> 6)] & 1 << (port & 63) != 0).collect();
        self.found
    }
}

/// Addresses and ports that TCP targets name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Each as it lies in the file, a port before an address; in order, no two alike.
    v4: Vec<[u8; 6]>,
    v6: Vec<[u8; 18]>,
}

impl Addresses {
    /// Whether some target is there.
    #[must_use]
    pub fn contain(&self, address: IpAddr, port: u16) -> bool {
        let port = port.to_be_bytes();
        match address {
            IpAddr::V4(address) => self.v4.binary_search(&packed(port, address.octets())).is_ok(),
            IpAddr::V6(address) => self.v6.binary_search(&packed(port, address.octets())).is_ok(),
        }
    }

    /// Look at one service; None if no `encode` wrote it.
    pub(crate) fn look(&mut self, value: &[u8]) -> Option<()> {
        if let Lying::Address(packed) = record::lying(value)? {
            match packed.try_into() {
                Ok(v4) => self.v4.push(v4),
                Err(_) => self.v6.push(packed.try_into().ok()?),
            }
        }
        Some(())
    }

    pub(crate) fn end(mut self) -> Addresses {
        self.v4.sort_unstable();
        self.v4.dedup();
        self.v6.sort_unstable();
        self.v6.dedup();
        self
    }
}

fn packed<const HOST: usize, const ALL: usize>(port: [u8; 2], host: [u8; HOST]) -> [u8; ALL] {
    let mut whole = [0; ALL];
    whole[..2].copy_from_slice(&port);
    whole[2..].copy_from_slice(&host);
    whole
}
