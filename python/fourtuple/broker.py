"""A broker: a file or a registry in, a running engine out.

Decides where services come from, and what a listener of the file means to the engine. Knows
no connection: which service one means, the registry says; how it gets there, the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from fourtuple.brokerfile import BrokerFile, ListenTable
from fourtuple.engine import (
    PROTOCOLS,
    BrokerConfig,
    BrokerListener,
    CarrierName,
    CarrierSettings,
    Engine,
    PostgresTls,
    Snapshot,
    raise_soft_descriptors,
)
from fourtuple.errors import BadConfig
from fourtuple.metrics import COUNTERS
from fourtuple.registry import Sealed, sealed

BUFFER_BYTES = 32_768
"""Bulk moves in pieces of this size; an idle connection has none."""
BUFFER_CHUNKS = 2_048
"""Made as needed. A service that reads nothing keeps a buffer or two per connection, and must not starve others."""


class Limits(Struct, frozen=True, kw_only=True):
    """What a broker may hold, and how long it waits; 0 is no bound."""

    most_connections: int = 0
    most_per_source: int = 0
    most_per_service: int = 0
    delivery_timeout_s: float = 5.0


@contextmanager
def running(
    file: BrokerFile,
    *,
    store: Path | Sealed | None = None,
    limits: Limits | None = None,
    ledger: Path | None = None,
    ledger_every: int = 1,
    ledger_steps: bool = False,
    carrier: CarrierName = CarrierName.AUTO,
    workers: int | None = None,
    descriptors: Sequence[Sequence[int]] = (),
    inetd: Path | None = None,
) -> Iterator[Engine]:
    """A broker for the listeners of `file`, with the services of `store`, or else those of the file itself.

    `descriptors` are sockets for the listeners, for each one per worker: bound, perhaps listening already. `inetd` is
    where sockets go of services with a process for each connection.
    """
    chosen = limits or Limits()
    if isinstance(store, Path) and (file.services or file.routes):
        raise BadConfig("--store", "is given, and the file has services of its own; import them into one of both")
    config = BrokerConfig(
        listeners=tuple(
            _listener(file, table, of_it)
            for table, of_it in zip(file.listen, descriptors or ((),) * len(file.listen), strict=True)
        ),
        store=store or sealed(file.services, file.routes),
        most_connections=chosen.most_connections,
        most_per_source=chosen.most_per_source,
        most_per_service=chosen.most_per_service,
        delivery_timeout_s=chosen.delivery_timeout_s,
        most_parked=file.asleep.most_parked,
        most_parked_per_service=file.asleep.most_parked_per_service,
        parked_bytes=file.asleep.parked_bytes,
        settle_s=file.asleep.settle_ms / 1000,
        manners=file.asleep.manners(),
        ledger=ledger,
        ledger_every=ledger_every,
        ledger_steps=ledger_steps,
        inetd_path=inetd,
    )
    settings = CarrierSettings(buffer_bytes=BUFFER_BYTES, buffer_chunks=BUFFER_CHUNKS)
    raise_soft_descriptors()
    with Engine.start(config, carrier, workers, settings) as engine:
        yield engine


def summary(snapshot: Snapshot) -> dict[str, Any]:
    """What there is, how connections have ended, and every number by its name."""
    return {
        "accepted": snapshot.accepts_succeeded,
        "sniffing": snapshot.sniffing_now,
        "delivering": snapshot.delivering_now,
        "relaying": snapshot.relaying_now,
        "ended": reasons(snapshot),
        "retries": snapshot.delivery_retries,
        "failures": [{"step": row.step, "errno": row.name, "count": row.count} for row in snapshot.failures],
        "counters": {row.name: getattr(snapshot, row.name) for row in COUNTERS},
    }


def reasons(snapshot: Snapshot) -> dict[str, int]:
    """How connections have ended, by reason; those that were none are left out."""
    names = [row.name for row in COUNTERS if row.name.startswith("ended_")]
    return {name.removeprefix("ended_"): count for name in names if (count := getattr(snapshot, name))}


def _listener(file: BrokerFile, table: ListenTable, fds: Sequence[int]) -> BrokerListener:
    return BrokerListener(
        endpoint=table.endpoint,
        fds=tuple(fds),
        sniff_timeout_s=table.sniff_s,
        default=table.default,
        proxy_from=table.proxy_from,
        proxy_optional=table.proxy_optional,
        postgres_tls=PostgresTls(table.postgres_tls),
        answers_socks=table.socks == "answered",
        protocols=PROTOCOLS if table.probes is None else table.probes,
        patterns=tuple(one.pattern() for one in file.pattern if table.wants(one)),
        door=table.opened,
        consults=bool(file.plugin) and table.door is None,
    )
