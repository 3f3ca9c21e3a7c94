"""The shape of a limit: what it bounds, how it is read, what is seen when it is hit, how to raise it.

Decides the vocabulary of the catalogue. Knows no host, no file and no number. The catalogue itself stands in the
modules beside this one, a family to a module; `fourtuple.limits.LIMITS` is the one tuple of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from fourtuple.facts import Goal, Host


class Scope(Enum):
    """Who shares the limit."""

    SOCKET = "socket"
    PROCESS = "process"
    USER = "user"
    CGROUP = "cgroup"
    NETNS = "network namespace"
    HOST = "host"
    PEER = "peer or network"


class Evidence(Enum):
    """How the claim is known. Only MEASURED and SOURCE may give a number to a diagnosis; the rest is advice."""

    MEASURED = "measured"
    SOURCE = "read in kernel source"
    DOCUMENTED = "documented"
    ADVICE = "general knowledge, not verified"

    @property
    def gives_numbers(self) -> bool:
        """Whether a diagnosis may rest on it."""
        return self in (Evidence.MEASURED, Evidence.SOURCE)


class Kind(Enum):
    """What the limit bounds."""

    COUNT = "connections at once"
    RATE = "connections per second"
    SPEED = "cost per connection"
    BEHAVIOUR = "behaviour"
    MEASUREMENT = "what can be seen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What is seen when the limit is hit.

    `call` and `errno` (a name such as EADDRNOTAVAIL) for an error, `log` for a kernel log line (a regular expression),
    `counter` for a counter in /proc/net/netstat and its kin (`TcpExt.ListenOverflows`). At most one of the three is
    set; with none, `note` describes a symptom that has no message.
    """

    call: str = ""
    errno: str = ""
    log: str = ""
    counter: str = ""
    note: str = ""
    breaks: bool = True
    """For a counter: whether it rises only where something fails."""
    rank: int = 50
    """Order among the limits that share the signature: the lower is the earlier suspect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One way past the limit: the exact command, where it is made to last, and what else it does."""

    text: str
    command: str = ""
    persist: str = ""
    risk: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """How many connections a limit allows in one role on one host.

    `connections` is a whole number: at once for `Kind.COUNT`, per second for `Kind.RATE`, and for `Kind.SPEED` the
    number beyond which each one costs more. `arithmetic` is the formula with this host's numbers in it, as a person
    would write it.
    """

    connections: int
    arithmetic: str
    may_reach: int | None = None
    """The largest number that may be reached, where the kernel's chance decides between `connections` and that."""
    kind: Kind = Kind.COUNT
    remedy: Remedy | None = None
    """The one to name first on this host, where the first in the catalogue would not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """The limit binds here, but its value cannot be read from here: never to be taken for "no limit"."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NotApplicable:
    """The limit does not bind this goal on this host, and why."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How much of a limit is used now: `used` of `of`, both in `unit`; `subject` says whose, if there are several."""

    used: int
    of: int
    unit: str
    subject: str = ""
    breaks: bool = True
    """Whether something fails when it is full; if not, being full is no more than a notice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A setting against the value it should have: `meaning` says what the value found does here."""

    setting: str
    found: str
    wanted: str
    holds: bool
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One entry of the catalogue. Its fields are its page."""

    id: str
    """Catalogue number, such as A2."""
    name: str
    """Short name in the field's terms, unique, such as ephemeral-ports: what a finding, a plan and an error call it."""
    title: str
    scope: Scope
    kind: Kind
    evidence: Evidence
    why: str
    """What it is and why it bounds: the first paragraph of its page."""
    read: tuple[str, ...]
    """Where its value is read: files, sysctls, calls."""
    default: str
    formula: str
    """From the value to connections."""
    bounds: str
    """What it bounds, role by role, in a sentence."""
    hit: tuple[Signature, ...]
    remedies: tuple[Remedy, ...]
    since: str
    side_effects: str
    sources: tuple[str, ...]
    bound: Callable[[Host, Goal], Bound | Unknown | NotApplicable] | None = field(default=None, repr=False)
    """Connections allowed for a goal on a host."""
    usage: Callable[[Host], tuple[Usage, ...]] | None = field(default=None, repr=False)
    """Use now against the limit, the fullest first; empty where it could not be read."""
    check: Callable[[Host], Check | None] | None = field(default=None, repr=False)
    """A setting that this limit wants otherwise or finds in order; None where it could not be read."""


SYSCTL_FILE = "/etc/sysctl.d/60-fourtuple.conf, then sysctl --system"
"""Where a sysctl is made to last."""


def error(call: str, errno: str, note: str = "", rank: int = 50) -> Signature:
    """A system call that fails."""
    return Signature(call=call, errno=errno, note=note, rank=rank)


def log(pattern: str, note: str = "", rank: int = 50) -> Signature:
    """A line in the kernel log, as a regular expression."""
    return Signature(log=pattern, note=note, rank=rank)


def counter(name: str, note: str = "", rank: int = 50, *, breaks: bool = True) -> Signature:
    """A counter that rises."""
    return Signature(counter=name, note=note, rank=rank, breaks=breaks)


def symptom(note: str) -> Signature:
    """Something seen that has neither errno, log line nor counter."""
    return Signature(note=note)


def set_sysctl(name: str, value: str, text: str, risk: str = "") -> Remedy:
    """A remedy that is one sysctl."""
    quoted = f'"{value}"' if " " in value else value
    return Remedy(text=text, command=f"sysctl -w {name}={quoted}", persist=SYSCTL_FILE, risk=risk)


def in_program(text: str, risk: str = "") -> Remedy:
    """A remedy that lies in the program, or in how the network is laid out: no command of the host does it."""
    return Remedy(text=text, risk=risk)
