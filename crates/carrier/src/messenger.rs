//! Giving sockets away: who sends to which path, and for whom there was no room.
//!
//! Decides how long a sender is trusted to know the path. Knows no core and no note's layout.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use foldhash::fast::RandomState;
use fourtuple_engine::{ConnId, Errno, Instant};

use crate::sys::{Poller, send_sockets, unix_connected};

/// Gives sockets away, each in a datagram to a unix socket (docs/handoff.md).
///
/// A sender is connected to the path, which is cheaper than a lookup per message (1.9 us against 2.8; a stream connection
/// per message costs 8.7), and has a send buffer of its own (sock_alloc_send_pskb()), so that a service that does not
/// read uses up nobody else's. It stays with the socket that it found there, while the path may be another's since: hence
/// a sender is soon old.
pub(crate) struct Messenger {
    senders: HashMap<Box<[u8]>, Sender, RandomState>,
    next: u32,
}

struct Sender {
    socket: OwnedFd,
    until: Instant,
    /// Its name for the poller.
    number: u32,
    watched: bool,
    /// For whom there was no room.
    waiting: Option<ConnId>,
}

/// Senders kept, each a descriptor.
const SENDERS: usize = 64;
/// docs/handoff.md tells services how long one that has been replaced may still be sent something.
const SENDER_AGE: Duration = Duration::from_millis(100);

impl Messenger {
    pub(crate) fn new() -> Messenger {
        Messenger { senders: HashMap::default(), next: 0 }
    }

    /// Give `socket` with `note` to whoever is bound to `path`. EAGAIN: more messages wait there than
    /// net.unix.max_dgram_qlen allows; when there is room, `poller` tells what `name` makes of the sender's number, and
    /// `roomy` for whom.
    pub(crate) fn hand_off(
        &mut self,
        conn: ConnId,
        socket: RawFd,
        (path, note): (&[u8], &[u8]),
        now: Instant,
        (poller, name): (&Poller, u64),
    ) -> Result<(), Errno> {
        if let Some(sender) = self.senders.get_mut(path)
            && now < sender.until
        {
            match send_sockets(&sender.socket, &[socket], note) {
                // Whoever was there is gone (unix_dgram_sendmsg()); the path may have another by now.
                Err(Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::EPIPE | Errno(libc::ENOTCONN)) => {}
                outcome => return sender.wait_if_full(outcome, conn, poller, name),
            }
        }
        let socket_there = unix_connected(libc::SOCK_DGRAM, path).map_err(|(_, error)| error)?;
        if self.senders.len() >= SENDERS && !self.senders.contains_key(path) {
            self.senders.clear();
        }
        self.next = self.next.wrapping_add(1);
        let mut sender = Sender {
            socket: socket_there,
            until: now.after(SENDER_AGE),
            number: self.next,
            watched: false,
            waiting: None,
        };
        let outcome = send_sockets(&sender.socket, &[socket], note);
        let outcome = sender.wait_if_full(outcome, conn, poller, name);
        self.senders.insert(path.into(), sender);
        outcome
    }

    /// The poller has told of the sender with this number: for whom there was no room.
    pub(crate) fn roomy(&mut self, number: u32) -> Option<ConnId> {
        self.senders.values_mut().find(|sender| sender.number == number)?.waiting.take()
    }
}

impl Sender {
    /// sendmsg() that finds no room asks to be woken (unix_dgram_peer_wake_me()); the poller is where that is heard.
    fn wait_if_full(
        &mut self,
        outcome: Result<(), Errno>,
        conn: ConnId,
        poller: &Poller,
        name: u64,
    ) -> Result<(), Errno> {
        if outcome == Err(Errno::EAGAIN) {
            self.waiting = Some(conn);
            if !self.watched {
                let data = name | u64::from(self.number);
                self.watched = poller.add(self.socket.as_raw_fd(), libc::EPOLLOUT | libc::EPOLLET, data).is_ok();
            }
        }
        outcome
    }
}
