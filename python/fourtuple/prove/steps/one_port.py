"""Step `one-port`: one source port carries thousands of connections at once.

Claims that a port is not used up by a connection: only the pair of sockets has to be unique. The refused duplicate of a
pair in use is the other half of the claim.
"""

from __future__ import annotations

from ipaddress import ip_address

from msgspec.structs import replace

from fourtuple.engine import CarrierName, LoadConfig, SourceChoice
from fourtuple.prove.fleet import descriptors_each
from fourtuple.prove.model import Outcome, Row, Step
from fourtuple.prove.stage import ECHO_PORT, Meter, Stage, said, space

PORT = 40_000
SOURCE = "10.81.0.1"
FIRST_DESTINATION = ip_address("10.82.0.1")
CONNECTIONS, QUICK_CONNECTIONS = 100_000, 10_000


def run(stage: Stage) -> None:
    """One port to as many destinations, then the duplicate."""
    connections = QUICK_CONNECTIONS if stage.options.quick else CONNECTIONS
    client, server = stage.pair()
    stage.serve(server, connections, f"0.0.0.0:{ECHO_PORT}")
    bound_by = ""
    if stage.carrier is CarrierName.EPOLL and connections > descriptors_each() - 2:
        # Listeners that share a wildcard share by source alone: the second lookup hashes INADDR_ANY in place of the
        # destination (__inet_lookup_listener), so that one process gets every connection of one port.
        connections, bound_by = descriptors_each() - 2, "descriptors-hard"
        stage.note(f"epoll ({stage.carrier_reason}): one process gets all, a descriptor each: {connections:,}")
    claim = f"source port {PORT} of one address holds {connections:,} connections at once"
    stage.say(claim)
    meter = Meter(client, server)
    last = FIRST_DESTINATION + (connections - 1)
    where = space(SOURCE, str(PORT), f"{FIRST_DESTINATION}-{last}")
    load = LoadConfig(space=where, connections=connections, choice=SourceChoice.SINGLE_PORT)
    fleet = stage.connect(client, load, claim, connections)
    live = fleet.total("open_now")
    kernel_bytes, user_bytes = meter.kernel_bytes_each(2 * live), meter.user_bytes_each(live)
    stage.ping(fleet, f"{connections:,} tokens through one port", connections)
    tokens = fleet.total("pings_right")
    passed = live == connections == tokens
    stage.add(
        Row(
            claim=claim,
            arithmetic=f"1 address x 1 port x {connections:,} destinations",
            expected=connections,
            reached=tokens,
            bound_by=bound_by,
            kernel_said=f"{tokens:,} tokens back over port {PORT}",
            outcome=Outcome.PASSED if passed else Outcome.FAILED,
            seconds=meter.seconds(),
            kernel_bytes_per_socket=kernel_bytes,
            user_bytes_per_connection=user_bytes,
        ),
        fleet,
    )
    for what, destination, expected in (
        ("a pair of sockets in use", FIRST_DESTINATION, "EADDRNOTAVAIL at connect()"),
        ("one more pair", last + 1, ""),
    ):
        once_more = replace(load, space=space(SOURCE, str(PORT), str(destination)), connections=1)
        attempt = stage.connect(client, once_more, what, 1, workers=1)
        answer = said(next((one for each in attempt.snapshots for one in each.failures), None))
        stands = attempt.total("open_now") == 1
        passed = answer == expected and stands == (not expected)
        stage.add(
            Row(
                claim=f"port {PORT} again, {what}: {'refused' if expected else 'stands'}",
                arithmetic="the same four values" if expected else "one of four values differs",
                expected=int(not expected),
                reached=int(stands),
                bound_by="four-tuple" if expected else "",
                kernel_said=answer or "ok",
                outcome=Outcome.PASSED if passed else Outcome.FAILED,
            )
        )


ONE_PORT = Step(
    name="one-port",
    title="One source port, many destinations",
    claim="A source port is not used up by a connection; only the pair of sockets must be unique.",
    run=run,
)
