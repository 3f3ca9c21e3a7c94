"""When memory is given back: after a flood, when an eighth is left, and once more when nobody is."""

from __future__ import annotations

import os

import pytest

from fourtuple.supervisor import ebb as module
from fourtuple.supervisor.ebb import Ebb, Surplus, anonymous_bytes


def test_after_a_flood_and_not_before() -> None:
    ebb = Ebb()
    counts = (0, 200, 10, 0, 800, 101, 100, 99, 50, 0, 0, 20, 0, 256, 0)
    given = [count for place, count in enumerate(counts) if ebb.seen(count) and place]
    assert given == [100, 0, 0]


MIB = 1 << 20


def test_what_a_flood_has_left_is_told_once_and_only_if_it_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    held = 0
    monkeypatch.setattr(module, "anonymous_bytes", lambda _pids: held)
    surplus = Surplus()
    told = []
    for second, count, mib in (
        (0, 0, 40),
        (1, 10, 60),
        # No flood was there.
        (20, 0, 60),
        (21, 300, 70),
        (22, 0, 70),
        (26, 0, 70),
        (27, 0, 70),
        (28, 0, 70),
        # One that is interrupted begins anew.
        (30, 300, 70),
        (31, 0, 70),
        (35, 400, 70),
        (36, 100, 70),
        (40, 100, 70),
        (41, 100, 70),
        (50, 300, 48),
        (60, 0, 48),
        (70, 0, 48),
        (80, 0, 49),
    ):
        held = mib * MIB
        if (found := surplus.seen(count, float(second), ())) is not None:
            told.append((second, *(one // MIB for one in found)))
    assert told == [(27, 40, 70), (41, 40, 70)]


def test_memory_of_processes() -> None:
    before = anonymous_bytes((os.getpid(),))
    block = bytearray(os.urandom(32 * MIB))
    after = anonymous_bytes((os.getpid(),))
    assert before is not None
    assert after is not None
    assert after - before >= len(block) - MIB
    assert anonymous_bytes((os.getpid(), os.getpid())) == pytest.approx(2 * after, rel=0.1)
    assert anonymous_bytes((os.getpid(), 1 << 30)) is None
