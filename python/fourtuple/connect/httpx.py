"""httpx and httpcore: transports for `httpx.Client(transport=...)`, and network backends for httpcore's own pools.

Decides nothing; see `fourtuple.connect.backends`.
"""

from __future__ import annotations

from typing import Any

import httpcore
import httpx

# Streams have no public name; connections of our own making need the very class that httpcore's backends return.
from httpcore._backends.anyio import AnyIOStream
from httpcore._backends.sync import SyncStream

from fourtuple.connect.backends import (
    Options,
    connected_socket,
    connected_stream,
    errors_as,
    give_backend,
    refuse_local_address,
)
from fourtuple.sources import SourcePool

_LIBRARY = f"httpx {httpx.__version__}"


class SourceTransport(httpx.HTTPTransport):
    """For httpx.Client: connections come from the pool's sources; `options` are HTTPTransport's own."""

    def __init__(self, pool: SourcePool, **options: Any) -> None:
        refuse_local_address(options)
        super().__init__(**options)
        give_backend(self._pool, SourceBackend(pool), _LIBRARY)


class AsyncSourceTransport(httpx.AsyncHTTPTransport):
    """For httpx.AsyncClient, on asyncio or trio."""

    def __init__(self, pool: SourcePool, **options: Any) -> None:
        refuse_local_address(options)
        super().__init__(**options)
        give_backend(self._pool, AsyncSourceBackend(pool), _LIBRARY)


class SourceBackend(httpcore.SyncBackend):
    """For httpcore.ConnectionPool(network_backend=...)."""

    def __init__(self, pool: SourcePool) -> None:
        self._source_pool = pool

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Options = None,
    ) -> httpcore.NetworkStream:
        """A connection from the pool's sources."""
        with errors_as(httpcore.ConnectTimeout, httpcore.ConnectError):
            return SyncStream(connected_socket(self._source_pool, host, port, timeout, socket_options))


class AsyncSourceBackend(httpcore.AnyIOBackend):
    """For httpcore.AsyncConnectionPool(network_backend=...), on asyncio or trio."""

    def __init__(self, pool: SourcePool) -> None:
        self._source_pool = pool

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Options = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection from the pool's sources."""
        with errors_as(httpcore.ConnectTimeout, httpcore.ConnectError):
            return AnyIOStream(await connected_stream(self._source_pool, host, port, timeout, socket_options))
