"""A broker's part of a handoff, for tests of the service's part: datagrams with a client in them, and with none."""

from __future__ import annotations

import array
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VECTOR = bytes.fromhex(
    "34545550 01 04 0046 03e8 01bb 00000205"
    "00000000000000000000ffffc0000207 00000000000000000000ffffc6336401"
    "04 73686f70 10 73686f702e6578616d706c652e636f6d"
)
"""The note of docs/handoff.md, which the Rust writer is held to as well."""
NO_HANDOFFS = 9
"""How many `no_handoffs` sends: fewer than a queue holds."""


@contextmanager
def connection(host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's end and an accepted one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as server,
        socket.create_connection(server.getsockname()[:2]) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            yield client, accepted


def send(path: Path, data: bytes, *descriptors: int) -> None:
    """As a broker does, or somebody who claims to be one; waits while the queue is full."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        rights = array.array("i", descriptors)
        sender.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else [], 0, str(path))


def hand_over(path: Path, host: str = "127.0.0.1") -> socket.socket:
    """The end of a client whose other end is on its way."""
    with connection(host) as (client, accepted):
        send(path, VECTOR, accepted.fileno())
        return client.dup()


def no_handoffs(path: Path) -> None:
    """Datagrams that bring no client."""
    with (
        connection() as (_, accepted),
        socket.socket() as unconnected,
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        Path("/dev/null").open("w") as file,
    ):
        number = accepted.fileno()
        send(path, VECTOR)
        send(path, VECTOR, number, number)
        send(path, b"GET / HTTP/1.1\r\n\r\n", number)
        send(path, VECTOR + b"\0", number)
        # 600 bytes, of which 560 are a note.
        send(path, VECTOR[:6] + (560).to_bytes(2) + VECTOR[8:48] + b"\xff" + b"a" * 255 + b"\xff" + b"b" * 295, number)
        for other in (unconnected, listening, datagrams, file):
            send(path, VECTOR, other.fileno())


def open_descriptors() -> int:
    """Of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
