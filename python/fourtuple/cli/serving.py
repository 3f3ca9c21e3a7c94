"""What `fourtuple serve` does with its options: the broker, from a file to its end.

Decides what is shown while it runs, and reads a plain command line by itself: what starts a broker at night has no need
of the library that explains options, which takes longer to load than the broker to serve. Knows no connection.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fourtuple.cli import Exit, count
from fourtuple.errors import BadConfig
from fourtuple.reaching import Reaching

if TYPE_CHECKING:
    from fourtuple.brokerfile import BrokerFile
    from fourtuple.demo import Pages
    from fourtuple.supervisor.beginning import Begun
    from fourtuple.supervisor.life import Shown
    from fourtuple.supervisor.listeners import Listeners
    from fourtuple.supervisor.spec import Demonstration, Spec
    from fourtuple.supervisor.supervisor import Supervisor
    from fourtuple.tuples import Endpoint

CARRIERS = ("auto", "uring", "epoll")
"""As they are typed."""
DEMO_LISTENS = "127.0.0.1:8080"
_SHOWN_WRONG = 10
_SHAPES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "int": (r"[0-9]{1,18}", int),
    "float": (r"[0-9]{1,15}(\.[0-9]{1,15})?", float),
    "str": (r"[^-].*", str),
    "Path": (r"[^-].*", Path),
}


class Options(NamedTuple):
    """Of `fourtuple serve`, whose help says what they are."""

    config: Path | None = None
    store: Path | None = None
    log: Path | None = None
    log_steps: bool = False
    log_every: int = 1
    most: int = 0
    most_per_source: int = 0
    most_per_service: int = 0
    patience: float = 5.0
    grace: float = 10.0
    events: Path | None = None
    workers: int | None = None
    carrier: str = CARRIERS[0]
    every: float = 0.0
    json: bool = False
    demo: bool = False
    services: str | None = None
    listen: str | None = None
    check: bool = False
    explain: bool = False

    @classmethod
    def plain(cls, words: Sequence[str]) -> Options | None:
        """Those of a command line that says nothing but options of these names and values of their shape, each value a
        word of its own. None if there is anything else, which somebody else has to understand, or to explain."""
        # Texts that typing keeps as ForwardRef.
        kinds = {
            f"--{name.replace('_', '-')}": (name, kind.__forward_arg__) for name, kind in cls.__annotations__.items()
        }
        given: dict[str, Any] = {}
        rest = iter(words)
        for word in rest:
            name, kind = kinds.get("--config" if word == "-c" else word, ("", ""))
            if not name:
                return None
            if kind == "bool":
                given[name] = True
                continue
            # As it is written above: `Path | None`.
            kind = kind.removesuffix(" | None")
            shape, read = _SHAPES[kind]
            value = next(rest, "")
            if re.fullmatch(shape, value) is None:
                return None
            given[name] = read(value)
        return cls(**given) if given.get("carrier", CARRIERS[0]) in CARRIERS else None


def serve(options: Options) -> int:
    """Serve until told to end; the exit status. Raises BadConfig for options and files that cannot be used."""
    # None of what is being loaded is garbage, and to find that out takes a tenth of the time.
    gc.disable()
    # A walk over a million services takes as long as loading what comes next, and there may be another processor.
    reaching = None if options.store is None or options.explain else Reaching(options.store)
    try:
        return _serve(options, reaching)
    finally:
        gc.enable()
        if reaching is not None:
            reaching.join(wanted=False)


@contextmanager
def _uninterrupted(signals: Iterable[signal.Signals] = (signal.SIGINT,)) -> Iterator[None]:
    """These signals come into effect afterwards. An exception by Ctrl-C in the midst of a module that is being loaded,
    or of compiled code that looks at classes for the first time, gets lost, one time in a hundred; and once it was a
    segmentation fault."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _serve(options: Options, reaching: Reaching | None) -> int:
    with _uninterrupted():
        import resource

        from msgspec.structs import replace

        from fourtuple.broker import Limits
        from fourtuple.services import whole_or_none
        from fourtuple.supervisor.spec import Spec

    demo, config, store = options.demo, options.config, options.store
    for option, given in (
        ("--services", options.services),
        ("--listen", options.listen),
        ("--check", options.check or None),
    ):
        if given is not None and not demo:
            raise BadConfig(option, "is for --demo; a broker.toml says these things itself")
    for option, seconds in (("--every", options.every), ("--grace", options.grace)):
        if seconds < 0:
            raise BadConfig(option, "is negative; 0 or more is needed")
    whole_or_none("--workers", options.workers, 1, 1_024)
    if options.explain:
        from fourtuple.cli.explain import explain as explained

        if demo:
            raise BadConfig("--explain", "needs a broker.toml, and no --demo")
        file = _from_file(config, store).file
        return explained(file, store=store, log=options.log, uring=options.carrier != "epoll", as_json=options.json)
    limits = Limits(
        most_connections=options.most,
        most_per_source=options.most_per_source,
        most_per_service=options.most_per_service,
        delivery_timeout_s=options.patience,
    )
    with ExitStack() as stack:
        source = stack.enter_context(_demonstration(options)) if demo else _from_file(config, store)
        spec = Spec(
            named=source.named,
            text=source.text,
            store=None if store is None else str(store.absolute()),
            demonstration=None if source.demonstration is None else source.demonstration.spec,
            limits=limits,
            ledger=None if options.log is None else str(options.log.absolute()),
            ledger_every=options.log_every,
            ledger_steps=options.log_steps,
            carrier=options.carrier,
            workers=options.workers or len(os.sched_getaffinity(0)),
            grace_s=options.grace,
            soft_descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        )
        if source.file.template:
            spec = replace(spec, inetd=str(spec.inetd_path))
        return _begun(spec, source, options, reaching)


def _begun(spec: Spec, source: _Source, options: Options, reaching: Reaching | None) -> int:
    """The broker process first: it listens while the supervisor is still being loaded."""
    with _uninterrupted():
        import socket

        from fourtuple import systemd
        from fourtuple.confinement import Reach
        from fourtuple.engine import raise_soft_descriptors
        from fourtuple.supervisor.beginning import forked
        from fourtuple.supervisor.brokerprocess import OBEYED
        from fourtuple.supervisor.listeners import Listeners

    raise_soft_descriptors()
    passed = [socket.socket(fileno=given.fd) for given in systemd.listen_fds()]
    listeners = Listeners.bound([table.endpoint for table in source.file.listen], spec.workers, passed)
    found = None if reaching is None else reaching.join(wanted=spec.is_confined)
    # Clients are served from now on: what would end this process at once waits until it is known how to end.
    with _uninterrupted(OBEYED):
        first = forked(None if found is None else Reach.of_services(found))
        try:
            first.tell(spec, listeners)
            # An event loop takes as long to load as the broker process to listen.
            import asyncio

            return asyncio.run(_supervised(spec, source, options, listeners, first))
        finally:
            first.forsake()


async def _supervised(spec: Spec, source: _Source, options: Options, listeners: Listeners, first: Begun) -> int:
    import time

    from msgspec.structs import asdict

    from fourtuple import systemd
    from fourtuple.control import door
    from fourtuple.control.verbs import unsaid
    from fourtuple.eventlog import EventLog
    from fourtuple.supervisor.life import Shown, obey_signals
    from fourtuple.supervisor.supervisor import Settings, Supervisor
    from fourtuple.supervisor.surroundings import Surroundings, surrounded

    file, events = source.file, options.events
    shown = Shown(as_json=options.json, every_s=options.every)
    settings = Settings.of(file)
    log = None if events is None else EventLog(events)
    say = unsaid if log is None else log.say
    around = Surroundings(
        events=log, events_path=None if events is None else str(events.absolute()), shown=asdict(shown)
    )
    with log or nullcontext():
        if (control := file.control) is not None:
            door.require_server()
            around.control_path = control.path
            around.control = door.listen(control.path, mode=control.permissions, group=control.group_id)
        supervisor = Supervisor(spec, settings, listeners, say)
        around.begun_s = time.monotonic()
        if source.demonstration is None:
            supervisor.around = around
        # First of all: once it listens, somebody may tell it to end.
        obey_signals(supervisor, around.reopen)
        async with surrounded(supervisor, file, around, say):
            ready = await supervisor.begin(first)
            systemd.notify(ready=True)
            _announce(ready, source, shown)
            return await _lived(supervisor, source, shown, options.check)


def _announce(ready: dict[str, Any], source: _Source, shown: Shown) -> None:
    if not shown.as_json:
        for table in source.file.listen:
            print(f"listening on {table.endpoint} ({ready['carrier']}, {ready['workers']} workers)")
        if ready["fallback"]:
            print(f"epoll, because {ready['fallback']}")
        for line in source.demonstration.hints if source.demonstration is not None else ():
            print(line)
        sys.stdout.flush()


async def _lived(supervisor: Supervisor, source: _Source, shown: Shown, check: bool) -> int:
    import asyncio

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


class _Source(NamedTuple):
    """Where listeners and services come from."""

    named: str
    """What a message calls it."""
    text: str
    file: BrokerFile
    demonstration: _Demonstration | None = None


class _Demonstration(NamedTuple):
    """Services that are there to be looked at."""

    services: int
    at: Endpoint
    """Where a client on this host reaches them."""
    pages: Pages

    @property
    def spec(self) -> Demonstration:
        """As a broker process has to know it."""
        from fourtuple.supervisor.spec import Demonstration

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
    with _uninterrupted():
        file = BrokerFile.parse(data, str(config))
    if not file.listen:
        raise BadConfig(str(config), "has no [[listen]]; at least one is needed")
    if store is not None and (file.services or file.routes):
        raise BadConfig("--store", "is given, and the file has services of its own; import them into one of both")
    return _Source(named=str(config), text=data.decode(), file=file)


@contextmanager
def _demonstration(options: Options) -> Iterator[_Source]:
    from ipaddress import ip_address

    from fourtuple import demo
    from fourtuple.brokerfile import BrokerFile
    from fourtuple.tuples import Endpoint

    for option, given in (("--config", options.config), ("--store", options.store)):
        if given is not None:
            raise BadConfig(option, "does not go with --demo, which has services of its own")
    try:
        number = demo.SERVICES if options.services is None else count(options.services)
    except ValueError as error:
        raise BadConfig("--services", str(error)) from None
    if number > demo.MOST_SERVICES:
        raise BadConfig("--services", f"is {number:,}; {demo.MOST_SERVICES:,} is the most")
    try:
        endpoint = Endpoint.parse(options.listen or DEMO_LISTENS)
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
    import json

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
