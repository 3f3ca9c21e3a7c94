"""urllib3 and requests: a pool manager, and an adapter for `session.mount("https://", SourceAdapter(pool))`.

Decides how urllib3 gets its connections. Its `source_address` binds before it connects, which uses a port up for every
destination (A7). Kept-alive connections belong to their manager, so that each pool's connections stay its own.
"""

from __future__ import annotations

import socket
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from fourtuple.connect.blocking import create_connection
from fourtuple.sources import SourcePool


class SourcePoolManager(urllib3.PoolManager):
    """A PoolManager whose connections come from the pool's sources; `options` are its own."""

    def __init__(self, pool: SourcePool, **options: Any) -> None:
        if options.get("source_address") is not None:
            raise TypeError("source_address is the pool's business: give the pool other sources")
        super().__init__(**options)
        self.pool_classes_by_scheme = pool_classes(pool)


def pool_classes(pool: SourcePool) -> dict[str, type[HTTPConnectionPool]]:
    """The classes of connection pools by scheme, for `PoolManager.pool_classes_by_scheme`.

    Classes and not arguments, because a manager's pools are looked up by their arguments, which it checks by name.
    """

    class PlainConnection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return _connected(pool, self)

    class SecureConnection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return _connected(pool, self)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = PlainConnection

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    return {"http": PlainPool, "https": SecurePool}


def _connected(pool: SourcePool, asking: HTTPConnection) -> socket.socket:
    """What HTTPConnection._new_conn does, with its errors, from the pool's sources."""
    timeout_s = asking.timeout if isinstance(asking.timeout, int | float) else socket.getdefaulttimeout()
    address = (asking._dns_host, asking.port)
    try:
        return create_connection(pool, address, timeout_s, socket_options=asking.socket_options or ())
    except socket.gaierror as error:
        raise NameResolutionError(asking.host, asking, error) from error
    except TimeoutError as error:
        raise ConnectTimeoutError(asking, f"connecting to {asking.host} took longer than {timeout_s} s") from error
    except OSError as error:
        raise NewConnectionError(asking, f"no connection to {asking.host}: {error}") from error
