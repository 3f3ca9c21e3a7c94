"""Services that sleep: started when a client asks for them, stopped when nobody has used them for a while.

Decides when a service may be started and when it may be stopped, so that no client meets one that is just leaving:
the broker is told to hold its clients back first, and says how many connections there still are. Knows neither how a
process is made (the launcher does) nor what a connection is.

A service is in one of these states; one that sleeps is not in the table at all, and costs nothing.

    STARTING -> UP -> HOLDING -> STOPPING -> (asleep)
                 ^-------'
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Coroutine, Hashable, Iterable, Mapping
from enum import Enum
from ipaddress import ip_address
from typing import Any, Protocol

from msgspec import Struct, field

from fourtuple.errors import FourtupleError, MissingPrivilege
from fourtuple.launcher import Exit, Launcher, Phase, StartFailed
from fourtuple.services import Delivery, Service
from fourtuple.supervisor.channel import Fields
from fourtuple.supervisor.ebb import Ebb, give_back
from fourtuple.supervisor.wakes import Wakes
from fourtuple.templates import Call, Template

_trouble = logging.getLogger("fourtuple.dormancy")
_GLANCE_S = 0.5
_ANSWERED_WITHIN_S = 5.0
_MOST_FAILURES = 1_024
"""Remembered, for who asks."""
_MOVES_WITHIN_S = 10.0
_USAGE_PER_MESSAGE = 64
_TARGETS = ("unix:", "tcp:")
_LOOKS_AGAIN_S = 5.0
"""When a service is still in use that the broker knows no connection of: sockets that were handed over."""


class State(Enum):
    """Of a service that does not sleep."""

    STARTING = "starting"
    UP = "up"
    HOLDING = "holding"
    STOPPING = "stopping"


class Brokers(Protocol):
    """What it needs of the broker processes: there are two of them for the moment of an upgrade."""

    def answer(self, answers: Iterable[Fields]) -> None:
        """Tell all workers of all of them."""

    @property
    def workers(self) -> int:
        """How many will answer what is asked of all of them."""


class Registered(Protocol):
    """What the registry says now."""

    def find(self, name: str) -> Service | None:
        """The service of that name."""

    def version(self) -> Hashable:
        """As long as it is the same, nothing has changed."""

    def addresses(self) -> Iterable[Container[bytes]]:
        """Of all TCP targets, packed."""


class _Service(Struct):
    template: Template
    target: str = ""
    """Where it was started."""
    delivery: Delivery = Delivery.RELAY
    """For which; the other has another kind of socket."""
    state: State = State.STARTING
    since_s: float = field(default_factory=time.monotonic)
    """In this state."""
    looked_at_s: float = 0.0
    next_look_s: float = 0.0
    ticket: int = 0
    """Of the question that is open."""
    heard: int = 0
    """Workers that have answered what was asked last."""
    live: int = 0
    idle_s: float = 0.0
    moves_by_s: float = 0.0
    """The registry has it elsewhere, and by then it is stopped here, whoever uses it."""


class Dormancy:
    """All of them."""

    def __init__(
        self,
        launcher: Launcher,
        templates: dict[str, Template],
        wakes: Wakes,
        brokers: Brokers,
        log: Callable[..., None],
    ) -> None:
        self._launcher = launcher
        self._templates = templates
        self._wakes = wakes
        self._brokers = brokers
        self._log = log
        self._services: dict[str, _Service] = {}
        self._failures: OrderedDict[str, str] = OrderedDict()
        self._waiting: deque[tuple[str, Fields]] = deque()
        """Services whose turn to start has not come. When ten thousand are called at once, nothing is to be there for
        each but what was asked; a start of its own takes ten times that."""
        self._starting = 0
        self.registered: Registered | None = None
        """Where services may be moved while they run."""
        self._version: Hashable = None
        self._unsettled: set[str] = set()
        """Services that may come up without anybody who has asked for them here."""
        self._tickets = 0
        self._ebb = Ebb()
        self._tasks: set[asyncio.Task[None]] = set()
        self.woken = self.failed = self.refused = self.stopped = self.ended = 0
        """Totals: starts that succeeded, that did not, wakes that were not allowed, idle stops, unexpected ends."""

    # ---- questions ---------------------------------------------------------------------------------------------------

    def wake(self, asked: Fields, *, is_ordered: bool = False) -> None:
        """A client is there for a service that sleeps, as far as the broker knows; or somebody has ordered it."""
        service, name = str(asked["service"]), str(asked["start"])
        one = self._services.get(service)
        if one is not None:
            # One that starts or stops is answered for when it has; the broker then asks again if it has to.
            if one.state is State.UP:
                self._brokers.answer([{"kind": "up", "service": service}])
            return
        # Who has waited for long may have looked before it was moved.
        if (found := self._found(service)) is not None and found.start is not None:
            name, asked = found.start, {**asked, "target": found.target, "delivery": found.delivery.value}
        template = self._templates.get(name)
        if template is None:
            return self._fail(service, name, f"there is no template {name}")
        peer = ip_address(asked["peer"]) if asked.get("peer") else None
        if not is_ordered and (why := self._wakes.refusal(peer, time.monotonic())):
            self.refused += 1
            self._log("service_refused", service=service, peer=asked.get("peer"), why=why)
            self._brokers.answer([{"kind": "refused", "service": service, "why": why, "peer": asked.get("peer")}])
            return
        self._log("service_asked", service=service, start=name, peer=asked.get("peer"), protocol=asked.get("protocol"))
        self._services[service] = _Service(template, str(asked["target"]), Delivery(asked.get("delivery", "relay")))
        self._waiting.append((service, asked))
        self._begin_next()

    def usage(self, told: Fields) -> None:
        """A worker says how much some services are used."""
        for service, live, unused_s in told["rows"]:
            one = self._services.get(str(service))
            if one is not None and one.state is State.UP and one.ticket == told["ticket"]:
                if unused_s is not None:
                    one.idle_s = min(one.idle_s, float(unused_s))
                self._heard(str(service), one, int(live))

    def held(self, told: Fields) -> None:
        """A worker lets no new connections through to a service, and says how many there are."""
        one = self._services.get(str(told["service"]))
        if one is not None and one.state is State.HOLDING:
            self._heard(str(told["service"]), one, int(told["live"]))

    def exited(self, exit: Exit) -> None:
        """A service has ended that nobody has told to."""
        service = exit.service
        one = self._services.get(service)
        if one is None or one.state in (State.STARTING, State.STOPPING):
            return
        self.ended += 1
        del self._services[service]
        self._log("service_failed", service=service, status=exit.status)
        self._brokers.answer([{"kind": "slept", "service": service}])

    def broker_ended(self) -> None:
        """A broker process is gone, and with it what it has not answered: who was held back for that is let through."""
        for service, one in self._services.items():
            if one.state is State.HOLDING and not one.moves_by_s:
                self._let_go(service, one)

    # ---- from outside ------------------------------------------------------------------------------------------------

    def states(self) -> dict[str, str]:
        """Of those that do not sleep."""
        return {service: one.state.value for service, one in self._services.items()}

    def __len__(self) -> int:
        """How many do not sleep."""
        return len(self._services)

    def up(self) -> list[str]:
        """Services that are running."""
        return [service for service, one in self._services.items() if one.state is State.UP]

    def counts(self) -> dict[str, int]:
        """Totals, and how many services there are that do not sleep."""
        return {
            "services_awake": len(self._services),
            "services_woken": self.woken,
            "starts_failed": self.failed,
            "wakes_refused": self.refused,
            "services_stopped": self.stopped,
            "services_ended": self.ended,
        }

    def why(self, service: str) -> str:
        """Why its last start failed; nothing if it did not, or that is long ago."""
        return self._failures.get(service, "")

    def replace(self, templates: dict[str, Template]) -> None:
        """Templates for starts from now on."""
        self._templates = templates

    def resume(self, running: dict[str, str], unsettled: Iterable[str], counts: Mapping[str, int]) -> None:
        """What a supervisor has left whose place this one has taken: services and their templates, and those of which
        the launcher alone knows how far they are. Their clients ask anew, and find the start going on."""
        places = {one.service: (one.target, one.delivery) for one in self._launcher.services()}
        for service, name in running.items():
            if (template := self._templates.get(name)) is not None:
                self._services[service] = _Service(template, *places.get(service, ("", Delivery.RELAY)), State.UP)
        self._tell("up", self._services)
        self._unsettled.update(unsettled)
        self._tell("slept", self._unsettled)
        self.woken, self.failed = counts["services_woken"], counts["starts_failed"]
        self.refused, self.stopped = counts["wakes_refused"], counts["services_stopped"]
        self.ended = counts["services_ended"]

    def running_templates(self) -> dict[str, str]:
        """As `resume` takes it: who is running."""
        running = (State.UP, State.HOLDING)
        return {name: one.template.name for name, one in self._services.items() if one.state in running}

    def unsettled(self) -> list[str]:
        """As `resume` takes it: who is about to run, or not to."""
        between = (State.STARTING, State.STOPPING)
        return [name for name, one in self._services.items() if one.state in between]

    async def stop(self, service: str) -> bool:
        """Stop it now, whoever uses it; says whether it was there."""
        one = self._services.get(service)
        if one is None or one.state not in (State.UP, State.HOLDING):
            return False
        await self._stop(service, one)
        return True

    async def look_after(self) -> None:
        """Stop what nobody uses, until cancelled."""
        while True:
            await asyncio.sleep(_GLANCE_S)
            try:
                self._look()
            except Exception:
                # Without this, nothing would ever sleep again, and nobody would hear of it.
                _trouble.exception("services cannot be looked after")

    async def aclose(self) -> None:
        """Begin nothing more."""
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _look(self) -> None:
        if self._ebb.seen(len(self._services)):
            give_back()
        self._settle()
        self._look_for_moved()
        now_s = time.monotonic()
        asked = []
        self._tickets += 1
        for service, one in self._services.items():
            if one.state is State.UP and one.template.idle_s is not None and now_s >= one.next_look_s:
                # The first look is due when it could first be over, and every look is answered or repeated.
                if one.looked_at_s == 0.0 and now_s - one.since_s < one.template.idle_s:
                    one.next_look_s = one.since_s + (one.template.idle_s or 0.0)
                    continue
                one.looked_at_s, one.next_look_s = now_s, now_s + _ANSWERED_WITHIN_S
                one.ticket, one.heard, one.live = self._tickets, 0, 0
                one.idle_s = now_s - one.since_s
                asked.append(service)
            elif one.state is State.HOLDING and one.moves_by_s:
                self._move(service, one, now_s)
            elif one.state is State.HOLDING and now_s - one.since_s > _ANSWERED_WITHIN_S:
                self._let_go(service, one)
        for at in range(0, len(asked), _USAGE_PER_MESSAGE):
            some = asked[at : at + _USAGE_PER_MESSAGE]
            self._brokers.answer([{"kind": "usage", "ticket": self._tickets, "services": some}])

    def _look_for_moved(self) -> None:
        """Who runs where the registry does not have it any more is stopped there: its next clients start it where they
        look for it. They wait meanwhile, and those that it has may end what they have begun."""
        if self.registered is None:
            return
        try:
            version = self.registered.version()
            if version == self._version:
                return
            self._version = version
            for service, one in self._services.items():
                if one.state is not State.UP or not one.target:
                    continue
                found = self._found(service)
                if found is None:
                    continue
                if (found.target, found.start, found.delivery) != (one.target, one.template.name, one.delivery):
                    one.moves_by_s = time.monotonic() + _MOVES_WITHIN_S
                    self._log("service_moved", service=service, target=found.target)
                    self._hold(service, one)
        except FourtupleError as error:
            self._log("registry_unread", why=str(error))

    def _found(self, service: str) -> Service | None:
        if self.registered is None or service.startswith(_TARGETS):
            return None
        try:
            return self.registered.find(service)
        except FourtupleError as error:
            self._log("registry_unread", why=str(error))
            return None

    def _move(self, service: str, one: _Service, now_s: float) -> None:
        if now_s >= one.moves_by_s:
            self._spawn(self._stop(service, one))
        else:
            self._hold(service, one)

    def _hold(self, service: str, one: _Service) -> None:
        one.state, one.since_s, one.heard, one.live = State.HOLDING, time.monotonic(), 0, 0
        self._brokers.answer([{"kind": "hold", "service": service}])

    def _settle(self) -> None:
        """Look after those that have come up for clients who have all left while this program took its place."""
        if not self._unsettled:
            return
        there = {one.service: one for one in self._launcher.services()}
        for service in list(self._unsettled):
            one = there.get(service)
            if one is None or service in self._services:
                self._unsettled.discard(service)
            elif one.phase is Phase.RUNNING:
                self._unsettled.discard(service)
                template = self._templates.get(one.template)
                if template is not None:
                    self._services[service] = _Service(template, one.target, one.delivery, State.UP)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _tell(self, kind: str, services: Iterable[str]) -> None:
        rows = [{"kind": kind, "service": service} for service in services]
        for at in range(0, len(rows), _USAGE_PER_MESSAGE):
            self._brokers.answer(rows[at : at + _USAGE_PER_MESSAGE])

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _begin_next(self) -> None:
        while self._waiting and self._starting < self._launcher.most_starting:
            service, asked = self._waiting.popleft()
            one = self._services.get(service)
            if one is not None and one.state is State.STARTING:
                self._starting += 1
                self._spawn(self._take_turn(service, one.template, asked))

    async def _take_turn(self, service: str, template: Template, asked: Fields) -> None:
        try:
            await self._start(service, template, asked)
        finally:
            self._starting -= 1
            self._begin_next()

    async def _start(self, service: str, template: Template, asked: Fields) -> None:
        begun_s = time.monotonic()
        call = Call(
            service=service,
            template=template.name,
            target=str(asked["target"]),
            delivery=Delivery(asked.get("delivery", "relay")),
            # A route's pattern has no name of its own: its service is known by its target.
            name=str(asked["name"]) if service.startswith(_TARGETS) and asked["name"] else None,
            user=_shown(asked, "user"),
            database=_shown(asked, "database"),
        )
        try:
            pid = (await self._launcher.start(call)).pid
        except StartFailed as error:
            self._services.pop(service, None)
            return self._fail(service, template.name, error.why)
        except asyncio.CancelledError:
            self._services.pop(service, None)
            raise
        one = self._services.get(service)
        if one is None:
            return
        one.state, one.since_s = State.UP, time.monotonic()
        self.woken += 1
        self._failures.pop(service, None)
        self._log("service_up", service=service, pid=pid, took_ms=round((one.since_s - begun_s) * 1e3, 3))
        self._brokers.answer([{"kind": "up", "service": service}])

    def _fail(self, service: str, template: str, why: str) -> None:
        self.failed += 1
        self._failures[service] = why
        self._failures.move_to_end(service)
        if len(self._failures) > _MOST_FAILURES:
            self._failures.popitem(last=False)
        self._log("service_failed", service=service, why=why)
        self._brokers.answer([{"kind": "failed", "service": service}])

    def _heard(self, service: str, one: _Service, live: int) -> None:
        one.heard += 1
        one.live += live
        if one.heard < self._brokers.workers:
            return
        if one.state is State.HOLDING:
            # Sockets that were handed over are no connections of the broker's any more.
            if one.live or self._is_busy(service):
                return None if one.moves_by_s else self._let_go(service, one)
            self._spawn(self._stop(service, one))
            return
        now_s, idle_s = time.monotonic(), one.template.idle_s or 0.0
        if one.live:
            one.next_look_s = now_s + idle_s
        elif one.idle_s < idle_s:
            one.next_look_s = now_s + idle_s - one.idle_s
        elif self._is_busy(service):
            one.next_look_s = now_s + min(idle_s, _LOOKS_AGAIN_S)
        else:
            self._hold(service, one)

    def _is_busy(self, service: str) -> bool:
        try:
            return self._launcher.busy(service)
        except MissingPrivilege as error:
            # Who cannot look does not stop it.
            self._log("service_kept", service=service, why=str(error))
            return True

    def _let_go(self, service: str, one: _Service) -> None:
        """Somebody uses it after all, or a worker does not answer."""
        one.state, one.since_s = State.UP, time.monotonic()
        one.next_look_s = one.since_s + (one.template.idle_s or 0.0)
        self._brokers.answer([{"kind": "up", "service": service}])

    async def _stop(self, service: str, one: _Service) -> None:
        # Whoever has been told to, has heard of it twice, or it has ended since.
        if self._services.get(service) is not one or one.state is State.STOPPING:
            return
        one.state, one.since_s = State.STOPPING, time.monotonic()
        try:
            await self._launcher.stop(service)
        finally:
            if self._services.get(service) is one:
                del self._services[service]
            self.stopped += 1
            self._log("service_stopped", service=service)
            self._brokers.answer([{"kind": "slept", "service": service}])


def _shown(asked: Fields, key: str) -> str | None:
    """What the client has shown, unless no command could have it: then the template has no value for it."""
    text = asked.get(key)
    return text if text and text[0] not in ".-" else None
