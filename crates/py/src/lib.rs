//! fourtuple._core: the binding. Converts, detaches, maps errors; decides nothing.
//!
//! Configuration comes in once, as one frozen dataclass (`config`); workers run without Python (`workers`); what they ask
//! and are told goes through `questions`; numbers go out as one merged snapshot (`snapshot`); bytes are sniffed for people
//! only (`sniff`). `python/fourtuple/engine` imports these, `python/fourtuple/registry.py` the registry of services
//! (`registry`), and `python/fourtuple/launcher/spawn.py` how a process is started (`spawn`); no other module imports this
//! one.

mod config;
mod failure;
mod questions;
mod registry;
mod snapshot;
mod sniff;
mod spawn;
mod workers;

use pyo3::prelude::*;

/// The compiled half of fourtuple; use `fourtuple.engine`.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::registry::{Addresses, Importer, Pages, Reaching, Registry, check_rows};
    #[pymodule_export]
    use super::{
        counters, reasons,
        sniff::{probes, refusals, sniff},
        spawn::spawn,
        uring_abilities, version,
        workers::Workers,
    };
}

/// One row per counter, in the order of `Snapshot.counters`: name, unit, meaning.
#[pyfunction]
fn counters() -> Vec<(&'static str, &'static str, &'static str)> {
    fourtuple_engine::report::COUNTERS.iter().map(|(name, unit, meaning)| (*name, *unit, meaning.trim())).collect()
}

/// Every name that a snapshot's reasons may have.
#[pyfunction]
fn reasons() -> Vec<&'static str> {
    [fourtuple_engine::speech::REASONS, fourtuple_tls::REASONS].concat()
}

/// Of the whole program: the Python around this is of the same.
#[pyfunction]
const fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// What io_uring can do here, each ability tried and not guessed; raises where there is no io_uring.
#[pyfunction]
fn uring_abilities(py: Python<'_>) -> PyResult<snapshot::Abilities> {
    failure::detached(py, fourtuple_carrier::probe_uring).map(snapshot::Abilities::from)
}
