"""asyncio (and uvloop): `create_connection`, streams and datagram endpoints, as the event loop's own.

Decides how a task waits for a tuple. What the loop is given is a connected socket, so transports, TLS and protocols are
its own. `asyncio.timeout` bounds the whole; the pool's `patience_s` bounds the wait for a tuple.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from fourtuple.connect.attempts import KINDS, SocketAddress, addresses_of, connect_any
from fourtuple.connect.sockets import SourceSocket, family_of, wait_s
from fourtuple.sources import Lease, SourcePool
from fourtuple.tuples import Endpoint, Protocol

_Protocol = TypeVar("_Protocol", bound=asyncio.BaseProtocol)
_STREAM_LIMIT = 2**16
"""As in asyncio.streams."""


async def create_connection(
    pool: SourcePool,
    protocol_factory: Callable[[], _Protocol],
    host: str,
    port: int,
    *,
    server_hostname: str | None = None,
    **options: Any,
) -> tuple[asyncio.Transport, _Protocol]:
    """As loop.create_connection, from the pool's sources; `options` are its own, `ssl` among them."""
    connected = await connect_socket(pool, host, port)
    if options.get("ssl") and server_hostname is None:
        server_hostname = host
    loop = asyncio.get_running_loop()
    try:
        return await loop.create_connection(
            protocol_factory, sock=connected, server_hostname=server_hostname, **options
        )
    except BaseException:
        connected.close()
        raise


async def open_connection(
    pool: SourcePool, host: str, port: int, *, limit: int = _STREAM_LIMIT, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As asyncio.open_connection, from the pool's sources."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    transport, protocol = await create_connection(
        pool, lambda: asyncio.StreamReaderProtocol(reader, loop=loop), host, port, **options
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def create_datagram_endpoint(
    pool: SourcePool, protocol_factory: Callable[[], asyncio.DatagramProtocol], host: str, port: int
) -> tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]:
    """A UDP flow: as loop.create_datagram_endpoint with a remote address, from the pool's sources."""
    connected = await connect_socket(pool, host, port, protocol=Protocol.UDP)
    return await asyncio.get_running_loop().create_datagram_endpoint(protocol_factory, sock=connected)


async def connect_socket(pool: SourcePool, host: str, port: int, *, protocol: Protocol = Protocol.TCP) -> SourceSocket:
    """A connected, non-blocking socket, to the first of the host's addresses that has room and answers."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, family=family_of(pool), type=KINDS[protocol])
    addresses = addresses_of(pool, found, host)
    return await connect_any(
        pool, addresses, protocol, partial(wait_for_lease, pool, protocol=protocol), _dial, asyncio.sleep
    )


async def wait_for_lease(
    pool: SourcePool, destination: Endpoint, deadline: float, *, protocol: Protocol = Protocol.TCP
) -> Lease:
    """Wait for a tuple; LimitReached if none came back before `deadline`."""
    loop = asyncio.get_running_loop()
    while True:
        woken = asyncio.Event()
        wake = partial(_wake, loop, woken)
        now = time.monotonic()
        lease = pool.take(destination, now, protocol=protocol, wake=wake)
        if lease is not None:
            return lease
        try:
            if deadline <= now:
                raise pool.exhausted(destination, now, protocol=protocol)
            async with asyncio.timeout(wait_s(pool, now, deadline)):
                await woken.wait()
        except TimeoutError:
            pool.give_up(destination, wake, protocol=protocol)
        except BaseException:
            pool.give_up(destination, wake, protocol=protocol)
            raise


def _wake(loop: asyncio.AbstractEventLoop, woken: asyncio.Event) -> bool:
    """Called from any thread, perhaps while an object is being destroyed."""
    try:
        loop.call_soon_threadsafe(woken.set)
    except RuntimeError:  # that loop is closed
        return False
    return True


async def _dial(attempt: socket.socket, address: SocketAddress) -> None:
    await asyncio.get_running_loop().sock_connect(attempt, address)
