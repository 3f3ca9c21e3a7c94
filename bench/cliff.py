"""The cliff: what a connect() costs as a port range fills up, by who chooses the port.

Decides which choices are compared and what is taken of each curve. A range of 10,000 ports, one source address, one
destination: at the end every tuple is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.arena import client

FIRST_PORT, LAST_PORT = 20_000, 29_999


@dataclass(frozen=True, slots=True, kw_only=True)
class Chooser:
    """One row: a script of `peers/`, its third argument (how many, or the range) and the rest."""

    name: str
    script: str
    arguments: tuple[str, ...]


COUNT, RANGE = str(LAST_PORT - FIRST_PORT + 1), f"{FIRST_PORT}-{LAST_PORT}"
CHOOSERS = (
    Chooser(name="plain connect(), kernel's choice", script="cliff_client", arguments=(COUNT, "kernel")),
    Chooser(name="plain bind(ip, 0) + connect()", script="cliff_client", arguments=(COUNT, "bind-zero")),
    Chooser(
        name="fourtuple epoll, kernel's choice",
        script="fourtuple_cliff_client",
        arguments=(RANGE, "epoll", "kernel"),
    ),
    Chooser(
        name="fourtuple epoll, kernel-range",
        script="fourtuple_cliff_client",
        arguments=(RANGE, "epoll", "kernel-range"),
    ),
    Chooser(
        name="fourtuple epoll, single-port",
        script="fourtuple_cliff_client",
        arguments=(RANGE, "epoll", "single-port"),
    ),
    Chooser(name="fourtuple epoll, bind", script="fourtuple_cliff_client", arguments=(RANGE, "epoll", "bind")),
    Chooser(
        name="fourtuple uring, single-port",
        script="fourtuple_cliff_client",
        arguments=(RANGE, "uring", "single-port"),
    ),
    Chooser(name="fourtuple uring, bind", script="fourtuple_cliff_client", arguments=(RANGE, "uring", "bind")),
)


def run(chooser: Chooser) -> dict[str, Any]:
    """Fill the range; the median cost in microseconds in each hundredth, and how far it came in how long."""
    ports = f"{FIRST_PORT} {LAST_PORT}"
    with client(chooser.script, *chooser.arguments, ports=ports) as process:
        process.step()
        numbers = process.step().numbers
    curve_us = [cost_ns / 1_000 for cost_ns in numbers["curve_ns"]]
    return {"connected": numbers["connected"], "seconds": numbers["seconds"], "curve_us": curve_us}


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median curve, its cost at 1, 50 and 99 % fill, and the ratio that the cliff is."""
    curve_us = [median(costs) for costs in zip(*(one["curve_us"] for one in runs), strict=False)]
    at = {f"us_at_{percent}_percent": curve_us[percent - 1] for percent in (1, 50, 90, 99)}
    ratio = at["us_at_99_percent"] / at["us_at_1_percent"]
    connected = median(one["connected"] for one in runs)
    return {"connected": connected, **at, "ratio_99_to_1": ratio, "curve_us": curve_us, "runs": runs}
