"""Engines that act as one: one process where io_uring needs no descriptors, several where epoll does.

Decides how many processes a number of connections takes, and how a configuration is shared out to them. Knows no step.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from msgspec.structs import replace

from fourtuple.engine import CarrierName, EchoConfig, Failure, LoadConfig, Phase, Snapshot, SourceChoice
from fourtuple.lab import LabHost, RemoteEngine
from fourtuple.tuples import Axis, TupleSpace

POLL_S = 0.1
STALL_S = 20.0
"""An engine that makes no progress for this long is stuck: longer than four SYN retransmissions (1 + 2 + 4 + 8 s)."""
CLOSE_S = 60.0
OWN_DESCRIPTORS = 64
"""Descriptors that a process of the lab needs for itself, at most."""
SPREAD = 1.1
"""SO_REUSEPORT spreads connections by hash, not evenly: server processes on epoll have this much room to spare."""
MOST_PROCESSES = 64
KERNEL_CHOICES = (SourceChoice.KERNEL, SourceChoice.KERNEL_PORT, SourceChoice.KERNEL_RANGE)

Progress = Callable[[int], None]


class Fleet:
    """Engines of one kind on one lab host, their numbers added up."""

    def __init__(self, hosts: Sequence[LabHost], engines: Sequence[RemoteEngine]) -> None:
        self.hosts, self.engines = tuple(hosts), tuple(engines)
        self.snapshots: tuple[Snapshot, ...] = ()
        self.stalled = False
        """Whether the last wait ended because nothing moved any more."""

    def look(self) -> None:
        """Take a snapshot of each engine."""
        self.snapshots = tuple(engine.snapshot() for engine in self.engines)

    def total(self, counter: str) -> int:
        """Sum of a counter at the last look."""
        return sum(getattr(one, counter) for one in self.snapshots)

    @property
    def stopped_by(self) -> Failure | None:
        """What made the engines stop making connections, if anything did."""
        return next((one.stopped_by for one in self.snapshots if one.stopped_by is not None), None)

    def fill(self, progress: Progress) -> None:
        """Wait until each has made what it can."""
        self._wait(lambda one: one.phase is not Phase.RAMPING, "open_now", progress)

    def ping(self, progress: Progress) -> None:
        """Have every connection send its token once; wait until each is back, wrong or missing."""
        before = [engine.snapshot().pings_sent for engine in self.engines]
        for engine in self.engines:
            engine.ping()
        least = min(before)

        def answered(one: Snapshot) -> bool:
            begun = one.pings_sent > least or one.open_now == 0
            return begun and one.phase is Phase.HOLDING and one.pings_answered >= one.pings_sent

        self._wait(answered, "pings_right", progress)

    def close(self) -> None:
        """Close every connection and wait for it, so that tuples and descriptors are free for the next."""
        for engine in self.engines:
            engine.close()
        for engine in self.engines:
            engine.join(CLOSE_S)
            engine.forget()

    def _wait(self, done: Callable[[Snapshot], bool], counter: str, progress: Progress) -> None:
        last, moved = -1, time.monotonic()
        self.stalled = False
        while True:
            self.look()
            value = self.total(counter)
            progress(value)
            if all(done(one) or not one.running for one in self.snapshots):
                return
            if value != last:
                last, moved = value, time.monotonic()
            elif time.monotonic() - moved > STALL_S:
                self.stalled = True
                return
            time.sleep(POLL_S)


def serve(host: LabHost, config: EchoConfig, carrier: CarrierName, connections: int) -> Fleet:
    """Echo engines that together can hold `connections`; returned when every listener listens.

    The first engine's carrier decides: with epoll, listeners and connections take a descriptor each.
    """
    first = host.start_engine(config, carrier)
    hosts, engines = [host], [first]
    if first.carrier is CarrierName.EPOLL:
        needed = int(connections * SPREAD) + len(config.listen)
        more = processes_for(needed) - 1
        if more:
            first.forget()
            hosts += [host.another() for _ in range(more)]
            engines = [process.start_engine(replace(config, reuse_port=True), carrier, 1) for process in hosts]
    for engine in engines:
        engine.wait_for(lambda one: one.listening_now + one.listens_failed >= len(config.listen), STALL_S)
    return Fleet(hosts, engines)


def connect(host: LabHost, config: LoadConfig, carrier: CarrierName, workers: int | None = None) -> Fleet:
    """Load engines that together make the connections of `config`, in as many processes as `carrier` needs."""
    processes = processes_for(config.connections) if carrier is CarrierName.EPOLL else 1
    if processes == 1:
        return Fleet([host], [host.start_engine(config, carrier, workers)])
    hosts = [host, *(host.another() for _ in range(processes - 1))]
    shares = share_out(config, processes)
    return Fleet(hosts, [one.start_engine(share, carrier, 1) for one, share in zip(hosts, shares, strict=True)])


def share_out(config: LoadConfig, processes: int) -> list[LoadConfig]:
    """The configuration in parts: tuples that we choose are divided; where the kernel chooses, all share the same."""
    spaces = [config.space] * processes if config.choice in KERNEL_CHOICES else divide(config.space, processes)
    # In proportion to the tuples of each, so that no part is asked for more connections than it has tuples.
    total = sum(one.size for one in spaces)
    upto = [config.connections * tuples // total for tuples in accumulate(one.size for one in spaces)]
    wanted = [end - start for start, end in pairwise([0, *upto])]
    return [replace(config, space=own, connections=n) for own, n in zip(spaces, wanted, strict=True)]


def divide(space: TupleSpace, parts: int) -> list[TupleSpace]:
    """Disjoint products that together are the space, cut along its longest axis."""
    axis = max(Axis, key=lambda one: getattr(space, one.value).size)
    return [replace(space, **{axis.value: members}) for members in getattr(space, axis.value).split(parts)]


def processes_for(descriptors: int) -> int:
    """How many processes it takes to have so many descriptors, each bounded by RLIMIT_NOFILE."""
    return min(MOST_PROCESSES, -(-descriptors // descriptors_each()))


def descriptors_each() -> int:
    """Descriptors that one process of the lab has for connections."""
    return max(1, hard_limit() // 2, hard_limit() - OWN_DESCRIPTORS)


def hard_limit() -> int:
    """RLIMIT_NOFILE as far as a process may raise it by itself: what each process of the lab gets."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]
