"""The sockets of this network namespace, aggregated while the kernel's dump is read: states, listeners, flows.

Decides what is kept of a socket: nothing but counts, so that memory is bounded whatever the host holds. Knows no limit.
A dump is not a snapshot: sockets move while it runs, so expect an error of about 0.1 % under load (catalogue L5).
"""

from __future__ import annotations

import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from heapq import nlargest
from ipaddress import IPv4Address, IPv6Address

from fourtuple.facts import Flow, Listener
from fourtuple.host.netlink import SOCK_DIAG, dump
from fourtuple.tuples import Endpoint

MOST_SOCKETS = 200_000
"""At 0.8 us of kernel time and as much of ours for each, more would not fit the second that the doctor
has."""
MOST_FLOWS_COUNTED, MOST_FLOWS, MOST_LISTENERS = 65_536, 64, 4_096

_DIAG_BY_FAMILY = 20
_REQUEST = struct.Struct("=BBBBI48x")
_MESSAGE_BYTES = 72
_STATES = (
    "",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "BOUND_INACTIVE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "SYN_RECV",
)
"""By number in include/net/tcp_states.h, but for 7: a closed socket appears in a dump only as the answer to
BOUND_INACTIVE."""
_LISTEN_STATE, _BOUND_STATE, _TIME_WAIT_STATE = 10, 7, 6
_ALL_BUT_LISTEN = (1 << 14) - 2 & ~(1 << _LISTEN_STATE)
"""Bit 13, BOUND_INACTIVE, is heeded from 6.8 and ignored before."""


@dataclass(slots=True, kw_only=True)
class Census:
    """What one reading of all sockets gave."""

    by_state: Counter[str] = field(default_factory=Counter)
    flows: tuple[Flow, ...] = ()
    listeners: tuple[Listener, ...] = ()
    bound_ports: frozenset[int] = frozenset()
    """Local ports of listeners and of sockets that are bound and not connected: automatic choice skips them (A8)."""
    complete: bool = True
    flows_complete: bool = True
    listeners_complete: bool = True


def census(most_sockets: int = MOST_SOCKETS) -> Census:
    """Read the sockets of both families; stops after `most_sockets` and says so. OSError where sock_diag is refused."""
    result = Census()
    bound = _listeners(result)
    flows: Counter[bytes] = Counter()
    time_wait: Counter[bytes] = Counter()
    listening = frozenset(port.to_bytes(2, "big") for port in bound)
    states: Counter[int] = Counter()
    count = 0
    for family in (socket.AF_INET, socket.AF_INET6):
        if not result.complete:
            break
        for _, data, start, end in dump(SOCK_DIAG, _DIAG_BY_FAMILY, _request(family, _ALL_BUT_LISTEN)):
            if end - start < _MESSAGE_BYTES:
                continue
            # struct inet_diag_msg: family, state, 2 bytes, local port, remote port, local address, remote address.
            state = data[start + 1]
            states[state] += 1
            if state == _BOUND_STATE:
                bound.add(int.from_bytes(data[start + 4 : start + 6], "big"))
            elif data[start + 4 : start + 6] not in listening:
                # What shares its local port with a listener came in; its ports are the peer's to run out of.
                key = data[start + 6 : start + 40]
                if key in flows or len(flows) < MOST_FLOWS_COUNTED:
                    flows[key] += 1
                    if state == _TIME_WAIT_STATE:
                        time_wait[key] += 1
                else:
                    result.flows_complete = False
            count += 1
            if count >= most_sockets:
                result.complete = False
                break
    for state, sockets in states.items():
        result.by_state[_STATES[state] if state < len(_STATES) else str(state)] += sockets
    result.flows = _largest(flows, time_wait)
    result.bound_ports = frozenset(bound)
    return result


def udp_flows(most_sockets: int = MOST_SOCKETS) -> tuple[Flow, ...]:
    """The largest groups of connected UDP sockets, over the first `most_sockets`; none where sock_diag is refused."""
    flows: Counter[bytes] = Counter()
    count = 0
    try:
        for family in (socket.AF_INET, socket.AF_INET6):
            # The state of a connected UDP socket is TCP_ESTABLISHED, whatever else it is.
            for _, data, start, end in dump(SOCK_DIAG, _DIAG_BY_FAMILY, _request(family, 1 << 1, socket.IPPROTO_UDP)):
                key = data[start + 6 : start + 40]
                if end - start >= _MESSAGE_BYTES and (key in flows or len(flows) < MOST_FLOWS_COUNTED):
                    flows[key] += 1
                count += 1
                if count >= most_sockets:
                    return _largest(flows, Counter())
    except OSError:
        return ()
    return _largest(flows, Counter())


def sees_bound_sockets(port: int) -> bool:
    """Whether a dump shows the socket that the caller holds bound, not connected, to this port: so from 6.8."""
    return any(
        end - start >= _MESSAGE_BYTES and int.from_bytes(data[start + 4 : start + 6], "big") == port
        for _, data, start, end in dump(SOCK_DIAG, _DIAG_BY_FAMILY, _request(socket.AF_INET, 1 << 13))
    )


def _request(family: int, states: int, protocol: int = socket.IPPROTO_TCP) -> bytes:
    return _REQUEST.pack(family, protocol, 0, 0, states)


def _listeners(result: Census) -> set[int]:
    ports: set[int] = set()
    kept: list[Listener] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        for _, data, start, end in dump(SOCK_DIAG, _DIAG_BY_FAMILY, _request(family, 1 << _LISTEN_STATE)):
            if end - start < _MESSAGE_BYTES or data[start + 1] != _LISTEN_STATE:
                continue
            port = int.from_bytes(data[start + 4 : start + 6], "big")
            result.by_state["LISTEN"] += 1
            ports.add(port)
            if len(kept) < MOST_LISTENERS:
                # For a listener idiag_rqueue is its accept queue and idiag_wqueue that queue's limit
                # (tcp_diag_get_info).
                queue, backlog = struct.unpack_from("=II", data, start + 56)
                local = Endpoint(_address(family, data[start + 8 : start + 24]), port)
                kept.append(Listener(local=local, queue=queue, backlog=backlog))
            else:
                result.listeners_complete = False
    result.listeners = tuple(
        sorted(kept, key=lambda it: (it.local.port, it.local.address.version, it.local.address.packed))
    )
    return ports


def _largest(flows: Counter[bytes], time_wait: Counter[bytes]) -> tuple[Flow, ...]:
    # A connection of an IPv6 socket to a mapped address is an IPv4 connection: the two share tuples and are one flow.
    merged: Counter[tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address, int]] = Counter()
    waiting = merged.copy()
    for key, connections in nlargest(2 * MOST_FLOWS, flows.items(), key=lambda item: item[1]):
        port = int.from_bytes(key[:2], "big")
        if port:
            # A dump of IPv4 leaves the last 12 of the 16 bytes of an address zero.
            family = socket.AF_INET if not any(key[6:18]) and not any(key[22:34]) else socket.AF_INET6
            group = _address(family, key[2:18]), _address(family, key[18:34]), port
            merged[group] += connections
            waiting[group] += time_wait[key]
    return tuple(
        Flow(
            source=str(group[0]),
            destination=Endpoint(group[1], group[2]),
            connections=connections,
            time_wait=waiting[group],
        )
        for group, connections in merged.most_common(MOST_FLOWS)
    )


def _address(family: int, packed: bytes) -> IPv4Address | IPv6Address:
    if family == socket.AF_INET:
        return IPv4Address(packed[:4])
    address = IPv6Address(packed)
    return address.ipv4_mapped or address
