//! What cores ask, on its way to Python, and what Python says of services, on its way to the cores.
//!
//! Converts; `fourtuple.questions` has the words.

use std::borrow::Cow;
use std::net::IpAddr;

use fourtuple_engine::broker::guide::{Delivery, Known, Opinion};
use fourtuple_engine::{Answer, By, Opening, Order, Question};
use pyo3::prelude::*;

use crate::failure::BadConfig;

/// A question: its kind and its worker's number, and its fields.
pub(crate) type QuestionRow = (&'static str, u32, Fields);

/// The fields of a question; `fourtuple.questions` says what each means.
#[derive(IntoPyObject)]
pub(crate) enum Fields {
    Wake(WakeFields),
    Usage(UsageFields),
    Held(HeldFields),
    Surveyed(SurveyedFields),
    Busiest(BusiestFields),
    Closed(ClosedFields),
    Sniff(SniffFields),
}

#[derive(IntoPyObject)]
pub(crate) struct SniffFields {
    ticket: u64,
    listener: u32,
    opening: Cow<'static, [u8]>,
    is_all: bool,
}

#[derive(IntoPyObject)]
pub(crate) struct WakeFields {
    service: String,
    start: String,
    target: String,
    name: String,
    protocol: String,
    delivery: &'static str,
    peer: Option<(IpAddr, u16)>,
}

#[derive(IntoPyObject)]
pub(crate) struct UsageFields {
    ticket: u64,
    /// Service, live, parked, seconds unused.
    rows: Vec<(String, u32, u32, Option<f64>)>,
}

#[derive(IntoPyObject)]
pub(crate) struct HeldFields {
    service: String,
    live: u32,
}

#[derive(IntoPyObject)]
pub(crate) struct SurveyedFields {
    ticket: u64,
    rows: Vec<SeenFields>,
    next: Option<u32>,
}

#[derive(IntoPyObject)]
pub(crate) struct SeenFields {
    id: u64,
    peer: Option<(IpAddr, u16)>,
    service: String,
    state: &'static str,
    age_s: f64,
    bytes_up: u64,
    bytes_down: u64,
    listener: u32,
}

#[derive(IntoPyObject)]
pub(crate) struct BusiestFields {
    ticket: u64,
    /// Service, amount, how much of it may be others'.
    rows: Vec<(String, u64, u64)>,
    next: Option<u32>,
    least: u64,
}

#[derive(IntoPyObject)]
pub(crate) struct ClosedFields {
    ticket: u64,
    found: bool,
    next: Option<u32>,
}

/// As Python gets it.
pub(crate) fn row((worker, question): (u32, Question)) -> QuestionRow {
    match question {
        Question::Wake { service, start, target, name, protocol, delivery, peer } => {
            let peer = peer.map(|peer| (peer.ip(), peer.port()));
            let delivery = match delivery {
                Delivery::Relay => "relay",
                Delivery::HandOff => "handoff",
                Delivery::Inetd => "inetd",
            };
            ("wake", worker, Fields::Wake(WakeFields { service, start, target, name, protocol, delivery, peer }))
        }
        Question::Sniff(Opening { ticket, listener, bytes, is_all }) => {
            let fields = SniffFields { ticket, listener: listener.0, opening: bytes.into(), is_all };
            ("sniff", worker, Fields::Sniff(fields))
        }
        Question::Usage { ticket, rows } => {
            let row = |row: fourtuple_engine::Usage| {
                (row.service, row.live, row.parked, row.unused.map(|unused| unused.as_secs_f64()))
            };
            ("usage", worker, Fields::Usage(UsageFields { ticket, rows: rows.into_iter().map(row).collect() }))
        }
        Question::Surveyed { ticket, rows, next } => {
            let rows = rows.into_iter().map(seen).collect();
            ("surveyed", worker, Fields::Surveyed(SurveyedFields { ticket, rows, next }))
        }
        Question::Busiest { ticket, rows, next, least } => {
            let rows = rows.into_iter().map(|row| (row.service, row.amount, row.over)).collect();
            ("busiest", worker, Fields::Busiest(BusiestFields { ticket, rows, next, least }))
        }
        Question::Closed { ticket, found, next } => {
            ("closed", worker, Fields::Closed(ClosedFields { ticket, found, next }))
        }
        Question::Held { service, live } => ("held", worker, Fields::Held(HeldFields { service, live })),
    }
}

fn seen(row: fourtuple_engine::Seen) -> SeenFields {
    SeenFields {
        id: row.id,
        peer: row.peer.map(|peer| (peer.ip(), peer.port())),
        service: row.service,
        state: row.state,
        age_s: row.age.as_secs_f64(),
        bytes_up: row.bytes_up,
        bytes_down: row.bytes_down,
        listener: row.listener,
    }
}

/// How busy services are compared.
pub(crate) fn by(name: &str) -> PyResult<By> {
    Ok(match name {
        "live" => By::Live,
        "total" => By::Total,
        "bytes" => By::Bytes,
        _ => return Err(BadConfig::new_err(("by", format!("{name:?} is not one of live, total, bytes")))),
    })
}

/// What became of a service, as the cores are told.
pub(crate) fn answer(kind: &str, service: String, peer: Option<IpAddr>) -> PyResult<Order> {
    Ok(Order::Answer(match kind {
        "up" => Answer::Up { service },
        "slept" => Answer::Slept { service },
        "failed" => Answer::Failed { service },
        "refused" => Answer::Refused { service, peer },
        _ => return Err(BadConfig::new_err(("answer", format!("{kind:?} is not one of up, slept, failed, refused")))),
    }))
}

/// What a plug-in says of a connection: what it speaks, then name, user, database, client.
pub(crate) type KnownRow = (String, Option<String>, Option<String>, Option<String>, Option<String>);

/// What the outside says of a connection, as its core is told.
pub(crate) fn opinion(ticket: u64, more_than: Option<u32>, known: Option<KnownRow>) -> Order {
    let opinion = match (known, more_than) {
        (Some((protocol, name, user, database, client)), _) => {
            Opinion::Known(Box::new(Known { protocol, name, user, database, client }))
        }
        (None, Some(bytes)) => Opinion::More(bytes),
        (None, None) => Opinion::Nothing,
    };
    Order::Opinion { ticket, opinion }
}
