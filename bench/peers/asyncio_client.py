"""asyncio with streams or with a protocol, on its own loop or uvloop.

asyncio_client HOST PORT CONNECTIONS streams|protocol asyncio|uvloop
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import cast

from bench.peers.steps import Step

TOKEN = bytes(range(16))
WINDOW = 256
"""Attempts under way at once, as in our own load engine."""


class Holder(asyncio.Protocol):
    """As little as a protocol can keep: its transport, and who waits for bytes."""

    __slots__ = ("_transport", "_waiter")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's are none by class
        self._waiter: asyncio.Future[bytes] | None = None

    def data_received(self, data: bytes) -> None:
        if self._waiter is not None:
            self._waiter.set_result(data)

    async def echo(self) -> bytes:
        """Send the token; what came back."""
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(TOKEN)
        try:
            return await self._waiter
        finally:
            self._waiter = None


class Streams:
    """The two streams of a connection."""

    __slots__ = ("_reader", "_writer")

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def echo(self) -> bytes:
        """Send the token; what came back."""
        self._writer.write(TOKEN)
        return await self._reader.readexactly(len(TOKEN))


async def main(host: str, port: int, connections: int, api: str) -> None:
    """Connect, hold, send each its token and have it back."""

    async def by_streams() -> Streams:
        return Streams(*await asyncio.open_connection(host, port))

    async def by_protocol() -> Holder:
        return (await asyncio.get_running_loop().create_connection(Holder, host, port))[1]

    connect: Callable[[], Awaitable[Streams | Holder]] = by_streams if api == "streams" else by_protocol
    step = Step()
    step.done()
    held: list[Streams | Holder] = []
    left = iter(range(connections))

    async def connect_some() -> None:
        # A fixed number of tasks, not a task for each connection: those would be the client's memory, not the API's.
        for _ in left:
            held.append(await connect())

    await asyncio.gather(*(connect_some() for _ in range(WINDOW)))
    step.done(connected=len(held))
    right = 0
    waiting = iter(held)

    async def echo_some() -> None:
        nonlocal right
        for one in waiting:
            answer = await one.echo()
            right += answer == TOKEN

    await asyncio.gather(*(echo_some() for _ in range(WINDOW)))
    step.done(echoed=right)


if __name__ == "__main__":
    if sys.argv[5] == "uvloop":
        import uvloop as loops

        runner = asyncio.Runner(loop_factory=loops.new_event_loop)
    else:
        runner = asyncio.Runner()
    with runner:
        runner.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
