"""What lies between a client and its service costs them: added latency, bulk, memory of connections at rest.

Decides what is measured of each broker: the same echo, sink and source behind it over TCP, chosen by a TLS hello.
Latency is that of 64 bytes there and back on established connections, through the broker less directly to the service,
one after the other: in a closed loop, which with many connections leaves no processor idle, so that it shows throughput
and whom the scheduler lets wait; and at a rate that does leave some. Memory is the broker's alone, by as much as it
grows while connections are held that have been used once and rest.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import brokers, traffic
from bench.brokers import Broker, Running
from bench.traffic import Traffic

NAME = "shop.example.com"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How rounds are asked for."""

    connections: int
    rounds: int
    rate: int | None = None
    """Per second over all connections; None is a closed loop."""

    @property
    def name(self) -> str:
        """In the headings of a table."""
        return str(self.connections) + (f", {self.rate:,}/s" if self.rate else "")


LOADS = (
    Load(connections=1, rounds=2_000),
    Load(connections=64, rounds=10_000),
    Load(connections=64, rounds=10_000, rate=20_000),
)
SLICES = 6
"""Direct and through the broker, in turn, so that what else the machine does meanwhile falls on both."""
BULK_CONNECTIONS = (1, 8)
BULK_BYTES = 1 << 30
AT_REST = 8_000
"""Each takes two descriptors of a peer's, of which the machines of the figures allow 20,000 to a process."""
AT_REST_IN_SELECT = 400
"""Of sslh-select: select() knows 1,024 descriptors."""
_SPLICING = Broker(name="HAProxy, splice-auto", program="haproxy", options=("option splice-auto",))

BROKERS = (brokers.HAPROXY, _SPLICING, brokers.NGINX, brokers.SSLH, brokers.URING, brokers.EPOLL)


def absent(broker: Broker) -> str:
    """Why the row cannot run here; empty if it can."""
    return traffic.absent() or brokers.absent(broker)


def run(broker: Broker, *, at_rest: int = AT_REST, bulk_bytes: int = BULK_BYTES, part: float = 1.0) -> dict[str, Any]:
    """All figures of one broker; `part` of the rounds."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as folder, traffic.compiled() as program:
        target = f"tcp:127.0.0.1:{(service_port := brokers.free_port())}"
        hello = traffic.write_hellos(Path(folder) / "hello", [NAME])
        with brokers.running(broker, target, [NAME]) as running:
            figures: dict[str, Any] = {}
            with program.service(target, "echo"):
                for load in LOADS:
                    rounds = max(load.connections, int(load.rounds * part))
                    slices = [_slice(program, running, service_port, hello, load, rounds) for _ in range(SLICES)]
                    figures |= {f"{key}_at_{load.name}": median(one[key] for one in slices) for key in slices[0]}
                figures |= _at_rest(program, running, hello, _most_at_rest(broker, at_rest))
            for way in ("send", "take"):
                for count in BULK_CONNECTIONS:
                    each, opening_bytes = bulk_bytes // count, hello.stat().st_size - 2
                    work = f"sink={each + opening_bytes}" if way == "send" else f"source={each}"
                    with program.service(target, work):
                        figures |= _bulk(program, running, hello, way, count, bulk_bytes)
            return figures


def _slice(
    program: Traffic, running: Running, direct_port: int, hello: Path, load: Load, rounds: int
) -> dict[str, Any]:
    direct = program.rounds(direct_port, hello, load.connections, rounds, load.rate)
    before_ns = running.cpu_ns()
    through = program.rounds(running.port, hello, load.connections, rounds, load.rate)
    figures = {"cpu_us_per_round": (running.cpu_ns() - before_ns) / 1000 / rounds}
    for quantile in ("p50_us", "p99_us"):
        figures[f"direct_{quantile}"], figures[f"through_{quantile}"] = direct[quantile], through[quantile]
        figures[f"added_{quantile}"] = through[quantile] - direct[quantile]
    return figures


def _at_rest(program: Traffic, running: Running, hello: Path, connections: int) -> dict[str, float]:
    before_bytes = running.resident_bytes()
    with program.held(running.port, hello, connections) as clients:
        held_bytes = running.resident_bytes()
        program.use_again(clients)
        used_bytes = running.resident_bytes()
    return {
        "at_rest": connections,
        "idle_bytes_each": (held_bytes - before_bytes) / connections,
        "idle_bytes_each_used_again": (used_bytes - before_bytes) / connections,
    }


def _bulk(program: Traffic, running: Running, hello: Path, way: str, count: int, size_bytes: int) -> dict[str, float]:
    before_ns = running.cpu_ns()
    took = program.bulk(way, running.port, hello, count, size_bytes)
    return {
        f"{way}_gb_per_s_at_{count}": took["bytes"] / took["seconds"] / 1e9,
        f"{way}_cpu_ms_per_gb_at_{count}": (running.cpu_ns() - before_ns) / 1e6 / (took["bytes"] / 1e9),
    }


def _most_at_rest(broker: Broker, wanted: int) -> int:
    return min(wanted, AT_REST_IN_SELECT if broker.program == "sslh-select" else brokers.MOST_HELD - 100)
