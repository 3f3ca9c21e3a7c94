//! engine: cores decide, carriers carry. No socket, clock, thread or random number in this crate.
//!
//! A **core** is a state machine over connections: it is told what happened ([`Event`]) and says what to do
//! ([`Command`]), with the time as an argument. A **carrier** is whatever makes that true: io_uring, epoll, or a seeded
//! simulator. Both meet in [`contract`], and nothing else of one is visible to the other.

#![forbid(unsafe_code)]

pub mod broker;
pub mod buffers;
pub mod contract;
pub mod echo;
pub mod histogram;
pub mod load;
mod pages;
pub mod questions;
pub mod report;
pub mod script;
pub mod space;
pub mod speech;
pub mod token;
mod walk;
mod window;

pub use buffers::{Buf, Buffers};
pub use contract::{
    Carrier, CarrierError, Command, ConnId, Core, Errno, Event, Given, Instant, ListenerId, Order, Outbox,
    SourceChoice, Step, Target, Transport, Until,
};
pub use questions::{Answer, Busy, By, Filter, Opening, Question, Questions, Seen, Usage};
