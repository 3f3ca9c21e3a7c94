"""The diagnosis: which limit binds this host in each role, what is close to being hit, which common advice is wrong.

Decides order, severity and health from the catalogue's answers. Pure: knows no file, socket or clock; the facts come in
a `Host`, a previous sample of the same host in another. A limit whose value cannot be read from here is listed as
unknown and never as absent. Entries that are only documented or advice give no number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import TypeAdapter

from fourtuple.facts import Goal, Host, Role
from fourtuple.limits import LIMITS, Bound, Kind, Limit, NotApplicable, Unknown, Usage, suspects_by_counter
from fourtuple.limits.myths import Myth, myths
from fourtuple.sources import MechanismChoice, choose_mechanism

NOTICE_PERCENT, WARNING_PERCENT, CRITICAL_PERCENT = 50, 80, 95
DEFAULT_DESTINATIONS = 1_000
"""Destinations of "client to many destinations" when none are told."""


class Severity(Enum):
    """How bad a finding is."""

    NOTICE = "notice"
    WARNING = "warning"
    CRITICAL = "critical"


class Health(Enum):
    """The host as a whole: the worst of its findings, notices left out."""

    HEALTHY = "healthy"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """One limit's number for one role: `connections` as `Bound` defines them for `kind`."""

    limit: str
    """Catalogue id, such as A2."""
    name: str
    title: str
    scope: str
    connections: int
    """What is certain."""
    may_reach: int | None
    """Where chance decides, the largest number that it can give; else None."""
    arithmetic: str
    evidence: str
    remedy: str
    """The remedy to try first here, in words, or "" if there is none."""
    command: str
    """Its command, or "" if it lies in the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Without:
    """A limit that gives no number to a role: unknown from here, or not applicable; `reason` says why."""

    limit: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleDiagnosis:
    """What the host can do in one role."""

    goal: Goal
    ceiling: int | None
    """Connections at once that the first bound allows; None if no limit could be read."""
    bounds: tuple[Binding, ...]
    """Every limit on connections at once, lowest first: the first, second and third are the ones to name."""
    rates: tuple[Binding, ...]
    """Limits on new connections per second, lowest first."""
    slowdowns: tuple[Binding, ...]
    """Numbers of connections beyond which each one costs more, lowest first."""
    unknown: tuple[Without, ...]
    not_applicable: tuple[Without, ...]

    @property
    def short_by(self) -> int:
        """How many of the wanted connections the ceiling leaves out; 0 if it is enough, or nothing was asked."""
        if self.goal.connections is None or self.ceiling is None:
            return 0
        return max(0, self.goal.connections - self.ceiling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """A limit that is half used or more: `used` of `of`, in `unit`."""

    limit: str
    name: str
    severity: Severity
    used: int
    of: int
    unit: str
    subject: str
    percent: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rising:
    """A counter that rose since the previous sample, and the limits that make it rise, first suspect first."""

    counter: str
    by: int
    breaks: bool
    """Whether it rises only where something fails; if not, it says nothing of health."""
    limits: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting that is not as a host for many connections wants it. It makes no host unhealthy by itself."""

    limit: str
    name: str
    setting: str
    found: str
    wanted: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The whole answer about one host."""

    host: str
    kernel: str
    health: Health
    reasons: tuple[str, ...]
    """Why it is not healthy; empty if it is."""
    roles: tuple[RoleDiagnosis, ...]
    pressures: tuple[Pressure, ...]
    """What is close to being hit now, the fullest first."""
    rising: tuple[Rising, ...]
    settings: tuple[Setting, ...]
    myths: tuple[Myth, ...]
    source_pool: MechanismChoice | None
    """How a SourcePool's sockets get their ports here, and why; None if this kernel's options were not tried."""
    unread: dict[str, str]
    """What could not be read, and why."""

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain JSON values; enums by their value."""
        plain: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return plain


def default_goals() -> tuple[Goal, ...]:
    """One goal per role, asking for the ceiling."""
    return tuple(Goal(role=role, destinations=DEFAULT_DESTINATIONS if role is Role.CLIENT_MANY else 1) for role in Role)


def diagnose(host: Host, goals: Sequence[Goal] | None = None, previous: Host | None = None) -> Diagnosis:
    """Examine a host for some goals (by default one per role); `previous` is an earlier sample, for rising counters."""
    roles = tuple(_role(host, goal) for goal in (default_goals() if goals is None else goals))
    pressures = _pressures(host)
    rising = () if previous is None else _rising(host, previous)
    reasons = [*_reasons(roles, pressures, rising)]
    critical = any(pressure.severity is Severity.CRITICAL for pressure in pressures)
    health = Health.CRITICAL if critical else Health.WARNING if reasons else Health.HEALTHY
    return Diagnosis(
        host=host.label,
        kernel=host.kernel.release,
        health=health,
        reasons=tuple(reasons),
        roles=roles,
        pressures=pressures,
        rising=rising,
        settings=_settings(host),
        myths=myths(host),
        source_pool=_source_pool(host),
        unread=dict(host.unread),
    )


def _role(host: Host, goal: Goal) -> RoleDiagnosis:
    by_kind: dict[Kind, list[Binding]] = {Kind.COUNT: [], Kind.RATE: [], Kind.SPEED: []}
    unknown, not_applicable = [], []
    for limit in LIMITS:
        if limit.bound is None:
            continue
        match limit.bound(host, goal):
            case Bound() as bound:
                by_kind[bound.kind].append(_binding(limit, bound))
            case Unknown(reason=reason):
                unknown.append(Without(limit=limit.id, name=limit.name, reason=reason))
            case NotApplicable(reason=reason):
                not_applicable.append(Without(limit=limit.id, name=limit.name, reason=reason))
    bounds = _ascending(by_kind[Kind.COUNT])
    return RoleDiagnosis(
        goal=goal,
        ceiling=bounds[0].connections if bounds else None,
        bounds=bounds,
        rates=_ascending(by_kind[Kind.RATE]),
        slowdowns=_ascending(by_kind[Kind.SPEED]),
        unknown=tuple(unknown),
        not_applicable=tuple(not_applicable),
    )


def _binding(limit: Limit, bound: Bound) -> Binding:
    remedy = bound.remedy or next(iter(limit.remedies), None)
    return Binding(
        limit=limit.id,
        name=limit.name,
        title=limit.title,
        scope=limit.scope.value,
        connections=bound.connections,
        may_reach=bound.may_reach,
        arithmetic=bound.arithmetic,
        evidence=limit.evidence.value,
        remedy=remedy.text if remedy else "",
        command=remedy.command if remedy else "",
    )


def _ascending(bindings: Iterable[Binding]) -> tuple[Binding, ...]:
    # Python's sort is stable: of two equal numbers the one earlier in the catalogue is named first.
    return tuple(sorted(bindings, key=lambda binding: binding.connections))


def _pressures(host: Host) -> tuple[Pressure, ...]:
    found = [
        pressure
        for limit in LIMITS
        if limit.usage is not None
        for usage in limit.usage(host)
        if (pressure := _pressure(limit, usage)) is not None
    ]
    return tuple(sorted(found, key=lambda pressure: (-pressure.percent, pressure.limit)))


def _pressure(limit: Limit, usage: Usage) -> Pressure | None:
    # A limit of nothing with nothing used is no pressure; with anything used it is full.
    percent = 100 * usage.used // usage.of if usage.of > 0 else (100 if usage.used > 0 else 0)
    if percent < NOTICE_PERCENT:
        return None
    severity = Severity.NOTICE
    if usage.breaks and percent >= WARNING_PERCENT:
        severity = Severity.CRITICAL if percent >= CRITICAL_PERCENT else Severity.WARNING
    subject = f"{usage.subject}: " if usage.subject else ""
    return Pressure(
        limit=limit.id,
        name=limit.name,
        severity=severity,
        used=usage.used,
        of=usage.of,
        unit=usage.unit,
        subject=usage.subject,
        percent=percent,
        text=f"{subject}{usage.used:,} of {usage.of:,} {usage.unit} ({percent} %)",
    )


def _rising(host: Host, previous: Host) -> tuple[Rising, ...]:
    risen = []
    for name, now in sorted(host.counters.items()):
        by = now - previous.counters.get(name, now)
        limits = suspects_by_counter(name)
        if by > 0 and limits:
            breaks = any(hit.breaks for limit in limits for hit in limit.hit if hit.counter == name)
            risen.append(Rising(counter=name, by=by, breaks=breaks, limits=tuple(limit.name for limit in limits)))
    return tuple(risen)


def _settings(host: Host) -> tuple[Setting, ...]:
    return tuple(
        Setting(
            limit=limit.id,
            name=limit.name,
            setting=check.setting,
            found=check.found,
            wanted=check.wanted,
            meaning=check.meaning,
        )
        for limit in LIMITS
        if limit.check is not None and (check := limit.check(host)) is not None and not check.holds
    )


def _source_pool(host: Host) -> MechanismChoice | None:
    no_port, port_range = (host.features.get(name) for name in ("bind_address_no_port", "local_port_range"))
    if no_port is None or port_range is None:
        return None
    return choose_mechanism(
        bind_address_no_port=no_port,
        local_port_range=port_range,
        range_known=len(host.sysctl_ints("net.ipv4.ip_local_port_range")) == 2,
    )


def _reasons(roles: Iterable[RoleDiagnosis], pressures: Iterable[Pressure], rising: Iterable[Rising]) -> Iterable[str]:
    for pressure in pressures:
        if pressure.severity is not Severity.NOTICE:
            yield f"{pressure.name}: {pressure.text}"
    for role in roles:
        if role.short_by and role.goal.connections is not None:
            first = role.bounds[0]
            yield (
                f"{role.goal.role.value}: {role.goal.connections:,} connections wanted, "
                f"{first.name} allows {first.connections:,}"
            )
    for counter in rising:
        if counter.breaks:
            yield f"{counter.counter} rose by {counter.by:,}: {', '.join(counter.limits)}"


_ADAPTER: TypeAdapter[Diagnosis] = TypeAdapter(Diagnosis)
