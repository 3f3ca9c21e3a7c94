//! What leaves Rust: the reports of an engine's workers, merged into one dictionary of plain numbers.
//!
//! Decides how reports add up: counters are summed, histograms merged, fill curves kept apart (each is of its own share
//! of the space). Knows no worker.

use fourtuple_carrier::{CarrierReport, Published, UringAbilities};
use fourtuple_engine::Step;
use fourtuple_engine::histogram::Histogram;
use fourtuple_engine::report::{COUNTERS, Failure, Phase};
use pyo3::prelude::*;

/// All workers together; `fourtuple.engine.Snapshot` says what each field means.
#[derive(IntoPyObject)]
pub(crate) struct Snapshot {
    running: bool,
    phase: &'static str,
    counters: Vec<u64>,
    failures: Vec<(&'static str, i32, u64)>,
    stopped_by: Option<(&'static str, i32)>,
    opening_reasons: Vec<(&'static str, u64)>,
    round_reasons: Vec<(&'static str, u64)>,
    connect_ns: Quantiles,
    opening_ns: Quantiles,
    echo_ns: Quantiles,
    fill_curves: Vec<Vec<(u64, u64)>>,
    listeners_served: u64,
    carrier: CarrierNumbers,
    errors: Vec<String>,
}

/// A histogram in eight numbers, nanoseconds but for `count`.
#[derive(IntoPyObject)]
struct Quantiles {
    count: u64,
    least: u64,
    mean: u64,
    p50: u64,
    p90: u64,
    p99: u64,
    p999: u64,
    most: u64,
}

/// `CarrierReport`s added up.
#[derive(IntoPyObject, Default)]
struct CarrierNumbers {
    rings: u64,
    slots: u64,
    slots_in_use: u64,
    enters: u64,
    receive_rearms: u64,
    cq_overflows: u64,
    buffers_in_use: u64,
    accept_lost: u64,
}

/// What of `Published` one worker adds: its numbers, whether it still runs, and why it ended if not as it should.
pub(crate) struct Row {
    pub(crate) published: Published,
    pub(crate) running: bool,
    pub(crate) error: Option<String>,
}

impl Snapshot {
    /// The sum of the workers' reports.
    pub(crate) fn merged(rows: Vec<Row>) -> Snapshot {
        let mut counters = vec![0; COUNTERS.len()];
        let mut failures: Vec<Failure> = Vec::new();
        let mut phase = Phase::Done;
        let mut stopped_by = None;
        let (mut opening_reasons, mut round_reasons) = (Vec::new(), Vec::new());
        let (mut connect_ns, mut opening_ns, mut echo_ns) = (Histogram::new(), Histogram::new(), Histogram::new());
        let (mut fill_curves, mut listeners_served) = (Vec::new(), 0);
        let mut carrier = CarrierNumbers::default();
        for Published { report, carrier: used } in rows.iter().map(|row| &row.published) {
            for (sum, count) in counters.iter_mut().zip(report.counts()) {
                *sum += count;
            }
            for failure in &report.failures {
                match failures.iter_mut().find(|row| (row.step, row.error) == (failure.step, failure.error)) {
                    Some(row) => row.count += failure.count,
                    None => failures.push(*failure),
                }
            }
            phase = if left_to_do(report.phase) > left_to_do(phase) { report.phase } else { phase };
            stopped_by = stopped_by.or(report.stopped_by);
            add_reasons(&mut opening_reasons, &report.opening_reasons);
            add_reasons(&mut round_reasons, &report.round_reasons);
            connect_ns.merge(&report.connect_ns);
            opening_ns.merge(&report.opening_ns);
            echo_ns.merge(&report.echo_ns);
            if !report.fill_curve.is_empty() {
                fill_curves.push(report.fill_curve.clone());
            }
            listeners_served += report.listeners_served;
            carrier.add(used);
        }
        Snapshot {
            running: rows.iter().any(|row| row.running),
            phase: phase_name(phase),
            counters,
            failures: failures.iter().map(|row| (step_name(row.step), row.error.0, row.count)).collect(),
            stopped_by: stopped_by.map(|(step, error)| (step_name(step), error.0)),
            opening_reasons,
            round_reasons,
            connect_ns: Quantiles::from(&connect_ns),
            opening_ns: Quantiles::from(&opening_ns),
            echo_ns: Quantiles::from(&echo_ns),
            fill_curves,
            listeners_served,
            carrier,
            errors: rows.into_iter().filter_map(|row| row.error).collect(),
        }
    }
}

impl CarrierNumbers {
    fn add(&mut self, used: &CarrierReport) {
        self.rings += u64::from(used.rings);
        self.slots += u64::from(used.slots);
        self.slots_in_use += u64::from(used.slots_in_use);
        self.enters += used.enters;
        self.receive_rearms += used.receive_rearms;
        self.cq_overflows += used.cq_overflows;
        self.buffers_in_use += used.buffers_in_use;
        self.accept_lost += used.accept_lost;
    }
}

fn add_reasons(sum: &mut Vec<(&'static str, u64)>, rows: &[(&'static str, u64)]) {
    for (reason, count) in rows {
        match sum.iter_mut().find(|row| row.0 == *reason) {
            Some(row) => row.1 += count,
            None => sum.push((reason, *count)),
        }
    }
}

impl From<&Histogram> for Quantiles {
    fn from(histogram: &Histogram) -> Quantiles {
        Quantiles {
            count: histogram.count(),
            least: histogram.min(),
            mean: histogram.mean(),
            p50: histogram.quantile(0.5),
            p90: histogram.quantile(0.9),
            p99: histogram.quantile(0.99),
            p999: histogram.quantile(0.999),
            most: histogram.max(),
        }
    }
}

/// Of several workers the one with most left to do says where the engine stands.
fn left_to_do(phase: Phase) -> u8 {
    match phase {
        Phase::Done => 0,
        Phase::Holding => 1,
        Phase::Pinging => 2,
        Phase::Closing => 3,
        Phase::Ramping => 4,
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Ramping => "ramping",
        Phase::Holding => "holding",
        Phase::Pinging => "pinging",
        Phase::Closing => "closing",
        Phase::Done => "done",
    }
}

fn step_name(step: Step) -> &'static str {
    match step {
        Step::Socket => "socket",
        Step::Bind => "bind",
        Step::Listen => "listen",
        Step::Connect => "connect",
        Step::Accept => "accept",
        Step::Receive => "receive",
        Step::Send => "send",
        Step::HandOff => "handoff",
    }
}

/// `UringAbilities` as a dictionary.
#[derive(IntoPyObject)]
pub(crate) struct Abilities {
    direct_descriptors: bool,
    multishot_accept: bool,
    multishot_receive: bool,
    setsockopt: bool,
    lent_descriptors: bool,
}

impl From<UringAbilities> for Abilities {
    fn from(found: UringAbilities) -> Abilities {
        Abilities {
            direct_descriptors: found.direct_descriptors,
            multishot_accept: found.multishot_accept,
            multishot_receive: found.multishot_receive,
            setsockopt: found.setsockopt,
            lent_descriptors: found.lent_descriptors,
        }
    }
}
