"""What a plan would break on a host as it is now: the reasons for which `tune` refuses it unless forced.

Decides which changes are dangerous here. Pure; the host is read again by whoever asks, for a plan may be old or another
machine's.
"""

from __future__ import annotations

from collections.abc import Iterator

from fourtuple.errors import BadConfig
from fourtuple.facts import Change, ChangeKind, Host
from fourtuple.limits._terms import MEMORY_SHARE_PERCENT, PORT_RANGE, RESERVED_PORTS
from fourtuple.plan.model import HostMark, Plan
from fourtuple.tuples import HIGHEST_PORT, PortSet


def hazards(plan: Plan, host: Host, *, same_namespace: bool = True) -> tuple[str, ...]:
    """Why this plan should not be applied here; empty if nothing speaks against it.

    `same_namespace`: whether `host` is where the plan was made; a namespace beside it begins with values of its own.
    """
    here = (*_another_namespace(plan, host), *_stale(plan, host)) if same_namespace else ()
    return (*_another_host(plan, host), *here, *_listeners(plan, host), *_memory(plan, host))


def _another_host(plan: Plan, host: Host) -> Iterator[str]:
    yield from _different(plan, host, ("cpus", "processors"), ("memory_total_bytes", "bytes of memory"))


def _another_namespace(plan: Plan, host: Host) -> tuple[str, ...]:
    return tuple(_different(plan, host, ("initial_network_namespace", "initial network namespace")))


def _different(plan: Plan, host: Host, *facts: tuple[str, str]) -> Iterator[str]:
    made_for, here = plan.host, HostMark.of(host)
    for field, what in facts:
        theirs, ours = getattr(made_for, field), getattr(here, field)
        if theirs != ours:
            yield f"the plan was made for another host: {what} {_said(theirs)} there, {_said(ours)} here"


def _said(fact: int | bool | None) -> str:
    return "unknown" if fact is None else f"{fact:,}" if type(fact) is int else "yes" if fact else "no"


def _stale(plan: Plan, host: Host) -> Iterator[str]:
    for change in _sysctls(plan):
        now = host.sysctl.get(change.knob)
        if now is not None and now.split() not in (change.old.split(), change.new.split()):
            yield f"{change.knob} is {now!r} here, and was {change.old!r} when the plan was made: plan again"


def _listeners(plan: Plan, host: Host) -> Iterator[str]:
    """A port of a running listener inside the new range: after a restart its service can find it taken (A2)."""
    new = {change.knob: change.new for change in _sysctls(plan)}
    if PORT_RANGE not in new:
        return
    try:
        low, high = (int(word) for word in new[PORT_RANGE].split())
        inside = PortSet(runs=((max(1, low), min(high, HIGHEST_PORT)),))
        reserved = new.get(RESERVED_PORTS, host.sysctl.get(RESERVED_PORTS, "")).strip()
        kept = PortSet.parse(reserved) if reserved else PortSet()
    except (ValueError, BadConfig):
        yield f"{PORT_RANGE} is to be {new[PORT_RANGE]!r}, which is no range of ports"
        return
    listening = PortSet.of(*(one.local.port for one in host.listeners))
    taken = listening.intersect(inside).subtract(kept)
    if taken:
        yield f"listeners of this host have ports {taken}, inside the new range and not reserved: plan again"


def _memory(plan: Plan, host: Host) -> Iterator[str]:
    available = host.machine.memory_available_bytes
    if available is not None and plan.memory_bytes > available * MEMORY_SHARE_PERCENT // 100:
        yield (
            f"its connections take {plan.memory_bytes:,} B, more than {MEMORY_SHARE_PERCENT} % of the {available:,} B"
            " that this host has available"
        )


def _sysctls(plan: Plan) -> tuple[Change, ...]:
    return tuple(change for change in plan.changes if change.kind is ChangeKind.SYSCTL)
