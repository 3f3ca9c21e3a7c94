//! broker: what the broker core asks and is told. A guide made of the sniffers and the registry, and a ledger in a file.
//!
//! Decides how what a connection shows becomes a question to the registry, and the form of an entry. Knows no socket: the
//! core (`fourtuple-engine`) decides when to ask, the carriers move the bytes.

#![forbid(unsafe_code)]
// The ledger keeps wall-clock time, and a thread that writes (clippy.toml bans both in cores).
#![allow(clippy::disallowed_methods)]

pub mod cancel;
pub mod door;
mod guide;
mod ledger;

pub use guide::{BrokerGuide, Fallback, Looking, Manners, PostgresTls, Rules};
pub use ledger::LedgerFile;

/// A folder of a test, gone with it.
#[cfg(test)]
struct Folder(std::path::PathBuf);

#[cfg(test)]
impl Folder {
    fn new() -> Folder {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("fourtuple-broker-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn path(&self) -> &std::path::Path {
        &self.0
    }
}

#[cfg(test)]
impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}
