"""What a brokered connection costs the broker in CPU, by server name to a unix socket; the peers beside.

Decides who is measured and with what: clients connect one after the other on some threads, say a TLS hello, and read
until the end; the service says one byte and closes, the same for all. CPU is what the scheduler has counted for all
threads of all of the broker's processes, from the first connection to the last. One of them is no broker but what none
that hands sockets over can do without, in one thread (`peers/bare.c`): the rest is what a broker is for.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench import brokers, traffic
from bench.brokers import Broker

NAME = "shop.example.com"
CLIENTS = (8, 64)
"""At once. The second is more than the datagrams that wait for a service where net.unix.max_dgram_qlen is as the kernel
has it, 10: a handoff has then to be tried again."""
WARM_UP = 500

BROKERS = (
    brokers.HAPROXY,
    brokers.NGINX,
    brokers.SSLH,
    brokers.URING_HANDOFF,
    brokers.EPOLL_HANDOFF,
    brokers.BARE,
    brokers.URING,
    brokers.EPOLL,
)


def absent(broker: Broker) -> str:
    """Why the row cannot run here; empty if it can."""
    if broker.program == "sslh-select":
        # Within one round of select() it closes sockets, accepts and connects new ones under the same numbers, takes
        # them for readable, reads EAGAIN, and closes both sides: seen in the system calls of 1.20.
        return "drops clients where connections come and go quickly"
    return traffic.absent() or brokers.absent(broker)


def run(broker: Broker, connections: int) -> dict[str, Any]:
    """CPU of the broker per connection, connections per second, and the time to the first byte."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as folder, traffic.compiled() as program:
        target = f"unix:{folder}/service"
        hellos = traffic.write_hellos(Path(folder) / "hellos", [NAME])
        with (
            program.service(target, "one=x", handoff=broker.delivery == "handoff"),
            brokers.running(broker, target, [NAME]) as running,
        ):
            figures: dict[str, Any] = {}
            for clients in CLIENTS:
                program.visit(running.port, hellos, clients, WARM_UP)
                before_ns = running.cpu_ns()
                took = program.visit(running.port, hellos, clients, connections)
                figures |= {
                    f"cpu_us_per_connection_at_{clients}": (running.cpu_ns() - before_ns) / 1000 / connections,
                    f"connections_per_s_at_{clients}": connections / took["seconds"],
                    f"first_byte_p50_us_at_{clients}": took["p50_us"],
                    f"first_byte_p99_us_at_{clients}": took["p99_us"],
                }
            return figures
