//! A store in a folder of its own, and short ways to write services and routes.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use fourtuple_registry::{Batch, Conditions, Counts, Delivery, Mode, Options, Result, Route, Service, Store, Target};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A folder that is removed in the end.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    /// A new one.
    pub(crate) fn new() -> Folder {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("fourtuple-registry-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    /// The store in it.
    pub(crate) fn store(&self) -> Arc<Store> {
        open(&self.0)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Open or make.
pub(crate) fn open(path: &Path) -> Arc<Store> {
    Store::open(path, true, None).unwrap()
}

/// A relayed service.
pub(crate) fn service(name: &str, target: &str) -> Service {
    Service {
        name: name.to_owned(),
        target: Target::checked("target", target).unwrap(),
        delivery: Delivery::Relay,
        wide_port: None,
        options: Options::default(),
    }
}

/// Write services.
pub(crate) fn put(store: &Store, mode: Mode, services: &[Service]) -> Result<Counts> {
    let mut batch = Batch::default();
    services.iter().for_each(|service| batch.push(service));
    batch.commit(store, mode)
}

/// A route.
pub(crate) fn route(conditions: &[(&str, &str)], to: &str) -> Route {
    let conditions = Conditions::checked(conditions.iter().copied()).unwrap();
    Route { conditions, to: to.to_owned(), delivery: Delivery::Relay, options: Options::default() }.checked().unwrap()
}
