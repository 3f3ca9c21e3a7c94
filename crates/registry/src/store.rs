//! The file: opening, snapshots, and single changes. Crash-safe by LMDB's copy on write; each commit is on the disk when
//! it returns.
//!
//! Decides what may be opened, and how errors of LMDB and the disk are told. In one process a path is opened once and
//! shared: LMDB's locks are the process's (fcntl(2)), and closing a second descriptor would drop them.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Bound;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use heed::types::Bytes;
use heed::{Database, Env, EnvFlags, EnvOpenOptions, MdbError, RoTxn, RwTxn, WithoutTls};

use crate::batch::{Batch, Mode};
use crate::failure::{Error, Result};
use crate::name::Name;
use crate::reach::{Addresses, Reach, Walk};
use crate::record::{Service, wide_port};
use crate::route::{Conditions, MOST_PER_ANCHOR, RANK_BYTES, Route};

/// Version of the format of keys and values.
pub const FORMAT: u32 = 1;
/// Address space for the map: sparse, so that it costs nothing until it is used.
const USUAL_MAP_BYTES: u64 = 64 << 30;
/// Where so much address space is refused (RLIMIT_AS).
const MODEST_MAP_BYTES: u64 = 1 << 30;
const LEAST_MAP_BYTES: u64 = 1 << 20;
const MOST_READERS: u32 = 1_000;
/// A slot of the lock file takes a cache line; its head three.
const LOCK_FILE_BYTES: usize = (MOST_READERS as usize + 8) * 64;
/// Of a walk, between two looks whether it is still wanted: some 0.1 ms.
const ROWS_PER_LOOK: u64 = 4_096;
const CLOSING: Duration = Duration::from_secs(10);

type Table = Database<Bytes, Bytes>;

static OPEN: Mutex<Option<HashMap<PathBuf, Weak<Store>>>> = Mutex::new(None);

/// An open registry.
pub struct Store {
    env: Env<WithoutTls>,
    pub(crate) services: Table,
    pub(crate) wide_ports: Table,
    routes: Table,
    path: PathBuf,
    most_bytes: u64,
    process: u32,
    /// Of a sealed store: what it is in. Dropped after `env`, whose path names it by its number.
    sealed: Option<File>,
}

/// How large a store is, in one snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Services.
    pub services: u64,
    /// Of them with a wide port.
    pub wide_ports: u64,
    /// Routes.
    pub routes: u64,
    /// Pages of the services, in bytes.
    pub services_bytes: u64,
    /// Bytes of the file that were ever used.
    pub file_bytes: u64,
    /// Number of the last transaction: grows with every change.
    pub version: u64,
    /// Readers in all processes, and the most there may be.
    pub readers: (u32, u32),
}

impl Store {
    /// Open the folder at `path`, of at most `most_bytes` (None: as much as there will be). With `create` one is made where
    /// there is none.
    pub fn open(path: &Path, create: bool, most_bytes: Option<u64>) -> Result<Arc<Store>> {
        if !create && !path.join("data.mdb").exists() {
            return Err(Error::Absent(path.to_owned()));
        }
        if most_bytes.is_some_and(|most| most < LEAST_MAP_BYTES) {
            return Err(Error::bad("most_bytes", format!("less than {LEAST_MAP_BYTES} hold no registry")));
        }
        let io = |error: io::Error| Error::Io(path.to_owned(), error);
        if create {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io)?;
        }
        let path = &fs::canonicalize(path).map_err(io)?;
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let open = open.get_or_insert_default();
        if let Some(store) = open.get(path).and_then(Weak::upgrade) {
            store.of_this_process()?;
            return Ok(store);
        }
        if let Some(closing) = heed::env_closing_event(path) {
            closing.wait_timeout(CLOSING);
        }
        lock_file(path).map_err(io)?;
        let store = match most_bytes {
            Some(most_bytes) => Store::map(path, most_bytes, EnvFlags::empty())?,
            None => Store::map_usual(path, EnvFlags::empty())?,
        };
        let store = Arc::new(store);
        open.retain(|_, store| store.strong_count() > 0);
        open.insert(path.clone(), Arc::downgrade(&store));
        Ok(store)
    }

    /// A store of these services and routes in an empty `file`, which nobody else has or will open, such as one of
    /// memfd_create(2): without a folder there is nothing to leave behind. It is filled before anybody reads it and never
    /// changes after that, so it needs no lock file.
    pub fn sealed(file: File, services: &mut Batch, routes: &[Route]) -> Result<Arc<Store>> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let mut store = Store::map_usual(&path, EnvFlags::NO_SUB_DIR | EnvFlags::NO_LOCK)?;
        services.commit(&store, Mode::Add)?;
        store.add_routes(routes, false)?;
        store.sealed = Some(file);
        Ok(Arc::new(store))
    }

    fn map_usual(path: &Path, flags: EnvFlags) -> Result<Store> {
        match Store::map(path, USUAL_MAP_BYTES, flags) {
            Err(Error::Io(_, error)) if error.kind() == io::ErrorKind::OutOfMemory => {
                Store::map(path, MODEST_MAP_BYTES, flags)
            }
            other => other,
        }
    }

    fn map(path: &Path, most_bytes: u64, flags: EnvFlags) -> Result<Store> {
        let failed = |error: heed::Error| failed(path, most_bytes, error);
        // The map is in whole pages, of 64 KiB at most.
        let map_bytes = usize::try_from(most_bytes & !0xFFFF).unwrap_or(usize::MAX & !0xFFFF);
        let mut options = EnvOpenOptions::new().read_txn_without_tls();
        options.map_size(map_bytes).max_dbs(4).max_readers(MOST_READERS);
        // SAFETY: the file must not be changed but through LMDB while it is mapped. Its folder is made for its owner
        // alone, this crate is the only opener, and each process opens it once (`OPEN`). Without locks, nothing may be
        // written while somebody reads: `sealed` alone asks for that, and `change` refuses from then on.
        let env = unsafe { options.flags(flags).open(path) }.map_err(failed)?;
        env.clear_stale_readers().map_err(failed)?;
        let there = {
            let txn = env.read_txn().map_err(failed)?;
            let meta: Option<Table> = env.open_database(&txn, Some("meta")).map_err(failed)?;
            let format = meta.map(|meta| meta.get(&txn, b"format").map(|value| value.map(<[u8]>::to_vec)));
            let format = format.transpose().map_err(failed)?.flatten();
            let tables = ["services", "wide-ports", "routes"].map(|name| env.open_database(&txn, Some(name)));
            // Handles opened in a read transaction outlive it only if it is committed.
            txn.commit().map_err(failed)?;
            known(path, format.as_deref())?;
            tables
        };
        let [services, wide_ports, routes] = match there {
            [Ok(Some(services)), Ok(Some(wide_ports)), Ok(Some(routes))] => [services, wide_ports, routes],
            _ => {
                let mut txn = env.write_txn().map_err(failed)?;
                let mut table = |name| env.create_database(&mut txn, Some(name)).map_err(failed);
                let meta: Table = table("meta")?;
                let tables = [table("services")?, table("wide-ports")?, table("routes")?];
                known(path, meta.get(&txn, b"format").map_err(failed)?)?;
                meta.put(&mut txn, b"format", &FORMAT.to_be_bytes()).map_err(failed)?;
                txn.commit().map_err(failed)?;
                tables
            }
        };
        let (path, process) = (path.to_owned(), process::id());
        Ok(Store { env, services, wide_ports, routes, path, most_bytes, process, sealed: None })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A snapshot: what was committed when it was taken, and nothing later. Keep it for one batch of lookups, not for
    /// long: pages that it can see are not used again while it lives. Not after fork(): see `of_this_process`.
    pub fn reader(self: &Arc<Store>) -> Result<Reader> {
        let txn = self.env.clone().static_read_txn().map_err(|error| self.failed(error))?;
        let routes = self.routes.stat(&txn).map_err(|error| self.failed(error))?.entries as u64;
        Ok(Reader { store: Arc::clone(self), txn, routes })
    }

    /// Remove services; gives back which of the names there were not.
    pub fn remove(&self, names: &[Name]) -> Result<Vec<String>> {
        self.change(|txn| {
            let mut absent = Vec::new();
            for name in names {
                let old = self.services.get(txn, name.as_bytes())?.map(wide_port);
                match old {
                    None => absent.push(name.to_string()),
                    Some(port) => {
                        if let Some(port) = port {
                            self.wide_ports.delete(txn, &port.to_be_bytes())?;
                        }
                        self.services.delete(txn, name.as_bytes())?;
                    }
                }
            }
            Ok(Ok(absent))
        })
    }

    /// Add routes, all or none. With `replace`, one of equal conditions gives way; else it is an error.
    pub fn add_routes(&self, routes: &[Route], replace: bool) -> Result<()> {
        self.change(|txn| {
            for route in routes {
                if let Some(name) = route.service()
                    && self.services.get(txn, name.to_ascii_lowercase().trim_end_matches('.').as_bytes())?.is_none()
                {
                    return Ok(Err(Error::bad("to", format!("there is no service {name}; add it first"))));
                }
                let place = match self.place(txn, &route.conditions)? {
                    Place::Free(key) => key,
                    Place::Taken(key) if replace => key,
                    Place::Taken(_) => {
                        return Ok(Err(Error::bad("route", "one with these conditions is there already")));
                    }
                    Place::Full => {
                        let why = format!("{MOST_PER_ANCHOR} routes share its first condition, which is the most");
                        return Ok(Err(Error::bad("route", why)));
                    }
                };
                self.routes.put(txn, &place, &route.encode())?;
            }
            Ok(Ok(()))
        })
    }

    /// Remove the route with these conditions; says whether there was one.
    pub fn remove_route(&self, conditions: &Conditions) -> Result<bool> {
        self.change(|txn| {
            let Place::Taken(key) = self.place(txn, conditions)? else { return Ok(Ok(false)) };
            self.routes.delete(txn, &key).map(Ok)
        })
    }

    /// Free the places of readers whose processes are gone; how many there were.
    pub fn clear_stale_readers(&self) -> Result<usize> {
        self.of_this_process()?;
        self.env.clear_stale_readers().map_err(|error| self.failed(error))
    }

    /// Number of the last transaction of any process: what a reader compares to know whether anything changed.
    pub fn version(&self) -> u64 {
        self.env.info().last_txn_id as u64
    }

    /// One transaction, kept whole or not at all.
    pub(crate) fn change<T>(
        &self,
        work: impl FnOnce(&mut RwTxn<'_>) -> std::result::Result<Result<T>, heed::Error>,
    ) -> Result<T> {
        self.of_this_process()?;
        if self.sealed.is_some() {
            return Err(Error::bad("store", "is sealed: what it holds was given when it was made"));
        }
        let failed = |error| self.failed(error);
        let mut txn = self.env.write_txn().map_err(failed)?;
        let done = work(&mut txn).map_err(failed)??;
        txn.commit().map_err(failed)?;
        Ok(done)
    }

    /// Where a route with these conditions is, or would be.
    fn place(&self, txn: &RwTxn<'_>, conditions: &Conditions) -> heed::Result<Place> {
        let anchor = conditions.anchor();
        let anchored = self.routes.prefix_iter(txn, &anchor)?.take(MOST_PER_ANCHOR).count();
        let mut key = anchor;
        key.extend(conditions.rank());
        let mut next = 0_u16;
        for row in self.routes.prefix_iter(txn, &key)? {
            let (found, value) = row?;
            if Route::decode(value).is_some_and(|route| route.conditions == *conditions) {
                return Ok(Place::Taken(found.to_vec()));
            }
            let last = found.last_chunk().copied().map_or(0, u16::from_be_bytes);
            next = last.saturating_add(1);
        }
        if anchored == MOST_PER_ANCHOR || next == u16::MAX {
            return Ok(Place::Full);
        }
        key.extend(next.to_be_bytes());
        Ok(Place::Free(key))
    }

    fn failed(&self, error: heed::Error) -> Error {
        failed(&self.path, self.most_bytes, error)
    }

    /// LMDB's locks and slots do not survive fork(). A thread does not either, so readers are not asked each time.
    pub fn of_this_process(&self) -> Result<()> {
        if self.process == process::id() {
            return Ok(());
        }
        Err(Error::bad("store", "was opened before fork(); open it in the process that uses it, and start that afresh"))
    }
}

enum Place {
    Free(Vec<u8>),
    Taken(Vec<u8>),
    Full,
}

/// A snapshot of a store.
pub struct Reader {
    // Before `store`, so that the transaction ends first.
    txn: RoTxn<'static, WithoutTls>,
    routes: u64,
    store: Arc<Store>,
}

impl Reader {
    /// The service of that name.
    pub fn by_name(&self, name: &Name) -> Result<Option<Service>> {
        let value = self.store.services.get(&self.txn, name.as_bytes()).map_err(|error| self.store.failed(error))?;
        value.map(|value| self.decoded(name.as_bytes(), value)).transpose()
    }

    /// The service with that wide port.
    pub fn by_wide_port(&self, port: u32) -> Result<Option<Service>> {
        let name =
            self.store.wide_ports.get(&self.txn, &port.to_be_bytes()).map_err(|error| self.store.failed(error))?;
        let Some(name) = name else { return Ok(None) };
        let name = Name::parse(name).map_err(|why| self.damaged(format!("the name of wide port {port} {why}")))?;
        self.by_name(&name)
    }

    /// Services in the order of names, after `after`, until `each` says false.
    pub fn services(&self, after: Option<&str>, mut each: impl FnMut(Service) -> bool) -> Result<()> {
        // LMDB knows no empty key.
        let start =
            after.filter(|after| !after.is_empty()).map_or(Bound::Unbounded, |after| Bound::Excluded(after.as_bytes()));
        let range: (Bound<&[u8]>, Bound<&[u8]>) = (start, Bound::Unbounded);
        let rows = self.store.services.range(&self.txn, &range).map_err(|error| self.store.failed(error))?;
        for row in rows {
            let (key, value) = row.map_err(|error| self.store.failed(error))?;
            if !each(self.decoded(key, value)?) {
                break;
            }
        }
        Ok(())
    }

    /// Where the targets of all services lie; None if it is no longer wanted, which `is_wanted` is asked now and then.
    pub fn reach(&self, is_wanted: impl Fn() -> bool) -> Result<Option<Reach>> {
        let mut walk = Walk::new();
        for row in self.store.services.iter(&self.txn).map_err(|error| self.store.failed(error))? {
            let (key, value) = row.map_err(|error| self.store.failed(error))?;
            walk.look(key, value).ok_or_else(|| self.unreadable(key))?;
            if walk.seen().is_multiple_of(ROWS_PER_LOOK) && !is_wanted() {
                return Ok(None);
            }
        }
        Ok(Some(walk.end()))
    }

    /// The addresses that targets of services name.
    pub fn addresses(&self) -> Result<Addresses> {
        let mut found = Addresses::default();
        for row in self.store.services.iter(&self.txn).map_err(|error| self.store.failed(error))? {
            let (key, value) = row.map_err(|error| self.store.failed(error))?;
            found.look(value).ok_or_else(|| self.unreadable(key))?;
        }
        Ok(found.end())
    }

    fn unreadable(&self, key: &[u8]) -> Error {
        self.damaged(format!("service {} cannot be read", String::from_utf8_lossy(key)))
    }

    /// Routes in the order of their precedence, until `each` says false.
    pub fn routes(&self, each: impl FnMut(Route) -> Result<bool>) -> Result<()> {
        let rows = self.store.routes.iter(&self.txn).map_err(|error| self.store.failed(error))?;
        self.each_route(rows, each)
    }

    /// How large the store is.
    pub fn sizes(&self) -> Result<Sizes> {
        let stat = |table: &Table| table.stat(&self.txn).map_err(|error| self.store.failed(error));
        let (services, wide_ports) = (stat(&self.store.services)?, stat(&self.store.wide_ports)?);
        let info = self.store.env.info();
        let pages = services.branch_pages + services.leaf_pages + services.overflow_pages;
        let page_bytes = u64::from(services.page_size);
        Ok(Sizes {
            services: services.entries as u64,
            wide_ports: wide_ports.entries as u64,
            routes: self.routes,
            services_bytes: pages as u64 * page_bytes,
            file_bytes: (info.last_page_number as u64 + 1) * page_bytes,
            version: self.txn.id() as u64,
            readers: (info.number_of_readers, info.maximum_number_of_readers),
        })
    }

    /// Whether anything was committed since.
    pub fn is_stale(&self) -> bool {
        self.store.version() != self.txn.id() as u64
    }

    pub(crate) fn has_routes(&self) -> bool {
        self.routes > 0
    }

    pub(crate) fn routes_under(&self, anchor: &[u8], each: impl FnMut(Route) -> Result<bool>) -> Result<()> {
        let rows = self.store.routes.prefix_iter(&self.txn, anchor).map_err(|error| self.store.failed(error))?;
        self.each_route(rows, each)
    }

    fn each_route<'a>(
        &self,
        rows: impl Iterator<Item = heed::Result<(&'a [u8], &'a [u8])>>,
        mut each: impl FnMut(Route) -> Result<bool>,
    ) -> Result<()> {
        for row in rows {
            let (_, value) = row.map_err(|error| self.store.failed(error))?;
            let route = Route::decode(value).ok_or_else(|| self.damaged("a route that cannot be read".to_owned()))?;
            if !each(route)? {
                break;
            }
        }
        Ok(())
    }

    fn decoded(&self, key: &[u8], value: &[u8]) -> Result<Service> {
        let name = || String::from_utf8_lossy(key).into_owned();
        Service::decode(key, value).ok_or_else(|| self.damaged(format!("service {} cannot be read", name())))
    }

    fn damaged(&self, why: String) -> Error {
        Error::Damaged(self.store.path.clone(), why)
    }
}

fn known(path: &Path, format: Option<&[u8]>) -> Result<()> {
    let Some(format) = format else { return Ok(()) };
    match format.try_into().map(u32::from_be_bytes) {
        Ok(FORMAT) => Ok(()),
        Ok(newer) if newer > FORMAT => Err(Error::bad(
            "store",
            format!("{} was written by a newer fourtuple: format {newer}, and {FORMAT} is known here", path.display()),
        )),
        _ => Err(Error::Damaged(path.to_owned(), "its format is no number that there was".to_owned())),
    }
}

/// Make the lock file with all its bytes on the disk. LMDB would make it sparse and map it, and where the disk is full then,
/// the first write to the map is SIGBUS.
fn lock_file(path: &Path) -> io::Result<()> {
    let lock = path.join("lock.mdb");
    if lock.exists() {
        return Ok(());
    }
    let draft = path.join(format!("lock.mdb.{}", process::id()));
    let made = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft);
    // A link, and no rename: another process may have made it meanwhile, and use it already.
    let linked =
        made.and_then(|mut file| file.write_all(&[0; LOCK_FILE_BYTES])).and_then(|()| fs::hard_link(&draft, &lock));
    let removed = fs::remove_file(&draft);
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => removed,
    }
}

fn failed(path: &Path, most_bytes: u64, error: heed::Error) -> Error {
    match error {
        heed::Error::Io(error) => Error::Io(path.to_owned(), error),
        heed::Error::Mdb(MdbError::MapFull | MdbError::MapResized) => Error::Full { most_bytes },
        heed::Error::Mdb(MdbError::ReadersFull) => Error::Readers(MOST_READERS),
        heed::Error::Mdb(MdbError::Invalid | MdbError::VersionMismatch) => {
            Error::bad("store", format!("{} is no registry of fourtuple", path.display()))
        }
        other => Error::Damaged(path.to_owned(), other.to_string()),
    }
}

/// Rank and number close each key; LMDB's longest is 511 bytes.
const _: () = assert!(2 + 255 + RANK_BYTES + 2 <= 511);
