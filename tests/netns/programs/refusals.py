"""What the socket calls answer, rightly and wrongly used, one line each: the same with the preload library as without.

Argument: an address with a server on port 7000. The lines name no address and no port, which are what may differ.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import sys
from collections.abc import Callable

SERVER = (sys.argv[1], 7000)
REFUSING = (sys.argv[1], 9)
libc = ctypes.CDLL(None, use_errno=True)


def tcp(family: int = socket.AF_INET) -> socket.socket:
    return socket.socket(family)


def address(family: int, host: str, port: int) -> bytes:
    return struct.pack("=H", family) + struct.pack("!H", port) + socket.inet_aton(host) + bytes(8)


def raw(function: str, descriptor: int, pointer: bytes | None, length: int) -> str:
    result = getattr(libc, function)(descriptor, pointer, length)
    return "0" if result == 0 else errno.errorcode[ctypes.get_errno()]


def connected_twice() -> str:
    one = tcp()
    one.connect(SERVER)
    one.connect(SERVER)
    return "no error"


def refused_then_accepted() -> str:
    one = tcp()
    first = one.connect_ex(REFUSING)
    return f"{errno.errorcode[first]}, then {one.connect_ex(SERVER)}"


def refused_then_unbound() -> str:
    one = tcp()
    one.connect_ex(REFUSING)
    return f"{one.getsockopt(0, 24)}"


def later() -> str:
    one = tcp()
    one.setblocking(False)
    first, second = one.connect_ex(SERVER), 0
    select.select([], [one], [])
    second = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return f"{errno.errorcode[first]}, then {second}"


def refused_later() -> str:
    one = tcp()
    one.setblocking(False)
    first = one.connect_ex(REFUSING)
    select.select([], [one], [])
    return f"{errno.errorcode[first]}, then {one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)}"


def disconnected() -> str:
    one = tcp()
    one.connect(SERVER)
    gone = raw("connect", one.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16)
    return f"{gone}, then {one.connect_ex(SERVER)}"


def asked_for_its_port() -> str:
    one = tcp()
    one.bind(("0.0.0.0", 0))
    port = one.getsockname()[1]
    return f"{port > 0} {one.getsockname()[1] == port}"


def asked_short() -> str:
    one = tcp()
    one.bind(("0.0.0.0", 0))
    room = ctypes.create_string_buffer(b"\xff" * 16, 16)
    length = ctypes.c_uint32(4)
    result = libc.getsockname(one.fileno(), room, ctypes.byref(length))
    return f"{result} {length.value} {room.raw[2:4] != bytes(2)} {room.raw[4:] == bytes([255]) * 12}"


def port_kept_for_listening() -> str:
    one, other = tcp(), tcp()
    one.bind(("0.0.0.0", 0))
    port = one.getsockname()[1]
    one.listen()
    other.connect((sys.argv[1] if sys.argv[1].startswith("127.") else "127.0.0.1", port))
    return f"{one.getsockname()[1] == port}"


def listening_unasked() -> str:
    one, other = tcp(), tcp()
    one.bind(("127.0.0.1", 0))
    one.listen()
    other.connect(one.getsockname())
    return "connected"


def bound_by_number_twice() -> str:
    one, other = tcp(), tcp()
    one.bind(("0.0.0.0", 45_999))
    other.bind(("0.0.0.0", 45_999))
    return "no error"


def bound_then_bound() -> str:
    one = tcp()
    one.bind(("0.0.0.0", 45_998))
    one.bind(("0.0.0.0", 0))
    return "no error"


def bound_elsewhere() -> str:
    tcp().bind(("198.51.100.9", 0))
    return "no error"


def udp() -> str:
    one = socket.socket(type=socket.SOCK_DGRAM)
    one.connect(SERVER)
    route = one.getsockname()[0]
    other = socket.socket(type=socket.SOCK_DGRAM)
    other.bind(("0.0.0.0", 0))
    return f"{route} {other.getsockname()[1] > 0}"


def unix() -> str:
    one = socket.socket(socket.AF_UNIX)
    one.bind("")
    return f"{one.connect_ex('/nowhere/at/all')} {one.getsockname()!r:.3}"


def errno_after_success() -> str:
    one = tcp()
    where = address(socket.AF_INET, *SERVER)
    ctypes.set_errno(errno.EXDEV)
    result = libc.connect(one.fileno(), where, len(where))
    return f"{result} {ctypes.get_errno() == errno.EXDEV}"


def asks_its_own_way() -> str:
    one = tcp()
    one.setsockopt(0, 24, 1)
    one.bind(("0.0.0.0", 0))
    return f"{one.getsockname()[1]}"


def closed() -> str:
    one = tcp()
    number = one.fileno()
    one.close()
    return raw("connect", number, address(socket.AF_INET, *SERVER), 16)


CASES: list[tuple[str, Callable[[], str]]] = [
    ("refused", lambda: errno.errorcode[tcp().connect_ex(REFUSING)]),
    ("no route", lambda: errno.errorcode[tcp().connect_ex(("198.51.100.1", 80))]),
    ("no route, IPv6", lambda: errno.errorcode[tcp(socket.AF_INET6).connect_ex(("2001:db8::1", 80))]),
    ("no IPv4 on an IPv6 socket", lambda: raw("connect", tcp(socket.AF_INET6).fileno(), address(2, *SERVER), 16)),
    ("connected twice", connected_twice),
    ("refused, then accepted", refused_then_accepted),
    ("refused, then unbound", refused_then_unbound),
    ("later", later),
    ("refused later", refused_later),
    ("disconnected", disconnected),
    ("closed", closed),
    ("no socket", lambda: raw("connect", os.open("/dev/null", os.O_RDONLY), address(2, *SERVER), 16)),
    ("no address", lambda: raw("connect", tcp().fileno(), None, 16)),
    ("half an address", lambda: raw("connect", tcp().fileno(), address(2, *SERVER), 8)),
    ("half a family", lambda: raw("connect", tcp().fileno(), address(2, *SERVER), 1)),
    ("negative length", lambda: raw("connect", tcp().fileno(), address(2, *SERVER), -1)),
    ("unknown family", lambda: raw("connect", tcp().fileno(), address(77, *SERVER), 16)),
    ("bind to half an address", lambda: raw("bind", tcp().fileno(), address(2, "0.0.0.0", 0), 8)),
    ("bind to no address", lambda: raw("bind", tcp().fileno(), None, 16)),
    ("bind to no socket", lambda: raw("bind", os.open("/dev/null", os.O_RDONLY), address(2, "0.0.0.0", 0), 16)),
    ("broadcast", lambda: errno.errorcode[tcp().connect_ex(("255.255.255.255", 80))]),
    ("multicast", lambda: errno.errorcode[tcp().connect_ex(("224.0.0.1", 80))]),
    ("asked for its port", asked_for_its_port),
    ("asked short", asked_short),
    ("asked into nowhere", lambda: raw("getsockname", tcp().fileno(), None, 0)),
    ("port kept for listening", port_kept_for_listening),
    ("listening unasked", listening_unasked),
    ("bound by number twice", bound_by_number_twice),
    ("bound, then bound", bound_then_bound),
    ("bound elsewhere", bound_elsewhere),
    ("UDP", udp),
    ("Unix", unix),
    ("errno after success", errno_after_success),
    ("asks its own way", asks_its_own_way),
]


def main() -> None:
    for name, case in CASES:
        try:
            answer = case()
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        print(f"{name}: {answer}")


if __name__ == "__main__":
    main()
