"""trio: `open_tcp_stream`, as trio's own.

Decides how a task waits for a tuple and for its connection. trio takes no subclass of socket, so the stream has a plain
one inside, and gives the tuple back when it is closed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from functools import partial

import trio

from fourtuple.connect.attempts import SocketAddress, addresses_of, connect_any
from fourtuple.connect.sockets import SourceSocket, family_of, wait_s
from fourtuple.sources import Lease, SourcePool
from fourtuple.tuples import Endpoint, Protocol


class SourceStream(trio.abc.HalfCloseableStream):
    """A stream whose local name is the pool's choice: a trio.SocketStream inside, which trio lets nobody subclass."""

    def __init__(self, connected: SourceSocket) -> None:
        plain, self._close = connected.hand_over()
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(plain))
        self.socket = self._stream.socket
        """As of a trio.SocketStream. Close the stream, not the socket."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As trio.SocketStream."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As trio.SocketStream."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """As trio.SocketStream."""
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As trio.SocketStream."""
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Close it and give its tuple back."""
        if self.socket.fileno() != -1:
            trio.lowlevel.notify_closing(self.socket)
            self._close()
        await trio.lowlevel.checkpoint()


async def open_tcp_stream(pool: SourcePool, host: str, port: int) -> SourceStream:
    """As trio.open_tcp_stream, from the pool's sources."""
    return SourceStream(await connect_socket(pool, host, port))


async def connect_socket(pool: SourcePool, host: str, port: int) -> SourceSocket:
    """A connected, non-blocking socket, to the first of the host's addresses that has room and answers."""
    found = await trio.socket.getaddrinfo(host, port, family_of(pool), socket.SOCK_STREAM)
    addresses = addresses_of(pool, found, host)
    return await connect_any(pool, addresses, Protocol.TCP, partial(wait_for_lease, pool), _dial, trio.sleep)


async def wait_for_lease(pool: SourcePool, destination: Endpoint, deadline: float) -> Lease:
    """Wait for a tuple; LimitReached if none came back before `deadline`."""
    token = trio.lowlevel.current_trio_token()
    while True:
        woken = trio.Event()
        wake = partial(_wake, token, woken.set)
        now = time.monotonic()
        lease = pool.take(destination, now, wake=wake)
        if lease is not None:
            return lease
        try:
            if deadline <= now:
                raise pool.exhausted(destination, now)
            with trio.move_on_after(wait_s(pool, now, deadline)) as wait:
                await woken.wait()
        except BaseException:
            pool.give_up(destination, wake)
            raise
        if wait.cancelled_caught:
            pool.give_up(destination, wake)


def _wake(token: trio.lowlevel.TrioToken, set_event: Callable[[], None]) -> bool:
    """Called from any thread, perhaps while an object is being destroyed."""
    try:
        token.run_sync_soon(set_event)
    except trio.RunFinishedError:
        return False
    return True


async def _dial(attempt: SourceSocket, address: SocketAddress) -> None:
    try:
        attempt.connect(address)
    except BlockingIOError:
        await trio.lowlevel.wait_writable(attempt)
        number = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number)) from None
    else:
        await trio.lowlevel.checkpoint()
