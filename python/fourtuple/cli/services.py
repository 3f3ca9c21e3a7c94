"""`fourtuple services`: the registry of services and routes, from the command line.

Decides the options and what is printed; text for people and, with --json, for programs. Knows no format: the registry
reads and writes files itself. Works whether or not a broker runs; one that runs sees every change at its next lookup.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from fourtuple.cli import Exit, routes
from fourtuple.cli.routes import JsonOption, StoreOption, checked_delivery, opened, say
from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from fourtuple.registry import Counts
    from fourtuple.services import Service

app = typer.Typer(
    help="The registry of services and routes: any number of names, each with its target.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(routes.app, name="route")

_DELIVERIES = ("relay", "handoff", "inetd")
_FORMATS = ("csv", "jsonl", "toml")


def complete_names(incomplete: str) -> list[str]:
    """Names that begin so, for the shell; none where there is no registry to be read."""
    from itertools import islice, takewhile

    from fourtuple.errors import FourtupleError
    from fourtuple.registry import Registry

    try:
        with Registry(create=False) as registry:
            exact = [incomplete] if incomplete and incomplete in registry else []
            after = registry.services(after=incomplete.lower())
            return exact + [
                one.name for one in islice(takewhile(lambda one: one.name.startswith(incomplete), after), 50)
            ]
    except FourtupleError:
        return []


DeliveryOption = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help="relay: bytes are carried; handoff: the socket itself is passed, to a unix target; inetd: a process for "
        "each connection.",
        autocompletion=lambda: list(_DELIVERIES),
    ),
]
PatienceOption = Annotated[
    int | None, typer.Option(metavar="MS", help="How long a connection waits for a service that is absent or full.")
]
ConnectionsOption = Annotated[int | None, typer.Option(metavar="N", help="Most connections at once.")]
ProxyOption = Annotated[int | None, typer.Option(metavar="1|2", help="Begin relayed connections with a PROXY header.")]
StartOption = Annotated[
    str | None, typer.Option(metavar="TEMPLATE", help="Started by this template of broker.toml when it is called.")
]
WidePortOption = Annotated[int | None, typer.Option(metavar="N", help="A number of 32 bits that means it.")]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A DNS name, in any script.", autocompletion=complete_names)
]
TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="unix:/PATH, unix:@NAME, tcp:ADDRESS:PORT or tcp:NAME:PORT.")
]


@app.command("add")
def add(
    name: NameArgument,
    target: TargetArgument,
    delivery: DeliveryOption = "relay",
    wide_port: WidePortOption = None,
    patience_ms: PatienceOption = None,
    connections: ConnectionsOption = None,
    proxy: ProxyOption = None,
    start: StartOption = None,
    store: StoreOption = None,
) -> None:
    """Add a service; one of that name must not be there. Makes the registry if there is none.

    To undo: fourtuple services remove NAME.
    """
    made = _service(name, target, delivery, wide_port, patience_ms, connections, proxy, start)
    with opened(store, create=True) as registry:
        registry.add([made])
    say(f"added {made.name}; undo: fourtuple services remove {made.name}")


@app.command("set")
def set_(
    name: NameArgument,
    target: TargetArgument,
    delivery: DeliveryOption = "relay",
    wide_port: WidePortOption = None,
    patience_ms: PatienceOption = None,
    connections: ConnectionsOption = None,
    proxy: ProxyOption = None,
    start: StartOption = None,
    store: StoreOption = None,
) -> None:
    """Add a service, or replace the one of that name, with all that was said of it."""
    made = _service(name, target, delivery, wide_port, patience_ms, connections, proxy, start)
    with opened(store, create=True) as registry:
        before = registry.service(made.name)
        registry.set([made])
    if before is None:
        say(f"added {made.name}; undo: fourtuple services remove {made.name}")
    else:
        say(f"set {made.name}; before: {json.dumps(_record(before))}")


@app.command("remove")
def remove(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Services to remove.", autocompletion=complete_names)
    ],
    store: StoreOption = None,
) -> None:
    """Remove services, all in one transaction. Exit status 1 if one of them was not there."""
    from fourtuple.services import canonical_name

    with opened(store) as registry:
        there = [service for name in dict.fromkeys(names) if (service := registry.service(name)) is not None]
        absent = registry.remove(canonical_name(name) for name in dict.fromkeys(names))
    for service in there:
        say(f"removed {json.dumps(_record(service))}")
    for name in absent:
        print(f"fourtuple: there is no service {name}", file=sys.stderr)
    if absent:
        raise typer.Exit(Exit.WARNING)


@app.command("list")
def list_(
    under: Annotated[str, typer.Option(metavar="SUFFIX", help="Only names that end with .SUFFIX.")] = "",
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="At most so many; 0 is all.")] = 0,
    as_json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """List services in the order of their names, as a table or as JSON lines; streams, however many there are."""
    from itertools import islice

    from fourtuple.cli.render import emit
    from fourtuple.services import canonical_name

    suffix = f".{canonical_name(under.removeprefix('.'), '--under')}" if under else ""
    with opened(store) as registry:
        wanted = (service for service in registry.services() if service.name.endswith(suffix))
        rows = islice(wanted, limit) if limit else wanted
        line = _json_line if as_json else _text_line
        while page := "".join(line(service) for service in islice(rows, 1_000)):
            emit(page)


@app.command("show")
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME|NUMBER", help="A name, or a wide port.", autocompletion=complete_names)
    ],
    as_json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Show one service, by its name or its wide port. Exit status 1 if there is none."""
    from fourtuple.cli.render import emit

    with opened(store) as registry:
        by_number = name.isascii() and name.isdigit() and len(name) <= 10 and int(name) < 1 << 32
        found = registry.service_at(int(name)) if by_number else None
        found = found or registry.service(name)
    if found is None:
        print(f"fourtuple: there is no service {name!r}", file=sys.stderr)
        raise typer.Exit(Exit.WARNING)
    if as_json:
        emit(json.dumps(_record(found), indent=1) + "\n")
    else:
        emit("".join(f"{key + ':':13} {value}\n" for key, value in _record(found).items()))


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="CSV, JSON lines or TOML; - is standard input.")],
    text_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="csv, jsonl or toml; default: what FILE ends with.",
            autocompletion=lambda: list(_FORMATS),
        ),
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="A name that is there already is an error, and not replaced.")
    ] = False,
    batch: Annotated[
        int, typer.Option(metavar="N", min=1, max=100_000_000, help="Services in one transaction.")
    ] = 1_000_000,
    as_json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Import services: CSV with the columns name,target,delivery,wide_port,patience_ms,connections,proxy,start (the
    first two suffice, and a header may order them), JSON lines with these keys, or TOML with [[service]] and [[route]].

    Ctrl-C and errors leave whole transactions: what is said to be kept is kept.
    """
    chosen = _format_of(file, text_format)
    if chosen == "toml":
        _import_toml(file, add, as_json, store)
        return
    progress = _Progress()
    with _input(file) as stream, opened(store, create=True) as registry:
        try:
            registry.import_text(stream, chosen, replace=not add, batch_rows=batch, progress=progress)
        finally:
            progress.end(as_json)


@app.command("export")
def export(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Where to; - is standard output.")] = "-",
    text_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="csv or jsonl; default: what FILE ends with, else csv.",
            autocompletion=lambda: list(_FORMATS[:2]),
        ),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Export all services, from one snapshot, in a form that import reads. Routes: services route list --json."""
    from fourtuple.cli.render import emit

    chosen = text_format or ("csv" if file == "-" else _format_of(file, None))
    with opened(store) as registry:
        # Before a file is opened for writing: one that cannot be a format's is not emptied.
        blocks = registry.export_text(chosen)
        if file == "-":
            for block in blocks:
                emit(block.decode())
            return
        with Path(file).open("wb") as out:
            out.writelines(blocks)


@app.command("check")
def check(file: Annotated[str, typer.Argument(metavar="FILE", help="A broker.toml.")]) -> None:
    """Check a broker.toml: listeners, services and routes. An error names line and key; nothing is written."""
    from fourtuple.brokerfile import BrokerFile

    found = BrokerFile.read(Path(file))
    say(f"{file}: {len(found.listen)} listeners, {len(found.service)} services, {len(found.route)} routes")


@app.command("status")
def status(as_json: JsonOption = False, store: StoreOption = None) -> None:
    """How many services and routes there are, and what they cost."""
    from msgspec.structs import asdict

    from fourtuple.cli.render import emit

    with opened(store) as registry:
        sizes = registry.sizes()
        where = registry.path
    if as_json:
        emit(json.dumps({"store": str(where), **asdict(sizes)}, indent=1) + "\n")
        return
    each = f", {sizes.services_bytes / sizes.services:.1f} B each" if sizes.services else ""
    emit(
        f"{where}: {sizes.services:,} services{each}, {sizes.wide_ports:,} wide ports, {sizes.routes:,} routes; "
        f"{sizes.file_bytes:,} B of file, version {sizes.version:,}, {sizes.readers} of {sizes.most_readers} readers\n"
    )


def _service(
    name: str,
    target: str,
    delivery: str,
    wide_port: int | None,
    patience_ms: int | None,
    connections: int | None,
    proxy: int | None,
    start: str | None,
) -> Service:
    from fourtuple.services import Service

    return Service(
        name=name,
        target=target,
        delivery=checked_delivery(delivery),
        wide_port=wide_port,
        patience_ms=patience_ms,
        connections=connections,
        proxy=proxy,
        start=start,
    )


def _import_toml(file: str, add: bool, as_json: bool, store: str | None) -> None:
    from fourtuple.brokerfile import LARGEST_BYTES, BrokerFile

    with _input(file) as stream:
        found = BrokerFile.parse(stream.read(LARGEST_BYTES + 1), file)
    with opened(store, create=True) as registry:
        counts = registry.add(found.services) if add else registry.set(found.services)
        registry.add_routes(found.routes, replace=not add)
    _report(counts.added, counts.replaced, len(found.route), as_json)
    if found.listen:
        print(f"fourtuple: {len(found.listen)} listeners were left out: a registry has none", file=sys.stderr)


def _report(added: int, replaced: int, routes_written: int, as_json: bool) -> None:
    if as_json:
        say(json.dumps({"added": added, "replaced": replaced, "routes": routes_written}))
    else:
        more = f", {routes_written:,} routes" if routes_written else ""
        say(f"{added:,} services added, {replaced:,} replaced{more}; all on the disk")


class _Progress:
    """Told after every block; shows on a terminal, four times a second, and says in the end what was kept."""

    def __init__(self) -> None:
        self._counts: Counts | None = None
        self._shown_s = 0.0

    def __call__(self, counts: Counts) -> None:
        self._counts = counts
        now_s = time.monotonic()
        if sys.stderr.isatty() and now_s - self._shown_s > 0.25:
            self._shown_s = now_s
            kept = counts.added + counts.replaced
            print(f"\r{counts.lines:,} lines read, {kept:,} on the disk ", end="", file=sys.stderr, flush=True)

    def end(self, as_json: bool) -> None:
        if self._shown_s:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if self._counts is not None:
            _report(self._counts.added, self._counts.replaced, 0, as_json)


def _format_of(file: str, named: str | None) -> str:
    chosen = named or Path(file).suffix.lstrip(".")
    if chosen not in _FORMATS:
        shown = repr(chosen) if chosen else "a file whose name does not end with a format"
        raise BadConfig("--format", f"{shown} is not known; one of {', '.join(_FORMATS)} is needed")
    return chosen


@contextmanager
def _input(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = Path(file).open("rb")  # noqa: SIM115 - closed below, and only its opening may fail in this way
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise BadConfig("FILE", f"{file!r} cannot be read: {why}") from None
    with stream:
        yield stream


def _json_line(service: Service) -> str:
    return json.dumps(_record(service)) + "\n"


def _text_line(service: Service) -> str:
    more = {key: value for key, value in _record(service).items() if key not in ("name", "target", "delivery")}
    rest = "".join(f"  {key}={value}" for key, value in more.items())
    return f"{service.name:40} {service.target}  {service.delivery.value}{rest}\n"


def _record(service: Service) -> dict[str, str | int]:
    """With the keys of a file, and without what is not set."""
    from fourtuple.registry import COLUMNS

    return {key: value for key, value in zip(COLUMNS, service.row, strict=True) if value is not None}
