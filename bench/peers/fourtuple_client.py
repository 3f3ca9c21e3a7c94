"""Our load engine in one worker, as others would use it from Python.

fourtuple_client HOST PORT CONNECTIONS uring|epoll
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from ipaddress import ip_address

from bench.peers.steps import Step
from fourtuple.engine import CarrierName, Engine, LoadConfig, Phase, Snapshot
from fourtuple.tuples import AddressSet, PortSet, TupleSpace

GLANCE_S = 0.001


def main(host: str, port: int, connections: int, carrier: str) -> None:
    """Connect, hold, send each its token and have it back."""
    space = TupleSpace(
        sources=AddressSet.of(ip_address(host)),
        source_ports=PortSet.parse("1024-65535").subtract(PortSet.of(port)),
        destinations=AddressSet.of(ip_address(host)),
        destination_ports=PortSet.of(port),
    )
    step = Step()
    step.done()
    with Engine.start(LoadConfig(space=space, connections=connections), CarrierName(carrier), workers=1) as engine:
        now = _when(engine, lambda now: now.phase is not Phase.RAMPING)
        step.done(connected=now.open_now)
        engine.ping()
        now = _when(engine, lambda now: now.pings_answered >= connections)
        step.done(echoed=now.pings_right)


def _when(engine: Engine, reached: Callable[[Snapshot], bool]) -> Snapshot:
    while not reached(now := engine.snapshot()):
        time.sleep(GLANCE_S)
    return now


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
