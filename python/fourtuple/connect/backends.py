"""What the network backends of httpcore and of its successor httpcore2 have in common: how they get a connection.

Decides the order of options and connect(), and which error becomes which of the library's. Both libraries bind a
`local_address` before they connect, which uses a port up for every destination (A7), and set `socket_options` after
connect(), too late to help.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from anyio.abc import SocketStream

from fourtuple.connect.anyio import open_stream
from fourtuple.connect.blocking import create_connection
from fourtuple.connect.sockets import SourceSocket
from fourtuple.errors import MissingFeature
from fourtuple.sources import SourcePool

_NODELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
Options = Iterable[Any] | None


def connected_socket(pool: SourcePool, host: str, port: int, timeout_s: float | None, options: Options) -> SourceSocket:
    """A connected socket for a blocking client."""
    return create_connection(pool, (host, port), timeout_s, socket_options=[_NODELAY, *(options or ())])


async def connected_stream(
    pool: SourcePool, host: str, port: int, timeout_s: float | None, options: Options
) -> SocketStream:
    """A stream of anyio for an asynchronous client, on asyncio or trio."""
    with anyio.fail_after(timeout_s):
        return await open_stream(pool, host, port, [_NODELAY, *(options or ())])


@contextmanager
def errors_as(timeout: type[Exception], failed: type[Exception]) -> Iterator[None]:
    """Raise the library's errors in place of the system's."""
    try:
        yield
    except TimeoutError as error:
        raise timeout(error) from error
    except OSError as error:
        raise failed(error) from error


def give_backend(transport_pool: object, backend: object, library: str) -> None:
    """The transports have no option for `network_backend`. Should a version keep it elsewhere, say so and connect
    nothing from the wrong source."""
    if not hasattr(transport_pool, "_network_backend"):
        raise MissingFeature(f"{library} keeps its network backend where it cannot be replaced")
    transport_pool._network_backend = backend


def refuse_local_address(options: dict[str, Any]) -> None:
    """Two choices of one name cannot both be kept."""
    if options.get("local_address") is not None:
        raise TypeError("local_address is the pool's business: give the pool other sources")
