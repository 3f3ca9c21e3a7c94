//! What is read once, when the library is loaded: the environment, as it is before main().
//!
//! Decides what becomes of a variable that cannot be read: it is named on standard error, and the program runs as if
//! there were none.

use core::cell::UnsafeCell;
use core::ffi::{CStr, c_char};
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{accepting, socket, steps};

/// A value that is written once, by the constructor, before anything can read it.
pub(crate) struct Once<T> {
    value: UnsafeCell<MaybeUninit<T>>,
    ready: AtomicBool,
}

// SAFETY: the one writer is the constructor; readers wait for `ready`, which it sets last.
unsafe impl<T: Sync> Sync for Once<T> {}

impl<T> Once<T> {
    pub(crate) const fn new() -> Once<T> {
        Once { value: UnsafeCell::new(MaybeUninit::uninit()), ready: AtomicBool::new(false) }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        // SAFETY: `ready` was set after the value was written, and nobody writes again.
        self.ready.load(Ordering::Acquire).then(|| unsafe { (*self.value.get()).assume_init_ref() })
    }

    /// # Safety
    /// Called by the constructor, once.
    pub(crate) unsafe fn set(&self, value: T) {
        // SAFETY: the loader runs constructors once, one after the other, and `ready` is still false.
        unsafe { (*self.value.get()).write(value) };
        self.ready.store(true, Ordering::Release);
    }
}

/// Called by the dynamic loader before main(). A call that comes earlier still finds nothing ready and goes on as it is.
#[cfg(panic = "abort")]
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = load;

#[cfg_attr(not(panic = "abort"), expect(dead_code, reason = "only the shared object has a constructor"))]
extern "C" fn load() {
    socket::find_next();
    // SAFETY: this is the constructor.
    unsafe {
        steps::load();
        accepting::load();
    }
}

/// The value of a variable of the environment; called by the constructor alone. It may be overwritten later, as daemons
/// do that change what ps(1) shows: what is to stay is copied.
pub(crate) fn variable(name: &CStr) -> Option<&'static [u8]> {
    // SAFETY: the name ends with a zero byte; this runs before main(), when no thread can change the environment.
    let value: *const c_char = unsafe { libc::getenv(name.as_ptr()) };
    // SAFETY: getenv() answers null or a string that ends with a zero byte.
    (!ptr::eq(value, ptr::null())).then(|| unsafe { CStr::from_ptr(value) }.to_bytes())
}

/// One line on standard error, as the dynamic loader writes when it cannot load a library. The program runs as it is.
pub(crate) fn complain(name: &str, value: &[u8], why: &str) {
    let start = value.get(..200).unwrap_or(value);
    say(&[name.as_bytes(), b" ", why.as_bytes(), b", so it is ignored: ", start]);
}

/// One line on standard error.
pub(crate) fn say(parts: &[&[u8]]) {
    for part in [b"fourtuple: ".as_slice()].iter().chain(parts).chain(&[b"\n".as_slice()]) {
        // SAFETY: as many readable bytes as is said. Nobody can be told if it fails.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
}
