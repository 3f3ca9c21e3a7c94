//! fourtuple-registry: services and routes in one memory-mapped file, and which of them a connection means.
//!
//! Decides the file's format (`docs/registry.md`, to the byte), which names and targets there are, and the precedence of
//! routes. Knows no connection and no protocol: what one shows arrives as [`Seen`]. This crate is the only opener of the
//! file, so that one version of LMDB reads and writes it. The file outlives any process: a writer that is killed leaves
//! whole transactions, and readers never wait for writers.

#![forbid(unsafe_op_in_unsafe_fn)]

mod batch;
mod failure;
#[cfg(fuzzing)]
pub mod file;
mod name;
mod reach;
mod record;
mod resolve;
mod route;
mod rows;
mod store;
mod target;

pub use batch::{Batch, Counts, Mode};
pub use failure::{Error, Result};
pub use name::{MOST_NAME_BYTES, Name, Pattern};
pub use reach::{Addresses, Reach};
pub use record::{Delivery, Options, Service, Start};
pub use resolve::{Outcome, Resolved, Seen};
pub use route::{Conditions, PATTERN, PLUGIN, PROTOCOLS, Prefix, Route, Wanted};
pub use rows::{COLUMNS, Format, Rows, write as write_row};
pub use store::{FORMAT, Reader, Sizes, Store};
pub use target::Target;
