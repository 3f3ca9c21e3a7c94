"""A service behind a broker, the same for handoff and relay: take a client, read once, say one byte, close.

Called with the path to be at, and with `handoff` or `relay`.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading


def taken(source: socket.socket) -> socket.socket:
    """The next client, out of a datagram (docs/handoff.md). Nobody here claims to be a broker who is none."""
    _, descriptors, _, _ = socket.recv_fds(source, 560, 1)
    client = socket.socket(fileno=descriptors[0])
    client.setblocking(True)
    return client


def serve(source: socket.socket, handoff: bool) -> None:
    """Client after client."""
    while True:
        client = taken(source) if handoff else source.accept()[0]
        with client, contextlib.suppress(OSError):
            client.recv(4096)
            client.sendall(b"x")


def main(path: str, delivery: str) -> None:
    """Two threads, which is what the machines of the figures have."""
    handoff = delivery == "handoff"
    source = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if handoff else socket.SOCK_STREAM)
    source.bind(path)
    if not handoff:
        source.listen(4096)
    for _ in range(2):
        threading.Thread(target=serve, args=(source, handoff)).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
