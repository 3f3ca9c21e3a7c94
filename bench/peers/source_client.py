"""Fill source ports towards several destinations with one client library, and hold them.

source_client CLIENT ours|INDEX/OF|naive SOURCE FIRST-LAST COUNT HOST:PORT... opens COUNT connections to each
destination, one destination after the other; INDEX/OF is ours from that share of the ports. A step ends when all are
tried, another when all are closed.
"""

from __future__ import annotations

import errno
import sys
import time
from collections import Counter
from functools import partial
from typing import Any

from bench.peers.source_clients import CLIENTS, Client, maybe, run
from bench.peers.steps import Step
from fourtuple.connect.sockets import destination_of
from fourtuple.errors import LimitReached
from fourtuple.sources import SourcePool


def main(name: str, how: str, source: str, ports: str, count: int, destinations: list[tuple[str, int]]) -> None:
    """Run one of the clients in the event loop it needs."""
    pool = None if how == "naive" else SourcePool(source, ports, patience_s=2.0)
    if pool is not None and how != "ours":
        index, _, of = how.partition("/")
        pool = pool.share(int(index), of=int(of))
    run(name, partial(_fill, CLIENTS[name], pool or source, count, destinations))


async def _fill(kind: type[Client], source: Any, count: int, destinations: list[tuple[str, int]]) -> None:  # noqa: ANN401
    client: Any = kind(source)
    step = Step()
    step.done()
    names: set[Any] = set()
    reached: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for host, port in destinations:
        for _ in range(count):
            try:
                name = await maybe(client.open(host, port))
            except Exception as error:
                errors[_why(error)] += 1
                break  # nothing is left, or never was: the next connection to this destination would say the same
            names.add(name)
            reached[f"{host}:{port}"] += 1
    pool = source if isinstance(source, SourcePool) else None
    step.done(
        connected=len(names),
        reached=[reached[f"{host}:{port}"] for host, port in destinations],
        errors=errors,
        one_more=_one_more(pool, destinations[0]) if pool else "",
    )
    await maybe(client.close())
    still_held = (
        sum(pool.usage(destination_of(pool, one), time.monotonic()).held for one in destinations) if pool else 0
    )
    step.done(still_held=still_held)


def _one_more(pool: SourcePool, destination: tuple[str, int]) -> str:
    """What a pool says when it is asked for more than there is."""
    now = time.monotonic()
    lease = pool.take(destination_of(pool, destination), now)
    return "" if lease is not None else str(pool.exhausted(destination_of(pool, destination), now))


def _why(error: BaseException) -> str:
    """The errno's name at the bottom of a library's exception."""
    if isinstance(error, LimitReached):
        return "LimitReached"
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None and seen.errno in errno.errorcode:
            return errno.errorcode[seen.errno]
        for inner in getattr(seen, "exceptions", ()):
            return _why(inner)
        reason = getattr(seen, "reason", None)
        seen = seen.__cause__ or seen.__context__ or (reason if isinstance(reason, BaseException) else None)
    for number in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
        if f"[Errno {number}]" in str(error):  # asyncio joins several errors to one text
            return errno.errorcode[number]
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    _, _name, _how, _source, _ports, _count, *_destinations = sys.argv
    _pairs = [(one.rpartition(":")[0], int(one.rpartition(":")[2])) for one in _destinations]
    main(_name, _how, _source, _ports, int(_count), _pairs)
