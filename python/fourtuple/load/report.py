"""What a load run found: `Report`, its numbers by name for conditions, its JSON and its page.

Decides which numbers leave a run and what they are called. Pure; knows only the finished run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from pydantic import TypeAdapter

from fourtuple.engine import Quantiles
from fourtuple.load.attribution import Cause
from fourtuple.load.reasons import Side
from fourtuple.paper import page


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """A histogram in milliseconds; all zero when nothing was measured."""

    count: int
    least_ms: float
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    most_ms: float

    @classmethod
    def of(cls, found: Quantiles) -> Latency:
        """From the engine's nanoseconds."""
        names = ("least", "mean", "p50", "p90", "p99", "p999", "most")
        return cls(count=found.count, **{f"{name}_ms": getattr(found, name) / 1e6 for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class PortUse:
    """Source ports in use from one address to one destination, of those that there are."""

    source: str
    destination: str
    used: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The run at one moment."""

    at_s: float
    open_now: int
    rounds_right: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """Exceptions of one kind that a script let out of its sessions."""

    kind: str
    count: int
    example: str
    """Where the first came from: the line of the script, and what it says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptOutcome:
    """What a script with a `session` did, besides what its connections met."""

    processes: int
    most_connections_each: int
    sessions_ended: int
    """That returned; each was followed by a new connection, unless none was to be replaced."""
    raised: tuple[Raised, ...]
    blocked_at: str
    """Where the script kept all other sessions of its process waiting longest; "" if nowhere for a second."""
    blocked_s: float
    unwilling: int
    """Sessions that did not end when they were told to."""
    ended_early: tuple[str, ...]
    """Workers that ended although nobody told them to."""
    said: str
    """The beginning of what it printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that a run found, complete also when it was interrupted."""

    target: str
    started_at: str
    kernel: str
    carrier: str
    workers: int
    wanted: int
    held: int
    """Open at the end of the holding, and ready: an opening that is still being played is not."""
    most_held: int
    interrupted: bool
    verdict: str
    """In a sentence: whether all were held, and what or who stopped it if not."""
    stopped_by: Side | None
    """The side that kept the run from its number; None if nothing did."""
    causes: tuple[Cause, ...]
    attempts: int
    connected: int
    replaced: int
    """Connections made anew for some that had ended."""
    ramp_s: float
    ramp_rate_per_s: float
    """Connections made per second while ramping."""
    seconds: float
    noun: str
    """What was held: connections, or UDP flows, which have no handshake: their `connect` is this host's own work."""
    connect: Latency
    opening: Latency
    """From there to the end of the opening: TLS and WebSocket handshakes, and what a script says first."""
    answer: Latency
    openings_right: int
    openings_failed: int
    rounds: int
    rounds_right: int
    rounds_failed: int
    """Missing, wrong or refused."""
    rounds_missing: int
    rounds_wrong: int
    strays: int
    """Datagrams that answered nothing: late, doubled, unasked or with other bytes."""
    closed_by_peer: int
    broken: int
    bytes_in: int
    bytes_out: int
    user_bytes_per_connection: float | None
    """Growth of this process; None below 1,000 connections, where it would be noise."""
    kernel_bytes_per_connection: float | None
    """Growth of the whole host's kernel memory: of both ends where the server is here too."""
    client_cpu_share: float
    """Of the processors that this process may use, over the whole run."""
    client_cpu_us_per_connection: float
    ports: tuple[PortUse, ...]
    """The fullest pairs first, at most 64, at the end of the ramp."""
    host_warnings: tuple[str, ...]
    """What the doctor found wrong with this host meanwhile."""
    samples: tuple[Sample, ...]
    script: ScriptOutcome | None = None
    """None where the engine spoke."""

    @property
    def is_datagrams(self) -> bool:
        """Whether UDP flows were held."""
        return self.noun == "flows"

    def latencies(self) -> tuple[tuple[str, Latency], ...]:
        """Those that are the network's: connect() of a UDP socket asks nobody."""
        connect = () if self.is_datagrams else (("connect", self.connect),)
        told = ((name, found) for name, found in (("opening", self.opening), ("answer", self.answer)) if found.count)
        return (*connect, *told)

    def numbers(self) -> dict[str, float]:
        """Everything that a condition may name."""
        return {name: float(read(self)) for name, read in NUMBERS.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, and `numbers` beside them."""
        plain: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return plain | {"numbers": self.numbers()}


def _latency(which: str, name: str) -> Callable[[Report], float]:
    def read(report: Report) -> float:
        value: float = getattr(getattr(report, which), f"{name}_ms")
        return value

    return read


NUMBERS: Mapping[str, Callable[[Report], float]] = {
    "held": lambda report: report.held,
    "wanted": lambda report: report.wanted,
    "most_held": lambda report: report.most_held,
    "connected": lambda report: report.connected,
    "failed": lambda report: report.attempts - report.connected,
    "replaced": lambda report: report.replaced,
    "rate_per_s": lambda report: report.ramp_rate_per_s,
    "ramp_s": lambda report: report.ramp_s,
    "openings_right": lambda report: report.openings_right,
    "openings_failed": lambda report: report.openings_failed,
    "rounds": lambda report: report.rounds,
    "rounds_right": lambda report: report.rounds_right,
    "rounds_failed": lambda report: report.rounds_failed,
    "rounds_missing": lambda report: report.rounds_missing,
    "rounds_wrong": lambda report: report.rounds_wrong,
    "strays": lambda report: report.strays,
    "closed_by_peer": lambda report: report.closed_by_peer,
    "broken": lambda report: report.broken,
    "sessions_ended": lambda report: 0 if report.script is None else report.script.sessions_ended,
    "script_errors": lambda report: 0 if report.script is None else sum(one.count for one in report.script.raised),
    "client_cpu_percent": lambda report: 100 * report.client_cpu_share,
    **{
        f"{name}_{which}_ms": _latency(which, name)
        for which in ("connect", "opening", "answer")
        for name in ("mean", "p50", "p90", "p99", "p999", "most")
    },
}
"""What a condition may name, and how it is read."""


def html(report: Report) -> str:
    """The report as one page."""
    facts = [
        (f"{report.noun} held at the end", f"{report.held:,} of {report.wanted:,}"),
        ("most at once", f"{report.most_held:,}"),
        ("ramp", f"{report.ramp_s:.1f} s, {report.ramp_rate_per_s:,.0f} {report.noun} per second"),
        ("replaced, closed by the peer, broken", f"{report.replaced:,}, {report.closed_by_peer:,}, {report.broken:,}"),
        ("openings right, failed", f"{report.openings_right:,}, {report.openings_failed:,}"),
        (
            "rounds right, failed (missing, wrong)",
            f"{report.rounds_right:,}, {report.rounds_failed:,} ({report.rounds_missing:,}, {report.rounds_wrong:,})",
        ),
        *([("datagrams that answered nothing", f"{report.strays:,}")] if report.is_datagrams else []),
        ("bytes in, out", f"{report.bytes_in:,}, {report.bytes_out:,}"),
        (f"user memory for each of the {report.noun}", _bytes(report.user_bytes_per_connection)),
        (f"kernel memory for each of the {report.noun}, whole host", _bytes(report.kernel_bytes_per_connection)),
        (f"processor time for each of the {report.noun}", f"{report.client_cpu_us_per_connection:,.1f} us"),
        ("share of the client's processors", f"{report.client_cpu_share:.0%}"),
    ]
    latencies = [
        [what, f"{row.count:,}", *(f"{value:,.3f}" for value in _quantiles(row))] for what, row in report.latencies()
    ]
    causes = [
        [
            row.side.value,
            row.what,
            f"{row.step} {row.error}".strip(),
            f"{row.count:,}",
            ", ".join(row.limits),
            row.evidence,
        ]
        for row in report.causes
    ]
    ports = [[row.source, row.destination, f"{row.used:,}", f"{row.of:,}"] for row in report.ports]
    samples = [[f"{row.at_s:.1f}", f"{row.open_now:,}", f"{row.rounds_right:,}"] for row in report.samples]
    parts = [
        f"<h1>{escape(report.verdict)}</h1>",
        f'<p class="dim">{escape(report.target)}, Linux {escape(report.kernel)}, {escape(report.started_at)}, '
        f"{report.seconds:.0f} s, carrier {escape(report.carrier)}, {report.workers} workers.</p>",
        _table("Numbers", ("", ""), facts),
        _table("The script", ("", ""), _script(report.script)),
        _table("Latency, ms", ("", "count", "least", "mean", "p50", "p90", "p99", "p99.9", "most"), latencies),
        _table("What went wrong, and where", ("side", "what", "error", "count", "limits", "evidence"), causes),
        _table("Source ports", ("from", "to", "used", "of"), ports),
        _table("This host meanwhile", ("",), [[text] for text in report.host_warnings]),
        _table("Course", ("s", "open", "rounds right"), samples),
    ]
    return page(f"fourtuple load {report.target}", "\n".join(parts))


def _script(outcome: ScriptOutcome | None) -> Iterable[Iterable[str]]:
    if outcome is None:
        return
    yield "worker processes, most connections each", f"{outcome.processes:,}, {outcome.most_connections_each:,}"
    yield "sessions that returned", f"{outcome.sessions_ended:,}"
    if outcome.said:
        yield "it printed", outcome.said


def _quantiles(row: Latency) -> Iterable[float]:
    return (row.least_ms, row.mean_ms, row.p50_ms, row.p90_ms, row.p99_ms, row.p999_ms, row.most_ms)


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    return (
        f"<h2>{escape(title)}</h2>\n<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
        if body
        else ""
    )


def _bytes(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.0f} B"


_ADAPTER: TypeAdapter[Report] = TypeAdapter(Report)
