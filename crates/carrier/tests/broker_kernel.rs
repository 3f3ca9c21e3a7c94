//! The broker core on the kernel's carriers: real clients, real services, unix sockets and descriptors that are handed over.

// Clients and services outside of any carrier.
#![allow(clippy::disallowed_methods)]

use std::io::{ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant as Moment};

use fourtuple_carrier::{CarrierKind, CarrierSettings, Published, Worker};
use fourtuple_engine::broker::guide::{Address, Chosen, Delivery, Guidance, Guide, Shown, Turn};
use fourtuple_engine::broker::ledger::{REASONS, Reason, Unwritten};
use fourtuple_engine::broker::{BrokerConfig, BrokerCore, ListenAt, note};
use fourtuple_engine::report::{Counter, Phase};
use fourtuple_engine::{ListenerId, Order};

const KERNELS: [CarrierKind; 2] = [CarrierKind::Epoll, CarrierKind::Uring];
const PATIENCE: Duration = Duration::from_secs(20);

/// "name\n" is the service; nothing is "default".
struct Names(Vec<(&'static str, Delivery, Address)>);

impl Guide for Names {
    type Memory = ();

    fn guide(&mut self, shown: &Shown<'_>, _: &mut (), chosen: &mut Chosen) -> Guidance {
        let name = match shown.bytes.iter().position(|&byte| byte == b'\n') {
            Some(end) => String::from_utf8_lossy(&shown.bytes[..end]).into_owned(),
            None if shown.last && shown.bytes.is_empty() => "default".to_owned(),
            None => return Guidance::More,
        };
        let Some((_, delivery, address)) = self.0.iter().find(|row| row.0 == name) else { return Guidance::NoRoute };
        (chosen.service, chosen.matched) = (name.clone(), name);
        (chosen.delivery, chosen.address) = (*delivery, address.clone());
        Guidance::Found
    }
}

/// Names, behind what is not for the service: "^" and the peer speaks for another; "?" is answered "!" in the service's name;
/// a name behind "@" is the broker's alone, and answered "+".
struct Openings(Names);

const ANOTHER: &str = "192.0.2.9:9";

impl Guide for Openings {
    /// Spoke for another, was answered.
    type Memory = (bool, bool);

    fn trusts(&self, _: ListenerId, _: SocketAddr) -> bool {
        true
    }

    fn guide(&mut self, shown: &Shown<'_>, (spoke, asked): &mut (bool, bool), chosen: &mut Chosen) -> Guidance {
        if !*spoke {
            let another: SocketAddr = ANOTHER.parse().unwrap();
            let (names, header) = match shown.bytes {
                [] if shown.last => return Guidance::Unproxied,
                [] => return Guidance::More,
                [b'^', ..] => (Some((another, another)), 1),
                _ => (None, 0),
            };
            *spoke = true;
            return Guidance::Speaks { names, header };
        }
        let (start, rest) = match shown.bytes {
            [] => return Guidance::More,
            [b'?'] if !std::mem::replace(asked, true) => return Guidance::Answer(b"!"),
            [b'?', rest @ ..] | [b'@', rest @ ..] => (1_usize, rest),
            rest => (0, rest),
        };
        let is_line = shown.bytes[0] == b'@';
        let guidance = self.0.guide(&Shown { bytes: rest, ..*shown }, &mut (), chosen);
        if guidance == Guidance::Found {
            let line = rest.iter().position(|&byte| byte == b'\n').map_or(0, |end| end + 1);
            chosen.skip = if is_line { start + line } else { start } as u32;
            chosen.reply = if is_line { b"+" } else { b"" };
            chosen.script = asked.then(|| Turn { say: b"?".into(), expect: Some(b'!') }).into_iter().collect();
        }
        guidance
    }
}

fn listen(sniff_timeout: Duration) -> Vec<ListenAt> {
    vec![ListenAt { local: "127.0.0.1:0".parse().unwrap(), sniff_timeout }]
}

fn config() -> BrokerConfig {
    BrokerConfig {
        listen: listen(Duration::from_secs(10)),
        backlog: 1024,
        reuse_port: false,
        sniff_bytes: 65_536,
        delivery_timeout: Duration::from_secs(10),
        most_connections: 0,
        most_per_source: 0,
        most_per_service: 0,
        ..BrokerConfig::default()
    }
}

/// A broker in a thread of its own.
struct Running {
    worker: Worker,
    at: SocketAddr,
}

impl Running {
    fn start<G: Guide + 'static>(kind: CarrierKind, config: BrokerConfig, guide: G) -> Running {
        let settings = CarrierSettings { most_connections: 4096, slots_per_ring: 1024, ..CarrierSettings::default() };
        let worker = Worker::start(kind, settings, Box::new(BrokerCore::new(config, guide, Unwritten))).unwrap();
        let at = wait(|| worker.published().report.listening_at);
        Running { worker, at }
    }

    fn client(&self) -> TcpStream {
        let client = TcpStream::connect(self.at).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    }

    fn wait_for(&self, reason: Reason, count: u64) {
        wait(|| (self.worker.published().report.count(reason.counter()) == count).then_some(()));
    }

    /// Close all; every accepted connection has one reason, and every buffer is back.
    fn end(self) -> Published {
        self.worker.order(Order::Close);
        wait(|| (!self.worker.is_running()).then_some(()));
        let last = self.worker.join().unwrap();
        let reasons: u64 = REASONS.iter().map(|reason| last.report.count(reason.counter())).sum();
        assert_eq!((last.report.count(Counter::Accepted), last.report.phase), (reasons, Phase::Done));
        assert_eq!((last.report.count(Counter::Open), last.carrier.buffers_in_use), (0, 0));
        last
    }
}

fn wait<T>(mut ready: impl FnMut() -> Option<T>) -> T {
    let started = Moment::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(started.elapsed() < PATIENCE, "it does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Where a service listens; the file goes when the test does.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

impl AsRef<Path> for SocketFile {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl Deref for SocketFile {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

fn path() -> SocketFile {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("fourtuple-broker-{}-{number}", std::process::id()));
    drop(std::fs::remove_file(&path));
    SocketFile(path)
}

fn unix(path: &std::path::Path) -> Address {
    Address::Unix(path.as_os_str().as_encoded_bytes().to_vec())
}

/// Answer each connection, when it has said all, with how many bytes that were, and those bytes.
fn replies<S: Read + Write>(mut stream: S) {
    let mut all = Vec::new();
    if stream.read_to_end(&mut all).is_ok() {
        let head = format!("{} ", all.len());
        drop(stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&all)));
    }
}

fn unix_service(path: &std::path::Path, connections: usize) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for _ in 0..connections {
            let (stream, _) = listener.accept().unwrap();
            std::thread::spawn(move || replies(stream));
        }
    })
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|place| ((place * 31) ^ (place >> 8)) as u8).collect()
}

fn ask(mut client: TcpStream, said: &[u8]) -> Vec<u8> {
    let mut writer = client.try_clone().unwrap();
    let bytes = said.to_vec();
    let writing = std::thread::spawn(move || {
        writer.write_all(&bytes).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).unwrap();
    writing.join().unwrap();
    heard
}

fn expected(said: &[u8]) -> Vec<u8> {
    [format!("{} ", said.len()).as_bytes(), said].concat()
}

/// What came with a handed-off socket, and the socket.
fn take_over(door: &UnixDatagram) -> (Vec<u8>, TcpStream) {
    let mut memory = [0u8; note::MOST_BYTES];
    let mut control = [MaybeUninit::<libc::cmsghdr>::zeroed(); 4];
    let mut bytes = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() };
    // SAFETY: all of its members are plain integers or pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut bytes;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: `message` names memory that lives through the call.
    let count = unsafe { libc::recvmsg(door.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    // SAFETY: the kernel has filled the control memory; its first header is looked at only if it is whole.
    let socket = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        assert!(!header.is_null() && (*header).cmsg_type == libc::SCM_RIGHTS, "a descriptor came");
        TcpStream::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned())
    };
    (memory[..usize::try_from(count).unwrap()].to_vec(), socket)
}

#[test]
fn a_socket_is_handed_over_with_its_bytes_unread() {
    for kind in KERNELS {
        let path = path();
        let door = UnixDatagram::bind(&path).unwrap();
        let names = Names(vec![("shop", Delivery::HandOff, unix(&path))]);
        let broker = Running::start(kind, config(), names);
        for round in 0..3 {
            let mut client = broker.client();
            client.write_all(b"shop\nhello").unwrap();
            let (note, mut socket) = take_over(&door);
            let mut expected_note = [0; note::MOST_BYTES];
            let names = Some((client.local_addr().unwrap(), client.peer_addr().unwrap()));
            let length = note::write(&mut expected_note, names, 10, "shop", "shop");
            assert_eq!(note, &expected_note[..length], "{kind:?}");
            broker.wait_for(Reason::HandedOff, round + 1);
            // The broker has closed its own end, and the connection stands.
            socket.set_nonblocking(false).unwrap();
            let mut heard = [0; 10];
            socket.read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"shop\nhello", "{kind:?}");
            client.write_all(b"more").unwrap();
            socket.read_exact(&mut heard[..4]).unwrap();
            socket.write_all(b"answer").unwrap();
            drop(socket);
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!((&heard[..4], answer.as_str()), (&b"more"[..], "answer"), "{kind:?}");
        }
        assert_eq!(broker.end().report.count(Counter::HandedOff), 3, "{kind:?}");
    }
}

#[test]
fn relayed_bytes_are_exact_both_ways_and_an_end_is_passed_on() {
    for kind in KERNELS {
        let path = path();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let names = Names(vec![
            ("unix", Delivery::Relay, unix(&path)),
            ("tcp", Delivery::Relay, Address::Tcp(tcp.local_addr().unwrap())),
        ]);
        let service = unix_service(&path, 3);
        let tcp_service = std::thread::spawn(move || {
            for _ in 0..3 {
                let (stream, _) = tcp.accept().unwrap();
                std::thread::spawn(move || replies(stream));
            }
        });
        let broker = Running::start(kind, config(), names);
        for name in ["unix\n", "tcp\n"] {
            for length in [0, 1, 3_000_000] {
                let said = [name.as_bytes(), &pattern(length)].concat();
                let heard = ask(broker.client(), &said);
                assert!(heard == expected(&said), "{kind:?} {name:?} {length}: {} bytes came back", heard.len());
            }
        }
        service.join().unwrap();
        tcp_service.join().unwrap();
        broker.wait_for(Reason::Relayed, 6);
        broker.end();
    }
}

#[test]
fn a_slow_hello_is_looked_at_until_it_is_whole() {
    for kind in KERNELS {
        let path = path();
        let service = unix_service(&path, 1);
        let broker = Running::start(kind, config(), Names(vec![("slow", Delivery::Relay, unix(&path))]));
        let client = broker.client();
        client.set_nodelay(true).unwrap();
        for byte in b"slow\n" {
            (&client).write_all(&[*byte]).unwrap();
            std::thread::sleep(Duration::from_millis(3));
        }
        client.shutdown(Shutdown::Write).unwrap();
        let mut heard = String::new();
        (&client).read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "5 slow\n", "{kind:?}");
        service.join().unwrap();
        broker.end();
    }
}

#[test]
fn a_silent_client_gets_the_default_or_a_counted_end() {
    for kind in KERNELS {
        let path = path();
        let config = BrokerConfig { listen: listen(Duration::from_millis(30)), ..config() };
        let listener = UnixListener::bind(&path).unwrap();
        let greeter = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"220 hello\r\n").unwrap());
        let with_default = Names(vec![("default", Delivery::Relay, unix(&path))]);
        let broker = Running::start(kind, config.clone(), with_default);
        let mut heard = String::new();
        broker.client().read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "220 hello\r\n", "{kind:?}");
        greeter.join().unwrap();
        broker.end();
        let broker = Running::start(kind, config, Names(Vec::new()));
        let silent = broker.client();
        broker.wait_for(Reason::SniffDeadline, 1);
        drop(silent);
        let mut stuck = broker.client();
        stuck.write_all(b"half a name").unwrap();
        broker.wait_for(Reason::SniffDeadline, 2);
        broker.end();
    }
}

#[test]
fn an_absent_service_is_waited_for_and_delays_nobody() {
    for kind in KERNELS {
        for delivery in [Delivery::Relay, Delivery::HandOff] {
            let (late, well, never) = (path(), path(), path());
            let config = BrokerConfig { delivery_timeout: Duration::from_millis(1500), ..config() };
            let names = Names(vec![
                ("late", delivery, unix(&late)),
                ("well", Delivery::Relay, unix(&well)),
                ("never", delivery, unix(&never)),
            ]);
            let broker = Running::start(kind, config, names);
            let mut waiting = broker.client();
            waiting.write_all(b"late\n").unwrap();
            let mut lost = broker.client();
            lost.write_all(b"never\n").unwrap();
            let service = unix_service(&well, 1);
            assert_eq!(ask(broker.client(), b"well\n"), expected(b"well\n"), "{kind:?} {delivery:?}");
            service.join().unwrap();
            let mut heard = [0; 5];
            match delivery {
                Delivery::Relay => {
                    let listener = UnixListener::bind(&late).unwrap();
                    listener.accept().unwrap().0.read_exact(&mut heard).unwrap();
                }
                Delivery::HandOff | Delivery::Inetd => {
                    let mut socket = take_over(&UnixDatagram::bind(&late).unwrap()).1;
                    socket.set_nonblocking(false).unwrap();
                    socket.read_exact(&mut heard).unwrap();
                }
            }
            assert_eq!(&heard, b"late\n", "{kind:?} {delivery:?}");
            broker.wait_for(Reason::ServiceAbsent, 1);
            let end = lost.read(&mut heard);
            assert!(end.is_err_and(|end| end.kind() == ErrorKind::ConnectionReset), "{kind:?} {delivery:?}");
            broker.end();
        }
    }
}

#[test]
fn a_full_queue_is_waited_for_and_delays_nobody() {
    for kind in KERNELS {
        let (full, well) = (path(), path());
        // net.unix.max_dgram_qlen is read when the socket is made; one message more than it says is let in.
        let room: usize = std::fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen").unwrap().trim().parse().unwrap();
        let clients = room + 20;
        let door = UnixDatagram::bind(&full).unwrap();
        let names = vec![("full", Delivery::HandOff, unix(&full)), ("well", Delivery::HandOff, unix(&well))];
        let broker = Running::start(kind, config(), Names(names));
        let waiting: Vec<TcpStream> = (0..clients)
            .map(|number| {
                let mut client = broker.client();
                client.write_all(b"full\n").unwrap();
                wait(|| {
                    (broker.worker.published().report.count(Counter::Delivering) as usize
                        + broker.worker.published().report.count(Counter::HandedOff) as usize
                        > number)
                        .then_some(())
                });
                client
            })
            .collect();
        broker.wait_for(Reason::HandedOff, room as u64 + 1);
        let other = UnixDatagram::bind(&well).unwrap();
        broker.client().write_all(b"well\n").unwrap();
        drop(take_over(&other));
        assert_eq!(broker.worker.published().report.count(Counter::Delivering), 19, "{kind:?}");
        // Who came first is served first.
        for client in &waiting {
            let (note, _) = take_over(&door);
            assert_eq!(note[8..10], client.local_addr().unwrap().port().to_be_bytes(), "{kind:?}");
        }
        broker.wait_for(Reason::HandedOff, clients as u64 + 1);
        broker.end();
    }
}

#[test]
fn a_service_that_takes_connections_is_relayed_instead() {
    for kind in KERNELS {
        let path = path();
        let service = unix_service(&path, 1);
        let broker = Running::start(kind, config(), Names(vec![("plain", Delivery::HandOff, unix(&path))]));
        assert_eq!(ask(broker.client(), b"plain\nand more"), expected(b"plain\nand more"), "{kind:?}");
        service.join().unwrap();
        broker.wait_for(Reason::Relayed, 1);
        assert_eq!(broker.end().report.count(Counter::FellBack), 1, "{kind:?}");
    }
}

#[test]
fn a_side_that_breaks_breaks_the_other() {
    for kind in KERNELS {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let names = Names(vec![("tcp", Delivery::Relay, Address::Tcp(listener.local_addr().unwrap()))]);
        let broker = Running::start(kind, config(), names);
        let reset = |stream: TcpStream| {
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            let length = size_of::<libc::linger>() as libc::socklen_t;
            // SAFETY: `linger` is readable for the length given.
            unsafe {
                libc::setsockopt(
                    stream.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_LINGER,
                    (&raw const linger).cast(),
                    length,
                )
            };
        };
        for service_breaks in [true, false] {
            let mut client = broker.client();
            client.write_all(b"tcp\n").unwrap();
            let (mut service, _) = listener.accept().unwrap();
            service.read_exact(&mut [0; 4]).unwrap();
            let (breaks, mut stays) = if service_breaks { (service, client) } else { (client, service) };
            reset(breaks);
            let end = stays.read(&mut [0; 16]);
            assert!(end.is_err_and(|end| end.kind() == ErrorKind::ConnectionReset), "{kind:?} {service_breaks}");
        }
        broker.wait_for(Reason::ServiceBroke, 1);
        broker.wait_for(Reason::ClientBroke, 1);
        broker.end();
    }
}

#[test]
fn a_reader_that_stops_holds_its_sender_back_and_nobody_else() {
    for kind in KERNELS {
        let path = path();
        let listener = UnixListener::bind(&path).unwrap();
        let broker = Running::start(kind, config(), Names(vec![("slow", Delivery::Relay, unix(&path))]));
        let mut client = broker.client();
        client.write_all(b"slow\n").unwrap();
        let (mut service, _) = listener.accept().unwrap();
        client.set_nonblocking(true).unwrap();
        let mut said = 5;
        let bytes = pattern(65_536);
        let started = Moment::now();
        // Until the kernel takes no more for a while.
        let mut stuck_since = Moment::now();
        while stuck_since.elapsed() < Duration::from_millis(300) && started.elapsed() < PATIENCE {
            match client.write(&bytes) {
                Ok(count) => (said, stuck_since) = (said + count, Moment::now()),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        assert!(started.elapsed() < PATIENCE, "{kind:?}: nothing held the sender back");
        let held = broker.worker.published().carrier.buffers_in_use;
        assert!((1..=16).contains(&held), "{kind:?}: {held} buffers");
        client.shutdown(Shutdown::Write).unwrap();
        let mut heard = Vec::new();
        service.read_to_end(&mut heard).unwrap();
        assert_eq!(heard.len(), said, "{kind:?}");
        drop(service);
        broker.wait_for(Reason::Relayed, 1);
        assert_eq!(broker.end().carrier.buffers_in_use, 0);
    }
}

#[test]
fn draining_lets_what_stands_end_by_itself() {
    for kind in KERNELS {
        let path = path();
        let service = unix_service(&path, 1);
        let broker = Running::start(kind, config(), Names(vec![("a", Delivery::Relay, unix(&path))]));
        let mut client = broker.client();
        client.write_all(b"a\n").unwrap();
        service.join().unwrap();
        broker.worker.order(Order::Drain);
        wait(|| TcpStream::connect(broker.at).is_err().then_some(()));
        assert!(broker.worker.is_running(), "{kind:?}");
        client.shutdown(Shutdown::Write).unwrap();
        let mut heard = String::new();
        client.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "2 a\n", "{kind:?}");
        wait(|| (!broker.worker.is_running()).then_some(()));
        let last = broker.worker.join().unwrap();
        assert_eq!(last.report.count(Counter::Relayed), 1, "{kind:?}");
    }
}

#[test]
fn what_is_in_front_is_gone_before_a_socket_is_handed_over() {
    for kind in KERNELS {
        let path = path();
        let door = UnixDatagram::bind(&path).unwrap();
        let broker = Running::start(kind, config(), Openings(Names(vec![("shop", Delivery::HandOff, unix(&path))])));
        // Said, heard, and what is left for the service.
        let cases = [
            (&[&b"^shop\nhello"[..]][..], &b""[..], &b"shop\nhello"[..]),
            (&[b"shop\nhello"], b"", b"shop\nhello"),
            (&[b"^?", b"shop\nhello"], b"!", b"shop\nhello"),
            (&[b"@shop\n"], b"+", b""),
            (&[b"^@shop\nhello"], b"+", b"hello"),
        ];
        for (said, answer, left) in cases {
            let mut client = broker.client();
            let mut heard = vec![0; answer.len()];
            for part in said {
                client.write_all(part).unwrap();
                if part.len() == 2 || said.len() == 1 {
                    client.read_exact(&mut heard).unwrap();
                }
            }
            assert_eq!(heard, answer, "{kind:?} {said:?}");
            let (note, mut socket) = take_over(&door);
            let mut expected_note = [0; note::MOST_BYTES];
            let another: SocketAddr = ANOTHER.parse().unwrap();
            let names = match said[0][0] == b'^' {
                true => (another, another),
                false => (client.local_addr().unwrap(), client.peer_addr().unwrap()),
            };
            let length = note::write(&mut expected_note, Some(names), left.len() as u32, "shop", "shop");
            assert_eq!(note, &expected_note[..length], "{kind:?} {said:?}");
            client.write_all(b" more").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            socket.set_nonblocking(false).unwrap();
            let mut unread = Vec::new();
            socket.read_to_end(&mut unread).unwrap();
            assert_eq!(unread, [left, b" more"].concat(), "{kind:?} {said:?}");
        }
        assert_eq!(broker.end().report.count(Counter::HandedOff), cases.len() as u64, "{kind:?}");
    }
}

#[test]
fn a_service_is_asked_for_what_was_promised_before_it_hears_more() {
    for kind in KERNELS {
        let path = path();
        let listener = UnixListener::bind(&path).unwrap();
        let broker = Running::start(kind, config(), Openings(Names(vec![("db", Delivery::Relay, unix(&path))])));
        let mut client = broker.client();
        client.write_all(b"^?").unwrap();
        let mut answer = [0; 1];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"!", "{kind:?}");
        client.write_all(b"db\nand more").unwrap();
        let (mut service, _) = listener.accept().unwrap();
        let mut heard = [0; 64];
        assert_eq!((service.read(&mut heard).unwrap(), heard[0]), (1, b'?'), "{kind:?}");
        // Nothing follows by itself.
        service.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let nothing = service.read(&mut heard).unwrap_err();
        assert_eq!(nothing.kind(), ErrorKind::WouldBlock, "{kind:?}");
        service.set_read_timeout(Some(PATIENCE)).unwrap();
        service.write_all(b"!").unwrap();
        service.read_exact(&mut heard[..11]).unwrap();
        assert_eq!(&heard[..11], b"db\nand more", "{kind:?}");
        service.write_all(b"hello").unwrap();
        client.read_exact(&mut heard[..5]).unwrap();
        assert_eq!(&heard[..5], b"hello", "{kind:?}");
        drop(service);
        drop(client);
        broker.wait_for(Reason::Relayed, 1);
        broker.end();
    }
}

#[test]
fn a_service_that_does_not_keep_the_promise_ends_the_connection() {
    type Answer = fn(&mut UnixStream);
    let answers: [Answer; 5] = [
        |service| service.write_all(b"N").unwrap(),
        |service| service.write_all(b"!!").unwrap(),
        |service| service.write_all(b"Esorry").unwrap(),
        |service| service.shutdown(Shutdown::Both).unwrap(),
        |_| {},
    ];
    for kind in KERNELS {
        let path = path();
        let listener = UnixListener::bind(&path).unwrap();
        let config = BrokerConfig { delivery_timeout: Duration::from_millis(400), ..config() };
        let broker = Running::start(kind, config, Openings(Names(vec![("db", Delivery::Relay, unix(&path))])));
        for (number, answer) in (1..).zip(&answers) {
            let mut client = broker.client();
            client.write_all(b"?").unwrap();
            client.read_exact(&mut [0; 1]).unwrap();
            client.write_all(b"db\n").unwrap();
            let (mut service, _) = listener.accept().unwrap();
            service.read_exact(&mut [0; 1]).unwrap();
            answer(&mut service);
            broker.wait_for(Reason::ServiceDeclined, number);
            let end = client.read(&mut [0; 16]);
            assert!(end.is_err_and(|end| end.kind() == ErrorKind::ConnectionReset), "{kind:?} {number}");
            // Not a byte of the client's has come through.
            let mut heard = Vec::new();
            let _ = service.read_to_end(&mut heard);
            assert!(heard.is_empty(), "{kind:?} {number}: {heard:?}");
        }
        assert_eq!(broker.end().report.count(Counter::Relayed), 0, "{kind:?}");
    }
}

#[test]
fn a_client_is_told_once_before_its_service_speaks() {
    for kind in KERNELS {
        // Handed over to somebody who takes connections it is relayed, and has been told already.
        for delivery in [Delivery::Relay, Delivery::HandOff] {
            let path = path();
            let listener = UnixListener::bind(&path).unwrap();
            let greeter = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"220 hello").unwrap());
            let broker = Running::start(kind, config(), Openings(Names(vec![("mux", delivery, unix(&path))])));
            let mut client = broker.client();
            client.write_all(b"@mux\n").unwrap();
            let mut heard = String::new();
            client.read_to_string(&mut heard).unwrap();
            assert_eq!(heard, "+220 hello", "{kind:?} {delivery:?}");
            greeter.join().unwrap();
            drop(client);
            broker.end();
        }
    }
}

#[test]
fn who_should_say_for_whom_it_speaks_and_does_not_is_counted() {
    for kind in KERNELS {
        let config = BrokerConfig { listen: listen(Duration::from_millis(50)), ..config() };
        let broker = Running::start(kind, config, Openings(Names(Vec::new())));
        let silent = broker.client();
        broker.wait_for(Reason::Unproxied, 1);
        drop(silent);
        broker.end();
        // A check whether the port listens is no offence, also of one that says so and leaves.
        let broker = Running::start(kind, self::config(), Openings(Names(Vec::new())));
        drop(broker.client());
        broker.wait_for(Reason::ClientLeft, 1);
        broker.client().write_all(b"^").unwrap();
        broker.wait_for(Reason::ClientLeft, 2);
        broker.end();
    }
}
