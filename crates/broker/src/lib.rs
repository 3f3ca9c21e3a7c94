//! broker: what the broker core asks and is told. A guide made of the sniffers and the registry, and a ledger in a file.
//!
//! Decides how what a connection shows becomes a question to the registry, and the form of an entry. Knows no socket: the
//! core (`fourtuple-engine`) decides when to ask, the carriers move the bytes.

#![forbid(unsafe_code)]
// The ledger keeps wall-clock time, and a thread that writes (clippy.toml bans both in cores).
#![allow(clippy::disallowed_methods)]

mod guide;
mod ledger;

pub use guide::{BrokerGuide, Fallback};
pub use ledger::LedgerFile;
