//! What of io_uring this process can use, found by doing it on loopback, not by comparing versions: containers refuse it,
//! distributions backport it.
//!
//! Decides nothing; tells.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use fourtuple_engine::{CarrierError, Errno};
use io_uring::types::{Fd, Fixed};
use io_uring::{opcode, squeue};

use super::ring::{Completion, Operation, Ring, user_data};
use crate::sys::errno_of;

const BUFFER_GROUP: u16 = 0;

/// What of io_uring this process can use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UringAbilities {
    /// Sockets in a ring's own table, without descriptors. The carrier needs it.
    pub direct_descriptors: bool,
    /// One poll that speaks many times. The carrier needs it.
    pub multishot_poll: bool,
    /// One accept for many connections.
    pub multishot_accept: bool,
    /// One receive for many messages.
    pub multishot_receive: bool,
    /// Socket options on direct descriptors.
    pub setsockopt: bool,
    /// A plain descriptor for a socket in a ring's table. A broker needs it.
    pub lent_descriptors: bool,
}

impl UringAbilities {
    /// Whether the `uring` carrier can run.
    pub fn carries(&self) -> bool {
        self.direct_descriptors && self.multishot_poll
    }
}

/// Try each ability on a connection of our own. An error says why there is no io_uring, or not enough of it to go on trying.
pub fn probe_uring() -> Result<UringAbilities, CarrierError> {
    let failed = |what| move |error: std::io::Error| CarrierError { what, error: errno_of(&error) };
    let mut memory = [0u8; 64];
    let mut ring = Ring::new(4)?;
    let mut abilities = UringAbilities { direct_descriptors: true, ..UringAbilities::default() };

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed("bind"))?;
    let address = listener.local_addr().map_err(failed("getsockname"))?;
    let mut client = TcpStream::connect(address).map_err(failed("connect"))?;
    client.write_all(b"bytes").map_err(failed("send"))?;

    let accept = opcode::AcceptMulti::new(Fd(listener.as_raw_fd())).allocate_file_index(true).build();
    let accepted = attempt(&mut ring, accept, Operation::Accept)?;
    let slot = match accepted.outcome() {
        Ok(slot) => {
            abilities.multishot_accept = accepted.more();
            slot
        }
        Err(_) => {
            let (socket, _) = listener.accept().map_err(failed("accept"))?;
            ring.install(0, &[socket.as_raw_fd()])
                .map_err(|error| CarrierError { what: "IORING_REGISTER_FILES_UPDATE", error })?;
            0
        }
    };
    let poll = opcode::PollAdd::new(Fixed(slot), libc::POLLIN as u32).multi(true).build();
    abilities.multishot_poll = attempt(&mut ring, poll, Operation::Poll)?.more();
    let one = 1u32;
    let option = opcode::SetSockOpt::new(
        Fixed(slot),
        libc::IPPROTO_TCP as u32,
        libc::TCP_NODELAY as u32,
        (&raw const one).cast(),
        size_of::<u32>() as u32,
    );
    abilities.setsockopt = attempt(&mut ring, option.build(), Operation::Send)?.outcome().is_ok();
    let lent = attempt(&mut ring, opcode::FixedFdInstall::new(Fixed(slot), 0).build(), Operation::Borrow)?.outcome();
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    let lent = lent.map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
    abilities.lent_descriptors = lent.is_ok();
    // One buffer for one message; it outlives the ring, which takes the receive back when it goes.
    let provide = opcode::ProvideBuffers::new(memory.as_mut_ptr(), memory.len() as i32, 1, BUFFER_GROUP, 0).build();
    attempt(&mut ring, provide, Operation::Close)?;
    let receive = opcode::RecvMulti::new(Fixed(slot), BUFFER_GROUP).build().flags(squeue::Flags::BUFFER_SELECT);
    abilities.multishot_receive = attempt(&mut ring, receive, Operation::Receive)?.more();
    Ok(abilities)
}

/// Do one operation whose time has come already, and wait for its first answer.
fn attempt(ring: &mut Ring, entry: squeue::Entry, operation: Operation) -> Result<Completion, CarrierError> {
    ring.push(&entry.user_data(user_data(operation, 0, 0)))?;
    ring.submit()?;
    let mut completions = Vec::new();
    for _ in 0..1000 {
        ring.reap(16, &mut completions);
        if let Some(answer) = completions.iter().find(|answer| answer.operation == operation) {
            return Ok(*answer);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(CarrierError { what: "io_uring", error: Errno::ETIMEDOUT })
}
