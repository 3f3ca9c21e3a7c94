"""Step `exhaust`: one source address, one destination: the wall that people take for the limit of a host.

Claims that the number is the size of the ephemeral range and nothing else: it moves with the range, up to 65,535, and
it holds for outgoing connections to that one destination only. The kernel chooses every port here; fourtuple only asks.
"""

from __future__ import annotations

from ipaddress import ip_address

from msgspec.structs import replace

from fourtuple.engine import LoadConfig, SourceChoice
from fourtuple.lab import LabHost
from fourtuple.prove.fleet import Fleet
from fourtuple.prove.model import Outcome, Row, Step
from fourtuple.prove.stage import ECHO_PORT, Meter, Stage, said, space
from fourtuple.tuples import Endpoint

SMALL_RANGES = ((40_000, 40_099), (40_000, 40_100), (33_001, 35_000), (1_024, 5_023), (50_000, 50_020))
"""Even and odd sizes, even and odd starts."""
DEFAULT_RANGE, WIDE_RANGE, EVERY_PORT = (32_768, 60_999), (1_024, 65_535), (1, 65_535)
SURPLUS = 100
"""Connections asked for beyond what the arithmetic allows, so that it is the kernel that says no."""
DESTINATIONS = {4: "10.82.0.", 6: "fd82::"}
ANOTHER_SOURCE = ip_address("10.81.0.9")
INBOUND = Endpoint(ip_address("10.81.0.10"), 7_000)
MOST_AT_ONCE = 65_535


def run(stage: Stage) -> None:
    """Fill several ranges, then the widest, and meet the error that follows."""
    client, server = stage.pair()
    client.set_sysctl("net.ipv4.ip_unprivileged_port_start", 0)
    versions = (4, 6) if stage.has_ipv6 else (4,)
    wildcards = {4: f"0.0.0.0:{ECHO_PORT}", 6: f"[::]:{ECHO_PORT + 1}"}
    if not stage.has_ipv6:
        stage.stopped("IPv6: ranges of ports run out as with IPv4", "ipv6-tuples", "this kernel has no IPv6")
    stage.serve(server, MOST_AT_ONCE, *(wildcards[version] for version in versions))
    fills = [(version, ports, SourceChoice.KERNEL) for version in versions for ports in SMALL_RANGES]
    # The default range is filled as any program does it, cliff and all; the widest in one pass per port, to be quicker.
    fills.append((4, DEFAULT_RANGE, SourceChoice.KERNEL_RANGE if stage.options.quick else SourceChoice.KERNEL))
    if not stage.options.quick:
        fills.append((4, WIDE_RANGE, SourceChoice.KERNEL_RANGE))
    fills.append((4, EVERY_PORT, SourceChoice.KERNEL_RANGE))
    for number, (version, ports, choice) in enumerate(fills, start=1):
        # Each fill has a destination of its own, so that nothing is left of the one before: no tuple, no TIME_WAIT.
        destination = f"{DESTINATIONS[version]}{number}"
        filled = _fill(stage, client, ports, version, destination, choice)
        if ports == EVERY_PORT and filled[0].total("open_now") == MOST_AT_ONCE:
            _beyond(stage, client, server, destination)
        for fleet in filled:
            fleet.close()


def _fill(
    stage: Stage, client: LabHost, ports: tuple[int, int], version: int, destination: str, choice: SourceChoice
) -> list[Fleet]:
    """Connect until the kernel has no port left; the connections still stand afterwards."""
    first, last = ports
    size = last - first + 1
    claim = f"IPv{version}: the range {first}-{last} gives one address {size:,} connections to one destination"
    stage.say(claim)
    client.set_sysctl("net.ipv4.ip_local_port_range", f"{first} {last}")
    meter = Meter(client)
    # connect() alone takes the route's own source address (A18); the other choices are told the same one.
    source = next(one for one in client.links["server"].addresses if one.version == version)
    where = space(str(source), f"{first}-{last}", destination, str(ECHO_PORT if version == 4 else ECHO_PORT + 1))
    load = LoadConfig(space=where, connections=size + SURPLUS, choice=choice, give_up_after=8, abort_on_close=True)
    fleets = [stage.connect(client, load, claim, size, workers=1)]
    by_itself = reached = fleets[0].total("open_now")
    answer = said(fleets[0].stopped_by)
    if choice is SourceChoice.KERNEL and size % 2 and by_itself == size - 1:
        # connect() alone rounds an odd range down to even and may never look at one port (`remaining &= ~1U` in
        # __inet_hash_connect). With IP_LOCAL_PORT_RANGE it looks at each.
        one_pass = replace(load, choice=SourceChoice.KERNEL_RANGE, connections=SURPLUS)
        fleets.append(stage.connect(client, one_pass, claim, 1, workers=1))
        reached += fleets[1].total("open_now")
        answer += f" after {by_itself:,}, in one pass after {reached:,} (odd size: A2)"
    stage.add(
        Row(
            claim=claim,
            arithmetic=f"{last} - {first} + 1 = {size:,}",
            expected=size,
            reached=reached,
            bound_by="ephemeral-ports",
            kernel_said=answer,
            outcome=Outcome.PASSED if reached == size and "EADDRNOTAVAIL" in answer else Outcome.FAILED,
            seconds=meter.seconds(),
        ),
        *fleets,
    )
    return fleets


def _beyond(stage: Stage, client: LabHost, server: LabHost, full: str) -> None:
    """With all 65,535 ports of that address in use towards `full`: what still works, and what does not."""
    destination, another = Endpoint(ip_address(full), ECHO_PORT), Endpoint(ip_address("10.82.0.200"), ECHO_PORT)
    client.listen(INBOUND)
    elsewhere = client.connect_once(destination, source=ANOTHER_SOURCE)
    trials = (
        ("the 65,536th connection to that destination", "EADDRNOTAVAIL", client.connect_once(destination)),
        ("the same address to another destination", "ok", client.connect_once(another)),
        ("another address to the full destination", "ok", elsewhere),
        ("a connection coming in to the full host", "ok", server.connect_once(INBOUND)),
    )
    for what, expected, answer in trials:
        passed = answer == expected
        claim = f"all 65,535 ports in use: {what} {'is refused' if expected != 'ok' else 'stands'}"
        stage.add(
            Row(
                claim=claim,
                arithmetic="65,535 + 1 > 65,535" if expected != "ok" else "another tuple",
                reached=int(answer == "ok"),
                expected=int(expected == "ok"),
                bound_by="ephemeral-ports" if expected != "ok" else "",
                kernel_said=answer,
                outcome=Outcome.PASSED if passed else Outcome.FAILED,
            )
        )


EXHAUST = Step(
    name="exhaust",
    title="One address to one destination",
    claim="Ports run out at the size of the range, per source address and destination: never before, nor for others.",
    run=run,
)
