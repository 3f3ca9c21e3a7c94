//! What `fourtuple run` loads into a program, for two ends.
//!
//! Connections: connect(), bind() and getsockname() of TCP sockets, done as a program does them that knows about the
//! tuple space. Steps in for a TCP socket that names no local port itself. Reads `FOURTUPLE_SOURCES`, `FOURTUPLE_PORTS`.
//!
//! Listeners: bind(), listen(), accept(), accept4(), getsockname(), getsockopt() and setsockopt(), so that a listener
//! gets its clients from a broker (docs/handoff.md). Steps in for one that `FOURTUPLE_HANDOFF` names.
//!
//! Decides, per call, whether to step in; on any doubt the call goes on as it came. Does not know UDP, nor programs that
//! make system calls without libc. Reads the environment once, when it is loaded. Allocates nothing, takes no lock,
//! keeps no state per descriptor: what is to be remembered of a socket is in its options or its name, and so survives
//! dup(), fork() and exec(). Nothing with a destructor lives across a call to the next function, which a thread may be
//! cancelled in.

#![cfg_attr(not(test), no_std)]

#[cfg(test)]
extern crate std;

mod accepting;
mod handoffs;
mod socket;
mod sources;
mod start;
mod steps;

pub use accepting::{accept, accept4, getsockopt, listen, setsockopt};
pub use steps::{bind, connect, getsockname};

/// Nothing here panics; if it did after all, the program would have to end.
#[cfg(all(not(test), panic = "abort"))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: no arguments, no return.
    unsafe { libc::abort() }
}

/// The compiled parts of `core` name it in their unwind tables, and without the standard library it is missing. None of
/// those parts is on the stack while a thread can be cancelled; if one were, the answer is to unwind on.
#[cfg(all(not(test), panic = "abort"))]
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() -> core::ffi::c_int {
    const CONTINUE_UNWIND: core::ffi::c_int = 8; // _URC_CONTINUE_UNWIND of the Itanium C++ ABI
    CONTINUE_UNWIND
}
