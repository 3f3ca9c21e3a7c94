"""The broker process: gets listeners from the supervisor, gives up what it does not need, runs the engine on them, and
passes questions and answers.

Decides nothing about a service: what the engine asks goes to the supervisor, what that says goes to the engine. Knows
one channel, which is descriptor 3 when the process was made by executing a program. If the supervisor is gone, nobody
could wake, stop or end anything: the process accepts no more and ends when its connections have, or its grace is over.

Messages to it: `begin`, `answers`, `summary`, `verb`, `ferry`, `land`, `resume`, `drain`, `close`. From it: `ready`
(with the descriptor where it asks for TCP connections, if it may make none) or `refused`, `questions`, `told` (the
answer to a message with `re`), `ended`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

# For names of other scripts (`services`): once confined, this process may not be able to read it.
import idna  # noqa: F401

from fourtuple import confinement
from fourtuple.broker import running, summary
from fourtuple.brokerfile import BrokerFile
from fourtuple.control import verbs
from fourtuple.engine import CarrierName, Engine, Phase, uring_abilities
from fourtuple.errors import BadConfig, EngineStopped, FourtupleError, LimitReached, MissingFeature, MissingPrivilege
from fourtuple.questions import Question
from fourtuple.registry import Registry, Sealed, sealed
from fourtuple.sight import Sight
from fourtuple.supervisor.channel import MOST_BYTES, VERSION, Channel, ChannelBroken, Fields, Message
from fourtuple.supervisor.ebb import Ebb, give_back
from fourtuple.supervisor.spec import Spec
from fourtuple.supervisor.words import fields_of, tell

CHANNEL = 3
"""The descriptor of the channel in a process that was made by executing a program."""
_BEGINS_WITHIN_S = 30.0
_GLANCE_S = 0.2
_LAST_WORDS_S = 1.0
_BATCH_BYTES = MOST_BYTES // 2
"""Of questions in one message. The longest is an answer with a row for each of 64 services."""


def main(channel: Channel) -> int:
    """Serve until told to end; the exit status of the process."""
    # Ctrl-C reaches all of a terminal's processes: what it means, the supervisor says.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    try:
        first = next(iter(channel.wait(_BEGINS_WITHIN_S)), None)
        if first is None or first.kind != "begin" or first.fields.get("version") != VERSION:
            spoken = None if first is None else first.fields.get("version")
            channel.send("refused", {"why": f"version {spoken} is spoken to it, and it speaks {VERSION}"})
            return 1
        if first.lacks_descriptors:
            channel.send("refused", {"why": "it may have too few descriptors for the listeners (RLIMIT_NOFILE)"})
            return 1
        return _begun(channel, first)
    except ChannelBroken:
        return 1
    except (FourtupleError, OSError) as error:
        with suppress(ChannelBroken):
            channel.send("refused", {"why": str(error)})
        return 1


def _begun(channel: Channel, first: Message) -> int:
    spec = Spec.from_fields(first.fields["spec"])
    listeners, workers, file = list(first.descriptors), spec.workers, spec.file()
    with ExitStack() as stack:
        # Before the engine, which reckons with the descriptors that there are.
        runner = stack.enter_context(asyncio.Runner())
        runner.get_loop()
        store, seen = _store(stack, spec, file)
        allowed = _allowed(spec, file, seen) if spec.is_confined else None
        # What io_uring can do is found by trying it, which takes sockets that there are none of afterwards.
        carrier, fallback = _carrier(CarrierName(spec.carrier), allowed is None or allowed.uring)
        report = confinement.confine(allowed) if allowed is not None else None
        engine = stack.enter_context(
            running(
                file,
                store=store,
                limits=spec.limits,
                ledger=Path(spec.ledger) if spec.ledger else None,
                ledger_every=spec.ledger_every,
                ledger_steps=spec.ledger_steps,
                carrier=carrier,
                workers=workers,
                descriptors=[listeners[at : at + workers] for at in range(0, len(listeners), workers)],
                inetd=Path(spec.inetd) if spec.inetd else None,
            )
        )
        engine.wait_for(lambda now: now.phase is not Phase.RAMPING or not now.running, _BEGINS_WITHIN_S)
        if (stopped_by := engine.snapshot().stopped_by) is not None:
            raise EngineStopped(f"it cannot listen: {stopped_by}")
        runner.run(_Process(channel, spec, engine, seen, listeners, report, fallback).live())
    return 0


def _carrier(wanted: CarrierName, uring_allowed: bool) -> tuple[CarrierName, str]:
    """Which one, and why not io_uring if it is wanted where it can be had."""
    if wanted is not CarrierName.EPOLL and not uring_allowed:
        reason = 'sandbox = "required", and with TCP or abstract targets io_uring reaches out of it'
        if wanted is CarrierName.URING:
            raise BadConfig("carrier", f"{reason}: take epoll or auto")
        return CarrierName.EPOLL, reason
    if wanted is not CarrierName.AUTO:
        return wanted, ""
    try:
        if uring_abilities()["lent_descriptors"]:
            return CarrierName.URING, ""
        reason = "io_uring here cannot lend a descriptor (IORING_OP_FIXED_FD_INSTALL, Linux 6.8)"
    except (MissingFeature, MissingPrivilege, LimitReached) as refusal:
        reason = str(refusal)
    return CarrierName.EPOLL, reason


def _store(stack: ExitStack, spec: Spec, file: BrokerFile) -> tuple[Path | Sealed, Registry | Sealed]:
    """What the engine opens, and what of it is looked at here."""
    given = spec.services()
    if isinstance(given, Path):
        return given, stack.enter_context(Registry(given, create=False))
    made = given or sealed(file.services, file.routes)
    return made, made


def _allowed(spec: Spec, file: BrokerFile, seen: Registry | Sealed) -> confinement.Confinement:
    return confinement.plan(
        file,
        registry=seen if isinstance(seen, Registry) else None,
        log=Path(spec.ledger) if spec.ledger else None,
        uring=CarrierName(spec.carrier) is not CarrierName.EPOLL,
        served=True,
        identity=confinement.identity(file.confine.user, file.confine.group),
        read=confinement.libraries(),
        sockets=spec.sockets(),
    )


class _Process:
    def __init__(
        self,
        channel: Channel,
        spec: Spec,
        engine: Engine,
        seen: Registry | Sealed,
        listeners: list[int],
        report: confinement.Report | None,
        fallback: str,
    ) -> None:
        self._channel, self._spec, self._engine, self._listeners = channel, spec, engine, listeners
        limits = spec.limits
        bounds = verbs.Limits(
            most_connections=limits.most_connections,
            most_per_source=limits.most_per_source,
            most_per_service=limits.most_per_service,
        )
        self._sight = Sight(engine, seen, [table.address for table in spec.file().listen], bounds)
        self._report, self._fallback = report, fallback
        self._is_orphan = self._is_watched_for_room = False
        self._told = asyncio.Event()
        self._batch: list[Question] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def live(self) -> None:
        """Until the engine has ended."""
        self._loop = asyncio.get_running_loop()
        self._sight.follow(self._ask)
        self._loop.add_reader(self._channel.fileno(), self._readable)
        asks_at = None if self._report is None else self._report.asks_at
        self._say(
            "ready",
            {
                "version": VERSION,
                "carrier": self._engine.carrier.value,
                "fallback": self._fallback,
                "workers": self._engine.workers,
                "pid": os.getpid(),
                "confined": None if self._report is None else self._report.as_json,
            },
            () if asks_at is None else (asks_at,),
        )
        if asks_at is not None:
            # While this process had it, too, one whose supervisor is gone would wait for an answer for ever.
            os.close(asks_at)
        ebb = Ebb()
        while self._engine.running:
            await asyncio.sleep(_GLANCE_S)
            now = self._engine.snapshot()
            if ebb.seen(now.sniffing_now + now.delivering_now + now.relaying_now):
                give_back()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._say("ended", {**summary(self._engine.snapshot()), "errors": list(self._engine.snapshot().errors)})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                while self._channel.has_more_to_send and not self._is_orphan:
                    await asyncio.sleep(_GLANCE_S / 10)

    # ---- what the engine asks ----------------------------------------------------------------------------------------

    def _ask(self, question: Question) -> None:
        # They come in bunches: all of one go together, as far as a message has room.
        if not self._batch:
            self._loop.call_soon(self._pass_on)
        self._batch.append(question)

    def _pass_on(self) -> None:
        rows: list[Fields] = []
        size = 0
        for question in self._batch:
            fields = fields_of(question)
            length = len(json.dumps(fields))
            if rows and size + length > _BATCH_BYTES:
                self._say("questions", {"questions": rows})
                rows, size = [], 0
            rows.append(fields)
            size += length
        self._batch.clear()
        if rows:
            self._say("questions", {"questions": rows})

    # ---- what the supervisor says ------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            messages = self._channel.receive()
        except ChannelBroken:
            return self._orphaned()
        for message in messages:
            descriptors = list(message.descriptors)
            try:
                self._hear(message, descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _hear(self, message: Message, descriptors: Sequence[int]) -> None:
        engine, fields = self._engine, message.fields
        match message.kind:
            case "answers":
                for one in fields["answers"]:
                    tell(engine, one)
            case "summary":
                self._tell(message, summary(engine.snapshot()))
            case "verb":
                task = self._loop.create_task(self._verb(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case "ferry" | "land" if message.lacks_descriptors:
                self._tell(message, {"error": "it has no descriptor left", "again": True})
            case "ferry" | "land" as kind:
                try:
                    (engine.ferry if kind == "ferry" else engine.land)(descriptors)
                except BadConfig as error:
                    # All are open: what cannot be had is another number for them.
                    return self._tell(message, {"error": str(error), "again": True})
                if kind == "ferry":
                    self._close_listeners()
                self._tell(message, {})
            case "drain":
                self._drain(fields.get("grace_s"))
            case "close":
                engine.close()
            case kind:
                self._tell(message, {"error": f"this broker knows no {kind}"})

    async def _verb(self, message: Message) -> None:
        """Of the control socket, for what only the engine knows."""
        try:
            answer = await getattr(self._sight, message.fields["verb"])(**message.fields["with"])
            self._tell(message, {"answer": verbs.plain(answer)})
        except verbs.Refused as refused:
            self._tell(message, {"refused": refused.message()})

    def _tell(self, message: Message, fields: Fields) -> None:
        self._say("told", {**fields, "re": message.fields.get("re")})

    def _drain(self, grace_s: float | None) -> None:
        """Accept no more, here: the supervisor's own copies of the listeners live on."""
        self._engine.drain()
        self._close_listeners()
        if grace_s is not None:
            self._loop.call_later(grace_s, self._engine.close)

    def _close_listeners(self) -> None:
        while self._listeners:
            os.close(self._listeners.pop())

    # ---- the channel -------------------------------------------------------------------------------------------------

    def _say(self, kind: str, fields: Fields, descriptors: Sequence[int] = ()) -> None:
        if self._is_orphan:
            return
        try:
            self._channel.send(kind, fields, descriptors)
        except ChannelBroken:
            return self._orphaned()
        self._watch_for_room()

    def _writable(self) -> None:
        try:
            self._channel.flush()
        except ChannelBroken:
            return self._orphaned()
        self._watch_for_room()

    def _watch_for_room(self) -> None:
        wanted = self._channel.has_more_to_send
        if wanted and not self._is_watched_for_room:
            self._loop.add_writer(self._channel.fileno(), self._writable)
        elif not wanted and self._is_watched_for_room:
            self._loop.remove_writer(self._channel.fileno())
        self._is_watched_for_room = wanted

    def _orphaned(self) -> None:
        if not self._is_orphan:
            self._is_orphan = True
            self._loop.remove_reader(self._channel.fileno())
            self._loop.remove_writer(self._channel.fileno())
            self._drain(self._spec.grace_s)
