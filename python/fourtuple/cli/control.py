"""`fourtuple control`: what a running broker tells, and what it can be told.

Decides the options and what is printed; text for people and, with --json, what the API said. Knows no HTTP: a client of
the control socket asks (`fourtuple.control.client`). The commands that are needed most are the top level's as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fourtuple.cli import Exit
from fourtuple.cli.services import complete_names
from fourtuple.errors import BadConfig, MissingFeature

app = typer.Typer(
    help="A running broker, over its control socket: what it tells, and what it can be told.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

SocketOption = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        metavar="PATH",
        help="The control socket; default: FOURTUPLE_CONTROL, /run/fourtuple/control for root, or fourtuple/control in "
        "XDG_RUNTIME_DIR.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A service.", autocompletion=complete_names)]
WaitOption = Annotated[float, typer.Option("--wait", metavar="SECONDS", min=0, max=60, help="Wait for it so long.")]
_UPGRADE_WITHIN_S = 120.0
_GLANCE_S = 0.25


def status(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """How the broker is: what it holds, its processes, its services."""
    told = _ask(socket, "GET", "/v1/status")
    if as_json:
        return _print_json(told)
    services, counts = told["services"], ("accepted", "sniffing", "delivering", "relaying", "ended")
    _print(f"fourtuple {told['version']}, {told['state']}: {told['carrier']}, {told['workers']} workers")
    _print("listening on " + (", ".join(told["listeners"]) or "nothing"))
    _print("connections: " + ", ".join(f"{told[name]:,} {name}" for name in counts))
    shown = {name: count for name, count in services.items() if count or name == "known"}
    _print("services: " + ", ".join(f"{count:,} {name}" for name, count in shown.items()))
    for one in told["processes"]:
        private = "" if one["private_bytes"] is None else f" ({_megabytes(one['private_bytes'])} of its own)"
        _print(
            f"{one['role']:10} pid {one['pid']}, {_megabytes(one['resident_bytes'])}{private}, "
            f"{one['cpu_s']:,.1f} s of processor time, {one['threads']} threads"
        )
    if told["restarts"]:
        _print(f"restarts: {told['restarts']:,}")
    if told["upgrade"]["state"] != "none":
        _print(_of_upgrade(told["upgrade"]))
    return None


def connections(
    service: Annotated[str | None, typer.Option(metavar="NAME", help="Only those of this service.")] = None,
    source: Annotated[str | None, typer.Option(metavar="PREFIX", help="Only those from there.")] = None,
    limit: Annotated[int, typer.Option(metavar="COUNT", min=0, help="At most so many; 0 is all.")] = 100,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the connections that the broker holds; what was handed over it holds no more."""
    shown, after = 0, None
    while True:
        most = min(limit - shown, 256) if limit else 256
        page = _ask(socket, "GET", "/v1/connections", most=most, after=after, service=service, source=source)
        for one in page["connections"]:
            shown += 1
            _print_json(one, indent=None) if as_json else _print(
                f"{one['id']}  {one['state']:10} {one['peer'] or '-':24} {one['service'] or '-':40} "
                f"{one['age_s']:,.1f} s, {one['bytes_up']:,} B up, {one['bytes_down']:,} B down, on {one['listener']}"
            )
        after = page["next"]
        if after is None or (limit and shown >= limit):
            break
    if after is not None and not as_json:
        print(f"fourtuple: there are more than {limit:,}; --limit 0 shows all", file=sys.stderr)


def top(
    by: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="live: connections now; total: connections that have ended; bytes: of those.",
            autocompletion=lambda: ["live", "total", "bytes"],
        ),
    ] = "live",
    limit: Annotated[int, typer.Option(metavar="COUNT", min=1, max=256, help="So many.")] = 20,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the busiest services."""
    told = _ask(socket, "GET", "/v1/services", by=by, most=limit)
    if as_json:
        return _print_json(told)
    for one in told["services"]:
        least = f" (at least {one['amount'] - one['over']:,})" if one["over"] else ""
        _print(f"{one['amount']:>14,}  {one['service']}{least}")
    return None


def service(name: NameArgument, socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show one service: where it is, and how it stands. Exit status 1 if there is none."""
    _show_service(_ask(socket, "GET", _of(name)), as_json)


def wake(name: NameArgument, wait: WaitOption = 30.0, socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Start a service that is asleep. Exit status 1 if it does not come up.

    To undo: fourtuple stop NAME.
    """
    told = _ask(socket, "POST", _of(name) + "/wake", wait_s=wait, patience_s=wait)
    _show_service(told, as_json)
    if wait and told["standing"] != "awake":
        raise typer.Exit(Exit.WARNING)


def stop(name: NameArgument, wait: WaitOption = 30.0, socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Stop a service; the next client wakes it again. Exit status 1 if it does not end.

    To undo: fourtuple wake NAME.
    """
    told = _ask(socket, "POST", _of(name) + "/stop", wait_s=wait, patience_s=wait)
    _show_service(told, as_json)
    if wait and told["standing"] != "asleep":
        raise typer.Exit(Exit.WARNING)


def reasons(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """How connections have ended, by reason."""
    _show_counts(_ask(socket, "GET", "/v1/reasons"), as_json)


def failures(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """System calls that failed, by step and error."""
    told = _ask(socket, "GET", "/v1/failures")
    if as_json:
        return _print_json(told)
    return _show_counts({f"{one['errno']} at {one['step']}": one["count"] for one in told}, as_json)


def drain(
    grace: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="After so long what is left is closed.")
    ] = None,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have the broker accept no more, and end when what it holds has ended. This cannot be undone."""
    told = _ask(socket, "POST", "/v1/drain", {"grace_s": grace})
    _print_json(told) if as_json else _print(told["done"])


def limits(
    most: Annotated[int | None, typer.Option(metavar="COUNT", min=0, help="Connections at once; 0: no bound.")] = None,
    most_per_source: Annotated[
        int | None, typer.Option(metavar="COUNT", min=0, help="At once from one IPv4 address or IPv6 /64; 0: no bound.")
    ] = None,
    most_per_service: Annotated[
        int | None, typer.Option(metavar="COUNT", min=0, help="At once to one service that says nothing; 0: no bound.")
    ] = None,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show limits, or change those that are given, until the broker ends; what there is may stay."""
    given = {"most_connections": most, "most_per_source": most_per_source, "most_per_service": most_per_service}
    changes = {name: value for name, value in given.items() if value is not None}
    before = _ask(socket, "GET", "/v1/limits")
    told = _ask(socket, "PATCH", "/v1/limits", changes) if changes else before
    if as_json:
        return _print_json(told)
    for name, value in told.items():
        was = "" if before[name] == value else f" (was {before[name]:,})"
        _print(f"{name:18} {f'{value:,}' if value else 'no bound'}{was}")
    return None


def close(
    id: Annotated[str, typer.Argument(metavar="ID", help="As connections and the log have it.")],
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Close one connection now. Exit status 1 if there is none of that id."""
    told = _ask(socket, "DELETE", f"/v1/connections/{_segment(id)}")
    _print_json(told) if as_json else _print(told["done"])


def upgrade(
    executable: Annotated[
        str | None, typer.Option(metavar="PATH", help="Python of the new installation; default: the one that runs.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for its end.")] = True,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have another version take over, with listeners, clients and services. Exit status 1 if it did not; then nothing
    has changed."""
    told = _ask(socket, "POST", "/v1/upgrade", {"executable": executable})
    until_s = time.monotonic() + _UPGRADE_WITHIN_S
    while wait and told["state"] == "running" and time.monotonic() < until_s:
        time.sleep(_GLANCE_S)
        try:
            told = _ask(socket, "GET", "/v1/status")["upgrade"]
        except MissingFeature:
            # The supervisor itself is on its way from one version to the other.
            if time.monotonic() >= until_s:
                raise
    if as_json:
        _print_json(told)
    else:
        _print(_of_upgrade(told))
    if wait and told["state"] != "done":
        raise typer.Exit(Exit.WARNING)


def reload(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Have the broker read its file again."""
    told = _ask(socket, "POST", "/v1/reload")
    _print_json(told) if as_json else _print(told["done"])


def metrics(socket: SocketOption = None) -> None:
    """Print all numbers as Prometheus reads them."""
    from fourtuple.cli.render import emit

    emit(_raw(socket, "/metrics").decode())


COMMANDS: dict[str, Callable[..., None]] = {
    "status": status,
    "connections": connections,
    "top": top,
    "service": service,
    "wake": wake,
    "stop": stop,
    "reasons": reasons,
    "failures": failures,
    "drain": drain,
    "limits": limits,
    "close": close,
    "upgrade": upgrade,
    "reload": reload,
    "metrics": metrics,
}
"""All of `fourtuple control`."""
AT_THE_TOP = ("status", "connections", "wake", "stop", "drain", "upgrade")
"""Those that are `fourtuple NAME`, too."""
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def _ask(
    socket: Path | None,
    method: str,
    path: str,
    body: object = None,
    patience_s: float = 0.0,
    **query: str | float | None,
) -> Any:  # noqa: ANN401  # whatever JSON there is
    from fourtuple.control.client import PATIENCE_S, Client, Declined

    try:
        return Client(_path(socket), PATIENCE_S + patience_s).ask(method, path, body, **query)
    except Declined as declined:
        raise _said(declined) from None


def _raw(socket: Path | None, path: str) -> bytes:
    from fourtuple.control.client import Client, Declined

    try:
        return Client(_path(socket)).raw("GET", path)
    except Declined as declined:
        raise _said(declined) from None


def _said(declined: Any) -> Exception:  # noqa: ANN401  # imported only where it is caught
    if declined.status == 422:
        return BadConfig(str(declined.problem.get("field") or "request"), str(declined))
    if declined.status >= 500:
        return MissingFeature(str(declined))
    print(f"fourtuple: {declined}", file=sys.stderr)
    return typer.Exit(Exit.WARNING)


def _path(socket: Path | None) -> Path:
    from fourtuple.control import default_socket

    return default_socket() if socket is None else socket


def _of(name: str) -> str:
    return f"/v1/services/{_segment(name)}"


def _segment(text: str) -> str:
    from fourtuple.control.client import segment

    return segment(text)


def _of_upgrade(told: dict[str, Any]) -> str:
    return f"upgrade: {told['state']}" + (f", {told['why']}" if told["why"] else "")


def _show_service(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return _print_json(told)
    for key, value in told.items():
        if value not in (None, []):
            _print(f"{key + ':':10} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return None


def _show_counts(told: dict[str, int], as_json: bool) -> None:
    if as_json:
        return _print_json(told)
    for name, count in told.items():
        if count:
            _print(f"{count:>14,}  {name}")
    return None


def _print(text: str) -> None:
    from fourtuple.cli.render import emit, plain

    emit(plain(text) + "\n")


def _print_json(told: object, indent: int | None = 1) -> None:
    from fourtuple.cli.render import emit

    emit(json.dumps(told, indent=indent) + "\n")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
