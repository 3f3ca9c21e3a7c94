"""Twelve pieces of common advice, each held against one host: what is said, what is true here, which limit it is about.

Decides whether the advice would mislead on this host. Knows no ports or tables beyond what the catalogue's terms say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fourtuple.facts import Host
from fourtuple.limits._model import Unknown
from fourtuple.limits._terms import (
    HOST_LIMIT,
    OBSERVER_BYTES_PER_DESCRIPTOR,
    SOCKET_BYTES,
    TIME_WAIT_S,
    number,
    numbers,
    port_term,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Myth:
    """A piece of advice and what is true of it on this host."""

    advice: str
    truth: str
    limit: str
    """Name of the limit that it is about."""
    applies: bool
    """Whether following it here would mislead; if not, `truth` says why not, or what could not be read."""


def myths(host: Host) -> tuple[Myth, ...]:
    """All twelve, in the order of the catalogue."""
    return tuple(
        Myth(advice=advice, truth=truth, limit=limit, applies=applies)
        for advice, limit, judge in _MYTHS
        for applies, truth in (judge(host),)
    )


Judgement = tuple[bool, str]


def _ports(host: Host) -> str:
    term = port_term(host)
    return "the ports of the range" if isinstance(term, Unknown) else f"{term.size:,} ports"


def _source_option(host: Host) -> Judgement:
    if host.features.get("bind_address_no_port") is False:
        return True, f"binding first leaves {_ports(host)} for all destinations together, and this kernel has no option"
    return True, (
        f"binding without IP_BIND_ADDRESS_NO_PORT leaves {_ports(host)} for all destinations together instead of each"
    )


def _poison(host: Host) -> Judgement:
    term = port_term(host)
    if isinstance(term, Unknown):
        return (
            True,
            "a port that one program binds is closed to automatic choice for every program; the range is unread",
        )
    if term.poisoned:
        return (
            True,
            f"{term.poisoned.size:,} ports of the range are closed to every connect() because somebody bound them",
        )
    return (
        True,
        f"each port that a program binds is taken from all; none of the {term.range_size:,} is known to be, now",
    )


def _steady_cost(host: Host) -> Judgement:
    term = port_term(host)
    half = "half of the range" if isinstance(term, Unknown) else f"{(term.size + 1) // 2:,} connections per destination"
    if host.features.get("local_port_range_searches_all"):
        return (
            True,
            f"beyond {half} it costs some 60 times as much; IP_LOCAL_PORT_RANGE set to the same range cures it here",
        )
    if host.features.get("local_port_range"):
        return True, f"beyond {half} it costs some 60 times as much; only ports chosen one by one help on this kernel"
    return True, f"beyond {half} it costs some 60 times as much, and IP_LOCAL_PORT_RANGE is not known to work here"


def _widening_option(host: Host) -> Judgement:
    if host.features.get("local_port_range") is False:
        return False, "this kernel has no such option"
    bounds = numbers(host, "net.ipv4.ip_local_port_range", 2)
    inside = f"{bounds[0]} to {bounds[1]}" if bounds else "the sysctl range"
    return True, f"it only narrows: bounds outside {inside} are ignored without an error"


def _syn_backlog(host: Host) -> Judgement:
    cookies, queue = number(host, "net.ipv4.tcp_syncookies"), number(host, "net.core.somaxconn")
    if cookies == 0:
        return False, "tcp_syncookies is 0 here, so it does bound half-open connections"
    shown = "min(backlog, somaxconn)" if queue is None else f"min(backlog, {queue:,})"
    known = "" if cookies is not None else " where cookies are on (tcp_syncookies could not be read)"
    return True, f"half-open connections are bounded by {shown}{known}"


def _tcp_mem(host: Host) -> Judgement:
    pages = numbers(host, "net.ipv4.tcp_mem", 3)
    shown = f" ({HOST_LIMIT})" if pages is None else f" ({pages[2] * host.kernel.page_bytes:,} B here)"
    return (
        True,
        f"tcp_mem{shown} is for queued bytes; a million idle sockets take {SOCKET_BYTES:,} MB of slab beside it",
    )


def _fin_timeout(host: Host) -> Judgement:
    value = number(host, "net.ipv4.tcp_fin_timeout")
    shown = "" if value is None else f", {value} s here,"
    return True, f"tcp_fin_timeout{shown} is about FIN_WAIT_2; TIME_WAIT is {TIME_WAIT_S} s by compilation"


def _tw_recycle(host: Host) -> Judgement:
    value = number(host, "net.ipv4.tcp_tw_reuse")
    meaning = {0: "never", 1: "to every destination", 2: "over loopback only"}.get(value if value is not None else -1)
    if host.kernel.version < (4, 12) and len(host.kernel.version) > 1:
        return True, "it exists on this kernel and breaks clients behind NAT"
    reuse = "could not be read" if meaning is None else f"is {value} here: {meaning}"
    return True, f"it is gone since 4.12; tcp_tw_reuse {reuse}"


def _more_addresses(host: Host) -> Judgement:
    own = {address.address for address in host.addresses if address.interface != "lo" and not address.any_ip}
    shown = f"this host has {len(own)}; " if own else ""
    return True, f"{shown}an unbound connect() uses the one that its route prefers, so programs have to bind"


def _file_max(host: Host) -> Judgement:
    most, usage = number(host, "fs.file-max"), numbers(host, "fs.file-nr", 3)
    if most is None:
        return False, "fs.file-max could not be read"
    used = usage[0] if usage else 0
    shown = f"fs.file-max is {most:,}" + (f", {used:,} in use" if usage else "")
    if usage and used * 2 > most:
        return False, f"{shown}: here it does come near"
    soft = host.process.rlimits.get("NOFILE")
    binding = f"; RLIMIT_NOFILE binds at {soft.soft:,}" if soft is not None and soft.soft is not None else ""
    return True, f"{shown}{binding}"


def _visible(host: Host) -> Judgement:
    hidden = [
        name
        for name in (
            "net.ipv4.tcp_mem",
            "net.ipv4.tcp_max_orphans",
            "net.core.netdev_max_backlog",
            "net.ipv4.neigh.default.gc_thresh3",
        )
        if name not in host.sysctl
    ]
    if hidden:
        return True, f"not readable from here, and binding all the same: {', '.join(hidden)}"
    return False, "every host limit that a container hides could be read here"


def _monitoring(host: Host) -> Judgement:
    used = host.process.open_descriptors
    if used is None:
        return True, f"listing /proc/PID/fd makes about {OBSERVER_BYTES_PER_DESCRIPTOR} B of slab per descriptor"
    total = used * OBSERVER_BYTES_PER_DESCRIPTOR
    return (
        used >= 1_000,
        f"listing the {used:,} descriptors of process {host.process.pid} makes about {total:,} B of slab",
    )


_MYTHS: tuple[tuple[str, str, Callable[[Host], Judgement]], ...] = (
    ("Give the client a source address, and it has more ports", "exclusive-bind", _source_option),
    ("A program that binds its ports harms nobody else", "poisoned-ports", _poison),
    ("connect() costs the same until the ports run out", "port-parity", _steady_cost),
    ("IP_LOCAL_PORT_RANGE gives one socket a wider range", "socket-port-range", _widening_option),
    ("Raise tcp_max_syn_backlog for a longer SYN queue", "syn-backlog", _syn_backlog),
    ("Raise tcp_mem to hold a million idle connections", "tcp-buffer-memory", _tcp_mem),
    ("Lower tcp_fin_timeout to shorten TIME_WAIT", "fin-wait-2", _fin_timeout),
    ("Set tcp_tw_recycle to get rid of TIME_WAIT", "time-wait", _tw_recycle),
    ("Add addresses to the interface, and there are more ports", "route-source", _more_addresses),
    ("Raise fs.file-max first", "files-on-host", _file_max),
    ("What cannot be seen in the container does not bind it", "sockstat-scope", _visible),
    ("Monitoring costs nothing", "observer-memory", _monitoring),
)
