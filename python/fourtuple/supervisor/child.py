"""A broker process as the supervisor sees it: spoken to, watched, ended.

Decides what counts as ready, and how long an answer may take. Knows no service.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import count

from fourtuple.confinement import Report
from fourtuple.errors import EngineStopped
from fourtuple.supervisor.beginning import Begun, told
from fourtuple.supervisor.channel import Channel, ChannelBroken, Fields, Message
from fourtuple.supervisor.listeners import Listeners
from fourtuple.supervisor.spec import Spec

ANSWERS_WITHIN_S = 20.0
_ENDS_WITHIN_S = 5.0


class NotNow(EngineStopped):
    """A broker process could not do it for want of something that may come back."""


class BrokerChild:
    """One of them. Made within a running event loop."""

    def __init__(self, begun: Begun, hear: Callable[[BrokerChild, Message], None]) -> None:
        """Watch the process from now on, and hear what it says."""
        begun.is_watched = True
        self.pid, self.channel, self._is_told = begun.pid, begun.channel, begun.is_told
        self._hear = hear
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Fields] = self._loop.create_future()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        """Its status, as of waitstatus_to_exitcode()."""
        self.last: Fields = {}
        """The newest numbers that it has told."""
        self.is_leaving = False
        """It has been told to move what it has to another one, and accepts no more."""
        self.asks_at: int | None = None
        """The descriptor where it asks for connections that it may not make; open until the process has ended."""
        self._asked: dict[int, asyncio.Future[Fields]] = {}
        self._numbers = count(1)
        self._is_watched_for_room = False
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._reap)
        self._loop.add_reader(self.channel.fileno(), self._readable)

    @classmethod
    def inherited(cls, left: Fields, hear: Callable[[BrokerChild, Message], None]) -> BrokerChild:
        """The one of a supervisor whose place this program has taken."""
        channel = Channel(socket.socket(fileno=left["channel"]))
        made = cls(Begun(left["pid"], channel, is_told=True), hear)
        made.ready.set_result(left["ready"])
        made.is_leaving, made.last, made.asks_at = left["is_leaving"], left["last"], left["asks_at"]
        return made

    def left(self) -> Fields:
        """As `inherited` takes it; the descriptors are still this one's."""
        return {
            "pid": self.pid,
            "channel": self.channel.fileno(),
            "asks_at": self.asks_at,
            "ready": self.ready.result(),
            "is_leaving": self.is_leaving,
            "last": self.last,
        }

    @property
    def report(self) -> Report | None:
        """What it has given up, once it is ready."""
        is_ready = self.ready.done() and not self.ready.cancelled() and not self.ready.exception()
        said = self.ready.result().get("confined") if is_ready else None
        return None if said is None else Report.from_json(said)

    def begin(self, spec: Spec, listeners: Listeners) -> None:
        """Tell it what it is, unless it has been told; it answers by `ready`."""
        if not self._is_told:
            self._is_told = True
            self.send("begin", *told(spec, listeners))

    async def is_ready(self, timeout_s: float) -> Fields:
        """What it said; raises EngineStopped with the reason if it never will."""
        waited, _ = await asyncio.wait((self.ready, self.ended), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self.ready in waited:
            return self.ready.result()
        self.ready.cancel()
        if self.ended in waited:
            raise EngineStopped(f"the broker process ended with status {self.ended.result()} before it was ready")
        raise EngineStopped(f"the broker process is not ready after {timeout_s:g} s")

    def send(self, kind: str, fields: Fields | None = None, descriptors: Iterable[int] = ()) -> None:
        """Say something; to one that is gone it is said in vain."""
        if self.ended.done():
            return
        with suppress(ChannelBroken):
            self.channel.send(kind, fields, descriptors)
            self._watch_for_room()

    async def ask(self, kind: str, fields: Fields | None = None, descriptors: Sequence[int] = ()) -> Fields:
        """Say something that is answered; raises EngineStopped if it is not, NotNow if it may be later."""
        if self.ended.done():
            raise EngineStopped(f"the broker process {self.pid} is gone")
        number = next(self._numbers)
        answer = self._asked[number] = self._loop.create_future()
        try:
            self.send(kind, {**(fields or {}), "re": number}, descriptors)
            return await asyncio.wait_for(answer, ANSWERS_WITHIN_S)
        except TimeoutError:
            raise EngineStopped(f"the broker process {self.pid} does not answer") from None
        finally:
            del self._asked[number]

    def told(self, summary: Fields) -> None:
        """These are its numbers, unless it has said its last since."""
        if not self.last.get("final"):
            self.last = summary

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        if not self.ended.done():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    # ---- what happens ------------------------------------------------------------------------------------------------

    def _watch_for_room(self) -> None:
        wanted = self.channel.has_more_to_send
        if wanted and not self._is_watched_for_room:
            self._loop.add_writer(self.channel.fileno(), self._writable)
        elif not wanted and self._is_watched_for_room:
            self._loop.remove_writer(self.channel.fileno())
        self._is_watched_for_room = wanted

    def _writable(self) -> None:
        with suppress(ChannelBroken):
            self.channel.flush()
        self._watch_for_room()

    def _readable(self) -> None:
        try:
            messages = self.channel.receive()
        except ChannelBroken:
            # It is ending; one that says nonsense, or stays without a channel, is ended.
            self._loop.remove_reader(self.channel.fileno())
            self._loop.call_later(_ENDS_WITHIN_S, self.kill)
            return
        for message in messages:
            self._heard(message)

    def _heard(self, message: Message) -> None:
        match message.kind:
            case "ready" if not self.ready.done() and message.lacks_descriptors:
                self.ready.set_exception(EngineStopped("this supervisor may have no more descriptors (RLIMIT_NOFILE)"))
            case "ready" if not self.ready.done():
                if message.descriptors:
                    self.asks_at = message.descriptors[0]
                self.ready.set_result(message.fields)
                # Whoever hears of it now misses nothing that is said next.
                return self._hear(self, message)
            case "refused" if not self.ready.done():
                self.ready.set_exception(EngineStopped(str(message.fields.get("why"))))
            case "ended":
                self.last = {**message.fields, "final": True}
            case "told":
                answer = self._asked.get(message.fields.pop("re", 0))
                if answer is not None and not answer.done():
                    if (error := message.fields.get("error")) is not None:
                        kind = NotNow if message.fields.get("again") else EngineStopped
                        answer.set_exception(kind(str(error)))
                    else:
                        answer.set_result(message.fields)
            case _:
                self._hear(self, message)
                return
        message.close()

    def _reap(self) -> None:
        try:
            _, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            status = 0
        # What it has said at last is still there.
        with suppress(ChannelBroken, OSError):
            while messages := self.channel.receive():
                for message in messages:
                    self._heard(message)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        with suppress(ValueError):
            self._loop.remove_reader(self.channel.fileno())
            self._loop.remove_writer(self.channel.fileno())
        self.channel.close()
        if self.asks_at is not None:
            self._loop.remove_reader(self.asks_at)
            os.close(self.asks_at)
            self.asks_at = None
        if not self.ended.done():
            self.ended.set_result(os.waitstatus_to_exitcode(status))
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(EngineStopped(f"the broker process {self.pid} is gone"))
