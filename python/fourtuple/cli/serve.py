"""`fourtuple serve`: the broker, from a file to its end.

Decides options, what is shown while it runs, and what signals mean. Knows no connection: `fourtuple.broker` starts and
ends the engine that does.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fourtuple.cli import Exit, count
from fourtuple.cli.load import CarrierOption
from fourtuple.errors import BadConfig, EngineStopped

if TYPE_CHECKING:
    from fourtuple.brokerfile import BrokerFile
    from fourtuple.demo import Pages
    from fourtuple.engine import Snapshot
    from fourtuple.registry import Sealed
    from fourtuple.tuples import Endpoint

STARTS_WITHIN_S = 10.0
GLANCE_S = 0.25
"""Between two looks at the engine, which takes its processor time; a signal is seen at once."""
DEMO_LISTENS = "127.0.0.1:8080"
_SHOWN_WRONG = 10


def serve(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="broker.toml: listeners, services, routes.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Services and routes of this registry, changed while it runs, not the file's."
        ),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a line of JSON for each connection that has ended.")
    ] = None,
    log_steps: Annotated[
        bool,
        typer.Option(
            "--log-steps", help="A line also when a connection is accepted, has found its service, is delivered."
        ),
    ] = False,
    log_every: Annotated[int, typer.Option(metavar="COUNT", help="One line for so many connections of a worker.")] = 1,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="No file: services of a demonstration, each with a page of its own.")
    ] = False,
    services: Annotated[
        str | None, typer.Option(metavar="COUNT", help="With --demo: how many, up to 1M; default: 100k.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="ADDRESS:PORT", help="With --demo: where; default: 127.0.0.1:8080.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="With --demo: ask every service for its page, compare, and end.")
    ] = False,
) -> int:
    """Take connections on one port, see which service each means, and hand it over or relay it.

    A service that is absent or full is waited for, never dropped at once. SIGTERM or Ctrl-C ends it gracefully; a
    second one at once.

    Exit status: 0 ended as asked, 1 a page of --check was not what it should be, 64 wrong usage or file (or a port that
    is taken), 69 something is missing.
    """
    from fourtuple.broker import Limits, end, running
    from fourtuple.engine import CarrierName, Phase

    for option, given in (("--services", services), ("--listen", listen), ("--check", check or None)):
        if given is not None and not demo:
            raise BadConfig(option, "is for --demo; a broker.toml says these things itself")
    for option, value in (("--every", every), ("--grace", grace)):
        if value < 0:
            raise BadConfig(option, "is negative; 0 or more is needed")
    console, signals = Console(highlight=False, soft_wrap=True), _Signals()
    limits = Limits(
        most_connections=most,
        most_per_source=most_per_source,
        most_per_service=most_per_service,
        delivery_timeout_s=patience,
    )
    with ExitStack() as stack:
        # First of all: until they are counted, a signal ends the process, and what follows leaves nothing behind then.
        stack.enter_context(signals)
        if demo:
            source = stack.enter_context(_demonstration(config, store, services, listen))
        else:
            source = _from_file(config, store)
        engine = stack.enter_context(
            running(
                source.file,
                store=source.store,
                limits=limits,
                ledger=log,
                ledger_every=log_every,
                ledger_steps=log_steps,
                carrier=CarrierName(carrier.value),
                workers=workers,
            )
        )
        started = engine.wait_for(lambda now: now.phase is not Phase.RAMPING or not now.running, STARTS_WITHIN_S)
        if started.stopped_by is not None:
            addresses = ", ".join(table.address for table in source.file.listen)
            raise BadConfig(source.named, f"cannot listen on {addresses}: {started.stopped_by}")
        if not as_json:
            for table in source.file.listen:
                console.print(f"listening on {table.address} ({engine.carrier.value}, {engine.workers} workers)")
            if engine.fallback_reason:
                console.print(f"epoll, because {engine.fallback_reason}")
            for line in source.demonstration.hints if source.demonstration is not None else ():
                console.print(line)
        status = _check(console, source, lambda: signals.count > 0, as_json) if check else Exit.HEALTHY
        shown_s = time.monotonic()
        while not check and not signals.wait(GLANCE_S) and not engine.join(0):
            if source.demonstration is not None and not source.demonstration.pages.running:
                raise EngineStopped("the process with the pages of the demonstration has ended")
            if every and time.monotonic() - shown_s >= every:
                shown_s = time.monotonic()
                _show(console, engine.snapshot(), as_json)
        end(engine, grace, lambda: signals.count > 1)
        _show(console, engine.snapshot(), as_json)
    return status


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where listeners and services come from."""

    named: str
    """What a message calls it."""
    file: BrokerFile
    store: Path | Sealed | None
    demonstration: _Demonstration | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demonstration:
    """Services that are there to be looked at."""

    services: int
    at: Endpoint
    """Where a client on this host reaches them."""
    pages: Pages

    @property
    def hints(self) -> tuple[str, ...]:
        """What to try."""
        from fourtuple.demo import name_of

        first, last, name = (name_of(number, self.services) for number in (0, self.services - 1, self.services // 2))
        url, host = f"http://{name}:{self.at.port}/", str(self.at).rpartition(":")[0]
        return (
            f"{self.services:,} services, {first} to {last}, such as",
            f"  curl --resolve {name}:{self.at.port}:{host} {url}",
            f"  curl -H 'Host: {name}' http://{self.at}/",
        )


def _from_file(config: Path | None, store: Path | None) -> _Source:
    from fourtuple.brokerfile import BrokerFile

    if config is None:
        raise BadConfig("--config", "is missing; a broker.toml is needed, or --demo")
    file = BrokerFile.read(config)
    if not file.listen:
        raise BadConfig(str(config), "has no [[listen]]; at least one is needed")
    return _Source(named=str(config), file=file, store=store)


@contextmanager
def _demonstration(
    config: Path | None, store: Path | None, services: str | None, listen: str | None
) -> Iterator[_Source]:
    from fourtuple import demo
    from fourtuple.brokerfile import BrokerFile, ListenTable
    from fourtuple.tuples import Endpoint

    for option, given in (("--config", config), ("--store", store)):
        if given is not None:
            raise BadConfig(option, "does not go with --demo, which has services of its own")
    try:
        number = demo.SERVICES if services is None else count(services)
    except ValueError as error:
        raise BadConfig("--services", str(error)) from None
    if number > demo.MOST_SERVICES:
        raise BadConfig("--services", f"is {number:,}; {demo.MOST_SERVICES:,} is the most")
    try:
        endpoint = Endpoint.parse(listen or DEMO_LISTENS)
    except BadConfig as error:
        raise BadConfig("--listen", error.why) from None
    near = endpoint
    if endpoint.address.is_unspecified:
        near = Endpoint(ip_address("::1" if endpoint.address.version == 6 else "127.0.0.1"), endpoint.port)
    file = BrokerFile(listen=(ListenTable(address=str(endpoint), protocols=("http1",)),))
    with demo.serving(number) as pages:
        made = _Demonstration(services=number, at=near, pages=pages)
        yield _Source(named="--listen", file=file, store=demo.registry(number, pages.path), demonstration=made)


def _check(console: Console, source: _Source, stopped: Callable[[], bool], as_json: bool) -> Exit:
    """Ask every service for its page."""
    from fourtuple.demo import check

    assert source.demonstration is not None
    services, pages = source.demonstration.services, source.demonstration.pages
    checked = check(source.demonstration.at, services, lambda: stopped() or not pages.running)
    asked = checked.right + len(checked.wrong)
    rate_per_s = asked / checked.took_s
    if as_json:
        row = {"services": services, "right": checked.right, "wrong": len(checked.wrong), "took_s": checked.took_s}
        print(json.dumps(row), flush=True)
    else:
        console.print(
            f"{services:,} services, {asked:,} asked one by one, {checked.right:,} pages right, "
            f"{len(checked.wrong):,} wrong: {checked.took_s:.1f} s, {rate_per_s:,.0f} connections/s"
        )
        for line in checked.wrong[:_SHOWN_WRONG]:
            console.print(line, markup=False)
    return Exit.HEALTHY if checked.right == services else Exit.WARNING


class _Signals:
    """Counts SIGTERM and SIGINT instead of dying of them."""

    def __init__(self) -> None:
        self.count = 0
        # An event would not do: a handler that sets it may interrupt whoever holds its lock.
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def _came(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        with suppress(BlockingIOError):
            self._told.send(b"!")

    def wait(self, seconds: float) -> bool:
        """Until one has come, or so long; says whether one has."""
        select.select([self._heard], [], [], 0 if self.count else seconds)
        return self.count > 0

    def __enter__(self) -> None:
        for number in self._before:
            signal.signal(number, self._came)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._heard.close()
        self._told.close()


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
        rest = {"ended": ended, "retries": now.delivery_retries, "failures": failures}
        print(json.dumps({"seconds": round(now.taken_s, 3), **gauges, **rest}), flush=True)
        return
    text = ", ".join(f"{count:,} {name}" for name, count in gauges.items())
    console.print(text + "; ended: " + (", ".join(f"{name} {count:,}" for name, count in ended.items()) or "none"))
