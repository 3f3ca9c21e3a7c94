"""Netlink dumps: one question to the kernel, its answer message by message, and the attributes of a message.

Decides how a dump is asked, bounded and ended. Knows no message type by name. Our own hundred lines rather than
pyroute2: importing that costs 0.19 s of a doctor that has one second, and a dump of sockets needs to be read without an
object each.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

ROUTE, SOCK_DIAG = 0, 4
"""Netlink protocols (netlink(7))."""

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR_CODE = struct.Struct("=i")
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_SOL_NETLINK, _GET_STRICT_CHECK = 270, 12
_RECEIVE_BYTES = 1 << 18
_PATIENCE_S = 2.0


def dump(protocol: int, message_type: int, body: bytes) -> Iterator[tuple[int, bytes, int, int]]:
    """Ask for everything; yield (message type, buffer, start, end) of each message's payload. OSError where refused.

    Leaving the iterator early closes the socket, which ends the dump in the kernel.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as link:
        link.settimeout(_PATIENCE_S)
        if protocol == ROUTE:
            # From 4.20 the kernel then heeds the filter in a route request; older kernels send all, and we filter
            # again.
            with suppress(OSError):
                link.setsockopt(_SOL_NETLINK, _GET_STRICT_CHECK, 1)
        link.sendto(_HEADER.pack(_HEADER.size + len(body), message_type, _REQUEST | _DUMP, 1, 0) + body, (0, 0))
        while True:
            data = link.recv(_RECEIVE_BYTES)
            start = 0
            while start + _HEADER.size <= len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, start)
                end = start + length
                if length < _HEADER.size or end > len(data):
                    raise OSError(0, "a netlink message is cut short")
                if kind in (_DONE, _ERROR):
                    _raise_if_failed(data, start + _HEADER.size, end)
                    return
                yield kind, data, start + _HEADER.size, end
                start += (length + 3) & ~3


def ask(protocol: int, message_type: int, body: bytes) -> bytes:
    """Ask for one thing, and give the payload of the one message that answers. OSError where refused: ENOENT is no."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as link:
        link.settimeout(_PATIENCE_S)
        link.sendto(_HEADER.pack(_HEADER.size + len(body), message_type, _REQUEST, 1, 0) + body, (0, 0))
        data = link.recv(_RECEIVE_BYTES)
    length, kind, _, _, _ = _HEADER.unpack_from(data)
    if kind == _ERROR:
        _raise_if_failed(data, _HEADER.size, length)
    return data[_HEADER.size : length]


def attributes(data: bytes, start: int, end: int) -> dict[int, bytes]:
    """The attributes of a message by type; the last of equal ones, as the kernel itself takes them (nla_parse)."""
    found = {}
    while start + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < _ATTRIBUTE.size or start + length > end:
            break
        found[kind & 0x3FFF] = data[start + _ATTRIBUTE.size : start + length]
        start += (length + 3) & ~3
    return found


def _raise_if_failed(data: bytes, start: int, end: int) -> None:
    if end - start >= _ERROR_CODE.size:
        (code,) = _ERROR_CODE.unpack_from(data, start)
        if code < 0:
            raise OSError(-code, os.strerror(-code))
