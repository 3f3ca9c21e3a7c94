"""Plain blocking connect() in a loop: the simplest client that there is. blocking_client HOST PORT CONNECTIONS"""

from __future__ import annotations

import socket
import sys

from bench.peers.steps import Step

TOKEN = bytes(range(16))


def main(host: str, port: int, connections: int) -> None:
    """Connect, hold, send each its token and have it back."""
    step = Step()
    step.done()
    held = [socket.create_connection((host, port)) for _ in range(connections)]
    step.done(connected=len(held))
    right = 0
    for one in held:
        one.sendall(TOKEN)
        right += one.recv(len(TOKEN), socket.MSG_WAITALL) == TOKEN
    step.done(echoed=right)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
