//! tls: what a load core says, sealed. A handshake first, then records around the words of any other speech.
//!
//! Decides how TLS meets [`fourtuple_engine::speech`]: no socket and no thread here. Beside the carriers this is the only
//! crate that needs chance and the time of day, and rustls reads both by itself: `engine` stays without either.

#![forbid(unsafe_code)]

mod client;
mod reasons;
mod secured;

pub use client::{Client, Refused, Settings};
pub use reasons::REASONS;
pub use secured::{Sealed, Secured};
