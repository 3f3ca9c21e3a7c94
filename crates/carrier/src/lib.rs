//! carrier: makes commands true and tells what happened. The only crate of ours, besides the binding, that makes system
//! calls; it decides nothing about connections (the cores of `fourtuple-engine` do) and knows no Python.
//!
//! Three carriers pass one conformance suite (`tests/conformance.rs`): [`uring`] (direct descriptors, so that
//! RLIMIT_NOFILE bounds a ring and not the process), [`epoll`] (plain descriptors, where io_uring is absent or refused)
//! and [`sim`] (seeded, virtual clock). [`worker`] runs one of the first two in a thread of its own.

// A carrier is the shell around the pure cores: clocks, sockets and threads are its trade (clippy.toml bans them elsewhere).
#![allow(clippy::disallowed_methods)]

mod datagram;
pub mod epoll;
mod ferries;
mod letterbox;
mod messenger;
mod shelf;
pub mod sim;
mod sys;
pub mod uring;
pub mod worker;

pub use letterbox::Letterbox;
pub use shelf::Shelf;
pub use uring::{UringAbilities, probe_uring};
pub use worker::{CarrierKind, CarrierReport, CarrierSettings, Doors, Published, Worker, WorkerError};
