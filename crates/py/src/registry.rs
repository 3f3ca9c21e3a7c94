//! The registry of services for Python: rows in and out in batches, blocks of text, lookups.
//!
//! Converts and detaches; what a row, a route and a match are is decided in `fourtuple_registry`.

use std::fs::OpenOptions;
use std::net::IpAddr;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use fourtuple_registry::{
    Batch, Conditions, Delivery, Error, Format, Mode, Name, Options, Outcome, Reach, Reader, Route, Rows, Seen,
    Service, Start, Store, Target, write_row,
};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::failure::{BadConfig, unregistered};

/// name, target, delivery, wide port, and the options: patience, connections, PROXY version, template.
type ServiceRow = (String, String, String, Option<u32>, Option<u32>, Option<u32>, Option<u8>, Option<String>);
/// conditions, to, delivery, and the options.
type RouteRow = (Vec<(String, String)>, String, String, Option<u32>, Option<u32>, Option<u8>, Option<String>);
/// What became of a lookup: found, no-route, no-service or refused; the service, the reason; and target, delivery, options.
type OutcomeRow = (&'static str, Option<String>, Option<TargetRow>);
/// Folders, ports, whether any name is abstract.
type ReachRow = (Vec<String>, Vec<u16>, bool);
type TargetRow = (String, &'static str, Option<u32>, Option<u32>, Option<u8>, Option<String>);

/// An open registry; `fourtuple.registry.Registry` is its face.
#[pyclass(frozen, module = "fourtuple._core")]
pub(crate) struct Registry {
    store: Mutex<Option<Arc<Store>>>,
}

/// `fourtuple.registry.Seen`, as far as a lookup asks.
#[derive(FromPyObject)]
struct SeenRow {
    wide_port: Option<u32>,
    name: Option<Vec<u8>>,
    path: Option<Vec<u8>>,
    protocol: Option<String>,
    alpn_list: Option<Vec<u8>>,
    user: Option<Vec<u8>>,
    database: Option<Vec<u8>>,
    client: Option<Vec<u8>>,
    source: Option<EndpointRow>,
    destination: Option<EndpointRow>,
}

/// `fourtuple.tuples.Endpoint`.
#[derive(FromPyObject)]
struct EndpointRow {
    address: std::net::IpAddr,
    port: u16,
}

#[pymethods]
impl Registry {
    /// Open the folder, made if `create`, for at most so many bytes.
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf, create: bool, most_bytes: Option<u64>) -> PyResult<Registry> {
        let store = detached(py, || Store::open(&path, create, most_bytes))?;
        Ok(Registry { store: Mutex::new(Some(store)) })
    }

    /// A registry of these rows alone, in the empty file at `path`, which nobody else opens; it never changes.
    #[staticmethod]
    fn sealed(py: Python<'_>, path: PathBuf, services: Vec<ServiceRow>, routes: Vec<RouteRow>) -> PyResult<Registry> {
        let store = detached(py, || {
            let mut batch = batch(services)?;
            let routes = routes.into_iter().map(route).collect::<Result<Vec<_>, _>>()?;
            let file = OpenOptions::new().read(true).write(true).open(&path);
            Store::sealed(file.map_err(|error| Error::Io(path, error))?, &mut batch, &routes)
        })?;
        Ok(Registry { store: Mutex::new(Some(store)) })
    }

    /// Write rows in one transaction; gives back how many were new and how many replaced.
    fn put(&self, py: Python<'_>, rows: Vec<ServiceRow>, mode: &str) -> PyResult<(u64, u64)> {
        let (store, mode) = (self.opened()?, self::mode(mode)?);
        let counts = detached(py, || self::batch(rows)?.commit(&store, mode))?;
        Ok((counts.added, counts.replaced))
    }

    /// Remove services in one transaction; gives back which there were not.
    fn remove(&self, py: Python<'_>, names: Vec<String>) -> PyResult<Vec<String>> {
        let store = self.opened()?;
        detached(py, || {
            let names = names.iter().map(|name| Name::checked("name", name)).collect::<Result<Vec<_>, _>>()?;
            store.remove(&names)
        })
    }

    /// The service of that name.
    fn service(&self, py: Python<'_>, name: &str) -> PyResult<Option<ServiceRow>> {
        let store = self.opened()?;
        let found = detached(py, || store.reader()?.by_name(&Name::checked("name", name)?))?;
        Ok(found.map(service_row))
    }

    /// The service with that wide port.
    fn service_at(&self, py: Python<'_>, wide_port: u32) -> PyResult<Option<ServiceRow>> {
        let store = self.opened()?;
        Ok(detached(py, || store.reader()?.by_wide_port(wide_port))?.map(service_row))
    }

    /// A snapshot whose services can be had page by page, those after a name or all.
    fn pages(&self, py: Python<'_>, after: Option<String>) -> PyResult<Pages> {
        let store = self.opened()?;
        let reader = detached(py, || store.reader())?;
        Ok(Pages { state: Mutex::new(Walk { reader, after, done: false }) })
    }

    /// Take text in blocks.
    fn importer(&self, format: &str, mode: &str, batch_rows: usize) -> PyResult<Importer> {
        let (store, mode) = (self.opened()?, self::mode(mode)?);
        let rows = Rows::new(self::format(format)?);
        let state = Import { rows, batch: Batch::default(), added: 0, replaced: 0 };
        Ok(Importer { store, mode, batch_rows, state: Mutex::new(state) })
    }

    /// Add routes in one transaction, or replace those of equal conditions.
    fn add_routes(&self, py: Python<'_>, rows: Vec<RouteRow>, replace: bool) -> PyResult<()> {
        let store = self.opened()?;
        detached(py, || {
            let routes = rows.into_iter().map(route).collect::<Result<Vec<_>, _>>()?;
            store.add_routes(&routes, replace)
        })
    }

    /// Remove the route with these conditions; says whether there was one.
    fn remove_route(&self, py: Python<'_>, conditions: Vec<(String, String)>) -> PyResult<bool> {
        let store = self.opened()?;
        detached(py, || store.remove_route(&self::conditions(&conditions)?))
    }

    /// All routes in the order of their precedence.
    fn routes(&self, py: Python<'_>) -> PyResult<Vec<RouteRow>> {
        let store = self.opened()?;
        detached(py, || {
            let mut rows = Vec::new();
            store.reader()?.routes(|route| {
                rows.push(route_row(route));
                Ok(true)
            })?;
            Ok(rows)
        })
    }

    /// Which service a connection means.
    fn resolve(&self, py: Python<'_>, seen: SeenRow) -> PyResult<OutcomeRow> {
        let store = self.opened()?;
        let outcome = detached(py, || {
            let end = |end: &Option<EndpointRow>| end.as_ref().map(|end| (end.address, end.port).into());
            store.reader()?.resolve(&Seen {
                wide_port: seen.wide_port,
                name: seen.name.as_deref(),
                path: seen.path.as_deref(),
                protocol: seen.protocol.as_deref(),
                alpn: seen.alpn_list.as_deref(),
                user: seen.user.as_deref(),
                database: seen.database.as_deref(),
                client: seen.client.as_deref(),
                source: end(&seen.source),
                destination: end(&seen.destination),
            })
        })?;
        Ok(match outcome {
            Outcome::Found(to) => {
                let (patience_ms, connections, proxy, start) = options_row(to.options);
                let row = (to.target.to_string(), to.delivery.name(), patience_ms, connections, proxy, start);
                ("found", to.service, Some(row))
            }
            Outcome::NoRoute => ("no-route", None, None),
            Outcome::NoService(name) => ("no-service", Some(name), None),
            Outcome::Refused(why) => ("refused", Some(why.to_owned()), None),
        })
    }

    /// Nanoseconds of each of these lookups, every one by a name in `names`; a snapshot each, or one for all.
    fn time_lookups(&self, py: Python<'_>, names: Vec<Vec<u8>>, snapshot_each: bool) -> PyResult<Vec<u64>> {
        let store = self.opened()?;
        detached(py, || {
            let mut reader = store.reader()?;
            let mut taken_ns = Vec::with_capacity(names.len());
            for name in &names {
                #[allow(clippy::disallowed_methods, reason = "a measurement for bench/")]
                let started = std::time::Instant::now();
                if snapshot_each {
                    reader = store.reader()?;
                }
                std::hint::black_box(reader.resolve(&Seen { name: Some(name), ..Seen::default() })?);
                taken_ns.push(started.elapsed().as_nanos() as u64);
            }
            Ok(taken_ns)
        })
    }

    /// How large it is.
    fn sizes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let store = self.opened()?;
        let sizes = detached(py, || store.reader()?.sizes())?;
        let row = PyDict::new(py);
        row.set_item("services", sizes.services)?;
        row.set_item("wide_ports", sizes.wide_ports)?;
        row.set_item("routes", sizes.routes)?;
        row.set_item("services_bytes", sizes.services_bytes)?;
        row.set_item("file_bytes", sizes.file_bytes)?;
        row.set_item("version", sizes.version)?;
        row.set_item("readers", sizes.readers.0)?;
        row.set_item("most_readers", sizes.readers.1)?;
        Ok(row)
    }

    /// Where the targets of all services lie: folders of unix sockets, TCP ports, whether any name is abstract.
    fn reach(&self, py: Python<'_>) -> PyResult<ReachRow> {
        let store = self.opened()?;
        let found = detached(py, || store.reader()?.reach(|| true))?;
        Ok(reach_row(found.unwrap_or_default()))
    }

    /// The addresses that targets of services name.
    fn addresses(&self, py: Python<'_>) -> PyResult<Addresses> {
        let store = self.opened()?;
        Ok(Addresses { found: detached(py, || store.reader()?.addresses())? })
    }

    /// Number of the last transaction of any process.
    #[getter]
    fn version(&self) -> PyResult<u64> {
        Ok(self.opened()?.version())
    }

    /// Free the places of readers whose processes are gone.
    fn clear_stale_readers(&self, py: Python<'_>) -> PyResult<usize> {
        let store = self.opened()?;
        detached(py, || store.clear_stale_readers())
    }

    /// Let go of the file; every later call is an error.
    fn close(&self) {
        self.store.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Registry {
    /// What it has open.
    pub(crate) fn opened(&self) -> PyResult<Arc<Store>> {
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        let store = store.clone().ok_or_else(|| BadConfig::new_err(("store", "is closed; open it again")))?;
        store.of_this_process().map_err(|error| unregistered(&error))?;
        Ok(store)
    }
}

/// Addresses of a registry as they were.
#[pyclass(frozen, module = "fourtuple._core")]
pub(crate) struct Addresses {
    found: fourtuple_registry::Addresses,
}

#[pymethods]
impl Addresses {
    /// Whether one of the registry's targets is at this address and port, an address of 4 or 16 bytes and two bytes after it.
    fn __contains__(&self, packed: &Bound<'_, PyAny>) -> bool {
        let Some((host, &port)) = packed.extract::<&[u8]>().ok().and_then(|packed| packed.split_last_chunk()) else {
            return false;
        };
        let address =
            <[u8; 4]>::try_from(host).map(IpAddr::from).or_else(|_| <[u8; 16]>::try_from(host).map(IpAddr::from));
        address.is_ok_and(|address| self.found.contain(address, u16::from_be_bytes(port)))
    }
}

/// `Registry.reach` of a folder, found by a thread of its own while the caller does something else. Nothing of it is left,
/// and fork() is safe again, once it has been joined.
#[pyclass(frozen, module = "fourtuple._core")]
pub(crate) struct Reaching {
    is_wanted: Arc<AtomicBool>,
    thread: Mutex<Option<Walking>>,
}

type Walking = JoinHandle<Result<Option<Reach>, Error>>;

#[pymethods]
impl Reaching {
    /// Begin.
    #[new]
    fn new(path: PathBuf) -> PyResult<Reaching> {
        let is_wanted = Arc::new(AtomicBool::new(true));
        let wanted = Arc::clone(&is_wanted);
        let walk = move || Store::open(&path, false, None)?.reader()?.reach(|| wanted.load(Ordering::Relaxed));
        let thread = thread::Builder::new().name("fourtuple-reach".to_owned()).spawn(walk)?;
        Ok(Reaching { is_wanted, thread: Mutex::new(Some(thread)) })
    }

    /// Wait for its end, or bring it about if it is not `wanted`; what it has found, None if it was not wanted or has
    /// been joined before.
    fn join(&self, py: Python<'_>, wanted: bool) -> PyResult<Option<ReachRow>> {
        self.is_wanted.fetch_and(wanted, Ordering::Relaxed);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return Ok(None) };
        // A panic of its own is the caller's.
        let found = detached(py, || Ok(thread.join().unwrap_or_else(|panic| resume_unwind(panic))))?;
        // What is not wanted may fail.
        if !wanted {
            return Ok(None);
        }
        Ok(found.map_err(|error| unregistered(&error))?.map(reach_row))
    }
}

fn reach_row(found: Reach) -> ReachRow {
    (found.folders.into_iter().collect(), found.ports, found.is_abstract)
}

/// The services of one snapshot, in the order of their names.
#[pyclass(frozen, module = "fourtuple._core")]
pub(crate) struct Pages {
    state: Mutex<Walk>,
}

struct Walk {
    reader: Reader,
    after: Option<String>,
    done: bool,
}

#[pymethods]
impl Pages {
    /// The next so many rows; fewer at the end.
    fn rows(&self, py: Python<'_>, most: usize) -> PyResult<Vec<ServiceRow>> {
        self.next(py, most, Vec::new(), |rows, service| rows.push(service_row(service)))
    }

    /// The next so many rows as lines of text; empty at the end.
    fn text<'py>(&self, py: Python<'py>, format: &str, most: usize) -> PyResult<Bound<'py, PyBytes>> {
        let format = self::format(format)?;
        let text = self.next(py, most, Vec::new(), move |text, service| write_row(format, &service, text))?;
        Ok(PyBytes::new(py, &text))
    }
}

impl Pages {
    fn next<T: Send>(
        &self,
        py: Python<'_>,
        most: usize,
        mut out: T,
        take: impl Fn(&mut T, Service) + Send + Sync,
    ) -> PyResult<T> {
        detached(py, || {
            let mut walk = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if walk.done || most == 0 {
                return Ok(out);
            }
            let (mut count, mut last) = (0, None);
            walk.reader.services(walk.after.as_deref(), |service| {
                count += 1;
                if count == most {
                    last = Some(service.name.clone());
                }
                take(&mut out, service);
                count < most
            })?;
            walk.done = last.is_none();
            walk.after = last.or(walk.after.take());
            Ok(out)
        })
    }
}

/// Text becomes services, a transaction per `batch_rows` of them.
#[pyclass(frozen, module = "fourtuple._core")]
pub(crate) struct Importer {
    store: Arc<Store>,
    mode: Mode,
    batch_rows: usize,
    state: Mutex<Import>,
}

struct Import {
    rows: Rows,
    batch: Batch,
    added: u64,
    replaced: u64,
}

#[pymethods]
impl Importer {
    /// The next block, of any size. After an error what waits for its transaction is forgotten.
    fn feed(&self, py: Python<'_>, block: &[u8]) -> PyResult<()> {
        detached(py, || {
            let mut import = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let Import { rows, batch, added, replaced } = &mut *import;
            let done = rows.feed(block, |service| {
                batch.push(&service);
                if batch.len() < self.batch_rows {
                    return Ok(());
                }
                let counts = batch.commit(&self.store, self.mode)?;
                *added += counts.added;
                *replaced += counts.replaced;
                Ok(())
            });
            done.inspect_err(|_| batch.clear())
        })
    }

    /// The last line, and the last transaction.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || {
            let mut import = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let Import { rows, batch, added, replaced } = &mut *import;
            let last = rows.finish(|service| {
                batch.push(&service);
                Ok(())
            });
            let counts = last.and_then(|()| batch.commit(&self.store, self.mode)).inspect_err(|_| batch.clear())?;
            *added += counts.added;
            *replaced += counts.replaced;
            Ok(())
        })
    }

    /// Lines read, services added, services replaced: the last two are on the disk.
    #[getter]
    fn counts(&self) -> (u64, u64, u64) {
        let import = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (import.rows.lines(), import.added, import.replaced)
    }
}

/// Services and routes as a registry would take them, without one: the first that it would not is the error.
#[pyfunction]
pub(crate) fn check_rows(py: Python<'_>, services: Vec<ServiceRow>, routes: Vec<RouteRow>) -> PyResult<()> {
    detached(py, || {
        services.into_iter().try_for_each(|row| service(row).map(drop))?;
        routes.into_iter().try_for_each(|row| route(row).map(drop))
    })
}

fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T, Error> + Send) -> PyResult<T> {
    py.detach(work).map_err(|error| unregistered(&error))
}

fn service(row: ServiceRow) -> Result<Service, Error> {
    let (name, target, delivery, wide_port, patience_ms, connections, proxy, start) = row;
    Service {
        name: Name::checked("name", &name)?.to_string(),
        target: Target::checked("target", &target)?,
        delivery: Delivery::checked("delivery", &delivery)?,
        wide_port,
        options: Options { patience_ms, connections, proxy, start: self::start(start)? },
    }
    .checked()
}

fn service_row(service: Service) -> ServiceRow {
    let (patience_ms, connections, proxy, start) = options_row(service.options);
    let (target, delivery) = (service.target.to_string(), service.delivery.name().to_owned());
    (service.name, target, delivery, service.wide_port, patience_ms, connections, proxy, start)
}

fn conditions(fields: &[(String, String)]) -> Result<Conditions, Error> {
    Conditions::checked(fields.iter().map(|(field, text)| (field.as_str(), text.as_str())))
}

fn route((fields, to, delivery, patience_ms, connections, proxy, start): RouteRow) -> Result<Route, Error> {
    let (conditions, delivery) = (conditions(&fields)?, Delivery::checked("delivery", &delivery)?);
    let options = Options { patience_ms, connections, proxy, start: self::start(start)? };
    Route { conditions, to, delivery, options }.checked()
}

fn route_row(route: Route) -> RouteRow {
    let (patience_ms, connections, proxy, start) = options_row(route.options);
    let fields = route.conditions.fields().into_iter().map(|(field, text)| (field.to_owned(), text)).collect();
    (fields, route.to, route.delivery.name().to_owned(), patience_ms, connections, proxy, start)
}

fn start(name: Option<String>) -> Result<Option<Start>, Error> {
    name.map(|name| Start::checked("start", &name)).transpose()
}

fn options_row(options: Options) -> (Option<u32>, Option<u32>, Option<u8>, Option<String>) {
    let Options { patience_ms, connections, proxy, start } = options;
    (patience_ms, connections, proxy, start.map(|start| start.as_str().to_owned()))
}

fn batch(rows: Vec<ServiceRow>) -> Result<Batch, Error> {
    let mut batch = Batch::default();
    for row in rows {
        let name = row.0.clone();
        batch.push(&service(row).map_err(|error| within(error, &name))?);
    }
    Ok(batch)
}

/// Of many services, which one was wrong.
fn within(error: Error, name: &str) -> Error {
    match error {
        Error::Bad { field, why } if field != "name" => Error::Bad { field: format!("service {name:?}, {field}"), why },
        other => other,
    }
}

fn mode(name: &str) -> PyResult<Mode> {
    match name {
        "add" => Ok(Mode::Add),
        "set" => Ok(Mode::Set),
        _ => Err(BadConfig::new_err(("mode", format!("{name:?} is not one of add, set")))),
    }
}

fn format(name: &str) -> PyResult<Format> {
    match name {
        "csv" => Ok(Format::Csv),
        "jsonl" => Ok(Format::JsonLines),
        _ => Err(BadConfig::new_err(("format", format!("{name:?} is not one of csv, jsonl")))),
    }
}
