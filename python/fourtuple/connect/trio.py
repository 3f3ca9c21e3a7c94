"""trio: `open_tcp_stream`, as trio's own, and `open_udp_flow`, a channel of datagrams.

Decides how a task waits for a tuple and for its connection. trio takes no subclass of socket, so a stream and a flow
have a plain one inside, and give the tuple back when they are closed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from functools import partial

import trio

from fourtuple.connect.attempts import KINDS, SocketAddress, addresses_of, connect_any
from fourtuple.connect.sockets import SourceSocket, family_of, wait_s
from fourtuple.sources import Lease, SourcePool
from fourtuple.tuples import Endpoint, Protocol

_LARGEST_DATAGRAM = 65_536


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


class SourceFlow(trio.abc.Channel[bytes]):
    """A UDP flow whose local name is the pool's choice: what is sent and received is one datagram each."""

    def __init__(self, connected: SourceSocket) -> None:
        plain, self._close = connected.hand_over()
        self.socket = trio.socket.from_stdlib_socket(plain)
        """Close the flow, not the socket."""

    async def send(self, value: bytes) -> None:
        """Send one datagram; OSError says what an earlier one met (ECONNREFUSED)."""
        try:
            await self.socket.send(value)
        except OSError as error:
            raise self._closed_or(error) from error

    async def receive(self) -> bytes:
        """Wait for one datagram."""
        try:
            return await self.socket.recv(_LARGEST_DATAGRAM)
        except OSError as error:
            raise self._closed_or(error) from error

    async def aclose(self) -> None:
        """Close it and give its tuple back."""
        if self.socket.fileno() != -1:
            trio.lowlevel.notify_closing(self.socket)
            self._close()
        await trio.lowlevel.checkpoint()

    def _closed_or(self, error: OSError) -> Exception:
        """What trio's channels raise when they were closed here; else the error itself."""
        return trio.ClosedResourceError("this flow was closed") if self.socket.fileno() == -1 else error


async def open_tcp_stream(pool: SourcePool, host: str, port: int) -> SourceStream:
    """As trio.open_tcp_stream, from the pool's sources."""
    return SourceStream(await connect_socket(pool, host, port))


async def open_udp_flow(pool: SourcePool, host: str, port: int) -> SourceFlow:
    """A UDP flow to one destination, from the pool's sources."""
    return SourceFlow(await connect_socket(pool, host, port, protocol=Protocol.UDP))


async def connect_socket(pool: SourcePool, host: str, port: int, *, protocol: Protocol = Protocol.TCP) -> SourceSocket:
    """A connected, non-blocking socket, to the first of the host's addresses that has room and answers."""
    found = await trio.socket.getaddrinfo(host, port, family_of(pool), KINDS[protocol])
    addresses = addresses_of(pool, found, host)
    wait = partial(wait_for_lease, pool, protocol=protocol)
    return await connect_any(pool, addresses, protocol, wait, _dial, trio.sleep)


async def wait_for_lease(
    pool: SourcePool, destination: Endpoint, deadline: float, *, protocol: Protocol = Protocol.TCP
) -> Lease:
    """Wait for a tuple; LimitReached if none came back before `deadline`."""
    token = trio.lowlevel.current_trio_token()
    while True:
        woken = trio.Event()
        wake = partial(_wake, token, woken.set)
        now = time.monotonic()
        lease = pool.take(destination, now, protocol=protocol, wake=wake)
        if lease is not None:
            return lease
        try:
            if deadline <= now:
                raise pool.exhausted(destination, now, protocol=protocol)
            with trio.move_on_after(wait_s(pool, now, deadline)) as wait:
                await woken.wait()
        except BaseException:
            pool.give_up(destination, wake, protocol=protocol)
            raise
        if wait.cancelled_caught:
            pool.give_up(destination, wake, protocol=protocol)


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
