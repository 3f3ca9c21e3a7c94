"""aiohttp: a connector for `ClientSession(connector=SourceConnector(pool))`.

Decides how aiohttp waits for a tuple. Its own `local_addr` binds before it connects, which uses a port up for every
destination (A7). Kept-alive connections belong to their connector, so that each pool's connections stay its own.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from fourtuple.connect.asyncio import wait_for_lease
from fourtuple.connect.attempts import addresses_of, first_with_room
from fourtuple.connect.sockets import GLANCE_S, SourceSocket, destination_of, family_of
from fourtuple.errors import LimitReached
from fourtuple.sources import Lease, SourcePool
from fourtuple.tuples import Endpoint, Protocol


class SourceConnector(aiohttp.TCPConnector):
    """A TCPConnector whose connections come from the pool's sources; `options` are its own."""

    def __init__(self, pool: SourcePool, **options: Any) -> None:
        for name in ("local_addr", "socket_factory", "family"):
            if name in options:
                raise TypeError(f"{name} is the pool's business: give the pool other sources")
        # One address at a time: a race of several would take a tuple for each, and most of them for nothing.
        options.setdefault("happy_eyeballs_delay", None)
        super().__init__(family=family_of(pool), socket_factory=self._make, **options)
        self._source_pool = pool
        self._waited_for: dict[Endpoint, list[Lease]] = {}

    def _make(self, address_info: Any) -> SourceSocket:
        destination = destination_of(self._source_pool, address_info[4])
        waited_for = self._waited_for.get(destination)
        return SourceSocket(self._source_pool, lease=waited_for.pop() if waited_for else None)

    async def _wrap_create_connection(
        self, *positional: Any, addr_infos: list[Any], **named: Any
    ) -> tuple[asyncio.Transport, ResponseHandler]:
        # The one place where the addresses are known, nothing is connected yet, and there may be waiting: a socket
        # factory is called too late for that, and is no coroutine.
        pool = self._source_pool
        addresses = addresses_of(pool, addr_infos, "the host")
        deadline = time.monotonic() + pool.patience_s
        while True:
            address, lease = first_with_room(pool, addresses, Protocol.TCP)
            destination = destination_of(pool, address)
            lease = lease or await wait_for_lease(pool, destination, deadline)
            leases = self._waited_for.setdefault(destination, [])
            leases.append(lease)  # for the socket that `_make` makes next, whichever task asks for it
            ordered = sorted(addr_infos, key=lambda info: info[4] != address)
            try:
                return await super()._wrap_create_connection(*positional, addr_infos=ordered, **named)
            except LimitReached:  # others have what there was
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(GLANCE_S)
            finally:
                if lease in leases:
                    leases.remove(lease)
                    lease.release()
                if not leases and self._waited_for.get(destination) is leases:
                    self._waited_for.pop(destination, None)
