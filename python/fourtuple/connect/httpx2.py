"""httpx2 and httpcore2: transports for `httpx2.Client(transport=...)`, and network backends for httpcore2's own pools.

Decides nothing; see `fourtuple.connect.backends`. These two are the successors of httpx and httpcore, under names of
their own: a program may have both.
"""

from __future__ import annotations

from typing import Any

import httpcore2
import httpx2

# Streams have no public name; connections of our own making need the very class that httpcore2's backends return.
from httpcore2._backends.anyio import AnyIOStream
from httpcore2._backends.sync import SyncStream

from fourtuple.connect.backends import (
    Options,
    connected_socket,
    connected_stream,
    errors_as,
    give_backend,
    refuse_local_address,
)
from fourtuple.sources import SourcePool

_LIBRARY = f"httpx2 {httpx2.__version__}"


class SourceTransport(httpx2.HTTPTransport):
    """For httpx2.Client: connections come from the pool's sources; `options` are HTTPTransport's own."""

    def __init__(self, pool: SourcePool, **options: Any) -> None:
        refuse_local_address(options)
        super().__init__(**options)
        give_backend(self._pool, SourceBackend(pool), _LIBRARY)


class AsyncSourceTransport(httpx2.AsyncHTTPTransport):
    """For httpx2.AsyncClient, on asyncio or trio."""

    def __init__(self, pool: SourcePool, **options: Any) -> None:
        refuse_local_address(options)
        super().__init__(**options)
        give_backend(self._pool, AsyncSourceBackend(pool), _LIBRARY)


class SourceBackend(httpcore2.SyncBackend):
    """For httpcore2.ConnectionPool(network_backend=...)."""

    def __init__(self, pool: SourcePool) -> None:
        self._source_pool = pool

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Options = None,
    ) -> httpcore2.NetworkStream:
        """A connection from the pool's sources."""
        with errors_as(httpcore2.ConnectTimeout, httpcore2.ConnectError):
            return SyncStream(connected_socket(self._source_pool, host, port, timeout, socket_options))


class AsyncSourceBackend(httpcore2.AnyIOBackend):
    """For httpcore2.AsyncConnectionPool(network_backend=...), on asyncio or trio."""

    def __init__(self, pool: SourcePool) -> None:
        self._source_pool = pool

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Options = None,
    ) -> httpcore2.AsyncNetworkStream:
        """A connection from the pool's sources."""
        with errors_as(httpcore2.ConnectTimeout, httpcore2.ConnectError):
            return AnyIOStream(await connected_stream(self._source_pool, host, port, timeout, socket_options))
