"""`fourtuple services route`: conditions on what a connection shows, and where it then goes.

Decides the options. Which route is meant when several match is decided in `crates/registry` and written down in
docs/registry.md; `match` asks it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from msgspec.structs import asdict

from fourtuple.cli import Exit
from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from fourtuple.registry import Registry
    from fourtuple.services import Delivery, Route
    from fourtuple.tuples import Endpoint

app = typer.Typer(
    help="Routes: what a connection must show to go elsewhere than to the service of its name.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="The registry's folder; default: FOURTUPLE_STORE, /var/lib/fourtuple/registry for root, or the XDG state "
        "folder.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WidePort = Annotated[int | None, typer.Option(metavar="N", help="The wide port that it asks for.")]
Name = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN", help="SNI, Host or :authority: NAME, *.SUFFIX (one label more) or **.SUFFIX (any)."
    ),
]
Path = Annotated[str | None, typer.Option(metavar="PATH", help="This path and all below it.")]
Protocol = Annotated[str | None, typer.Option(metavar="NAME", help="What is spoken, such as tls, http1 or postgres.")]
Alpn = Annotated[str | None, typer.Option(metavar="NAME", help="Among what the client offers, such as h2.")]
Database = Annotated[str | None, typer.Option(metavar="NAME", help="Of the startup message; * is any.")]
User = Annotated[str | None, typer.Option(metavar="NAME", help="Of the startup or CONNECT message; * is any.")]
Client = Annotated[str | None, typer.Option(metavar="ID", help="MQTT client id; * is any.")]
Destination = Annotated[str | None, typer.Option(metavar="PREFIX", help="Address that the client connected to.")]
DestinationPort = Annotated[int | None, typer.Option(metavar="PORT", help="Port that the client connected to.")]
Source = Annotated[str | None, typer.Option(metavar="PREFIX", help="Address of the client.")]
SourcePort = Annotated[int | None, typer.Option(metavar="PORT", help="Port of the client.")]


@app.command("add")
def add(
    to: Annotated[
        str,
        typer.Argument(
            metavar="TO",
            help="service:NAME or a target; {name}, {label}, {user}, {database} and {client} are what is shown.",
        ),
    ],
    wide_port: WidePort = None,
    name: Name = None,
    path: Path = None,
    protocol: Protocol = None,
    alpn: Alpn = None,
    database: Database = None,
    user: User = None,
    client: Client = None,
    destination: Destination = None,
    destination_port: DestinationPort = None,
    source: Source = None,
    source_port: SourcePort = None,
    delivery: Annotated[str, typer.Option(metavar="HOW", help="To a target: relay, handoff or inetd.")] = "relay",
    patience_ms: Annotated[int | None, typer.Option(metavar="MS", help="To a target: how long to wait for it.")] = None,
    connections: Annotated[int | None, typer.Option(metavar="N", help="To a target: most at once.")] = None,
    proxy: Annotated[int | None, typer.Option(metavar="1|2", help="To a target: begin with a PROXY header.")] = None,
    start: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="To a target: started by it when it is called.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="One of equal conditions gives way.")] = False,
    store: StoreOption = None,
) -> None:
    """Add a route. Without conditions it is the default. To undo: fourtuple services route remove, same conditions."""
    from fourtuple.services import Match, Route

    match = Match(
        wide_port=wide_port,
        name=name,
        path=path,
        protocol=protocol,
        alpn=alpn,
        database=database,
        user=user,
        client=client,
        destination=destination,
        destination_port=destination_port,
        source=source,
        source_port=source_port,
    )
    route = Route(
        match=match,
        to=to,
        delivery=checked_delivery(delivery),
        patience_ms=patience_ms,
        connections=connections,
        proxy=proxy,
        start=start,
    )
    with opened(store, create=True) as registry:
        registry.add_route(route, replace=replace)
    say(f"added: {match} -> {to}")


@app.command("remove")
def remove(
    wide_port: WidePort = None,
    name: Name = None,
    path: Path = None,
    protocol: Protocol = None,
    alpn: Alpn = None,
    database: Database = None,
    user: User = None,
    client: Client = None,
    destination: Destination = None,
    destination_port: DestinationPort = None,
    source: Source = None,
    source_port: SourcePort = None,
    default: Annotated[bool, typer.Option("--default", help="The route without conditions.")] = False,
    store: StoreOption = None,
) -> None:
    """Remove the route with these conditions. Exit status 1 if there is none."""
    from fourtuple.services import Match

    match = Match(
        wide_port=wide_port,
        name=name,
        path=path,
        protocol=protocol,
        alpn=alpn,
        database=database,
        user=user,
        client=client,
        destination=destination,
        destination_port=destination_port,
        source=source,
        source_port=source_port,
    )
    if default == bool(match.row):
        raise BadConfig("--default", "either conditions are wanted, or --default alone")
    with opened(store) as registry:
        there = registry.remove_route(match)
    if not there:
        print(f"fourtuple: there is no route with {match}", file=sys.stderr)
        raise typer.Exit(Exit.WARNING)
    say(f"removed: {match}")


@app.command("list")
def list_(as_json: JsonOption = False, store: StoreOption = None) -> None:
    """List routes: those that begin with the same condition in the order of their precedence."""
    from fourtuple.cli.render import emit

    with opened(store) as registry:
        found = registry.routes()
    line = _json_line if as_json else _text_line
    emit("".join(line(route) for route in found))


@app.command("match")
def match(
    wide_port: Annotated[int | None, typer.Option(metavar="N", help="A wide port.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="SNI, Host or :authority, without a port.")] = None,
    path: Annotated[str | None, typer.Option(metavar="PATH", help="Path of a request.")] = None,
    protocol: Protocol = None,
    alpn: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="What the client offers; may be repeated.")
    ] = None,
    database: Annotated[str | None, typer.Option(metavar="NAME", help="A database.")] = None,
    user: Annotated[str | None, typer.Option(metavar="NAME", help="A user.")] = None,
    client: Annotated[str | None, typer.Option(metavar="ID", help="An MQTT client id.")] = None,
    destination: Annotated[str | None, typer.Option(metavar="ADDRESS:PORT", help="Where it connected to.")] = None,
    source: Annotated[str | None, typer.Option(metavar="ADDRESS:PORT", help="Where it comes from.")] = None,
    as_json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Say where a connection that shows this would go. Exit status 1 if nowhere."""
    from fourtuple.cli.render import emit
    from fourtuple.services import Seen

    seen = Seen(
        wide_port=wide_port,
        name=_sent(name),
        path=_sent(path),
        protocol=protocol,
        alpn=tuple(one.encode() for one in alpn) if alpn else None,
        database=_sent(database),
        user=_sent(user),
        client=_sent(client),
        destination=_endpoint("--destination", destination),
        source=_endpoint("--source", source),
    )
    with opened(store) as registry:
        outcome = registry.resolve(seen)
    if as_json:
        given = {key: value for key, value in asdict(outcome).items() if value is not None}
        emit(json.dumps(given | ({"delivery": outcome.delivery.value} if outcome.delivery else {})) + "\n")
    elif outcome.delivery is not None:
        emit(f"{outcome.service or '(a route)'} -> {outcome.target}  {outcome.delivery.value}\n")
    else:
        emit(f"{outcome.kind}: {outcome.why or outcome.service or 'nothing matches, and there is no default'}\n")
    if outcome.delivery is None:
        raise typer.Exit(Exit.WARNING)


@contextmanager
def opened(store: str | None, *, create: bool = False) -> Iterator[Registry]:
    """The registry that --store names, or the usual one."""
    from fourtuple.registry import Registry

    if store is not None and not store:
        raise BadConfig("--store", "is empty; a folder is needed")
    with Registry(store, create=create) as registry:
        yield registry


def checked_delivery(name: str) -> Delivery:
    """By its name."""
    from fourtuple.services import Delivery

    found = next((one for one in Delivery if one.value == name), None)
    if found is None:
        raise BadConfig("--delivery", f"{name!r} is not one of {', '.join(one.value for one in Delivery)}")
    return found


def say(text: str) -> None:
    """A line for people."""
    from fourtuple.cli.render import emit, plain

    emit(plain(text) + "\n")


def _sent(text: str | None) -> bytes | None:
    return None if text is None else text.encode(errors="surrogateescape")


def _endpoint(option: str, text: str | None) -> Endpoint | None:
    from fourtuple.tuples import Endpoint

    if text is None:
        return None
    try:
        return Endpoint.parse(text)
    except ValueError as error:
        raise BadConfig(option, str(error)) from None


def _text_line(route: Route) -> str:
    return f"{route.match!s:60} -> {route.to}  {'' if route.to.startswith('service:') else route.delivery.value}\n"


def _json_line(route: Route) -> str:
    options = ("delivery", "patience_ms", "connections", "proxy", "start")
    values = (None if route.to.startswith("service:") else route.delivery.value, *route.row[3:])
    rest = {key: value for key, value in zip(options, values, strict=True) if value is not None}
    return json.dumps(dict(route.match.given()) | {"to": route.to} | rest) + "\n"
