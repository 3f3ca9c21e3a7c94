"""The broker process: gets listeners from the supervisor, runs the engine on them, and passes questions and answers.

Decides nothing about a service: what the engine asks goes to the supervisor, what that says goes to the engine. Knows
one channel, which is descriptor 3 when the process was made by executing this module. If the supervisor is gone, nobody
could wake, stop or end anything: the process accepts no more and ends when its connections have, or its grace is over.

Messages to it: `begin`, `answer`, `survey`, `ferry`, `land`, `drain`, `resume`, `close`. From it: `ready`, `refused`,
`question`, `told` (the answer to a message with `re`), `moved`, `ended`.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from fourtuple.broker import running, summary
from fourtuple.engine import CarrierName, Engine, Phase
from fourtuple.errors import EngineStopped, FourtupleError
from fourtuple.supervisor.channel import MOST_BYTES, VERSION, Channel, ChannelBroken, Fields, Message
from fourtuple.supervisor.spec import Spec
from fourtuple.supervisor.words import fields_of, tell

CHANNEL = 3
"""The descriptor of the channel in a process that executes this module."""
_BEGINS_WITHIN_S = 30.0
_GLANCE_S = 0.25
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
        return _Process(channel, first).run()
    except ChannelBroken:
        return 1
    except (FourtupleError, OSError) as error:
        with suppress(ChannelBroken):
            channel.send("refused", {"why": str(error)})
        return 1


class _Process:
    def __init__(self, channel: Channel, first: Message) -> None:
        self._channel = channel
        self._spec = Spec.from_fields(first.fields["spec"])
        self._names: list[str] = first.fields["listeners"]
        self._listeners = list(first.descriptors)
        self._selector = selectors.DefaultSelector()
        self._ends_at_s: float | None = None
        self._is_orphan = False

    def run(self) -> int:
        spec = self._spec
        workers = spec.workers
        by_listener = [tuple(self._listeners[at : at + workers]) for at in range(0, len(self._listeners), workers)]
        with running(
            spec.file(),
            store=spec.services(),
            limits=spec.limits,
            ledger=Path(spec.ledger) if spec.ledger else None,
            ledger_every=spec.ledger_every,
            carrier=CarrierName(spec.carrier),
            workers=workers,
            descriptors=by_listener,
        ) as engine:
            engine.wait_for(lambda now: now.phase is not Phase.RAMPING or not now.running, _BEGINS_WITHIN_S)
            ready = {"version": VERSION, "carrier": engine.carrier.value, "fallback": engine.fallback_reason}
            self._channel.send("ready", {**ready, "workers": engine.workers, "pid": os.getpid()})
            self._serve(engine)
            ended = summary(engine.snapshot())
        with suppress(ChannelBroken):
            self._channel.send("ended", ended)
            self._deliver_last()
        return 0

    def _serve(self, engine: Engine) -> None:
        self._selector.register(self._channel, selectors.EVENT_READ)
        self._selector.register(engine.questions_fd, selectors.EVENT_READ)
        while engine.running:
            for key, events in self._selector.select(_GLANCE_S):
                if key.fileobj is not self._channel:
                    self._ask(engine)
                    continue
                try:
                    if events & selectors.EVENT_WRITE:
                        self._channel.flush()
                    if events & selectors.EVENT_READ:
                        for message in self._channel.receive():
                            self._hear(engine, message)
                except ChannelBroken:
                    self._is_orphan = True
                    self._selector.unregister(self._channel)
                    self._drain(engine, self._spec.grace_s)
            if not self._is_orphan:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._channel.has_more_to_send else 0)
                self._selector.modify(self._channel, wanted)
            if self._ends_at_s is not None and time.monotonic() >= self._ends_at_s:
                self._ends_at_s = None
                engine.close()
        with suppress(EngineStopped):
            engine.join(0)

    # ---- what the engine asks ----------------------------------------------------------------------------------------

    def _ask(self, engine: Engine) -> None:
        batch, bytes_in_batch = list[Fields](), 0
        for question in engine.questions():
            fields = fields_of(question)
            size = len(json.dumps(fields))
            if batch and bytes_in_batch + size > _BATCH_BYTES:
                self._pass_on(batch)
                batch, bytes_in_batch = [], 0
            batch.append(fields)
            bytes_in_batch += size
        self._pass_on(batch)

    def _pass_on(self, batch: list[Fields]) -> None:
        if batch and not self._is_orphan:
            self._channel.send("questions", {"questions": batch})

    # ---- what the supervisor says ------------------------------------------------------------------------------------

    def _hear(self, engine: Engine, message: Message) -> None:
        fields, descriptors = message.fields, list(message.descriptors)
        match message.kind:
            case "answers":
                for one in fields["answers"]:
                    tell(engine, one)
            case "summary":
                self._tell(message, summary(engine.snapshot()))
            case "ferry":
                engine.ferry(descriptors.pop())
            case "land":
                engine.land(descriptors.pop())
            case "drain":
                self._drain(engine, fields.get("grace_s"))
            case "close":
                engine.close()
            case _:
                self._tell(message, {"error": f"this broker knows no {message.kind}"})
        for descriptor in descriptors:
            os.close(descriptor)

    def _tell(self, message: Message, fields: Fields) -> None:
        self._channel.send("told", {**fields, "re": message.fields.get("re")})

    def _drain(self, engine: Engine, grace_s: float | None) -> None:
        """Accept no more, here: the supervisor's own copies of the listeners live on."""
        engine.drain()
        while self._listeners:
            os.close(self._listeners.pop())
        if grace_s is not None:
            self._ends_at_s = time.monotonic() + grace_s

    def _deliver_last(self) -> None:
        until_s = time.monotonic() + 1
        while self._channel.has_more_to_send and time.monotonic() < until_s:
            with selectors.DefaultSelector() as selector:
                selector.register(self._channel, selectors.EVENT_WRITE)
                selector.select(_GLANCE_S)
            self._channel.flush()


if __name__ == "__main__":
    sys.exit(main(Channel(socket.socket(fileno=CHANNEL))))
