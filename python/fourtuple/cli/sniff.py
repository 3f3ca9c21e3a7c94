"""`fourtuple sniff`: what a broker would see in the first bytes of a connection.

Decides how a verdict is written down. Knows no protocol; the sniffers are Rust's, behind `fourtuple.engine`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec.structs import asdict

from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from fourtuple.engine import Sniffed

MOST_BYTES = 1 << 20
"""More than the bound of any probe; what follows is not read."""


def sniff(
    file: Annotated[str, typer.Argument(help="File with what a client sent, or - for standard input.")] = "-",
    only: Annotated[str, typer.Option(help="Probes to ask, with commas between them; all if not given.")] = "",
    proxy: Annotated[str, typer.Option(help="A PROXY header in front: none, allowed or required.")] = "none",
    decline_tls: Annotated[
        bool, typer.Option("--decline-tls", help="Tell a PostgreSQL client that asks for TLS to go on without.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a broker would see in the first bytes of a connection: protocol, name, path, user, or why it refuses."""
    from fourtuple.cli import render
    from fourtuple.engine import PROBES, Prelude
    from fourtuple.engine import sniff as look

    probes = [name.strip() for name in only.split(",")] if only else list(PROBES)
    allowed = [prelude.value for prelude in Prelude]
    if proxy not in allowed:
        raise BadConfig("--proxy", f"{render.plain(proxy)[:40]!r} is not allowed; allowed are {', '.join(allowed)}")
    for name in probes:
        if name not in PROBES:
            why = f"{render.plain(name)[:40]!r} is no probe; allowed are {', '.join(PROBES)}"
            raise BadConfig("--only", why)
    shown = _shown(look(_read(file), probes=probes, prelude=Prelude(proxy), postgres_tls=not decline_tls))
    if as_json:
        render.emit(json.dumps(shown, indent=2) + "\n")
    else:
        render.emit("".join(f"{name.replace('_', ' '):<14} {_text(value)}\n" for name, value in shown.items()))


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read(MOST_BYTES)
    try:
        with Path(file).open("rb") as opening:
            return opening.read(MOST_BYTES)
    except (OSError, ValueError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else problem
        raise BadConfig("sniff FILE", f"{file[:200]!r} cannot be read: {why}") from None


def _shown(seen: Sniffed) -> dict[str, Any]:
    """What is there, and the verdict in any case; bytes as text with escapes, as in a Python literal."""
    there = {name: value for name, value in asdict(seen).items() if value not in (None, (), False)}
    if seen.path is None or seen.path_is_plain:
        there.pop("path_is_plain", None)
    else:
        there["path_is_plain"] = False
    return {name: _plain(value) for name, value in there.items()}


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return "".join(chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in value)
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
