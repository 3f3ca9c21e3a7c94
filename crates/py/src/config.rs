//! What crosses into Rust: the frozen dataclasses of `fourtuple.engine`, read once, attribute by attribute.
//!
//! Decides how one engine's work is shared out to its workers. Values were checked in Python; here only their types are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fourtuple_broker::cancel::Cancels;
use fourtuple_broker::door::{DIALECTS, Door};
use fourtuple_broker::{BrokerGuide, Fallback, LedgerFile, Looking, Manners, PostgresTls, Rules};
use fourtuple_carrier::{CarrierKind, CarrierSettings, Shelf};
use fourtuple_engine::broker::ledger::Unwritten;
use fourtuple_engine::broker::{BrokerConfig, BrokerCore, ListenAt};
use fourtuple_engine::echo::{EchoConfig, EchoCore};
use fourtuple_engine::load::{LoadConfig, LoadCore};
use fourtuple_engine::script::{Act, Script};
use fourtuple_engine::space::{Addresses, Ports, Space};
use fourtuple_engine::speech::Tokens;
use fourtuple_engine::{Core, Order, SourceChoice, Transport};
use fourtuple_registry::{Name, PATTERN, Prefix, Store, Target};
use fourtuple_sniff::{PROBES, Pattern, Protocol};
use fourtuple_tls::{Client, Secured, Settings};
use pyo3::prelude::*;

use crate::failure::{BadConfig, unregistered};
use crate::registry::Registry;

/// From this many listeners on, workers share them out instead of each listening on all.
const MANY_LISTENERS: usize = 1_000;

/// The work of one engine.
#[derive(FromPyObject)]
pub(crate) enum Request {
    /// `fourtuple.engine.LoadConfig`
    Load(LoadRequest),
    /// `fourtuple.engine.EchoConfig`
    Echo(EchoRequest),
    /// `fourtuple.engine.BrokerConfig`
    Broker(BrokerRequest),
}

/// `fourtuple.engine.LoadConfig`, as far as the core asks.
#[derive(FromPyObject)]
pub(crate) struct LoadRequest {
    space: SpaceRequest,
    connections: u64,
    #[pyo3(from_py_with = choice)]
    choice: SourceChoice,
    window: u32,
    rate_per_s: u32,
    #[pyo3(from_py_with = seconds)]
    connect_timeout_s: Duration,
    #[pyo3(from_py_with = seconds)]
    ping_timeout_s: Duration,
    ping_window: u32,
    token_bytes: u32,
    seed: u64,
    #[pyo3(from_py_with = seconds)]
    ping_every_s: Duration,
    closed_loop: bool,
    give_up_after: u32,
    abort_on_close: bool,
    keep_fill_curve: bool,
    #[pyo3(from_py_with = script)]
    dialogue: Option<Box<Script>>,
    #[pyo3(from_py_with = boxed)]
    tls: Option<Box<TlsRequest>>,
}

/// `fourtuple.engine.TlsConfig`.
#[derive(FromPyObject)]
struct TlsRequest {
    server_name: String,
    ca: Option<Vec<u8>>,
    insecure: bool,
    alpn: Vec<Vec<u8>>,
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// `fourtuple.dialogue.Dialogue`.
#[derive(FromPyObject)]
struct DialogueRequest {
    opening: Vec<ActRequest>,
    round: Vec<ActRequest>,
}

/// One of its acts: kind, bytes, and the two numbers that some kinds have.
#[derive(FromPyObject)]
struct ActRequest {
    row: (String, Vec<u8>, u32, u32),
}

/// `fourtuple.engine.EchoConfig`.
#[derive(FromPyObject)]
pub(crate) struct EchoRequest {
    listen: Vec<EndpointRequest>,
    backlog: u32,
    reuse_port: bool,
    most_connections: u64,
    accept: bool,
}

/// `fourtuple.engine.BrokerConfig`.
#[derive(FromPyObject)]
pub(crate) struct BrokerRequest {
    listeners: Vec<ListenerRequest>,
    store: StoreRequest,
    backlog: u32,
    #[pyo3(from_py_with = seconds)]
    delivery_timeout_s: Duration,
    most_connections: u64,
    most_per_source: u32,
    most_per_service: u32,
    most_parked: u32,
    most_parked_per_service: u32,
    parked_bytes: u64,
    #[pyo3(from_py_with = seconds)]
    settle_s: Duration,
    inetd_path: Option<PathBuf>,
    manners: MannersRequest,
    ledger: Option<PathBuf>,
    ledger_every: u32,
    ledger_steps: bool,
}

/// `fourtuple.engine.Manners`.
#[derive(FromPyObject)]
struct MannersRequest {
    motd: String,
    retry_after_s: u32,
    health_paths: Vec<String>,
}

/// A registry that is open, or the folder of one.
#[derive(FromPyObject)]
enum StoreRequest {
    Open(Py<Registry>),
    At(PathBuf),
}

/// `fourtuple.engine.BrokerListener`.
#[derive(FromPyObject)]
struct ListenerRequest {
    endpoint: EndpointRequest,
    #[pyo3(from_py_with = seconds)]
    sniff_timeout_s: Duration,
    default: Option<String>,
    proxy_from: Vec<String>,
    proxy_optional: bool,
    #[pyo3(from_py_with = postgres_tls)]
    postgres_tls: PostgresTls,
    answers_socks: bool,
    protocols: Vec<String>,
    patterns: Vec<PatternRequest>,
    door: Option<DoorRequest>,
    consults: bool,
    fds: Vec<RawFd>,
}

/// `fourtuple.engine.Door`.
#[derive(FromPyObject)]
struct DoorRequest {
    protocol: String,
    host: String,
    requires_tls: bool,
}

/// `fourtuple.engine.BytePattern`.
#[derive(FromPyObject)]
struct PatternRequest {
    name: String,
    offset: u16,
    bytes: Vec<u8>,
}

/// `fourtuple.tuples.TupleSpace`, a product of four sets.
#[derive(FromPyObject)]
struct SpaceRequest {
    #[pyo3(from_py_with = transport)]
    protocol: Transport,
    sources: AddressesRequest,
    source_ports: PortsRequest,
    destinations: AddressesRequest,
    destination_ports: PortsRequest,
}

/// `fourtuple.tuples.AddressSet`: first and last address of each run, as integers.
#[derive(FromPyObject)]
struct AddressesRequest {
    version: u8,
    runs: Vec<(u128, u128)>,
}

/// `fourtuple.tuples.PortSet`: first and last port of each run.
#[derive(FromPyObject)]
struct PortsRequest {
    runs: Vec<(u16, u16)>,
}

/// `fourtuple.tuples.Endpoint`.
#[derive(FromPyObject)]
struct EndpointRequest {
    address: IpAddr,
    port: u16,
}

/// `fourtuple.engine.CarrierSettings`: what a carrier may use in each worker; None leaves the choice to the carrier.
#[derive(FromPyObject)]
pub(crate) struct SettingsRequest {
    most_connections: Option<u32>,
    slots_per_ring: Option<u32>,
    buffer_bytes: Option<usize>,
    buffers_per_chunk: Option<u32>,
    buffer_chunks: Option<u32>,
}

impl Request {
    /// Most connections, attempts and listeners at once that the request speaks of.
    fn places(&self) -> u32 {
        let places = match self {
            Request::Load(load) => load.connections + u64::from(load.window),
            Request::Echo(echo) => echo.most_connections + echo.listen.len() as u64,
            // Both sides of each.
            Request::Broker(broker) => 2 * broker.most_connections + broker.listeners.len() as u64,
        };
        u32::try_from(places).unwrap_or(u32::MAX)
    }

    /// The cores of `workers` workers, each with the descriptors that it is to find: their shares are disjoint, and together
    /// they are the whole.
    pub(crate) fn cores(&self, workers: u32) -> PyResult<Vec<(Box<dyn Core>, Shelf)>> {
        let client = match self {
            Request::Load(LoadRequest { tls: Some(tls), .. }) => Some(tls.client()?),
            _ => None,
        };
        let mut ledgers = match self {
            Request::Broker(broker) => broker.ledgers(workers)?.into_iter(),
            _ => Vec::new().into_iter(),
        };
        let cancels = Arc::default();
        let core = |worker| match self {
            Request::Load(load) => Ok((load.core(worker, workers, client.clone()), Shelf::default())),
            Request::Echo(echo) => {
                let core: Box<dyn Core> = Box::new(EchoCore::new(echo.share(worker, workers)));
                Ok((core, Shelf::default()))
            }
            Request::Broker(broker) => broker.core(worker, workers, ledgers.next(), &cancels),
        };
        (0..workers).map(core).collect()
    }
}

impl LoadRequest {
    fn core(&self, worker: u32, workers: u32, client: Option<Client>) -> Box<dyn Core> {
        let share = self.share(worker, workers);
        match (&self.dialogue, client) {
            (Some(script), None) => Box::new(LoadCore::playing(share, script.as_ref().clone())),
            (None, None) => Box::new(LoadCore::new(share)),
            (Some(script), Some(client)) => {
                Box::new(LoadCore::speaking(share, Secured::new(script.as_ref().clone(), client)))
            }
            (None, Some(client)) => {
                let tokens = Tokens::of(&share);
                Box::new(LoadCore::speaking(share, Secured::new(tokens, client)))
            }
        }
    }

    fn share(&self, worker: u32, workers: u32) -> LoadConfig {
        LoadConfig {
            transport: self.space.protocol,
            space: self.space.space(),
            first: worker.into(),
            stride: workers.into(),
            connections: part(self.connections, worker, workers),
            choice: self.choice,
            window: at_least_one(self.window, worker, workers),
            rate_per_s: if self.rate_per_s == 0 { 0 } else { at_least_one(self.rate_per_s, worker, workers) },
            connect_timeout: self.connect_timeout_s,
            ping_timeout: self.ping_timeout_s,
            ping_window: at_least_one(self.ping_window, worker, workers),
            token_bytes: self.token_bytes,
            seed: self.seed.wrapping_add(worker.into()),
            ping_every: self.ping_every_s,
            closed_loop: self.closed_loop,
            give_up_after: self.give_up_after,
            abort_on_close: self.abort_on_close,
            keep_fill_curve: self.keep_fill_curve,
        }
    }
}

impl TlsRequest {
    /// What is wrong with the files only shows here: Python has read them, and knows nothing of certificates.
    fn client(&self) -> PyResult<Client> {
        let settings = Settings {
            server_name: self.server_name.clone(),
            ca: self.ca.clone(),
            insecure: self.insecure,
            alpn: self.alpn.clone(),
            identity: self.identity.clone(),
        };
        Client::new(&settings).map_err(|refused| BadConfig::new_err((format!("tls.{}", refused.setting), refused.why)))
    }
}

impl ActRequest {
    fn act(self) -> Result<Act, &'static str> {
        let (kind, bytes, first, second) = self.row;
        let status = |number| u16::try_from(number).map_err(|_| "a status above 65,535");
        Ok(match kind.as_str() {
            "say" => Act::Say(bytes),
            "expect" => Act::Expect(bytes),
            "until" => Act::Until(bytes, first),
            "skip" => Act::Skip(first),
            "rest" => Act::Rest,
            "wait" => Act::Wait(Duration::from_secs(first.into()) + Duration::from_nanos(second.into())),
            "response" => Act::Response(status(first)?, status(second)?),
            "upgrade" => Act::Upgrade(bytes),
            "pong" => Act::Pong(bytes),
            _ => return Err("an act that is not one of say, expect, until, skip, rest, wait, response, upgrade, pong"),
        })
    }
}

impl EchoRequest {
    fn share(&self, worker: u32, workers: u32) -> EchoConfig {
        let endpoints = self.listen.iter().map(|endpoint| SocketAddr::new(endpoint.address, endpoint.port));
        let sharing_out = self.listen.len() >= MANY_LISTENERS;
        EchoConfig {
            listen: if sharing_out {
                endpoints.skip(worker as usize).step_by(workers as usize).collect()
            } else {
                endpoints.collect()
            },
            backlog: self.backlog,
            reuse_port: self.reuse_port || (workers > 1 && !sharing_out),
            most_connections: match self.most_connections {
                0 => 0,
                most => part(most, worker, workers).max(1),
            },
            accept: self.accept,
        }
    }
}

impl BrokerRequest {
    fn core(
        &self,
        worker: u32,
        workers: u32,
        ledger: Option<LedgerFile>,
        cancels: &Arc<Cancels>,
    ) -> PyResult<(Box<dyn Core>, Shelf)> {
        let looking = self.listeners.iter().map(ListenerRequest::looking);
        let MannersRequest { motd, retry_after_s, health_paths } = &self.manners;
        let manners = Manners { motd: motd.clone(), retry_after_s: *retry_after_s, health_paths: health_paths.clone() };
        let guide = BrokerGuide::new(self.store.opened()?, looking.collect::<PyResult<_>>()?)
            .sharing(cancels.clone())
            .saying(manners);
        let listen = self.listeners.iter().map(|listener| ListenAt {
            local: SocketAddr::new(listener.endpoint.address, listener.endpoint.port),
            sniff_timeout: listener.sniff_timeout_s,
        });
        let share = |most: u64| if most == 0 { 0 } else { part(most, worker, workers).max(1) };
        let each = |most: u32| share(most.into()).min(u64::from(u32::MAX)) as u32;
        let config = BrokerConfig {
            listen: listen.collect(),
            backlog: self.backlog,
            reuse_port: workers > 1,
            sniff_bytes: guide.bound() as u32,
            delivery_timeout: self.delivery_timeout_s,
            most_connections: share(self.most_connections),
            most_per_source: each(self.most_per_source),
            most_per_service: each(self.most_per_service),
            most_parked: each(self.most_parked),
            most_parked_per_service: each(self.most_parked_per_service),
            parked_bytes: share(self.parked_bytes),
            settle: self.settle_s,
            worker,
            inetd_path: self.inetd_path.as_ref().map_or_else(Vec::new, |path| path.as_os_str().as_bytes().to_vec()),
            ..BrokerConfig::default()
        };
        let shelf = Shelf::default();
        let given = self.listeners.iter().map(|listener| {
            let descriptor = listener.fds.get(worker as usize).map(|&fd| duplicate("listeners.fds", fd));
            Ok(descriptor.transpose()?.map(|descriptor| shelf.put(descriptor)))
        });
        let given = given.collect::<PyResult<Vec<_>>>()?;
        let core: Box<dyn Core> = match ledger {
            Some(ledger) => Box::new(BrokerCore::new(config, guide, ledger).listening_with(given)),
            None => Box::new(BrokerCore::new(config, guide, Unwritten).listening_with(given)),
        };
        Ok((core, shelf))
    }

    /// One for each worker, or none at all.
    fn ledgers(&self, workers: u32) -> PyResult<Vec<LedgerFile>> {
        let Some(path) = &self.ledger else { return Ok(Vec::new()) };
        LedgerFile::append(path, self.ledger_every, self.ledger_steps, workers as usize)
            .map_err(|error| BadConfig::new_err(("ledger", format!("{}: {error}", path.display()))))
    }
}

impl StoreRequest {
    fn opened(&self) -> PyResult<Arc<Store>> {
        match self {
            StoreRequest::Open(registry) => registry.get().opened(),
            StoreRequest::At(path) => Store::open(path, false, None).map_err(|error| unregistered(&error)),
        }
    }
}

impl ListenerRequest {
    fn looking(&self) -> PyResult<Looking> {
        let refused = |error: fourtuple_registry::Error| unregistered(&error);
        let protocols = self.protocols.iter().map(|name| protocol(name)).collect::<PyResult<Vec<_>>>()?;
        let patterns = self.patterns.iter().map(PatternRequest::pattern).collect::<PyResult<Vec<_>>>()?;
        let rules = self.rules().map_err(refused)?;
        let looking = Looking::new(protocols, patterns, self.fallback().map_err(refused)?).under(rules);
        let looking = looking.consulting(self.consults);
        Ok(match &self.door {
            Some(door) => looking.behind(door.door()?),
            None => looking,
        })
    }

    fn rules(&self) -> Result<Rules, fourtuple_registry::Error> {
        let proxies =
            self.proxy_from.iter().map(|text| Prefix::checked("proxy_from", text)).collect::<Result<_, _>>()?;
        let (may_be_direct, leaves_socks) = (self.proxy_optional, !self.answers_socks);
        Ok(Rules { proxies, may_be_direct, postgres_tls: self.postgres_tls, leaves_socks })
    }

    fn fallback(&self) -> Result<Option<Fallback>, fourtuple_registry::Error> {
        let Some(text) = &self.default else { return Ok(None) };
        Ok(Some(match text.strip_prefix("service:") {
            Some(name) => Fallback::Service(Box::new(Name::checked("default", name)?)),
            None => Fallback::Target(Target::checked("default", text)?),
        }))
    }
}

impl DoorRequest {
    fn door(&self) -> PyResult<Door> {
        let DoorRequest { protocol, host, requires_tls } = self;
        let found = DIALECTS.iter().find(|row| row.0 == protocol).map(|row| row.1);
        let names = DIALECTS.map(|row| row.0).join(", ");
        let refused = || BadConfig::new_err(("door", format!("{protocol:?} is not one of {names}")));
        Ok(Door { dialect: found.ok_or_else(refused)?, host: host.clone(), requires_tls: *requires_tls })
    }
}

impl PatternRequest {
    fn pattern(&self) -> PyResult<(String, Pattern)> {
        let pattern = Pattern::new(self.offset, &self.bytes);
        let refused = || BadConfig::new_err(("pattern", format!("{:?} has no bytes, or too many", self.name)));
        Ok((format!("{PATTERN}{}", self.name), pattern.ok_or_else(refused)?))
    }
}

impl SpaceRequest {
    fn space(&self) -> Space {
        Space {
            sources: self.sources.ranges(),
            source_ports: self.source_ports.ranges(),
            destinations: self.destinations.ranges(),
            destination_ports: self.destination_ports.ranges(),
        }
    }
}

impl AddressesRequest {
    fn ranges(&self) -> Vec<Addresses> {
        let row = |&(first, last): &(u128, u128)| Addresses {
            first: if self.version == 4 {
                IpAddr::V4(Ipv4Addr::from_bits(first as u32))
            } else {
                IpAddr::V6(Ipv6Addr::from_bits(first))
            },
            // A /64 has one address more than a u64 counts; nobody will miss it.
            count: u64::try_from(last - first).unwrap_or(u64::MAX).saturating_add(1),
        };
        self.runs.iter().map(row).collect()
    }
}

impl PortsRequest {
    fn ranges(&self) -> Vec<Ports> {
        self.runs.iter().map(|&(first, last)| Ports { first, last }).collect()
    }
}

impl SettingsRequest {
    /// The carrier's own defaults with what was asked for put in, and with room for the whole request in each worker: how
    /// SO_REUSEPORT deals connections out is the kernel's choice.
    pub(crate) fn settings(&self, request: &Request, workers: u32) -> CarrierSettings {
        let usual = CarrierSettings::default();
        CarrierSettings {
            most_connections: self.most_connections.unwrap_or(usual.most_connections.max(request.places())),
            workers,
            slots_per_ring: self.slots_per_ring.unwrap_or(usual.slots_per_ring),
            buffer_bytes: self.buffer_bytes.unwrap_or(usual.buffer_bytes),
            buffers_per_chunk: self.buffers_per_chunk.unwrap_or(usual.buffers_per_chunk),
            buffer_chunks: self.buffer_chunks.unwrap_or(usual.buffer_chunks),
        }
    }
}

/// The carrier of that name.
pub(crate) fn carrier(name: &str) -> PyResult<CarrierKind> {
    match name {
        "uring" => Ok(CarrierKind::Uring),
        "epoll" => Ok(CarrierKind::Epoll),
        _ => Err(BadConfig::new_err(("carrier", format!("{name:?} is not one of uring, epoll")))),
    }
}

/// An order to the whole engine, as what one of its workers is told.
pub(crate) fn order(kind: &str, value: u64, worker: u32, workers: u32) -> PyResult<Order> {
    match kind {
        "ping" => Ok(Order::Ping),
        "rate" if value == 0 => Ok(Order::Rate(0)),
        "rate" => Ok(Order::Rate(at_least_one(u32::try_from(value)?, worker, workers))),
        "target" => Ok(Order::Target(part(value, worker, workers))),
        "close" => Ok(Order::Close),
        "drain" => Ok(Order::Drain),
        "resume" => Ok(Order::Resume),
        _ => {
            let why = format!("{kind:?} is not one of ping, rate, target, close, drain, resume");
            Err(BadConfig::new_err(("order", why)))
        }
    }
}

/// New bounds for one worker: each is the whole engine's and is shared out, and 0 is no bound.
pub(crate) fn limits(connections: u64, per_source: u32, per_service: u32, worker: u32, workers: u32) -> Order {
    let share = |most: u64| if most == 0 { 0 } else { part(most, worker, workers).max(1) };
    let each = |most: u32| share(most.into()).min(u64::from(u32::MAX)) as u32;
    Order::Limits {
        most_connections: share(connections),
        most_per_source: each(per_source),
        most_per_service: each(per_service),
    }
}

/// A probe by its name.
fn protocol(name: &str) -> PyResult<Protocol> {
    let found = PROBES.iter().find(|probe| probe.name == name).map(|probe| probe.protocol);
    found.ok_or_else(|| {
        BadConfig::new_err(("protocols", format!("{name:?} is not a probe; fourtuple sniff lists them")))
    })
}

/// A copy of a descriptor of the caller's.
pub(crate) fn duplicate(what: &'static str, fd: RawFd) -> PyResult<OwnedFd> {
    let refused = |why: String| BadConfig::new_err((what, why));
    if fd < 0 {
        return Err(refused(format!("{fd} is no descriptor")));
    }
    // SAFETY: it is borrowed for one call, which answers EBADF if it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map_err(|error| refused(format!("descriptor {fd}: {error}")))
}

/// This worker's part of `whole`; the first workers take what does not divide.
fn part(whole: u64, worker: u32, workers: u32) -> u64 {
    let (worker, workers) = (u64::from(worker), u64::from(workers));
    whole / workers + u64::from(worker < whole % workers)
}

/// As `part`, for numbers whose zero would mean something else.
fn at_least_one(whole: u32, worker: u32, workers: u32) -> u32 {
    (part(whole.into(), worker, workers) as u32).max(1)
}

fn transport(name: &Bound<'_, PyAny>) -> PyResult<Transport> {
    match name.getattr("value")?.extract::<&str>()? {
        "tcp" => Ok(Transport::Stream),
        "udp" => Ok(Transport::Datagram),
        other => Err(BadConfig::new_err(("space.protocol", format!("{other:?} is not one of tcp, udp")))),
    }
}

fn choice(name: &Bound<'_, PyAny>) -> PyResult<SourceChoice> {
    match name.getattr("value")?.extract::<&str>()? {
        "kernel" => Ok(SourceChoice::Kernel),
        "kernel-port" => Ok(SourceChoice::KernelPort),
        "kernel-range" => Ok(SourceChoice::KernelRange),
        "single-port" => Ok(SourceChoice::SinglePort),
        "bind" => Ok(SourceChoice::Bind),
        other => Err(BadConfig::new_err(("choice", format!("{other:?} is not a source choice")))),
    }
}

/// What is wrong with a dialogue was said in Python already; here it is said once more, should that have a gap.
fn script(value: &Bound<'_, PyAny>) -> PyResult<Option<Box<Script>>> {
    let Some(DialogueRequest { opening, round }) = value.extract()? else { return Ok(None) };
    let acts = |rows: Vec<ActRequest>| rows.into_iter().map(ActRequest::act).collect::<Result<Vec<Act>, _>>();
    acts(opening)
        .and_then(|opening| Script::new(opening, acts(round)?))
        .map(|script| Some(Box::new(script)))
        .map_err(|why| BadConfig::new_err(("dialogue", why)))
}

fn boxed(value: &Bound<'_, PyAny>) -> PyResult<Option<Box<TlsRequest>>> {
    Ok(value.extract::<Option<TlsRequest>>()?.map(Box::new))
}

fn postgres_tls(value: &Bound<'_, PyAny>) -> PyResult<PostgresTls> {
    match value.getattr("value")?.extract::<&str>()? {
        "offered" => Ok(PostgresTls::Offered),
        "declined" => Ok(PostgresTls::Declined),
        "left" => Ok(PostgresTls::Left),
        other => Err(BadConfig::new_err(("postgres_tls", format!("{other:?} is not one of offered, declined, left")))),
    }
}

fn seconds(value: &Bound<'_, PyAny>) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value.extract()?).map_err(|error| BadConfig::new_err(("seconds", error.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_whole() {
        for whole in [0, 1, 2, 7, 28_232, u64::MAX] {
            for workers in 1..=9 {
                let parts = (0..workers).map(|worker| part(whole, worker, workers));
                assert_eq!(parts.sum::<u64>(), whole, "{whole} over {workers}");
            }
        }
    }
}
