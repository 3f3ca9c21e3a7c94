"""What benches of a whole broker wait for, in a network namespace of their own.

Decides how long is too long. Knows no broker.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path


def children(pid: int) -> list[int]:
    """Processes that this one has started and that have not been reaped; those that became its own are among them."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def listens(port: int) -> bool:
    """Whether somebody does at 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(holds: Callable[[], bool], within_s: float) -> None:
    """Wait for it; RuntimeError if it takes longer."""
    until_s = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > until_s:
            raise RuntimeError("it does not come to that")
        time.sleep(0.05)
