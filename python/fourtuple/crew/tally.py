"""What a worker process is told to do (`Task`) and what it has counted (`Tally`), as both cross the process boundary.

Decides the form: JSON, one message each; a tally is cumulative, so that a lost message loses nothing. Knows no process.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

BEGIN, ENOUGH, END = b"begin", b"enough", b"end"
"""Orders to a worker: connect; make no connections that were not made yet; end all and go."""
MOST_KINDS = 32
"""Of exceptions that are told apart."""
_STEPS_PER_OCTAVE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One worker's share of a run."""

    script: str
    parent_pid: int
    first_serial: int
    connections: int
    sources: str
    ports: str
    destinations: str
    destination_ports: str
    rate_per_s: float
    """0 is as fast as possible."""
    window: int
    connect_timeout_s: float
    answer_timeout_s: float
    replace: bool
    close_with_fin: bool
    memory_bytes: int

    def encode(self) -> bytes:
        """As one message."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> Task:
        """From one message."""
        return cls(**json.loads(message))


class Histogram:
    """Times in nanoseconds, each known to 1.6 %: 32 steps to each doubling."""

    __slots__ = ("counts", "least", "most", "total")

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.least = self.most = self.total = 0

    def add(self, value_ns: int) -> None:
        """One more."""
        self.least = min(self.least, value_ns) if self.counts else value_ns
        shift = max(0, value_ns.bit_length() - 6)
        self.counts[shift * _STEPS_PER_OCTAVE + (value_ns >> shift)] += 1
        self.most = max(self.most, value_ns)
        self.total += value_ns

    def merge(self, other: Histogram) -> None:
        """Add all of another one's."""
        if other.counts:
            self.least = min(self.least, other.least) if self.counts else other.least
        self.counts += other.counts
        self.most = max(self.most, other.most)
        self.total += other.total

    @property
    def count(self) -> int:
        """How many there are."""
        return self.counts.total()

    def quantile(self, share: float) -> int:
        """The value that this share of them does not exceed."""
        wanted, seen = share * self.count, 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return min(self.most, max(self.least, _middle(bucket)))
        return self.most

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {"counts": dict(self.counts), "least": self.least, "most": self.most, "total": self.total}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Histogram:
        """From `plain`."""
        made = cls()
        made.counts = Counter({int(bucket): count for bucket, count in plain["counts"].items()})
        made.least, made.most, made.total = plain["least"], plain["most"], plain["total"]
        return made


def _middle(bucket: int) -> int:
    shift = max(0, bucket // _STEPS_PER_OCTAVE - 1)
    return ((bucket - shift * _STEPS_PER_OCTAVE) << shift) + ((1 << shift) >> 1)


@dataclass(slots=True, kw_only=True)
class Tally:
    """What one worker has counted so far, or several together."""

    ready: bool = False
    """The script is loaded."""
    refused: str = ""
    """Why the script cannot be played."""
    ramping: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    """By the names of the engine's counters (`fourtuple.metrics`), and `sessions_ended`."""
    failures: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By step and errno."""
    raised: dict[str, tuple[int, str]] = field(default_factory=dict)
    """What the script raised: how often, and where the first time."""
    blocked: dict[str, float] = field(default_factory=dict)
    """Where the script kept all other sessions of its process waiting, and the longest such time in seconds."""
    unwilling: int = 0
    """Sessions that did not end when they were told to."""
    connect_ns: Histogram = field(default_factory=Histogram)
    round_ns: Histogram = field(default_factory=Histogram)

    def encode(self) -> bytes:
        """As one message."""
        plain = {
            "ready": self.ready,
            "refused": self.refused,
            "ramping": self.ramping,
            "counts": dict(self.counts),
            "failures": [[*key, count] for key, count in self.failures.items()],
            "raised": self.raised,
            "blocked": dict(self.blocked),
            "unwilling": self.unwilling,
            "connect_ns": self.connect_ns.plain(),
            "round_ns": self.round_ns.plain(),
        }
        return json.dumps(plain).encode()

    @classmethod
    def decode(cls, message: bytes) -> Tally:
        """From one message."""
        plain = json.loads(message)
        return cls(
            ready=plain["ready"],
            refused=plain["refused"],
            ramping=plain["ramping"],
            counts=Counter(plain["counts"]),
            failures=Counter({(step, errno): count for step, errno, count in plain["failures"]}),
            raised={kind: (count, example) for kind, (count, example) in plain["raised"].items()},
            blocked=plain["blocked"],
            unwilling=plain["unwilling"],
            connect_ns=Histogram.of(plain["connect_ns"]),
            round_ns=Histogram.of(plain["round_ns"]),
        )

    def merge(self, other: Tally) -> None:
        """Add all of another worker's."""
        self.refused = self.refused or other.refused
        self.counts.update(other.counts)
        self.failures.update(other.failures)
        for kind, (count, example) in other.raised.items():
            known = self.raised.get(kind, (0, example))
            self.raised[kind] = (known[0] + count, known[1])
        for where, seconds in other.blocked.items():
            self.blocked[where] = max(seconds, self.blocked.get(where, 0.0))
        self.unwilling += other.unwilling
        self.connect_ns.merge(other.connect_ns)
        self.round_ns.merge(other.round_ns)
