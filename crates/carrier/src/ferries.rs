//! Sockets to other processes over which connections move: what is to be sent, and whether a message is waited for.
//!
//! Decides what an error of such a socket means. Knows no core, no record, and not where a carrier keeps its connections.
//!
//! Each is tried once per turn while something is wanted of it; the poller only ends a carrier's sleep. ETOOMANYREFS has no
//! edge: too many descriptors of this user are in flight (unix_attach_fds()), and the wait for that is a short nap.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use fourtuple_engine::{Buf, Buffers, ConnId, Errno, Event, Given};

use crate::shelf::Shelf;
use crate::sys::{self, Poller};

/// All of one carrier.
#[derive(Default)]
pub(crate) struct Ferries(Vec<Ferry>);

pub(crate) struct Ferry {
    pub(crate) name: Given,
    socket: OwnedFd,
    pub(crate) cargo: Option<Cargo>,
    is_fetching: bool,
    /// When it was last asked, there was no message.
    is_quiet: bool,
    /// Nothing can be sent any more.
    is_cut: Option<Errno>,
}

/// A message that is to be sent.
pub(crate) struct Cargo {
    pub(crate) conns: [Option<ConnId>; 2],
    pub(crate) message: Buf,
    /// Where connections have no descriptor of their own: those that were made for this.
    pub(crate) lent: [Option<OwnedFd>; 2],
    /// Those that are asked for.
    pub(crate) asked: [bool; 2],
}

impl Ferries {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether something is to be tried again without an edge.
    pub(crate) fn is_waiting(&self) -> bool {
        self.0.iter().any(|ferry| ferry.cargo.is_some() || ferry.is_fetching && !ferry.is_quiet)
    }

    /// The poller has spoken.
    pub(crate) fn roused(&mut self) {
        self.0.iter_mut().for_each(|ferry| ferry.is_quiet = false);
    }

    /// Whose message waits for this connection's descriptor, and where it goes in it.
    pub(crate) fn cargo_with(&mut self, conn: ConnId) -> Option<(&mut Cargo, usize)> {
        let mut cargoes = self.0.iter_mut().filter_map(|ferry| ferry.cargo.as_mut());
        cargoes.find_map(|cargo| {
            let place = cargo.conns.iter().position(|it| *it == Some(conn))?;
            Some((cargo, place))
        })
    }

    pub(crate) fn at(&mut self, place: usize) -> &mut Ferry {
        &mut self.0[place]
    }

    /// Begin to use it; `data` is what the poller tells.
    pub(crate) fn open(&mut self, name: Given, shelf: &Shelf, poller: &Poller, data: u64) -> Option<Event> {
        let edges = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET;
        let opened = shelf.lend(name).and_then(|socket| {
            poller.add(socket.as_raw_fd(), edges, data)?;
            Ok(socket)
        });
        match opened {
            Ok(socket) => {
                self.0.push(Ferry { name, socket, cargo: None, is_fetching: false, is_quiet: false, is_cut: None });
                None
            }
            Err(error) => Some(Event::FerryLost { ferry: name, error: Some(error) }),
        }
    }

    /// Let go of it.
    pub(crate) fn close(&mut self, name: Given, shelf: &Shelf, poller: &Poller, peeks: &mut Buffers) {
        if let Some(place) = self.0.iter().position(|ferry| ferry.name == name) {
            let ferry = self.0.remove(place);
            poller.remove(ferry.socket.as_raw_fd());
            ferry.cargo.into_iter().for_each(|cargo| peeks.release(cargo.message));
        }
        shelf.discard(name);
    }

    /// Have a message sent.
    pub(crate) fn ship(&mut self, name: Given, conns: [Option<ConnId>; 2], message: Buf, peeks: &mut Buffers) {
        match self.0.iter_mut().find(|ferry| ferry.name == name) {
            Some(ferry) if ferry.cargo.is_none() => {
                ferry.cargo = Some(Cargo { conns, message, lent: [None, None], asked: [false; 2] });
            }
            _ => peeks.release(message),
        }
    }

    /// Have the next message told.
    pub(crate) fn fetch(&mut self, name: Given) {
        if let Some(ferry) = self.0.iter_mut().find(|ferry| ferry.name == name) {
            ferry.is_fetching = true;
        }
    }
}

impl Ferry {
    /// Try to send what is to be sent, with these descriptors; what came of it, if anything.
    pub(crate) fn send(&mut self, descriptors: &[RawFd], peeks: &mut Buffers) -> Option<Event> {
        let cargo = self.cargo.take()?;
        let outcome = match self.is_cut {
            Some(error) => Err(error),
            None => sys::send_sockets(&self.socket, descriptors, peeks.bytes(&cargo.message)),
        };
        match outcome {
            Ok(()) => {}
            Err(
                Errno::EAGAIN | Errno::ETOOMANYREFS | Errno::ENOBUFS | Errno::ENOMEM | Errno::EINTR | Errno::EMFILE,
            ) => {
                self.cargo = Some(cargo);
                return None;
            }
            Err(error) => {
                peeks.release(cargo.message);
                self.is_cut = Some(error);
                // What has come is told first, if it is asked for.
                return (!self.is_fetching).then_some(Event::FerryLost { ferry: self.name, error: Some(error) });
            }
        }
        peeks.release(cargo.message);
        Some(Event::Shipped { ferry: self.name })
    }

    /// What is to be sent is not sent: a connection of it is closed.
    pub(crate) fn unload(&mut self, peeks: &mut Buffers) -> Option<Event> {
        let cargo = self.cargo.take()?;
        peeks.release(cargo.message);
        Some(Event::Shipped { ferry: self.name })
    }

    pub(crate) fn is_fetching(&self) -> bool {
        self.is_fetching
    }

    /// Take a message, if one is wanted and there. The connections among its descriptors are its receiver's to place.
    pub(crate) fn receive(&mut self, peeks: &mut Buffers) -> Option<Result<(Buf, Vec<OwnedFd>), Event>> {
        if !self.is_fetching || self.is_quiet {
            return None;
        }
        let mut buf = peeks.take()?;
        loop {
            let error = match sys::receive_sockets(&self.socket, peeks.memory(&buf)) {
                Ok((0, _)) => self.is_cut,
                Ok((count, mut sockets)) => {
                    self.is_fetching = false;
                    peeks.set_len(&mut buf, count);
                    sockets.retain(sys::is_connection);
                    return Some(Ok((buf, sockets)));
                }
                Err(Errno::EAGAIN) => {
                    self.is_quiet = true;
                    peeks.release(buf);
                    return None;
                }
                // Of the peer, which has closed without reading all (unix_release_sock()): told once, and before what it
                // has said (__skb_try_recv_datagram()).
                Err(Errno::EINTR | Errno::ECONNRESET) => continue,
                Err(error) => Some(error),
            };
            peeks.release(buf);
            self.is_fetching = false;
            return Some(Err(Event::FerryLost { ferry: self.name, error }));
        }
    }
}
