//! What `fourtuple run` loads into a program: connect(), bind() and getsockname() of TCP sockets, done as a program
//! does them that knows about the tuple space.
//!
//! Decides, per call, whether to step in. It does so for a TCP socket that names no local port itself; on any doubt the
//! call goes on as it came. Does not know UDP, other families, nor programs that make system calls without libc. Reads
//! `FOURTUPLE_SOURCES` and `FOURTUPLE_PORTS` once, when it is loaded. Allocates nothing, takes no lock, keeps no state
//! per descriptor: what is to be remembered of a socket is in its options, and so survives dup(), fork() and exec().
//! Nothing with a destructor lives across a call to the next function, which a thread may be cancelled in.

#![cfg_attr(not(test), no_std)]

#[cfg(test)]
extern crate std;

mod socket;
mod sources;
mod steps;

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
