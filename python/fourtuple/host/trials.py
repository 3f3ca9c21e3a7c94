"""What can only be found out by trying: socket options, io_uring, and which ports automatic choice skips.

Decides by what the kernel answers, never by its version: distributions backport. Nothing here sends a packet or
outlasts the call: the sockets are closed before it returns, and none of them ever was connected.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from errno import EADDRNOTAVAIL, ENOSYS, EPERM

from fourtuple.facts import IoUring
from fourtuple.host import sockdiag
from fourtuple.host.tree import reason

BIND_ADDRESS_NO_PORT, LOCAL_PORT_RANGE = 24, 51
"""Options of IPPROTO_IP that Python 3.11 does not name (include/uapi/linux/in.h)."""
_TCP_FASTOPEN_CONNECT, _TCP_FASTOPEN_NO_COOKIE = 30, 34
_IPV6_FREEBIND = 78

_NOWHERE = struct.pack("=HH4s8x", socket.AF_INET, socket.htons(1), socket.inet_aton("127.84.117.112"))
"""A loopback destination that nobody uses. No packet is ever sent to it."""
_UNSPECIFIED = struct.pack("=H14x", socket.AF_UNSPEC)
_PROBE_SECONDS = 1.5
"""Ten times what it takes on a quiet machine: on a busy one a whole answer late beats half of one."""
_PORTS_PER_CLOCK_LOOK = 1_024

_IO_URING_SETUP, _IO_URING_REGISTER = 425, 427
"""The same numbers on every architecture (asm-generic/unistd.h)."""
_REGISTER_PROBE, _PROBE_OPERATIONS = 8, 64
_OPERATION_SOCKET, _OPERATION_SEND_ZEROCOPY = 45, 47

_libc = ctypes.CDLL(None, use_errno=True)


def read_features(free_ports: Iterable[int] | None) -> dict[str, bool]:
    """Which features this kernel has; those that need free ports are left out where no port is known to be free."""
    features = {
        "bind_address_no_port": _accepts(socket.AF_INET, socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, struct.pack("=i", 1)),
        "local_port_range": _accepts(socket.AF_INET, socket.IPPROTO_IP, LOCAL_PORT_RANGE, bytes(4)),
        "ipv6": _accepts(socket.AF_INET6, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, struct.pack("=i", 1)),
        "ipv6_freebind": _accepts(socket.AF_INET6, socket.IPPROTO_IPV6, _IPV6_FREEBIND, struct.pack("=i", 1)),
    }
    for name, trial in (
        ("bound_inactive", _shows_bound_sockets),
        ("local_port_range_searches_all", lambda: _searches_every_port(free_ports or ())),
    ):
        result = trial()
        if result is not None:
            features[name] = result
    return features


def read_io_uring() -> IoUring:
    """Whether io_uring can be set up by this process, and which of its operations there are."""
    parameters = (ctypes.c_char * 120)()
    ring = _libc.syscall(_IO_URING_SETUP, 2, parameters)
    if ring < 0:
        error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        why = {
            EPERM: "refused: kernel.io_uring_disabled, or a seccomp filter of the container",
            ENOSYS: "this kernel has none, or a seccomp filter hides it",
        }
        return IoUring(available=False, reason=why.get(error.errno or 0) or f"io_uring_setup: {error.strerror}")
    try:
        probe = (ctypes.c_ubyte * (16 + 8 * _PROBE_OPERATIONS))()
        if _libc.syscall(_IO_URING_REGISTER, ring, _REGISTER_PROBE, probe, _PROBE_OPERATIONS) < 0:
            return IoUring(available=True, reason="its operations could not be listed (before 5.6)")
        # struct io_uring_probe: last operation, length, then {operation, -, flags, -}. IORING_OP_SOCKET came with 5.19
        # as did allocation of direct descriptors by the kernel; IORING_OP_SEND_ZC with 6.0 as did multishot receive.
        last = probe[0]
        return IoUring(
            available=True,
            direct_descriptors=last >= _OPERATION_SOCKET,
            multishot=last >= _OPERATION_SEND_ZEROCOPY,
        )
    finally:
        os.close(ring)


def poisoned_ports(ports: Iterable[int]) -> tuple[frozenset[int], str]:
    """The ports that automatic choice skips (A8), and why not all were tried ("" if they were).

    IP_LOCAL_PORT_RANGE [p, p] leaves the kernel one port to choose, and it refuses with EADDRNOTAVAIL if p is poisoned.
    TCP_FASTOPEN_CONNECT puts the SYN off until there is data (tcp_fastopen_defer_connect), and there never is: the port
    is looked up and taken as for any connection, then given back by connect(AF_UNSPEC), and not one packet leaves. One
    socket does for all: 28,232 ports in 0.09 s.
    """
    blocked: set[int] = set()
    deadline = time.monotonic() + _PROBE_SECONDS
    try:
        with _deferring_socket() as probe:
            descriptor = probe.fileno()
            for count, port in enumerate(ports):
                if count % _PORTS_PER_CLOCK_LOOK == 0 and time.monotonic() > deadline:
                    return frozenset(blocked), f"only the first {count:,} ports were tried in {_PROBE_SECONDS} s"
                probe.setsockopt(socket.IPPROTO_IP, LOCAL_PORT_RANGE, _only(port, port))
                if _libc.connect(descriptor, _NOWHERE, len(_NOWHERE)) == 0:
                    _libc.connect(descriptor, _UNSPECIFIED, len(_UNSPECIFIED))
                elif (number := ctypes.get_errno()) == EADDRNOTAVAIL:
                    blocked.add(port)
                else:
                    return frozenset(), f"connect() on loopback: {os.strerror(number)}"
    except OSError as error:
        return frozenset(), f"not to be probed on this kernel: {reason(error)}"
    return frozenset(blocked), ""


def _deferring_socket() -> socket.socket:
    probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Should a kernel not put the SYN off after all, connect() says so at once and does not wait for an answer.
        probe.setblocking(False)
        probe.setsockopt(socket.IPPROTO_TCP, _TCP_FASTOPEN_CONNECT, 1)
        probe.setsockopt(socket.IPPROTO_TCP, _TCP_FASTOPEN_NO_COOKIE, 1)
    except OSError:
        probe.close()
        raise
    return probe


def _only(low: int, high: int) -> bytes:
    return struct.pack("=I", high << 16 | low)


def _accepts(family: int, level: int, option: int, value: bytes) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(level, option, value)
    except OSError:
        return False
    return True


def _shows_bound_sockets() -> bool | None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as bound:
            bound.bind(("127.0.0.1", 0))
            return sockdiag.sees_bound_sockets(bound.getsockname()[1])
    except OSError:
        return None


def _searches_every_port(free_ports: Iterable[int]) -> bool | None:
    """Whether a range of three ports serves three connections. Before 6.8 the search rounds an odd range down to
    even."""
    low = next(_runs_of_three(free_ports), None)
    if low is None:
        return None
    try:
        with ExitStack() as held:
            for _ in range(3):
                one = held.enter_context(_deferring_socket())
                one.setsockopt(socket.IPPROTO_IP, LOCAL_PORT_RANGE, _only(low, low + 2))
                if _libc.connect(one.fileno(), _NOWHERE, len(_NOWHERE)) != 0:
                    return False if ctypes.get_errno() == EADDRNOTAVAIL else None
    except OSError:
        return None
    return True


def _runs_of_three(ports: Iterable[int]) -> Iterator[int]:
    run: list[int] = []
    for port in ports:
        run = [*run[-2:], port]
        if len(run) == 3 and run[2] - run[0] == 2:
            yield run[0]
