"""The supervisor: holds the listeners, keeps a broker process running on them, starts and stops services, and ends all.

Decides what happens when something ends: a broker process that died is followed by another one, on the same listeners,
so that clients in their queues wait and are not refused; one that dies again and again is tried ever more slowly. One
that is to be replaced moves what it has to the next one first (`succession` is about replacing the supervisor itself).
Moves no byte and knows no connection.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable
from contextlib import suppress
from ipaddress import ip_network
from typing import Any, NoReturn, Protocol, TypeAlias

from msgspec import Struct, field
from msgspec.structs import replace

from fourtuple import confinement
from fourtuple.brokerfile import BrokerFile
from fourtuple.control.verbs import Upgrade
from fourtuple.engine import PROGRAM_VERSION
from fourtuple.errors import EngineStopped, FourtupleError
from fourtuple.launcher import Launcher
from fourtuple.launcher.launcher import MOST_RUNNING
from fourtuple.launcher.state import Saved
from fourtuple.supervisor.beginning import Begun, executed, forked
from fourtuple.supervisor.channel import Fields, Message
from fourtuple.supervisor.child import BrokerChild, NotNow
from fourtuple.supervisor.dormancy import Dormancy
from fourtuple.supervisor.ebb import Surplus
from fourtuple.supervisor.listeners import Listeners
from fourtuple.supervisor.plugins import Plugin, Plugins
from fourtuple.supervisor.spec import Spec
from fourtuple.supervisor.succession import Estate, check, hand_over
from fourtuple.supervisor.wakes import WakeRules, Wakes
from fourtuple.templates import Template

READY_WITHIN_S = 60.0
MOVES_WITHIN_S = 60.0
_BACKOFF_S = (0.05, 10.0)
_QUIET_S = 10.0
"""A broker process that has lived so long begins the back-off anew."""
_GLANCE_S = 0.5
_LAST_WORDS_S = 5.0
_SERVICES_PER_MESSAGE = 64
"""That are named in it; a question about use names as many as this alone."""
_AGAIN_S = 0.2
_LATER_S = 0.2
"""Until who has asked for it has its answer."""
_FRESH_S = 5.0
"""Between two broker processes that are made because folders of services were."""

Log: TypeAlias = Callable[..., None]


def _silent(_event: str, **_fields: Any) -> None:  # noqa: ANN401 - whatever an event has
    pass


class Settings(Struct, frozen=True, kw_only=True):
    """What the supervisor itself goes by."""

    templates: tuple[Template, ...] = ()
    plugins: tuple[Plugin, ...] = ()
    rules: WakeRules = field(default_factory=WakeRules)
    most_starting: int = 32
    most_running: int = MOST_RUNNING
    socket_owner: tuple[int, int] | None = None
    """User and group that the broker process becomes."""

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
        identity = confinement.identity(file.confine.user, file.confine.group)
        return cls(
            templates=file.templates,
            plugins=tuple(
                Plugin(module=table.module, limit_ms=table.limit_ms, memory_mb=table.memory_mb, user=table.user)
                for table in file.plugin
            ),
            rules=rules,
            most_starting=wake.most_starting,
            most_running=wake.most_running or MOST_RUNNING,
            socket_owner=None if identity is None else (identity.uid, identity.gid),
        )


class Around(Protocol):
    """What there is beside a supervisor in its process, and has to do with its successor."""

    def left(self) -> Fields:
        """What a successor has to know of it."""

    async def quiet(self) -> None:
        """End what cannot be left."""

    def let_go(self) -> None:
        """The same at the last moment, of what comes back by being used."""

    def stay(self) -> None:
        """There is no successor after all: what was ended begins again."""


class Supervisor:
    """One of them. Made within a running event loop; `run` to the end."""

    def __init__(
        self, spec: Spec, settings: Settings, listeners: Listeners, log: Log = _silent, estate: Estate | None = None
    ) -> None:
        self.spec, self.listeners, self._log = spec, listeners, log
        self.pid = os.getpid()
        self.brokers: list[BrokerChild] = []
        """The one that accepts is the first; behind it those that are moving what they have to it."""
        self.total: Fields = {}
        """What the broker processes that are gone have counted, added up."""
        self.restarts = self.lost = 0
        """Broker processes that ended by themselves; connections that they had, of which nothing more is known."""
        self.upgraded = Upgrade(state="none")
        self.control_of: Callable[[], int | None] = lambda: None
        """The process of the control API, while there is one."""
        self.around: Around | None = None
        """What else there is in this process; None if there can be no successor."""
        self._answers: list[Fields] = []
        """Not told yet."""
        self._minding: list[asyncio.Task[None]] = []
        self._surplus = Surplus()
        self._pause_s, self._fresh_s = _BACKOFF_S[0], 0.0
        self._ending: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        """How long connections may still take, once somebody has said that it is over."""
        self._hurried = asyncio.Event()
        self._replacing = asyncio.Lock()
        saved = None if estate is None else Saved.read(estate.launcher)
        self.launcher = Launcher(
            settings.templates,
            most_starting=settings.most_starting,
            most_running=settings.most_running,
            socket_owner=settings.socket_owner,
            ports=frozenset(endpoint.port for endpoint in listeners.endpoints),
            soft_descriptors=spec.soft_descriptors,
            exited=lambda exit: self.dormancy.exited(exit),
            saved=saved,
            descriptors=() if estate is None else estate.words,
        )
        templates = {template.name: template for template in settings.templates}
        self.plugins = Plugins(settings.plugins, log)
        self._addresses = confinement.Addresses(
            self._known, self._version, lambda: self.spec.file().confine.allow_ports
        )
        self.dormancy = Dormancy(self.launcher, templates, Wakes(settings.rules), self, log)
        if estate is not None:
            self.total, self.restarts, self.lost = estate.ended, estate.counts["restarts"], estate.counts["lost"]
            for left in reversed(estate.brokers):
                self._adopt(BrokerChild.inherited(left, self._hear))
            self.dormancy.resume(estate.running, estate.unsettled, estate.counts)
            state, why = ("done", None) if not estate.why_back else ("failed", estate.why_back)
            self.upgraded = Upgrade(state=state, why=why, began=estate.upgrade_began)
            if estate.only_version:
                self.upgraded = Upgrade(**estate.upgraded)

    # ---- what services need of brokers -------------------------------------------------------------------------------

    def answer(self, answers: Iterable[Fields]) -> None:
        """Tell all workers of all broker processes. What is said in one turn of the loop goes in few messages: when ten
        thousand services are woken or stopped at once, each message of its own would cost more than the answer."""
        if not self._answers:
            asyncio.get_running_loop().call_soon(self._pass_answers)
        self._answers.extend(answers)

    def _pass_answers(self) -> None:
        told: list[Fields] = []
        services = 0
        for answer in self._answers:
            named = len(answer["services"]) if answer["kind"] == "usage" else 1
            if services + named > _SERVICES_PER_MESSAGE:
                self._tell_all({"answers": told})
                told, services = [], 0
            told.append(answer)
            services += named
        if told:
            self._tell_all({"answers": told})
        self._answers.clear()

    def _tell_all(self, answers: Fields) -> None:
        for broker in self.brokers:
            broker.send("answers", answers)

    @property
    def workers(self) -> int:
        """Of all of them."""
        return len(self.brokers) * self.spec.workers

    # ---- life --------------------------------------------------------------------------------------------------------

    async def begin(self, first: Begun | None = None) -> Fields:
        """Start the first broker process, or go on with one that has been made; what it says when it is ready. Raises
        EngineStopped with its reason."""
        # Whoever wants another one meanwhile waits for this one.
        async with self._replacing:
            return await self._replace(BrokerChild(first or forked(), self._hear))

    async def run(self) -> None:
        """Serve until `end`, then until all has ended."""
        looking_after = asyncio.create_task(self.dormancy.look_after())
        try:
            await self._finish(await self._ending)
        finally:
            for task in (looking_after, *self._minding):
                task.cancel()
            await asyncio.gather(looking_after, *self._minding, return_exceptions=True)
            await self.dormancy.aclose()
            await self.plugins.aclose()
            await self.launcher.aclose()
            for broker in self.brokers:
                broker.kill()
            self.listeners.close()

    def end(self, grace_s: float) -> None:
        """Accept no more, and end when connections have, or after `grace_s`; said again, end at once."""
        if self._ending.done():
            self._hurried.set()
        else:
            self._log("draining", grace_s=grace_s)
            self._ending.set_result(grace_s)

    @property
    def is_ending(self) -> bool:
        """Whether somebody has said that it is over."""
        return self._ending.done()

    @property
    def accepting(self) -> BrokerChild | None:
        """The broker process that accepts; none while it is being started again."""
        first = self.brokers[0] if self.brokers else None
        return None if first is None or first.is_leaving or first.ended.done() else first

    def keep_task(self, task: asyncio.Task[Any]) -> None:
        """Until the end at most."""
        self._minding.append(task)
        task.add_done_callback(lambda done: self._minding.remove(done) if done in self._minding else None)

    # ---- numbers -----------------------------------------------------------------------------------------------------

    async def summary(self) -> Fields:
        """What all broker processes have counted, those that are gone included."""
        rows = [self.total]
        for broker in list(self.brokers):
            with suppress(EngineStopped):
                broker.told(await broker.ask("summary"))
            rows.append(broker.last)
        total = _added(rows)
        # From one broker process to another: accepted once, and ended once.
        moved = total["ended"].pop("moved", 0)
        lost = self.lost
        if len(self.brokers) < 2 and (unknown := moved - total["counters"].get("landed", 0)):
            # One of the two had died before it could tell what it had received, or sent. What was received by none is
            # lost with it; what was sent all the same is not, and counted where it is now.
            total["ended"]["broker_died"] = total["ended"].get("broker_died", 0) + unknown
            lost += unknown
        if plugins := self.plugins.counts():
            total["plugins"] = plugins
        return {**total, "supervisor": {**self.wakes(), "connections_lost": lost, "connections_moved": moved}}

    def wakes(self) -> dict[str, int]:
        """What the supervisor counts itself."""
        return {"broker_restarts": self.restarts, "connections_lost": self.lost, **self.dormancy.counts()}

    def remember_limits(self, row: Fields) -> None:
        """For broker processes to come."""
        self.spec = replace(self.spec, limits=replace(self.spec.limits, **row))

    # ---- broker processes --------------------------------------------------------------------------------------------

    async def _replace(self, broker: BrokerChild) -> Fields:
        """Let it begin; once it is ready it is the one that accepts. If it is not, it is ended: EngineStopped."""
        try:
            broker.begin(self.spec, self.listeners)
            ready = await broker.is_ready(READY_WITHIN_S)
        except BaseException:
            broker.kill()
            await broker.ended
            raise
        self._surplus.begins((self.pid, broker.pid))
        self._log("broker_started", pid=broker.pid, carrier=ready.get("carrier"), workers=ready.get("workers"))
        return ready

    def _adopt(self, broker: BrokerChild) -> None:
        self.brokers.insert(0, broker)
        if broker.asks_at is not None:
            connector = confinement.Connector(broker.asks_at, self._addresses)
            asyncio.get_running_loop().add_reader(broker.asks_at, self._connect, connector)
        self.keep_task(asyncio.create_task(self._mind(broker)))

    def _connect(self, connector: confinement.Connector) -> None:
        if not connector.serve():
            asyncio.get_running_loop().remove_reader(connector.fileno())

    def _version(self) -> Hashable:
        registered = self.dormancy.registered
        return self.spec.text, None if registered is None else registered.version()

    def _known(self) -> Iterable[Container[bytes]]:
        registered = self.dormancy.registered
        return () if registered is None else registered.addresses()

    async def _succeed(self, broker: BrokerChild) -> None:
        """Let it take the place of the one that accepts, with all that this one has."""
        async with self._replacing:
            old = self.accepting
            await self._replace(broker)
            if old is not None and not old.ended.done():
                await self._move(old, broker)

    async def _move(self, old: BrokerChild, new: BrokerChild) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(self.spec.workers)]
        try:
            old.is_leaving = True
            await _asked(new, "land", [theirs.fileno() for _, theirs in pairs])
            await _asked(old, "ferry", [ours.fileno() for ours, _ in pairs])
        except EngineStopped:
            # Two of them may accept for a moment, but not for ever: this one keeps what it has until that ends.
            old.send("drain", {})
            raise
        finally:
            for pair in pairs:
                for one in pair:
                    one.close()
        await asyncio.wait((old.ended, new.ended), timeout=MOVES_WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
        if new.ended.done() and not old.ended.done():
            raise EngineStopped("the new broker process ended while it took over")

    async def _mind(self, broker: BrokerChild) -> None:
        """Wait for its end; if it was the one that accepts, another follows."""
        begun_s = time.monotonic()
        glance = asyncio.create_task(self._glance(broker))
        try:
            status = await asyncio.shield(broker.ended)
        finally:
            glance.cancel()
        self._count_ended(broker, status)
        self.dormancy.broker_ended()
        if not self._wants_broker():
            return
        if time.monotonic() - begun_s > _QUIET_S:
            self._pause_s = _BACKOFF_S[0]
        while not self.is_ending:
            self.restarts += 1
            self._log("broker_restarted", pid=broker.pid, pause_s=self._pause_s)
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(self._pause_s * 2, _BACKOFF_S[1])
            try:
                # Whoever is bringing a new one for another reason has done so then.
                async with self._replacing:
                    if self._wants_broker():
                        # By executing it: a fork() of a process that has had threads may inherit their locks.
                        await self._replace(BrokerChild(executed(sys.executable), self._hear))
                return
            except (EngineStopped, OSError) as error:
                print(f"fourtuple serve: {error}", file=sys.stderr, flush=True)

    def _wants_broker(self) -> bool:
        return self.accepting is None and not self.is_ending

    async def _glance(self, broker: BrokerChild) -> None:
        """Know its numbers should it die; and whether folders of services are others than it was given."""
        while True:
            await asyncio.sleep(_GLANCE_S)
            with suppress(EngineStopped):
                broker.told(await broker.ask("summary"))
            if broker is self.accepting:
                self._look_at_memory(broker)
            report = broker.report
            if report is None or broker is not self.accepting or time.monotonic() - self._fresh_s < _FRESH_S:
                continue
            if (folders := confinement.moved(report)) and not self.is_ending:
                self._fresh_s = time.monotonic()
                self._log("broker_renewed", pid=broker.pid, why=", ".join(folders))
                self.begin_renewal()

    async def _renew(self, broker: BrokerChild | None = None) -> None:
        try:
            await self._succeed(broker or BrokerChild(executed(sys.executable), self._hear))
        except (EngineStopped, OSError) as error:
            print(f"fourtuple serve: {error}", file=sys.stderr, flush=True)

    def _count_ended(self, broker: BrokerChild, status: int) -> None:
        if broker not in self.brokers:
            return
        self.brokers.remove(broker)
        last = broker.last
        why = "; ".join(last.get("errors", ())) or None
        if not last.get("final"):
            known = int(last.get("accepted", 0)) + int(last.get("counters", {}).get("landed", 0))
            known -= sum(last.get("ended", {}).values())
            self.lost += known
            gauges = dict.fromkeys(("sniffing", "delivering", "relaying"), 0)
            last = {**last, **gauges, "ended": {**last.get("ended", {}), "broker_died": known}}
            why = why or f"{known} connections are lost with it"
            print(f"fourtuple serve: broker process {broker.pid} died (status {status})", file=sys.stderr, flush=True)
        self._log("broker_ended", pid=broker.pid, status=status, why=why)
        self.total = _added([self.total, last])

    async def _finish(self, grace_s: float) -> None:
        for broker in self.brokers:
            broker.send("drain", {"grace_s": grace_s})
        self.listeners.close()
        ended = [asyncio.ensure_future(asyncio.shield(broker.ended)) for broker in self.brokers]
        hurried = asyncio.create_task(self._hurried.wait())
        waiting = asyncio.gather(*ended)
        await asyncio.wait((waiting, hurried), timeout=grace_s + _LAST_WORDS_S, return_when=asyncio.FIRST_COMPLETED)
        for broker in self.brokers:
            broker.send("close")
        await asyncio.wait((waiting,), timeout=_LAST_WORDS_S)
        hurried.cancel()
        for broker in list(self.brokers):
            if not broker.ended.done():
                broker.kill()
            self._count_ended(broker, await broker.ended)

    def _hear(self, broker: BrokerChild, message: Message) -> None:
        match message.kind:
            case "ready":
                # At once: what it asks next is answered to those that are here.
                return self._adopt(broker)
            case "questions":
                for question in message.fields["questions"]:
                    self._ask(question)
        message.close()

    def _ask(self, question: Fields) -> None:
        match question["kind"]:
            case "wake":
                self.dormancy.wake(question)
            case "usage":
                self.dormancy.usage(question)
            case "held":
                self.dormancy.held(question)
            case "sniff":
                self.plugins.sniff(question, lambda opinion: self.answer([opinion]))

    # ---- upgrades ----------------------------------------------------------------------------------------------------

    def begin_upgrade(self, executable: str | None) -> None:
        """Replace the broker process by one of another program, then this one; `upgraded` says how it goes."""
        self.upgraded = Upgrade(state="running", began=round(time.time(), 3))
        self.keep_task(asyncio.create_task(self._upgrade(executable or sys.executable)))

    async def _upgrade(self, executable: str) -> None:
        begun_s, began = time.monotonic(), self.upgraded.began
        self._log("upgrade_started", pid=self.pid, executable=executable)
        try:
            if self.around is None:
                raise EngineStopped("this supervisor cannot leave its place: it serves a demonstration")
            await check(executable, self.estate())
            await self._succeed(BrokerChild(executed(executable), self._hear))
        except (FourtupleError, OSError) as error:
            return self._not_upgraded(error, begun_s, began)
        moved = self.total.get("ended", {}).get("moved", 0)
        self._log("upgrade_done", pid=self.pid, took_ms=round((time.monotonic() - begun_s) * 1e3), moved=moved)
        await asyncio.sleep(_LATER_S)
        await self.around.quiet()
        try:
            await self._leave(executable, self.around)
        except (FourtupleError, OSError) as error:
            self._not_upgraded(error, begun_s, began)
            self.around.stay()

    def _not_upgraded(self, error: Exception, begun_s: float, began: float | None) -> None:
        self._log("upgrade_failed", why=str(error), took_ms=round((time.monotonic() - begun_s) * 1e3))
        self.upgraded = Upgrade(state="failed", why=str(error), began=began)

    # ---- after a flood -----------------------------------------------------------------------------------------------

    def fork_anew(self) -> None:
        """Let a broker process of this one's own memory follow the one that accepts. Called once this program has taken
        its own place: before it has had another thread, and before the registry is open."""
        self.keep_task(asyncio.create_task(self._renew(BrokerChild(forked(), self._hear))))

    def _look_at_memory(self, broker: BrokerChild) -> None:
        """Once a flood is over, and what it had needed has not come back by itself, begin anew: the heap of ten
        thousand services is full of holes, and nothing but a new image of the program has none."""
        gauges = sum(int(broker.last.get(name, 0)) for name in ("sniffing", "delivering", "relaying"))
        found = self._surplus.seen(gauges + len(self.dormancy), time.monotonic(), (self.pid, broker.pid))
        if found is None or self.around is None or self.is_ending or self._replacing.locked():
            return
        self.keep_task(asyncio.create_task(self._begin_anew(self.around, *found)))

    async def _begin_anew(self, around: Around, at_rest: int, now: int) -> None:
        mib = {"mib": round(now / 2**20, 1), "mib_before": round(at_rest / 2**20, 1)}
        self._log("renewal_started", pid=self.pid, **mib)
        try:
            await check(sys.executable, self._own_estate())
            await around.quiet()
        except (FourtupleError, OSError) as error:
            return self._log("renewal_failed", why=str(error))
        try:
            await self._leave(sys.executable, around, is_own=True)
        except (FourtupleError, OSError) as error:
            self._log("renewal_failed", why=str(error))
            around.stay()

    def _own_estate(self) -> Estate:
        """For this very program: whatever may have been installed meanwhile, nobody has asked for it."""
        if self.upgraded.state == "running":
            raise EngineStopped("an upgrade has begun")
        return replace(
            self.estate(), only_version=PROGRAM_VERSION, renews=True, upgraded=dataclasses.asdict(self.upgraded)
        )

    async def _leave(self, executable: str, around: Around, *, is_own: bool = False) -> NoReturn:
        """Let the program take this one's place; raises EngineStopped if it cannot."""
        until_s = time.monotonic() + MOVES_WITHIN_S
        # A broker process may have ended meanwhile, one that is only starting would be nobody's, and all that is said
        # has to be on its way.
        while (
            self.accepting is None
            or self._replacing.locked()
            or any(broker.channel.has_more_to_send for broker in self.brokers)
        ):
            if time.monotonic() >= until_s or self.is_ending:
                break
            await asyncio.sleep(_GLANCE_S / 10)
        if self.is_ending:
            raise EngineStopped("it is told to end")
        estate = self._own_estate() if is_own else self.estate()
        # From here on nothing is waited for.
        self.plugins.close()
        around.let_go()
        hand_over(executable, estate)

    def estate(self) -> Estate:
        """All that a successor needs; its descriptors are this process's."""
        broker = self.accepting
        if broker is None or self.around is None:
            raise EngineStopped("the broker process is being started again")
        self._pass_answers()
        saved, words = self.launcher.save()
        listeners = self.listeners.descriptors_by_name()
        rest = self.around.left()
        left = [one.left() for one in self.brokers if not one.ended.done()]
        of_brokers = [one[key] for one in left for key in ("channel", "asks_at") if one[key] is not None]
        kept = [*words, *of_brokers, *(fd for of_it in listeners.values() for fd in of_it)]
        return Estate(
            spec=self.spec.fields(),
            listeners=listeners,
            brokers=left,
            ended=self.total,
            counts={"restarts": self.restarts, "lost": self.lost, **self.dormancy.counts()},
            launcher=saved.row(),
            words=words,
            running=self.dormancy.running_templates(),
            unsettled=self.dormancy.unsettled(),
            previous=sys.executable,
            upgrade_began=self.upgraded.began,
            kept=[*kept, *rest.pop("kept")],
            **rest,
        )

    def begin_reload(self) -> asyncio.Task[None]:
        """Read the file again, and let a broker process follow that has; raises BadConfig or EngineStopped, and nothing
        has changed, if it cannot be used. What listens elsewhere or has other workers needs a new start."""
        if self.spec.demonstration is None:
            try:
                self._read_again()
            except (FourtupleError, OSError) as error:
                self._log("reloaded", config=self.spec.named, why=str(error))
                raise
            self._log("reloaded", config=self.spec.named)
        return self.begin_renewal()

    def _read_again(self) -> None:
        data = BrokerFile.bytes_of(self.spec.path)
        file = BrokerFile.parse(data, self.spec.named)
        if {table.endpoint for table in file.listen} != set(self.listeners.endpoints):
            raise EngineStopped("the file has other listeners; those need a new start")
        self.spec = replace(self.spec, text=data.decode())
        self.launcher.replace(file.templates)
        self.dormancy.replace({template.name: template for template in file.templates})

    def begin_renewal(self) -> asyncio.Task[None]:
        """Let another broker process follow the one that accepts; done when it has, or has said why not."""
        task = asyncio.create_task(self._renew())
        self.keep_task(task)
        return task


async def _asked(broker: BrokerChild, kind: str, descriptors: list[int]) -> None:
    """Ask it until it has room for the descriptors: one that has none left needs a successor most of all."""
    until_s = time.monotonic() + MOVES_WITHIN_S
    while True:
        try:
            await broker.ask(kind, descriptors=descriptors)
            return
        except NotNow:
            if time.monotonic() >= until_s:
                raise
            await asyncio.sleep(_AGAIN_S)


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
