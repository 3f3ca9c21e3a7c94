//! A program's socket as this library sees it: addresses in the kernel's form, three options, and the next functions
//! in the line of libraries, which are libc's own unless another preload library stands between.
//!
//! Decides nothing. Allocates nothing and takes no lock, so that it may run in a signal handler. What is called here is
//! never `libc::connect` and the like: in the finished library those names are ours.

use core::ffi::{CStr, c_int, c_void};
use core::mem::{MaybeUninit, transmute};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use libc::{sa_family_t, sockaddr, sockaddr_in, sockaddr_in6, socklen_t};

/// linux/in.h, since 6.3; libc has no name for it yet.
const IP_LOCAL_PORT_RANGE: c_int = 51;
/// linux/in6.h; libc has no name for it on every target.
const IPV6_FREEBIND: c_int = 78;

/// connect() and bind(): what a program may unwind through by pthread_cancel, hence "C-unwind".
pub(crate) type Naming = unsafe extern "C-unwind" fn(c_int, *const sockaddr, socklen_t) -> c_int;
/// getsockname().
pub(crate) type Asking = unsafe extern "C-unwind" fn(c_int, *mut sockaddr, *mut socklen_t) -> c_int;

static NEXT_CONNECT: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
static NEXT_BIND: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
static NEXT_GETSOCKNAME: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// Look the next functions up. Done once when the library is loaded, because dlsym() may take locks.
pub(crate) fn find_next() {
    for (slot, name) in [(&NEXT_CONNECT, c"connect"), (&NEXT_BIND, c"bind"), (&NEXT_GETSOCKNAME, c"getsockname")] {
        next(slot, name);
    }
}

/// The next connect().
pub(crate) unsafe fn connect(fd: c_int, address: *const sockaddr, length: socklen_t) -> c_int {
    // SAFETY: the caller's arguments go on as they are; `named` is a connect().
    named(&NEXT_CONNECT, c"connect").map_or_else(refused, |next| unsafe { next(fd, address, length) })
}

/// The next bind().
pub(crate) unsafe fn bind(fd: c_int, address: *const sockaddr, length: socklen_t) -> c_int {
    // SAFETY: the caller's arguments go on as they are; `named` is a bind().
    named(&NEXT_BIND, c"bind").map_or_else(refused, |next| unsafe { next(fd, address, length) })
}

/// The next getsockname().
pub(crate) unsafe fn getsockname(fd: c_int, address: *mut sockaddr, length: *mut socklen_t) -> c_int {
    let next = next(&NEXT_GETSOCKNAME, c"getsockname");
    if next.is_null() {
        return refused();
    }
    // SAFETY: dlsym() found it under this name, so this is its type.
    let next: Asking = unsafe { transmute(next) };
    // SAFETY: the caller's arguments go on as they are.
    unsafe { next(fd, address, length) }
}

/// The errno of this thread.
pub(crate) fn errno() -> c_int {
    // SAFETY: it points to this thread's errno, always.
    unsafe { *libc::__errno_location() }
}

/// Set the errno of this thread.
pub(crate) fn set_errno(value: c_int) {
    // SAFETY: it points to this thread's errno, always.
    unsafe { *libc::__errno_location() = value };
}

/// An address and a port, and the family of the socket that they are for: an IPv6 socket has IPv4 addresses mapped.
#[derive(Clone, Copy)]
pub(crate) struct Endpoint {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    in_v6: bool,
}

impl Endpoint {
    /// Read what a program hands to connect() or bind(). None for any other family, a short length, or a scope: an
    /// address with a scope belongs to one link, and so does its source.
    ///
    /// # Safety
    /// `address` is null or `length` readable bytes, as connect(2) has it.
    pub(crate) unsafe fn read(address: *const sockaddr, length: socklen_t) -> Option<Endpoint> {
        if address.is_null() || (length as usize) < size_of::<sockaddr_in>() {
            return None;
        }
        // SAFETY: both members begin like a sockaddr and are plain integers; unaligned, because a program's buffer may
        // be. Each is read only if that many bytes are there.
        unsafe {
            let family = address.cast::<sa_family_t>().read_unaligned();
            if family == libc::AF_INET as sa_family_t {
                Some(Endpoint::of_v4(&address.cast::<sockaddr_in>().read_unaligned()))
            } else if family == libc::AF_INET6 as sa_family_t && length as usize >= size_of::<sockaddr_in6>() {
                Endpoint::of_v6(&address.cast::<sockaddr_in6>().read_unaligned())
            } else {
                None
            }
        }
    }

    /// The same socket's other choice: this address and port 0, which leaves the port to the kernel.
    pub(crate) fn with_address(self, address: IpAddr) -> Endpoint {
        Endpoint { address, port: 0, in_v6: self.in_v6 }
    }

    /// Whether both are for a socket of one family.
    pub(crate) fn is_like(self, other: Endpoint) -> bool {
        self.in_v6 == other.in_v6
    }

    /// The address of a socket that is bound to none.
    pub(crate) fn wildcard(self) -> Endpoint {
        let v4 = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        self.with_address(if self.in_v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { v4 })
    }

    fn of_v4(raw: &sockaddr_in) -> Endpoint {
        let address = IpAddr::V4(Ipv4Addr::from_bits(u32::from_be(raw.sin_addr.s_addr)));
        Endpoint { address, port: u16::from_be(raw.sin_port), in_v6: false }
    }

    fn of_v6(raw: &sockaddr_in6) -> Option<Endpoint> {
        let address = Ipv6Addr::from(raw.sin6_addr.s6_addr);
        let address = address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4);
        let endpoint = Endpoint { address, port: u16::from_be(raw.sin6_port), in_v6: true };
        (raw.sin6_scope_id == 0).then_some(endpoint)
    }
}

/// One of the program's TCP sockets; borrowed, never closed here.
#[derive(Clone, Copy)]
pub(crate) struct Socket(c_int);

/// The three options that decide where a port comes from, as they were found. A None was not there to be read.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    /// IP_BIND_ADDRESS_NO_PORT: bind() takes the address and leaves the port to connect().
    pub(crate) no_port: Option<u32>,
    /// IP_LOCAL_PORT_RANGE; any value but 0 also makes the kernel's search flat (limits catalogue A3, A4).
    pub(crate) range: Option<u32>,
    freebind: Option<u32>,
}

impl Socket {
    /// The socket behind a descriptor, if it is a TCP one.
    pub(crate) fn tcp(fd: c_int) -> Option<Socket> {
        let socket = Socket(fd);
        (socket.option(libc::SOL_SOCKET, libc::SO_PROTOCOL)? == libc::IPPROTO_TCP as u32).then_some(socket)
    }

    /// Its own endpoint; None where `Endpoint::read` has none.
    pub(crate) fn local(self) -> Option<Endpoint> {
        let mut raw = MaybeUninit::<sockaddr_in6>::zeroed();
        let mut length = size_of::<sockaddr_in6>() as socklen_t;
        // SAFETY: `raw` is `length` writable bytes.
        if unsafe { getsockname(self.0, raw.as_mut_ptr().cast(), &raw mut length) } != 0 {
            return None;
        }
        // SAFETY: the kernel wrote `length` bytes, and the rest was zero before.
        unsafe { Endpoint::read(raw.as_ptr().cast(), length) }
    }

    /// Bind; Err is the errno.
    pub(crate) fn bind(self, local: Endpoint) -> Result<(), c_int> {
        let result = match (local.address, local.in_v6) {
            (IpAddr::V4(address), false) => {
                // SAFETY: plain integers, for which zero is a value.
                let mut raw: sockaddr_in = unsafe { MaybeUninit::zeroed().assume_init() };
                raw.sin_family = libc::AF_INET as sa_family_t;
                raw.sin_port = local.port.to_be();
                raw.sin_addr.s_addr = address.to_bits().to_be();
                // SAFETY: `raw` is as many readable bytes as is said.
                unsafe { bind(self.0, (&raw const raw).cast(), size_of::<sockaddr_in>() as socklen_t) }
            }
            (address, _) => {
                // SAFETY: plain integers, for which zero is a value.
                let mut raw: sockaddr_in6 = unsafe { MaybeUninit::zeroed().assume_init() };
                raw.sin6_family = libc::AF_INET6 as sa_family_t;
                raw.sin6_port = local.port.to_be();
                raw.sin6_addr.s6_addr = match address {
                    IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                    IpAddr::V6(address) => address.octets(),
                };
                // SAFETY: `raw` is as many readable bytes as is said.
                unsafe { bind(self.0, (&raw const raw).cast(), size_of::<sockaddr_in6>() as socklen_t) }
            }
        };
        if result == 0 { Ok(()) } else { Err(errno()) }
    }

    /// The options as they are; `freebind` only where it will be asked for.
    pub(crate) fn options(self, with_freebind: bool) -> Options {
        // The first two are of level IPPROTO_IP for IPv6 sockets as well (do_ip_setsockopt serves them).
        Options {
            no_port: self.option(libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
            range: self.option(libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE),
            freebind: with_freebind.then(|| self.option(libc::IPPROTO_IPV6, IPV6_FREEBIND)).flatten(),
        }
    }

    /// Put the options back.
    pub(crate) fn restore(self, options: Options) {
        if let Some(value) = options.no_port {
            self.set_no_port(value);
        }
        if let Some(value) = options.range {
            self.set_range(value);
        }
        if let Some(value) = options.freebind {
            self.set(libc::IPPROTO_IPV6, IPV6_FREEBIND, value);
        }
    }

    pub(crate) fn set_no_port(self, value: u32) -> bool {
        self.set(libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, value)
    }

    pub(crate) fn set_range(self, value: u32) -> bool {
        self.set(libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, value)
    }

    /// Allow an address that is on no interface: __inet6_bind() wants it there even where a local route covers it.
    pub(crate) fn allow_any_ip(self) -> bool {
        self.set(libc::IPPROTO_IPV6, IPV6_FREEBIND, 1)
    }

    fn option(self, level: c_int, name: c_int) -> Option<u32> {
        let mut value = 0u32;
        let mut length = size_of::<u32>() as socklen_t;
        // SAFETY: `value` is `length` writable bytes.
        let result = unsafe { libc::getsockopt(self.0, level, name, (&raw mut value).cast(), &raw mut length) };
        (result == 0 && length as usize == size_of::<u32>()).then_some(value)
    }

    fn set(self, level: c_int, name: c_int, value: u32) -> bool {
        let length = size_of::<u32>() as socklen_t;
        // SAFETY: `value` is `length` readable bytes.
        unsafe { libc::setsockopt(self.0, level, name, (&raw const value).cast(), length) == 0 }
    }
}

fn named(slot: &AtomicPtr<c_void>, name: &CStr) -> Option<Naming> {
    let next = next(slot, name);
    // SAFETY: dlsym() found it under the name connect or bind, so this is its type.
    (!next.is_null()).then(|| unsafe { transmute::<*mut c_void, Naming>(next) })
}

fn next(slot: &AtomicPtr<c_void>, name: &CStr) -> *mut c_void {
    let known = slot.load(Ordering::Relaxed);
    if !known.is_null() {
        return known;
    }
    // SAFETY: `name` ends with a zero byte. Threads that both ask store the same answer.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    slot.store(found, Ordering::Relaxed);
    found
}

/// There is no libc behind us, which cannot be in a program that has called it.
fn refused() -> c_int {
    set_errno(libc::ENOSYS);
    -1
}
