//! What the sniffers see in bytes, for people: the one place where a verdict becomes Python objects.
//!
//! The broker never comes through here. The bytes are given out as they are asked for, as a client would that waits for
//! answers, so a recorded conversation shows what the live one would.

use fourtuple_sniff::{PROBES, Prelude, REFUSALS, Scratch, Shown, Sniffer, State, Verdict};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};

use crate::failure::BadConfig;

/// One row per probe, in order of precedence: name, bytes looked at at most, what it shows.
#[pyfunction]
pub(crate) fn probes() -> Vec<(&'static str, usize, &'static str)> {
    PROBES.iter().map(|probe| (probe.name, probe.bound, probe.shows)).collect()
}

/// One row per reason to refuse a connection: name, meaning.
#[pyfunction]
pub(crate) fn refusals() -> Vec<(&'static str, &'static str)> {
    REFUSALS.to_vec()
}

/// What these probes see in `bytes`.
#[pyfunction]
pub(crate) fn sniff<'py>(
    py: Python<'py>,
    bytes: &[u8],
    probes: Vec<String>,
    prelude: &str,
    postgres_tls: bool,
) -> PyResult<Bound<'py, PyDict>> {
    let mut protocols = Vec::new();
    for name in &probes {
        let probe = PROBES.iter().find(|probe| probe.name == name);
        protocols.push(probe.ok_or_else(|| BadConfig::new_err(("probes", format!("{name:?} is no probe"))))?.protocol);
    }
    let prelude = match prelude {
        "none" => Prelude::None,
        "allowed" => Prelude::Allowed,
        "required" => Prelude::Required,
        _ => return Err(BadConfig::new_err(("prelude", format!("{prelude:?} is not none, allowed or required")))),
    };
    let sniffer = Sniffer::new(protocols).with_prelude(prelude).with_postgres_tls(postgres_tls);
    let (mut state, mut scratch) = (State::default(), Box::new(Scratch::new()));
    let mut answers = Vec::new();
    let mut end = 0;
    let seen = PyDict::new(py);
    loop {
        let (verdict, protocol) = match sniffer.sniff(&mut state, &bytes[..end], &mut scratch) {
            Verdict::More(needed) if needed <= bytes.len() => {
                end = needed;
                continue;
            }
            // As much as there is may be enough for a no, or for a refusal.
            Verdict::More(_) if end < bytes.len() => {
                end = bytes.len();
                continue;
            }
            Verdict::Answer(answer) => {
                answers.push(PyBytes::new(py, answer));
                continue;
            }
            Verdict::More(needed) => {
                seen.set_item("needed", needed)?;
                ("more", None)
            }
            Verdict::No => ("no", None),
            Verdict::Refused(protocol, why) => {
                seen.set_item("why", why.name())?;
                ("refused", protocol)
            }
            Verdict::Match(shown) => {
                describe(&seen, &shown)?;
                ("match", Some(shown.protocol))
            }
        };
        seen.set_item("verdict", verdict)?;
        seen.set_item("protocol", protocol.map(|it| it.probe().name))?;
        seen.set_item("answers", PyTuple::new(py, answers)?)?;
        return Ok(seen);
    }
}

/// Everything that is shown.
fn describe(seen: &Bound<'_, PyDict>, shown: &Shown<'_>) -> PyResult<()> {
    let bytes = |value: Option<&[u8]>| value.map(|value| PyBytes::new(seen.py(), value));
    seen.set_item("intent", shown.intent.name())?;
    seen.set_item("end", shown.end)?;
    seen.set_item("name", shown.name)?;
    seen.set_item("port", shown.port)?;
    seen.set_item("number", shown.number)?;
    seen.set_item("path", bytes(shown.path))?;
    seen.set_item("path_is_plain", shown.path_is_plain())?;
    let alpn: Vec<_> = shown.alpn.map(|name| PyBytes::new(seen.py(), name)).collect();
    seen.set_item("alpn", PyTuple::new(seen.py(), alpn)?)?;
    seen.set_item("ech", shown.ech)?;
    seen.set_item("user", bytes(shown.user))?;
    seen.set_item("database", bytes(shown.database))?;
    seen.set_item("client", bytes(shown.client))?;
    seen.set_item("starttls", shown.starttls)?;
    seen.set_item("reply", bytes(Some(shown.reply).filter(|reply| !reply.is_empty())))?;
    seen.set_item("cancel", bytes(shown.cancel))?;
    let endpoints = shown.proxied.and_then(|header| header.endpoints);
    seen.set_item("proxied", endpoints.map(|(source, destination)| (source.to_string(), destination.to_string())))
}
