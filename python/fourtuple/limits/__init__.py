"""The catalogue of what bounds TCP connections on Linux: one tuple, `LIMITS`, and the ways to look things up in it.

Decides the order of the catalogue and how an error, a log line or a counter leads to its suspects. Knows no host: what
a limit means for one is the answer of its own functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fourtuple.limits import (
    closing,
    files,
    hashing,
    measurement,
    memory,
    netfilter,
    packets,
    ports,
    processes,
    queues,
    routing,
    subsystems,
)
from fourtuple.limits._model import (
    Bound,
    Check,
    Evidence,
    Kind,
    Limit,
    NotApplicable,
    Remedy,
    Scope,
    Signature,
    Unknown,
    Usage,
)

FAMILIES = (
    ("A", "Four-tuple and port selection", ports),
    ("B", "Descriptors and handles", files),
    ("C", "Memory", memory),
    ("D", "Into a server: the accept path", queues),
    ("E", "Orphans, closing, keepalive", closing),
    ("F", "Hash tables and locks", hashing),
    ("G", "Netfilter, NAT, datapaths, clouds", netfilter),
    ("H", "Routing and neighbours", routing),
    ("I", "Packet path and rate", packets),
    ("J", "Processes and threads", processes),
    ("K", "Other subsystems", subsystems),
    ("L", "Measurement", measurement),
)
"""Letter, title and module of each family, in the catalogue's order."""

LIMITS: tuple[Limit, ...] = tuple(limit for _, _, family in FAMILIES for limit in family.LIMITS)

_BY_KEY = {key: limit for limit in LIMITS for key in (limit.id.lower(), limit.name)}
_SAME_CALL = {
    "accept4": "accept",
    "epoll_create1": "epoll_create",
    "fork": "clone",
    "clone3": "clone",
    "vfork": "clone",
}
_SAME_CALL |= {"dup2": "dup", "dup3": "dup", "prlimit": "setrlimit", "inotify_init1": "inotify_init"}


def by_name(name: str) -> Limit | None:
    """The limit of this name or catalogue number; None if there is none."""
    return _BY_KEY.get(name.strip().lower())


def by_errno(errno: str) -> tuple[Limit, ...]:
    """The limits that give this error (EADDRNOTAVAIL) to any call, first suspect first."""
    return suspects("", errno)


def suspects(call: str, errno: str) -> tuple[Limit, ...]:
    """The limits that make `call` fail with `errno`, first suspect first; "" is any call."""
    wanted, name = errno.strip().upper(), call.strip().lower()
    name = _SAME_CALL.get(name, name)
    return _in_order(
        (signature.rank, limit)
        for limit in LIMITS
        for signature in limit.hit
        if signature.errno and signature.errno == wanted and name in ("", signature.call)
    )


def suspects_by_log(line: str) -> tuple[Limit, ...]:
    """The limits that write this line into the kernel log, first suspect first."""
    return _in_order(
        (signature.rank, limit)
        for limit in LIMITS
        for signature in limit.hit
        if signature.log and re.search(signature.log, line)
    )


def suspects_by_counter(name: str) -> tuple[Limit, ...]:
    """The limits that make this counter rise (TcpExt.ListenOverflows, or without its group), first suspect first."""
    return _in_order(
        (signature.rank, limit)
        for limit in LIMITS
        for signature in limit.hit
        if signature.counter and name in (signature.counter, signature.counter.partition(".")[2])
    )


def _in_order(found: Iterable[tuple[int, Limit]]) -> tuple[Limit, ...]:
    # The sort is stable, so equal ranks stay in the catalogue's order; a limit counts by its best rank.
    ranked = sorted(found, key=lambda one: one[0])
    return tuple({limit.id: limit for _, limit in ranked}.values())


__all__ = [
    "FAMILIES",
    "LIMITS",
    "Bound",
    "Check",
    "Evidence",
    "Kind",
    "Limit",
    "NotApplicable",
    "Remedy",
    "Scope",
    "Signature",
    "Unknown",
    "Usage",
    "by_errno",
    "by_name",
    "suspects",
    "suspects_by_counter",
    "suspects_by_log",
]
