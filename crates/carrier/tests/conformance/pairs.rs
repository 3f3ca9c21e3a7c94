//! Ways to run a guest (which connects) against a host (which listens): the kernel's carriers in two workers, the simulator.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant as Moment};

use fourtuple_carrier::sim::{Faults, Script, Sim};
use fourtuple_carrier::{CarrierKind, CarrierReport, CarrierSettings, Worker};
use fourtuple_engine::Instant;

use crate::actors::{Guest, Host, Tally};
use crate::sound;

/// Nothing here takes longer, except what is broken.
const PATIENCE: Duration = Duration::from_secs(40);

pub(crate) trait Pair {
    /// Where a host is to listen.
    fn listen_at(&self) -> SocketAddr;
    /// Run both until both are done.
    fn run(&self, guest: Guest, host: Host) -> (Tally, Tally);
}

pub(crate) struct Uring(pub(crate) CarrierSettings);
pub(crate) struct Epoll(pub(crate) CarrierSettings);
pub(crate) struct Simulated;

/// Two workers of one kind.
pub(crate) struct Kernel {
    pub(crate) kind: CarrierKind,
    pub(crate) guest: CarrierSettings,
    pub(crate) host: CarrierSettings,
}

/// Small, since a test machine may be.
pub(crate) fn settings() -> CarrierSettings {
    CarrierSettings { most_connections: 4096, slots_per_ring: 1024, ..CarrierSettings::default() }
}

pub(crate) fn wait_for(address: &Arc<OnceLock<SocketAddr>>) -> SocketAddr {
    let started = Moment::now();
    loop {
        if let Some(address) = address.get() {
            return *address;
        }
        assert!(started.elapsed() < PATIENCE, "the host does not listen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Kernel {
    pub(crate) fn run_and_report(&self, mut guest: Guest, host: Host) -> (Tally, Tally, CarrierReport, CarrierReport) {
        guest.meet(&host);
        let (guest_tally, host_tally) = (guest.tally(), host.tally());
        let host = Worker::start(self.kind, self.host, Box::new(host)).unwrap();
        let guest = Worker::start(self.kind, self.guest, Box::new(guest)).unwrap();
        let started = Moment::now();
        while guest.is_running() || host.is_running() {
            if started.elapsed() > PATIENCE {
                let (guest, host) = (guest.published(), host.published());
                panic!("no end: {guest:?} {host:?} {guest_tally:?} {host_tally:?}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let (guest, host) = (guest.join().unwrap(), host.join().unwrap());
        let (guest_tally, host_tally) = (guest_tally.lock().unwrap().clone(), host_tally.lock().unwrap().clone());
        sound(&guest_tally);
        sound(&host_tally);
        (guest_tally, host_tally, guest.carrier, host.carrier)
    }
}

impl Pair for Kernel {
    fn listen_at(&self) -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    fn run(&self, guest: Guest, host: Host) -> (Tally, Tally) {
        let (guest, host, ..) = self.run_and_report(guest, host);
        (guest, host)
    }
}

impl Uring {
    pub(crate) fn run_and_report(&self, guest: Guest, host: Host) -> (Tally, Tally, CarrierReport, CarrierReport) {
        Kernel { kind: CarrierKind::Uring, guest: self.0, host: self.0 }.run_and_report(guest, host)
    }
}

impl Pair for Uring {
    fn listen_at(&self) -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    fn run(&self, guest: Guest, host: Host) -> (Tally, Tally) {
        let (guest, host, ..) = self.run_and_report(guest, host);
        (guest, host)
    }
}

impl Pair for Epoll {
    fn listen_at(&self) -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    fn run(&self, guest: Guest, host: Host) -> (Tally, Tally) {
        Kernel { kind: CarrierKind::Epoll, guest: self.0, host: self.0 }.run(guest, host)
    }
}

impl Pair for Simulated {
    fn listen_at(&self) -> SocketAddr {
        "127.0.0.1:7000".parse().unwrap()
    }

    fn run(&self, mut guest: Guest, mut host: Host) -> (Tally, Tally) {
        guest.meet(&host);
        let script = Script {
            orders: Vec::new(),
            until: Instant(3_600_000_000_000),
            most_steps: 10_000_000,
            strict: false,
            echoing: false,
        };
        let ran = Sim::new(1, Faults::NONE).run(&mut [&mut guest], &mut [&mut host], &script);
        let (guest, host) = (guest.tally().lock().unwrap().clone(), host.tally().lock().unwrap().clone());
        if let Err(broken) = ran {
            panic!("{broken} {guest:?} {host:?}");
        }
        sound(&guest);
        sound(&host);
        (guest, host)
    }
}
