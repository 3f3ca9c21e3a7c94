//! A UDP socket with a four-tuple of its own: how one source port serves many destinations, and nobody loses datagrams.
//!
//! Decides whether a tuple is free. Knows no carrier. The kernel lets two UDP sockets have one four-tuple, and gives all
//! datagrams to one of them (`udp4_lib_lookup2`); and a socket that is bound and not connected yet hears everybody. So:
//! bind beside those that share the port (SO_REUSEADDR), share it no longer, so that nobody else comes in while we look
//! whether the tuple is free; connect; share again; and drop what came before the connect.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use fourtuple_engine::{Errno, SourceChoice, Step};

use crate::sys;

/// Workers of one process would find each other's sockets in the middle of it, and take the port for lost.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Datagrams dropped at most: what comes after connect() comes from the peer, and one that floods us must not keep us.
const DROPPED_MOST: u32 = 1024;

thread_local! {
    /// Asks which sockets there are; none where sock_diag is refused, and then nothing is known of other programs.
    static ASKER: Option<OwnedFd> = sys::diagnosis_socket().ok();
}

/// A connected UDP socket. `EADDRNOTAVAIL` at `Step::Connect` if somebody has its tuple.
pub(crate) fn connected(
    source: SocketAddr,
    destination: SocketAddr,
    choice: SourceChoice,
    nonblocking: libc::c_int,
) -> Result<OwnedFd, (Step, Errno)> {
    let socket = sys::datagram_socket(destination, nonblocking).map_err(|error| (Step::Socket, error))?;
    let at_bind = |error| (Step::Bind, error);
    match choice {
        SourceChoice::Kernel => {
            sys::connect(&socket, destination).map_err(|error| (Step::Connect, error))?;
            return Ok(socket); // connect() bound it, too: there was no time between the two
        }
        SourceChoice::KernelPort | SourceChoice::KernelRange => {
            sys::bind_anywhere(&socket, SocketAddr::new(source.ip(), 0)).map_err(at_bind)?;
            sys::connect(&socket, destination).map_err(|error| (Step::Connect, error))?;
        }
        SourceChoice::SinglePort | SourceChoice::Bind => {
            let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
            sys::share_port(&socket, true).map_err(at_bind)?;
            sys::bind_anywhere(&socket, source).map_err(at_bind)?;
            sys::share_port(&socket, false).map_err(at_bind)?;
            if is_connected(source, destination) {
                return Err((Step::Connect, Errno::EADDRNOTAVAIL));
            }
            sys::connect(&socket, destination).map_err(|error| (Step::Connect, error))?;
            sys::share_port(&socket, true).map_err(at_bind)?;
        }
    }
    for _ in 0..DROPPED_MOST {
        if sys::receive(socket.as_raw_fd(), &mut [0; 1]).is_err() {
            break;
        }
    }
    Ok(socket)
}

const HEADER_BYTES: usize = 16;
const NAME_BYTES: usize = 36;
/// SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, NLMSG_ERROR and TCP_ESTABLISHED of the kernel's headers.
const BY_FAMILY: u16 = 20;
const REQUEST: u16 = 1;
const ERROR: u16 = 2;
const ESTABLISHED: u8 = 1;

/// Whether a UDP socket of this network namespace is connected from `source` to `destination`.
fn is_connected(source: SocketAddr, destination: SocketAddr) -> bool {
    // A look-up takes the ends as the arriving datagram has them, the remote one first (udp_dump_one()).
    let question = question(source, destination);
    let mut answer = [0; 512];
    let count = ASKER.with(|asker| {
        let asker = asker.as_ref()?.as_raw_fd();
        sys::send(asker, &question, false).ok()?;
        sys::receive(asker, &mut answer).ok()
    });
    // struct inet_diag_msg: family, state, timer, retransmits, then the name, local end first.
    let body = &answer[HEADER_BYTES..];
    count.is_some_and(|count| count >= HEADER_BYTES + 4 + NAME_BYTES)
        && answer[4..6] != ERROR.to_ne_bytes()
        && body[1] == ESTABLISHED
        && body[4..4 + NAME_BYTES] == name(source, destination)
}

/// struct nlmsghdr and struct inet_diag_req_v2.
fn question(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let family = if source.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut body = vec![family as u8, libc::IPPROTO_UDP as u8, 0, 0];
    body.extend(u32::MAX.to_ne_bytes());
    body.extend(name(destination, source));
    body.extend([0; 4]);
    body.extend([0xff; 8]);
    let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
    message.extend(((HEADER_BYTES + body.len()) as u32).to_ne_bytes());
    message.extend(BY_FAMILY.to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// The head of struct inet_diag_sockid: both ports, both addresses.
fn name(first: SocketAddr, second: SocketAddr) -> [u8; NAME_BYTES] {
    let mut name = [0; NAME_BYTES];
    name[..2].copy_from_slice(&first.port().to_be_bytes());
    name[2..4].copy_from_slice(&second.port().to_be_bytes());
    for (place, address) in [(4, first.ip()), (20, second.ip())] {
        match address {
            IpAddr::V4(address) => name[place..place + 4].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => name[place..place + 16].copy_from_slice(&address.octets()),
        }
    }
    name
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn endpoint_of(socket: &UdpSocket) -> SocketAddr {
        socket.local_addr().expect("a bound socket")
    }

    #[test]
    fn one_port_serves_every_destination_and_each_only_once() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let peers: Vec<UdpSocket> = (0..8).map(|_| UdpSocket::bind(host).expect("a port")).collect();
            let source = endpoint_of(&UdpSocket::bind(host).expect("a port"));
            let flow = |peer: &UdpSocket| connected(source, endpoint_of(peer), SourceChoice::Bind, 0);
            let flows: Vec<OwnedFd> = peers.iter().map(|peer| flow(peer).expect("a free tuple")).collect();
            for peer in &peers {
                assert_eq!(flow(peer).unwrap_err(), (Step::Connect, Errno::EADDRNOTAVAIL), "{host}");
            }
            for (peer, flow) in peers.iter().zip(&flows) {
                peer.send_to(b"for you", source).expect("loopback");
                let mut bytes = [0; 16];
                assert_eq!(sys::receive(flow.as_raw_fd(), &mut bytes), Ok(7), "{host}: each hears its own peer");
            }
            drop(flows);
            assert!(flow(&peers[0]).is_ok(), "{host}: the tuple is free again");
        }
    }

    #[test]
    fn a_port_that_somebody_does_not_share_is_taken() {
        let (peer, other) =
            (UdpSocket::bind("127.0.0.1:0").expect("a port"), UdpSocket::bind("127.0.0.1:0").expect("a port"));
        let refused = connected(endpoint_of(&other), endpoint_of(&peer), SourceChoice::Bind, 0).unwrap_err();
        assert_eq!(refused, (Step::Bind, Errno::EADDRINUSE));
    }
}
