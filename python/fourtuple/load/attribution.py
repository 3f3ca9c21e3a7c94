"""Which side stops a load run, and by which limit: errors, silence and counters turned into `Cause`s.

Decides the side of each error and which of the catalogue's suspects the evidence speaks for. Pure: knows the engine's
last snapshot and what this host said before and after, and nothing of the other host. What evidence from here cannot
tell apart is said to lie between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fourtuple.engine import Failure, Snapshot
from fourtuple.facts import Host
from fourtuple.limits import suspects, suspects_by_counter
from fourtuple.load.reasons import OPENING_REASONS, ROUND_REASONS, Reason, Side
from fourtuple.tuples import TupleSpace

if TYPE_CHECKING:
    from fourtuple.load.report import ScriptOutcome

_CALLS = {"receive": "recv"}
"""Where the engine's word for a step is not the system call's."""
_MOST_SUSPECTS = 4
_BUSY = 0.95
"""Of the processors that this process may use: beyond, the client is what is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Something that went wrong, on which side, and the limits that do such a thing, first suspect first."""

    side: Side
    what: str
    error: str
    """Errno's name; "" for silence, refusals and the like."""
    step: str
    count: int
    limits: tuple[str, ...]
    """Names in the catalogue: `fourtuple limits show NAME`."""
    evidence: str
    """What of this host's own numbers speaks for it; "" if nothing does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """What is known beside the engine's numbers."""

    before: Host
    held: Host
    """At the end of the ramp."""
    after: Host
    """Once all is closed."""
    wanted: int
    space: TupleSpace
    """The tuples that the run could use."""
    fullest: int = 0
    """Connections of the fullest such group, TIME_WAIT and other programs' included."""
    client_busy: float = 0.0
    """Share of the processors that this process used while it made connections."""
    client_wanted: float = 0.0
    """As `client_busy`, and what it would have used had others not been there."""
    fell_short: bool = False
    """Whether it made fewer connections than wanted, or made them more slowly."""


def attribute(snapshot: Snapshot, witness: Witness) -> tuple[Cause, ...]:
    """Every cause, the most frequent first; causes that made the engine stop before all others."""
    risen = _risen(witness.before, witness.after)
    causes = [_of_failure(failure, snapshot, witness, risen) for failure in _telling(snapshot)]
    causes += _without_error(snapshot, risen)
    if witness.fell_short and max(witness.client_busy, witness.client_wanted) >= _BUSY:
        causes.append(_busy(witness))
    stopper = snapshot.stopped_by
    first = None if stopper is None else (stopper.step, stopper.name)
    causes.sort(key=lambda cause: ((cause.step, cause.error) != first, -cause.count))
    used = snapshot.connects_succeeded + snapshot.tuples_busy
    if first is None and snapshot.connects_succeeded < witness.wanted and used >= witness.space.size:
        causes.insert(0, _all_used(witness))
    return tuple(causes)


def of_script(outcome: ScriptOutcome | None) -> tuple[Cause, ...]:
    """What a script did wrong, or what it was stopped for; None has none."""
    if outcome is None:
        return ()
    found = [("a worker process is gone, and its connections with it", 1, end) for end in outcome.ended_early]
    found += [(f"the script raises {one.kind}", one.count, one.example) for one in outcome.raised]
    if outcome.blocked_at:
        evidence = f"{outcome.blocked_at}, for {outcome.blocked_s:.1f} s and more"
        found.append(("the script keeps all other sessions of its process waiting", 1, evidence))
    if outcome.unwilling:
        found.append(("sessions do not end when they are told to, and were killed", outcome.unwilling, ""))
    return tuple(
        Cause(side=Side.CLIENT, what=what, error="", step="", count=number, limits=(), evidence=evidence)
        for what, number, evidence in found
    )


def _telling(snapshot: Snapshot) -> Iterable[Failure]:
    """The failures that cost something: where a tuple was busy and another was taken, nothing went wrong."""
    for failure in snapshot.failures:
        of_ports = failure.step == "connect" and failure.name in ("EADDRNOTAVAIL", "EADDRINUSE")
        if not of_ports or snapshot.stopped_by is not None:
            yield failure


def _of_failure(failure: Failure, snapshot: Snapshot, witness: Witness, risen: Mapping[str, int]) -> Cause:
    call, name = _CALLS.get(failure.step, failure.step), failure.name
    limits = [limit.name for limit in suspects(call, name)]
    evidence = ""
    match (call, name):
        case ("socket" | "bind", _):
            side, what = Side.CLIENT, f"{call}() fails here"
            if name in ("EMFILE", "ENFILE"):
                limits, evidence = _descriptors(limits, witness.after)
        case ("connect", "EADDRNOTAVAIL" | "EADDRINUSE"):
            side, what = Side.CLIENT, "no source port is left for that destination"
            limits, evidence = _ports(limits, witness)
        case ("connect", "ETIMEDOUT"):
            side, what, limits, evidence = _silence(limits, snapshot, witness, risen)
        case ("connect" | "recv" | "send", "ECONNREFUSED"):
            side, what = Side.SERVER, "nobody listens there, or a firewall rejects"
        case ("recv", "EMSGSIZE"):
            side, what = Side.SERVER, "its datagrams are longer than 2,048 bytes, and cut"
        case ("send", "EMSGSIZE"):
            side, what = Side.CLIENT, "the datagrams are longer than the way there carries"
        case ("send", "EPERM") if not limits:
            side, what = Side.CLIENT, "this host's firewall or policy forbids it"
        case ("connect" | "recv" | "send", "ECONNRESET" | "EPIPE"):
            side, what = Side.SERVER, "the peer reset the connection"
        case ("connect", "EPERM" | "EACCES" | "ENETUNREACH" | "EINVAL"):
            side, what = Side.CLIENT, "this host's routes, firewall or policy forbid it"
        case ("connect", "EHOSTUNREACH"):
            side, what = Side.BETWEEN, "no way there: no neighbour answers, or a router said so"
        case (_, "ENOBUFS" | "ENOMEM"):
            side, what = Side.CLIENT, "the kernel here has no memory for it"
        case (_, "ETIMEDOUT"):
            side, what = Side.BETWEEN, "nothing is acknowledged any more: the peer or the path is gone"
            limits = limits or ["retries"]
        case _:
            side, what = Side.BETWEEN, f"{call}() fails"
    return Cause(
        side=side,
        what=what,
        error=name,
        step=failure.step,
        count=failure.count,
        limits=_first(limits),
        evidence=evidence,
    )


def _silence(
    limits: list[str], snapshot: Snapshot, witness: Witness, risen: Mapping[str, int]
) -> tuple[Side, str, list[str], str]:
    """connect() that nobody answers: whose table or queue is full, if a counter that we can see says so."""
    tracked = witness.held.conntrack
    refused = {name: by for name, by in risen.items() if name in ("conntrack.drop", "conntrack.early_drop")}
    full = tracked.maximum is not None and tracked.count is not None and tracked.count >= tracked.maximum
    if refused or full:
        numbers = [f"{name} rose by {by:,}" for name, by in refused.items()]
        if tracked.count is not None and tracked.maximum is not None:
            numbers.append(f"{tracked.count:,} of {tracked.maximum:,} entries are in use")
        return Side.CLIENT, "this host's connection tracking drops them", ["conntrack-table"], ", ".join(numbers)
    if witness.held.rule_limits:
        evidence = f"a rule here bounds connections: {witness.held.rule_limits[0]}"
        return Side.CLIENT, "this host's firewall drops them", ["firewall-rules"], evidence
    for counter in ("TcpExt.ListenOverflows", "TcpExt.TCPReqQFullDrop"):
        if counter in risen:
            named = [limit.name for limit in suspects_by_counter(counter)]
            evidence = f"{counter} rose by {risen[counter]:,} on this host, where the server is too"
            return Side.SERVER, "the server does not accept fast enough", named, evidence
    if "TcpExt.TCPSYNChallenge" in risen:
        # A listener whose queue is full drops the handshake's last ACK and repeats its SYN-ACK (tcp_check_req).
        evidence = f"{risen['TcpExt.TCPSYNChallenge']:,} SYN-ACKs were repeated for connections that stand here"
        return Side.SERVER, "the server does not accept fast enough", ["accept-queue"], evidence
    if snapshot.connects_succeeded and not snapshot.pings_right:
        evidence = f"{snapshot.connects_succeeded:,} connected before, and none of them was ever answered"
        return Side.SERVER, "the server has ceased to accept, as far as can be seen from here", limits, evidence
    if snapshot.connects_succeeded:
        return Side.BETWEEN, "no answer any more: a full queue there, or a firewall on the way", limits, ""
    limits = [name for name in limits if name != "accept-queue"]
    return Side.BETWEEN, "no answer at all: the address is nobody's, or something on the way drops", limits, ""


def _ports(limits: list[str], witness: Witness) -> tuple[list[str], str]:
    ports = len(witness.space.source_ports)
    waiting = _waiting(witness)
    evidence = f"{witness.fullest:,} of {ports:,} source ports of the fullest pair are in use"
    if 2 * waiting > ports > 0:
        return ["time-wait", *limits], f"{evidence}, {waiting:,} sockets are in TIME_WAIT"
    if witness.fullest >= ports * 0.95:
        return ["ephemeral-ports", *limits], evidence
    if witness.held.poisoned_ports:
        return ["poisoned-ports", *limits], evidence
    return limits, evidence


def _waiting(witness: Witness) -> int:
    return witness.held.sockets.by_state.get("TIME_WAIT") or witness.held.sockets.time_wait or 0


def _descriptors(limits: list[str], host: Host) -> tuple[list[str], str]:
    limit = host.process.rlimits.get("NOFILE")
    if limit is None or limit.soft is None:
        return limits, ""
    first = ["descriptors-hard"] if limit.soft == limit.hard else []
    return [*limits[:1], *first, *limits[1:]], f"RLIMIT_NOFILE of this process is {limit.soft:,}"


def _without_error(snapshot: Snapshot, risen: Mapping[str, int]) -> Iterable[Cause]:
    # Datagrams are refused by ICMP, which is a failure with its own row.
    by_icmp = any((row.step, row.name) == ("receive", "ECONNREFUSED") for row in snapshot.failures)
    refused = 0 if by_icmp else snapshot.pings_refused
    overflow = "TcpExt.ListenOverflows" in risen or "TcpExt.TCPSYNChallenge" in risen
    memory = risen.get("TcpExt.TCPMemoryPressures", 0)
    rows = (
        (
            0 if memory else snapshot.pings_missing,
            "no answer, and where there was one, it was that nobody listens (a host says so a few times a second only)"
            if by_icmp
            else "connected, but it does not answer in time: it stalls, or never accepted",
            () if by_icmp else ("accept-queue", "accept-at-limit") if overflow else ("accept-at-limit",),
        ),
        (refused, "it answers with an error status", ()),
        (snapshot.closed_by_peer, "it closes connections that we hold", ("accept-at-limit", "keepalive")),
    )
    repeated = risen.get("TcpExt.TCPSynRetrans", 0)
    if repeated and not any(failure.name == "ETIMEDOUT" for failure in snapshot.failures):
        yield Cause(
            side=Side.SERVER if overflow else Side.BETWEEN,
            what="some SYNs were answered only when repeated, a second later (the ramp is too steep for a queue there)",
            error="",
            step="",
            count=repeated,
            limits=("accept-queue", "syn-queue"),
            evidence=f"TcpExt.TCPSynRetrans rose by {repeated:,}",
        )
    for table, reasons in ((OPENING_REASONS, snapshot.opening_reasons), (ROUND_REASONS, snapshot.round_reasons)):
        for name, count in reasons:
            yield _of_reason(table[name], count)
    if memory and snapshot.pings_missing:
        yield Cause(
            side=Side.CLIENT,
            what="this host is short of memory for bytes of TCP: what comes late may be late here",
            error="",
            step="",
            count=snapshot.pings_missing,
            limits=("tcp-buffer-memory",),
            evidence=f"TcpExt.TCPMemoryPressures rose by {memory:,}",
        )
    for count, what, limits in rows:
        if count:
            yield Cause(side=Side.SERVER, what=what, error="", step="", count=count, limits=limits, evidence="")


def _of_reason(reason: Reason, count: int) -> Cause:
    return Cause(side=reason.side, what=reason.what, error="", step="", count=count, limits=(), evidence=reason.remedy)


def _all_used(witness: Witness) -> Cause:
    space = witness.space
    sizes = (len(space.sources), len(space.source_ports), len(space.destinations) * len(space.destination_ports))
    product = "{:,} source addresses x {:,} ports x {:,} destinations".format(*sizes)
    waiting = _waiting(witness)
    resting = 2 * waiting > space.size
    return Cause(
        side=Side.CLIENT,
        what="every tuple that this side has is in use: more source addresses or ports are needed",
        error="",
        step="",
        count=witness.wanted - space.size,
        limits=(*(("time-wait",) if resting else ()), "ephemeral-ports", "four-tuple", "source-addresses"),
        evidence=f"{product} = {space.size:,}, {witness.wanted:,} wanted"
        + (f"; {waiting:,} sockets are in TIME_WAIT" if resting else ""),
    )


def _busy(witness: Witness) -> Cause:
    return Cause(
        side=Side.CLIENT,
        what="the client's processors are busy: it, not the server, sets the pace",
        error="",
        step="",
        count=1,
        limits=("path-rate", "connect-cost"),
        evidence=f"it used {witness.client_busy:.0%} of the processors that it may use, and wanted"
        f" {max(witness.client_busy, witness.client_wanted):.0%}",
    )


def _risen(before: Host, after: Host) -> dict[str, int]:
    rises = {name: now - before.counters.get(name, 0) for name, now in after.counters.items()}
    return {name: by for name, by in rises.items() if by > 0}


def _first(limits: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(limits))[:_MOST_SUSPECTS]
