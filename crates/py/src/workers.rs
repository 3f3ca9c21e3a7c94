//! The threads of one engine: start, order, look, stop, join. Knows neither cores nor carriers, only their workers.
//!
//! A worker's end is noticed whenever somebody looks: its thread is joined, and its last numbers are kept.

use std::net::IpAddr;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fourtuple_carrier::{Doors, Letterbox, Published, Worker};
use fourtuple_engine::{Filter, Order};
use pyo3::prelude::*;

use crate::config::{self, Request, SettingsRequest};
use crate::failure::{self, BadConfig, EngineStopped};
use crate::questions::{self, KnownRow, QuestionRow};
use crate::snapshot::{Row, Snapshot};

/// One worker per core of an engine, until all have ended.
#[pyclass(frozen, module = "fourtuple._core")]
pub(crate) struct Workers {
    states: Mutex<Vec<State>>,
    letterbox: Arc<Letterbox>,
}

enum State {
    Running(Worker),
    Ended { last: Box<Published>, error: Option<String> },
}

#[pymethods]
impl Workers {
    /// Share `config` out to `workers` threads on the carrier of that name, and start them.
    #[staticmethod]
    fn start(
        py: Python<'_>,
        config: Request,
        carrier: &str,
        workers: u32,
        settings: SettingsRequest,
    ) -> PyResult<Workers> {
        let (kind, settings) = (config::carrier(carrier)?, settings.settings(&config, workers));
        let cores = config.cores(workers)?;
        failure::detached(py, move || {
            let letterbox = Arc::new(Letterbox::new()?);
            let mut states = Vec::with_capacity(workers as usize);
            for (worker, (core, shelf)) in (0..).zip(cores) {
                let doors = Doors { shelf, letterbox: Some((worker, Arc::clone(&letterbox))) };
                // Should one of them fail, those before it end here: dropping a worker stops it.
                states.push(State::Running(Worker::start_with(kind, settings, core, doors)?));
            }
            Ok(Workers { states: Mutex::new(states), letterbox })
        })
    }

    /// Counters, failures and histograms of all workers together.
    fn snapshot(&self, py: Python<'_>) -> Snapshot {
        py.detach(|| {
            let states = self.look();
            let rows = states.iter().map(|state| match state {
                State::Running(worker) => Row { published: worker.published(), running: true, error: None },
                State::Ended { last, error } => {
                    Row { published: last.as_ref().clone(), running: false, error: error.clone() }
                }
            });
            Snapshot::merged(rows.collect())
        })
    }

    /// Ask every running worker for something; `value` is the whole engine's and is shared out.
    #[pyo3(signature = (kind, value = 0))]
    fn order(&self, kind: &str, value: u64) -> PyResult<()> {
        let states = self.states();
        let workers = states.len() as u32;
        for (worker, state) in (0..).zip(states.iter()) {
            let order = config::order(kind, value, worker, workers)?;
            if let State::Running(running) = state {
                running.order(order);
            }
        }
        Ok(())
    }

    /// Give copies of sockets to running workers, dealt out from the first on: "ferry" moves their connections to whoever is at
    /// the other end, "land" takes what comes.
    fn give(&self, kind: &str, fds: Vec<RawFd>) -> PyResult<()> {
        let order = match kind {
            "ferry" => Order::Ferry,
            "land" => Order::Land,
            _ => return Err(BadConfig::new_err(("kind", format!("{kind:?} is not one of ferry, land")))),
        };
        let states = self.states();
        // All of them or none.
        let copies = fds.into_iter().map(|fd| config::duplicate("fds", fd)).collect::<PyResult<Vec<_>>>()?;
        for (descriptor, state) in copies.into_iter().zip(states.iter().cycle()) {
            if let State::Running(worker) = state {
                worker.order(order(worker.shelf().put(descriptor)));
            }
        }
        Ok(())
    }

    /// Readable while there are questions; it is closed with this object.
    #[getter]
    fn questions_fd(&self) -> i32 {
        self.letterbox.fd()
    }

    /// The oldest questions, at most so many.
    fn questions(&self, py: Python<'_>, most: usize) -> Vec<QuestionRow> {
        py.detach(|| self.letterbox.take(most)).into_iter().map(questions::row).collect()
    }

    /// Tell every running worker what became of a service.
    #[pyo3(signature = (kind, service, peer = None))]
    fn answer(&self, kind: &str, service: String, peer: Option<IpAddr>) -> PyResult<()> {
        self.tell_all(&questions::answer(kind, service, peer)?);
        Ok(())
    }

    /// Tell one worker what a connection is that it asked about: known, or of which more than so many bytes are needed.
    #[pyo3(signature = (worker, ticket, more_than = None, known = None))]
    fn opine(&self, worker: usize, ticket: u64, more_than: Option<u32>, known: Option<KnownRow>) {
        if let Some(State::Running(running)) = self.states().get(worker) {
            running.order(questions::opinion(ticket, more_than, known));
        }
    }

    /// Have new connections of the service wait, in every running worker.
    fn hold(&self, service: String) {
        self.tell_all(&Order::Hold(service));
    }

    /// Ask every running worker how much these services are used.
    fn ask_usage(&self, ticket: u64, services: Vec<String>) {
        self.tell_all(&Order::Usage { ticket, services: services.into() });
    }

    /// Ask one worker for connections, those from place `from` on; false if it works no more.
    #[pyo3(signature = (worker, ticket, start, most, service = None, source = None))]
    fn ask_survey(
        &self,
        worker: usize,
        ticket: u64,
        start: u32,
        most: u32,
        service: Option<String>,
        source: Option<(IpAddr, u8)>,
    ) -> bool {
        self.tell(worker, Order::Survey { ticket, filter: Filter { service, source }, from: start, most })
    }

    /// Ask one worker for its busiest services, those from place `start` on; false if it works no more.
    fn ask_busiest(&self, worker: usize, ticket: u64, by: &str, start: u32, most: u32) -> PyResult<bool> {
        Ok(self.tell(worker, Order::Busiest { ticket, by: questions::by(by)?, from: start, most }))
    }

    /// Have one worker close a connection, looking for it from place `start` on; false if it works no more.
    fn ask_close(&self, worker: usize, ticket: u64, id: u64, start: u32) -> bool {
        self.tell(worker, Order::End { ticket, name: id, from: start })
    }

    /// Bounds from now on; each is the whole engine's and is shared out, and 0 is no bound.
    fn set_limits(&self, connections: u64, per_source: u32, per_service: u32) {
        let states = self.states();
        let workers = states.len() as u32;
        for (worker, state) in (0..).zip(states.iter()) {
            if let State::Running(running) = state {
                running.order(config::limits(connections, per_source, per_service, worker, workers));
            }
        }
    }

    /// Whether any worker still works.
    #[getter]
    fn running(&self, py: Python<'_>) -> bool {
        py.detach(|| self.any_running())
    }

    /// How many workers there are, ended ones included.
    #[getter]
    fn count(&self) -> usize {
        self.states().len()
    }

    /// Tell every worker to end now; connections still open are closed by their carriers.
    fn stop(&self) {
        for state in self.states().iter() {
            if let State::Running(worker) = state {
                worker.stop();
            }
        }
    }

    /// Wait until all workers have ended, at most `timeout_s` seconds; says whether they have.
    #[pyo3(signature = (timeout_s = None))]
    fn join(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        let timeout = timeout_s.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX));
        let ended = failure::wait(py, timeout, || !self.any_running())?;
        let states = self.states();
        match states.iter().find_map(|state| match state {
            State::Ended { error: Some(error), .. } => Some(error),
            _ => None,
        }) {
            Some(error) => Err(EngineStopped::new_err(error.clone())),
            None => Ok(ended),
        }
    }
}

impl Workers {
    /// False if that worker works no more.
    fn tell(&self, worker: usize, order: Order) -> bool {
        match self.states().get(worker) {
            Some(State::Running(running)) if running.is_running() => {
                running.order(order);
                true
            }
            _ => false,
        }
    }

    fn tell_all(&self, order: &Order) {
        for state in self.states().iter() {
            if let State::Running(worker) = state {
                worker.order(order.clone());
            }
        }
    }

    fn any_running(&self) -> bool {
        self.look().iter().any(|state| matches!(state, State::Running(_)))
    }

    /// The states, after joining the workers that have ended since the last look.
    fn look(&self) -> MutexGuard<'_, Vec<State>> {
        let mut states = self.states();
        let before = std::mem::take(&mut *states);
        *states = before.into_iter().map(State::looked_at).collect();
        states
    }

    fn states(&self) -> MutexGuard<'_, Vec<State>> {
        // Nothing that can panic runs under this lock, so it cannot be poisoned; if it were, the states are still whole.
        self.states.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl State {
    fn looked_at(self) -> State {
        match self {
            State::Running(worker) if !worker.is_running() => {
                let before = worker.published();
                match worker.join() {
                    Ok(last) => State::Ended { last: Box::new(last), error: None },
                    Err(error) => State::Ended { last: Box::new(before), error: Some(failure::ended(&error)) },
                }
            }
            same => same,
        }
    }
}

#[cfg(test)]
mod tests {
    use fourtuple_carrier::{CarrierKind, CarrierSettings};
    use fourtuple_engine::report::Report;
    use fourtuple_engine::{Core, Event, Instant, Outbox};

    use super::*;

    /// A core with a bug.
    struct Buggy(Report);

    impl Core for Buggy {
        fn start(&mut self, _now: Instant, _outbox: &mut Outbox) {
            panic!("a bug of ours");
        }
        fn handle(&mut self, _event: Event, _now: Instant, _outbox: &mut Outbox) {}
        fn handle_timeout(&mut self, _now: Instant, _outbox: &mut Outbox) {}
        fn poll_timeout(&self) -> Option<Instant> {
            None
        }
        fn is_done(&self) -> bool {
            false
        }
        fn report(&self) -> &Report {
            &self.0
        }
        fn check_invariants(&self) -> Result<(), String> {
            Ok(())
        }
    }

    #[test]
    fn a_panic_ends_one_worker_and_is_told() {
        let core = Box::new(Buggy(Report::new()));
        let worker =
            Worker::start(CarrierKind::Epoll, CarrierSettings::default(), core).expect("epoll runs everywhere");
        let letterbox = Arc::new(Letterbox::new().expect("eventfds are everywhere"));
        let workers = Workers { states: Mutex::new(vec![State::Running(worker)]), letterbox };
        while workers.any_running() {
            std::thread::yield_now();
        }
        let states = workers.look();
        let State::Ended { error: Some(error), .. } = &states[0] else { panic!("it ended with an error") };
        assert_eq!(error, "a worker panicked: a bug of ours");
    }
}
