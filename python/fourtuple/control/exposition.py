"""The numbers of a broker as Prometheus reads them: its text format 0.0.4, or OpenMetrics 1.0 for who asks for it.

Decides names, types and labels. No label is a service, a peer or a route: how many series there are depends on the
tables of counters, reasons, steps and errors alone. Knows no HTTP but the header that says what is understood.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fourtuple.metrics import COUNTERS

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
CONTENT_TYPES = ("text/plain", "application/openmetrics-text")
_ENDED = "ended_"
LOADS_ONLY = ("openings_", "pings_", "tuples_", "datagrams_")
"""Counters that begin so are a load engine's; a broker's are always zero."""
_PEAKS = frozenset({"open_peak"})
"""Neither a total nor of now: a gauge for Prometheus."""
_QUANTILES = (("0.5", "p50"), ("0.9", "p90"), ("0.99", "p99"), ("0.999", "p999"))
_STANDINGS = ("known", "awake", "starting", "stopping", "failed")
_PROCESS = (
    ("resident_memory_bytes", "gauge", "resident_bytes", "Memory held, pages of files included."),
    ("private_memory_bytes", "gauge", "private_bytes", "Memory held that is shared with no file."),
    ("cpu_seconds", "counter", "cpu_s", "Processor time used."),
    ("open_fds", "gauge", "descriptors", "Open descriptors."),
    ("threads", "gauge", "threads", "Threads."),
    ("start_time_seconds", "gauge", "started", "When it was started, in seconds since 1970."),
)
_CONTROL = (
    ("requests", "Verbs asked over the control socket."),
    ("refused", "Verbs refused."),
    ("denied", "Clients of the control socket, or changes by readers, that were not allowed."),
    ("started", "Processes of the API started."),
    ("failed", "Processes of the API that ended with an error."),
)

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """Series of one name. Samples are what stands behind the name, labels, value."""

    name: str
    """Without `_total`."""
    kind: str
    meaning: str
    samples: tuple[tuple[str, Labels, float], ...]


def text(numbers: Mapping[str, Any], accept: str = "") -> tuple[bytes, str]:
    """The answer of verb `numbers`, with the tally of the control socket as `control`; and its content type."""
    is_open = "application/openmetrics-text" in accept
    lines = [line for family in families(numbers) for line in _lines(family, is_open)]
    if is_open:
        lines.append("# EOF")
    return ("\n".join(lines) + "\n").encode(), OPEN_METRICS if is_open else PLAIN


def families(numbers: Mapping[str, Any]) -> Iterator[Family]:
    """All of them, in a fixed order."""
    build = {"version": numbers["version"], "carrier": numbers["carrier"], "python": platform.python_version()}
    yield Family("fourtuple_build_info", "gauge", "What runs; always 1.", (("", build, 1),))
    counters: Mapping[str, int] = numbers["counters"]
    yield _counted(
        "fourtuple_connections_ended",
        "Connections that have ended, by the one reason that each has.",
        "reason",
        {row.name.removeprefix(_ENDED): counters[row.name] for row in COUNTERS if row.name.startswith(_ENDED)},
    )
    for row in COUNTERS:
        if row.name.startswith((_ENDED, *LOADS_ONLY)):
            continue
        meaning = row.meaning[:1].upper() + row.meaning[1:] + "."
        if row.is_gauge or row.name in _PEAKS:
            yield Family(f"fourtuple_{row.name}", "gauge", meaning, (("", {}, counters[row.name]),))
        else:
            yield _total(f"fourtuple_{row.name}", meaning, counters[row.name])
    failures = tuple(
        ("_total", {"step": one["step"], "errno": one["errno"]}, one["count"]) for one in numbers["failures"]
    )
    yield Family("fourtuple_failures", "counter", "System calls that failed, by step and error.", failures)
    yield _spread("fourtuple_delivery_seconds", "From accept to delivery.", numbers["delivery"])
    services = tuple(("", {"standing": name}, numbers["services"][name]) for name in _STANDINGS)
    yield Family("fourtuple_services", "gauge", "Services, by what is known of them.", services)
    yield _counted("fourtuple_wakes", "What the launcher has done, by outcome.", "outcome", numbers["wakes"])
    yield _total("fourtuple_broker_restarts", "Broker processes that ended by themselves.", numbers["restarts"])
    for name, kind, key, meaning in _PROCESS:
        behind = "_total" if kind == "counter" else ""
        rows = tuple((behind, {"role": one["role"]}, one[key]) for one in numbers["processes"] if one[key] is not None)
        yield Family(f"fourtuple_process_{name}", kind, meaning, rows)
    for key, meaning in _CONTROL:
        yield _total(f"fourtuple_control_{key}", meaning, numbers["control"][key])


def _total(name: str, meaning: str, count: int) -> Family:
    return Family(name, "counter", meaning, (("_total", {}, count),))


def _counted(name: str, meaning: str, label: str, rows: Mapping[str, int]) -> Family:
    return Family(name, "counter", meaning, tuple(("_total", {label: key}, count) for key, count in rows.items()))


def _spread(name: str, meaning: str, spread: Mapping[str, int]) -> Family:
    quantiles = tuple(("", {"quantile": quantile}, spread[key] / 1e9) for quantile, key in _QUANTILES)
    sum_s = spread["mean"] * spread["count"] / 1e9
    return Family(name, "summary", meaning, (*quantiles, ("_sum", {}, sum_s), ("_count", {}, spread["count"])))


def _lines(family: Family, is_open: bool) -> Iterator[str]:
    # In the older format a counter's name is that of its samples.
    named = family.name + ("_total" if family.kind == "counter" and not is_open else "")
    yield f"# HELP {named} {_escaped(family.meaning, quoted=is_open)}"
    yield f"# TYPE {named} {family.kind}"
    for behind, labels, value in family.samples:
        shown = ",".join(f'{key}="{_escaped(str(one), quoted=True)}"' for key, one in labels.items())
        yield f"{family.name}{behind}" + (f"{{{shown}}}" if shown else "") + f" {value!r}"


def _escaped(told: str, *, quoted: bool) -> str:
    escaped = told.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quoted else escaped
