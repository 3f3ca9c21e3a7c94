"""Step `descriptors`: RLIMIT_NOFILE bounds descriptors, and connections only where each one has a descriptor.

Claims EMFILE exactly at the limit with epoll, then many times the limit in one process with io_uring direct
descriptors, which live in the rings' own tables (catalogue B1, B5).
"""

from __future__ import annotations

from fourtuple.engine import CarrierName, LoadConfig, SourceChoice
from fourtuple.lab import LabHost
from fourtuple.prove.fleet import Fleet, hard_limit
from fourtuple.prove.model import Outcome, Row, Step
from fourtuple.prove.stage import ECHO_PORT, Meter, Stage, said, space

LIMIT = 4_096
BEYOND, QUICK_BEYOND = 100_000, 20_000
SOURCES = "10.81.0.0-10.81.0.15"
PORTS = "20000-59999"


def run(stage: Stage) -> None:
    """The wall, then past it in the same process."""
    client, server = stage.pair()
    connections = QUICK_BEYOND if stage.options.quick else BEYOND
    stage.serve(server, connections, f"0.0.0.0:{ECHO_PORT}")
    limit, _ = client.limit_descriptors(min(LIMIT, hard_limit()))
    _wall(stage, client, limit)
    claim = f"one process with RLIMIT_NOFILE {limit:,} holds {connections:,} connections"
    stage.say(claim)
    if stage.carrier is not CarrierName.URING:
        stage.stopped(claim, "direct-descriptors", f"needs direct descriptors: {stage.carrier_reason}")
        return
    meter = Meter(client)
    load = LoadConfig(space=space(SOURCES, PORTS, "10.82.1.1"), connections=connections, choice=SourceChoice.BIND)
    fleet = stage.connect(client, load, claim, connections)
    live, descriptors = fleet.total("open_now"), client.descriptors_open()
    user_bytes = meter.user_bytes_each(live)
    stage.ping(fleet, f"{connections:,} tokens", connections)
    tokens, rings = fleet.total("pings_right"), sum(one.carrier.rings for one in fleet.snapshots)
    passed = live == connections == tokens and descriptors < limit
    stage.add(
        Row(
            claim=claim,
            arithmetic=f"{rings} rings x {limit:,} slots (a ring's table is bounded by RLIMIT_NOFILE, too)",
            expected=connections,
            reached=tokens,
            kernel_said=f"{descriptors:,} descriptors open in the process",
            outcome=Outcome.PASSED if passed else Outcome.FAILED,
            seconds=meter.seconds(),
            user_bytes_per_connection=user_bytes,
        ),
        fleet,
    )


def _wall(stage: Stage, client: LabHost, limit: int) -> None:
    load = LoadConfig(
        space=space(SOURCES, PORTS, "10.82.0.1"),
        connections=2 * limit,
        choice=SourceChoice.BIND,
        abort_on_close=True,
        window=64,
        give_up_after=64,
    )
    claim = f"with a descriptor for each connection, RLIMIT_NOFILE {limit:,} is the wall"
    stage.say(claim)
    meter = Meter(client)
    fleet = Fleet([client], [client.start_engine(load, CarrierName.EPOLL, 1)])
    fleet.fill(lambda open_now: stage.progressed(claim, open_now, limit))
    live, answer = fleet.total("open_now"), said(fleet.stopped_by)
    own = client.descriptors_open() - live
    fleet.close()
    expected = limit - own
    stage.add(
        Row(
            claim=claim,
            arithmetic=f"{limit:,} - {own} open for other things = {expected:,}",
            expected=expected,
            reached=live,
            bound_by="descriptors-soft",
            kernel_said=answer,
            outcome=Outcome.PASSED if live == expected and answer.startswith("EMFILE") else Outcome.FAILED,
            seconds=meter.seconds(),
        )
    )


DESCRIPTORS = Step(
    name="descriptors",
    title="Past RLIMIT_NOFILE",
    claim="Descriptors bound only programs that need one per connection; io_uring's direct ones are not counted.",
    run=run,
)
