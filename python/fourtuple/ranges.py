"""Sets of integers kept as sorted runs: what address sets and port sets have in common.

Decides set arithmetic on runs, whose cost depends on the number of runs and never on the number of members. Does not
know what the integers stand for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

from fourtuple.errors import BadConfig

Run = tuple[int, int]
"""First and last of some integers in a row."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeSet(Generic[Item]):
    """A set of integers that stand for addresses or ports: sorted runs with a gap between any two."""

    runs: tuple[Run, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", _normalised(self.runs))

    def _item(self, number: int) -> Item:
        raise NotImplementedError

    def _number(self, item: object) -> int | None:
        """The integer that stands for the item; None if it can be in no set of this kind."""
        raise NotImplementedError

    def _require_same_kind(self, other: Self) -> None:
        """Raise BadConfig if the members of the two are not comparable."""

    @property
    def size(self) -> int:
        """How many members, exactly; `len` is the same, but Python bounds it at sys.maxsize."""
        return sum(last - first + 1 for first, last in self.runs)

    def __len__(self) -> int:
        return self.size

    def __bool__(self) -> bool:
        return bool(self.runs)

    def __contains__(self, item: object) -> bool:
        number = self._number(item)
        if number is None:
            return False
        position = bisect_right(self.runs, number, key=lambda run: run[0]) - 1
        return position >= 0 and number <= self.runs[position][1]

    def __iter__(self) -> Iterator[Item]:
        return (self._item(number) for first, last in self.runs for number in range(first, last + 1))

    def nth(self, index: int) -> Item:
        """The member at `index` in ascending order, from 0; IndexError outside."""
        rest = index
        if index >= 0:
            for first, last in self.runs:
                if rest <= last - first:
                    return self._item(first + rest)
                rest -= last - first + 1
        raise IndexError(f"index {index} is not in 0..{self.size - 1}")

    def ranges(self) -> tuple[tuple[Item, Item], ...]:
        """First and last member of each run."""
        return tuple((self._item(first), self._item(last)) for first, last in self.runs)

    def union(self, other: Self) -> Self:
        """Members of either."""
        self._require_same_kind(other)
        return replace(self, runs=self.runs + other.runs)

    def intersect(self, other: Self) -> Self:
        """Members of both."""
        self._require_same_kind(other)
        return replace(self, runs=_intersection(self.runs, other.runs))

    def subtract(self, other: Self) -> Self:
        """Members of this set that the other lacks."""
        self._require_same_kind(other)
        if not self.runs:
            return self
        return replace(self, runs=_intersection(self.runs, _gaps(other.runs, self.runs[0][0], self.runs[-1][1])))

    def between(self, start: int, stop: int) -> Self:
        """The members at positions start..stop-1 in ascending order."""
        picked: list[Run] = []
        position = 0
        for first, last in self.runs:
            after = position + last - first + 1
            low, high = max(start, position), min(stop, after)
            if low < high:
                picked.append((first + low - position, first + high - 1 - position))
            position = after
        return replace(self, runs=tuple(picked))

    def split(self, shares: int) -> tuple[Self, ...]:
        """Disjoint sets that together are this one; their sizes differ by at most one."""
        return tuple(self.between(start, stop) for start, stop in cuts(self.size, shares))

    def __str__(self) -> str:
        return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in self.ranges())


def cuts(size: int, shares: int) -> list[Run]:
    """Where to cut `size` things in a row into equal shares: start and stop of each; sizes differ by at most one."""
    if shares < 1:
        raise BadConfig("shares", f"{shares}: a whole number, 1 or more")
    return [(index * size // shares, (index + 1) * size // shares) for index in range(shares)]


def _normalised(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Sorted, and joined where they overlap or touch."""
    joined: list[Run] = []
    for first, last in sorted(runs):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return tuple(joined)


def _intersection(ours: Sequence[Run], theirs: Sequence[Run]) -> tuple[Run, ...]:
    found: list[Run] = []
    left = right = 0
    while left < len(ours) and right < len(theirs):
        first, last = max(ours[left][0], theirs[right][0]), min(ours[left][1], theirs[right][1])
        if first <= last:
            found.append((first, last))
        if ours[left][1] < theirs[right][1]:
            left += 1
        else:
            right += 1
    return tuple(found)


def _gaps(runs: Iterable[Run], low: int, high: int) -> tuple[Run, ...]:
    """What the runs leave free in low..high."""
    free: list[Run] = []
    for first, last in runs:
        if low < first:
            free.append((low, min(first - 1, high)))
        low = max(low, last + 1)
        if low > high:
            return tuple(free)
    return (*free, (low, high))
