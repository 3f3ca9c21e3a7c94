"""Step `cliff`: what a connect() costs as the ports fill up, when the kernel searches and when the port is chosen.

Claims that the kernel's search makes connect() many times dearer past half of the range (catalogue A3), and that a
chosen tuple costs the same at every fill. One attempt at a time, so that each time is that of one connection.
"""

from __future__ import annotations

from statistics import median

from fourtuple.engine import CarrierName, LoadConfig, SourceChoice
from fourtuple.lab import LabHost
from fourtuple.prove.fleet import Fleet, descriptors_each, hard_limit
from fourtuple.prove.model import Curve, Outcome, Row, Step
from fourtuple.prove.stage import ECHO_PORT, Meter, Stage, space

FIRST_PORT = 40_000
PORTS, QUICK_PORTS = 10_000, 4_000
MOST_RATIO = 1.3
"""A chosen tuple at the end of the range may cost this much more than one at the start."""
EDGE = 3
"""Hundredths of the range that stand for "1 %" and for "99 %"."""
ROUNDS, ROUNDS_OF_OURS = 3, 9
"""A chosen tuple is held to a ratio, and so is measured more often."""

Points = tuple[tuple[float, float], ...]


def run(stage: Stage) -> None:
    """The same range filled in several ways, each towards a destination of its own."""
    ports = QUICK_PORTS if stage.options.quick else PORTS
    client, server = stage.pair()
    stage.serve(server, ports, f"0.0.0.0:{ECHO_PORT}")
    if stage.carrier is CarrierName.EPOLL and ports > descriptors_each():
        why = f"one process, so that one attempt follows the other, needs {ports:,} descriptors; RLIMIT_NOFILE is "
        stage.stopped(CLIFF.claim, "descriptors-hard", why + f"{hard_limit():,}")
        return
    client.set_sysctl("net.ipv4.ip_local_port_range", f"{FIRST_PORT} {FIRST_PORT + ports - 1}")
    ways = (
        ("connect(), the kernel searches", SourceChoice.KERNEL),
        ("the kernel, one pass (IP_LOCAL_PORT_RANGE)", SourceChoice.KERNEL_RANGE),
        ("chosen, poisons nothing (single-port range)", SourceChoice.SINGLE_PORT),
        ("chosen, bind(address, port)", SourceChoice.BIND),
    )
    series: dict[str, Points] = {}
    number = 0
    for what, choice in ways:
        stage.say(f"{ports:,} ports, filled one by one: {what}")
        meter = Meter(client)
        ours = choice in (SourceChoice.SINGLE_PORT, SourceChoice.BIND)
        curves, fleets = [], []
        for _ in range(ROUNDS_OF_OURS if ours else ROUNDS):
            number += 1
            points, fleet = _curve(stage, client, choice, f"10.82.0.{number}", ports, what)
            curves.append(points)
            fleets.append(fleet)
        reached = min(fleet.total("open_now") for fleet in fleets)
        if reached < ports:
            row = Row(
                claim=f"{what}: cost over fill",
                expected=ports,
                reached=reached,
                outcome=Outcome.FAILED,
                kernel_said="the range was not filled",
            )
            stage.add(row, *fleets)
            continue
        series[what] = _least(curves)
        start = median(cost for fill, cost in series[what] if fill <= EDGE)
        end = median(cost for fill, cost in series[what] if fill > 100 - EDGE)
        ratio = end / start
        passed = not ours or ratio <= MOST_RATIO
        stage.add(
            Row(
                claim=f"{what}: {'flat' if ours else 'cost over fill'}",
                arithmetic=f"at 99 % <= {MOST_RATIO} x at 1 %" if ours else "a search of every port in use",
                expected=ports,
                reached=reached,
                kernel_said=f"{start:.1f} us at 1 %, {end:.1f} us at 99 %: {ratio:.2f} x",
                outcome=Outcome.PASSED if passed else Outcome.FAILED,
                seconds=meter.seconds(),
            )
        )
    stage.curves.append(
        Curve(
            title="Cost of a connection over fill",
            x_label="ports in use towards one destination, %",
            y_label="microseconds (median)",
            series=series,
            logarithmic=True,
        )
    )


def _least(curves: list[Points]) -> Points:
    """The least over the rounds, hundredth by hundredth: what else runs on the machine only ever adds."""
    costs: dict[float, list[float]] = {}
    for points in curves:
        for fill, cost in points:
            costs.setdefault(fill, []).append(cost)
    return tuple((fill, min(every)) for fill, every in sorted(costs.items()))


def _curve(
    stage: Stage, client: LabHost, choice: SourceChoice, destination: str, ports: int, what: str
) -> tuple[Points, Fleet]:
    """Fill the range towards one destination; (fill in %, median us) per hundredth, and who did it, closed."""
    where = space("10.81.0.1", f"{FIRST_PORT}-{FIRST_PORT + ports - 1}", destination)
    load = LoadConfig(
        space=where, connections=ports, choice=choice, window=1, keep_fill_curve=True, abort_on_close=True
    )
    fleet = stage.connect(client, load, what, ports, workers=1)
    ((curve,),) = (one.fill_curves for one in fleet.snapshots)
    points = tuple((place + 1.0, ns / 1_000) for place, (ns, count) in enumerate(curve) if count)
    # Closed with RST and waited for, so that neither TIME_WAIT nor a bind bucket is left for the next way (A8).
    fleet.close()
    return points, fleet


CLIFF = Step(
    name="cliff",
    title="The latency cliff",
    claim="Past half of the range the kernel's search makes connect() far dearer; a chosen one always costs the same.",
    run=run,
)
