"""Step `addresses`: m source addresses x n destination addresses: the reach grows as the product.

Claims exact products, with addresses of three kinds: aliases, an AnyIP prefix (one route), and an IPv6 /64. The kernel
chooses the ports and says EADDRNOTAVAIL for each pair of addresses, so the numbers are its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from fourtuple.engine import LoadConfig, SourceChoice
from fourtuple.prove.model import Outcome, Row, Step
from fourtuple.prove.stage import ECHO_PORT, Meter, Stage, said, settle, space
from fourtuple.tuples import AddressSet

FIRST_PORT = 40_000
MOST_AT_ONCE = 110_000
ALIASES = "10.83.0.1-10.83.0.4"


@dataclass(frozen=True, slots=True)
class Product:
    """m sources x n destinations x ports, and where the addresses come from."""

    kind: str
    sources: str
    destinations: str
    ports: int


PRODUCTS = (
    Product("one address", "10.83.0.1", "10.82.1.1", 1_000),
    Product("aliases", ALIASES, "10.82.2.1", 1_000),
    Product("aliases", ALIASES, "10.82.3.1-10.82.3.4", 1_000),
    Product("AnyIP prefix", "10.81.7.0-10.81.7.31", "10.82.4.1-10.82.4.16", 200),
    Product("IPv6 /64", "fd81::1:0-fd81::1:1f", "fd82::1-fd82::10", 200),
)


def run(stage: Stage) -> None:
    """Each product in turn, in one lab."""
    client, server = stage.pair()
    client.add_addresses(AddressSet.parse(ALIASES))
    wildcards = (f"0.0.0.0:{ECHO_PORT}", *((f"[::]:{ECHO_PORT + 1}",) if stage.has_ipv6 else ()))
    stage.serve(server, MOST_AT_ONCE, *wildcards)
    for product in PRODUCTS:
        six = ":" in product.sources
        if six and not stage.has_ipv6:
            stage.stopped(f"{product.kind}: sources x destinations x ports", "ipv6-tuples", "this kernel has no IPv6")
            continue
        ports = product.ports // 4 if stage.options.quick else product.ports
        last = FIRST_PORT + ports - 1
        where = space(
            product.sources, f"{FIRST_PORT}-{last}", product.destinations, str(ECHO_PORT + 1 if six else ECHO_PORT)
        )
        expected = where.size
        m, n = where.sources.size, where.destinations.size
        claim = f"{product.kind}: {m} source{'s' * (m > 1)} x {n} destination{'s' * (n > 1)} reach {expected:,}"
        stage.say(claim)
        client.set_sysctl("net.ipv4.ip_local_port_range", f"{FIRST_PORT} {last}")
        meter = Meter(client, server)
        load = LoadConfig(
            space=where,
            connections=expected + 1,
            choice=SourceChoice.KERNEL_RANGE,
            give_up_after=8,
            abort_on_close=True,
        )
        fleet = stage.connect(client, load, claim, expected, workers=1)
        live, answer = fleet.total("open_now"), said(fleet.stopped_by)
        passed = live == expected and answer.startswith("EADDRNOTAVAIL")
        stage.add(
            Row(
                claim=claim,
                arithmetic=f"{m} x {n} x {ports:,} ports = {expected:,}",
                expected=expected,
                reached=live,
                bound_by="ephemeral-ports",
                kernel_said=answer,
                outcome=Outcome.PASSED if passed else Outcome.FAILED,
                seconds=meter.seconds(),
                kernel_bytes_per_socket=meter.kernel_bytes_each(2 * live),
                user_bytes_per_connection=meter.user_bytes_each(live),
            ),
            fleet,
        )
        fleet.close()
        settle()


ADDRESSES = Step(
    name="addresses",
    title="More addresses multiply",
    claim="With m source and n destination addresses the reach is m x n x ports.",
    run=run,
)
