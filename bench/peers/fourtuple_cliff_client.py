"""What one connect() of our engine costs as a port range fills up, one attempt at a time.

fourtuple_cliff_client HOST PORT FIRST-LAST uring|epoll CHOICE; the connections are as many as the range has ports.
"""

from __future__ import annotations

import sys
import time
from ipaddress import ip_address

from bench.peers.steps import Step
from fourtuple.engine import CarrierName, Engine, LoadConfig, Phase, SourceChoice
from fourtuple.tuples import AddressSet, PortSet, TupleSpace

GLANCE_S = 0.01


def main(host: str, port: int, ports: PortSet, carrier: CarrierName, choice: SourceChoice) -> None:
    """Use the range up; the median cost of each hundredth of it, in nanoseconds."""
    space = TupleSpace(
        sources=AddressSet.of(ip_address(host)),
        source_ports=ports,
        destinations=AddressSet.of(ip_address(host)),
        destination_ports=PortSet.of(port),
    )
    load = LoadConfig(space=space, connections=ports.size, choice=choice, window=1, keep_fill_curve=True)
    step = Step()
    step.done()
    with Engine.start(load, carrier, workers=1) as engine:
        while (now := engine.snapshot()).phase is Phase.RAMPING:
            time.sleep(GLANCE_S)
        step.done(connected=now.open_now, curve_ns=[cost_ns for cost_ns, _ in now.fill_curves[0]])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), PortSet.parse(sys.argv[3]), CarrierName(sys.argv[4]), SourceChoice(sys.argv[5]))
