"""Connections per second and user memory per connection: ours beside asyncio, uvloop and plain connect().

Decides which clients are compared and what is taken of each run. Every client gets the same server, the same port range
and the same number of connections; all runs of one round follow each other, so that a busy moment hits all.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.arena import client
from fourtuple.engine import uring_abilities
from fourtuple.errors import FourtupleError


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One row: a script of `peers/` and its arguments after host, port and number of connections."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()


CONTENDERS = (
    Contender(name="fourtuple uring", script="fourtuple_client", arguments=("uring",)),
    Contender(name="fourtuple epoll", script="fourtuple_client", arguments=("epoll",)),
    Contender(name="asyncio streams", script="asyncio_client", arguments=("streams", "asyncio")),
    Contender(name="asyncio protocol", script="asyncio_client", arguments=("protocol", "asyncio")),
    Contender(name="uvloop streams", script="asyncio_client", arguments=("streams", "uvloop")),
    Contender(name="uvloop protocol", script="asyncio_client", arguments=("protocol", "uvloop")),
    Contender(name="plain connect()", script="blocking_client"),
)


def absent(contender: Contender) -> str:
    """Why it cannot run here; empty if it can."""
    if "uvloop" in contender.arguments and importlib.util.find_spec("uvloop") is None:
        return "uvloop is not installed (pip install 'fourtuple[bench]')"
    if "uring" in contender.arguments:
        try:
            uring_abilities()
        except FourtupleError as problem:
            return str(problem)
    return ""


def run(contender: Contender, connections: int) -> dict[str, float]:
    """Connect, hold, echo once; RuntimeError if a connection or a token is missing."""
    with client(contender.script, *_arguments(contender, connections)) as process:
        before, connected, echoed = process.step(), process.step(), process.step()
    reached = (connected.numbers["connected"], echoed.numbers["echoed"])
    if reached != (connections, connections):
        raise RuntimeError(f"{contender.name}: connected {reached[0]:,} and echoed {reached[1]:,} of {connections:,}")
    return {
        "connections_per_s": connections / connected.numbers["seconds"],
        "cpu_us_per_connection": connected.numbers["cpu_s"] / connections * 1e6,
        "bytes_per_connection": (connected.private_bytes - before.private_bytes) / connections,
        "bytes_per_connection_after_echo": (echoed.private_bytes - before.private_bytes) / connections,
        "echoes_per_s": connections / echoed.numbers["seconds"],
    }


def medians(runs: list[dict[str, float]]) -> dict[str, Any]:
    """The median of each number over the runs, and the runs themselves."""
    return {key: median(one[key] for one in runs) for key in runs[0]} | {"runs": runs}


def _arguments(contender: Contender, connections: int) -> tuple[str, ...]:
    return (str(connections), *contender.arguments)
