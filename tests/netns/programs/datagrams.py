"""A UDP server of one manner per port, from a first port on: what a datagram may meet. Run in a lab by the tests."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterable
from selectors import EVENT_READ, DefaultSelector
from types import MappingProxyType

MANNERS: MappingProxyType[str, Callable[[bytes], Iterable[bytes]]] = MappingProxyType(
    {
        "echo": lambda data: [data],
        "stall": lambda data: [],
        "garbage": lambda data: [data[::-1]],
        "twice": lambda data: [data, data],
        "empty": lambda data: [b""],
        "huge": lambda data: [bytes(5_000)],
    }
)


def main() -> None:
    """Serve until killed: one socket per manner."""
    selector = DefaultSelector()
    for offset, answers in enumerate(MANNERS.values()):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind(("0.0.0.0", int(sys.argv[1]) + offset))
        selector.register(sock, EVENT_READ, (sock, answers))
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            sock, answers = key.data
            data, sender = sock.recvfrom(65_536)
            for answer in answers(data):
                sock.sendto(answer, sender)


if __name__ == "__main__":
    main()
