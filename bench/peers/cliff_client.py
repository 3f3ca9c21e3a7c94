"""What one plain connect() costs as a port range fills up. cliff_client HOST PORT CONNECTIONS kernel|bind-zero

kernel: connect() alone; bind-zero: bind((HOST, 0)) and then connect(), as most libraries do if given a source.
"""

from __future__ import annotations

import socket
import sys
import time
from statistics import median

from bench.peers.steps import Step


def main(host: str, port: int, connections: int, choice: str) -> None:
    """Use the range up; the median cost of each hundredth of it, in nanoseconds."""
    step = Step()
    step.done()
    costs_ns: list[int] = []
    held: list[socket.socket] = []
    for _ in range(connections):
        started_ns = time.perf_counter_ns()
        one = socket.socket()
        try:
            if choice == "bind-zero":
                one.bind((host, 0))
            one.connect((host, port))
        except OSError:
            one.close()
            break
        costs_ns.append(time.perf_counter_ns() - started_ns)
        held.append(one)
    rows = [costs_ns[len(costs_ns) * row // 100 : len(costs_ns) * (row + 1) // 100] for row in range(100)]
    step.done(connected=len(held), curve_ns=[median(row) if row else 0 for row in rows])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
