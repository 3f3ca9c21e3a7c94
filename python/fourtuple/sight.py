"""One engine and its services, as the control socket sees and changes them.

Decides how an engine's numbers become answers. Knows neither HTTP nor who asks. A broker of one process is controlled
by this alone; a supervisor asks the broker's process for what only an engine knows, and answers the rest itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

from fourtuple.control.processes import view
from fourtuple.control.verbs import (
    Connections,
    FailureRow,
    Limits,
    Numbers,
    ProcessView,
    Refused,
    ServiceView,
    Spread,
    Standings,
    Status,
    Top,
    Upgrade,
)
from fourtuple.engine import PROGRAM_VERSION, Engine, Phase, Snapshot
from fourtuple.errors import BadConfig
from fourtuple.metrics import COUNTERS
from fourtuple.questions import Question
from fourtuple.registry import Registry, Sealed, service_in, services_in
from fourtuple.services import Service
from fourtuple.survey import Survey

_ENDED = "ended_"
_NO_SUPERVISOR = "this broker runs without a supervisor"


def _unheard(_: Question) -> None:
    """What nobody is there for."""


class Sight:
    """A `Controlled` of one engine. What it takes a supervisor for is refused (`conflict`)."""

    def __init__(
        self, engine: Engine, store: Registry | Sealed, listeners: Sequence[str], limits: Limits, role: str = "broker"
    ) -> None:
        """`limits` are those with which the engine was started; `role` is what this process is called."""
        self._engine, self._store, self._listeners = engine, store, tuple(listeners)
        self._limits, self._role = limits, role
        self._room = limits.most_connections
        self.survey = Survey(engine, listeners)
        """Is to hear the engine's questions (`follow`, or its `heard`)."""
        self._draining = False
        self.version = PROGRAM_VERSION

    def follow(self, others: Callable[[Question], None] = _unheard) -> None:
        """Take the engine's questions, from now on and in this event loop; `others` gets what is not the survey's."""

        def take() -> None:
            for question in self._engine.questions():
                if not self.survey.heard(question):
                    others(question)

        asyncio.get_running_loop().add_reader(self._engine.questions_fd, take)

    async def status(self) -> Status:
        """As `Controlled`; so are all below."""
        now = self._engine.snapshot()
        return Status(
            version=self.version,
            state=self._state(now),
            carrier=self._engine.carrier.value,
            workers=self._engine.workers,
            listeners=self._listeners,
            accepted=now.accepts_succeeded,
            sniffing=now.sniffing_now,
            delivering=now.delivering_now,
            relaying=now.relaying_now,
            ended=sum(_reasons(now).values()),
            services=self._standings(),
            processes=self._processes(),
        )

    async def numbers(self) -> Numbers:
        now = self._engine.snapshot()
        spread = now.opening_ns
        return Numbers(
            version=self.version,
            carrier=self._engine.carrier.value,
            counters={row.name: getattr(now, row.name) for row in COUNTERS},
            failures=_failures(now),
            delivery=Spread(
                count=spread.count, mean=spread.mean, p50=spread.p50, p90=spread.p90, p99=spread.p99, p999=spread.p999
            ),
            services=self._standings(),
            processes=self._processes(),
        )

    async def connections(self, after: str | None, most: int, service: str | None, source: str | None) -> Connections:
        return await self.survey.connections(after, most, service, source)

    async def close_connection(self, id: str) -> None:
        await self.survey.close(id)

    async def top(self, by: str, most: int) -> Top:
        return await self.survey.top(by, most)

    async def limits(self) -> Limits:
        return self._limits

    async def set_limits(self, changes: Mapping[str, int]) -> Limits:
        fresh = dataclasses.replace(self._limits, **changes)
        room, wanted = self._room, fresh.most_connections
        if room and (wanted == 0 or wanted > room):
            raise Refused(
                "conflict",
                f"the broker was started with room for {room:,}",
                field="most_connections",
                value=wanted,
                remedy="start it with --most 0, or a higher one",
            )
        self._engine.set_limits(fresh.most_connections, fresh.most_per_source, fresh.most_per_service)
        self._limits = fresh
        return fresh

    async def reasons(self) -> dict[str, int]:
        return _reasons(self._engine.snapshot())

    async def failures(self) -> tuple[FailureRow, ...]:
        return _failures(self._engine.snapshot())

    async def service(self, name: str) -> ServiceView:
        found = self._service(name)
        return ServiceView(
            name=found.name,
            target=found.target,
            delivery=found.delivery.value,
            standing="unmanaged",
            live=await self.survey.live(found.name),
        )

    async def wake(self, service: str, wait_s: float) -> ServiceView:
        self._service(service)
        raise Refused("conflict", _NO_SUPERVISOR, field="name", value=service, remedy="start the service yourself")

    async def stop(self, service: str, wait_s: float) -> ServiceView:
        self._service(service)
        raise Refused("conflict", _NO_SUPERVISOR, field="name", value=service, remedy="stop the service yourself")

    async def drain(self, grace_s: float | None) -> None:
        if self._draining:
            raise Refused("conflict", "it drains already", remedy="wait for its end, or end it by SIGTERM")
        self._draining = True
        self._engine.drain()
        if grace_s is not None:
            asyncio.get_running_loop().call_later(grace_s, self._engine.close)

    async def upgrade(self, executable: str | None) -> Upgrade:
        raise Refused("conflict", _NO_SUPERVISOR, remedy="start another broker, then drain this one")

    async def reload(self) -> None:
        raise Refused("conflict", _NO_SUPERVISOR, remedy="start it again with the new file")

    def _service(self, name: str) -> Service:
        try:
            found = service_in(self._store, name)
        except BadConfig:
            found = None
        if found is None:
            raise Refused(
                "absent", "there is no such service", field="name", value=name, remedy="fourtuple services list"
            )
        return found

    def _standings(self) -> Standings:
        return Standings(known=services_in(self._store))

    def _processes(self) -> tuple[ProcessView, ...]:
        found = view(self._role, os.getpid())
        return () if found is None else (found,)

    def _state(self, now: Snapshot) -> str:
        if not now.running:
            return "ended"
        return "draining" if self._draining or now.phase is Phase.CLOSING else "serving"


def _reasons(now: Snapshot) -> dict[str, int]:
    names = [row.name for row in COUNTERS if row.name.startswith(_ENDED)]
    return {name.removeprefix(_ENDED): getattr(now, name) for name in names}


def _failures(now: Snapshot) -> tuple[FailureRow, ...]:
    return tuple(FailureRow(step=row.step, errno=row.name, count=row.count) for row in now.failures)
