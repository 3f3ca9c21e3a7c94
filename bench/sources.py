"""What CPU time one connection of a client library costs from a `SourcePool` as a port range fills up.

Decides which libraries are measured on which range, by how many processes, and what is taken of each curve. One source
address and one destination: at the end every tuple is used. Processes share the range (`SourcePool.share`) and take
turns, a hundredth of the range at a time. HTTP libraries send a request on each connection, to nginx, and their figure
holds that too. CPU time and not time: the search for a port, where there is one, is the caller's own.

Two processors of a machine are often two threads of one core: what runs on the other makes each instruction up to 1.7
times as dear, and a curve shows that as hills. So there is a second figure at 1, 50, 90 and 99 %: the same library in
the same moments, beside each connection another one to a destination with nothing in use. Their quotient is what the
fill alone does. The rows of the kernel's own choice are one connection at a time into a range that a pool fills; where
the kernel fills it alone, odd ports before even ones, it is dearer from half of the range on: `bench.cliff`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from statistics import median
from typing import Any

from bench.arena import HOST, PORT, TIMEOUT_S, started, web_server
from bench.peers.source_clients import CLIENTS
from bench.peers.source_curve import CLOSE_LOOK
from fourtuple.engine import EchoConfig
from fourtuple.errors import MissingFeature
from fourtuple.lab import Lab
from fourtuple.tuples import Endpoint, PortSet

FIRST_PORT = 20_000
MOST_PORTS = 15_000
"""With the second figure's connections, what one process's descriptors suffice for where these numbers were set."""
WHOLE_RANGE = "1024-65535"
PROCESSES = 4
WEB_PORT = 800


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """One row: a client library, how it gets its ports, and the range that it fills in so many processes."""

    name: str
    client: str
    how: str
    ports: str
    processes: int = 1
    whole: bool = False
    """Whether the library opens every connection, or plain sockets of the same pool nine tenths between the figures."""


def libraries(count: int, *, whole: bool) -> list[Filling]:
    """All of them, one process each, on a range of `count` ports; and the kernel's own choice."""
    ports = f"{FIRST_PORT}-{FIRST_PORT + count - 1}"
    ours = [Filling(name=name, client=name, how="ours", ports=ports, whole=whole) for name in CLIENTS]
    return [*ours, Filling(name="blocking, kernel's choice", client="blocking", how="plain", ports=ports)]


def whole_range() -> list[Filling]:
    """1024-65535 in several processes, the kernel's own choice beside."""
    return [
        Filling(
            name=name if how == "ours" else f"{name}, kernel's choice",
            client=name,
            how=how,
            ports=WHOLE_RANGE,
            processes=PROCESSES,
        )
        for name in ("blocking", "asyncio")
        for how in ("ours", "plain")
    ]


def run(filling: Filling) -> dict[str, Any]:
    """Fill the range; the median cost in each hundredth in microseconds of CPU, and what it was beside."""
    ports = PortSet.parse(filling.ports)
    first_port, last_port = ports.runs[0]
    speaks_http = CLIENTS[filling.client].speaks_http
    number = WEB_PORT if speaks_http else PORT
    servers = tuple(Endpoint(ip_address(HOST), number + offset) for offset in (0, 1))
    with Lab(("bench",)) as lab, ExitStack() as running:
        here = lab["bench"]
        here.set_sysctl("net.core.somaxconn", 65_535)
        if speaks_http:
            try:
                running.enter_context(web_server(lab, here, servers))
            except MissingFeature as missing:
                raise RuntimeError(str(missing)) from None
        else:
            echo = here.start_engine(EchoConfig(listen=servers, backlog=65_535), workers=1)
            echo.wait_for(lambda now: now.listening_now == 2, TIMEOUT_S)
        here.set_sysctl("net.ipv4.ip_local_port_range", f"{first_port} {last_port}")
        fills = "whole" if filling.whole else "mixed"
        names = tuple(map(str, servers))
        processes = [
            running.enter_context(
                started(
                    lab,
                    here,
                    "source_curve",
                    *(filling.client, filling.how, fills, f"{index}/{filling.processes}"),
                    *("127.0.0.1", filling.ports, *names),
                )
            )
            for index in range(filling.processes)
        ]
        for process in processes:
            process.step()
        steps = [[process.step().numbers for process in processes] for _ in range(100)]
    curve_us = [_median_us(step, "costs_ns") for step in steps]
    beside_us = {percent: _median_us(steps[percent], "beside_ns") for percent in CLOSE_LOOK}
    seconds = sum(numbers["seconds"] for step in steps for numbers in step)
    return {"connected": ports.size, "seconds": seconds, "curve_us": curve_us, "beside_us": beside_us}


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median curve and costs; a curve's row `percent` is the hundredth that begins there: the last one is 99."""
    curve_us = [median(costs) for costs in zip(*(one["curve_us"] for one in runs), strict=True)]
    return {
        "connected": median(one["connected"] for one in runs),
        **{f"us_at_{percent}_percent": curve_us[percent] for percent in CLOSE_LOOK},
        "ratio_99_to_1": median(one["curve_us"][99] / one["curve_us"][1] for one in runs),
        "beside_99_to_1": median(one["beside_us"][99] / one["beside_us"][1] for one in runs),
        "by_fill_99_to_1": median(
            one["curve_us"][99] / one["beside_us"][99] * one["beside_us"][1] / one["curve_us"][1] for one in runs
        ),
        "curve_us": curve_us,
        "runs": runs,
    }


def _median_us(numbers: list[dict[str, Any]], which: str) -> float:
    costs_us: list[float] = [cost_ns / 1_000 for one in numbers for cost_ns in one[which]]
    return median(costs_us)
