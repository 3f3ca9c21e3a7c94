"""Whether processes hold connections of clients: sockets that a broker handed over, which only they know of.

Decides which of a process's sockets are a client's: TCP, not ended, and with a listener's port as its local one; what a
service has connected to itself is none. A socket is borrowed (pidfd_getfd(2)) and asked; where that is forbidden, the
kernel's list of connections is compared with the process's descriptors.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from errno import ENOSYS, EPERM
from pathlib import Path

from fourtuple.errors import MissingPrivilege
from fourtuple.host.netlink import SOCK_DIAG, dump

_GETFD = 438
"""The number of pidfd_getfd() on every architecture."""
_OPEN = frozenset({1, 4, 5, 8})
"""ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT of include/net/tcp_states.h: one side or both may still speak."""
_DIAG_BY_FAMILY, _MESSAGE_BYTES, _INODE_AT = 20, 72, 68
_libc = ctypes.CDLL(None, use_errno=True)


def holds_clients(pids: Iterable[int], ports: frozenset[int]) -> bool:
    """Whether one of these processes does. MissingPrivilege if one cannot be looked into."""
    connected: set[str] | None = None
    for pid in pids:
        try:
            if connected is None:
                if any(_is_client(borrowed, ports) for borrowed in _borrowed(pid)):
                    return True
                continue
        except PermissionError:
            connected = _connected(ports)
        if any(link in connected for _, link in _sockets_of(pid)):
            return True
    return False


def _sockets_of(pid: int) -> Iterator[tuple[int, str]]:
    folder = Path(f"/proc/{pid}/fd")
    try:
        entries = list(folder.iterdir())
    except FileNotFoundError:
        return
    except PermissionError:
        raise MissingPrivilege(f"{folder} cannot be read, which needs CAP_SYS_PTRACE or the same user") from None
    for entry in entries:
        with suppress(OSError):
            link = str(entry.readlink())
            if link.startswith("socket:"):
                yield int(entry.name), link


def _borrowed(pid: int) -> Iterator[socket.socket]:
    """Each of its sockets for a moment. PermissionError where that is forbidden."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number, _ in _sockets_of(pid):
            descriptor = _libc.syscall(_GETFD, pidfd, number, 0)
            if descriptor >= 0:
                with socket.socket(fileno=descriptor) as borrowed:
                    yield borrowed
            elif ctypes.get_errno() in (EPERM, ENOSYS):
                raise PermissionError
    finally:
        os.close(pidfd)


def _is_client(borrowed: socket.socket, ports: frozenset[int]) -> bool:
    if borrowed.family not in (socket.AF_INET, socket.AF_INET6) or borrowed.type != socket.SOCK_STREAM:
        return False
    try:
        state = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return state in _OPEN and borrowed.getsockname()[1] in ports
    except OSError:
        return False


def _connected(ports: frozenset[int]) -> set[str]:
    """Open connections to these ports, as /proc names their sockets."""
    states = sum(1 << state for state in _OPEN)
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        request = bytes([family, socket.IPPROTO_TCP, 0, 0]) + states.to_bytes(4, sys.byteorder) + bytes(48)
        for _, data, start, end in dump(SOCK_DIAG, _DIAG_BY_FAMILY, request):
            if end - start >= _MESSAGE_BYTES and int.from_bytes(data[start + 4 : start + 6], "big") in ports:
                inode = int.from_bytes(data[start + _INODE_AT : start + _INODE_AT + 4], sys.byteorder)
                found.add(f"socket:[{inode}]")
    return found
