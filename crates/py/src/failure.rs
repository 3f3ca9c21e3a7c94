//! How Rust's failures become Python's: the one place that detaches, waits with signals checked, and maps errors.
//!
//! Knows no worker. The exception classes are Python's own (`fourtuple.errors`), imported here.

use std::io;
use std::time::{Duration, Instant};

use fourtuple_carrier::WorkerError;
use fourtuple_engine::{CarrierError, Errno};
use fourtuple_registry::Error as RegistryError;
use pyo3::import_exception;
use pyo3::prelude::*;

import_exception!(fourtuple.errors, BadConfig);
import_exception!(fourtuple.errors, EngineStopped);
import_exception!(fourtuple.errors, LimitReached);
import_exception!(fourtuple.errors, MissingFeature);
import_exception!(fourtuple.errors, MissingPrivilege);

/// How often to look: soon at first, and rarer the longer it takes, since a look costs some 50 us.
const GLANCES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));

/// Run `work` with Python released, and give its carrier error Python's shape.
pub(crate) fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T, CarrierError> + Send) -> PyResult<T> {
    py.detach(work).map_err(|error| refused(&error))
}

/// Wait until `ready` or until `timeout` has passed, with Python released and its signals checked; says which it was.
pub(crate) fn wait(py: Python<'_>, timeout: Option<Duration>, ready: impl Fn() -> bool + Sync) -> PyResult<bool> {
    #[allow(clippy::disallowed_methods, reason = "the binding waits in real time for Python")]
    let started = Instant::now();
    loop {
        if ready() {
            return Ok(true);
        }
        let (waited, mut left) = (started.elapsed(), GLANCES.0.max(started.elapsed() / 8).min(GLANCES.1));
        if let Some(timeout) = timeout {
            left = left.min(timeout.saturating_sub(waited));
        }
        if left.is_zero() {
            return Ok(false);
        }
        py.detach(|| std::thread::sleep(left));
        py.check_signals()?;
    }
}

/// Why a carrier could not start, as the exception that names the way out; limits by their names in the catalogue.
pub(crate) fn refused(error: &CarrierError) -> PyErr {
    let text = said(error);
    match error.error {
        Errno::EMFILE => limit("descriptors-soft", &text),
        Errno::ENFILE => limit("files-on-host", &text),
        Errno::ENOMEM => limit("kernel-memory", &text),
        // io_uring_setup(2): EPERM where seccomp or kernel.io_uring_disabled forbids it.
        Errno(libc_errno::EPERM | libc_errno::EACCES) => MissingPrivilege::new_err(text),
        Errno(libc_errno::ENOSYS | libc_errno::EOPNOTSUPP | libc_errno::EINVAL) => MissingFeature::new_err(text),
        _ => EngineStopped::new_err(text),
    }
}

/// Why the registry of services did not do it.
pub(crate) fn unregistered(error: &RegistryError) -> PyErr {
    let text = error.to_string();
    let kept = "nothing of this batch was kept, all before it was";
    match error {
        RegistryError::Bad { field, why } => BadConfig::new_err((field.clone(), why.clone())),
        RegistryError::Absent(_) => BadConfig::new_err(("store", format!("{text}; services add and import make one"))),
        RegistryError::Full { most_bytes } => {
            let remedy = "nothing of this batch was kept; open it with a larger most_bytes";
            LimitReached::new_err(("registry-size", Some(*most_bytes), None::<u64>, remedy))
        }
        RegistryError::Readers(most) => {
            LimitReached::new_err(("registry-readers", Some(*most), None::<u64>, "end a process that reads it"))
        }
        RegistryError::Io(path, io) => match io.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                let remedy = format!("{}: {io}; {kept}", path.display());
                LimitReached::new_err(("disk-space", None::<u64>, None::<u64>, remedy))
            }
            // LMDB's word for a write that came back short (mdb_page_flush), which is what a disk does when it fills up.
            _ if io.raw_os_error() == Some(libc_errno::EIO) => {
                let remedy = format!("{}: a write came back short, so it is full or fails; {kept}", path.display());
                LimitReached::new_err(("disk-space", None::<u64>, None::<u64>, remedy))
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                MissingPrivilege::new_err(format!("{text}; --store or FOURTUPLE_STORE names another folder"))
            }
            _ => BadConfig::new_err(("store", text)),
        },
        RegistryError::Damaged(..) => EngineStopped::new_err(text),
    }
}

/// Why a worker ended before its work did, in words.
pub(crate) fn ended(error: &WorkerError) -> String {
    match error {
        WorkerError::Carrier(error) => said(error),
        WorkerError::Panicked(message) => format!("a worker panicked: {message}"),
    }
}

fn said(error: &CarrierError) -> String {
    format!("{}: {}", error.what, io::Error::from_raw_os_error(error.error.0))
}

fn limit(name: &'static str, remedy: &str) -> PyErr {
    LimitReached::new_err((name, None::<u64>, None::<u64>, remedy.to_owned()))
}

/// Error numbers that only the start of a carrier or the registry gives (asm-generic/errno.h); cores need no name for them.
mod libc_errno {
    pub(super) const EPERM: i32 = 1;
    pub(super) const EIO: i32 = 5;
    pub(super) const EACCES: i32 = 13;
    pub(super) const EINVAL: i32 = 22;
    pub(super) const ENOSYS: i32 = 38;
    pub(super) const EOPNOTSUPP: i32 = 95;
}
