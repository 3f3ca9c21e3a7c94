"""What a brokered connection costs the broker in CPU, by server name to a unix socket; the peers beside.

Decides who is measured and with what: clients connect one after the other on some threads, say a TLS hello, and read
until the end; the service says one byte and closes, the same for all. CPU is what the scheduler has counted for all
threads of all of the broker's processes, from the first connection to the last.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench import brokers, traffic
from bench.brokers import Broker

NAME = "shop.example.com"
CLIENTS = 8
"""At once. Of sslh-select one: it accepts within a round of select() and gives new sockets the numbers of those that it has
just closed, so that it takes them for readable, reads EAGAIN, and drops the client (1.20, seen in its system calls)."""
WARM_UP = 500

BROKERS = (
    brokers.HAPROXY,
    brokers.NGINX,
    brokers.SSLH,
    brokers.URING_HANDOFF,
    brokers.EPOLL_HANDOFF,
    brokers.URING,
    brokers.EPOLL,
)


def absent(broker: Broker) -> str:
    """Why the row cannot run here; empty if it can."""
    return traffic.absent() or brokers.absent(broker)


def run(broker: Broker, connections: int) -> dict[str, Any]:
    """CPU of the broker per connection, and connections per second."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as folder, traffic.compiled() as program:
        # sslh reaches nothing but TCP; that it has to is part of what it costs.
        over_tcp = broker.program == "sslh-select"
        target = f"tcp:127.0.0.1:{brokers.free_port()}" if over_tcp else f"unix:{folder}/service"
        hellos = traffic.write_hellos(Path(folder) / "hellos", [NAME])
        with (
            program.service(target, "one", handoff=broker.delivery == "handoff"),
            brokers.running(broker, target, [NAME]) as running,
        ):
            clients = 1 if broker.program == "sslh-select" else CLIENTS
            program.visit(running.port, hellos, clients, WARM_UP)
            before_ns = running.cpu_ns()
            took = program.visit(running.port, hellos, clients, connections)
            return {
                "cpu_us_per_connection": (running.cpu_ns() - before_ns) / 1000 / connections,
                "connections_per_s": connections / took["seconds"],
                "first_byte_p50_us": took["p50_us"],
                "first_byte_p99_us": took["p99_us"],
            }


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure."""
    return {key: median(run[key] for run in runs) for key in runs[0]}
