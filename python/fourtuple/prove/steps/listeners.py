"""Step `listeners`: more listening sockets on one host than there are ports, each answering.

Claims that a listener is an address and a port, so that 65,536 is no bound for them either, and that one event loop
serves tens of thousands of listeners.
"""

from __future__ import annotations

from itertools import product

from fourtuple.engine import CarrierName, LoadConfig, SourceChoice
from fourtuple.lab import LabHost
from fourtuple.prove.fleet import Fleet, descriptors_each
from fourtuple.prove.model import Outcome, Row, Step
from fourtuple.prove.stage import Meter, Stage, space
from fourtuple.tuples import AddressSet, Endpoint, PortSet

ADDRESSES = "10.82.0.1-10.82.0.66"
FIRST_PORT = 2_000
PORTS_EACH, QUICK_PORTS_EACH = 1_000, 200
BACKLOG = 16


def run(stage: Stage) -> None:
    """Listen on all, then connect once to each and have a token back through it."""
    ports_each = QUICK_PORTS_EACH if stage.options.quick else PORTS_EACH
    ports = f"{FIRST_PORT}-{FIRST_PORT + ports_each - 1}"
    addresses = AddressSet.parse(ADDRESSES)
    endpoints = tuple(Endpoint(address, port) for address, port in product(addresses, PortSet.parse(ports)))
    client, server = stage.pair()
    claim = f"one host has {len(endpoints):,} listening sockets, and each answers"
    stage.say(claim)
    meter = Meter(client, server)
    servers = _listen(stage, server, endpoints)
    servers.look()
    listening = servers.total("listening_now")
    loops = sum(engine.workers for engine in servers.engines)
    stage.note(f"{listening:,} listening sockets in {loops} event loops after {meter.seconds():.1f} s")
    load = LoadConfig(
        space=space("10.81.0.1", "40000", ADDRESSES, ports),
        connections=len(endpoints),
        choice=SourceChoice.SINGLE_PORT,
        window=64,
    )
    fleet = stage.connect(client, load, claim, len(endpoints))
    stage.ping(fleet, f"{len(endpoints):,} tokens, one through each listener", len(endpoints))
    servers.look()
    served, tokens = servers.total("listeners_served"), fleet.total("pings_right")
    passed = listening == served == tokens == len(endpoints)
    stage.add(
        Row(
            claim=claim,
            arithmetic=f"{addresses.size} addresses x {ports_each:,} ports = {len(endpoints):,}",
            expected=len(endpoints),
            reached=min(listening, served, tokens),
            kernel_said=f"{listening:,} listening, {served:,} accepted one, {tokens:,} tokens right",
            outcome=Outcome.PASSED if passed else Outcome.FAILED,
            seconds=meter.seconds(),
        ),
        servers,
        fleet,
    )


def _listen(stage: Stage, server: LabHost, endpoints: tuple[Endpoint, ...]) -> Fleet:
    """All endpoints: in one process without descriptors, or shared out to as many as their descriptors need."""
    first = stage.serve_all(server, 0, endpoints[:1], BACKLOG)
    first.close()
    # With epoll a listener and its connection take a descriptor each.
    share = len(endpoints) if stage.carrier is CarrierName.URING else descriptors_each() // 2
    fleets = [
        stage.serve_all(server if start == 0 else server.another(), 0, endpoints[start : start + share], BACKLOG)
        for start in range(0, len(endpoints), share)
    ]
    return Fleet([host for one in fleets for host in one.hosts], [engine for one in fleets for engine in one.engines])


LISTENERS = Step(
    name="listeners",
    title="More listeners than ports",
    claim="A listening socket is an address and a port: a host can have more than 65,536 of them.",
    run=run,
)
