"""The tables of counters in Rust and in Python are one table, and a snapshot has a field for each row."""

from fourtuple import _core  # noqa: TID251  # the table as Rust has it
from fourtuple.engine import Snapshot
from fourtuple.metrics import COUNTERS


def test_the_table_is_that_of_rust() -> None:
    assert [(row.name, row.unit, row.meaning) for row in COUNTERS] == _core.counters()


def test_names_are_unique() -> None:
    assert len({row.name for row in COUNTERS}) == len(COUNTERS)


def test_a_snapshot_has_a_field_for_each_counter() -> None:
    assert list(Snapshot.__struct_fields__)[: len(COUNTERS)] == [row.name for row in COUNTERS]


GAUGES = ["open_now", "listening_now", "openings_now", "sniffing_now", "delivering_now", "relaying_now"]
GAUGES += ["moving_now", "ferries_now", "parked_now"]


def test_only_the_numbers_of_now_are_gauges() -> None:
    assert [row.name for row in COUNTERS if row.is_gauge] == GAUGES
