"""`fourtuple limits`: the catalogue on a terminal: a list, one page, or the suspects behind an error.

Decides what of an entry a list shows. Knows no host; the entries and pages are those of `fourtuple.limits`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from fourtuple.limits import Limit

app = typer.Typer(help="The catalogue of limits: what bounds connections, what is seen, how to raise it.")


@app.callback(invoke_without_command=True)
def _list_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_limits()


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_limits(as_json: AsJson = False) -> None:
    """List every limit: number, name, scope, what it bounds, and how that is known."""
    from fourtuple.cli import render
    from fourtuple.limits import LIMITS

    if as_json:
        render.emit(json.dumps([_summary(limit) for limit in LIMITS], indent=2) + "\n")
    else:
        render.show(render.limits_table(LIMITS))


@app.command("show")
def show_limit(
    name: Annotated[str, typer.Argument(help="Name or number of a limit, such as ephemeral-ports or A2.")],
    as_json: AsJson = False,
) -> None:
    """Show the page of one limit."""
    from fourtuple.cli import render
    from fourtuple.limits import LIMITS
    from fourtuple.limits.pages import page

    limit = next((it for it in LIMITS if name.lower() in (it.name.lower(), it.id.lower())), None)
    if limit is None:
        from difflib import get_close_matches

        near = get_close_matches(name.lower(), [it.name for it in LIMITS], cutoff=0.4)
        raise BadConfig("limits show NAME", f"no limit is called {render.plain(name)[:60]!r}; {_allowed(near)}")
    if as_json:
        render.emit(json.dumps(_summary(limit) | {"page": page(limit)}, indent=2) + "\n")
    else:
        render.show(render.markdown(page(limit)))


@app.command("errno")
def show_suspects(
    error: Annotated[str, typer.Argument(help="Name or number of an error, such as EADDRNOTAVAIL or 99.")],
    call: Annotated[str, typer.Option(help="The call that failed, such as connect, bind or accept.")] = "",
    as_json: AsJson = False,
) -> None:
    """Name the limits that give this error, the first suspect first."""
    import errno
    import os

    from fourtuple.cli import render
    from fourtuple.limits import LIMITS, suspects

    number = int(error) if error.isascii() and error.isdigit() and len(error) < 6 else None
    name = errno.errorcode.get(number, "") if number is not None else error.upper()
    known = sorted({hit.errno for limit in LIMITS for hit in limit.hit if hit.errno})
    if name not in errno.errorcode.values():
        raise BadConfig("limits errno ERROR", f"{render.plain(error)[:40]!r} is no error of Linux; {_allowed(known)}")
    found = suspects(call, name)
    if as_json:
        render.emit(json.dumps([_summary(limit) for limit in found], indent=2) + "\n")
        return
    meaning = f"{name} ({getattr(errno, name)}): {os.strerror(getattr(errno, name))}"
    where = f" from {render.plain(call)[:40]}" if call else ""
    render.show(render.suspects(f"{meaning}{where}", name, found))


def _summary(limit: Limit) -> dict[str, Any]:
    return {
        "id": limit.id,
        "name": limit.name,
        "title": limit.title,
        "scope": limit.scope.value,
        "kind": limit.kind.value,
        "evidence": limit.evidence.value,
        "default": limit.default,
        "why": limit.why,
    }


def _allowed(names: list[str]) -> str:
    return f"allowed are, for example: {', '.join(names[:8])}" if names else "fourtuple limits list names them all"
