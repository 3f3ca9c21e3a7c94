"""What worker processes are told and tell: shares of a run that add up, histograms that merge, tallies that arrive."""

from __future__ import annotations

from collections import Counter
from math import ceil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourtuple.crew.tally import Histogram, Tally, Task
from fourtuple.errors import BadConfig, LimitReached
from fourtuple.load import Scenario, Target
from fourtuple.load.sessions import tasks
from fourtuple.tuples import AddressSet, PortSet, TupleSpace

SPACE = TupleSpace(
    sources=AddressSet.parse("10.0.0.1-10.0.0.4"),
    source_ports=PortSet.parse("40000-40100"),
    destinations=AddressSet.parse("10.0.0.9"),
    destination_ports=PortSet.of(80),
)


def scenario(connections: int, workers: int | None = None, rate_per_s: int = 0) -> Scenario:
    target = Target.parse("tcp://10.0.0.9:80")
    return Scenario(target=target, connections=connections, workers=workers, rate_per_s=rate_per_s)


def shares(connections: int, workers: int | None, descriptors: int = 20_000, rate_per_s: int = 0) -> tuple[Task, ...]:
    return tasks(scenario(connections, workers, rate_per_s), Path("script.py"), SPACE, descriptors)


@given(connections=st.integers(1, SPACE.size), workers=st.integers(1, 20))
def test_shares_add_up(connections: int, workers: int) -> None:
    made = shares(connections, workers, rate_per_s=1_000)
    assert [task.first_serial for task in made] == [
        sum(other.connections for other in made[:place]) for place in range(len(made))
    ]
    assert sum(task.connections for task in made) == connections
    ports = [port for task in made for port in PortSet.parse(task.ports)]
    assert sorted(ports) == list(SPACE.source_ports), "each port is one worker's"
    for task in made:
        assert task.connections <= len(PortSet.parse(task.ports)) * len(SPACE.sources), "each has room for its share"
    assert sum(task.rate_per_s for task in made) == pytest.approx(1_000)
    assert Task.decode(made[0].encode()) == made[0]


def test_descriptors_decide_how_many_processes() -> None:
    assert len(shares(400, None, descriptors=164)) == 4
    with pytest.raises(BadConfig, match="3 processes hold at most 300 connections") as refused:
        shares(400, 3, descriptors=164)
    assert refused.value.path == "--workers"
    with pytest.raises(LimitReached, match="descriptors-hard"):
        shares(1, None, descriptors=64)


@given(st.lists(st.integers(0, 10**12), min_size=1), st.lists(st.integers(0, 10**12)))
def test_histograms_merge_as_if_they_were_one(some: list[int], others: list[int]) -> None:
    one, other, whole = Histogram(), Histogram(), Histogram()
    for value in some:
        one.add(value)
    for value in others:
        other.add(value)
    for value in some + others:
        whole.add(value)
    one.merge(Histogram.of(other.plain()))
    assert one.plain() == whole.plain()
    assert (one.count, one.least, one.most) == (len(some + others), min(some + others), max(some + others))
    for share in (0.01, 0.5, 0.99, 1.0):
        exact = sorted(some + others)[ceil(share * one.count) - 1]
        assert one.quantile(share) == pytest.approx(exact, rel=0.016, abs=0.5)


def test_a_tally_crosses_whole_and_merges() -> None:
    tally = Tally(ready=True, counts=Counter(open_now=3), failures=Counter({("connect", 111): 2}))
    tally.raised["ValueError"] = (2, "line 1")
    tally.blocked["line 7"] = 1.5
    tally.connect_ns.add(1_000)
    arrived = Tally.decode(tally.encode())
    assert arrived.encode() == tally.encode()
    arrived.merge(tally)
    assert (arrived.counts["open_now"], arrived.failures["connect", 111]) == (6, 4)
    assert (arrived.raised, arrived.blocked) == ({"ValueError": (4, "line 1")}, {"line 7": 1.5})
    assert arrived.connect_ns.count == 2
