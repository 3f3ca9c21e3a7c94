"""`fourtuple serve`: the broker, from a file to its end.

Decides options, what is shown while it runs, and what signals mean. Knows no connection: `fourtuple.broker` starts and
ends the engine that does.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourtuple.cli import Exit, count
from fourtuple.cli.load import CarrierOption
from fourtuple.errors import BadConfig
from fourtuple.services import whole_or_none

if TYPE_CHECKING:
    from fourtuple.brokerfile import BrokerFile
    from fourtuple.demo import Pages
    from fourtuple.supervisor import Demonstration, Spec, Supervisor
    from fourtuple.supervisor.life import Shown
    from fourtuple.tuples import Endpoint

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
    events: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a line of JSON for each thing that happens to services.")
    ] = None,
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
    explain: Annotated[
        bool, typer.Option("--explain", help="Start nothing; print what the broker would be confined to here.")
    ] = False,
) -> int:
    """Take connections on one port, see which service each means, and hand it over or relay it.

    A service that is absent or full is waited for, never dropped at once. SIGTERM or Ctrl-C ends it gracefully; a
    second one at once.

    Exit status: 0 ended as asked, 1 a page of --check was not what it should be (or --explain found something missing),
    64 wrong usage or file (or a port that is taken), 69 something is missing.
    """
    from fourtuple.broker import Limits
    from fourtuple.supervisor import Spec
    from fourtuple.supervisor.life import Shown

    for option, given in (("--services", services), ("--listen", listen), ("--check", check or None)):
        if given is not None and not demo:
            raise BadConfig(option, "is for --demo; a broker.toml says these things itself")
    for option, value in (("--every", every), ("--grace", grace)):
        if value < 0:
            raise BadConfig(option, "is negative; 0 or more is needed")
    whole_or_none("--workers", workers, 1, 1_024)
    if explain:
        from fourtuple.cli.explain import explain as explained

        if demo:
            raise BadConfig("--explain", "needs a broker.toml, and no --demo")
        file = _from_file(config, store).file
        return explained(file, store=store, log=log, uring=carrier is not CarrierOption.EPOLL, as_json=as_json)
    limits = Limits(
        most_connections=most,
        most_per_source=most_per_source,
        most_per_service=most_per_service,
        delivery_timeout_s=patience,
    )
    with ExitStack() as stack:
        if demo:
            source = stack.enter_context(_demonstration(config, store, services, listen))
        else:
            source = _from_file(config, store)
        spec = Spec(
            named=source.named,
            text=source.text,
            store=None if store is None else str(store.absolute()),
            demonstration=None if source.demonstration is None else source.demonstration.spec,
            limits=limits,
            ledger=None if log is None else str(log.absolute()),
            ledger_every=log_every,
            ledger_steps=log_steps,
            carrier=carrier.value,
            workers=workers or len(os.sched_getaffinity(0)),
            grace_s=grace,
            soft_descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        )
        if source.file.template:
            from fourtuple.supervisor.surroundings import inetd_path

            spec = replace(spec, inetd=str(inetd_path(spec)))
        return asyncio.run(_serve(spec, source, Shown(as_json=as_json, every_s=every), check, events))


async def _serve(spec: Spec, source: _Source, shown: Shown, check: bool, events: Path | None) -> int:
    from fourtuple import systemd
    from fourtuple.control import door
    from fourtuple.control.verbs import unsaid
    from fourtuple.engine import raise_soft_descriptors
    from fourtuple.eventlog import EventLog
    from fourtuple.supervisor import Listeners, Settings, Supervisor
    from fourtuple.supervisor.life import obey_signals
    from fourtuple.supervisor.surroundings import Surroundings, surrounded

    raise_soft_descriptors()
    file = source.file
    endpoints = [table.endpoint for table in file.listen]
    passed = [socket.socket(fileno=given.fd) for given in systemd.listen_fds()]
    settings = Settings.of(file)
    log = None if events is None else EventLog(events)
    say = unsaid if log is None else log.say
    around = Surroundings(
        events=log, events_path=None if events is None else str(events.absolute()), shown=asdict(shown)
    )
    with log or nullcontext():
        listeners = Listeners.bound(endpoints, spec.workers, passed)
        if (control := file.control) is not None:
            door.require_server()
            around.control_path = control.path
            around.control = door.listen(control.path, mode=control.permissions, group=control.group_id)
        supervisor = Supervisor(spec, settings, listeners, say)
        around.begun_s = time.monotonic()
        if source.demonstration is None:
            supervisor.around = around
        # First of all: once it listens, somebody may tell it to end.
        obey_signals(supervisor)
        async with surrounded(supervisor, file, around, say):
            ready = await supervisor.begin()
            systemd.notify(ready=True)
            _announce(ready, endpoints, source, shown)
            return await _lived(supervisor, source, shown, check)


def _announce(ready: dict[str, Any], endpoints: list[Endpoint], source: _Source, shown: Shown) -> None:
    if not shown.as_json:
        for endpoint in endpoints:
            print(f"listening on {endpoint} ({ready['carrier']}, {ready['workers']} workers)")
        if ready["fallback"]:
            print(f"epoll, because {ready['fallback']}")
        for line in source.demonstration.hints if source.demonstration is not None else ():
            print(line)
        sys.stdout.flush()


async def _lived(supervisor: Supervisor, source: _Source, shown: Shown, check: bool) -> int:
    from fourtuple.supervisor.life import live

    status, pages = Exit.HEALTHY, None if source.demonstration is None else source.demonstration.pages

    async def checking() -> None:
        nonlocal status
        status = await asyncio.to_thread(_check, source, lambda: supervisor.is_ending, shown.as_json)

    def pages_are_gone() -> str:
        # A check says itself what was not answered.
        is_gone = pages is not None and not pages.running and not check
        return "the process with the pages of the demonstration has ended" if is_gone else ""

    await live(supervisor, shown, beside=checking if check else None, is_needed=pages_are_gone)
    return status


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where listeners and services come from."""

    named: str
    """What a message calls it."""
    text: str
    file: BrokerFile
    demonstration: _Demonstration | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demonstration:
    """Services that are there to be looked at."""

    services: int
    at: Endpoint
    """Where a client on this host reaches them."""
    pages: Pages

    @property
    def spec(self) -> Demonstration:
        """As a broker process has to know it."""
        from fourtuple.supervisor import Demonstration

        return Demonstration(services=self.services, pages=str(self.pages.path))

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
    data = BrokerFile.bytes_of(config)
    file = BrokerFile.parse(data, str(config))
    if not file.listen:
        raise BadConfig(str(config), "has no [[listen]]; at least one is needed")
    if store is not None and (file.services or file.routes):
        raise BadConfig("--store", "is given, and the file has services of its own; import them into one of both")
    return _Source(named=str(config), text=data.decode(), file=file)


@contextmanager
def _demonstration(
    config: Path | None, store: Path | None, services: str | None, listen: str | None
) -> Iterator[_Source]:
    from fourtuple import demo
    from fourtuple.brokerfile import BrokerFile
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
    text = f'[[listen]]\naddress = "{endpoint}"\nprotocols = ["http1"]\n'
    with demo.serving(number) as pages:
        made = _Demonstration(services=number, at=near, pages=pages)
        yield _Source(named="--listen", text=text, file=BrokerFile.parse(text.encode(), "--listen"), demonstration=made)


def _check(source: _Source, stopped: Callable[[], bool], as_json: bool) -> Exit:
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
        print(
            f"{services:,} services, {asked:,} asked one by one, {checked.right:,} pages right, "
            f"{len(checked.wrong):,} wrong: {checked.took_s:.1f} s, {rate_per_s:,.0f} connections/s"
        )
        for line in checked.wrong[:_SHOWN_WRONG]:
            print(line)
    return Exit.HEALTHY if checked.right == services else Exit.WARNING
