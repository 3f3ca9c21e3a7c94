//! The contract between a core and its carrier: what happened, what to do, and who owns what meanwhile.
//!
//! Decides the vocabulary and its rules. Knows no system call, no clock, and no core.
//!
//! Rules, held by the conformance suite that every carrier must pass:
//!
//! 1. Every `Connect` is answered exactly once, by `Connected` or `ConnectFailed`, with the same ticket.
//! 2. Every connection (`Accepted` or `Connected`) ends with exactly one `Closed`, after which its index may be used
//!    again with another generation. Only `Command::Close` ends a connection: after `Finished` (the peer sent FIN) or
//!    `Failed` (an error) the core still owns it and must close it.
//! 3. A core has at most one `Send` outstanding per connection; `Sent` answers it when the kernel has taken every
//!    byte (the carrier repeats short writes). A `Send` on a connection that fails or is closed gets no `Sent`.
//! 4. A `Buf` is owned by whoever holds it. `Received` gives one to the core, `Send` gives it back; a core that does not
//!    want it must `release` it. When all connections are closed, every buffer is back in its pool.
//! 5. A command for a connection whose generation has passed is ignored, its buffer released.
//! 6. Between `Pause` and `Resume` at most the bytes already on their way are delivered (bounded by the carrier's
//!    buffers per ring); the kernel's window then holds the peer back. No byte is lost or reordered.
//! 7. No event is delivered for a connection before its `Accepted`/`Connected` nor after its `Closed`.
//! 8. On a datagram connection (`Transport::Datagram`) each `Send` is one datagram, and each `Received` is one, whole and
//!    perhaps empty. There is no `Finished` and no `Failed`: an error is told as `Disturbed`, and the connection lives on.
//!    `Sent` answers every `Send`, also one that was disturbed. A datagram that is longer than a buffer is dropped and
//!    told as `Disturbed` (Receive, EMSGSIZE). Nothing is told that came before `Connected`. What the network does to
//!    datagrams (loses, doubles, reorders) is not undone.
//! 9. From `Peek` to `Take` bytes are shown and not taken: `Peeked` holds what has come so far, from the first byte, and
//!    comes again when more has come; nothing comes again for the same bytes alone, unless `Peek` is said again.
//!    `Discard` takes the first of the bytes shown away: what is shown, taken or handed off later begins behind them.
//! 10. `HandOff` is answered once, by `HandedOff` or `HandOffFailed`, unless the connection is closed first. After
//!     `HandedOff` the receiver owns the stream with every byte unread; the core still has to `Close` its own end, which
//!     then says nothing to the peer. After `HandOffFailed` the connection is what it was. If that was for want of room
//!     (EAGAIN), `Roomy` may follow when there is some; a carrier need not know, so a core tries again by itself, too.
//!     After `Watch` the end of a connection that is shown and paused is told: `Failed`, or `HungUp`, once or more.
//! 11. `Shutdown` sends FIN behind everything sent before; receiving goes on.
//! 12. `Unlisten` is answered by `Unlistened`, once; no `Accepted` of that listener comes after it. What waits in the accept
//!     queue of an adopted listener stays there, for whoever else holds the socket.
//! 13. `Halt` is answered by `Halted`, once, unless the connection is closed first. What was under way is told before it,
//!     nothing comes after it, and what of an outstanding `Send` the kernel has not taken comes back with it: bytes that
//!     the kernel has are no more in it, others are. From then on the connection is as after `Pause`, until `Resume`.
//! 14. A ferry leads to another process. It carries messages, whole and in order, each with two connections at most, which
//!     are halted. `Ship` is answered by `Shipped` when the kernel has the message; one is outstanding per ferry. Each
//!     `Fetch` is answered by one message (`Landed`), its connections as after `Halted`, or by `FerryLost` behind the last
//!     of them. A connection that was shipped is held by both processes: the one that closes it last ends it, as who was to
//!     use it has said, and a `Close` before that says nothing to the peer. Which of them may use it is the cores' business.

use std::net::SocketAddr;
use std::time::Duration;

use crate::broker::guide::Opinion;
use crate::buffers::{Buf, Buffers};
use crate::questions::{Answer, By, Filter, Names, Questions};
use crate::report::Report;

/// A moment: nanoseconds of the host's monotonic clock. Carriers read clocks; cores are told.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Instant(pub u64);

impl Instant {
    /// The time from `earlier` to here; zero if `earlier` is later.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The moment `after` from here.
    pub fn after(self, after: Duration) -> Instant {
        Instant(self.0.saturating_add(after.as_nanos().min(u64::MAX as u128) as u64))
    }
}

/// A connection as its carrier names it: a dense index (the place of its record in every table) and a generation that
/// tells two users of the same place apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ConnId {
    /// Place in the carrier's table and in the core's; below `Carrier::capacity()`.
    pub index: u32,
    /// Which use of that place; wraps.
    pub generation: u16,
}

/// A listener as the core named it in `Command::Listen`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ListenerId(pub u32);

/// A descriptor that the outside has laid ready for the carrier, by its number there. In the simulator: what it stands for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Given(pub u32);

/// An error number of the operating system (`EADDRNOTAVAIL` is 99).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Errno(pub i32);

/// The error numbers that cores tell apart (asm-generic/errno.h, the same on every Linux architecture that we build for).
impl Errno {
    /// No such path.
    pub const ENOENT: Errno = Errno(2);
    /// Interrupted by a signal.
    pub const EINTR: Errno = Errno(4);
    /// Try again.
    pub const EAGAIN: Errno = Errno(11);
    /// Out of memory.
    pub const ENOMEM: Errno = Errno(12);
    /// The host's file table is full, or the ring's file table is.
    pub const ENFILE: Errno = Errno(23);
    /// The process's descriptor table is full.
    pub const EMFILE: Errno = Errno(24);
    /// The peer is gone and we wrote.
    pub const EPIPE: Errno = Errno(32);
    /// The socket there is of another type.
    pub const EPROTOTYPE: Errno = Errno(91);
    /// A datagram is longer than it may be.
    pub const EMSGSIZE: Errno = Errno(90);
    /// The local endpoint is taken.
    pub const EADDRINUSE: Errno = Errno(98);
    /// No local endpoint is free for that destination, or the address is not ours.
    pub const EADDRNOTAVAIL: Errno = Errno(99);
    /// The peer reset.
    pub const ECONNRESET: Errno = Errno(104);
    /// No buffer space.
    pub const ENOBUFS: Errno = Errno(105);
    /// Too many descriptors of this user are on their way through unix sockets.
    pub const ETOOMANYREFS: Errno = Errno(109);
    /// No answer in time.
    pub const ETIMEDOUT: Errno = Errno(110);
    /// Nobody listens there.
    pub const ECONNREFUSED: Errno = Errno(111);
    /// Cancelled by us.
    pub const ECANCELED: Errno = Errno(125);
}

/// The step of making a connection (or of using one) at which an error came.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Step {
    /// socket(), or the place in a ring's file table.
    Socket,
    /// bind() and the options before it.
    Bind,
    /// listen().
    Listen,
    /// connect().
    Connect,
    /// accept().
    Accept,
    /// recv().
    Receive,
    /// send().
    Send,
    /// sendmsg() with a descriptor.
    HandOff,
}

/// Where a service is. A path lies in a buffer like any bytes, so that ten million of them need no table here; whoever
/// gets the target owns it.
#[derive(Debug)]
pub enum Target {
    /// A listening TCP socket.
    Tcp(SocketAddr),
    /// A listening unix stream socket by its path; a path that begins with a zero byte is an abstract name.
    Unix(Buf),
}

/// What a connection carries.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum Transport {
    /// Bytes in order, with a handshake and an end: TCP.
    #[default]
    Stream,
    /// Messages, each for itself: UDP on a connected socket, which has a four-tuple of its own.
    Datagram,
}

/// How the local endpoint of an outgoing connection comes about (limits catalogue A3, A4, A7, A8, A10).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SourceChoice {
    /// connect() alone: the kernel picks address and port.
    Kernel,
    /// Address bound with IP_BIND_ADDRESS_NO_PORT; the kernel searches a port at connect(), even ports first.
    KernelPort,
    /// As `KernelPort`, with IP_LOCAL_PORT_RANGE set to the whole range: one pass over every port (flat, >= 6.8).
    KernelRange,
    /// The port chosen by us without a bind to it: IP_BIND_ADDRESS_NO_PORT and IP_LOCAL_PORT_RANGE [p, p]. Poisons nobody.
    SinglePort,
    /// bind(address, port) with SO_REUSEADDR: cheapest, poisons the port for automatic choice in this namespace.
    /// UDP has no other way to choose a port, so for datagrams `SinglePort` means this as well.
    Bind,
}

/// What happened, as a carrier tells a core.
#[derive(Debug)]
pub enum Event {
    /// The listener accepts; `local` has the port that the kernel gave if 0 was asked for.
    Listening {
        /// Which.
        listener: ListenerId,
        /// Its bound endpoint.
        local: SocketAddr,
    },
    /// The listener could not be made.
    ListenFailed {
        /// Which.
        listener: ListenerId,
        /// At which step.
        step: Step,
        /// Why.
        error: Errno,
    },
    /// The listener is no more, and nothing will come of it.
    Unlistened {
        /// Which.
        listener: ListenerId,
    },
    /// A connection came in.
    Accepted {
        /// Through which listener.
        listener: ListenerId,
        /// Its name from now on.
        conn: ConnId,
        /// The peer's endpoint, where the carrier learnt it along with the connection.
        peer: Option<SocketAddr>,
    },
    /// accept() failed (EMFILE, ENFILE, ENOBUFS, ENOMEM ...). The carrier tries again by itself after a pause.
    AcceptFailed {
        /// At which listener.
        listener: ListenerId,
        /// Why.
        error: Errno,
    },
    /// An outgoing connection stands.
    Connected {
        /// The ticket of its `Connect`.
        ticket: u32,
        /// Its name from now on.
        conn: ConnId,
    },
    /// An outgoing connection could not be made; nothing is left of it.
    ConnectFailed {
        /// The ticket of its `Connect`.
        ticket: u32,
        /// At which step.
        step: Step,
        /// Why.
        error: Errno,
    },
    /// Bytes came; the buffer is the core's now.
    Received {
        /// On which connection.
        conn: ConnId,
        /// The bytes: `outbox.buffers.bytes(&buf)`.
        buf: Buf,
    },
    /// The peer will send no more (FIN).
    Finished {
        /// Which connection.
        conn: ConnId,
        /// It is known to receive no more, either: a unix socket whose other end is closed. Else sending is still possible.
        gone: bool,
    },
    /// The outstanding `Send` is wholly with the kernel.
    Sent {
        /// On which connection.
        conn: ConnId,
    },
    /// The connection is broken; it must still be closed by the core.
    Failed {
        /// Which connection.
        conn: ConnId,
        /// Doing what.
        step: Step,
        /// Why.
        error: Errno,
    },
    /// A datagram connection met an error and lives on: nobody listens there (ICMP, ECONNREFUSED), a datagram was too long
    /// (EMSGSIZE), nothing could be sent (EPERM, ENOBUFS ...).
    Disturbed {
        /// Which connection.
        conn: ConnId,
        /// Doing what.
        step: Step,
        /// Why.
        error: Errno,
    },
    /// The connection is gone and its index free.
    Closed {
        /// Which connection.
        conn: ConnId,
    },
    /// The answer to `Name`; nothing if the connection is no more.
    Named {
        /// Which connection.
        conn: ConnId,
        /// The peer's endpoint and ours.
        names: Option<(SocketAddr, SocketAddr)>,
    },
    /// What has come so far, not taken; the buffer is one of `outbox.peeks`.
    Peeked {
        /// On which connection.
        conn: ConnId,
        /// The bytes from the first on: `outbox.peeks.bytes(&buf)`.
        buf: Buf,
    },
    /// The peer will send no more (FIN); the bytes before that are unread, and `Finished` follows behind them. Only told of a
    /// connection that is shown and paused.
    HungUp {
        /// Which connection.
        conn: ConnId,
    },
    /// The receiver has the socket.
    HandedOff {
        /// Which connection.
        conn: ConnId,
    },
    /// The receiver could not be given the socket; the connection still stands, its bytes unread.
    HandOffFailed {
        /// Which connection.
        conn: ConnId,
        /// Why; `EAGAIN` is a full queue.
        error: Errno,
    },
    /// Nothing is under way on the connection, and nothing will be until `Resume`.
    Halted {
        /// Which.
        conn: ConnId,
        /// What of an outstanding `Send` the kernel does not have.
        rest: Option<Buf>,
    },
    /// The message is with the kernel, or one of its connections is closed, and it was not sent.
    Shipped {
        /// Over which ferry.
        ferry: Given,
    },
    /// The message that was to be fetched.
    Landed {
        /// Over which ferry.
        ferry: Given,
        /// What came with it, halted. A descriptor that is no connected stream socket, or for which there is no place, is
        /// closed and not told.
        conns: [Option<ConnId>; 2],
        /// The bytes; the buffer is one of `outbox.peeks`.
        message: Buf,
    },
    /// Nobody is at the other end any more, or there never was a ferry; every message has been told.
    FerryLost {
        /// Which.
        ferry: Given,
        /// Why; nothing if it was closed there.
        error: Option<Errno>,
    },
    /// Where there was no room for this connection, there may be some now.
    Roomy {
        /// Which connection.
        conn: ConnId,
    },
    /// Somebody outside wants something.
    Ordered(Order),
}

/// What the outside (Python, a signal, a test) may ask of a running core.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Order {
    /// Send the token on every connection once and check what comes back.
    Ping,
    /// New connections per second from now on; 0 is as fast as possible.
    Rate(u32),
    /// Raise (or lower, never below what is open) the number of connections to hold.
    Target(u64),
    /// Make no new connections; close all.
    Close,
    /// Make and accept no new connections; those that there are may end by themselves.
    Drain,
    /// Accept again after `Drain`, and move no more connections.
    Resume,
    /// As `Drain`, and move the connections that there are to whoever is at the other end of this socket.
    Ferry(Given),
    /// Take over the connections that come through this socket.
    Land(Given),
    /// What became of a service.
    Answer(Answer),
    /// What the outside says of a connection that `Question::Sniff` asked about.
    Opinion {
        /// The question's.
        ticket: u64,
        /// What it is.
        opinion: Opinion,
    },
    /// New connections of this service wait; answered by `Question::Held`, and over with an answer of the outside.
    Hold(String),
    /// How much are these used? Answered by `Question::Usage`.
    Usage {
        /// Comes back with the answer.
        ticket: u64,
        /// Which services.
        services: Names,
    },
    /// Which connections are there? Looks at a bounded number of places; answered by `Question::Surveyed`.
    Survey {
        /// Comes back with the answer.
        ticket: u64,
        /// Which of them.
        filter: Filter,
        /// From which place on; 0 is the first.
        from: u32,
        /// Rows, at most.
        most: u32,
    },
    /// Which services are the busiest? Looks at a bounded number of them; answered by `Question::Busiest`.
    Busiest {
        /// Comes back with the answer.
        ticket: u64,
        /// What is compared.
        by: By,
        /// From which place on; 0 is the first.
        from: u32,
        /// Rows, at most.
        most: u32,
    },
    /// Close one connection. Looks at a bounded number of places; answered by `Question::Closed`.
    End {
        /// Comes back with the answer.
        ticket: u64,
        /// The connection.
        name: u64,
        /// From which place on; 0 is the first.
        from: u32,
    },
    /// Bounds from now on, as of `BrokerConfig`; what there is may stay.
    Limits {
        /// Connections at once.
        most_connections: u64,
        /// From one source.
        most_per_source: u32,
        /// Of one service.
        most_per_service: u32,
    },
}

/// What to do, as a core tells its carrier.
#[derive(Debug)]
pub enum Command {
    /// Listen on `local`; answered by `Listening` or `ListenFailed`.
    Listen {
        /// The core's name for it.
        listener: ListenerId,
        /// Where; port 0 lets the kernel choose.
        local: SocketAddr,
        /// As for listen(2); bounded by net.core.somaxconn.
        backlog: u32,
        /// SO_REUSEPORT, so that every worker has its own accept queue on the same port.
        reuse_port: bool,
        /// If false, listen and never accept: what the kernel's accept queue alone holds (limits catalogue D1).
        accept: bool,
    },
    /// Listen with a socket that is bound already and that others may hold, too: answered as `Listen` is.
    Adopt {
        /// The core's name for it.
        listener: ListenerId,
        /// The socket; the carrier uses a copy, so that it can be adopted again.
        given: Given,
        /// As for listen(2).
        backlog: u32,
    },
    /// Connect; answered by `Connected` or `ConnectFailed`.
    Connect {
        /// The core's name for the attempt.
        ticket: u32,
        /// What it is to carry.
        transport: Transport,
        /// Local endpoint; what of it is used depends on `choice`.
        source: SocketAddr,
        /// Peer.
        destination: SocketAddr,
        /// How the local endpoint comes about.
        choice: SourceChoice,
        /// For `KernelRange`: first and last port.
        range: (u16, u16),
    },
    /// Give up on a `Connect` that is under way: it is answered by `ConnectFailed` with `ECANCELED` (or by `Connected` if
    /// that was faster).
    CancelConnect {
        /// The attempt.
        ticket: u32,
    },
    /// Send the whole buffer; answered by `Sent`, or by `Failed`.
    Send {
        /// On which connection.
        conn: ConnId,
        /// What; owned by the carrier from here.
        buf: Buf,
    },
    /// Deliver no more bytes for now.
    Pause {
        /// Which connection.
        conn: ConnId,
    },
    /// Deliver bytes again.
    Resume {
        /// Which connection.
        conn: ConnId,
    },
    /// End the connection; answered by `Closed`.
    Close {
        /// Which connection.
        conn: ConnId,
        /// With RST (no TIME_WAIT, unsent bytes dropped) instead of FIN; datagrams know neither.
        abort: bool,
    },
    /// Stop listening; answered by `Unlistened`. Connections already accepted live on.
    Unlisten {
        /// Which.
        listener: ListenerId,
    },
    /// Stop whatever is under way on the connection; answered by `Halted`.
    Halt {
        /// Which.
        conn: ConnId,
    },
    /// Begin to use a socket to another process.
    OpenFerry {
        /// The socket (SOCK_SEQPACKET), and its name from now on.
        ferry: Given,
    },
    /// Let go of it; what is not sent by then is not.
    CloseFerry {
        /// Which.
        ferry: Given,
    },
    /// Send a message, with connections; answered by `Shipped`.
    Ship {
        /// Over which ferry.
        ferry: Given,
        /// Halted connections that go with it.
        conns: [Option<ConnId>; 2],
        /// One of `outbox.peeks`; owned by the carrier from here.
        message: Buf,
    },
    /// Tell the next message; answered by `Landed` or `FerryLost`.
    Fetch {
        /// Over which ferry.
        ferry: Given,
    },
    /// Connect to a service, the local name being the kernel's choice; answered as `Connect` is.
    Reach {
        /// The core's name for the attempt.
        ticket: u32,
        /// Where; owned by the carrier from here.
        target: Target,
    },
    /// Say who the peer is and which of our endpoints it reached; answered by `Named`.
    Name {
        /// Which connection.
        conn: ConnId,
    },
    /// Show what comes instead of taking it, beginning with what is there.
    Peek {
        /// Which connection.
        conn: ConnId,
    },
    /// Of a connection that is shown and paused, tell the end all the same: `HungUp`, or `Failed`.
    Watch {
        /// Which connection.
        conn: ConnId,
    },
    /// Take so many of the bytes that were shown off the stream, unseen; never more than were shown.
    Discard {
        /// Which connection.
        conn: ConnId,
        /// How many; not 0.
        bytes: u32,
    },
    /// Take what comes, beginning with what was shown.
    Take {
        /// Which connection.
        conn: ConnId,
    },
    /// Send no more (FIN); receive on.
    Shutdown {
        /// Which connection.
        conn: ConnId,
    },
    /// Give the socket itself, with a note, to whoever is bound to `path`; answered by `HandedOff` or `HandOffFailed`.
    HandOff {
        /// Which connection.
        conn: ConnId,
        /// As in `Target::Unix`; owned by the carrier from here.
        path: Buf,
        /// What the receiver is told along with the socket; owned by the carrier from here.
        note: Buf,
    },
}

/// Bytes that a peek can show at most: a TLS ClientHello of 65,536 bytes in records of a single one, each behind a header
/// of 5.
pub const PEEK_BYTES: usize = 6 << 16;
/// Peeks whose bytes are with a core or on their way to one, at most; further ones wait.
const PEEKS_AT_ONCE: u32 = 8;

/// Where a core puts its commands, and the buffers that they name. One per carrier; drained after every batch of events.
#[derive(Debug)]
pub struct Outbox {
    /// Commands in the order given.
    pub commands: Vec<Command>,
    /// The carrier's memory for bytes.
    pub buffers: Buffers,
    /// The carrier's memory for bytes that are only looked at; a few large buffers, made when first used.
    pub peeks: Buffers,
    /// What the core asks the outside.
    pub questions: Questions,
}

impl Outbox {
    /// An empty outbox over these buffers.
    pub fn new(buffers: Buffers) -> Outbox {
        Outbox {
            commands: Vec::with_capacity(256),
            buffers,
            peeks: Buffers::new(PEEK_BYTES, PEEKS_AT_ONCE, 1),
            questions: Questions::default(),
        }
    }

    /// Append a command.
    pub fn push(&mut self, command: Command) {
        self.commands.push(command);
    }
}

/// A state machine over connections. It never waits, never blocks and never fails: what a peer does is counted.
pub trait Core: Send {
    /// First call, once: what the core wants before anything happened.
    fn start(&mut self, now: Instant, outbox: &mut Outbox);
    /// Something happened.
    fn handle(&mut self, event: Event, now: Instant, outbox: &mut Outbox);
    /// The moment of `poll_timeout` has come.
    fn handle_timeout(&mut self, now: Instant, outbox: &mut Outbox);
    /// When to call `handle_timeout`; one deadline for everything inside. May be in the past: then at once, a few
    /// times per turn at most.
    fn poll_timeout(&self) -> Option<Instant>;
    /// True when the core has nothing left to do: `Carrier::run` then returns.
    fn is_done(&self) -> bool;
    /// Counters, failures and histograms so far.
    fn report(&self) -> &Report;
    /// Our own bookkeeping held against itself; the simulator calls it after every step. `Err` says which rule is broken.
    fn check_invariants(&self) -> Result<(), String>;
}

/// When `Carrier::run` comes back, unless the core is done first.
pub trait Until {
    /// Asked once per turn of the loop, with the core's report: take orders in, publish numbers, say whether to go on.
    /// Returns `false` to stop.
    fn turn(&mut self, core: &mut dyn Core, now: Instant, outbox: &mut Outbox) -> bool;
}

/// Why a carrier cannot start or go on. Never for what a peer did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CarrierError {
    /// What was tried: `io_uring_setup`, `epoll_create1` ...
    pub what: &'static str,
    /// Why it failed.
    pub error: Errno,
}

/// Makes commands true and tells what happened, in one thread, until told to stop.
pub trait Carrier {
    /// Most connections that this carrier can hold at once; every `ConnId::index` is below it.
    fn capacity(&self) -> u32;
    /// Drive `core` until it is done or `until` says stop. On return all connections are closed by the carrier.
    fn run(&mut self, core: &mut dyn Core, until: &mut dyn Until) -> Result<(), CarrierError>;
}
