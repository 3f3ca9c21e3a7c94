//! A program's socket as this library sees it: addresses in the kernel's form, its options, and the next functions in
//! the line of libraries, which are libc's own unless another preload library stands between.
//!
//! Decides nothing. Allocates nothing and takes no lock, so that it may run in a signal handler. What is called here is
//! never `libc::connect` and the like: in the finished library those names are ours.

use core::ffi::{CStr, c_int, c_void};
use core::mem::{MaybeUninit, transmute_copy};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use libc::{sa_family_t, sockaddr, sockaddr_in, sockaddr_in6, socklen_t};

/// linux/in.h, since 6.3; libc has no name for it yet.
const IP_LOCAL_PORT_RANGE: c_int = 51;
/// linux/in6.h; libc has no name for it on every target.
const IPV6_FREEBIND: c_int = 78;

/// connect() and bind(): what a program may unwind through by pthread_cancel, hence "C-unwind".
type Naming = unsafe extern "C-unwind" fn(c_int, *const sockaddr, socklen_t) -> c_int;
/// getsockname() and accept().
type Asking = unsafe extern "C-unwind" fn(c_int, *mut sockaddr, *mut socklen_t) -> c_int;
type Accepting = unsafe extern "C-unwind" fn(c_int, *mut sockaddr, *mut socklen_t, c_int) -> c_int;
type Listening = unsafe extern "C" fn(c_int, c_int) -> c_int;
type Reading = unsafe extern "C" fn(c_int, c_int, c_int, *mut c_void, *mut socklen_t) -> c_int;
type Setting = unsafe extern "C" fn(c_int, c_int, c_int, *const c_void, socklen_t) -> c_int;

/// The next function of a name.
struct Next(&'static CStr, AtomicPtr<c_void>);

static CONNECT: Next = Next::new(c"connect");
static BIND: Next = Next::new(c"bind");
static GETSOCKNAME: Next = Next::new(c"getsockname");
static LISTEN: Next = Next::new(c"listen");
static ACCEPT: Next = Next::new(c"accept");
static ACCEPT4: Next = Next::new(c"accept4");
static GETSOCKOPT: Next = Next::new(c"getsockopt");
static SETSOCKOPT: Next = Next::new(c"setsockopt");

/// Look the next functions up. Done once when the library is loaded, because dlsym() may take locks.
pub(crate) fn find_next() {
    for next in [&CONNECT, &BIND, &GETSOCKNAME, &LISTEN, &ACCEPT, &ACCEPT4, &GETSOCKOPT, &SETSOCKOPT] {
        next.find();
    }
}

impl Next {
    const fn new(name: &'static CStr) -> Next {
        Next(name, AtomicPtr::new(ptr::null_mut()))
    }

    fn find(&self) -> *mut c_void {
        let known = self.1.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: the name ends with a zero byte. Threads that both ask store the same answer.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.0.as_ptr()) };
        self.1.store(found, Ordering::Relaxed);
        found
    }

    /// # Safety
    /// `F` is the type of the function of this name.
    unsafe fn get<F>(&self) -> Option<F> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        let found = self.find();
        // SAFETY: dlsym() found it under the name, so the caller's `F` is its type, and a pointer by the line above.
        (!found.is_null()).then(|| unsafe { transmute_copy::<*mut c_void, F>(&found) })
    }
}

/// The next connect().
pub(crate) unsafe fn connect(fd: c_int, address: *const sockaddr, length: socklen_t) -> c_int {
    // SAFETY: the type is that of connect(); the caller's arguments go on as they are.
    unsafe { CONNECT.get::<Naming>().map_or_else(refused, |next| next(fd, address, length)) }
}

/// The next bind().
pub(crate) unsafe fn bind(fd: c_int, address: *const sockaddr, length: socklen_t) -> c_int {
    // SAFETY: the type is that of bind(); the caller's arguments go on as they are.
    unsafe { BIND.get::<Naming>().map_or_else(refused, |next| next(fd, address, length)) }
}

/// The next getsockname().
pub(crate) unsafe fn getsockname(fd: c_int, address: *mut sockaddr, length: *mut socklen_t) -> c_int {
    // SAFETY: the type is that of getsockname(); the caller's arguments go on as they are.
    unsafe { GETSOCKNAME.get::<Asking>().map_or_else(refused, |next| next(fd, address, length)) }
}

/// The next listen().
pub(crate) unsafe fn listen(fd: c_int, backlog: c_int) -> c_int {
    // SAFETY: the type is that of listen(); the caller's arguments go on as they are.
    unsafe { LISTEN.get::<Listening>().map_or_else(refused, |next| next(fd, backlog)) }
}

/// The next accept().
pub(crate) unsafe fn accept(fd: c_int, address: *mut sockaddr, length: *mut socklen_t) -> c_int {
    // SAFETY: the type is that of accept(); the caller's arguments go on as they are.
    unsafe { ACCEPT.get::<Asking>().map_or_else(refused, |next| next(fd, address, length)) }
}

/// The next accept4().
pub(crate) unsafe fn accept4(fd: c_int, address: *mut sockaddr, length: *mut socklen_t, flags: c_int) -> c_int {
    // SAFETY: the type is that of accept4(); the caller's arguments go on as they are.
    unsafe { ACCEPT4.get::<Accepting>().map_or_else(refused, |next| next(fd, address, length, flags)) }
}

/// The next getsockopt().
pub(crate) unsafe fn getsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    length: *mut socklen_t,
) -> c_int {
    // SAFETY: the type is that of getsockopt(); the caller's arguments go on as they are.
    unsafe { GETSOCKOPT.get::<Reading>().map_or_else(refused, |next| next(fd, level, name, value, length)) }
}

/// The next setsockopt().
pub(crate) unsafe fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    length: socklen_t,
) -> c_int {
    // SAFETY: the type is that of setsockopt(); the caller's arguments go on as they are.
    unsafe { SETSOCKOPT.get::<Setting>().map_or_else(refused, |next| next(fd, level, name, value, length)) }
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
        let result = unsafe { getsockopt(self.0, level, name, (&raw mut value).cast(), &raw mut length) };
        (result == 0 && length as usize == size_of::<u32>()).then_some(value)
    }

    fn set(self, level: c_int, name: c_int, value: u32) -> bool {
        let length = size_of::<u32>() as socklen_t;
        // SAFETY: `value` is `length` readable bytes.
        unsafe { setsockopt(self.0, level, name, (&raw const value).cast(), length) == 0 }
    }
}

/// There is no libc behind us, which cannot be in a program that has called it.
fn refused() -> c_int {
    set_errno(libc::ENOSYS);
    -1
}
