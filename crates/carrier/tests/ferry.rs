//! Two brokers on the kernel's carriers that share listening sockets, and connections that move from one to the other.

// Clients and services outside of any carrier.
#![allow(clippy::disallowed_methods)]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant as Moment};

use fourtuple_carrier::{CarrierKind, CarrierSettings, Doors, Published, Shelf, Worker};
use fourtuple_engine::Order;
use fourtuple_engine::broker::guide::{Address, Chosen, Delivery, Guidance, Guide, Shown};
use fourtuple_engine::broker::ledger::{REASONS, Reason, Unwritten};
use fourtuple_engine::broker::{BrokerConfig, BrokerCore, ListenAt};
use fourtuple_engine::report::{Counter, Phase};

const KERNELS: [CarrierKind; 2] = [CarrierKind::Epoll, CarrierKind::Uring];
const PATIENCE: Duration = Duration::from_secs(20);

/// Everybody who has said something is for one service.
struct OneService(SocketAddr);

impl Guide for OneService {
    type Memory = ();

    fn guide(&mut self, shown: &Shown<'_>, _: &mut (), chosen: &mut Chosen) -> Guidance {
        if shown.bytes.is_empty() && !shown.last {
            return Guidance::More;
        }
        (chosen.service, chosen.delivery, chosen.address) = ("echo".into(), Delivery::Relay, Address::Tcp(self.0));
        Guidance::Found
    }
}

/// An echo that lives as long as the test.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut reader = stream.try_clone().unwrap();
                std::io::copy(&mut reader, &mut stream).ok();
                stream.shutdown(std::net::Shutdown::Write).ok();
            });
        }
    });
    at
}

fn config(at: SocketAddr) -> BrokerConfig {
    BrokerConfig {
        listen: vec![ListenAt { local: at, sniff_timeout: Duration::from_secs(10) }],
        delivery_timeout: Duration::from_secs(10),
        ..BrokerConfig::default()
    }
}

/// A broker on a listening socket that is somebody else's, too.
struct Broker(Worker);

impl Broker {
    fn start(kind: CarrierKind, listener: &TcpListener, service: SocketAddr) -> Broker {
        let shelf = Shelf::default();
        let given = shelf.put(OwnedFd::from(listener.try_clone().unwrap()));
        let core = BrokerCore::new(config(listener.local_addr().unwrap()), OneService(service), Unwritten);
        let settings = CarrierSettings { most_connections: 4096, slots_per_ring: 1024, ..CarrierSettings::default() };
        let core = Box::new(core.listening_with(vec![Some(given)]));
        let broker = Broker(Worker::start_with(kind, settings, core, Doors { shelf, ..Doors::default() }).unwrap());
        broker.wait_for(Counter::Listening, 1);
        broker
    }

    fn count(&self, counter: Counter) -> u64 {
        self.0.published().report.count(counter)
    }

    fn wait_for(&self, counter: Counter, count: u64) {
        wait(
            || self.count(counter) == count,
            || format!("{counter:?} is not {count}: {:?}", self.0.published().report),
        );
    }

    /// Move all to another broker; the listener stays with both.
    fn move_to(&self, other: &Broker) {
        let (here, there) = ferry();
        other.0.order(Order::Land(other.0.shelf().put(there)));
        other.wait_for(Counter::Ferries, 1);
        self.0.order(Order::Ferry(self.0.shelf().put(here)));
    }

    /// Every connection has its reason, and every buffer is back.
    fn end(self) -> Published {
        self.0.order(Order::Close);
        wait(|| !self.0.is_running(), || format!("{:?}", self.0.published()));
        let last = self.0.join().unwrap();
        let reasons: u64 = REASONS.iter().map(|reason| last.report.count(reason.counter())).sum();
        let came = last.report.count(Counter::Accepted) + last.report.count(Counter::Landed);
        assert_eq!((came, last.report.phase), (reasons, Phase::Done));
        assert_eq!((last.report.count(Counter::Open), last.carrier.buffers_in_use), (0, 0));
        last
    }
}

/// Both ends of a ferry.
fn ferry() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: `ends` is writable for two descriptors.
    let made =
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) };
    assert_eq!(made, 0);
    // SAFETY: the kernel has just made them, and nobody else knows them.
    unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) }
}

fn wait(mut ready: impl FnMut() -> bool, why: impl Fn() -> String) {
    let started = Moment::now();
    while !ready() {
        assert!(started.elapsed() < PATIENCE, "{}", why());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn client(at: SocketAddr) -> TcpStream {
    let client = TcpStream::connect(at).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

fn echoes(mut client: &TcpStream, word: &[u8]) {
    client.write_all(word).unwrap();
    let mut heard = vec![0; word.len()];
    client.read_exact(&mut heard).unwrap();
    assert_eq!(heard, word);
}

fn kinds() -> impl Iterator<Item = (CarrierKind, CarrierKind)> {
    KERNELS.into_iter().flat_map(|old| KERNELS.into_iter().map(move |new| (old, new)))
}

// Listeners that others hold.

#[test]
fn two_brokers_accept_from_one_socket_and_no_client_of_its_queue_is_lost() {
    let service = echo();
    for (first, second) in kinds() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let old = Broker::start(first, &listener, service);
        let mut clients: Vec<TcpStream> = (0..20).map(|_| client(at)).collect();
        old.wait_for(Counter::Accepted, 20);
        let new = Broker::start(second, &listener, service);
        // Both wait for each of these.
        for _ in 0..200 {
            let one = client(at);
            echoes(&one, b"which of them takes it is the kernel's choice");
            clients.push(one);
        }
        old.0.order(Order::Drain);
        clients.extend((0..100).map(|_| client(at)));
        clients.iter().for_each(|client| echoes(client, b"still here"));
        // Numbers are published a moment after what they count.
        let accepted = || [&old, &new].map(|it| it.count(Counter::Accepted));
        wait(|| accepted().iter().sum::<u64>() == 320, || format!("{first:?} {second:?}: {:?}", accepted()));
        let accepted = accepted();
        drop(clients);
        // The old one ends by itself.
        wait(|| !old.0.is_running(), || format!("{:?}", old.0.published()));
        old.end();
        let last = new.end().report;
        assert_eq!(last.count(Counter::Stopped) + last.count(Counter::Relayed), accepted[1], "{last:?}");
    }
}

#[test]
fn a_queue_outlives_the_broker_and_drained_listeners_can_be_resumed() {
    let service = echo();
    for (first, second) in kinds() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let old = Broker::start(first, &listener, service);
        let held = client(at);
        echoes(&held, b"held");
        old.0.order(Order::Drain);
        old.wait_for(Counter::Listening, 0);
        let queued: Vec<TcpStream> = (0..5).map(|_| client(at)).collect();
        old.0.order(Order::Resume);
        queued.iter().for_each(|client| echoes(client, b"resumed"));
        old.0.order(Order::Drain);
        old.wait_for(Counter::Listening, 0);
        let mut left: Vec<TcpStream> = (0..5).map(|_| client(at)).collect();
        left.iter_mut().for_each(|client| client.write_all(b"said to nobody yet").unwrap());
        assert_eq!(old.end().report.count(Reason::Stopped.counter()), 6, "{first:?}");
        // Nobody holds it now but this test.
        left.push(client(at));
        let new = Broker::start(second, &listener, service);
        for client in &mut left[..5] {
            let mut heard = [0; 18];
            client.read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"said to nobody yet");
        }
        echoes(&left[5], b"and the last");
        assert_eq!(new.end().report.count(Counter::Accepted), 6, "{first:?} {second:?}");
    }
}

// Connections that move.

#[test]
fn idle_relays_move_and_go_on() {
    let service = echo();
    for (first, second) in kinds() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let old = Broker::start(first, &listener, service);
        let clients: Vec<TcpStream> = (0..200).map(|_| client(at)).collect();
        clients.iter().for_each(|client| echoes(client, b"before"));
        old.wait_for(Counter::Relaying, 200);
        let new = Broker::start(second, &listener, service);
        old.move_to(&new);
        // The old one ends by itself when it has nothing more.
        wait(|| !old.0.is_running(), || format!("{:?} {:?}", old.0.published(), new.0.published()));
        clients.iter().for_each(|client| echoes(client, b"after"));
        assert_eq!(old.end().report.count(Reason::Moved.counter()), 200, "{first:?} {second:?}");
        new.wait_for(Counter::Ferries, 0);
        assert_eq!((new.count(Counter::Landed), new.count(Counter::FerriesLost)), (200, 0));
        drop(clients);
        new.wait_for(Reason::Relayed.counter(), 200);
        new.end();
    }
}

#[test]
fn clients_that_have_said_nothing_move_and_are_looked_at_there() {
    let service = echo();
    for (first, second) in kinds() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let old = Broker::start(first, &listener, service);
        let clients: Vec<TcpStream> = (0..50).map(|_| client(at)).collect();
        old.wait_for(Counter::Sniffing, 50);
        let new = Broker::start(second, &listener, service);
        old.move_to(&new);
        wait(|| !old.0.is_running(), || format!("{:?} {:?}", old.0.published(), new.0.published()));
        clients.iter().for_each(|client| echoes(client, b"said to the new one"));
        assert_eq!(old.end().report.count(Reason::Moved.counter()), 50, "{first:?} {second:?}");
        assert_eq!(new.end().report.count(Counter::Landed), 50, "{first:?} {second:?}");
    }
}

/// The byte at a place of what is said.
fn pattern(place: usize) -> u8 {
    (place.wrapping_mul(31) ^ (place >> 8)) as u8
}

/// Say so many bytes and read as many of an echo that has to be read for it to go on, slowly at first.
fn talk(mut client: TcpStream, total: usize) {
    let mut reader = client.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        let bytes: Vec<u8> = (0..total).map(pattern).collect();
        client.write_all(&bytes).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
    });
    // The buffers on the whole way are full by then.
    std::thread::sleep(Duration::from_millis(300));
    let (mut heard, mut chunk) = (0, [0; 8192]);
    loop {
        match reader.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => {
                let right = chunk[..count].iter().enumerate().all(|(place, &byte)| byte == pattern(heard + place));
                assert!(right, "other bytes behind {heard}");
                heard += count;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("{error} behind {heard} of {total}"),
        }
    }
    writing.join().unwrap();
    assert_eq!(heard, total);
}

#[test]
fn full_buffers_move_with_their_bytes_and_both_ends_of_stream() {
    let service = echo();
    for (first, second) in kinds() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let old = Broker::start(first, &listener, service);
        // More than the kernel holds on the whole way: sends are outstanding on both sides when it moves.
        let talks: Vec<_> = (0..8).map(|_| client(at)).collect();
        let talks: Vec<_> = talks.into_iter().map(|it| std::thread::spawn(move || talk(it, 12_000_000))).collect();
        old.wait_for(Counter::Relaying, 8);
        let mut brokers = vec![old];
        for number in 0..6 {
            std::thread::sleep(Duration::from_millis(60));
            let next = Broker::start(if number % 2 == 0 { second } else { first }, &listener, service);
            let last = brokers.last().unwrap();
            last.move_to(&next);
            wait(|| !last.0.is_running(), || format!("{:?} {:?}", last.0.published(), next.0.published()));
            brokers.push(next);
        }
        talks.into_iter().for_each(|talk| talk.join().unwrap());
        let mut ended = 0;
        for broker in brokers {
            let last = broker.end().report;
            assert_eq!((last.count(Counter::FerriesLost), last.count(Counter::MovesReturned)), (0, 0), "{last:?}");
            ended += last.count(Reason::Relayed.counter());
        }
        assert_eq!(ended, 8, "{first:?} {second:?}");
    }
}

#[test]
fn whoever_is_not_taken_lives_on() {
    let service = echo();
    for kind in KERNELS {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let old = Broker::start(kind, &listener, service);
        let clients: Vec<TcpStream> = (0..100).map(|_| client(at)).collect();
        clients.iter().for_each(|client| echoes(client, b"before"));
        old.wait_for(Counter::Relaying, 100);
        // Nobody reads there: a window of them is shipped, none answered; then it is gone.
        let (here, there) = ferry();
        old.0.order(Order::Ferry(old.0.shelf().put(here)));
        old.wait_for(Counter::Moving, 64);
        drop(there);
        old.wait_for(Counter::Relaying, 100);
        clients.iter().for_each(|client| echoes(client, b"still here"));
        assert_eq!((old.count(Counter::FerriesLost), old.count(Counter::Listening)), (1, 0));
        assert!(old.count(Counter::MovesReturned) > 0);
        // It accepts again, and may try again.
        old.0.order(Order::Resume);
        let late = client(at);
        echoes(&late, b"late");
        let new = Broker::start(kind, &listener, service);
        old.move_to(&new);
        wait(|| !old.0.is_running(), || format!("{:?} {:?}", old.0.published(), new.0.published()));
        clients.iter().chain([&late]).for_each(|client| echoes(client, b"there"));
        assert_eq!(old.end().report.count(Reason::Moved.counter()), 101, "{kind:?}");
        new.end();
    }
}

#[test]
fn what_has_nothing_to_do_with_a_broker_is_refused() {
    use std::os::unix::net::UnixStream;
    let service = echo();
    for kind in KERNELS {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let broker = Broker::start(kind, &listener, service);
        let (here, there) = ferry();
        broker.0.order(Order::Land(broker.0.shelf().put(there)));
        let (mut other, given) = UnixStream::pair().unwrap();
        let messages: [&[u8]; 4] =
            [b"hello", b"4TFY\x02\x02\0\0\0\0\0\x07", &[0xff; 4000], b"4TFY\x01\x05\0\0\0\0\0\x01"];
        for message in messages {
            send(&here, message, &[&given, &listener]);
        }
        broker.wait_for(Counter::LandingsRefused, 4);
        drop(given);
        // What came along is closed there, too.
        assert_eq!(other.read(&mut [0; 1]).unwrap(), 0, "{kind:?}");
        drop(here);
        broker.wait_for(Counter::FerriesLost, 1);
        let last = broker.end();
        assert_eq!(last.report.count(Counter::Landed), 0, "{kind:?}");
    }
}

/// A message with two descriptors.
fn send(to: &OwnedFd, message: &[u8], with: &[&dyn AsRawFd; 2]) {
    let mut part = libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() };
    let mut control = [0_u64; 8];
    let size = 2 * size_of::<i32>() as u32;
    // SAFETY: zeros are a message of nothing; everything that it is given then lives through the call, and `control` is
    // aligned for a header and has room for one with two descriptors.
    let sent = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(size) as _;
        let first = libc::CMSG_FIRSTHDR(&raw const header);
        ((*first).cmsg_level, (*first).cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
        (*first).cmsg_len = libc::CMSG_LEN(size) as _;
        for (place, one) in with.iter().enumerate() {
            libc::CMSG_DATA(first).cast::<i32>().add(place).write_unaligned(one.as_raw_fd());
        }
        libc::sendmsg(to.as_raw_fd(), &raw const header, 0)
    };
    assert_eq!(sent, message.len() as isize);
}
