"""What a launcher says of a service: where it is, that it is there, why it is not, how it has ended.

Decides the words that counters, logs and waiting clients get. Knows no process.
"""

from __future__ import annotations

from enum import Enum

from msgspec import Struct

from fourtuple.errors import FourtupleError
from fourtuple.services import Delivery


class Phase(Enum):
    """Where a service is."""

    WAITING = "waiting"
    """For its turn to start."""
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    """It has been told to."""
    ENDING = "ending"
    """Its first process is gone; what is left is cleared away."""


class Failure(Enum):
    """Why a service was not started: a word for counters and for what waiting clients are told."""

    NO_TEMPLATE = "no_template"
    BAD_VALUE = "bad_value"
    """Template, call and host do not fit: a placeholder without a value, no such user, no cgroups here."""
    OVER_RUNNING = "over_running"
    BACKING_OFF = "backing_off"
    TARGET_TAKEN = "target_taken"
    NOT_EXECUTED = "not_executed"
    ENDED = "ended"
    """It ended before it was ready."""
    TIMEOUT = "timeout"
    STOPPED = "stopped"
    """Somebody stopped it before it was ready, or the launcher is closing."""


class StartFailed(FourtupleError):
    """A service was not started: `failure` in a word, `why` in a sentence."""

    def __init__(self, failure: Failure, why: str, retry_after_s: float = 0.0) -> None:
        """`retry_after_s`: before that, another try fails at once."""
        self.failure, self.why, self.retry_after_s = failure, why, retry_after_s
        super().__init__(why)


class Started(Struct, frozen=True, kw_only=True):
    """A service that is there."""

    service: str
    pid: int
    since_s: float
    """When its program was executed, on the monotonic clock."""
    ready_s: float
    """When it was ready."""


class State(Struct, frozen=True, kw_only=True):
    """A service that is not dormant."""

    service: str
    template: str
    target: str
    delivery: Delivery
    phase: Phase
    pid: int
    """0 before it has one."""
    since_s: float


class Exit(Struct, frozen=True, kw_only=True):
    """A service that has ended without being told to; nothing of it is left."""

    service: str
    status: int
    """Of its first process; negative for a signal."""
    crashed: bool
    """Its status was not 0."""
