//! Thin safe wrappers over the system calls that both kernel carriers need: sockets with their options, epoll, eventfd.
//!
//! Decides which options a `SourceChoice` means. Knows no core, no ring and no connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use fourtuple_engine::{CarrierError, Errno, Instant, SourceChoice, Step, Transport};

use crate::datagram;

/// linux/in.h, since 6.3; libc has no name for it yet.
const IP_LOCAL_PORT_RANGE: libc::c_int = 51;
/// linux/in6.h; libc has no name for it on every target.
const IPV6_FREEBIND: libc::c_int = 78;

/// The errno that the last failed call of this thread left.
pub(crate) fn last_errno() -> Errno {
    errno_of(&io::Error::last_os_error())
}

/// The errno inside an `io::Error`; those without one are none of the kernel's, and ours to explain as EINVAL.
pub(crate) fn errno_of(error: &io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(libc::EINVAL))
}

/// The host's monotonic time. That of a connection which has come from another process is earlier than the carrier's start.
pub(crate) struct Clock {
    started: std::time::Instant,
    at: Instant,
}

impl Clock {
    pub(crate) fn start() -> Clock {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `now` is writable. The call cannot fail for a clock that exists.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
        let at = Duration::new(now.tv_sec as u64, now.tv_nsec as u32);
        Clock { started: std::time::Instant::now(), at: Instant(0).after(at) }
    }

    pub(crate) fn now(&self) -> Instant {
        self.at.after(self.started.elapsed())
    }
}

/// An eventfd that ends a worker's sleep; shared by the worker's thread and whoever orders it about.
#[derive(Clone, Debug)]
pub(crate) struct Wake(Arc<OwnedFd>);

impl Wake {
    pub(crate) fn new() -> Result<Wake, CarrierError> {
        // SAFETY: no pointers; the result is checked before it is owned.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        owned(fd).map(|fd| Wake(Arc::new(fd))).map_err(|error| CarrierError { what: "eventfd", error })
    }

    /// Wake the sleeper. A full counter (EAGAIN) wakes as well, so the result does not matter.
    pub(crate) fn ring(&self) {
        let one = 1u64;
        // SAFETY: eight readable bytes, as eventfd_write() asks.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Take the ringing back.
    pub(crate) fn silence(&self) {
        let mut count = 0u64;
        // SAFETY: eight writable bytes, as eventfd_read() asks.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// An epoll instance.
pub(crate) struct Poller(OwnedFd);

impl Poller {
    pub(crate) fn new() -> Result<Poller, CarrierError> {
        // SAFETY: no pointers; the result is checked before it is owned.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        owned(fd).map(Poller).map_err(|error| CarrierError { what: "epoll_create1", error })
    }

    pub(crate) fn add(&self, fd: RawFd, events: i32, data: u64) -> Result<(), Errno> {
        let mut event = libc::epoll_event { events: events as u32, u64: data };
        // SAFETY: `event` lives through the call.
        checked(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) }).map(drop)
    }

    /// Watch it for something else; what is there already is told by the next wait (ep_modify()).
    pub(crate) fn change(&self, fd: RawFd, events: i32, data: u64) -> Result<(), Errno> {
        let mut event = libc::epoll_event { events: events as u32, u64: data };
        // SAFETY: `event` lives through the call.
        checked(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_MOD, fd, &raw mut event) }).map(drop)
    }

    /// Watch it no more. Closing does that by itself only if nobody else holds the socket.
    pub(crate) fn remove(&self, fd: RawFd) {
        // SAFETY: EPOLL_CTL_DEL reads no event. It cannot fail for a descriptor that was added.
        unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
    }

    /// Fill `events` from its start; returns how many. A signal, or task work of io_uring, makes it none.
    pub(crate) fn wait(&self, events: &mut [libc::epoll_event], most: Duration) -> Result<usize, Errno> {
        // Rounded up: waking a little late costs less than spinning through the last fraction of a millisecond.
        let milliseconds = most.as_nanos().div_ceil(1_000_000).min(1_000_000) as libc::c_int;
        // SAFETY: `events` is writable for its whole length.
        let count = unsafe {
            libc::epoll_wait(self.0.as_raw_fd(), events.as_mut_ptr(), events.len() as libc::c_int, milliseconds)
        };
        match checked(count) {
            Err(Errno::EINTR) => Ok(0),
            count => count.map(|count| count as usize),
        }
    }
}

/// A socket address in the kernel's form.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) union RawAddress {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl RawAddress {
    /// AF_UNSPEC: connect() to it is tcp_disconnect().
    pub(crate) fn unspecified() -> RawAddress {
        // SAFETY: all of its members are plain integers, for which zero is a value; AF_UNSPEC is 0.
        unsafe { std::mem::zeroed() }
    }

    pub(crate) fn new(address: SocketAddr) -> (RawAddress, libc::socklen_t) {
        let mut raw = RawAddress::unspecified();
        match address {
            SocketAddr::V4(address) => {
                raw.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
                    sin_zero: [0; 8],
                };
                (raw, size_of::<libc::sockaddr_in>() as libc::socklen_t)
            }
            SocketAddr::V6(address) => {
                raw.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: address.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                    sin6_scope_id: address.scope_id(),
                };
                (raw, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
            }
        }
    }

    pub(crate) fn as_ptr(&self) -> *const libc::sockaddr {
        std::ptr::from_ref(self).cast()
    }

    pub(crate) fn socket_addr(&self) -> Option<SocketAddr> {
        // SAFETY: every member begins with the family, and the kernel wrote the member that it names; all are integers.
        unsafe {
            match libc::c_int::from(self.family) {
                libc::AF_INET => Some(SocketAddr::V4(SocketAddrV4::new(
                    Ipv4Addr::from(u32::from_be(self.v4.sin_addr.s_addr)),
                    u16::from_be(self.v4.sin_port),
                ))),
                libc::AF_INET6 => Some(SocketAddr::V6(SocketAddrV6::new(
                    Ipv6Addr::from(self.v6.sin6_addr.s6_addr),
                    u16::from_be(self.v6.sin6_port),
                    self.v6.sin6_flowinfo,
                    self.v6.sin6_scope_id,
                ))),
                _ => None,
            }
        }
    }
}

/// Any address and port of the destination's family.
pub(crate) fn any_endpoint(destination: SocketAddr) -> SocketAddr {
    match destination {
        SocketAddr::V4(_) => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0),
        SocketAddr::V6(_) => SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0),
    }
}

/// A socket ready for connect(): its local endpoint chosen as `choice` says (limits catalogue A3, A4, A7, A8, A10). One for
/// datagrams is connected already: that is no handshake, and has to be done together with the choice.
/// `nonblocking` is 0 or SOCK_NONBLOCK.
pub(crate) fn outgoing(
    transport: Transport,
    source: SocketAddr,
    destination: SocketAddr,
    choice: SourceChoice,
    range: (u16, u16),
    nonblocking: libc::c_int,
) -> Result<OwnedFd, (Step, Errno)> {
    if transport == Transport::Datagram {
        return datagram::connected(source, destination, choice, nonblocking);
    }
    let socket = stream_socket(destination, nonblocking).map_err(|error| (Step::Socket, error))?;
    bind_as_chosen(&socket, source, choice, range).map_err(|error| (Step::Bind, error))?;
    Ok(socket)
}

fn bind_as_chosen(socket: &OwnedFd, source: SocketAddr, choice: SourceChoice, range: (u16, u16)) -> Result<(), Errno> {
    let (ports, port) = match choice {
        SourceChoice::Kernel => return Ok(()),
        SourceChoice::KernelPort => (None, 0),
        SourceChoice::KernelRange => (Some(range), 0),
        SourceChoice::SinglePort => (Some((source.port(), source.port())), 0),
        SourceChoice::Bind => (None, source.port()),
    };
    if choice == SourceChoice::Bind {
        set_option(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    } else {
        // Both options are of level IPPROTO_IP for IPv6 sockets as well (ip_setsockopt serves them).
        set_option(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    }
    if let Some((low, high)) = ports {
        set_option(socket, libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, u32::from(high) << 16 | u32::from(low))?;
    }
    bind_anywhere(socket, SocketAddr::new(source.ip(), port))
}

/// bind(), also to an address that is on no interface and covered by a local route (AnyIP).
pub(crate) fn bind_anywhere(socket: &OwnedFd, local: SocketAddr) -> Result<(), Errno> {
    if matches!(local.ip(), IpAddr::V6(address) if !address.is_unspecified()) {
        // __inet6_bind() wants the address on an interface; IPv4 asks the routing table and needs nothing.
        set_option(socket, libc::IPPROTO_IPV6, IPV6_FREEBIND, 1)?;
    }
    bind(socket, local)
}

/// Whether others that do so as well may bind to the socket's port.
pub(crate) fn share_port(socket: &OwnedFd, shared: bool) -> Result<(), Errno> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, u32::from(shared))
}

/// Options of a listener that what is accepted inherits.
fn set_inherited(socket: &OwnedFd) -> Result<(), Errno> {
    // tcp_create_openreq_child().
    send_at_once(socket);
    // What is only peeked at fills the receive buffer, and with 128 kB of it the window closes. A low-water mark makes
    // room for itself (tcp_set_rcvlowat()), connections inherit that, and unlike SO_RCVBUF it leaves the kernel free
    // to give more.
    for bytes in [fourtuple_engine::contract::PEEK_BYTES as u32, 1] {
        set_option(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes)?;
    }
    Ok(())
}

/// Listen with a socket that is bound already; returns its endpoint. Others may hold it and listen with it, too.
pub(crate) fn adopt_listener(socket: &OwnedFd, backlog: u32) -> Result<SocketAddr, (Step, Errno)> {
    let local = local_endpoint(socket).map_err(|error| (Step::Bind, error))?;
    if local.port() == 0 {
        // listen() would choose a port.
        return Err((Step::Bind, Errno(libc::EINVAL)));
    }
    if int_option(socket.as_raw_fd(), libc::SO_ACCEPTCONN) == Ok(0) {
        // On one that listens, what came at this moment would inherit the low-water mark, too.
        set_inherited(socket).map_err(|error| (Step::Bind, error))?;
    }
    listen(socket, backlog).map_err(|error| (Step::Listen, error))?;
    Ok(local)
}

fn listen(socket: &OwnedFd, backlog: u32) -> Result<(), Errno> {
    let backlog = backlog.min(libc::c_int::MAX as u32) as libc::c_int;
    // SAFETY: no pointers.
    checked(unsafe { libc::listen(socket.as_raw_fd(), backlog) }).map(drop)
}

/// O_NONBLOCK, for everybody who holds this open file.
pub(crate) fn never_block(socket: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: no pointers; a socket has no other status flag that we would keep (O_ASYNC is nobody's here).
    checked(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }).map(drop)
}

/// A socket that listens, and its bound endpoint.
pub(crate) fn listening(
    local: SocketAddr,
    backlog: u32,
    reuse_port: bool,
    nonblocking: libc::c_int,
) -> Result<(OwnedFd, SocketAddr), (Step, Errno)> {
    let socket = stream_socket(local, nonblocking).map_err(|error| (Step::Socket, error))?;
    let bound = || {
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        if reuse_port {
            set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        set_inherited(&socket)?;
        bind(&socket, local)
    };
    bound().map_err(|error| (Step::Bind, error))?;
    listen(&socket, backlog).map_err(|error| (Step::Listen, error))?;
    let bound = local_endpoint(&socket).map_err(|error| (Step::Listen, error))?;
    Ok((socket, bound))
}

/// connect() on a non-blocking socket; EINPROGRESS is the usual answer.
pub(crate) fn connect(socket: &OwnedFd, destination: SocketAddr) -> Result<(), Errno> {
    let (raw, len) = RawAddress::new(destination);
    // SAFETY: `raw` holds `len` bytes.
    unsafe { connect_and_say(socket, raw.as_ptr(), len, said(destination)) }
}

/// Marks a connect() that says in registers where it leads ("4TUP").
const SAYS_WHERE: u64 = 0x3454_5550;

/// Where a connect() leads, as registers that connect(2) does not use say it: the address's halves; mark, family and port.
fn said(destination: SocketAddr) -> [u64; 3] {
    let (family, address) = match destination.ip() {
        IpAddr::V4(address) => (4, u128::from(u32::from(address))),
        IpAddr::V6(address) => (6, u128::from(address)),
    };
    [(address >> 64) as u64, address as u64, SAYS_WHERE << 32 | family << 16 | u64::from(destination.port())]
}

/// connect(). A seccomp filter sees registers and no memory: whoever makes the connections of a process that may not make
/// them itself (seccomp_unotify(2)) learns in this way where to, needs no right to look into it, and cannot be told one
/// thing and then shown another.
///
/// # Safety
///
/// `raw` points to `len` bytes.
unsafe fn connect_and_say(
    socket: &OwnedFd,
    raw: *const libc::sockaddr,
    len: libc::socklen_t,
    [upper, lower, rest]: [u64; 3],
) -> Result<(), Errno> {
    let socket = libc::c_long::from(socket.as_raw_fd());
    // SAFETY: as the caller says; the kernel ignores the registers after the third.
    let result = unsafe { libc::syscall(libc::SYS_connect, socket, raw, libc::c_ulong::from(len), upper, lower, rest) };
    checked(result as libc::c_int).map(drop)
}

/// A connection from the accept queue, non-blocking, and its peer.
pub(crate) fn accept(listener: &OwnedFd) -> Result<(OwnedFd, Option<SocketAddr>), Errno> {
    let mut raw = RawAddress::unspecified();
    let mut len = size_of::<RawAddress>() as libc::socklen_t;
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: `raw` is `len` writable bytes; the result is checked before it is owned.
    let socket = owned(unsafe { libc::accept4(listener.as_raw_fd(), (&raw mut raw).cast(), &raw mut len, flags) })?;
    Ok((socket, raw.socket_addr()))
}

/// Connections in a listener's accept queue (tcp_get_info() of a listener; 0 if it will not say).
pub(crate) fn accept_queue(listener: &OwnedFd) -> u32 {
    // SAFETY: all of its members are plain integers, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    let (fd, into) = (listener.as_raw_fd(), (&raw mut info).cast());
    // SAFETY: `info` is `len` writable bytes.
    unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, into, &raw mut len) };
    info.tcpi_unacked
}

/// TCP_NODELAY: bytes that are passed on wait for no acknowledgement of those before.
pub(crate) fn send_at_once(socket: &OwnedFd) {
    // It cannot fail on a TCP socket; if it did, small pieces would only be late.
    let _ = set_option(socket, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
}

/// recv() of a datagram: how long it is, which may be more than `memory` took.
pub(crate) fn receive_datagram(socket: RawFd, memory: &mut [u8]) -> Result<usize, Errno> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: `memory` is writable for its whole length.
    let count = unsafe { libc::recv(socket, memory.as_mut_ptr().cast(), memory.len(), flags) };
    usize::try_from(count).map_err(|_| last_errno())
}

/// recv() into `memory`; 0 is the peer's FIN.
pub(crate) fn receive(socket: RawFd, memory: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: `memory` is writable for its whole length.
    let count = unsafe { libc::recv(socket, memory.as_mut_ptr().cast(), memory.len(), libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| last_errno())
}

/// recv() of what is there without taking it, from the first byte on; 0 is the peer's FIN with nothing before it.
pub(crate) fn peek(socket: RawFd, memory: &mut [u8]) -> Result<usize, Errno> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
    // SAFETY: `memory` is writable for its whole length.
    let count = unsafe { libc::recv(socket, memory.as_mut_ptr().cast(), memory.len(), flags) };
    usize::try_from(count).map_err(|_| last_errno())
}

/// recv() that copies nothing: MSG_TRUNC takes bytes off a TCP stream unseen (tcp_recvmsg_locked()). Returns how many.
pub(crate) fn discard(socket: RawFd, bytes: usize) -> Result<usize, Errno> {
    // SAFETY: with MSG_TRUNC the kernel writes nothing to the memory, so there may be none.
    let count = unsafe { libc::recv(socket, std::ptr::null_mut(), bytes, libc::MSG_DONTWAIT | libc::MSG_TRUNC) };
    usize::try_from(count).map_err(|_| last_errno())
}

/// FIN behind what was sent. It cannot fail on a connection that stands; on another one there is nobody to tell.
pub(crate) fn shutdown(socket: RawFd) {
    // SAFETY: no pointers.
    unsafe { libc::shutdown(socket, libc::SHUT_WR) };
}

/// Who is at the other end and which of our endpoints this one is; nothing if the connection is no more.
pub(crate) fn names(socket: RawFd) -> Option<(SocketAddr, SocketAddr)> {
    let name = |call: unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int| {
        let mut raw = RawAddress::unspecified();
        let mut len = size_of::<RawAddress>() as libc::socklen_t;
        // SAFETY: `raw` is `len` writable bytes; getpeername() and getsockname() ask for the same.
        checked(unsafe { call(socket, (&raw mut raw).cast(), &raw mut len) }).ok()?;
        raw.socket_addr()
    };
    Some((name(libc::getpeername)?, name(libc::getsockname)?))
}

/// A connection to the unix stream socket at `path`, which stands at once or not at all; EAGAIN is a full backlog
/// (unix_stream_connect()).
pub(crate) fn unix_connection(path: &[u8]) -> Result<OwnedFd, (Step, Errno)> {
    unix_connected(libc::SOCK_STREAM, path)
}

/// A unix socket of this kind, connected to `path`; one that begins with a zero byte is abstract. It does not block.
pub(crate) fn unix_connected(kind: libc::c_int, path: &[u8]) -> Result<OwnedFd, (Step, Errno)> {
    // SAFETY: all of its members are plain integers, for which zero is a value.
    let mut raw: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    // A path ends with a zero byte; an abstract name with the length.
    let room = raw.sun_path.len() - usize::from(path.first() != Some(&0));
    if path.is_empty() || path.len() > room {
        return Err((Step::Connect, Errno(libc::ENAMETOOLONG)));
    }
    raw.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in raw.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    let len = std::mem::offset_of!(libc::sockaddr_un, sun_path) + path.len() + usize::from(path[0] != 0);
    let socket = socket(libc::AF_UNIX, kind | libc::SOCK_NONBLOCK, 0).map_err(|error| (Step::Socket, error))?;
    // SAFETY: `raw` holds `len` bytes. What an earlier call left in registers must not be taken for a word of this one.
    unsafe { connect_and_say(&socket, (&raw const raw).cast(), len as libc::socklen_t, [0; 3]) }
        .map_err(|error| (Step::Connect, error))?;
    Ok(socket)
}

/// Let system calls on the socket wait, as io_uring wants it.
pub(crate) fn let_block(socket: &OwnedFd) {
    // SAFETY: no pointers; F_SETFL with no flags cannot fail on a socket of ours.
    unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, 0) };
}

/// A datagram with `note`, and `sockets`, one or two or none, as SCM_RIGHTS, to where `sender` is connected.
pub(crate) fn send_sockets(sender: &OwnedFd, sockets: &[RawFd], note: &[u8]) -> Result<(), Errno> {
    let mut bytes = libc::iovec { iov_base: note.as_ptr().cast_mut().cast(), iov_len: note.len() };
    let mut control = Control { bytes: [0; CONTROL_BYTES] };
    // SAFETY: all of its members are plain integers or pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut bytes;
    message.msg_iovlen = 1;
    if !sockets.is_empty() {
        assert!(sockets.len() <= MOST_SOCKETS, "there is room for two");
        let len = size_of_val(sockets) as u32;
        message.msg_control = (&raw mut control).cast();
        // SAFETY: arithmetic alone.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(len) } as _;
        // SAFETY: `control` is aligned for a header and has room for one with two descriptors (CMSG_SPACE).
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len) as _;
            for (place, socket) in sockets.iter().enumerate() {
                libc::CMSG_DATA(header).cast::<RawFd>().add(place).write_unaligned(*socket);
            }
        }
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `message` names memory that lives through the call; sendmsg() only reads it. A datagram goes whole or not.
    let sent = unsafe { libc::sendmsg(sender.as_raw_fd(), &raw const message, flags) };
    if sent < 0 { Err(last_errno()) } else { Ok(()) }
}

/// A message into `memory`, with the descriptors that came along, close-on-exec; how long it is, 0 for an end. Of what does
/// not go in, bytes or descriptors, the beginning of the bytes is told and no descriptor kept.
pub(crate) fn receive_sockets(socket: &OwnedFd, memory: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let mut bytes = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() };
    let mut control = Control { bytes: [0; CONTROL_BYTES] };
    // SAFETY: all of its members are plain integers or pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut bytes;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CONTROL_BYTES as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `message` names memory that is writable and lives through the call.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let count = usize::try_from(count).map_err(|_| last_errno())?;
    let mut sockets = Vec::new();
    // SAFETY: the kernel has filled `control` as far as `msg_controllen` says; the macros stay within that. The descriptors
    // in it have just been made for us, and nobody else knows them.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while let Some(head) = header.as_ref() {
            if (head.cmsg_level, head.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                #[allow(clippy::unnecessary_cast, reason = "musl has it in 32 bits")]
                let length = head.cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                for place in 0..length / size_of::<RawFd>() {
                    let fd = libc::CMSG_DATA(header).cast::<RawFd>().add(place).read_unaligned();
                    sockets.push(OwnedFd::from_raw_fd(fd));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        // RLIMIT_NOFILE is reached, or whoever sent it does not know us.
        sockets.clear();
    }
    Ok((count, sockets))
}

/// Whether it is a connected stream socket, or one that was: TCP's or a unix one.
pub(crate) fn is_connection(socket: &OwnedFd) -> bool {
    let option = |option| int_option(socket.as_raw_fd(), option);
    option(libc::SO_TYPE) == Ok(libc::SOCK_STREAM)
        && option(libc::SO_ACCEPTCONN) == Ok(0)
        && matches!(option(libc::SO_DOMAIN), Ok(libc::AF_INET | libc::AF_INET6 | libc::AF_UNIX))
}

/// Descriptors that go with one message, at most.
const MOST_SOCKETS: usize = 2;
/// CMSG_SPACE of these.
// SAFETY: arithmetic on a constant.
const CONTROL_BYTES: usize = unsafe { libc::CMSG_SPACE((MOST_SOCKETS * size_of::<RawFd>()) as u32) } as usize;

/// Memory for one control message, aligned as its header is.
#[repr(C)]
union Control {
    bytes: [u8; CONTROL_BYTES],
    header: libc::cmsghdr,
}

/// send() of what fits. With `more` the last segment may wait for what follows: the end, which then goes with it
/// (tcp_send_fin()).
pub(crate) fn send(socket: RawFd, bytes: &[u8], more: bool) -> Result<usize, Errno> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | if more { libc::MSG_MORE } else { 0 };
    // SAFETY: `bytes` is readable for its whole length.
    let count = unsafe { libc::send(socket, bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(count).map_err(|_| last_errno())
}

/// SO_ERROR: what became of a connect(), zero if it stands.
pub(crate) fn pending_error(socket: RawFd) -> Errno {
    int_option(socket, libc::SO_ERROR).map_or_else(|error| error, Errno)
}

/// An option of the socket level.
fn int_option(socket: RawFd, option: libc::c_int) -> Result<libc::c_int, Errno> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` is `len` writable bytes.
    checked(unsafe { libc::getsockopt(socket, libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len) })?;
    Ok(value)
}

/// From now on close() sends RST instead of FIN.
pub(crate) fn reset_on_close(socket: RawFd) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: `linger` is readable for the length given. It cannot fail on a socket of ours; if it did, close() sends FIN.
    unsafe {
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        )
    };
}

/// Close a descriptor that is kept as a number (an `OwnedFd` per connection would have no room for "none").
pub(crate) fn close(fd: RawFd) {
    // SAFETY: the caller owns `fd` and forgets it. Linux frees the descriptor whatever close() answers.
    unsafe { libc::close(fd) };
}

/// The soft RLIMIT_NOFILE.
pub(crate) fn descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is writable. The call cannot fail for a resource that exists.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur
}

fn stream_socket(like: SocketAddr, nonblocking: libc::c_int) -> Result<OwnedFd, Errno> {
    socket(family_of(like), libc::SOCK_STREAM | nonblocking, 0)
}

/// An unbound UDP socket.
pub(crate) fn datagram_socket(like: SocketAddr, nonblocking: libc::c_int) -> Result<OwnedFd, Errno> {
    socket(family_of(like), libc::SOCK_DGRAM | nonblocking, 0)
}

/// A netlink socket that answers which sockets there are (sock_diag(7)).
pub(crate) fn diagnosis_socket() -> Result<OwnedFd, Errno> {
    socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)
}

fn family_of(like: SocketAddr) -> libc::c_int {
    if like.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers; the result is checked before it is owned.
    owned(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })
}

fn set_option(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: u32) -> Result<(), Errno> {
    // SAFETY: `value` is four readable bytes.
    checked(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    })
    .map(drop)
}

fn bind(socket: &OwnedFd, local: SocketAddr) -> Result<(), Errno> {
    let (raw, len) = RawAddress::new(local);
    // SAFETY: `raw` holds `len` bytes.
    checked(unsafe { libc::bind(socket.as_raw_fd(), raw.as_ptr(), len) }).map(drop)
}

fn local_endpoint(socket: &OwnedFd) -> Result<SocketAddr, Errno> {
    let mut raw = RawAddress::unspecified();
    let mut len = size_of::<RawAddress>() as libc::socklen_t;
    // SAFETY: `raw` is `len` writable bytes.
    checked(unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut raw).cast(), &raw mut len) })?;
    raw.socket_addr().ok_or(Errno(libc::EAFNOSUPPORT))
}

fn owned(fd: libc::c_int) -> Result<OwnedFd, Errno> {
    let fd = checked(fd)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn checked(result: libc::c_int) -> Result<libc::c_int, Errno> {
    if result < 0 { Err(last_errno()) } else { Ok(result) }
}
