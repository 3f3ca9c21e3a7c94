"""The first byte through a broker that has very many services, beside the same broker with a thousand.

Decides which names are asked, and that client and service do the same work whatever the broker holds: one client after
the other, all services one process. A broker with few services and one with many run side by side and are asked in
turn: a thousand names of the few, a thousand of the many (drawn from all of them), and names drawn anew each time from
all of the many, which no processor's cache can hold. Beside it: how soon a broker answers after its start, and how soon
ours is seen to obey a change of its registry.
"""

from __future__ import annotations

import io
import random
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import brokers, registry, traffic
from bench.brokers import Broker, Running
from bench.traffic import Traffic
from fourtuple.registry import Registry
from fourtuple.services import Delivery, Service

FEW = 1_000
MOST_OF_PEERS = 100_000
"""nginx builds its table anew at each start, HAProxy reads its map: for a million these take many seconds."""
SLICES, VISITS = 30, 200
CHANGES = 10
SEED = 1
_RIVALS = (brokers.HAPROXY, brokers.NGINX)
_OURS = (brokers.URING_HANDOFF, brokers.EPOLL_HANDOFF, brokers.URING, brokers.EPOLL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """One row: a broker, and how many services its larger half has."""

    name: str
    broker: Broker
    many: int


def crowds(services: int, *, is_quick: bool = False) -> list[Crowd]:
    """Ours with so many services, the peers with fewer; to be quick, each carrier and delivery of ours once."""
    chosen = (brokers.URING_HANDOFF, brokers.EPOLL) if is_quick else _OURS
    counts = [*((rival, min(services, MOST_OF_PEERS)) for rival in _RIVALS), *((ours, services) for ours in chosen)]
    return [Crowd(name=f"{broker.name}, {many:,}", broker=broker, many=many) for broker, many in counts]


def absent(crowd: Crowd) -> str:
    """Why the row cannot run here; empty if it can."""
    return traffic.absent() or brokers.absent(crowd.broker)


def run(crowd: Crowd, slices: int = SLICES) -> dict[str, Any]:
    """All figures of one row."""
    chance = random.Random(SEED)
    with (
        tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as name,
        traffic.compiled() as program,
        ExitStack() as stack,
    ):
        folder, is_handoff = Path(name), crowd.broker.delivery == "handoff"
        target = f"unix:{folder}/service"
        stack.enter_context(program.service(target, "one=x", handoff=is_handoff))
        few, few_ready_ms = stack.enter_context(_brokered(crowd.broker, folder / "few", target, FEW))
        many, many_ready_ms = stack.enter_context(_brokered(crowd.broker, folder / "many", target, crowd.many))
        some = chance.sample(range(crowd.many), FEW)
        asked = {
            "few": (few, list(range(FEW))),
            "many": (many, some),
            "all": (many, range(crowd.many)),
        }
        slices_of: dict[str, list[dict[str, float]]] = {case: [] for case in asked}
        # The first slice of each only warms up. Each comes first in its turn.
        for number in range(slices + 1):
            order = list(asked)[number % len(asked) :] + list(asked)[: number % len(asked)]
            for case in order:
                running, numbers = asked[case]
                names = (registry.service_name(chance.choice(numbers)) for _ in range(VISITS))
                hellos, before_ns = traffic.write_hellos(folder / "hellos", names), running.cpu_ns()
                took = program.visit(running.port, hellos, 1, VISITS)
                took["cpu_us"] = (running.cpu_ns() - before_ns) / 1000 / VISITS
                slices_of[case] += [took] if number else []
        figures = {
            f"{case}_{quantile}": median(took[quantile] for took in found)
            for case, found in slices_of.items()
            for quantile in ("p50_us", "p99_us", "cpu_us")
        }
        figures |= {f"{case}_to_few": figures[f"{case}_p50_us"] / figures["few_p50_us"] for case in ("many", "all")}
        grown_bytes = many.own_bytes() - few.own_bytes()
        figures |= {
            "few_ready_ms": few_ready_ms,
            "many_ready_ms": many_ready_ms,
            "own_bytes_per_service": grown_bytes / (crowd.many - FEW),
        }
        if crowd.broker.is_ours:
            figures |= _changes(program, crowd.broker, folder, many)
        return figures


@contextmanager
def _brokered(broker: Broker, folder: Path, target: str, count: int) -> Iterator[tuple[Running, float]]:
    """The broker with so many services, and how long it took from its start to its first answer."""
    names: Sequence[str] = [registry.service_name(number) for number in range(count)]
    store = None
    if broker.is_ours:
        text = "".join(f"{name},{target},{broker.delivery}\n" for name in names).encode()
        with Registry(folder) as opened:
            opened.import_text(io.BytesIO(text), "csv")
        store = folder
    hello = traffic.hello(names[-1])
    with brokers.running(broker, target, () if broker.is_ours else names, store=store) as running:
        _ask(running.port, hello)
        yield running, (time.monotonic() - running.started_s) * 1000


def _ask(port: int, hello: bytes) -> bytes:
    """The first byte that the service of a hello's name says."""
    with socket.create_connection(("127.0.0.1", port), traffic.PATIENCE_S) as client:
        client.sendall(hello)
        return client.recv(1)


def _changes(program: Traffic, broker: Broker, folder: Path, many: Running) -> dict[str, Any]:
    """From before a change is written until a client is served by who it says, and the part that the writing takes."""
    written_ms, seen_ms = [], []
    name, delivery = registry.service_name(0), Delivery(broker.delivery)
    hello, targets = traffic.hello(name), (f"unix:{folder}/other", f"unix:{folder}/service")
    other = program.service(targets[0], "one=y", handoff=delivery is Delivery.HANDOFF)
    with other, Registry(folder / "many") as opened:
        for number in range(CHANGES):
            started_s = time.monotonic()
            opened.set([Service(name=name, target=targets[number % 2], delivery=delivery)])
            written_ms.append((time.monotonic() - started_s) * 1000)
            until_s = started_s + traffic.PATIENCE_S
            while _ask(many.port, hello) != (b"y", b"x")[number % 2]:
                if time.monotonic() > until_s:
                    raise RuntimeError("the broker does not see a change of its registry")
            seen_ms.append((time.monotonic() - started_s) * 1000)
    return {
        "change_written_ms": median(written_ms),
        "change_seen_ms": median(seen_ms),
        "change_seen_most_ms": max(seen_ms),
    }
