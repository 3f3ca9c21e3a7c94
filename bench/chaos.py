"""The chaos run: a broker with services that sleep, and everything done to it that may happen, by dice with a seed.

Decides what is done when, and what has to be true nevertheless: every byte that a client hears is its service's; who
lost a connection lost it to something that was done to that service or to its broker process; every connection that was
accepted has one counted reason; the supervisor lives through it; and when all sleep again, there are as many
descriptors, processes, socket files and as much memory as there were. What clients do is `visits`.

    python -m bench.chaos [--seconds SECONDS] [--seed NUMBER] [--rate CLIENTS] [--only TROUBLE ...]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.visits import Manner, Outcome, Visit, visit
from bench.waiting import until
from fourtuple.control.client import Client, Declined
from fourtuple.errors import MissingFeature
from fourtuple.lab import namespaces
from fourtuple.registry import Registry
from fourtuple.services import Delivery, Match, Route, Service

PORT = 700
STEADY, VICTIMS, CHURNED = 24, 6, 8
"""Services that nothing is done to, that are killed and stopped, that change in the registry."""
FLOOD = 150
"""Sleepers called at once in a flood."""
PATIENCE_S = 20.0
IDLE_S = 2.0
SNIFF_MS = 15_000
DENIED = "127.0.0.66"
"""Who may wake nothing."""
_SETTLES_S, _BEGINS_S = 60.0, 180.0
_HARM_LASTS_S = 0.2
"""So much later than a kill somebody may still connect to what is just dying."""
_PAUSE_MOST_S = 0.5
"""Of the back-off of services."""
_GLANCE_S = 3.0
_GROWTH_BYTES = 8 << 20
_GROWTH_DESCRIPTORS = 4
_SHOWN = 20
_PEERS = Path(__file__).parent / "peers"
_TEMPLATE = """
[[template]]
name = "{name}"
argv = {argv}
socket = "pass"
ready = "{ready}"
idle_s = {idle_s}
start_timeout_s = 2
stop_timeout_s = 2
backoff_s = 0.2
backoff_most_s = {pause_s}
backoff_reset_s = 1
output = "null"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Harm:
    """What was done to a service, or to all, and how long its clients may have lost by it."""

    what: str
    service: str | None
    begun_s: float
    ended_s: float

    def explains(self, one: Visit) -> bool:
        """Whether that client may have lost by it."""
        is_its_own = self.service is None or self.service == one.service
        return is_its_own and self.begun_s <= one.ended_s and self.ended_s >= one.begun_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What there is while all sleep."""

    descriptors: dict[str, int]
    kinds: dict[str, dict[str, int]]
    """Of descriptors: what they are open on."""
    private_bytes: dict[str, int]
    processes: int
    socket_files: int
    threads: dict[str, int]


class World:
    """The broker and what is known of it from outside."""

    def __init__(self, folder: Path, process: subprocess.Popen[str], registry: Registry) -> None:
        self.folder, self.process, self.registry = folder, process, registry
        self.control = Client(folder / "control", 60.0)

    def path(self, name: str) -> str:
        """Where a service listens."""
        return f"{self.folder}/run/{name}"

    def children(self) -> dict[int, list[str]]:
        """Of the supervisor, with their arguments; those that have just ended have none."""
        found = {}
        pid = self.process.pid
        for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(OSError):
                found[int(word)] = Path(f"/proc/{word}/cmdline").read_bytes().decode().split("\0")
        return found

    def services(self) -> dict[str, int]:
        """Processes of services by what they are called with, which is the end of their path."""
        program = f"{self.folder}/"
        return {argv[1].rpartition("/")[2]: pid for pid, argv in self.children().items() if argv[0].startswith(program)}

    def brokers(self) -> list[int]:
        """Broker processes, the oldest first: forked from the supervisor, or executed."""
        own = Path(f"/proc/{self.process.pid}/cmdline").read_bytes().decode().split("\0")
        return [pid for pid, argv in self.children().items() if "--broker" in argv or (argv == own and "serve" in argv)]

    def measured(self) -> Measured:
        """As it is now."""
        pids = dict(zip(("supervisor", "broker"), (self.process.pid, *self.brokers()), strict=False))
        return Measured(
            descriptors={name: len(_entries(pid, "fd")) for name, pid in pids.items()},
            kinds={name: _kinds(pid) for name, pid in pids.items()},
            private_bytes={name: _private(pid) for name, pid in pids.items()},
            threads={name: len(_entries(pid, "task")) for name, pid in pids.items()},
            processes=len(self.children()),
            socket_files=sum(1 for _ in (self.folder / "run").iterdir()),
        )

    def summaries(self) -> list[dict[str, Any]]:
        """What it has printed."""
        lines = (self.folder / "said").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"seconds"')]


@contextmanager
def world(kept: Path | None) -> Iterator[World]:
    """A broker whose services sleep, with its registry; what it has printed and logged is left in the folder `kept`."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-chaos-") as name:
        folder = Path(name)
        (folder / "run").mkdir()
        program, clock = folder / "echoer", folder / "clock.so"
        subprocess.run(["gcc", "-O2", "-pthread", "-o", program, _PEERS / "echoer.c"], check=True)
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", clock, _PEERS / "clock.c"], check=True)
        (folder / "ahead").write_bytes(struct.pack("q", 0))
        (folder / "broker.toml").write_text(_file(folder, program))
        with Registry(folder / "store") as registry:
            registry.add(Service(name=name, target=f"unix:{folder}/run/{name}", **how) for name, how in _services())
            registry.add_routes(
                [Route(match=Match(name="*.flood.example"), to=f"unix:{folder}/run/{{name}}", start="echoer")]
            )
            command = [sys.executable, "-m", "fourtuple", "serve", "-c", f"{folder}/broker.toml", "--store"]
            command += [f"{folder}/store", "--json", "--every", "1", "--patience", f"{PATIENCE_S:g}"]
            command += ["--log", f"{folder}/log", "--log-every", "1", "--events", f"{folder}/events"]
            environment = os.environ | {"LD_PRELOAD": str(clock), "FOURTUPLE_CHAOS_CLOCK": f"{folder}/ahead"}
            with (
                (folder / "said").open("w") as said,
                subprocess.Popen(command, stdout=said, stderr=said, text=True, env=environment) as process,
            ):
                made = World(folder, process, registry)
                try:
                    until(lambda: _answers(made.control) or process.poll() is not None, _BEGINS_S)
                    yield made
                finally:
                    if process.poll() is None:
                        process.send_signal(signal.SIGTERM)
                        process.wait(_SETTLES_S)
                    if kept is not None:
                        for name in {"said", "events", "log"} & {one.name for one in folder.iterdir()}:
                            (kept / name).write_bytes((folder / name).read_bytes())


def _file(folder: Path, program: Path) -> str:
    templates = {
        "echoer": ([str(program), "{socket}"], "started"),
        "crashes": (["/bin/false"], "notify"),
        "never": (["/bin/sleep", "1000"], "notify"),
    }
    return (
        f'[[listen]]\naddress = "0.0.0.0:{PORT}"\nsniff_ms = {SNIFF_MS}\n'
        f'[wake]\nmost_starting = 16\ndeny = ["{DENIED}/32"]\n[control]\nsocket = "{folder}/control"\n'
    ) + "".join(
        _TEMPLATE.format(name=name, argv=json.dumps(argv), ready=ready, idle_s=IDLE_S, pause_s=_PAUSE_MOST_S)
        for name, (argv, ready) in templates.items()
    )


def _services() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind, count in (("steady", STEADY), ("victim", VICTIMS), ("churned", CHURNED)):
        for number in range(count):
            delivery = Delivery.HANDOFF if number % 3 == 2 else Delivery.RELAY
            yield f"{kind}{number}.example", {"start": "echoer", "delivery": delivery}
    yield "crashes.example", {"start": "crashes"}
    yield "never.example", {"start": "never"}


@dataclass(slots=True)
class Run:
    """One run."""

    world: World
    dice: random.Random
    rate: float
    only: frozenset[str]
    visits: list[Visit] = field(default_factory=list)
    harms: list[Harm] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    unwelcome: list[str] = field(default_factory=list)
    """What is wrong, as it is found."""
    moving: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Paths of services that change in the registry."""
    away: set[str] = field(default_factory=set)
    """Services that are out of it for a moment."""
    upgrading: asyncio.Lock = field(default_factory=asyncio.Lock)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    # ---- clients -----------------------------------------------------------------------------------------------------

    def send(self, service: str, manner: Manner | None = None, source: str = "") -> asyncio.Task[Any]:
        """A client on its way."""
        chosen = manner or self.dice.choices(list(Manner), weights=[30, 6, 10, 10, 5, 10, 2, 2], k=1)[0]
        one = Visit(
            service=service,
            manner=chosen,
            paths=self.moving.get(service, (self.world.path(service),)),
            source=source or f"127.0.0.{self.dice.randrange(1, 60)}",
        )
        self.visits.append(one)
        return self.task(visit(one, PORT, random.Random(self.dice.random())))

    def task(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        """Until it has ended."""
        made = asyncio.ensure_future(work)
        self._tasks.add(made)
        made.add_done_callback(self._tasks.discard)
        return made

    async def clients(self, until_s: float) -> None:
        """They come at random, as many per second as `rate`."""
        names = [name for name, _ in _services() if not name.startswith(("crashes", "never"))]
        while time.monotonic() < until_s:
            await asyncio.sleep(self.dice.expovariate(self.rate))
            self.send(self.dice.choice(names))

    # ---- troubles ----------------------------------------------------------------------------------------------------

    async def troubles(self, until_s: float) -> None:
        """One after the other, some at once."""
        weights = {
            self.kill_service: 8,
            self.kill_broker: 2,
            self.stop_service: 4,
            self.exhaust: 2,
            self.churn: 8,
            self.jump: 3,
            self.upgrade: 2,
            self.kill_while_upgrading: 1,
            self.flood: 2,
            self.denied: 2,
            self.failing: 3,
            self.order: 3,
        }
        chosen = {one: weight for one, weight in weights.items() if not self.only or one.__name__ in self.only}
        while time.monotonic() < until_s:
            await asyncio.sleep(self.dice.uniform(0.1, 1.5))
            if not chosen:
                continue
            one = self.dice.choices(list(chosen), weights=list(chosen.values()), k=1)[0]
            self.task(self._counted(one))

    async def _counted(self, trouble: Callable[[], Awaitable[None]]) -> None:
        self.done[trouble.__name__] += 1
        try:
            await trouble()
        except Exception as error:
            self.unwelcome.append(f"{trouble.__name__}: {type(error).__name__}: {error}")

    def harm(self, what: str, service: str | None, begun_s: float, lasts_s: float = _HARM_LASTS_S) -> None:
        """It is done."""
        self.harms.append(Harm(what=what, service=service, begun_s=begun_s, ended_s=time.monotonic() + lasts_s))

    def _victim(self) -> tuple[str, int] | None:
        awake = {name: pid for name, pid in self.world.services().items() if name.startswith("victim")}
        return self.dice.choice(sorted(awake.items())) if awake else None

    async def kill_service(self) -> None:
        """By SIGKILL; its next clients wait for the back-off to be over, or are told."""
        if (found := self._victim()) is not None:
            self.harm("service killed", found[0], time.monotonic(), _PAUSE_MOST_S + _HARM_LASTS_S)
            with suppress(ProcessLookupError):
                os.kill(found[1], signal.SIGKILL)

    async def kill_broker(self) -> None:
        """By SIGKILL: all that it holds is lost, what waits in the queues is not."""
        begun_s = time.monotonic()
        for pid in self.world.brokers()[:1]:
            os.kill(pid, signal.SIGKILL)
            self.harm("broker killed", None, begun_s)

    async def stop_service(self) -> None:
        """By SIGSTOP, while its queue fills; nobody has lost anything when it goes on."""
        if (found := self._victim()) is not None:
            with suppress(ProcessLookupError):
                os.kill(found[1], signal.SIGSTOP)
                for _ in range(60):
                    self.send(found[0], Manner.ASKS)
                await asyncio.sleep(self.dice.uniform(0.3, 3.0))
                os.kill(found[1], signal.SIGCONT)

    async def exhaust(self) -> None:
        """No descriptor more for the broker process, then all that it had."""
        pid = self.world.brokers()[0]
        with suppress(ProcessLookupError, FileNotFoundError):
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            taken = max(int(one.name) for one in _entries(pid, "fd")) + 1
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (taken, before[1]))
            await asyncio.sleep(self.dice.uniform(0.5, 3.0))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (before[1], before[1]))

    async def churn(self) -> None:
        """A service is taken away, moved, or comes back, while clients come."""
        name = f"churned{self.dice.randrange(CHURNED)}.example"
        if len(self.moving.get(name, (name,))) != 1 or name in self.away:
            return
        old, registry = self.moving.get(name, (self.world.path(name),)), self.world.registry
        what = self.dice.choice(("away", "moved"))
        begun_s = time.monotonic()
        new = self.world.path(f"{name}-{self.dice.randrange(1000)}")
        self.moving[name] = () if what == "away" else (*old, new)
        for one in self.visits:
            if one.service == name and not one.ended_s:
                one.paths = (*one.paths, new)
        if what == "away":
            self.moving[name] = old
            self.away.add(name)
            registry.remove([name])
            await asyncio.sleep(self.dice.uniform(0.1, 1.0))
            registry.add([Service(name=name, target=f"unix:{old[-1]}", start="echoer")])
            self.away.discard(name)
            self.harm("service removed", name, begun_s)
        else:
            registry.set([Service(name=name, target=f"unix:{new}", start="echoer")])
            # Those that it has where it was are given ten seconds; new ones wait, and meet it where it is to be.
            self.harm("service moved", name, begun_s, 15.0)
            asyncio.get_running_loop().call_later(15.0, self.moving.__setitem__, name, (new,))

    async def jump(self) -> None:
        """The time of day, by up to ten years, forwards or back."""
        ahead = self.dice.choice((0, -3_600, 3_600, 86_400 * 365, -86_400 * 365, self.dice.randrange(-(10**8), 10**8)))
        with (self.world.folder / "ahead").open("r+b") as clock:
            clock.write(struct.pack("q", ahead))

    async def upgrade(self) -> None:
        """To the same program; nobody loses anything by it, unless the broker process is killed meanwhile."""
        if self.upgrading.locked():
            return
        async with self.upgrading:
            begun_s = time.monotonic()
            await self._upgraded()
            state = await self._state()
            # Nor can it begin while a broker process is being started again.
            was_killed = any(harm.service is None and harm.ended_s >= begun_s - 60 for harm in self.harms)
            if state["state"] != "done" and not was_killed:
                self.unwelcome.append(f"upgrade: {state}")

    async def kill_while_upgrading(self) -> None:
        """One of both broker processes, while one takes over from the other."""
        if self.upgrading.locked():
            return
        async with self.upgrading:
            work = asyncio.create_task(self._upgraded())
            which, delay_s, until_s = self.dice.randrange(2), self.dice.uniform(0, 0.05), time.monotonic() + 10
            while len(self.world.brokers()) < 2 and not work.done() and time.monotonic() < until_s:
                await asyncio.sleep(0.002)
            # It takes its time to begin, and little to take over: half are killed while they begin.
            await asyncio.sleep(delay_s if self.dice.random() < 0.5 else delay_s + 0.4)
            brokers, begun_s = self.world.brokers(), time.monotonic()
            if brokers:
                with suppress(ProcessLookupError):
                    os.kill(brokers[min(which, len(brokers) - 1)], signal.SIGKILL)
                self.harm("broker killed while another took over", None, begun_s)
            await work

    async def _upgraded(self) -> None:
        until_s = time.monotonic() + _BEGINS_S
        while time.monotonic() < until_s:
            try:
                await asyncio.to_thread(self.world.control.ask, "POST", "/v1/upgrade", {})
                break
            except (Declined, MissingFeature):
                await asyncio.sleep(0.5)
        until_s = time.monotonic() + _BEGINS_S
        while (await self._state())["state"] == "running" and time.monotonic() < until_s:
            await asyncio.sleep(0.1)

    async def _state(self) -> dict[str, Any]:
        until_s = time.monotonic() + _BEGINS_S
        while True:
            try:
                told: dict[str, Any] = (await asyncio.to_thread(self.world.control.ask, "GET", "/v1/status"))["upgrade"]
                return told
            except (MissingFeature, Declined):
                if time.monotonic() > until_s:
                    raise
                await asyncio.sleep(0.1)

    async def flood(self) -> None:
        """Very many sleepers called at once."""
        base = self.dice.randrange(1_000_000)
        for number in range(FLOOD):
            self.send(f"f{base + number}.flood.example", self.dice.choice((Manner.ASKS, Manner.RESETS)))

    async def denied(self) -> None:
        """A flood from where nobody may wake anything."""
        for _ in range(20):
            self.send(f"d{self.dice.randrange(1_000_000)}.flood.example", Manner.ASKS, DENIED)

    async def failing(self) -> None:
        """Services that crash at once, or are never ready."""
        for name in ("crashes.example", "never.example"):
            self.send(name, Manner.ASKS)

    async def order(self) -> None:
        """Stopped by order, while it may have clients."""
        if (found := self._victim()) is not None:
            self.harm("service stopped by order", found[0], time.monotonic(), 3.0)
            with suppress(Declined, MissingFeature):
                await asyncio.to_thread(self.world.control.ask, "POST", f"/v1/services/{found[0]}/stop", wait_s=0.1)

    # ---- the run -----------------------------------------------------------------------------------------------------

    async def go_on(self, seconds: float) -> None:
        """Clients and troubles for so long, until the last client has its end."""
        until_s = time.monotonic() + seconds
        await asyncio.gather(self.clients(until_s), self.troubles(until_s))
        while self._tasks:
            await asyncio.wait(set(self._tasks), timeout=1.0)

    async def asleep(self) -> Measured:
        """When all sleep again."""
        until_s = time.monotonic() + _SETTLES_S
        while self.world.services() or any((self.world.folder / "run").iterdir()) or len(self.world.brokers()) != 1:
            if time.monotonic() > until_s:
                left = {*self.world.services(), *(one.name for one in (self.world.folder / "run").iterdir())}
                self.unwelcome.append(f"do not sleep: {sorted(left)}, {len(self.world.brokers())} broker processes")
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(2.0)
        return self.world.measured()


def check(run: Run, before: Measured, after: Measured, last: dict[str, Any]) -> list[str]:
    """What is wrong."""
    wrong = list(run.unwelcome)
    for one in run.visits:
        explained = [harm.what for harm in run.harms if harm.explains(one)]
        expected = _expected(one)
        if one.outcome not in expected and not (one.outcome in (Outcome.LOST, Outcome.TOLD) and explained):
            wrong.append(str(one) + (f", beside {explained}" if explained else ""))
    counted = sum(last["ended"].values()) + last["sniffing"] + last["delivering"] + last["relaying"]
    if counted != last["accepted"]:
        wrong.append(f"accepted {last['accepted']}, and {counted} are counted as something")
    kills = [harm for harm in run.harms if harm.what.startswith("broker killed")]
    unharmed = [one for one in run.visits if one.connected_s and not any(kill.explains(one) for kill in kills)]
    if not len(unharmed) <= last["accepted"] <= len(run.visits) + 1:
        wrong.append(f"accepted {last['accepted']} of {len(run.visits)} clients, {len(unharmed)} of them in no kill")
    # What a broker process had is known as of up to half a second before its death, or longer ago where all is slow.
    died = last["ended"].get("broker_died", 0)
    near = sum(
        any(one.begun_s <= kill.ended_s and one.ended_s >= kill.begun_s - _GLANCE_S for kill in kills)
        for one in run.visits
    )
    if died > near:
        wrong.append(f"{died} are counted as lost with broker processes, and {near} were there when we killed them")
    for what in ("descriptors", "private_bytes", "threads"):
        bound = {"descriptors": _GROWTH_DESCRIPTORS, "private_bytes": _GROWTH_BYTES, "threads": 2}[what]
        for name in getattr(before, what):
            amount = getattr(after, what).get(name, 0)
            if amount > getattr(before, what)[name] + bound:
                wrong.append(f"{what} of the {name}: {getattr(before, what)[name]}, then {amount}")
    if after.processes > before.processes or after.socket_files:
        wrong.append(f"{before.processes} processes, then {after.processes}; {after.socket_files} socket files")
    return wrong


def _expected(one: Visit) -> tuple[Outcome, ...]:
    if one.source == DENIED or one.service in ("crashes.example", "never.example"):
        return (Outcome.TOLD,)
    return (Outcome.LEFT, Outcome.RIGHT) if one.manner is Manner.RESETS else (Outcome.RIGHT,)


def chaos(
    seconds: float, seed: int, rate: float, only: frozenset[str] = frozenset(), kept: Path | None = None
) -> dict[str, Any]:
    """A sixth of the time, a minute at most, to come to what is usual, then the rest. `wrong` is empty or it failed."""
    with world(kept) as made:
        run = Run(made, random.Random(seed), rate, only)
        first_s = min(60.0, seconds / 6)

        async def both() -> tuple[Measured, Measured]:
            await run.go_on(first_s)
            await run._counted(run.upgrade)
            before = await run.asleep()
            await run.go_on(seconds - first_s)
            await run._counted(run.upgrade)
            return before, await run.asleep()

        pid = made.process.pid
        before, after = asyncio.run(both())
        alive = made.process.poll() is None
        made.process.send_signal(signal.SIGTERM)
        status = made.process.wait(_SETTLES_S)
        last = made.summaries()[-1]
        wrong = check(run, before, after, last)
        if not alive or status != 0:
            wrong.append(f"the supervisor {pid} ended with status {status}" + ("" if alive else " by itself"))
    outcomes: dict[str, Counter[str]] = {}
    for one in run.visits:
        outcomes.setdefault(one.manner.value, Counter())[one.outcome.value] += 1
    kills = [harm for harm in run.harms if harm.what.startswith("broker killed")]
    lost = [one for one in run.visits if one.outcome is Outcome.LOST]
    return {
        "seconds": seconds,
        "seed": seed,
        "clients": len(run.visits),
        "outcomes": outcomes,
        "troubles": run.done,
        "lost_with_brokers": sum(any(kill.explains(one) for kill in kills) for one in lost),
        "lost_otherwise": sum(not any(kill.explains(one) for kill in kills) for one in lost),
        "before": asdict(before),
        "after": asdict(after),
        "summary": last,
        "wrong": wrong,
    }


def _entries(pid: int, folder: str) -> list[Path]:
    return list(Path(f"/proc/{pid}/{folder}").iterdir())


def _kinds(pid: int) -> dict[str, int]:
    kinds = Counter[str]()
    for one in _entries(pid, "fd"):
        with suppress(OSError):
            kinds[re.sub(r"\d+", "", str(one.readlink()))] += 1
    return dict(kinds)


def _private(pid: int) -> int:
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) << 10 for row in rows if row.startswith("Private_Dirty:"))


def _answers(control: Client) -> bool:
    try:
        control.ask("GET", "/v1/status")
    except (MissingFeature, Declined):
        return False
    return True


def main() -> int:
    """Print what came of it as JSON; exit status 1 if something is wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=600.0)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--rate", type=float, default=40.0, help="clients per second, besides floods")
    options.add_argument("--only", nargs="*", default=[], help="troubles, by the name of their function")
    options.add_argument("--keep", type=Path, help="leave what the broker has printed and logged in this folder")
    given = options.parse_args()
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    namespaces.enter(namespaces.Membership())
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for name, value in (("somaxconn", "65535"),):
        Path(f"/proc/sys/net/core/{name}").write_text(value)
    results = chaos(given.seconds, given.seed, given.rate, frozenset(given.only), given.keep)
    wrong = results.pop("wrong")
    print(json.dumps({**results, "wrong": len(wrong)}, indent=1))
    for line in wrong[:_SHOWN]:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
