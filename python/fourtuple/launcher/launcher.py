"""Starts services, says when they are there, stops them, and holds back those that crash.

Decides the states of a service: waiting for its turn, starting, running, stopping, ending; when none of these, there is
no object of it. One asyncio loop, and the thread that it runs in starts every process. Knows no broker: who is to be
started, and when to stop it, others say.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from errno import EADDRINUSE

from msgspec import Struct

from fourtuple.errors import BadConfig, MissingFeature
from fourtuple.launcher import processes, sockets
from fourtuple.launcher.cgroups import Cgroup
from fourtuple.launcher.clients import holds_clients
from fourtuple.launcher.outcomes import Exit, Failure, Phase, Started, StartFailed, State
from fourtuple.launcher.readiness import Folders, Word
from fourtuple.launcher.spawn import birth, spawn, standard
from fourtuple.launcher.state import Record, Saved
from fourtuple.services import Delivery
from fourtuple.templates import Call, Missing, Place, Ready, Socket, Template, by_name

MOST_STARTING = 16
MOST_RUNNING = 10_000
_LOOKS_S = (0.0005, 0.05)
"""How often a start is looked at that nobody has news of: soon at first, rarer the longer it takes."""
_LOOKS_FOR_HEIRS = 3
"""Each may miss one that ends at that moment; those that fork away do so twice (daemon(7))."""
_KILL_PATIENCE_S = 10.0
"""Who is not gone so long after SIGKILL waits in the kernel (state D), and is left to it."""
_MOST_LOOK_S = 0.01
_TICK_S = 1.0
_FORGET_S = 60.0
"""After execve(), crashes are remembered for so long after the pause."""
_log = logging.getLogger("fourtuple.launcher")


class _Unit:
    """A service that is not dormant."""

    def __init__(self, call: Call, template: Template, mark: int, loop: asyncio.AbstractEventLoop) -> None:
        self.call, self.template, self.mark = call, template, mark
        self.place = Place.parse(call.target)
        self.key = call.service
        self.single = False
        """It serves the one connection that it was started for."""
        self.phase = Phase.WAITING
        self.pid, self.pidfd, self.user = 0, -1, os.getuid()
        self.since_s = time.monotonic()
        self.ready_s = 0.0
        self.until_s = 0.0
        """When the start, or the stop, has taken too long."""
        self.file: tuple[int, int] | None = None
        self.cgroup: Cgroup | None = None
        self.word: Word | None = None
        self.status: asyncio.Future[int] = loop.create_future()
        self.begun: asyncio.Future[Started | StartFailed] = loop.create_future()
        self.ended: asyncio.Future[int] = loop.create_future()
        """Of one with a connection: when nothing of it is left."""
        self.connection: socket.socket | None = None
        self.variables: dict[str, str] = {}
        self.work: asyncio.Task[None] | None = None
        self.given_up = False

    @property
    def started(self) -> Started:
        return Started(service=self.call.service, pid=self.pid, since_s=self.since_s, ready_s=self.ready_s)


class _Crashes(Struct):
    count: int
    until_s: float
    forgetting: asyncio.TimerHandle


class Launcher:
    """Starts and stops services. Made and used in one running event loop, in the thread that outlives them all."""

    def __init__(
        self,
        templates: Iterable[Template],
        *,
        most_starting: int = MOST_STARTING,
        most_running: int = MOST_RUNNING,
        instance: str | None = None,
        socket_owner: tuple[int, int] | None = None,
        ports: frozenset[int] = frozenset(),
        soft_descriptors: int | None = None,
        exited: Callable[[Exit], object] | None = None,
        saved: Saved | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        """`most_starting` at once, first come first served; `most_running` in all.

        `instance`: a name that stays over restarts of this program; what an earlier one left behind that was killed is
        ended now. `socket_owner`: user and group who may connect to sockets that are made here. `ports`: of the
        listeners whose connections are handed off (`busy`). `soft_descriptors`: RLIMIT_NOFILE of services, if this
        process has raised its own. `exited` is called for whoever ends without being told to.
        `saved` and `descriptors`: what `save` has given in an earlier image of this process.
        """
        processes.become_subreaper()
        self._loop = asyncio.get_running_loop()
        self._templates = by_name(templates)
        self._slots = asyncio.Semaphore(most_starting)
        self.most_starting, self.most_running = most_starting, most_running
        self.socket_owner, self.ports = socket_owner, ports
        self._soft_descriptors = soft_descriptors
        self._exited = exited
        self._units: dict[str, _Unit] = {}
        self._pids: dict[int, _Unit] = {}
        self._crashes: dict[str, _Crashes] = {}
        self._folders = Folders()
        self._marks = processes.Marks(instance)
        self._tick: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[dict[int, int]] | None = None
        self._look_took_s = 0.0
        self._closing = False
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._left_behind = instance is not None
        if saved is not None:
            self._restore(saved, descriptors)

    def replace(self, templates: Iterable[Template]) -> None:
        """Templates for starts from now on; what runs keeps its own."""
        self._templates = by_name(templates)

    async def start(self, call: Call) -> Started:
        """Have it running; StartFailed if that does not succeed. Calls for one service share one start.

        Whoever waits may be cancelled; the start goes on, and `stop` ends it.
        """
        while (unit := self._units.get(call.service)) is not None:
            if unit.phase is Phase.RUNNING:
                return unit.started
            if unit.phase in (Phase.WAITING, Phase.STARTING):
                return await self._begun(unit)
            await self._worked(unit)
        unit = self._admitted(call)
        self._units[call.service] = unit
        self._let_begin(unit)
        return await self._begun(unit)

    async def stop(self, service: str) -> None:
        """Have it dormant: no process, no socket file, no cgroup. Nothing happens to one that is."""
        while (unit := self._units.get(service)) is not None:
            if unit.phase in (Phase.WAITING, Phase.STARTING):
                self._give_up(unit)
            elif unit.phase is Phase.RUNNING:
                unit.phase, unit.until_s = Phase.STOPPING, time.monotonic() + unit.template.stop_timeout_s
                processes.signal_to(unit.pidfd, signal.Signals[f"SIG{unit.template.stop_signal}"])
                unit.work = self._loop.create_task(self._stop(unit))
            await self._worked(unit)

    def services(self) -> tuple[State, ...]:
        """Those that are not dormant."""
        return tuple(
            State(
                service=name,
                template=unit.template.name,
                target=unit.call.target,
                delivery=unit.call.delivery,
                phase=unit.phase,
                pid=unit.pid,
                since_s=unit.since_s,
            )
            for name, unit in self._units.items()
        )

    def backing_off(self) -> int:
        """How many services are not tried again for a while, because they have failed."""
        now_s = time.monotonic()
        return sum(one.until_s > now_s for one in self._crashes.values())

    def knows(self, mark: int | None) -> bool:
        """Whether this is the mark (`processes.mark_of`) of a start of this launcher, or of one of its name."""
        return self._marks.ours(mark)

    def busy(self, service: str) -> bool:
        """Whether its processes hold a connection that came to one of `ports`: handed off, so that no broker sees it.

        MissingPrivilege if they cannot be looked into. Costs some 3 us for each descriptor that they have, until the
        first such connection is found.
        """
        unit = self._units.get(service)
        if unit is None or unit.call.delivery is not Delivery.HANDOFF:
            # What is relayed, the broker sees itself.
            return False
        return holds_clients(self._members(unit, self._orphans()), self.ports)

    def save(self) -> tuple[Saved, list[int]]:
        """For the next image of this process, into which the descriptors have to come along, in their order.

        To be called right before execve(); whoever waits in `start` asks again afterwards, and finds the start going
        on. Starts that still waited for their turn are forgotten.
        """
        words = [unit.word.socket.fileno() for unit in self._units.values() if unit.word is not None]
        records = tuple(
            Record(
                call=unit.call,
                template=unit.template,
                key=unit.key,
                single=unit.single,
                mark=unit.mark,
                phase=unit.phase.value,
                pid=unit.pid,
                user=unit.user,
                since_s=unit.since_s,
                ready_s=unit.ready_s,
                until_s=unit.until_s,
                file=unit.file,
                cgroup=None if unit.cgroup is None else str(unit.cgroup.folder),
                word=None if unit.word is None else words.index(unit.word.socket.fileno()),
                status=unit.status.result() if unit.status.done() else None,
            )
            for unit in self._units.values()
            if unit.pid
        )
        crashes = {service: (one.count, one.until_s) for service, one in self._crashes.items()}
        return Saved(marks=self._marks.saved, records=records, crashes=crashes), words

    def _restore(self, saved: Saved, descriptors: Sequence[int]) -> None:
        self._marks.restore(saved.marks)
        self._left_behind = False
        now_s = time.monotonic()
        for service, (count, until_s) in saved.crashes.items():
            self._note_crashes(service, count, until_s, max(0.0, until_s - now_s) + _FORGET_S)
        for record in saved.records:
            unit = _Unit(record.call, record.template, record.mark, self._loop)
            unit.key, unit.single, unit.phase = record.key, record.single, Phase(record.phase)
            unit.pid, unit.user, unit.file = record.pid, record.user, record.file
            unit.since_s, unit.ready_s, unit.until_s = record.since_s, record.ready_s, record.until_s
            unit.cgroup = None if record.cgroup is None else Cgroup.of(record.cgroup)
            unit.word = None if record.word is None else Word(descriptors[record.word])
            self._units[unit.key] = unit
            if record.status is not None:
                unit.status.set_result(record.status)
            else:
                # Our child, and not waited for: the number is its own still, even if it has ended.
                unit.pidfd = os.pidfd_open(unit.pid)
                self._watch(unit)
            if unit.phase is Phase.STARTING:
                self._let_begin(unit)
                continue
            unit.begun.set_result(unit.started)
            if unit.phase is not Phase.RUNNING:
                work = self._stop if unit.phase is Phase.STOPPING else self._end
                unit.work = self._loop.create_task(work(unit))
        self._connections = max(
            (int(key.rpartition("#")[2]) for key, one in self._units.items() if one.single), default=0
        )

    async def aclose(self) -> None:
        """Stop everything; starts that are under way fail."""
        self._closing = True
        await asyncio.gather(*(self.stop(service) for service in list(self._units)), *self._tasks)
        for crashes in self._crashes.values():
            crashes.forgetting.cancel()
        self._crashes.clear()
        self._folders.close()
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None

    async def serve(self, call: Call, connection: socket.socket, variables: Mapping[str, str]) -> asyncio.Future[int]:
        """Start a process for one connection, which is its descriptor 0 and 1; StartFailed as `start`.

        Gives what becomes its status when nothing of it is left; to cancel that stops it. Any number may be of one
        service; none of them counts as its crash.
        """
        unit = self._admitted(call)
        self._connections += 1
        key = f"{call.service}#{self._connections}"
        unit.key, unit.single, unit.connection, unit.variables = key, True, connection, dict(variables)
        self._units[key] = unit
        self._let_begin(unit)
        try:
            await self._begun(unit)
        except asyncio.CancelledError:
            self._background(self.stop(key))
            raise
        unit.ended.add_done_callback(lambda ended: self._background(self.stop(key)) if ended.cancelled() else None)
        return unit.ended

    def _admitted(self, call: Call) -> _Unit:
        template = self._templates.get(call.template)
        if self._closing:
            raise StartFailed(Failure.STOPPED, "the launcher is closing")
        if template is None:
            raise StartFailed(Failure.NO_TEMPLATE, f"there is no template {call.template!r}")
        crashes = self._crashes.get(call.service)
        if crashes is not None and (left_s := crashes.until_s - time.monotonic()) > 0:
            why = f"it has failed {crashes.count} times in a row; not tried again for {left_s:.1f} s"
            raise StartFailed(Failure.BACKING_OFF, why, left_s)
        if len(self._units) >= self.most_running:
            raise StartFailed(Failure.OVER_RUNNING, f"{self.most_running:,} services run, and no more may")
        try:
            return _Unit(call, template, self._marks.new(), self._loop)
        except BadConfig as error:
            raise StartFailed(Failure.BAD_VALUE, str(error)) from None

    async def _begun(self, unit: _Unit) -> Started:
        outcome = await asyncio.shield(unit.begun)
        if isinstance(outcome, StartFailed):
            raise StartFailed(outcome.failure, outcome.why, outcome.retry_after_s)
        return outcome

    def _let_begin(self, unit: _Unit) -> None:
        def over(_: object) -> None:
            # A task that is cancelled before its first step never runs.
            if not unit.begun.done():
                self._failed(unit, _stopped())

        unit.work = self._loop.create_task(self._begin(unit))
        unit.work.add_done_callback(over)

    def _give_up(self, unit: _Unit) -> None:
        """Once: a second time would interrupt the clearing away."""
        if unit.work is not None and not unit.given_up:
            unit.given_up = True
            unit.work.cancel()

    def _failed(self, unit: _Unit, why: StartFailed) -> None:
        self._forget(unit)
        unit.ended.cancel()
        unit.begun.set_result(why)

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _worked(self, unit: _Unit) -> None:
        if unit.work is not None:
            await asyncio.wait({unit.work})

    async def _begin(self, unit: _Unit) -> None:
        """From its turn until it is ready or nothing of it is left; one that has a process already goes on."""
        failed: StartFailed | None
        try:
            async with self._slots:
                self._sweep_left_behind()
                failed = None if unit.pid else self._spawned(unit)
                # Each start holds up the thread: between two of them, whoever else has something to do has its turn.
                await asyncio.sleep(0)
                failed = failed or await self._until_ready(unit)
        except asyncio.CancelledError:
            failed = _stopped()
        except Exception as error:
            # Whoever waits must hear of it, whatever it is.
            _log.exception("%s: the start failed", unit.call.service)
            failed = StartFailed(Failure.BAD_VALUE, f"{type(error).__name__}: {error}")
        if failed is None:
            unit.phase, unit.ready_s = Phase.RUNNING, time.monotonic()
            unit.begun.set_result(unit.started)
            if unit.status.done():
                self._lead_ended(unit)
            return
        unit.phase = Phase.ENDING
        try:
            await self._cleared(unit)
        finally:
            if failed.failure in (Failure.NOT_EXECUTED, Failure.ENDED, Failure.TIMEOUT) and not unit.single:
                failed.retry_after_s = self._crashed(unit)
            self._failed(unit, failed)

    def _spawned(self, unit: _Unit) -> StartFailed | None:
        """Executes the program, with all that it needs."""
        template, call = unit.template, unit.call
        unit.since_s = time.monotonic()
        unit.until_s = unit.since_s + template.start_timeout_s
        with ExitStack() as opened:
            try:
                command = template.fill(call)
                descriptors = standard(template.output)
                for descriptor in descriptors:
                    opened.callback(os.close, descriptor)
                variables = {"FOURTUPLE_SERVICE": call.service, **unit.variables}
                if command.cgroup is not None:
                    self._make_cgroup(unit, command.cgroup)
                if unit.connection is not None:
                    descriptors = [unit.connection.fileno(), unit.connection.fileno(), descriptors[2]]
                elif template.socket is Socket.OWN:
                    self._clear_the_way(unit)
                else:
                    listener = opened.enter_context(self._listener(unit))
                    descriptors = [*descriptors, listener.fileno()]
                    variables |= {"LISTEN_PID": "0" * 10, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "service"}
                if template.ready is Ready.NOTIFY and not unit.single:
                    unit.word = Word()
                    variables["NOTIFY_SOCKET"] = unit.word.name
                born = birth(
                    template,
                    command,
                    mark=unit.mark,
                    descriptors=descriptors,
                    variables=variables,
                    cgroup=None if unit.cgroup is None else unit.cgroup.procs,
                    socket_folder=unit.place.path.rpartition("/")[0] or None,
                    soft_descriptors=self._soft_descriptors,
                )
            except (BadConfig, MissingFeature) as error:
                return StartFailed(Failure.BAD_VALUE, str(error))
            except OSError as error:
                return StartFailed(Failure.TARGET_TAKEN, f"{call.target}: {error.strerror}")
            finally:
                unit.connection, unit.variables = None, {}
            if born.user is not None:
                unit.user = born.user
            try:
                unit.pid, unit.pidfd = spawn(born)
            except OSError as error:
                return StartFailed(Failure.NOT_EXECUTED, f"{born.program}: {error.strerror}")
        if unit.cgroup is not None:
            unit.cgroup.joined()
        unit.phase = Phase.STARTING
        self._watch(unit)
        return None

    def _make_cgroup(self, unit: _Unit, path: str) -> None:
        try:
            unit.cgroup = Cgroup(path)
        except MissingFeature:
            if unit.template.cgroup_missing is Missing.REFUSE:
                raise

    def _clear_the_way(self, unit: _Unit) -> None:
        sockets.clear(unit.place)
        if sockets.is_there(unit.place, unit.call.delivery):
            raise OSError(EADDRINUSE, os.strerror(EADDRINUSE))

    def _listener(self, unit: _Unit) -> socket.socket:
        listener = sockets.bound(
            unit.place,
            unit.call.delivery,
            mode=unit.template.socket_mode,
            backlog=unit.template.backlog,
            owner=self.socket_owner,
        )
        if unit.place.path and not unit.place.path.startswith("@"):
            unit.file = sockets.identity(unit.place.path)
        return listener

    async def _until_ready(self, unit: _Unit) -> StartFailed | None:
        news = asyncio.Event()
        with ExitStack() as watched:
            if unit.template.socket is Socket.OWN and unit.place.path and not unit.single:
                watched.callback(self._folders.watch(unit.place.path, news.set))
            if unit.word is not None:
                self._loop.add_reader(unit.word.socket, news.set)
                watched.callback(self._loop.remove_reader, unit.word.socket)
            look_s = _LOOKS_S[0]

            def over(_: object) -> None:
                news.set()

            # None of it for as long as it runs.
            watched.callback(lambda: unit.status.remove_done_callback(over))
            while True:
                unit.status.remove_done_callback(over)
                unit.status.add_done_callback(over)
                if unit.status.done():
                    status = unit.status.result()
                    if not self._adopt_heir(unit):
                        return StartFailed(Failure.ENDED, _ended_early(unit, status))
                    continue
                if self._is_ready(unit):
                    return None
                left_s = unit.until_s - time.monotonic()
                if left_s <= 0:
                    why = f"it was not ready after {unit.template.start_timeout_s:g} s"
                    return StartFailed(Failure.TIMEOUT, why)
                with suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), min(left_s, look_s))
                look_s = _LOOKS_S[0] if news.is_set() else min(2 * look_s, _LOOKS_S[1])
                news.clear()

    def _is_ready(self, unit: _Unit) -> bool:
        template = unit.template
        if unit.word is not None:
            return unit.word.is_ready(unit.mark, unit.user)
        if template.ready is Ready.LISTENING and template.socket is Socket.OWN and not unit.single:
            return sockets.is_there(unit.place, unit.call.delivery)
        return time.monotonic() >= unit.since_s + template.settle_ms / 1000

    def _watch(self, unit: _Unit) -> None:
        """Hear of the end of its first process."""
        self._pids[unit.pid] = unit
        self._loop.add_reader(unit.pidfd, self._lead_readable, unit)
        if self._tick is None:
            self._tick = self._loop.call_later(_TICK_S, self._look_around)

    def _lead_readable(self, unit: _Unit) -> None:
        status = processes.reaped(unit.pidfd)
        if status is None:
            return
        self._loop.remove_reader(unit.pidfd)
        os.close(unit.pidfd)
        unit.pidfd = -1
        del self._pids[unit.pid]
        unit.status.set_result(status)
        if unit.phase is Phase.RUNNING:
            self._lead_ended(unit)

    def _lead_ended(self, unit: _Unit) -> None:
        if not self._adopt_heir(unit):
            unit.phase = Phase.ENDING
            unit.work = self._loop.create_task(self._end(unit))

    def _adopt_heir(self, unit: _Unit) -> bool:
        """Whether a process goes on in the place of the first, which has ended with status 0 and may do so."""
        if not unit.template.forks or unit.status.result() != 0:
            return False
        # One that has forked away as well may end between being listed and being looked at: its child is ours by then,
        # and in the next list.
        looks = (self._heirs(unit) for _ in range(_LOOKS_FOR_HEIRS))
        if (heirs := next(filter(None, looks), None)) is None:
            return False
        unit.pid = min(heirs)
        unit.pidfd = os.pidfd_open(unit.pid)
        unit.status = self._loop.create_future()
        self._watch(unit)
        return True

    def _heirs(self, unit: _Unit) -> list[int]:
        return [pid for pid, mark in self._orphans().items() if mark == unit.mark and processes.is_alive(pid)]

    async def _end(self, unit: _Unit) -> None:
        status = unit.status.result()
        await self._cleared(unit)
        if status != 0 and not unit.single:
            self._crashed(unit)
        self._forget(unit)
        if not unit.ended.done():
            unit.ended.set_result(status)
        if self._exited is not None and not unit.single:
            self._exited(Exit(service=unit.call.service, status=status, crashed=status != 0))

    async def _stop(self, unit: _Unit) -> None:
        await asyncio.wait({unit.status}, timeout=max(0.0, unit.until_s - time.monotonic()))
        await self._cleared(unit)
        self._forget(unit)
        if not unit.ended.done():
            unit.ended.set_result(unit.status.result() if unit.status.done() else -signal.SIGKILL)

    async def _cleared(self, unit: _Unit) -> None:
        """Kill whatever is left of it, wait until it is gone, remove what it had."""
        if unit.word is not None:
            unit.word.close()
            unit.word = None
        until_s, look_s = time.monotonic() + _KILL_PATIENCE_S, _LOOKS_S[0]
        # Who forks away just now is in no list, or in that of a process that is gone before it is looked at; and the
        # kernel's list of children may leave one out while it changes (proc(5)). So two looks in turn find nobody.
        quiet = 0
        while True:
            alive = self._members(unit, await self._looked())
            quiet = 0 if alive else quiet + 1
            if quiet == 2:
                break
            if unit.cgroup is not None:
                unit.cgroup.kill()
            for pid in alive:
                processes.kill(pid, None if pid == unit.pid else processes.mark_of(pid))
            if time.monotonic() > until_s:
                _log.error("%s: SIGKILL does not end %s", unit.call.service, ", ".join(map(str, sorted(alive))))
                break
            await asyncio.sleep(look_s)
            look_s = min(2 * look_s, _LOOKS_S[1])
        if unit.pid in self._pids:
            await asyncio.wait({unit.status}, timeout=_KILL_PATIENCE_S)
        if not unit.single and (unit.file is not None or unit.template.socket is Socket.OWN):
            sockets.remove(unit.place, unit.file)
        if unit.cgroup is not None:
            while not unit.cgroup.remove() and time.monotonic() < until_s:
                await asyncio.sleep(look_s)
            unit.cgroup = None

    def _members(self, unit: _Unit, orphans: Mapping[int, int]) -> set[int]:
        """Its living processes, those included that are our children now."""
        roots = {unit.pid} if unit.pid in self._pids else set()
        for pid, mark in orphans.items():
            if mark == unit.mark:
                roots.add(pid)
        found = processes.descendants(roots)
        if unit.cgroup is not None:
            found.update(unit.cgroup.members())
        return {pid for pid in found if processes.is_alive(pid)}

    async def _looked(self) -> dict[int, int]:
        """Orphans as of a moment after this call. A look costs as much as there are services (3 ms for 10,000): all who
        ask meanwhile share one, and looking takes a fifth of the time at most."""
        if self._looking is None:
            self._looking = self._loop.create_task(self._look_soon())
        return await asyncio.shield(self._looking)

    async def _look_soon(self) -> dict[int, int]:
        await asyncio.sleep(4 * self._look_took_s)
        self._looking, begun_s = None, time.monotonic()
        found = self._orphans()
        self._look_took_s = min(_MOST_LOOK_S, time.monotonic() - begun_s)
        return found

    def _orphans(self) -> dict[int, int]:
        """With their marks; of those that have ended, nothing is left after this."""
        found = processes.orphans(self._marks, self._pids.keys())
        return {pid: mark for pid, mark in found.items() if processes.is_alive(pid) or not processes.reap(pid)}

    def _look_around(self) -> None:
        """Reap orphans that have ended, and kill those whose service has."""
        known = {unit.mark for unit in self._units.values()}
        left = self._orphans()
        for pid, mark in left.items():
            if mark not in known:
                processes.kill(pid, mark)
        again = bool(left or self._units) and not (self._closing and not left)
        self._tick = self._loop.call_later(_TICK_S, self._look_around) if again else None

    def _sweep_left_behind(self) -> None:
        """Once: end what an earlier launcher of this name has started, and could not end because it was killed."""
        if self._left_behind:
            self._left_behind = False
            for pid in processes.marked_anywhere(self._marks):
                if pid not in self._pids:
                    processes.kill(pid, processes.mark_of(pid))

    def _crashed(self, unit: _Unit) -> float:
        """Note it; gives how long there is no other try, in seconds."""
        template, now_s = unit.template, time.monotonic()
        earlier = self._crashes.pop(unit.call.service, None)
        count = 1
        if earlier is not None:
            earlier.forgetting.cancel()
            ran_long = unit.ready_s and now_s - unit.ready_s >= template.backoff_reset_s
            count = 1 if ran_long else earlier.count + 1
        pause_s = min(template.backoff_most_s, template.backoff_s * 2.0 ** min(count - 1, 30))
        self._note_crashes(unit.call.service, count, now_s + pause_s, pause_s + template.backoff_reset_s)
        return pause_s

    def _note_crashes(self, service: str, count: int, until_s: float, forget_s: float) -> None:
        forgetting = self._loop.call_later(forget_s, self._crashes.pop, service, None)
        self._crashes[service] = _Crashes(count, until_s, forgetting)

    def _forget(self, unit: _Unit) -> None:
        if self._units.get(unit.key) is unit:
            del self._units[unit.key]


def _stopped() -> StartFailed:
    return StartFailed(Failure.STOPPED, "it was stopped before it was ready")


def _ended_early(unit: _Unit, status: int) -> str:
    if status < 0:
        return f"signal {-status} ({signal.strsignal(-status)}) ended it before it was ready"
    hint = "; a service that goes on in another process needs forks = true" if status == 0 else ""
    return f"it ended with status {status} before it was ready{hint}"
