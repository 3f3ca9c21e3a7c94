"""`fourtuple serve`: its options, as a person reads them.

Decides their names, what they mean and what they are if not given; what is done with them is in `serving`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fourtuple.cli import serving
from fourtuple.cli.load import CarrierOption
from fourtuple.cli.serving import Options

_USUAL = Options()
_USUAL_CARRIER = CarrierOption(_USUAL.carrier)


def serve(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="broker.toml: listeners, services, routes.")
    ] = _USUAL.config,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Services and routes of this registry, changed while it runs, not the file's."
        ),
    ] = _USUAL.store,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a line of JSON for each connection that has ended.")
    ] = _USUAL.log,
    log_steps: Annotated[
        bool,
        typer.Option(
            "--log-steps", help="A line also when a connection is accepted, has found its service, is delivered."
        ),
    ] = _USUAL.log_steps,
    log_every: Annotated[
        int, typer.Option(metavar="COUNT", help="One line for so many connections of a worker.")
    ] = _USUAL.log_every,
    most: Annotated[int, typer.Option(metavar="COUNT", help="Connections at once; 0: no bound.")] = _USUAL.most,
    most_per_source: Annotated[
        int, typer.Option(metavar="COUNT", help="At once from one IPv4 address or IPv6 /64; 0: no bound.")
    ] = _USUAL.most_per_source,
    most_per_service: Annotated[
        int, typer.Option(metavar="COUNT", help="At once to one service, unless it says so itself; 0: no bound.")
    ] = _USUAL.most_per_service,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", help="Wait so long for a service that is absent or full.")
    ] = _USUAL.patience,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="On SIGTERM or Ctrl-C, connections may end by themselves for.")
    ] = _USUAL.grace,
    events: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a line of JSON for each thing that happens to services.")
    ] = _USUAL.events,
    workers: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Threads; default: one per processor.")
    ] = _USUAL.workers,
    carrier: Annotated[CarrierOption, typer.Option(help="What moves the bytes.")] = _USUAL_CARRIER,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", help="Print what there is so often; 0: at the end only.")
    ] = _USUAL.every,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = _USUAL.json,
    demo: Annotated[
        bool, typer.Option("--demo", help="No file: services of a demonstration, each with a page of its own.")
    ] = _USUAL.demo,
    services: Annotated[
        str | None, typer.Option(metavar="COUNT", help="With --demo: how many, up to 1M; default: 100k.")
    ] = _USUAL.services,
    listen: Annotated[
        str | None, typer.Option(metavar="ADDRESS:PORT", help="With --demo: where; default: 127.0.0.1:8080.")
    ] = _USUAL.listen,
    check: Annotated[
        bool, typer.Option("--check", help="With --demo: ask every service for its page, compare, and end.")
    ] = _USUAL.check,
    explain: Annotated[
        bool, typer.Option("--explain", help="Start nothing; print what the broker would be confined to here.")
    ] = _USUAL.explain,
) -> int:
    """Take connections on one port, see which service each means, and hand it over or relay it.

    A service that is absent or full is waited for, never dropped at once. SIGTERM or Ctrl-C ends it gracefully; a
    second one at once. SIGHUP has it read the file again, and open its logs anew.

    Exit status: 0 ended as asked, 1 a page of --check was not what it should be (or --explain found something missing),
    64 wrong usage or file (or a port that is taken), 69 something is missing.
    """
    return serving.serve(
        Options(
            config=config,
            store=store,
            log=log,
            log_steps=log_steps,
            log_every=log_every,
            most=most,
            most_per_source=most_per_source,
            most_per_service=most_per_service,
            patience=patience,
            grace=grace,
            events=events,
            workers=workers,
            carrier=carrier.value,
            every=every,
            json=json,
            demo=demo,
            services=services,
            listen=listen,
            check=check,
            explain=explain,
        )
    )
