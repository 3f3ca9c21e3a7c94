"""httpx and httpcore: transports for `httpx.Client(transport=...)`, and network backends for httpcore's own pools.

Decides how httpcore gets its connections. Its `local_address` binds before it connects, which uses a port up for every
destination (A7), and its `socket_options` come after connect(), too late to help.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

import anyio
import httpcore
import httpx

# Streams have no public name; connections of our own making need the very class that httpcore's backends return.
from httpcore._backends.anyio import AnyIOStream
from httpcore._backends.sync import SyncStream

from fourtuple.connect.anyio import open_stream
from fourtuple.connect.blocking import create_connection
from fourtuple.errors import MissingFeature
from fourtuple.sources import SourcePool

_NODELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class SourceTransport(httpx.HTTPTransport):
    """For httpx.Client: connections come from the pool's sources; `options` are HTTPTransport's own."""

    def __init__(self, pool: SourcePool, **options: Any) -> None:
        _refuse_local_address(options)
        super().__init__(**options)
        _give_backend(self._pool, SourceBackend(pool))


class AsyncSourceTransport(httpx.AsyncHTTPTransport):
    """For httpx.AsyncClient, on asyncio or trio."""

    def __init__(self, pool: SourcePool, **options: Any) -> None:
        _refuse_local_address(options)
        super().__init__(**options)
        _give_backend(self._pool, AsyncSourceBackend(pool))


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
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """A connection from the pool's sources."""
        options = [_NODELAY, *(socket_options or ())]
        try:
            connected = create_connection(self._source_pool, (host, port), timeout, socket_options=options)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(error) from error
        except OSError as error:
            raise httpcore.ConnectError(error) from error
        return SyncStream(connected)


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
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection from the pool's sources."""
        options = [_NODELAY, *(socket_options or ())]
        try:
            with anyio.fail_after(timeout):
                stream = await open_stream(self._source_pool, host, port, options)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(error) from error
        except OSError as error:
            raise httpcore.ConnectError(error) from error
        return AnyIOStream(stream)


def _give_backend(transport_pool: object, backend: SourceBackend | AsyncSourceBackend) -> None:
    """httpx has no option for httpcore's `network_backend`. Should a version keep it elsewhere, say so and connect
    nothing from the wrong source."""
    if not hasattr(transport_pool, "_network_backend"):
        raise MissingFeature(f"httpx {httpx.__version__} keeps its network backend where it cannot be replaced")
    transport_pool._network_backend = backend


def _refuse_local_address(options: dict[str, Any]) -> None:
    if options.get("local_address") is not None:
        raise TypeError("local_address is the pool's business: give the pool other sources")
