"""The arithmetic that several families share: the port term, numbers out of sysctl text, how a role counts its sockets.

Decides how a raw fact becomes a number, and that one which makes no sense becomes `Unknown`. Knows no single limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fourtuple.errors import BadConfig
from fourtuple.facts import Goal, Host, Role
from fourtuple.limits._model import Bound, Check, NotApplicable, Unknown
from fourtuple.tuples import HIGHEST_PORT, PortSet

Answer = Bound | Unknown | NotApplicable

PORT_RANGE = "net.ipv4.ip_local_port_range"
RESERVED_PORTS = "net.ipv4.ip_local_reserved_ports"
HIGHEST_NUMBER = 2**64
"""The kernel has no wider counters; what is larger is damage in a file."""

MEMORY_SHARE_PERCENT = 80
"""Of the available memory, what connections may take; the rest is for packets, page tables and other programs."""
SOCKET_BYTES = 3_750
"""Kernel memory of an idle TCP socket with its descriptor: 7,473 B per loopback pair measured on 6.18 (C1)."""
EPOLL_BYTES = 200
"""An epoll item with its wait entry (C1)."""
IPV6_BYTES = 130
"""What a TCPv6 structure is larger by (A19)."""

TIME_WAIT_S = 60
"""TCP_TIMEWAIT_LEN in include/net/tcp.h: fixed when the kernel is compiled."""
OBSERVER_BYTES_PER_DESCRIPTOR = 900
"""Slab that listing one entry of /proc/PID/fd makes (L3)."""

NAT_HAS_NO_SOCKETS = NotApplicable(reason="a NAT box holds table entries, not sockets")
SERVER_HAS_NO_PORT_TERM = NotApplicable(reason="each client brings its own address and port")


def number(host: Host, name: str) -> int | None:
    """A one-number sysctl that a kernel can hold; None if it was not read, is negative or is no number."""
    value = host.sysctl_int(name)
    return value if value is not None and 0 <= value <= HIGHEST_NUMBER else None


def numbers(host: Host, name: str, count: int) -> tuple[int, ...] | None:
    """A sysctl of exactly `count` numbers; None if it is anything else."""
    values = host.sysctl_ints(name)
    return values if len(values) == count and all(0 <= value <= HIGHEST_NUMBER for value in values) else None


def unread(host: Host, name: str, scope: str = "") -> Unknown:
    """Why a value is missing: the reader's reason, what the text says, or that the file is absent."""
    where = f"; {scope}" if scope else ""
    if name in host.unread:
        return Unknown(reason=f"{name} could not be read: {host.unread[name]}{where}")
    if name in host.sysctl:
        return Unknown(reason=f"{name} reads {host.sysctl[name][:60]!r}, which is not a value it can have{where}")
    return Unknown(reason=f"{name} is absent from here{where}")


HOST_LIMIT = "a host limit that binds all the same, value unknown from here"
"""Catalogue section 5: in a child network namespace the file is missing, the limit is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortTerm:
    """The usable source ports of one source address, and how they are counted."""

    low: int
    high: int
    reserved: int
    poisoned: PortSet
    ports: PortSet
    """Those that automatic choice can take."""
    searches_all: bool
    """Whether the search looks at each port, also of an odd range."""

    @property
    def range_size(self) -> int:
        """Ports of the range, whatever holds them."""
        return self.high - self.low + 1

    @property
    def size(self) -> int:
        """What is certain to be reached."""
        return self.ports.size - self.may_miss(self.ports)

    @property
    def arithmetic(self) -> str:
        """How `size` comes about."""
        text = f"{self.range_text} - {self.poisoned.size:,} poisoned{self.missing_text(self.ports)}"
        return f"{text} = {self.size:,} ports"

    @property
    def range_text(self) -> str:
        """The range less what is reserved."""
        return f"{self.high} - {self.low} + 1 - {self.reserved:,} reserved"

    def missing_text(self, ports: PortSet) -> str:
        """ "- 1" and why, or nothing."""
        return " - 1 that an odd range may miss" if self.may_miss(ports) else ""

    def may_miss(self, ports: PortSet) -> int:
        """1 where a search for these ports may or may not find the last of them.

        __inet_hash_connect() and inet_csk_find_open_port() round the number of ports to scan down to even. From an
        offset that is random each time they then pass over the lowest port, or over the highest, and over no other.
        """
        odd = self.range_size > 1 and self.range_size % 2 == 1 and not self.searches_all
        return int(odd and (self.low in ports or self.high in ports))


def port_term(host: Host, *, searches_all: bool = False) -> PortTerm | Unknown:
    """The range less reserved and poisoned ports (catalogue section 1).

    `searches_all`: for sockets with IP_LOCAL_PORT_RANGE, which from 6.8 are given every port of it.
    """
    bounds = numbers(host, PORT_RANGE, 2)
    if bounds is None or not 0 <= bounds[0] <= bounds[1] <= HIGHEST_PORT or bounds[1] == 0:
        return unread(host, PORT_RANGE)
    # Port 0 is never usable, whatever the range says.
    low, high = max(bounds[0], 1), bounds[1]
    everything = PortSet(runs=((low, high),))
    reserved = everything.intersect(_reserved(host))
    poisoned = everything.intersect(_poisoned(host)).subtract(reserved)
    usable = everything.subtract(reserved).subtract(poisoned)
    misses_none = searches_all and host.features.get("local_port_range_searches_all", False)
    return PortTerm(
        low=low,
        high=high,
        reserved=reserved.size,
        poisoned=poisoned,
        ports=usable,
        searches_all=misses_none,
    )


def _reserved(host: Host) -> PortSet:
    text = host.sysctl.get(RESERVED_PORTS, "").strip()
    try:
        return PortSet.parse(text) if text else PortSet()
    except BadConfig:
        return PortSet()


def _poisoned(host: Host) -> PortSet:
    probed = tuple((max(first, 1), min(last, HIGHEST_PORT)) for first, last in host.poisoned_ports or ())
    listening = tuple((listener.local.port, listener.local.port) for listener in host.listeners)
    return PortSet(runs=tuple((first, last) for first, last in probed + listening if first <= last))


def is_client(goal: Goal) -> bool:
    """Whether the role takes source ports of this host: clients and the outgoing side of a proxy."""
    return goal.role in (Role.CLIENT_ONE, Role.CLIENT_MANY, Role.PROXY)


def no_source_ports(goal: Goal) -> NotApplicable:
    """Why a role that is not `is_client` has no port term."""
    return SERVER_HAS_NO_PORT_TERM if goal.role is Role.SERVER else NotApplicable(reason="no source ports of its own")


def sockets_per_connection(goal: Goal) -> int:
    """A proxied connection is two (catalogue section 1)."""
    return 2 if goal.role is Role.PROXY else 1


def destinations(goal: Goal) -> int:
    """Distinct destinations; a client to one has one, whatever the goal says."""
    return 1 if goal.role is Role.CLIENT_ONE else goal.destinations


def count(amount: int, singular: str, plural: str = "") -> str:
    """ "1 source", "3 sources"."""
    return f"{amount:,} {singular if amount == 1 else plural or singular + 's'}"


def tuple_product(goal: Goal, ports: int, arithmetic: str, may_find: int = 0) -> Bound:
    """S x P x D, written out; `may_find` ports more are found or not, as it happens."""
    pairs = goal.sources * destinations(goal)
    total, most = ports * pairs, (ports + may_find) * pairs
    factors = f"{arithmetic} x {count(goal.sources, 'source')}"
    if destinations(goal) != 1:
        factors += f" x {count(destinations(goal), 'destination')}"
    return Bound(
        connections=total,
        may_reach=most if most > total else None,
        arithmetic=f"{factors} = {total:,}" + (f" to {most:,}" if most > total else ""),
    )


def divided(total: int, each: int, total_text: str, each_text: str) -> Bound:
    """A resource divided by what one connection takes of it; negative remainders count as nothing left."""
    connections = max(0, total) // each
    if each == 1:
        return Bound(connections=connections, arithmetic=f"{total_text} = {connections:,}")
    return Bound(connections=connections, arithmetic=f"({total_text}) / {each_text} = {connections:,}")


def queued_bytes(goal: Goal, page_bytes: int = 4_096) -> int:
    """What the queued bytes of one socket are charged: a quarter of overhead more, in whole pages.

    Measured on 6.18, in segments of 1,460 B: 16 KiB unread take 5 pages, 4 KiB take 2 (__sk_mem_schedule()).
    """
    page_bytes = page_bytes or 4_096
    return -(-(goal.bytes_queued * 5 // 4) // page_bytes) * page_bytes


def bytes_per_connection(goal: Goal) -> tuple[int, str]:
    """Kernel and user memory of one connection, and how it adds up."""
    sockets = sockets_per_connection(goal)
    kernel = SOCKET_BYTES + (EPOLL_BYTES if goal.uses_epoll else 0) + (IPV6_BYTES if goal.ipv6 else 0)
    parts = [f"{SOCKET_BYTES:,} B socket"]
    if goal.uses_epoll:
        parts.append(f"{EPOLL_BYTES} B epoll")
    if goal.ipv6:
        parts.append(f"{IPV6_BYTES} B IPv6")
    if goal.bytes_queued:
        kernel += queued_bytes(goal)
        parts.append(f"{queued_bytes(goal):,} B queued")
    text = " + ".join(parts)
    if sockets > 1:
        text = f"{sockets} x ({text})"
    if goal.user_bytes:
        text += f" + {goal.user_bytes:,} B of the program"
    return kernel * sockets + goal.user_bytes, f"({text})"


def at_least(name: str, wanted: int, meaning: str) -> Callable[[Host], Check | None]:
    """A check that a sysctl is no lower than wanted."""
    return _compare(name, f">= {wanted:,}", meaning, lambda value: value >= wanted)


def at_most(name: str, wanted: int, meaning: str) -> Callable[[Host], Check | None]:
    """A check that a sysctl is no higher than wanted."""
    return _compare(name, f"<= {wanted:,}", meaning, lambda value: value <= wanted)


def equals(name: str, wanted: int, meaning: str) -> Callable[[Host], Check | None]:
    """A check that a sysctl has one value."""
    return _compare(name, f"{wanted}", meaning, lambda value: value == wanted)


def _compare(name: str, wanted: str, meaning: str, holds: Callable[[int], bool]) -> Callable[[Host], Check | None]:
    def check(host: Host) -> Check | None:
        value = number(host, name)
        if value is None:
            return None
        return Check(setting=name, found=f"{value:,}", wanted=wanted, holds=holds(value), meaning=meaning)

    return check
