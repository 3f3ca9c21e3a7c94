//! The echo core: listen, accept, send back what came. Bounded: reads from a slow peer are paused, never buffered.

use std::net::SocketAddr;

/// What an echo core is to do.
#[derive(Clone, Debug)]
pub struct EchoConfig {
    /// Where to listen; many, if many are asked for.
    pub listen: Vec<SocketAddr>,
    /// As for listen(2).
    pub backlog: u32,
    /// SO_REUSEPORT on every listener (more than one worker on the same endpoints).
    pub reuse_port: bool,
    /// Accept no more than this many at once; 0 is no bound of its own.
    pub most_connections: u64,
    /// If false, listen and never accept: what the accept queue alone holds (catalogue D1).
    pub accept: bool,
}
