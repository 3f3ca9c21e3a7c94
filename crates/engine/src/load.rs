//! The load core: connect, hold, ping, close. Chooses tuples and checks tokens; knows no socket.

use std::time::Duration;

use crate::contract::SourceChoice;
use crate::space::Space;

/// What a load core is to do.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// All tuples of the engine; this core uses every `stride`-th from `first`, so that workers never meet.
    pub space: Space,
    /// First index of this worker's share.
    pub first: u64,
    /// Number of workers that share the space.
    pub stride: u64,
    /// Connections that this core is to hold.
    pub connections: u64,
    /// How the local endpoint comes about. For the kernel's choices the space is walked over sources and destinations
    /// only, each pair until the kernel says EADDRNOTAVAIL.
    pub choice: SourceChoice,
    /// Attempts under way at once, at most.
    pub window: u32,
    /// New connections per second; 0 is as fast as possible.
    pub rate_per_s: u32,
    /// After this an attempt is given up (ETIMEDOUT).
    pub connect_timeout: Duration,
    /// After this a token that has not come back is missing.
    pub ping_timeout: Duration,
    /// Tokens under way at once, at most.
    pub ping_window: u32,
    /// Bytes of a token, 16 to the size of a buffer: (serial, seed) and then a pattern of both.
    pub token_bytes: u32,
    /// Makes this run's tokens differ from any other's.
    pub seed: u64,
    /// Ping every connection at this interval while holding; zero is never.
    pub ping_every: Duration,
    /// Stop making connections after this many failures in a row that say that a limit is reached (EMFILE, ENFILE, ENOMEM,
    /// ENOBUFS, EADDRNOTAVAIL, EADDRINUSE, timeouts ...). A busy tuple of a chosen port does not count as long as others are left.
    pub give_up_after: u32,
    /// Close with RST instead of FIN.
    pub abort_on_close: bool,
    /// Keep `Report::fill_curve`.
    pub keep_fill_curve: bool,
}
