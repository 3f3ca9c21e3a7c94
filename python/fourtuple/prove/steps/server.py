"""Step `server`: one listening port holds N connections at once, a million where memory allows.

Claims that the server's side of a connection needs no port: every client brings its own address and port. Each
connection sends a token of its own once all are up, and must read exactly that token back; a single wrong or missing
one fails.
"""

from __future__ import annotations

from ipaddress import ip_address

from fourtuple.engine import CarrierName, LoadConfig, SourceChoice
from fourtuple.lab import memory_room
from fourtuple.prove.fleet import MOST_PROCESSES, SPREAD, Fleet, descriptors_each
from fourtuple.prove.model import Curve, Outcome, Row, Step
from fourtuple.prove.stage import ECHO_PORT, Meter, Stage, space

MILLION, QUICK = 1_000_000, 100_000
BYTES_PER_SOCKET = 5_000
"""Kernel memory to set aside for an idle socket: 3,750 B of slab (catalogue C1) and the requests armed on it."""
KEEP_FREE = 0.1
"""Part of the available memory that is left alone."""
MOST = 65_535 * 64_512
"""Every address of the lab's client prefix but its first, with every port from 1024 on."""
FIRST_SOURCE = ip_address("10.81.0.1")
PORTS_EACH = 64_512
"""Ports 1024-65535 of each source address."""
DESTINATION = "10.82.0.1"


def run(stage: Stage) -> None:
    """Fill, hold, and have every token back."""
    asked = stage.options.connections
    wanted = asked or (QUICK if stage.options.quick else MILLION)
    client, server = stage.pair()
    before = Meter(client, server)
    connections, bound_by = _reach(stage, wanted)
    servers = stage.serve(server, connections, f"{DESTINATION}:{ECHO_PORT}")
    if stage.carrier is CarrierName.EPOLL:
        most = int(MOST_PROCESSES * descriptors_each() / SPREAD)
        stage.note(
            f"epoll ({stage.carrier_reason}): a descriptor for each connection at each end, {descriptors_each():,} "
            f"to a process (RLIMIT_NOFILE); up to {MOST_PROCESSES} processes at each end hold {most:,}"
        )
        connections, bound_by = (most, "descriptors-hard") if most < connections else (connections, bound_by)
    if asked and connections < asked:
        stage.stopped(f"one listening port holds {asked:,} connections", bound_by, f"room for {connections:,}")
    claim = f"one listening port holds {connections:,} connections"
    stage.say(claim)
    addresses = -(-connections // PORTS_EACH)
    load = LoadConfig(
        space=space(f"{FIRST_SOURCE}-{FIRST_SOURCE + addresses - 1}", "1024-65535", DESTINATION),
        connections=connections,
        choice=SourceChoice.BIND,
        ping_timeout_s=60.0,
    )
    opened: list[tuple[float, float]] = []
    memory: list[tuple[float, float]] = []
    meter = Meter(client, server)

    def sample(open_now: int) -> None:
        opened.append((round(meter.seconds(), 2), float(open_now)))
        memory.append((float(open_now), meter.kernel_bytes() / 2**20))

    fleet = stage.connect(client, load, claim, connections, each=sample)
    fill_s, kernel_bytes = meter.seconds(), before.kernel_bytes()
    user_bytes = before.user_bytes() + _of_the_others(servers) + _of_the_others(fleet)
    live = fleet.total("open_now")
    stage.note(f"{live:,} live at once after {fill_s:.1f} s: {live / fill_s:,.0f} connections/s")
    stage.ping(fleet, f"{live:,} tokens there and back", live)
    right, wrong, missing = (fleet.total(f"pings_{what}") for what in ("right", "wrong", "missing"))
    stage.note(f"all tokens after {meter.seconds():.1f} s: {right:,} right, {wrong:,} wrong, {missing:,} missing")
    stage.note(
        f"user memory of both ends over the start {user_bytes / 2**20:.1f} MiB, kernel {kernel_bytes / 2**30:.2f} GiB"
    )
    passed = live == connections == right and not wrong and not missing
    stage.add(
        Row(
            claim=claim,
            arithmetic=f"{addresses} source addresses x {PORTS_EACH:,} ports = {addresses * PORTS_EACH:,} tuples",
            expected=connections,
            reached=right,
            bound_by=bound_by,
            kernel_said=f"{right:,} tokens right, {wrong:,} wrong, {missing:,} missing",
            outcome=Outcome.PASSED if passed else Outcome.FAILED,
            seconds=fill_s,
            kernel_bytes_per_socket=kernel_bytes / max(1, 2 * live),
            user_bytes_per_connection=user_bytes / max(1, live),
        ),
        fleet,
    )
    stage.curves += _curves(opened, memory)


def _reach(stage: Stage, wanted: int) -> tuple[int, str]:
    """As many as memory allows, and what bounds them."""
    room_bytes, bound_by = memory_room()
    room = max(1, int(room_bytes * (1 - KEEP_FREE)) // (2 * BYTES_PER_SOCKET))
    if room >= wanted:
        return wanted, ""
    stage.note(
        f"memory ({bound_by}): {room:,} connections of 2 x {BYTES_PER_SOCKET:,} B fit into what is available, "
        f"{wanted:,} wanted"
    )
    return room, bound_by


def _of_the_others(fleet: Fleet) -> int:
    """Memory of the processes that joined the first one; they exist for their connections, so all of it counts."""
    return sum(host.rss_bytes() for host in fleet.hosts[1:])


def _curves(opened: list[tuple[float, float]], memory: list[tuple[float, float]]) -> tuple[Curve, Curve]:
    return (
        Curve(
            title="Connections to one port",
            x_label="seconds",
            y_label="connections",
            series={"open": tuple(opened)},
            marks=((65_536, "65,536"),),
        ),
        Curve(
            title="Kernel memory",
            x_label="connections (both ends on this host)",
            y_label="MiB of slab",
            series={"slab": tuple(memory)},
        ),
    )


SERVER = Step(
    name="server",
    title="One port, N connections",
    claim="A server needs no port per connection: one listening port holds as many as memory does.",
    run=run,
)
