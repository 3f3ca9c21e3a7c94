"""What the kernel can do for a socket that is to use a chosen tuple, and what that makes of each port number.

Decides by trying options on a socket, never by the kernel's version: distributions backport; which mechanism is right
is `sources.choose_mechanism`. Reads the settings of this network namespace once per pool. Knows no client library.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from weakref import WeakKeyDictionary, WeakSet

from fourtuple.sources import Mechanism, MechanismChoice, SourcePool, choose_mechanism
from fourtuple.tuples import ALL_PORTS, PortSet

BIND_ADDRESS_NO_PORT, LOCAL_PORT_RANGE = 24, 51
"""Options of IPPROTO_IP that Python 3.11 does not name (include/uapi/linux/in.h)."""
FREEBIND = 78
"""IPV6_FREEBIND: bind() to an address that only a route makes local (A17)."""
TIME_WAIT_S = 60.0
"""TCP_TIMEWAIT_LEN, fixed when the kernel is compiled (include/net/tcp.h)."""
_REUSE_DELAY_MS = 1_000
"""Of TIME_WAIT, where net.ipv4.tcp_tw_reuse_delay does not exist (before 6.14)."""
_CLOSING_S = 0.05
"""TIME_WAIT begins when the peer has closed as well, a round trip after our close()."""
_SETTINGS = Path("/proc/sys/net/ipv4")
_ROUTES = Path("/proc/thread-self/net/ipv6_route")
_RTF_LOCAL = 0x8000_0000
_ON = struct.pack("=i", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What was tried and read, for one pool."""

    mechanisms: tuple[Mechanism, ...]
    """By port number, for TCP."""
    reuse: int
    """net.ipv4.tcp_tw_reuse: 0, 1, or 2 for loopback alone."""
    reuse_delay_s: float
    timestamps: bool

    def rest_s(self, mechanism: Mechanism, source: str, destination: str) -> float:
        """How long a tuple that this side closed first cannot be had again (tcp_twsk_unique)."""
        if not self.timestamps:
            return TIME_WAIT_S
        if mechanism is Mechanism.BIND:
            return 0.0  # a socket with a port of its own may take over a TIME_WAIT at once (A10)
        loopback = any(end.startswith("127.") or end == "::1" for end in (source, destination))
        return self.reuse_delay_s if self.reuse == 1 or (self.reuse == 2 and loopback) else TIME_WAIT_S


def kernel_for(pool: SourcePool) -> Kernel:
    """The kernel as this pool meets it; tried and read when the pool is first used."""
    known = _KNOWN.get(pool)
    if known is None:
        known = _KNOWN[pool] = _examine(pool)
    return known


def look_again(pool: SourcePool) -> None:
    """Forget what was read: the settings were changed."""
    _KNOWN.pop(pool, None)


def has_route_alone(address: str) -> bool:
    """Whether an IPv6 address is local by a route, without being any interface's: then bind() asks for FREEBIND.

    Without such a route FREEBIND would let a socket have any address of the world, and no answer would ever arrive.
    """
    number = int(IPv6Address(address))
    try:
        lines = _ROUTES.read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        # destination and its prefix length, source and its, next hop, metric, users, uses, flags (rt6_seq_show)
        fields = line.split()
        length, flags = int(fields[1], 16), int(fields[8], 16)
        if flags & _RTF_LOCAL and (number ^ int(fields[0], 16)) >> (128 - length) == 0:
            return True
    return False


def automatic_ports() -> PortSet:
    """The ports of this network namespace that automatic choice takes from, as a pool may use them all.

    OSError if the settings cannot be read.
    """
    return PortSet.parse(_range()).subtract(_reserved())


_KNOWN: WeakKeyDictionary[SourcePool, Kernel] = WeakKeyDictionary()
NEED_FREEBIND: WeakSet[SourcePool] = WeakSet()
"""Pools with an address that `has_route_alone`."""


def _examine(pool: SourcePool) -> Kernel:
    try:
        automatic = automatic_ports()
    except OSError:
        automatic = None
    choice = choose_mechanism(
        bind_address_no_port=_accepts(BIND_ADDRESS_NO_PORT, _ON),
        local_port_range=_accepts(LOCAL_PORT_RANGE, bytes(4)),
        range_known=automatic is not None,
        wanted=pool.mechanism,
    )
    return Kernel(
        # Where it is not known which ports are inside: as if all were.
        mechanisms=_mechanisms(choice, ALL_PORTS if automatic is None else automatic),
        reuse=_number("tcp_tw_reuse", 0),
        reuse_delay_s=_number("tcp_tw_reuse_delay", _REUSE_DELAY_MS) / 1_000 + _CLOSING_S,
        timestamps=_number("tcp_timestamps", 0) != 0,
    )


def _mechanisms(choice: MechanismChoice, automatic: PortSet) -> tuple[Mechanism, ...]:
    """One for each port number."""
    table = [choice.outside] * 65_536
    for first, last in automatic.runs:
        table[first : last + 1] = [choice.inside] * (last - first + 1)
    return tuple(table)


def _accepts(option: int, value: bytes) -> bool:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.IPPROTO_IP, option, value)
    except OSError:
        return False
    return True


def _range() -> str:
    return "-".join((_SETTINGS / "ip_local_port_range").read_text().split())


def _reserved() -> PortSet:
    text = (_SETTINGS / "ip_local_reserved_ports").read_text().strip()
    return PortSet.parse(text) if text else PortSet()


def _number(setting: str, otherwise: int) -> int:
    try:
        return int((_SETTINGS / setting).read_text())
    except (OSError, ValueError):
        return otherwise
