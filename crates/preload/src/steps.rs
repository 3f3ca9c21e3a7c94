//! connect(), bind() and getsockname(), which programs call in place of libc's.
//!
//! Decides which source a connection gets and what happens when it has no port left; listeners that a broker serves are
//! `accepting`'s. Knows how no option or address looks to the kernel: that is `socket`.

use core::ffi::c_int;

use libc::{sockaddr, socklen_t};

use crate::accepting;
use crate::socket::{self, Endpoint, Socket};
use crate::sources::{Pool, Rounds, Sources, mixed};
use crate::start::{Once, complain, variable};

/// Bounds a connect() that finds no free port anywhere: each address costs the kernel a search of the whole range, 1 to
/// 3 ms for 64,512 ports (limits catalogue A3). All addresses fill evenly, so that the last ones are found long before.
const MOST_ADDRESSES_TRIED: u128 = 64;

/// Both bounds lie outside any net.ipv4.ip_local_port_range but the widest, and a bound outside is ignored
/// (inet_sk_get_local_port_range): the range stays what the sysctl says, now and later, and the search becomes flat.
const WHOLE_RANGE: u32 = 65_535 << 16 | 1;

struct Config {
    sources: Sources,
    range: u32,
    seed: u64,
}

static CONFIG: Once<Config> = Once::new();
static ROUNDS: Rounds = Rounds::new();

/// # Safety
/// Called by the constructor, once.
pub(crate) unsafe fn load() {
    let Some(sources) = variable(c"FOURTUPLE_SOURCES") else { return };
    let ports = variable(c"FOURTUPLE_PORTS");
    let sources = match core::str::from_utf8(sources).map(Sources::parse) {
        Ok(Ok(sources)) => sources,
        Ok(Err(refused)) => return complain("FOURTUPLE_SOURCES", sources, refused.why()),
        Err(_) => return complain("FOURTUPLE_SOURCES", sources, "is not text"),
    };
    let Some(range) = ports.map_or(Some(WHOLE_RANGE), port_range) else {
        return complain("FOURTUPLE_PORTS", ports.unwrap_or_default(), "needs LOW-HIGH, each from 1 to 65535");
    };
    // SAFETY: the caller's promise.
    unsafe { CONFIG.set(Config { sources, range, seed: seed() }) };
}

/// connect(2): an unbound TCP socket gets a source out of the set, and every port of the range before it fails.
///
/// # Safety
/// As connect(2).
#[cfg_attr(panic = "abort", unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn connect(fd: c_int, address: *const sockaddr, length: socklen_t) -> c_int {
    let errno = socket::errno();
    // SAFETY: the caller's promise.
    let destination =
        CONFIG.get().and_then(|config| unsafe { Endpoint::read(address, length) }.map(|end| (config, end)));
    let Some((config, destination)) = destination else {
        // SAFETY: the caller's promise.
        return unsafe { socket::connect(fd, address, length) };
    };
    let chosen = choice(config, fd, destination);
    socket::set_errno(errno);
    let Choice::Source { socket, local, pool } = chosen else {
        // SAFETY: the caller's promise.
        return unsafe { socket::connect(fd, address, length) };
    };

    let wants_freebind = pool.nth(0).is_some_and(|source| source.is_ipv6());
    let before = socket.options(wants_freebind);
    // Without it each bind() would take a port for all destinations, which is worse than one address.
    if !socket.set_no_port(1) {
        socket::set_errno(errno);
        // SAFETY: the caller's promise.
        return unsafe { socket::connect(fd, address, length) };
    }
    if before.range == Some(0) {
        socket.set_range(config.range);
    }
    if wants_freebind {
        socket.allow_any_ip();
    }
    // SAFETY: no arguments.
    let process = unsafe { libc::getpid() };
    let place = ROUNDS.next(destination.address, destination.port, config.seed ^ mixed(process as u64));
    let mut refusal = libc::EADDRNOTAVAIL;
    let mut attempt = 0;
    while attempt < pool.size().min(MOST_ADDRESSES_TRIED) {
        let Some(source) = pool.nth(place.wrapping_add(attempt)) else { break };
        attempt = attempt.wrapping_add(1);
        match socket.bind(local.with_address(source)) {
            Ok(()) => {}
            // Not an address of this host, or no longer.
            Err(libc::EADDRNOTAVAIL) => continue,
            Err(_) => {
                withdraw(socket, local, before, errno);
                // SAFETY: the caller's promise.
                return unsafe { socket::connect(fd, address, length) };
            }
        }
        socket::set_errno(errno);
        // SAFETY: the caller's promise.
        if unsafe { socket::connect(fd, address, length) } == 0 {
            return 0;
        }
        refusal = socket::errno();
        match refusal {
            // It goes on without us.
            libc::EINPROGRESS | libc::EINTR | libc::EALREADY | libc::EISCONN => return -1,
            libc::EADDRNOTAVAIL => {}
            _ => break,
        }
    }
    withdraw(socket, local, before, refusal);
    -1
}

/// bind(2): port 0 of a TCP socket is chosen later, by connect(), listen() or getsockname(), so that a connection does
/// not take the port for all destinations and for every other program (limits catalogue A7, A8).
///
/// # Safety
/// As bind(2).
#[cfg_attr(panic = "abort", unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn bind(fd: c_int, address: *const sockaddr, length: socklen_t) -> c_int {
    // SAFETY: the caller's promise.
    if let Some(result) = unsafe { accepting::take_place(fd, address, length) } {
        return result;
    }
    let errno = socket::errno();
    // SAFETY: the caller's promise.
    let deferred = CONFIG.get().and_then(|config| match unsafe { Endpoint::read(address, length) } {
        Some(Endpoint { port: 0, .. }) => defer(config, fd),
        _ => None,
    });
    socket::set_errno(errno);
    // SAFETY: the caller's promise.
    let result = unsafe { socket::bind(fd, address, length) };
    if let (true, Some((socket, before))) = (result != 0, deferred) {
        let refusal = socket::errno();
        socket.restore(before);
        socket::set_errno(refusal);
    }
    result
}

/// getsockname(2): a program that asks for its port before it connects or listens gets one, as without us.
///
/// # Safety
/// As getsockname(2).
#[cfg_attr(panic = "abort", unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn getsockname(fd: c_int, address: *mut sockaddr, length: *mut socklen_t) -> c_int {
    let errno = socket::errno();
    // SAFETY: null, or readable as getsockname(2) has it.
    let room = if length.is_null() { 0 } else { unsafe { *length } };
    // SAFETY: the caller's promise.
    let result = unsafe { socket::getsockname(fd, address, length) };
    // SAFETY: it was written to just now, `room` bytes at most.
    if result != 0 || unsafe { accepting::rename(fd, address, length, room) } {
        return result;
    }
    let settled = CONFIG.get().is_some_and(|config| settle(config, fd));
    socket::set_errno(errno);
    if !settled {
        return result;
    }
    // SAFETY: it was written to just now; the promise for the second call is the caller's for the first.
    unsafe {
        *length = room;
        socket::getsockname(fd, address, length)
    }
}

enum Choice {
    /// The call goes on as it came.
    AsItIs,
    /// An unbound socket whose connection may come from this pool.
    Source { socket: Socket, local: Endpoint, pool: &'static Pool },
}

fn choice(config: &'static Config, fd: c_int, destination: Endpoint) -> Choice {
    let Some(pool) = config.sources.towards(destination.address) else { return Choice::AsItIs };
    let Some(socket) = Socket::tcp(fd) else { return Choice::AsItIs };
    match socket.local() {
        Some(local) if local.port == 0 && !local.is_like(destination) => Choice::AsItIs,
        Some(local) if local.port == 0 && local.address.is_unspecified() => Choice::Source { socket, local, pool },
        // The program has chosen its address and no port: it gets the flat search.
        Some(local) if local.port == 0 => {
            if socket.options(false).range == Some(0) {
                socket.set_range(config.range);
            }
            Choice::AsItIs
        }
        _ => Choice::AsItIs,
    }
}

/// Make bind() leave the port open. The range is the mark by which `settle` knows such a socket again; a kernel without
/// that option, and a program that has set one of the two itself, keep their bind().
fn defer(config: &Config, fd: c_int) -> Option<(Socket, socket::Options)> {
    let socket = Socket::tcp(fd)?;
    let before = socket.options(false);
    if (before.no_port, before.range) != (Some(0), Some(0)) || !socket.set_range(config.range) {
        return None;
    }
    socket.set_no_port(1);
    Some((socket, before))
}

/// Give a socket whose port was left open one now, by a second bind(): the kernel allows it while there is no port
/// (__inet_bind asks inet_num). Whether it did.
fn settle(config: &Config, fd: c_int) -> bool {
    let Some(socket) = Socket::tcp(fd) else { return false };
    let Some(local) = socket.local().filter(|local| local.port == 0) else { return false };
    let options = socket.options(false);
    if (options.no_port, options.range) != (Some(1), Some(config.range)) {
        return false;
    }
    socket.set_no_port(0);
    let settled = socket.bind(local).is_ok();
    if !settled {
        socket.set_no_port(1);
    }
    settled
}

/// Make the socket what it was, so that a program may try again with it, and leave it this errno.
fn withdraw(socket: Socket, local: Endpoint, before: socket::Options, errno: c_int) {
    // With NO_PORT still set this takes the address back and no port. A failure leaves a socket that is bound, no worse.
    let _ = socket.bind(local.wildcard());
    socket.restore(before);
    socket::set_errno(errno);
}

fn port_range(text: &[u8]) -> Option<u32> {
    let (low, high) = core::str::from_utf8(text).ok()?.split_once('-')?;
    let (low, high) = (low.parse::<u16>().ok()?, high.parse::<u16>().ok()?);
    (1 <= low && low <= high).then_some(u32::from(high) << 16 | u32::from(low))
}

/// Chance, once per process.
fn seed() -> u64 {
    let mut seed = 0u64;
    // SAFETY: eight writable bytes. Where it fails, processes differ by their number alone.
    unsafe { libc::getrandom((&raw mut seed).cast(), size_of::<u64>(), libc::GRND_NONBLOCK) };
    mixed(seed)
}
