"""Making TCP connections for a process that may make none: it asks by its own connect(), which its filter hands over.

Decides which connections are made: those to addresses that targets name, or to ports that the file allows. A broker in
an empty network needs no right to the host's, and no rule of Landlock's, which knows ports and not hosts. What is asked
comes in the registers of the system call (`connect_and_say` of the carrier), so that nothing is read from memory that
could change meanwhile, and no right to look into the other process is needed; the answer is a socket of our network
under the number that the process gave its own (seccomp_unotify(2), SECCOMP_IOCTL_NOTIF_ADDFD, Linux 5.9). Knows no
service and no event loop: the owner watches the descriptor, and calls `serve` when it is readable.

Budget: five system calls here for a connection, and two context switches of the one who asks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Container, Hashable, Iterable
from contextlib import suppress
from ipaddress import ip_address

MARK = 0x3454_5550
"""In the upper half of the sixth register: what comes with it says where to. The carrier has the same."""
# include/uapi/linux/seccomp.h, with _IOC() of asm-generic/ioctl.h
_RECEIVE, _SEND, _ADD_DESCRIPTOR = 0xC050_2100, 0xC018_2101, 0x4018_2103
_SET_DESCRIPTOR = 1
_NOTICE = struct.Struct("=QIIiIQ6Q")
_REPLY = struct.Struct("=QqiI")
_ADDED = struct.Struct("=QIIII")

Address = bytes
"""As packed by `packed`."""


def packed(target: str) -> Address | None:
    """The address and port of a target; None if it is not `tcp:` and an address.

    >>> packed("tcp:127.0.0.1:80").hex()
    '7f0000010050'
    """
    host, _, port = target.removeprefix("tcp:").rpartition(":")
    if not target.startswith("tcp:"):
        return None
    try:
        return ip_address(host.strip("[]")).packed + int(port).to_bytes(2, "big")
    except (ValueError, OverflowError):
        return None


def addresses_of(targets: Iterable[str]) -> frozenset[Address]:
    """Where these targets are; those that are not at an address are nowhere."""
    return frozenset(one for one in map(packed, targets) if one is not None)


class Addresses:
    """Where targets lead, as the registry has it: read anew when an address is not known and it has changed."""

    def __init__(
        self,
        known: Callable[[], Iterable[Container[Address]]],
        version: Callable[[], Hashable],
        ports: Callable[[], Iterable[int]],
    ) -> None:
        """`known` tells where targets are now; `ports` are allowed on whatever host: those that the file allows
        (`allow_ports`)."""
        self._tell, self._version, self._ports = known, version, ports
        self._known: tuple[Container[Address], ...] = ()
        self._any_host: frozenset[int] = frozenset()
        self._seen: Hashable = None

    def __contains__(self, address: Address) -> bool:
        if self._has(address):
            return True
        # A million services take some 0.1 s, and only once for each change.
        if (version := self._version()) == self._seen:
            return False
        self._known = tuple(self._tell())
        self._any_host, self._seen = frozenset(self._ports()), version
        return self._has(address)

    def _has(self, address: Address) -> bool:
        return any(address in one for one in self._known) or int.from_bytes(address[-2:], "big") in self._any_host


class Connector:
    """For one process: makes what it asks for at the descriptor of its filter."""

    def __init__(self, descriptor: int, allowed: Addresses) -> None:
        self._descriptor, self._allowed = descriptor, allowed
        self.made = self.refused = 0

    def fileno(self) -> int:
        """To watch."""
        return self._descriptor

    def serve(self) -> bool:
        """Answer one who waits; false once there will be nobody any more."""
        notice = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(self._descriptor, _RECEIVE, notice)
        except OSError as error:
            # ENOENT: who asked has been killed meanwhile.
            return error.errno in (errno.ENOENT, errno.EINTR)
        number, _, _, _, _, _, descriptor, _, _, upper, lower, rest = _NOTICE.unpack(notice)
        answer = self._answer(number, descriptor, upper, lower, rest)
        with suppress(OSError):
            fcntl.ioctl(self._descriptor, _SEND, _REPLY.pack(number, 0, -answer, 0))
        return True

    def close(self) -> None:
        """Who asks afterwards gets ENOSYS."""
        os.close(self._descriptor)

    def _answer(self, number: int, descriptor: int, upper: int, lower: int, rest: int) -> int:
        """Put a socket that connects in the place of theirs; 0, or an errno as connect() has it."""
        family, port = rest >> 16 & 0xFFFF, rest & 0xFFFF
        if family not in (4, 6) or rest >> 32 != MARK or descriptor > 0x7FFF_FFFF:
            return errno.EINVAL
        host = lower.to_bytes(8, "big")[4:] if family == 4 else (upper << 64 | lower).to_bytes(16, "big")
        try:
            allowed = host + port.to_bytes(2, "big") in self._allowed
        except Exception:
            # A registry that cannot be read allows nothing, and whoever asks is not left waiting.
            allowed = False
        if not allowed:
            self.refused += 1
            return errno.EACCES
        try:
            made = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
        except OSError as error:
            return error.errno or errno.ENOBUFS
        with made:
            made.setblocking(False)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = made.connect_ex((str(ip_address(host)), port))
            if code not in (0, errno.EINPROGRESS):
                return code
            try:
                added = _ADDED.pack(number, _SET_DESCRIPTOR, made.fileno(), descriptor, os.O_CLOEXEC)
                fcntl.ioctl(self._descriptor, _ADD_DESCRIPTOR, added)
            except OSError as error:
                return error.errno or errno.EMFILE
        self.made += 1
        return code
