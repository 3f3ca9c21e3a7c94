"""`fourtuple serve`: the broker, from a file to its end.

Decides options, what is shown while it runs, and what signals mean. Knows no connection: `fourtuple.broker` starts and
ends the engine that does.
"""

from __future__ import annotations

import json
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fourtuple.cli import Exit
from fourtuple.cli.load import CarrierOption
from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from fourtuple.engine import Snapshot

STARTS_WITHIN_S = 10.0


def serve(
    config: Annotated[
        Path, typer.Option("--config", "-c", metavar="FILE", help="broker.toml: listeners, services, routes.")
    ],
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Services and routes of this registry, changed while it runs, not the file's."
        ),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a line of JSON for each connection that has ended.")
    ] = None,
    log_every: Annotated[int, typer.Option(metavar="COUNT", help="One line for so many connections.")] = 1,
    most: Annotated[int, typer.Option(metavar="COUNT", help="Connections at once; 0: no bound.")] = 0,
    most_per_source: Annotated[
        int, typer.Option(metavar="COUNT", help="At once from one IPv4 address or IPv6 /64; 0: no bound.")
    ] = 0,
    most_per_service: Annotated[
        int, typer.Option(metavar="COUNT", help="At once to one service, unless it says so itself; 0: no bound.")
    ] = 0,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", help="Wait so long for a service that is absent or full.")
    ] = 5.0,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="On SIGTERM or Ctrl-C, connections may end by themselves for.")
    ] = 10.0,
    workers: Annotated[int | None, typer.Option(metavar="COUNT", help="Threads; default: one per processor.")] = None,
    carrier: Annotated[CarrierOption, typer.Option(help="What moves the bytes.")] = CarrierOption.AUTO,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", help="Print what there is so often; 0: at the end only.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print counters as JSON, one object per line.")] = False,
) -> int:
    """Take connections on one port, see which service each means, and hand it over or relay it.

    A service that is absent or full is waited for, never dropped at once. SIGTERM or Ctrl-C ends it gracefully; a
    second one at once.

    Exit status: 0 ended as asked, 64 wrong usage or file, 69 something is missing (a port that is taken).
    """
    from fourtuple.broker import Limits, end, running
    from fourtuple.brokerfile import BrokerFile
    from fourtuple.engine import CarrierName, Phase

    file = BrokerFile.read(config)
    if not file.listen:
        raise BadConfig(str(config), "has no [[listen]]; at least one is needed")
    if every < 0 or grace < 0:
        raise BadConfig("--every" if every < 0 else "--grace", "is negative; 0 or more is needed")
    console, signals = Console(highlight=False, soft_wrap=True), _Signals()
    limits = Limits(
        most_connections=most,
        most_per_source=most_per_source,
        most_per_service=most_per_service,
        delivery_timeout_s=patience,
    )
    with ExitStack() as stack:
        stack.enter_context(signals)
        engine = stack.enter_context(
            running(
                file,
                store=store,
                limits=limits,
                ledger=log,
                ledger_every=log_every,
                carrier=CarrierName(carrier.value),
                workers=workers,
            )
        )
        started = engine.wait_for(lambda now: now.phase is not Phase.RAMPING or not now.running, STARTS_WITHIN_S)
        if started.stopped_by is not None:
            addresses = ", ".join(table.address for table in file.listen)
            raise BadConfig(str(config), f"cannot listen on {addresses}: {started.stopped_by}")
        if not as_json:
            for table in file.listen:
                console.print(f"listening on {table.address} ({engine.carrier.value}, {engine.workers} workers)")
        shown_s = time.monotonic()
        while not signals.count and not engine.join(0.1):
            if every and time.monotonic() - shown_s >= every:
                shown_s = time.monotonic()
                _show(console, engine.snapshot(), as_json)
        end(engine, grace, lambda: signals.count > 1)
        _show(console, engine.snapshot(), as_json)
    return Exit.HEALTHY


class _Signals:
    """Counts SIGTERM and SIGINT instead of dying of them."""

    def __init__(self) -> None:
        self.count = 0
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def _came(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1

    def __enter__(self) -> None:
        for number in self._before:
            signal.signal(number, self._came)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def _show(console: Console, now: Snapshot, as_json: bool) -> None:
    from fourtuple.broker import reasons

    ended = reasons(now)
    gauges = {
        "accepted": now.accepts_succeeded,
        "sniffing": now.sniffing_now,
        "delivering": now.delivering_now,
        "relaying": now.relaying_now,
    }
    if as_json:
        failures = [{"step": row.step, "errno": row.name, "count": row.count} for row in now.failures]
        print(json.dumps({**gauges, "ended": ended, "retries": now.delivery_retries, "failures": failures}), flush=True)
        return
    text = ", ".join(f"{count:,} {name}" for name, count in gauges.items())
    console.print(text + "; ended: " + (", ".join(f"{name} {count:,}" for name, count in ended.items()) or "none"))
