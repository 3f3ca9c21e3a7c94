"""Engines: which carrier runs one, and how many workers; what it is told, and what it asks.

Knows nothing of how a connection is made (Rust's) or of which limit stops one (`fourtuple.limits`).
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from types import TracebackType
from typing import Self

from fourtuple import _core
from fourtuple.engine.checks import HIGHEST_COUNT, instance, seconds, whole, whole_or_none
from fourtuple.engine.configs import BrokerConfig, CarrierName, CarrierSettings, EchoConfig, LoadConfig
from fourtuple.engine.snapshot import CarrierNumbers, Failure, Phase, Quantiles, Snapshot
from fourtuple.errors import BadConfig, EngineStopped, LimitReached, MissingFeature, MissingPrivilege
from fourtuple.metrics import COUNTERS
from fourtuple.questions import (
    Answer,
    Busiest,
    Closed,
    Held,
    Known,
    Question,
    Refused,
    SeenConnection,
    ServiceUsage,
    Sniff,
    Surveyed,
    Usage,
    Wake,
)
from fourtuple.tuples import Endpoint

CONNECTIONS_PER_WORKER = 1_000
"""Below this many connections another worker costs more than it brings."""
SECURED_PER_WORKER = 50
"""The same where each connection costs a TLS handshake."""
PROGRAM_VERSION = _core.version()
"""Of the program that runs; what is installed may have become another."""
_GLANCES_S = (0.0005, 0.01)
"""Between two looks, the first and the longest."""


class Engine:
    """One core on a carrier, in one or more workers. A context manager: leaving it stops and joins the workers."""

    def __init__(self, workers: _core.Workers, carrier: CarrierName, fallback_reason: str) -> None:
        """For `start`; not called otherwise."""
        self._workers = workers
        self._started_s = time.monotonic()
        self.carrier = carrier
        """Which carrier runs: URING or EPOLL."""
        self.fallback_reason = fallback_reason
        """Why AUTO did not take uring; empty if it did, or was not asked."""

    @classmethod
    def start(
        cls,
        config: LoadConfig | EchoConfig | BrokerConfig,
        carrier: CarrierName = CarrierName.AUTO,
        workers: int | None = None,
        settings: CarrierSettings | None = None,
    ) -> Engine:
        """Start the workers; by default one per usable CPU, as far as the work is worth it."""
        instance("config", config, (LoadConfig, EchoConfig, BrokerConfig))
        instance("carrier", carrier, CarrierName)
        whole_or_none("workers", workers, 1, 1_024)
        count = workers or _worth_while(config)
        _require_a_listener_each(config, count)
        chosen = settings or CarrierSettings()
        _require_room_to_say(config, chosen)
        if carrier is not CarrierName.AUTO:
            return cls(_core.Workers.start(config, carrier.value, count, chosen), carrier, "")
        try:
            if isinstance(config, BrokerConfig) and not _core.uring_abilities()["lent_descriptors"]:
                raise MissingFeature("io_uring here cannot lend a descriptor (IORING_OP_FIXED_FD_INSTALL, Linux 6.8)")
            return cls(_core.Workers.start(config, CarrierName.URING.value, count, chosen), CarrierName.URING, "")
        except (MissingFeature, MissingPrivilege, LimitReached) as refusal:
            reason = str(refusal)
        return cls(_core.Workers.start(config, CarrierName.EPOLL.value, count, chosen), CarrierName.EPOLL, reason)

    @property
    def workers(self) -> int:
        """How many workers it was started with."""
        return self._workers.count

    @property
    def running(self) -> bool:
        """Whether any worker still works."""
        return self._workers.running

    def snapshot(self) -> Snapshot:
        """The numbers now; workers publish theirs every 50 ms and when they end. Never raises for what went wrong."""
        raw = self._workers.snapshot()
        stopped_by = raw["stopped_by"]
        failures = tuple(Failure(step=step, errno=error, count=count) for step, error, count in raw["failures"])
        return Snapshot(
            **{row.name: value for row, value in zip(COUNTERS, raw["counters"], strict=True)},
            taken_s=time.monotonic() - self._started_s,
            phase=Phase(raw["phase"]),
            running=raw["running"],
            failures=failures,
            stopped_by=next((row for row in failures if (row.step, row.errno) == stopped_by), None),
            opening_reasons=tuple(raw["opening_reasons"]),
            round_reasons=tuple(raw["round_reasons"]),
            connect_ns=Quantiles(**raw["connect_ns"]),
            opening_ns=Quantiles(**raw["opening_ns"]),
            echo_ns=Quantiles(**raw["echo_ns"]),
            fill_curves=tuple(tuple(curve) for curve in raw["fill_curves"]),
            listeners_served=raw["listeners_served"],
            carrier=CarrierNumbers(**raw["carrier"]),
            errors=tuple(raw["errors"]),
        )

    def ping(self) -> None:
        """Send the token on every connection once and check what comes back.

        How far it is, `Snapshot.pings_answered` says. The phase does not: it may not have changed yet when somebody
        looks, or have changed back already.
        """
        self._workers.order("ping")

    def set_rate(self, rate_per_s: int) -> None:
        """New connections per second from now on; 0 is as fast as possible."""
        whole("rate_per_s", rate_per_s, 0, HIGHEST_COUNT)
        self._workers.order("rate", rate_per_s)

    def set_target(self, connections: int) -> None:
        """Raise (or lower, never below what is open) the number of connections to hold."""
        whole("connections", connections, 0, HIGHEST_COUNT)
        self._workers.order("target", connections)

    def close(self) -> None:
        """Make no new connections and close all; the engine ends when they are closed."""
        self._workers.order("close")

    def drain(self) -> None:
        """Accept no more; the engine ends when the connections that there are have ended by themselves."""
        self._workers.order("drain")

    def ferry(self, fds: Sequence[int]) -> None:
        """As `drain`, and move the connections that there are to another process, which takes them with `land`.

        One socket (SOCK_SEQPACKET) per worker; the engine copies them, and the caller closes its own, so that an end
        is seen. A relay moves at any time, with every byte that is on its way in it; a client that is looked at or
        waits for its service, as soon as nothing is under way for it; what the other process does not take lives on
        here. The engine ends when it has nothing more, or accepts again after `resume`.
        """
        if len(fds) != self.workers:
            raise BadConfig("fds", f"are {len(fds)}, and there are {self.workers} workers")
        self._workers.give("ferry", list(fds))

    def land(self, fds: Sequence[int]) -> None:
        """Take over the connections that come through these sockets, dealt out to the workers; copied as by `ferry`.

        `Snapshot.ferries_now` is 0 when all have said that nothing more comes, or are lost.
        """
        self._workers.give("land", list(fds))

    def resume(self) -> None:
        """Accept again after `drain` or `ferry`, unless the engine has ended by then, and move nothing more."""
        self._workers.order("resume")

    @property
    def questions_fd(self) -> int:
        """A descriptor that is readable while there are questions, for a poll or an event loop; not to be read."""
        return self._workers.questions_fd

    def questions(self, most: int = 1_024) -> list[Question]:
        """What its workers have asked and nobody has taken, the oldest first; never waits."""
        return [_question(row) for row in self._workers.questions(most)]

    def answer(self, answer: Answer) -> None:
        """Tell all workers what became of a service."""
        peer = answer.peer if isinstance(answer, Refused) else None
        self._workers.answer(type(answer).__name__.lower(), answer.service, peer)

    def opine(self, worker: int, ticket: int, known: Known | None, more_than: int | None = None) -> None:
        """Answer a `Sniff`: what it is; or that more than so many bytes are needed; or that nobody knows."""
        row = None
        if known is not None:
            row = (known.protocol, known.name, known.user, known.database, known.client)
        self._workers.opine(worker, ticket, more_than, row)

    def hold(self, service: str) -> None:
        """New connections of the service wait, until `Up` or `Slept` is answered; each worker says `Held`."""
        self._workers.hold(service)

    def ask_usage(self, ticket: int, services: Sequence[str]) -> None:
        """How much are these used? Each worker says `Usage` with this ticket."""
        self._workers.ask_usage(ticket, services)

    def ask_survey(
        self,
        worker: int,
        ticket: int,
        start: int,
        most: int,
        service: str | None = None,
        source: tuple[IPv4Address | IPv6Address, int] | None = None,
    ) -> bool:
        """Which connections are there, of one service, from one prefix (address and bits), or at all? The worker says
        `Surveyed`, having looked at some thousand places from `start` on. False if it works no more."""
        return self._workers.ask_survey(worker, ticket, start, most, service, source)

    def ask_busiest(self, worker: int, ticket: int, by: str, start: int, most: int) -> bool:
        """Which services are the busiest, by `live`, `total` or `bytes`? The worker says `Busiest`."""
        return self._workers.ask_busiest(worker, ticket, by, start, most)

    def ask_close(self, worker: int, ticket: int, connection: int, start: int) -> bool:
        """Close a connection, by its id. The worker says `Closed`, as of `ask_survey`."""
        return self._workers.ask_close(worker, ticket, connection, start)

    def set_limits(self, most_connections: int, most_per_source: int, most_per_service: int) -> None:
        """Bounds of a broker from now on, as in `BrokerConfig`; what there is may stay."""
        whole("most_connections", most_connections, 0, HIGHEST_COUNT // 4)
        whole("most_per_source", most_per_source, 0, HIGHEST_COUNT)
        whole("most_per_service", most_per_service, 0, HIGHEST_COUNT)
        self._workers.set_limits(most_connections, most_per_source, most_per_service)

    def stop(self) -> None:
        """End now, whatever is open."""
        self._workers.stop()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; says whether it came in time. Raises EngineStopped if a worker ended before its work."""
        if timeout_s is not None:
            seconds("timeout_s", timeout_s, 0)
        return self._workers.join(timeout_s)

    def wait_for(self, predicate: Callable[[Snapshot], bool], timeout_s: float) -> Snapshot:
        """The first snapshot of which `predicate` is true; TimeoutError or EngineStopped if there will be none."""
        seconds("timeout_s", timeout_s, 0)
        deadline_s, glance_s = time.monotonic() + timeout_s, _GLANCES_S[0]
        while not predicate(now := self.snapshot()):
            if not now.running:
                raise EngineStopped("; ".join(now.errors) or f"the engine was done before ({_in_short(now)})")
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"not within {timeout_s:g} s ({_in_short(now)})")
            time.sleep(glance_s)
            glance_s = min(2 * glance_s, _GLANCES_S[1])
        return now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is None:
            self.join()
            return
        try:
            self.join()
        except EngineStopped as stopped:  # the error on its way out is the one to see
            if error is not None:
                error.add_note(f"the engine: {stopped}")


def raise_soft_descriptors() -> None:
    """Of this process, up to what it may have without asking anybody (catalogue B1).

    It bounds epoll's connections, and how many direct descriptors a ring has: of many small rings each costs its turn.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def uring_abilities() -> dict[str, bool]:
    """What io_uring can do for this process, each ability tried; raises, naming the reason, where there is none."""
    return dict(_core.uring_abilities())


def _question(row: _core._Question) -> Question:
    match row:
        case ("wake", worker, wake):
            peer = wake["peer"]
            return Wake(
                worker=worker,
                service=wake["service"],
                start=wake["start"],
                target=wake["target"],
                name=wake["name"],
                user=wake["user"],
                database=wake["database"],
                protocol=wake["protocol"],
                delivery=wake["delivery"],
                peer=None if peer is None else Endpoint(*peer),
            )
        case ("usage", worker, usage):
            rows = (
                ServiceUsage(service=service, live=live, parked=parked, unused_s=unused_s)
                for service, live, parked, unused_s in usage["rows"]
            )
            return Usage(worker=worker, ticket=usage["ticket"], rows=tuple(rows))
        case ("sniff", worker, sniff):
            return Sniff(worker=worker, **sniff)
        case ("surveyed", worker, surveyed):
            found = tuple(
                SeenConnection(
                    id=seen["id"],
                    peer=None if seen["peer"] is None else Endpoint(*seen["peer"]),
                    service=seen["service"],
                    state=seen["state"],
                    age_s=seen["age_s"],
                    bytes_up=seen["bytes_up"],
                    bytes_down=seen["bytes_down"],
                    listener=seen["listener"],
                )
                for seen in surveyed["rows"]
            )
            return Surveyed(worker=worker, ticket=surveyed["ticket"], connections=found, next=surveyed["next"])
        case ("busiest", worker, busiest):
            return Busiest(
                worker=worker,
                ticket=busiest["ticket"],
                services=tuple(busiest["rows"]),
                next=busiest["next"],
                least=busiest["least"],
            )
        case ("closed", worker, closed):
            return Closed(worker=worker, **closed)
        case (_, worker, held):
            return Held(worker=worker, service=held["service"], live=held["live"])


def _require_room_to_say(config: LoadConfig | EchoConfig | BrokerConfig, settings: CarrierSettings) -> None:
    if isinstance(config, LoadConfig) and config.dialogue is not None and settings.buffer_bytes is not None:
        longest = config.dialogue.longest_say_bytes
        if longest > settings.buffer_bytes:
            raise BadConfig("settings.buffer_bytes", f"is {settings.buffer_bytes}; the dialogue says {longest} at once")


def _require_a_listener_each(config: LoadConfig | EchoConfig | BrokerConfig, workers: int) -> None:
    for place, listener in enumerate(config.listeners if isinstance(config, BrokerConfig) else ()):
        if listener.fds and len(listener.fds) != workers:
            raise BadConfig(f"listeners[{place}].fds", f"are {len(listener.fds)}, and there are {workers} workers")


def _worth_while(config: LoadConfig | EchoConfig | BrokerConfig) -> int:
    cpus = len(os.sched_getaffinity(0))
    match config:
        case LoadConfig(connections=connections, rate_per_s=rate_per_s, tls=tls):
            enough = CONNECTIONS_PER_WORKER if tls is None else SECURED_PER_WORKER
            return max(1, min(cpus, connections // enough, rate_per_s or cpus))
        case EchoConfig(most_connections=most) if most:
            return max(1, min(cpus, most // CONNECTIONS_PER_WORKER))
        case BrokerConfig(listeners=listeners) if any(listener.fds for listener in listeners):
            return max(len(listener.fds) for listener in listeners)
        case _:
            return cpus


def _in_short(now: Snapshot) -> str:
    failures = ", ".join(str(failure) for failure in now.failures)
    return f"{now.phase.value}, {now.open_now:,} open" + (f", {failures}" if failures else "")
