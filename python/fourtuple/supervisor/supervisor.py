"""The supervisor: holds the listeners, keeps a broker process running on them, starts and stops services, and ends all.

Decides what happens when something ends: a broker process that died is followed by another one, on the same listeners,
so that clients in their queues wait and are not refused; one that dies again and again is tried ever more slowly. Moves
no byte and knows no connection.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any, TypeAlias

from fourtuple.brokerfile import BrokerFile
from fourtuple.errors import EngineStopped
from fourtuple.launcher import Launcher
from fourtuple.launcher.launcher import MOST_RUNNING
from fourtuple.supervisor.channel import Fields, Message
from fourtuple.supervisor.child import BrokerChild
from fourtuple.supervisor.dormancy import Dormancy
from fourtuple.supervisor.listeners import Listeners
from fourtuple.supervisor.plugins import Plugin, Plugins
from fourtuple.supervisor.spec import Spec
from fourtuple.supervisor.wakes import WakeRules, Wakes
from fourtuple.templates import Template

READY_WITHIN_S = 15.0
_BACKOFF_S = (0.05, 10.0)
_QUIET_S = 10.0
"""A broker process that has lived so long begins the back-off anew."""
_GLANCE_S = 0.5
_LAST_WORDS_S = 5.0

Log: TypeAlias = Callable[..., None]


def _silent(_event: str, **_fields: Any) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the supervisor itself goes by."""

    templates: tuple[Template, ...] = ()
    plugins: tuple[Plugin, ...] = ()
    rules: WakeRules = WakeRules()
    most_starting: int = 32
    most_running: int = MOST_RUNNING

    @classmethod
    def of(cls, file: BrokerFile) -> Settings:
        """As the file says."""
        wake = file.wake
        rules = WakeRules(
            allow=tuple(ip_network(text) for text in wake.allow),
            deny=tuple(ip_network(text) for text in wake.deny),
            per_minute=wake.per_minute,
            per_source_per_minute=wake.per_source_per_minute,
        )
        return cls(
            templates=file.templates,
            plugins=tuple(Plugin(**dict(table)) for table in file.plugin),
            rules=rules,
            most_starting=wake.most_starting,
            most_running=wake.most_running or MOST_RUNNING,
        )


class Supervisor:
    """One of them. Made within a running event loop; `run` to the end."""

    def __init__(self, spec: Spec, settings: Settings, listeners: Listeners, log: Log = _silent) -> None:
        self.spec = spec
        self.listeners = listeners
        self._settings = settings
        self._log = log
        self._brokers: list[BrokerChild] = []
        """The one that accepts is the first; behind it those that are moving what they have to it."""
        self._ended: Fields = {}
        """What the broker processes that are gone have counted, added up."""
        self._ending: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        """How long connections may still take, once somebody has said that it is over."""
        self._hurried = asyncio.Event()
        self._launcher = Launcher(
            settings.templates,
            most_starting=settings.most_starting,
            most_running=settings.most_running,
            ports=frozenset(endpoint.port for endpoint in listeners.endpoints),
            exited=lambda exit: self._dormancy.exited(exit),
        )
        templates = {template.name: template for template in settings.templates}
        self._dormancy = Dormancy(self._launcher, templates, Wakes(settings.rules), self, log)
        self._plugins = Plugins(settings.plugins, log)
        self._minding: list[asyncio.Task[None]] = []
        self._pause_s = _BACKOFF_S[0]
        self.restarts = 0
        """Broker processes that ended by themselves and were followed by another."""
        self.lost = 0
        """Connections that broker processes had when they died, of which nothing is known."""

    # ---- what services need of brokers -------------------------------------------------------------------------------

    def answer(self, answers: Iterable[Fields]) -> None:
        """Tell all workers of all broker processes."""
        told = {"answers": list(answers)}
        for broker in self._brokers:
            broker.send("answers", told)

    @property
    def workers(self) -> int:
        """Of all of them."""
        return len(self._brokers) * self.spec.workers

    # ---- life --------------------------------------------------------------------------------------------------------

    async def begin(self) -> Fields:
        """Start the first broker process; what it says when it is ready. Raises EngineStopped with its reason."""
        return await self._replace(self._forked())

    async def run(self) -> None:
        """Serve until `end`, then until all has ended."""
        looking_after = asyncio.create_task(self._dormancy.look_after())
        try:
            await self._finish(await self._ending)
        finally:
            for task in (looking_after, *self._minding):
                task.cancel()
            await asyncio.gather(looking_after, *self._minding, return_exceptions=True)
            await self._dormancy.aclose()
            await self._plugins.aclose()
            await self._launcher.aclose()
            for broker in self._brokers:
                broker.kill()
            self.listeners.close()

    def end(self, grace_s: float) -> None:
        """Accept no more, and end when connections have, or after `grace_s`; said again, end at once."""
        if self._ending.done():
            self._hurried.set()
        else:
            self._ending.set_result(grace_s)

    @property
    def is_ending(self) -> bool:
        """Whether somebody has said that it is over."""
        return self._ending.done()

    # ---- numbers -----------------------------------------------------------------------------------------------------

    async def summary(self) -> Fields:
        """What all broker processes have counted, those that are gone included."""
        rows = [self._ended]
        for broker in list(self._brokers):
            with suppress(EngineStopped):
                broker.last = await broker.ask("summary")
            rows.append(broker.last)
        total = _added(rows)
        total["supervisor"] = {
            "broker_restarts": self.restarts,
            "connections_lost": self.lost,
            "services_awake": len(self._dormancy.states()),
            "services_woken": self._dormancy.woken,
            "starts_failed": self._dormancy.failed,
            "wakes_refused": self._dormancy.refused,
            "services_stopped": self._dormancy.stopped,
            "services_ended": self._dormancy.ended,
        }
        if self._settings.plugins:
            total["plugins"] = self._plugins.counts()
        return total

    # ---- broker processes --------------------------------------------------------------------------------------------

    def _forked(self) -> BrokerChild:
        return BrokerChild.forked(self._hear)

    async def _replace(self, broker: BrokerChild) -> Fields:
        """Let it begin; once it is ready it is the one that accepts. Raises EngineStopped, and it is gone, if it is not."""
        broker.begin(self.spec, self.listeners)
        try:
            ready = await broker.is_ready(READY_WITHIN_S)
        except BaseException:
            broker.kill()
            await broker.ended
            raise
        self._adopt(broker)
        self._log("broker_ready", pid=broker.pid, carrier=ready.get("carrier"), fallback=ready.get("fallback"))
        return ready

    def _adopt(self, broker: BrokerChild) -> None:
        self._brokers.insert(0, broker)
        self._minding.append(asyncio.create_task(self._mind(broker)))

    async def _mind(self, broker: BrokerChild) -> None:
        """Wait for its end; if it was the one that accepts, another follows."""
        begun_s = time.monotonic()
        glance = asyncio.create_task(self._glance(broker))
        try:
            status = await asyncio.shield(broker.ended)
        finally:
            glance.cancel()
        accepted = broker is self._brokers[0]
        self._count_ended(broker, status)
        if not accepted or self.is_ending:
            return
        if time.monotonic() - begun_s > _QUIET_S:
            self._pause_s = _BACKOFF_S[0]
        while not self.is_ending:
            self.restarts += 1
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(self._pause_s * 2, _BACKOFF_S[1])
            try:
                await self._replace(self._forked())
                return
            except EngineStopped as error:
                self._log("broker_failed", why=str(error))

    async def _glance(self, broker: BrokerChild) -> None:
        """Know its numbers should it die; and that it lives: one that does not answer is as good as dead."""
        while True:
            await asyncio.sleep(_GLANCE_S)
            with suppress(EngineStopped):
                broker.last = await broker.ask("summary")

    def _count_ended(self, broker: BrokerChild, status: int) -> None:
        self._brokers.remove(broker)
        last = broker.last
        if not last.get("final"):
            known = int(last.get("accepted", 0)) - sum(last.get("ended", {}).values())
            self.lost += known
            self._log("broker_died", pid=broker.pid, status=status, connections=known)
            gauges = {name: 0 for name in ("sniffing", "delivering", "relaying")}
            last = {**last, **gauges, "ended": {**last.get("ended", {}), "broker_died": known}}
        self._ended = _added([self._ended, last])

    async def _finish(self, grace_s: float) -> None:
        for broker in self._brokers:
            broker.send("drain", {"grace_s": grace_s})
        self.listeners.close()
        ended = [asyncio.ensure_future(asyncio.shield(broker.ended)) for broker in self._brokers]
        hurried = asyncio.create_task(self._hurried.wait())
        await asyncio.wait([hurried, *ended], return_when=asyncio.FIRST_COMPLETED)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s + _LAST_WORDS_S):
                waiting = asyncio.gather(*ended)
                await asyncio.wait((waiting, hurried), return_when=asyncio.FIRST_COMPLETED)
        for broker in self._brokers:
            if not broker.ended.done():
                broker.send("close")
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await asyncio.gather(*ended)
        hurried.cancel()
        for broker in list(self._brokers):
            if not broker.ended.done():
                broker.kill()
                await broker.ended
            self._count_ended(broker, broker.ended.result())

    def _hear(self, broker: BrokerChild, message: Message) -> None:
        match message.kind:
            case "questions":
                for question in message.fields["questions"]:
                    self._ask(question)
            case "ended":
                broker.last = {**message.fields, "final": True}
            case _:
                self._log("broker_said", kind=message.kind)
        message.close()

    def _ask(self, question: Fields) -> None:
        match question["kind"]:
            case "wake":
                self._dormancy.wake(question)
            case "usage":
                self._dormancy.usage(question)
            case "held":
                self._dormancy.held(question)
            case "sniff":
                self._plugins.sniff(question, lambda opinion: self.answer([opinion]))


def _added(rows: Iterable[Fields]) -> Fields:
    """Numbers added up, reasons by their names, failures by step and errno."""
    total: Fields = {"accepted": 0, "sniffing": 0, "delivering": 0, "relaying": 0}
    ended, failures, counters = Counter[str](), Counter[tuple[str, str]](), Counter[str]()
    retries = 0
    for row in rows:
        for name in total:
            total[name] += row.get(name, 0)
        ended.update(row.get("ended", {}))
        counters.update(row.get("counters", {}))
        retries += row.get("retries", 0)
        failures.update({(one["step"], one["errno"]): one["count"] for one in row.get("failures", ())})
    rest = [{"step": step, "errno": name, "count": number} for (step, name), number in failures.items()]
    return {**total, "ended": dict(ended), "retries": retries, "failures": rest, "counters": dict(counters)}
