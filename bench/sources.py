"""What CPU time one connection of a client library costs from a `SourcePool` as the port range fills up.

Decides which libraries are measured and what is taken of each curve. One source address, one destination, and so many
ports that one process's descriptors just suffice: at the end every tuple is used. HTTP libraries send a request on each
connection, to nginx, and their figure holds that too. CPU time and not time: the search for a port, where there is
one, is the caller's own, and what else the machine does is in no figure.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from bench.arena import HOST, PORT, TIMEOUT_S, started, web_server
from bench.peers.source_clients import CLIENTS
from fourtuple.engine import EchoConfig
from fourtuple.errors import MissingFeature
from fourtuple.lab import Lab
from fourtuple.tuples import Endpoint

FIRST_PORT = 20_000
MOST_PORTS = 15_000
WEB_PORT = 800


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One row: a client library, and how many ports it fills."""

    name: str
    count: int


def libraries(count: int) -> list[Library]:
    """All of them."""
    return [Library(name=name, count=count) for name in CLIENTS]


def run(library: Library) -> dict[str, Any]:
    """Fill the range; the median cost in microseconds of CPU in each hundredth, and how far it came in how long."""
    server = Endpoint(ip_address(HOST), WEB_PORT if CLIENTS[library.name].speaks_http else PORT)
    with Lab(("bench",)) as lab, ExitStack() as servers:
        here = lab["bench"]
        here.set_sysctl("net.core.somaxconn", 65_535)
        if server.port == PORT:
            echo = here.start_engine(EchoConfig(listen=(server,), backlog=65_535), workers=1)
            echo.wait_for(lambda now: now.listening_now == 1, TIMEOUT_S)
        else:
            try:
                servers.enter_context(web_server(lab, here, (server,)))
            except MissingFeature as missing:
                raise RuntimeError(str(missing)) from None
        last_port = FIRST_PORT + library.count - 1
        here.set_sysctl("net.ipv4.ip_local_port_range", f"{FIRST_PORT} {last_port}")
        arguments = (library.name, "ours", "127.0.0.1", f"{FIRST_PORT}-{last_port}", str(library.count), str(server))
        with started(lab, here, "source_client", *arguments) as process:
            process.step()
            numbers = process.step().numbers
    if numbers["errors"]:
        raise RuntimeError(f"{numbers['connected']:,} connected, then {numbers['errors']}")
    curve_us = [cost_ns / 1_000 for cost_ns in numbers["curve_ns"]]
    return {"connected": numbers["connected"], "seconds": numbers["seconds"], "curve_us": curve_us}
