"""Sniffers written in Python: `@sniffer("name")` above a function that looks at the first bytes of a connection.

Decides what such a function may say, and how a process asks the functions of its modules: one question at a time, each
answered. Executed (`python -m fourtuple.plugin MEMORY CHANNEL MODULE ...`) it is that process; the channel is a
descriptor. It bounds its own memory; its time is bounded by whoever asks (`fourtuple.supervisor.plugins`).

    from fourtuple.plugin import Match, More, No, sniffer

    @sniffer("gopher")
    def gopher(opening: bytes) -> Match | More | No:
        if b"\\r\\n" not in opening:
            return More()
        return Match(name=opening.partition(b"\\r\\n")[0].decode()) if opening.startswith(b"/") else No()
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from msgspec import Struct
from msgspec.structs import asdict

from fourtuple.errors import BadConfig

OPENING_BYTES = 4_096
"""A function sees so many bytes at most."""
MESSAGE_BYTES = 65_536
_PR_SET_PDEATHSIG = 1


class Match(Struct, frozen=True, kw_only=True):
    """It is this protocol, and says so much of where it wants to go; what it does not say is None."""

    name: str | None = None
    user: str | None = None
    database: str | None = None
    client: str | None = None


class More(Struct, frozen=True):
    """It may be this protocol: ask again when there are more bytes."""


class No(Struct, frozen=True):
    """It is another."""


Verdict: TypeAlias = Match | More | No
Sniffer: TypeAlias = Callable[[bytes], Verdict]

_SNIFFERS: dict[str, Sniffer] = {}


def sniffer(name: str) -> Callable[[Sniffer], Sniffer]:
    """Have the function asked about connections that no probe of the broker knows, in the order in which they are made.

    A route has it as `protocol = "plugin:NAME"`. Raises BadConfig for a name that is none, or is taken.
    """
    if re.fullmatch("[a-z0-9_-]{1,32}", name) is None:
        raise BadConfig("sniffer", f"{name[:40]!r}; a name of 1 to 32 of a-z, 0-9, - and _ is needed")

    def register(function: Sniffer) -> Sniffer:
        if _SNIFFERS.setdefault(name, function) is not function:
            raise BadConfig("sniffer", f"{name!r} is taken by another function")
        return function

    return register


def judge(opening: bytes, *, is_all: bool, sniffers: Iterable[tuple[str, Sniffer]] | None = None) -> dict[str, Any]:
    """What the functions say together: the first that matches, else whether one of them needs more.

    One that raises, or says something else, has said No and is named in `raised`.
    """
    raised: dict[str, str] = {}
    wants_more = False
    for name, function in _SNIFFERS.items() if sniffers is None else sniffers:
        try:
            match function(opening):
                case Match() as found:
                    fields = {key: _text(value) for key, value in asdict(found).items() if value is not None}
                    return {"verdict": "match", "protocol": f"plugin:{name}", "fields": fields, "raised": raised}
                case More():
                    wants_more = True
                case No():
                    pass
                case other:
                    raise TypeError(f"said {type(other).__name__}; Match, More or No is needed")
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {error}"[:200]
    return {"verdict": "more" if wants_more and not is_all else "no", "raised": raised}


def _text(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value.encode()) <= 255:
        raise ValueError(f"{str(value)[:40]!r} is no text of 1 to 255 bytes")
    return value


def main(memory_bytes: int, descriptor: int, modules: list[str]) -> int:
    """Answer what comes through the channel until it is closed."""
    # Whoever asks may be gone while a function runs for ever: prctl(2). Libraries are loaded before memory is bounded.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as channel:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        try:
            for module in modules:
                importlib.import_module(module)
        except BaseException as error:
            channel.send(json.dumps({"failed": f"{type(error).__name__}: {error}"[:500]}).encode())
            return 1
        channel.send(json.dumps({"ready": list(_SNIFFERS)}).encode())
        while message := channel.recv(MESSAGE_BYTES):
            flags, opening = message[0], message[1:]
            channel.send(json.dumps(judge(opening, is_all=flags != 0)).encode())
    return 0


if __name__ == "__main__":
    # Functions register with the module by its name, which this one does not have when it is executed.
    from fourtuple import plugin

    os.set_inheritable(int(sys.argv[2]), False)
    sys.exit(plugin.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
