"""Plain sockets, as `socket.create_connection` makes them, and UDP flows.

Decides nothing but the order of things; see `fourtuple.connect.sockets`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from typing import Any

from fourtuple.connect.attempts import KINDS, addresses_of, first_with_room
from fourtuple.connect.sockets import SourceSocket, destination_of, family_of, wait_for_lease
from fourtuple.sources import SourcePool
from fourtuple.tuples import Protocol


def create_connection(
    pool: SourcePool,
    address: tuple[str, int],
    timeout_s: float | None = None,
    *,
    socket_options: Iterable[tuple[Any, ...]] = (),
    protocol: Protocol = Protocol.TCP,
) -> SourceSocket:
    """A connected socket, to the first of the host's addresses that has room and answers.

    `timeout_s` is for waiting and connecting together, and stays the socket's timeout; None waits for a tuple as long
    as the pool's `patience_s`, else LimitReached. `socket_options` are set before it connects.
    """
    host, port = address
    started = time.monotonic()
    patience_s = pool.patience_s if timeout_s is None else min(timeout_s, pool.patience_s)
    found = socket.getaddrinfo(host, port, family_of(pool), KINDS[protocol])
    remaining = addresses_of(pool, found, host)
    errors: list[OSError] = []
    while remaining:
        chosen, lease = first_with_room(pool, remaining, protocol)
        if lease is None:
            lease = wait_for_lease(pool, destination_of(pool, chosen), started + patience_s, protocol=protocol)
        attempt = SourceSocket(pool, KINDS[protocol], lease)
        del lease
        try:
            for option in socket_options:
                attempt.setsockopt(*option)
            if timeout_s is not None:
                attempt.settimeout(max(0.001, started + timeout_s - time.monotonic()))
            attempt.connect(chosen)
            attempt.settimeout(timeout_s)
        except OSError as error:
            attempt.close()
            errors.append(error)
            remaining.remove(chosen)
        except BaseException:
            attempt.close()
            raise
        else:
            return attempt
    raise errors[0]
