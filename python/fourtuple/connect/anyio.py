"""anyio: `connect_tcp` and `create_connected_udp_socket`, as anyio's own, on whichever event loop runs.

Decides which library's file does the work. On asyncio what anyio makes of our socket closes it, and so gives the tuple
back at once; on trio it has a plain socket, whose end the pool finds out by itself.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any, Literal, overload

import anyio
from anyio.abc import ConnectedUDPSocket, SocketStream
from anyio.streams.tls import TLSStream
from sniffio import current_async_library

from fourtuple.connect import asyncio as on_asyncio
from fourtuple.connect.sockets import SourceSocket
from fourtuple.sources import SourcePool
from fourtuple.tuples import Protocol


@overload
async def connect_tcp(
    pool: SourcePool,
    host: str,
    port: int,
    *,
    tls: Literal[False] = False,
    ssl_context: ssl.SSLContext | None = None,
    tls_hostname: str | None = None,
) -> SocketStream: ...


@overload
async def connect_tcp(
    pool: SourcePool,
    host: str,
    port: int,
    *,
    tls: Literal[True],
    ssl_context: ssl.SSLContext | None = None,
    tls_hostname: str | None = None,
) -> TLSStream: ...


async def connect_tcp(
    pool: SourcePool,
    host: str,
    port: int,
    *,
    tls: bool = False,
    ssl_context: ssl.SSLContext | None = None,
    tls_hostname: str | None = None,
) -> SocketStream | TLSStream:
    """As anyio.connect_tcp, from the pool's sources."""
    stream = await open_stream(pool, host, port)
    if not tls:
        return stream
    try:
        return await TLSStream.wrap(stream, server_side=False, hostname=tls_hostname or host, ssl_context=ssl_context)
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise


async def create_connected_udp_socket(pool: SourcePool, remote_host: str, remote_port: int) -> ConnectedUDPSocket:
    """As anyio.create_connected_udp_socket, from the pool's sources."""
    connected = await _connected(pool, remote_host, remote_port, Protocol.UDP)
    try:
        return await ConnectedUDPSocket.from_socket(_given(connected))
    except BaseException:
        connected.close()
        raise


async def open_stream(
    pool: SourcePool, host: str, port: int, socket_options: Iterable[tuple[Any, ...]] = ()
) -> SocketStream:
    """A stream, its socket's options set once it is connected."""
    connected = await _connected(pool, host, port, Protocol.TCP)
    try:
        for option in socket_options:
            connected.setsockopt(*option)
        return await SocketStream.from_socket(_given(connected))
    except BaseException:
        connected.close()
        raise


async def _connected(pool: SourcePool, host: str, port: int, protocol: Protocol) -> SourceSocket:
    if current_async_library() == "trio":
        from fourtuple.connect import trio as on_trio

        return await on_trio.connect_socket(pool, host, port, protocol=protocol)
    return await on_asyncio.connect_socket(pool, host, port, protocol=protocol)


def _given(connected: SourceSocket) -> SourceSocket | int:
    """What anyio takes of a socket on the loop that runs: trio wants no subclass of one."""
    return connected.detach() if current_async_library() == "trio" else connected
