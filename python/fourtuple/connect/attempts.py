"""The order of attempts where a name has several addresses: one with room first, then the others.

Decides that, and what is raised when all fail. Knows no event loop: waiting and connecting are given by the caller, so
that the asynchronous libraries share one loop.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from fourtuple.connect.sockets import GLANCE_S, SourceSocket, destination_of, family_of
from fourtuple.errors import LimitReached
from fourtuple.sources import Lease, SourcePool
from fourtuple.tuples import Endpoint, Protocol

SocketAddress = tuple[Any, ...]
KINDS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}


def addresses_of(pool: SourcePool, found: Iterable[tuple[Any, ...]], host: str) -> list[SocketAddress]:
    """The addresses of the pool's family out of what getaddrinfo() found, each once; OSError if there is none."""
    family = family_of(pool)
    addresses = list(dict.fromkeys(entry[4] for entry in found if entry[0] == family))
    if not addresses:
        raise OSError(f"{host} has no IPv{pool.sources.version} address, and the pool has no other sources")
    return addresses


def first_with_room(
    pool: SourcePool, addresses: Sequence[SocketAddress], protocol: Protocol
) -> tuple[SocketAddress, Lease | None]:
    """The first address towards which a tuple is left, with that tuple; else the first address and None."""
    now = time.monotonic()
    for address in addresses:
        lease = pool.take(destination_of(pool, address), now, protocol=protocol)
        if lease is not None:
            return address, lease
    return addresses[0], None


async def connect_any(
    pool: SourcePool,
    addresses: Sequence[SocketAddress],
    protocol: Protocol,
    wait: Callable[[Endpoint, float], Awaitable[Lease]],
    dial: Callable[[SourceSocket, SocketAddress], Awaitable[None]],
    sleep: Callable[[float], Awaitable[None]],
) -> SourceSocket:
    """Connect to one of the addresses, waiting only when there is room towards none; the first error if all fail."""
    deadline = time.monotonic() + pool.patience_s
    remaining = list(addresses)
    errors: list[OSError] = []
    while remaining:
        address, lease = first_with_room(pool, remaining, protocol)
        if lease is None:
            lease = await wait(destination_of(pool, address), deadline)
        attempt = SourceSocket(pool, KINDS[protocol], lease)
        attempt.setblocking(False)
        del lease  # the socket has it: nothing here keeps it from being given back
        try:
            await dial(attempt, address)
        except OSError as error:
            attempt.close()
            errors.append(error)
            remaining.remove(address)
        except LimitReached:  # others have what there was
            attempt.close()
            if time.monotonic() >= deadline:
                raise
            await sleep(GLANCE_S)
        except BaseException:
            attempt.close()
            raise
        else:
            return attempt
    raise errors[0]
