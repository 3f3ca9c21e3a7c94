//! Two brokers on the kernel's carriers that share listening sockets, and connections that move from one to the other.

// Clients and services outside of any carrier.
#![allow(clippy::disallowed_methods)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{FromRawFd, OwnedFd};
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
        let accepted = [&old, &new].map(|it| it.count(Counter::Accepted));
        assert_eq!(accepted.iter().sum::<u64>(), 320, "{first:?} {second:?}: {accepted:?}");
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
