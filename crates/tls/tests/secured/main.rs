//! Secured speeches against rustls servers that this process is, too: on a line in memory, and in the simulator.

mod memory;
mod peer;
mod simulation;
