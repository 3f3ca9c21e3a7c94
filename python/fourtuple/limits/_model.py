"""The shape of a limit: what it bounds, how it is read, what is seen when it is hit, how to raise it.

Decides the vocabulary of the catalogue. Knows no host, no file and no number. The catalogue itself stands in the modules
beside this one, a family to a module; `fourtuple.limits.LIMITS` is the one tuple of all of them.
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
    `counter` for a counter in /proc/net/netstat and its kin (`TcpExt.ListenOverflows`). One of the three is set.
    """

    call: str = ""
    errno: str = ""
    log: str = ""
    counter: str = ""
    note: str = ""


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

    `connections` is a whole number of connections at once (for `Kind.RATE` limits: per second); `arithmetic` is the
    formula with this host's numbers in it, as a person would write it.
    """

    connections: int
    arithmetic: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How much of a limit is used now: `used` of `of`, both in `unit`."""

    used: int
    of: int
    unit: str


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
    bound: Callable[[Host, Goal], Bound | None] | None = field(default=None, repr=False)
    """Connections allowed for a goal on a host; None where it does not apply or could not be read."""
    usage: Callable[[Host], Usage | None] | None = field(default=None, repr=False)
    """Use now against the limit; None where it could not be read."""
