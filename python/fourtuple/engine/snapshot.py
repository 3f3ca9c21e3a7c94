"""What an engine says of itself: its phase, and everything that it has counted."""

from __future__ import annotations

import errno
from enum import Enum

from msgspec import Struct


class Phase(Enum):
    """Where an engine stands; of several workers, the one with most left to do speaks."""

    RAMPING = "ramping"
    CLOSING = "closing"
    PINGING = "pinging"
    HOLDING = "holding"
    DONE = "done"


class Failure(Struct, frozen=True, kw_only=True):
    """Failures of one kind: at which step (socket, bind, connect, ...), which errno, how many."""

    step: str
    errno: int
    count: int

    @property
    def name(self) -> str:
        """The errno's name, such as EADDRNOTAVAIL."""
        return errno.errorcode.get(self.errno, str(self.errno))

    def __str__(self) -> str:
        return f"{self.name} at {self.step} x {self.count:,}"


class Quantiles(Struct, frozen=True, kw_only=True):
    """A histogram in eight numbers: nanoseconds, but for `count`. All zero when nothing was measured."""

    count: int
    least: int
    mean: int
    p50: int
    p90: int
    p99: int
    p999: int
    most: int


class CarrierNumbers(Struct, frozen=True, kw_only=True):
    """What the carriers of an engine's workers use, added up."""

    rings: int
    slots: int
    slots_in_use: int
    enters: int
    """io_uring_enter or epoll_wait calls."""
    receive_rearms: int
    cq_overflows: int
    buffers_in_use: int
    accept_lost: int
    """Connections that the kernel closed because a ring was full; a bug of ours if not zero."""


class Snapshot(Struct, frozen=True, kw_only=True):
    """Everything that an engine has counted, all workers together. What a counter means is in `fourtuple.metrics`.

    Of several workers `open_peak` is the sum of their peaks, which need not have come at the same moment.
    """

    connects_attempted: int
    connects_succeeded: int
    connects_failed: int
    tuples_busy: int
    accepts_succeeded: int
    accepts_failed: int
    open_now: int
    open_peak: int
    closed_by_us: int
    closed_by_peer: int
    broken: int
    listening_now: int
    listens_failed: int
    openings_right: int
    openings_now: int
    openings_failed: int
    pings_sent: int
    pings_right: int
    pings_refused: int
    pings_wrong: int
    pings_missing: int
    datagrams_stray: int
    bytes_in: int
    bytes_out: int
    buffer_waits: int
    pauses: int
    sniffing_now: int
    delivering_now: int
    relaying_now: int
    moving_now: int
    landed: int
    landings_refused: int
    moves_returned: int
    ferries_now: int
    ferries_lost: int
    delivery_retries: int
    handoffs_relayed: int
    ended_handed_off: int
    ended_relayed: int
    ended_client_broke: int
    ended_service_broke: int
    ended_client_left: int
    ended_no_route: int
    ended_sniff_deadline: int
    ended_sniff_too_long: int
    ended_garbage: int
    ended_unproxied: int
    ended_service_absent: int
    ended_service_full: int
    ended_service_unreachable: int
    ended_service_declined: int
    ended_over_total: int
    ended_over_source: int
    ended_over_service: int
    ended_moved: int
    ended_stopped: int
    ended_start_failed: int
    ended_wake_refused: int
    ended_over_parked: int
    ended_answered_asleep: int
    parked_now: int
    wakes_asked: int
    question_waits: int
    taken_s: float
    """Seconds since the engine started."""
    phase: Phase
    running: bool
    failures: tuple[Failure, ...]
    stopped_by: Failure | None
    """The failure that made it stop making connections, if one did."""
    opening_reasons: tuple[tuple[str, int], ...]
    """Why openings failed, and how many of each; `fourtuple.load.reasons` explains the names."""
    round_reasons: tuple[tuple[str, int], ...]
    """The same of rounds that were wrong."""
    connect_ns: Quantiles
    opening_ns: Quantiles
    """From the connection's coming to the end of its opening, a TLS handshake included."""
    echo_ns: Quantiles
    fill_curves: tuple[tuple[tuple[int, int], ...], ...]
    """Per worker: (median connect time in ns, count) per hundredth of its share of the space."""
    listeners_served: int
    carrier: CarrierNumbers
    errors: tuple[str, ...]
    """Why workers ended before their work did; empty if none has."""

    @property
    def pings_answered(self) -> int:
        """Tokens whose fate is known: right, refused, wrong or missing."""
        return self.pings_right + self.pings_refused + self.pings_wrong + self.pings_missing
