"""When memory is given back: after a flood, when an eighth is left, and once more when nobody is."""

from __future__ import annotations

from fourtuple.supervisor.ebb import Ebb


def test_after_a_flood_and_not_before() -> None:
    ebb = Ebb()
    counts = (0, 200, 10, 0, 800, 101, 100, 99, 50, 0, 0, 20, 0, 256, 0)
    given = [count for place, count in enumerate(counts) if ebb.seen(count) and place]
    assert given == [100, 0, 0]
