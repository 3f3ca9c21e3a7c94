"""A service behind a broker, the same for handoff and relay: take a client, read once, say one byte, close.

Called with the path to listen at, and with `handoff` or `relay`.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading


def serve(listener: socket.socket, handoff: bool) -> None:
    """Client after client."""
    while True:
        client, _ = listener.accept()
        if handoff:
            with client as channel:
                _, descriptors, _, _ = socket.recv_fds(channel, 1024, 1)
            client = socket.socket(fileno=descriptors[0])
            client.setblocking(True)
        with client, contextlib.suppress(OSError):
            client.recv(4096)
            client.sendall(b"x")


def main(path: str, delivery: str) -> None:
    """Two threads, which is what the machines of the figures have."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(4096)
    for _ in range(2):
        threading.Thread(target=serve, args=(listener, delivery == "handoff")).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
