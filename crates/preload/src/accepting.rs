//! Listeners that take their clients from a broker: bind() puts a unix datagram socket in a listener's place, accept()
//! takes the client's socket out of a datagram, and what asks about the listener gets a listener's answers.
//!
//! Decides which descriptor is such a one: by its name alone, which is the path that it is bound to, and only after the
//! kernel has refused a call because of its type. Calls for other sockets cost what they cost without us. Knows not what
//! a text or a note says: that is `handoffs`.

use core::ffi::{c_int, c_void};
use core::mem::{MaybeUninit, offset_of};
use core::net::IpAddr;
use core::ptr;

use libc::{mode_t, sa_family_t, sockaddr, sockaddr_in, sockaddr_in6, sockaddr_un, socklen_t};

use crate::handoffs::{Handoff, Handoffs, Listener, MOST_NOTE_BYTES, Path, is_note};
use crate::socket::{self, Endpoint, errno, set_errno};
use crate::start::{Once, complain, say, variable};

/// Datagrams that are no handoff, after which accept() comes back all the same: as accept(2) says, ECONNABORTED.
const MOST_PASSED_OVER: u32 = 64;
/// A listener that shares its path with an earlier one is looked for below this descriptor.
const MOST_DESCRIPTORS_LOOKED_AT: c_int = 4_096;
/// Room for more than the one descriptor that there is, so that too many are seen; the kernel closes what has no room.
const DESCRIPTORS: usize = 4;
/// Who may hand sockets over: the same user and root.
const MODE: mode_t = 0o600;

/// More than the longest option of TCP or IP, which is struct tcp_info: a length that is nonsense is not believed.
const MOST_OPTION_BYTES: usize = 1_024;

/// include/net/tcp_states.h
const TCP_SYN_SENT: u8 = 2;
const TCP_CLOSE: u8 = 7;
const TCP_LISTEN: u8 = 10;

const PATH_AT: usize = offset_of!(sockaddr_un, sun_path);

struct Config {
    handoffs: Handoffs,
    mode: mode_t,
}

static CONFIG: Once<Config> = Once::new();

/// # Safety
/// Called by the constructor, once.
pub(crate) unsafe fn load() {
    let Some(text) = variable(c"FOURTUPLE_HANDOFF") else { return };
    let handoffs = match core::str::from_utf8(text).map(Handoffs::parse) {
        Ok(Ok(handoffs)) => handoffs,
        Ok(Err(refused)) => return complain("FOURTUPLE_HANDOFF", text, refused.why()),
        Err(_) => return complain("FOURTUPLE_HANDOFF", text, "is not text"),
    };
    let mode = variable(c"FOURTUPLE_HANDOFF_MODE");
    let Some(mode) = mode.map_or(Some(MODE), octal) else {
        return complain("FOURTUPLE_HANDOFF_MODE", mode.unwrap_or_default(), "needs permissions such as 660");
    };
    // SAFETY: the caller's promise.
    unsafe { CONFIG.set(Config { handoffs, mode }) };
}

fn octal(text: &[u8]) -> Option<mode_t> {
    let text = core::str::from_utf8(text).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
    mode_t::from_str_radix(text, 8).ok().filter(|&mode| mode <= 0o777)
}

/// bind(2) of a listener that a broker serves: Some is the answer to the program. The listener's own address stays free,
/// a path of its own is bound nevertheless, because daemons change such a file's mode and remove it.
///
/// # Safety
/// As bind(2).
pub(crate) unsafe fn take_place(fd: c_int, address: *const sockaddr, length: socklen_t) -> Option<c_int> {
    let config = CONFIG.get()?;
    // SAFETY: the caller's promise.
    let listener = unsafe { read(address, length) }?;
    let handoff = config.handoffs.of(listener)?;
    let before = errno();
    // SAFETY: the caller's promise.
    let family = unsafe { address.cast::<sa_family_t>().read_unaligned() };
    if option(fd, libc::SO_TYPE) != Some(libc::SOCK_STREAM) || option(fd, libc::SO_DOMAIN) != Some(family.into()) {
        set_errno(before);
        return None;
    }
    // SAFETY: no memory is involved.
    let (state, own) = unsafe { (libc::fcntl(fd, libc::F_GETFL), libc::fcntl(fd, libc::F_GETFD)) };
    let shared = shared(handoff);
    let place = match shared {
        Some(shared) => shared,
        None => match place(&handoff.path, config.mode) {
            Ok(place) => place,
            Err(refusal) => {
                say(&[b"nothing can be handed over at ", handoff.path.as_bytes(), b": ", reason(refusal)]);
                set_errno(refusal);
                return Some(-1);
            }
        },
    };
    // SAFETY: the caller's promise.
    if matches!(listener, Listener::Unix(_)) && unsafe { socket::bind(fd, address, length) } != 0 {
        let refusal = errno();
        if shared.is_none() {
            unlink(&handoff.path);
            close(place);
        }
        set_errno(refusal);
        return Some(-1);
    }
    let flags = if own & libc::FD_CLOEXEC != 0 { libc::O_CLOEXEC } else { 0 };
    // A shared one may be non-blocking already for the sake of the earlier listener.
    if shared.is_none() || state & libc::O_NONBLOCK != 0 {
        // SAFETY: no memory is involved.
        unsafe { libc::fcntl(place, libc::F_SETFL, state & libc::O_NONBLOCK) };
    }
    // SAFETY: no memory is involved. Both descriptors are open; the program's own becomes the other.
    let moved = unsafe { libc::dup3(place, fd, flags) };
    let refusal = if moved < 0 { errno() } else { before };
    if shared.is_none() {
        close(place);
    }
    set_errno(refusal);
    Some(if moved < 0 { -1 } else { 0 })
}

/// getsockname(2) has answered into `address`, which has `room` bytes: make it the listener's name, if it is one.
///
/// # Safety
/// As getsockname(2), which has succeeded with these arguments.
pub(crate) unsafe fn rename(fd: c_int, address: *mut sockaddr, length: *mut socklen_t, room: socklen_t) -> bool {
    let Some(config) = CONFIG.get() else { return false };
    if (room as usize) < size_of::<sa_family_t>() {
        return false;
    }
    // SAFETY: the kernel has written as many bytes as there is room for, and any address is longer than its family.
    let family = unsafe { address.cast::<sa_family_t>().read_unaligned() };
    if c_int::from(family) != libc::AF_UNIX {
        return false;
    }
    let before = errno();
    let found = handoff_of(config, fd);
    set_errno(before);
    let Some(handoff) = found else { return false };
    let (name, size) = raw(&handoff.listener);
    // SAFETY: `room` writable bytes are there, and `size` readable ones; the length is the caller's.
    unsafe {
        ptr::copy_nonoverlapping((&raw const name).cast::<u8>(), address.cast::<u8>(), size.min(room as usize));
        *length = size as socklen_t;
    }
    true
}

/// listen(2): a listener that a broker serves needs no backlog.
///
/// # Safety
/// As listen(2).
#[cfg_attr(panic = "abort", unsafe(no_mangle))]
pub unsafe extern "C" fn listen(fd: c_int, backlog: c_int) -> c_int {
    let before = errno();
    // SAFETY: the caller's promise.
    let result = unsafe { socket::listen(fd, backlog) };
    if refused_for(fd, result).is_some() {
        set_errno(before);
        return 0;
    }
    result
}

/// accept(2): from a broker, where the listener is one that it serves.
///
/// # Safety
/// As accept(2).
#[cfg_attr(panic = "abort", unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn accept(fd: c_int, address: *mut sockaddr, length: *mut socklen_t) -> c_int {
    let before = errno();
    // SAFETY: the caller's promise.
    let result = unsafe { socket::accept(fd, address, length) };
    if refused_for(fd, result).is_none() {
        return result;
    }
    // SAFETY: the caller's promise.
    unsafe { taken(fd, address, length, 0, before) }
}

/// accept4(2), likewise. The kernel's own refusal comes only after it has found a free descriptor (do_accept): at
/// RLIMIT_NOFILE the program hears EMFILE, and the client stays in the queue.
///
/// # Safety
/// As accept4(2).
#[cfg_attr(panic = "abort", unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn accept4(
    fd: c_int,
    address: *mut sockaddr,
    length: *mut socklen_t,
    flags: c_int,
) -> c_int {
    let before = errno();
    // SAFETY: the caller's promise.
    let result = unsafe { socket::accept4(fd, address, length, flags) };
    if refused_for(fd, result).is_none() {
        return result;
    }
    // SAFETY: the caller's promise.
    unsafe { taken(fd, address, length, flags, before) }
}

/// getsockopt(2): what a listener answers. Options that only a TCP socket has are all 0.
///
/// # Safety
/// As getsockopt(2).
#[cfg_attr(panic = "abort", unsafe(no_mangle))]
pub unsafe extern "C" fn getsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    length: *mut socklen_t,
) -> c_int {
    let before = errno();
    // SAFETY: the caller's promise.
    let result = unsafe { socket::getsockopt(fd, level, name, value, length) };
    let of_a_listener = level == libc::SOL_SOCKET
        && matches!(name, libc::SO_TYPE | libc::SO_DOMAIN | libc::SO_PROTOCOL | libc::SO_ACCEPTCONN);
    if result == 0 && !of_a_listener {
        return result;
    }
    let handoff = if result == 0 {
        let found = CONFIG.get().and_then(|config| handoff_of(config, fd));
        set_errno(before);
        found
    } else {
        refused_for(fd, result)
    };
    let Some(handoff) = handoff else { return result };
    let answer: c_int = match (level, name, handoff.listener) {
        (libc::SOL_SOCKET, libc::SO_TYPE, _) => libc::SOCK_STREAM,
        (libc::SOL_SOCKET, libc::SO_ACCEPTCONN, _) => 1,
        (libc::SOL_SOCKET, libc::SO_PROTOCOL, Listener::Internet(..)) => libc::IPPROTO_TCP,
        (libc::SOL_SOCKET, libc::SO_DOMAIN, Listener::Internet(IpAddr::V4(_), _)) => libc::AF_INET,
        (libc::SOL_SOCKET, libc::SO_DOMAIN, Listener::Internet(IpAddr::V6(_), _)) => libc::AF_INET6,
        (libc::SOL_SOCKET, libc::SO_DOMAIN, Listener::Unix(_)) => libc::AF_UNIX,
        _ => 0,
    };
    if value.is_null() || length.is_null() {
        set_errno(libc::EFAULT);
        return -1;
    }
    let most = if level == libc::SOL_SOCKET { size_of::<c_int>() } else { MOST_OPTION_BYTES };
    // SAFETY: `length` can be read and that many bytes of `value` written, as getsockopt(2) has it.
    unsafe {
        let room = most.min(*length as usize);
        *length = room as socklen_t;
        ptr::write_bytes(value.cast::<u8>(), 0, room);
        ptr::copy_nonoverlapping((&raw const answer).cast::<u8>(), value.cast::<u8>(), room.min(size_of::<c_int>()));
    }
    set_errno(before);
    0
}

/// setsockopt(2): what only a TCP socket has may be set, and is without effect.
///
/// # Safety
/// As setsockopt(2).
#[cfg_attr(panic = "abort", unsafe(no_mangle))]
pub unsafe extern "C" fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    length: socklen_t,
) -> c_int {
    let before = errno();
    // SAFETY: the caller's promise.
    let result = unsafe { socket::setsockopt(fd, level, name, value, length) };
    if refused_for(fd, result).is_some() {
        set_errno(before);
        return 0;
    }
    result
}

/// The handoff behind a descriptor for which the kernel has just refused what a unix datagram socket cannot do. The
/// errno stays.
fn refused_for(fd: c_int, result: c_int) -> Option<&'static Handoff> {
    if result >= 0 {
        return None;
    }
    let config = CONFIG.get()?;
    let refusal = errno();
    if !matches!(refusal, libc::EOPNOTSUPP | libc::ENOPROTOOPT) {
        return None;
    }
    let found = handoff_of(config, fd);
    set_errno(refusal);
    found
}

/// The handoff behind a descriptor, by its name.
fn handoff_of(config: &'static Config, fd: c_int) -> Option<&'static Handoff> {
    let mut name = MaybeUninit::<sockaddr_un>::zeroed();
    let mut length = size_of::<sockaddr_un>() as socklen_t;
    // SAFETY: `name` is `length` writable bytes.
    if unsafe { socket::getsockname(fd, name.as_mut_ptr().cast(), &raw mut length) } != 0 {
        return None;
    }
    // SAFETY: the kernel wrote `length` bytes at most, and the rest was zero before.
    match unsafe { read(name.as_ptr().cast(), length.min(size_of::<sockaddr_un>() as socklen_t)) }? {
        Listener::Unix(path) => config.handoffs.at(path.as_bytes()),
        Listener::Internet(..) => None,
    }
}

/// A descriptor of this process that is a listener over the same path already: both address families of one daemon, and
/// sockets with SO_REUSEPORT, have one queue.
fn shared(handoff: &Handoff) -> Option<c_int> {
    let config = CONFIG.get()?;
    (0..MOST_DESCRIPTORS_LOOKED_AT).find(|&fd| handoff_of(config, fd).is_some_and(|found| found.path == handoff.path))
}

/// A socket at this path; what is there already is replaced if nobody is behind it. Err is the errno.
fn place(path: &Path, mode: mode_t) -> Result<c_int, c_int> {
    // SAFETY: no memory is involved.
    let made = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if made < 0 {
        return Err(errno());
    }
    let (name, length) = raw(&Listener::Unix(*path));
    let name = (&raw const name).cast();
    // SAFETY: `name` is `length` readable bytes, and stays where it is to the end of this function.
    let bind = || if unsafe { socket::bind(made, name, length as socklen_t) } == 0 { Ok(()) } else { Err(errno()) };
    // The file gets the mode of the socket less the umask (unix_bind_bsd), before anybody can send to it. What the umask
    // has taken away is given back behind that.
    // SAFETY: no memory is involved.
    unsafe { libc::fchmod(made, mode) };
    let bound = bind().or_else(|refusal| {
        if refusal != libc::EADDRINUSE || !is_stale(path, made) {
            return Err(refusal);
        }
        unlink(path);
        bind()
    });
    if let Err(refusal) = bound {
        close(made);
        return Err(refusal);
    }
    // SAFETY: the path ends with a zero byte.
    unsafe { libc::chmod(path.with_end().as_ptr().cast(), mode) };
    Ok(made)
}

/// Whether it is a socket file behind which nobody is. `probe` is a unix datagram socket that is bound to nothing.
fn is_stale(path: &Path, probe: c_int) -> bool {
    let mut about = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path ends with a zero byte, and `about` has room. By number: glibc before 2.33 has no lstat() to link.
    let result = unsafe {
        libc::syscall(
            libc::SYS_statx,
            libc::AT_FDCWD,
            path.with_end().as_ptr(),
            libc::AT_SYMLINK_NOFOLLOW,
            libc::STATX_TYPE,
            about.as_mut_ptr(),
        )
    };
    // SAFETY: plain integers, zero before.
    if result != 0 || u32::from(unsafe { about.assume_init() }.stx_mode) & libc::S_IFMT != libc::S_IFSOCK {
        return false;
    }
    let (name, length) = raw(&Listener::Unix(*path));
    // A socket of another type answers EPROTOTYPE, which is an answer.
    // SAFETY: `name` is `length` readable bytes.
    unsafe {
        socket::connect(probe, (&raw const name).cast(), length as socklen_t) != 0 && errno() == libc::ECONNREFUSED
    }
}

/// The next client's socket, as accept4() gives it: with the flags that were asked for and no others.
unsafe fn taken(fd: c_int, address: *mut sockaddr, length: *mut socklen_t, flags: c_int, before: c_int) -> c_int {
    if !address.is_null() && length.is_null() {
        set_errno(libc::EFAULT);
        return -1;
    }
    // SAFETY: readable, as accept(2) has it.
    let room = if address.is_null() { 0 } else { unsafe { *length } };
    let mut passed_over = 0u32;
    while passed_over < MOST_PASSED_OVER {
        passed_over = passed_over.wrapping_add(1);
        let client = match receive(fd, flags) {
            Ok(Some(client)) => client,
            Ok(None) => continue,
            Err(refusal) => {
                set_errno(refusal);
                return -1;
            }
        };
        if !address.is_null() {
            // SAFETY: the caller's promise; the length is what it was.
            let result = unsafe {
                *length = room;
                libc::getpeername(client, address, length)
            };
            if result != 0 {
                let refusal = errno();
                close(client);
                // It has left between the two calls.
                if refusal == libc::ENOTCONN {
                    continue;
                }
                set_errno(refusal);
                return -1;
            }
        }
        let state = if flags & libc::SOCK_NONBLOCK != 0 { libc::O_NONBLOCK } else { 0 };
        // SAFETY: no memory is involved.
        unsafe { libc::fcntl(client, libc::F_SETFL, state) };
        set_errno(before);
        return client;
    }
    set_errno(libc::ECONNABORTED);
    -1
}

/// Take one datagram, and the client that it brings; None if it brings none. Err is an errno of recvmsg(2), or EINVAL
/// if no more can come.
fn receive(fd: c_int, flags: c_int) -> Result<Option<c_int>, c_int> {
    let mut note = MaybeUninit::<[u8; MOST_NOTE_BYTES]>::uninit();
    let mut control = [0u64; 8];
    let mut part = libc::iovec { iov_base: note.as_mut_ptr().cast(), iov_len: MOST_NOTE_BYTES };
    // SAFETY: integers and pointers, for which zero is a value.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    // SAFETY: arithmetic.
    header.msg_controllen = unsafe { libc::CMSG_SPACE((DESCRIPTORS * size_of::<c_int>()) as u32) } as _;
    let inherited = if flags & libc::SOCK_CLOEXEC != 0 { libc::MSG_CMSG_CLOEXEC } else { 0 };
    // SAFETY: all that `header` points to is there and as long as it says.
    let length = unsafe { libc::recvmsg(fd, &raw mut header, inherited) };
    let Ok(length) = usize::try_from(length) else { return Err(errno()) };

    let mut descriptors = [-1; DESCRIPTORS];
    let mut count = 0usize;
    // SAFETY: the kernel has written whole control messages, which these macros walk; CMSG_LEN(0) is their header.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&raw const header);
        while !message.is_null() {
            if ((*message).cmsg_level, (*message).cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let bytes = ((*message).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                let data = libc::CMSG_DATA(message).cast::<c_int>();
                for place in 0..bytes / size_of::<c_int>() {
                    if let Some(slot) = descriptors.get_mut(count) {
                        *slot = data.add(place).read_unaligned();
                        count = count.wrapping_add(1);
                    }
                }
            }
            message = libc::CMSG_NXTHDR(&raw const header, message);
        }
    }
    // SAFETY: recvmsg() has written `length` bytes; without MSG_TRUNC among the flags it answers no more than fit.
    let bytes = unsafe { core::slice::from_raw_parts(note.as_ptr().cast::<u8>(), length.min(MOST_NOTE_BYTES)) };
    let whole = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) == 0;
    if let (true, [client, ..], 1) = (whole && is_note(bytes), descriptors, count)
        && is_connected(client)
    {
        return Ok(Some(client));
    }
    for &descriptor in descriptors.iter().take(count) {
        close(descriptor);
    }
    if length == 0 && is_shut(fd) { Err(libc::EINVAL) } else { Ok(None) }
}

/// Whether it is a TCP connection: only TCP has an answer, and its first byte is the state.
fn is_connected(client: c_int) -> bool {
    let mut state = 0u8;
    let mut length = 1;
    // SAFETY: one writable byte.
    let result = unsafe {
        socket::getsockopt(client, libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut state).cast(), &raw mut length)
    };
    result == 0 && length == 1 && !matches!(state, TCP_SYN_SENT | TCP_CLOSE | TCP_LISTEN)
}

/// Whether an empty answer means that nothing will ever come, and not an empty datagram (unix_dgram_poll).
fn is_shut(fd: c_int) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one element.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

/// Read what a program hands to bind(): an internet endpoint without a scope, or an absolute path.
///
/// # Safety
/// `address` is null or `length` readable bytes.
unsafe fn read(address: *const sockaddr, length: socklen_t) -> Option<Listener> {
    // SAFETY: the caller's promise.
    if let Some(end) = unsafe { Endpoint::read(address, length) } {
        return Some(Listener::Internet(end.address, end.port));
    }
    let length = length as usize;
    if address.is_null() || length <= PATH_AT || length > size_of::<sockaddr_un>() {
        return None;
    }
    // SAFETY: that many bytes are readable.
    let (family, path) = unsafe {
        let path = core::slice::from_raw_parts(address.cast::<u8>().add(PATH_AT), length.wrapping_sub(PATH_AT));
        (address.cast::<sa_family_t>().read_unaligned(), path)
    };
    let path = path.split(|&byte| byte == 0).next()?;
    if c_int::from(family) == libc::AF_UNIX { Path::new(path).map(Listener::Unix) } else { None }
}

/// A name as the kernel has it, and its length.
fn raw(listener: &Listener) -> (libc::sockaddr_storage, usize) {
    // SAFETY: plain integers, for which zero is a value.
    let mut name: libc::sockaddr_storage = unsafe { MaybeUninit::zeroed().assume_init() };
    let start = &raw mut name;
    // SAFETY: a sockaddr_storage is as large and as aligned as each of the three.
    let length = unsafe {
        match listener {
            Listener::Internet(IpAddr::V4(address), port) => {
                let name = start.cast::<sockaddr_in>();
                (*name).sin_family = libc::AF_INET as sa_family_t;
                (*name).sin_port = port.to_be();
                (*name).sin_addr.s_addr = address.to_bits().to_be();
                size_of::<sockaddr_in>()
            }
            Listener::Internet(IpAddr::V6(address), port) => {
                let name = start.cast::<sockaddr_in6>();
                (*name).sin6_family = libc::AF_INET6 as sa_family_t;
                (*name).sin6_port = port.to_be();
                (*name).sin6_addr.s6_addr = address.octets();
                size_of::<sockaddr_in6>()
            }
            Listener::Unix(path) => {
                let name = start.cast::<sockaddr_un>();
                (*name).sun_family = libc::AF_UNIX as sa_family_t;
                let bytes = path.with_end();
                ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut (*name).sun_path).cast::<u8>(), bytes.len());
                PATH_AT.wrapping_add(path.as_bytes().len()).wrapping_add(1)
            }
        }
    };
    (name, length)
}

fn option(fd: c_int, name: c_int) -> Option<c_int> {
    let mut value: c_int = 0;
    let mut length = size_of::<c_int>() as socklen_t;
    // SAFETY: `value` is `length` writable bytes.
    let result = unsafe { socket::getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut length) };
    (result == 0).then_some(value)
}

fn unlink(path: &Path) {
    // SAFETY: the path ends with a zero byte.
    unsafe { libc::unlink(path.with_end().as_ptr().cast()) };
}

/// By number: close() is a point at which a thread may be cancelled, and would be before it closes.
fn close(fd: c_int) {
    // SAFETY: no memory is involved; the descriptor is ours.
    unsafe { libc::syscall(libc::SYS_close, fd) };
}

fn reason(refusal: c_int) -> &'static [u8] {
    match refusal {
        libc::EADDRINUSE => b"another process is there, or something that is no socket",
        libc::EACCES | libc::EPERM => b"this user may not make a file there",
        libc::ENOENT | libc::ENOTDIR => b"there is no such folder",
        libc::EROFS => b"the file system is read-only",
        _ => b"bind() fails",
    }
}
