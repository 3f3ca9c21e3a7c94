"""What a connection costs one client library as the ports towards one destination fill up, a hundredth at a time.

source_curve CLIENT ours|plain whole|mixed INDEX/OF SOURCE FIRST-LAST HOST:PORT HOST:PORT fills share INDEX of OF of the
ports towards the first destination, a hundredth in each step. In `CLOSE_LOOK` the library opens each connection, and
beside it another one to the second destination, where next to nothing is in use: what the machine and the size of the
process do to a connection, they do to both. In the other steps, if mixed, it opens some, and plain sockets of the same
pool the rest. plain is the library without a source: the pool's sockets fill, and the library's are closed at once, as
each costs milliseconds in the end.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from functools import partial
from typing import Any

from bench.peers.source_clients import CLIENTS, Client, maybe, run
from bench.peers.steps import Step
from fourtuple.connect import blocking
from fourtuple.sources import SourcePool

CLOSE_LOOK = (1, 50, 90, 99)
"""By how many hundredths were used before."""
_SPARSE = 10
"""One of so many in the other steps is the library's, if mixed; and of those a tenth, if plain."""
_WARM_UP = 20

Target = tuple[str, int]


async def _fill(kind: type[Client], pool: SourcePool, how: str, whole: bool, to: list[Target]) -> None:
    client: Any = kind(pool if how == "ours" else "")
    filling: list[Any] = []
    target, beside = to
    step = Step()
    for _ in range(_WARM_UP):
        await maybe(client.open(*beside))
    step.done()
    count = pool.ports.size
    for hundredth in range(100):
        costs_ns: list[int] = []
        beside_ns: list[int] = []
        close_look = hundredth in CLOSE_LOOK
        every = 1 if whole or close_look else _SPARSE
        for number in range(count * (hundredth + 1) // 100 - count * hundredth // 100):
            looked_at = number % (every if how == "ours" else every * _SPARSE) == 0
            if looked_at:
                costs_ns.append(await _cost_ns(client, target))
            if not looked_at or how == "plain":
                if how == "plain" and looked_at:
                    await _take_back(client)
                filling.append(blocking.create_connection(pool, target))
            if close_look and looked_at:
                beside_ns.append(await _cost_ns(client, beside))
        step.done(costs_ns=costs_ns, beside_ns=beside_ns)


async def _take_back(client: Any) -> None:  # noqa: ANN401
    """Close what the client holds with a reset, so that not even TIME_WAIT is left of it."""
    for one in client.held:
        connected = one if isinstance(one, socket.socket) else one.get_extra_info("socket")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    await maybe(client.close())


async def _cost_ns(client: Any, target: Target) -> int:  # noqa: ANN401
    started_ns = time.process_time_ns()
    await maybe(client.open(*target))
    return time.process_time_ns() - started_ns


if __name__ == "__main__":
    _, _name, _how, _fills, _share, _source, _ports, *_to = sys.argv
    _index, _, _of = _share.partition("/")
    _pool = SourcePool(_source, _ports).share(int(_index), of=int(_of))
    _pairs = [(one.rpartition(":")[0], int(one.rpartition(":")[2])) for one in _to]
    run(_name, partial(_fill, CLIENTS[_name], _pool, _how, _fills == "whole", _pairs))
