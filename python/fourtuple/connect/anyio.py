"""anyio: `connect_tcp`, as anyio's own, on whichever event loop runs.

Decides which library's file does the work. On asyncio the stream closes our socket and so gives the tuple back at once;
on trio it has a plain socket, whose end the pool finds out by itself.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any, Literal, overload

import anyio
from anyio.abc import SocketStream
from anyio.streams.tls import TLSStream
from sniffio import current_async_library

from fourtuple.connect import asyncio as on_asyncio
from fourtuple.sources import SourcePool


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


async def open_stream(
    pool: SourcePool, host: str, port: int, socket_options: Iterable[tuple[Any, ...]] = ()
) -> SocketStream:
    """A stream, its socket's options set once it is connected."""
    if current_async_library() == "trio":
        from fourtuple.connect import trio as on_trio

        connected = await on_trio.connect_socket(pool, host, port)
    else:
        connected = await on_asyncio.connect_socket(pool, host, port)
    try:
        for option in socket_options:
            connected.setsockopt(*option)
        if current_async_library() == "trio":
            return await SocketStream.from_socket(connected.detach())
        return await SocketStream.from_socket(connected)
    except BaseException:
        connected.close()
        raise
