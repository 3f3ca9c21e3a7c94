//! carrier: makes commands true. The only crate with system calls.

pub mod sim;
