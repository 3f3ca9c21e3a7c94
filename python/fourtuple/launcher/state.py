"""What a launcher knows, as JSON: for the next image of the same process, whose children the services then still are.

Decides the form and its version. Reading it starts, signals and opens nothing, so that new code can
try whether it understands it before it has to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from fourtuple.errors import BadConfig
from fourtuple.services import Delivery
from fourtuple.templates import Call, Template

VERSION = 1


class Record(Struct, frozen=True, kw_only=True):
    """A service that is not dormant and has processes."""

    call: Call
    template: Template
    key: str
    single: bool
    mark: int
    phase: str
    pid: int
    user: int
    since_s: float
    ready_s: float
    until_s: float
    """Times on the monotonic clock, which goes on across execve()."""
    file: tuple[int, int] | None
    cgroup: str | None
    word: int | None
    """Which of the descriptors that come along."""
    status: int | None
    """Of its first process, if that has ended."""


class Saved(Struct, frozen=True, kw_only=True):
    """All of it."""

    marks: tuple[int, int]
    records: tuple[Record, ...]
    crashes: Mapping[str, tuple[int, float]]
    """How often each has failed in a row, and until when it is not tried again."""

    def row(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "version": VERSION,
            "marks": list(self.marks),
            "records": [_row(record) for record in self.records],
            "crashes": {service: list(both) for service, both in self.crashes.items()},
        }

    @classmethod
    def read(cls, row: object) -> Saved:
        """BadConfig if it is of another version, or not what `row` makes."""
        if not isinstance(row, dict) or row.get("version") != VERSION:
            raise BadConfig("version", f"is not {VERSION}, the one that can be read")
        try:
            return cls(
                marks=_pair(row["marks"]),
                records=tuple(_record(one) for one in _list(row["records"])),
                crashes={name: (int(both[0]), float(both[1])) for name, both in _mapping(row["crashes"]).items()},
            )
        except BadConfig:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BadConfig("state", f"is not what a launcher of version {VERSION} saves: {error!r}") from None


def _row(record: Record) -> dict[str, object]:
    call = asdict(record.call) | {"delivery": record.call.delivery.value}
    rest = {key: getattr(record, key) for key in Record.__struct_fields__}
    return rest | {"call": call, "template": record.template.row(), "file": record.file and list(record.file)}


def _record(one: object) -> Record:
    given = dict(_mapping(one))
    call = dict(_mapping(given.pop("call")))
    file = given.pop("file")
    return Record(
        call=Call(**(call | {"delivery": Delivery(call["delivery"])})),
        template=Template.from_row(_mapping(given.pop("template"))),
        file=None if file is None else _pair(file),
        **given,
    )


def _mapping(given: object) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise TypeError(f"{given!r} is no object")
    return given


def _list(given: object) -> list[Any]:
    if not isinstance(given, list):
        raise TypeError(f"{given!r} is no list")
    return given


def _pair(given: object) -> tuple[int, int]:
    first, second = _list(given)
    return int(first), int(second)
