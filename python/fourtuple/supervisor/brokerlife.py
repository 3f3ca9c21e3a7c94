"""The broker process once it serves: passes questions and answers between the engine and the supervisor.

Decides nothing about a service: what the engine asks goes to the supervisor, what that says goes to the engine. If the
supervisor is gone, nobody could wake, stop or end anything: the process accepts no more and ends when its connections
have, or its grace is over.

Messages to it: `answers`, `summary`, `verb`, `ferry`, `land`, `drain`, `close`. From it: `ready` (with the
descriptor where it asks for TCP connections, if it may make none), `questions`, `told` (the answer to a message with
`re`), `ended`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import suppress

# For names of other scripts (`services`): from here on this process loads nothing more, which it may not be able to.
import idna  # noqa: F401

from fourtuple import confinement
from fourtuple.broker import summary
from fourtuple.control import verbs
from fourtuple.engine import Engine
from fourtuple.errors import BadConfig
from fourtuple.questions import Question
from fourtuple.registry import Registry, Sealed
from fourtuple.sight import Sight
from fourtuple.supervisor.channel import MOST_BYTES, VERSION, Channel, ChannelBroken, Fields, Message
from fourtuple.supervisor.ebb import Ebb, give_back
from fourtuple.supervisor.spec import Spec
from fourtuple.supervisor.words import fields_of, tell

_GLANCE_S = 0.2
_LAST_WORDS_S = 1.0
_BATCH_BYTES = MOST_BYTES // 2
"""Of questions in one message. The longest is an answer with a row for each of 64 services."""


class Life:
    """Of one process; `run` once the engine runs."""

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
        self._batch: list[Question] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self) -> None:
        """Say that it is ready, and go on until the engine has ended."""
        asyncio.run(self._live())

    async def _live(self) -> None:
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
