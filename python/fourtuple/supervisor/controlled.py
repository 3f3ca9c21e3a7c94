"""The supervisor as the control socket sees it: what it knows itself, and what it asks of the broker process.

Decides which of both answers a verb, and how two answers become one. Knows no HTTP and nobody's rights.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from fourtuple.control.processes import view
from fourtuple.control.verbs import (
    Connections,
    FailureRow,
    Limits,
    Numbers,
    Refused,
    ServiceView,
    Standings,
    Status,
    Top,
    Upgrade,
    plain,
)
from fourtuple.errors import BadConfig, EngineStopped
from fourtuple.launcher import Phase
from fourtuple.services import Service

if TYPE_CHECKING:
    from fourtuple.supervisor.supervisor import Supervisor

_LOOKS_S = 0.02
_STANDINGS = {
    Phase.WAITING: "starting",
    Phase.STARTING: "starting",
    Phase.RUNNING: "awake",
    Phase.STOPPING: "stopping",
    Phase.ENDING: "stopping",
}


class Control:
    """A `Controlled` (fourtuple.control.verbs) of a supervisor. The broker's rows are passed on as they come."""

    def __init__(self, supervisor: Supervisor, found: Callable[[str], Service | None]) -> None:
        """`found` is a service by its name."""
        self._supervisor, self._found = supervisor, found

    async def status(self) -> Status:
        """As `Controlled`; so are all below."""
        row = await self._broker("status")
        supervisor = self._supervisor
        total = supervisor.total
        state = "draining" if supervisor.is_ending else row["state"]
        more = {
            "accepted": row["accepted"] + total.get("accepted", 0),
            "ended": row["ended"] + sum(total.get("ended", {}).values()),
            "restarts": supervisor.restarts,
            "upgrade": plain(supervisor.upgraded),
            "state": state,
        }
        return cast("Status", {**row, **more, **self._both(row)})

    async def numbers(self) -> Numbers:
        row = await self._broker("numbers")
        gone = self._supervisor.total.get("counters", {})
        counters = {
            name: value if name.endswith("_now") else value + gone.get(name, 0)
            for name, value in row["counters"].items()
        }
        more = {"counters": counters, "restarts": self._supervisor.restarts, "wakes": self._supervisor.wakes()}
        return cast("Numbers", {**row, **more, **self._both(row)})

    async def connections(self, after: str | None, most: int, service: str | None, source: str | None) -> Connections:
        row = await self._broker("connections", after=after, most=most, service=service, source=source)
        return cast("Connections", row)

    async def close_connection(self, id: str) -> None:
        await self._broker("close_connection", id=id)

    async def top(self, by: str, most: int) -> Top:
        return cast("Top", await self._broker("top", by=by, most=most))

    async def reasons(self) -> dict[str, int]:
        row = await self._broker("reasons")
        gone = self._supervisor.total.get("ended", {})
        return {name: row.get(name, 0) + gone.get(name, 0) for name in sorted({*row, *gone})}

    async def failures(self) -> tuple[FailureRow, ...]:
        return cast("tuple[FailureRow, ...]", await self._broker("failures"))

    async def service(self, name: str) -> ServiceView:
        return self._view(self._service(name))

    async def wake(self, service: str, wait_s: float) -> ServiceView:
        found = self._service(service)
        if found.start is None:
            raise Refused(
                "conflict", "it has no template to start it by", field="name", value=service, remedy="start it yourself"
            )
        known = {"service": found.name, "start": found.start, "target": found.target, "name": found.name}
        self._supervisor.dormancy.wake({**known, "delivery": found.delivery.value, "peer": None}, is_ordered=True)
        return await self._once(found, {"awake", "asleep", "failed"}, wait_s)

    async def stop(self, service: str, wait_s: float) -> ServiceView:
        found = self._service(service)
        stopping = asyncio.create_task(self._supervisor.dormancy.stop(found.name))
        self._supervisor.keep_task(stopping)
        await asyncio.sleep(0)
        return await self._once(found, {"asleep", "failed", "unmanaged"}, wait_s)

    async def drain(self, grace_s: float | None) -> None:
        if self._supervisor.is_ending:
            raise Refused("conflict", "it drains already", remedy="wait for its end, or end it by SIGTERM")
        grace = self._supervisor.spec.grace_s if grace_s is None else grace_s
        # The answer is to be heard.
        asyncio.get_running_loop().call_later(0.1, self._supervisor.end, grace)

    async def limits(self) -> Limits:
        return cast("Limits", await self._broker("limits"))

    async def set_limits(self, changes: Mapping[str, int]) -> Limits:
        row = await self._broker("set_limits", changes=dict(changes))
        self._supervisor.remember_limits(row)
        return cast("Limits", row)

    async def upgrade(self, executable: str | None) -> Upgrade:
        if self._supervisor.upgraded.state == "running":
            raise Refused("conflict", "one is under way", remedy="fourtuple status says how it goes")
        self._supervisor.begin_upgrade(executable)
        return self._supervisor.upgraded

    async def reload(self) -> None:
        try:
            self._supervisor.begin_reload()
        except (BadConfig, EngineStopped, OSError) as error:
            raise Refused("invalid", str(error), remedy="what was there before still holds") from None

    # ---- inside ------------------------------------------------------------------------------------------------------

    async def _broker(self, verb: str, **arguments: object) -> Any:  # noqa: ANN401 - the answer as it crossed
        broker = self._supervisor.accepting
        if broker is None:
            raise Refused("unavailable", "the broker process is being started again", remedy="ask again in a moment")
        try:
            told = await broker.ask("verb", {"verb": verb, "with": arguments})
        except EngineStopped as error:
            raise Refused("unavailable", str(error), remedy="ask again in a moment") from None
        if (refused := told.get("refused")) is not None:
            raise Refused(
                refused["kind"],
                refused["detail"],
                field=refused["field"],
                value=refused["value"],
                remedy=refused["remedy"],
            )
        return told["answer"]

    def _both(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What only both together know."""
        standings = [_STANDINGS[state.phase] for state in self._supervisor.launcher.services()]
        services = Standings(
            known=row["services"]["known"],
            awake=standings.count("awake"),
            starting=standings.count("starting"),
            stopping=standings.count("stopping"),
            failed=self._supervisor.launcher.backing_off(),
        )
        processes = [view("supervisor", self._supervisor.pid)]
        processes += [view("broker", broker.pid) for broker in self._supervisor.brokers]
        if (pid := self._supervisor.control_of()) is not None:
            processes.append(view("control", pid))
        return {"services": plain(services), "processes": [plain(one) for one in processes if one is not None]}

    def _service(self, name: str) -> Service:
        try:
            found = self._found(name)
        except BadConfig:
            found = None
        if found is None:
            raise Refused(
                "absent", "there is no such service", field="name", value=name, remedy="fourtuple services list"
            )
        return found

    def _view(self, found: Service) -> ServiceView:
        state = next((one for one in self._supervisor.launcher.services() if one.service == found.name), None)
        why = self._supervisor.dormancy.why(found.name)
        standing = "unmanaged" if found.start is None else "failed" if why else "asleep"
        since = None
        if state is not None:
            standing = _STANDINGS[state.phase]
            since = round(time.time() - (time.monotonic() - state.since_s), 3)
        return ServiceView(
            name=found.name,
            target=found.target,
            delivery=found.delivery.value,
            standing=standing,
            start=found.start,
            pids=(state.pid,) if state is not None and state.pid else (),
            since=since,
            why=why or None,
        )

    async def _once(self, found: Service, standings: set[str], wait_s: float) -> ServiceView:
        until_s = time.monotonic() + wait_s
        while (seen := self._view(found)).standing not in standings and time.monotonic() < until_s:
            await asyncio.sleep(_LOOKS_S)
        return seen
