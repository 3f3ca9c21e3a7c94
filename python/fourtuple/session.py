"""What a script of `fourtuple load` speaks on: a `Connection`, handed to its `async def session(connection)`.

Decides how long anything is waited for, what a round is, and what the peer's doings are called. Knows neither how the
connection was made nor of any other one. Whatever a peer sends, no more than 128 KiB of it are kept.

    async def session(connection):
        while True:
            with connection.round():
                await connection.send(b"PING\\r\\n")
                await connection.expect(b"+PONG\\r\\n")
            await connection.sleep(1)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

MOST_HELD_BYTES = 65_536
"""Of what has come and was not asked for; twice as much stops the reading (asyncio.StreamReader)."""
_SHOWN_BYTES = 40
_Result = TypeVar("_Result")


class Trouble(Exception):
    """Something that the peer did. A session may catch it; if not, it ends, and the report counts it for what it is."""

    counted = False
    """Whether the round that it ended has counted it."""


class AnswerTimeout(Trouble):
    """Nothing came, or nothing could be sent, within --answer-timeout."""


class PeerClosed(Trouble):
    """The peer ended the connection; all that it sent before has been received."""


class WrongAnswer(Trouble):
    """Other bytes came than were expected."""


class Book(Protocol):
    """Where it is counted what a session does."""

    def sent(self, count: int) -> None:
        """So many bytes were given to the kernel, or wait for it."""

    def begun(self) -> None:
        """One more round is under way."""

    def right(self, took_ns: int) -> None:
        """It went well."""

    def missing(self) -> None:
        """Its answer did not come in time."""

    def wrong(self) -> None:
        """Its answer was another one, or the peer ended it."""


class Connection:
    """An open connection, which is closed when the session returns."""

    __slots__ = ("_answer_timeout_s", "_book", "_gone", "_reader", "_writer", "destination", "serial", "source", "turn")

    def __init__(
        self,
        *,
        serial: int,
        turn: int,
        source: tuple[str, int],
        destination: tuple[str, int],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        gone: asyncio.Event,
        book: Book,
        answer_timeout_s: float,
    ) -> None:
        """For the worker; a script is given one."""
        self.serial = serial
        """From 0 to --connections less 1: no two connections have the same at one time."""
        self.turn = turn
        """How many sessions with this serial there were before."""
        # Not asked of the transport: of a connection that was reset meanwhile the kernel knows neither.
        self.source = source
        self.destination = destination
        self._reader = reader
        self._writer = writer
        self._gone = gone
        self._book = book
        self._answer_timeout_s = answer_timeout_s

    async def send(self, data: bytes) -> None:
        """Send all of it; waits while more than 64 KiB are still on their way."""
        self._book.sent(len(data))
        self._writer.write(data)
        await self._in_time(self._writer.drain())

    async def receive(self, most_bytes: int = MOST_HELD_BYTES) -> bytes:
        """What has come, or comes next: at least one byte."""
        data = await self._in_time(self._reader.read(most_bytes))
        if not data:
            raise PeerClosed("the peer ended the connection")
        return data

    async def receive_exactly(self, count: int) -> bytes:
        """So many bytes."""
        try:
            return await self._in_time(self._reader.readexactly(count))
        except asyncio.IncompleteReadError as short:
            raise PeerClosed(f"the peer ended the connection after {len(short.partial):,} of {count:,} bytes") from None

    async def receive_until(self, mark: bytes) -> bytes:
        """Everything up to and with this mark, at most 64 KiB."""
        try:
            return await self._in_time(self._reader.readuntil(mark))
        except asyncio.IncompleteReadError:
            raise PeerClosed(f"the peer ended the connection before it sent {_shown(mark)}") from None
        except asyncio.LimitOverrunError:
            raise WrongAnswer(f"{MOST_HELD_BYTES:,} bytes came without {_shown(mark)}") from None

    async def expect(self, data: bytes) -> None:
        """Exactly these bytes come next."""
        found = await self.receive_exactly(len(data))
        if found != data:
            raise WrongAnswer(f"{_shown(found)} came instead of {_shown(data)}")

    async def sleep(self, seconds: float) -> None:
        """Do nothing so long; PeerClosed as soon as the peer ends the connection."""
        try:
            async with asyncio.timeout(seconds):
                await self._gone.wait()
        except TimeoutError:
            return
        raise PeerClosed("the peer ended the connection")

    @contextmanager
    def round(self) -> Iterator[None]:
        """What is inside is one round: timed if it goes well, counted as missing or wrong if it does not.

        A failed `assert` inside is a wrong answer.
        """
        self._book.begun()
        started_ns = time.perf_counter_ns()
        try:
            yield
        except AnswerTimeout as late:
            late.counted = True
            self._book.missing()
            raise
        except (Trouble, ConnectionError, AssertionError) as error:
            if isinstance(error, Trouble):
                error.counted = True
            self._book.wrong()
            raise
        self._book.right(time.perf_counter_ns() - started_ns)

    async def _in_time(self, waiting: Awaitable[_Result]) -> _Result:
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                return await waiting
        except TimeoutError as late:
            if late.errno is not None:  # the kernel's: nothing that was sent has been acknowledged for long
                raise
            raise AnswerTimeout(f"nothing within {self._answer_timeout_s:g} s") from None


def _shown(data: bytes) -> str:
    return repr(data[:_SHOWN_BYTES]) + ("..." if len(data) > _SHOWN_BYTES else "")
