"""What a proof is made of: steps that state claims, rows that hold the claim against what the kernel did, and curves.

Decides the shape of the result, its JSON and when a step counts as passed. Knows no lab, no engine and no terminal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fourtuple.prove.stage import Stage


class Outcome(Enum):
    """How a row or a step ended."""

    PASSED = "passed"
    FAILED = "failed"
    STOPPED = "stopped"
    """Could not run here: a limit, a missing privilege or Ctrl-C; the row's `bound_by` says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the final table: a claim, the number that arithmetic gives, and the number that the kernel gave."""

    claim: str
    arithmetic: str = ""
    expected: int | None = None
    """What the arithmetic predicts; None where the claim is not a number."""
    reached: int
    bound_by: str = ""
    """The limit that stopped it, by its name in the catalogue; empty if nothing did."""
    kernel_said: str = ""
    """The kernel's own answer at the end: an errno with its call, or what was counted."""
    outcome: Outcome
    seconds: float = 0.0
    kernel_bytes_per_socket: float | None = None
    user_bytes_per_connection: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A picture for the report: named series of (x, y) points over labelled axes."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, tuple[tuple[float, float], ...]]
    marks: tuple[tuple[float, str], ...] = ()
    """Horizontal lines worth seeing: (y, what it is), such as 65,536."""
    logarithmic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step came to."""

    step: str
    title: str
    outcome: Outcome
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for."""

    quick: bool = False
    only: tuple[str, ...] = ()
    connections: int | None = None
    """For the server step; None is as many as memory allows, up to a million."""
    carrier: str = "auto"
    refuse_io_uring: bool = False
    """Refuse io_uring to the lab by seccomp, as many containers do, to see what is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the proof: `run` is called with a fresh stage."""

    name: str
    title: str
    claim: str
    run: Callable[[Stage], None] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A whole run."""

    results: tuple[StepResult, ...]
    machine: str
    kernel: str
    started_at: str
    seconds: float
    interrupted: bool = False

    @property
    def passed(self) -> bool:
        """Whether every step that was asked for passed; a step that could not run is not a pass."""
        return not self.interrupted and all(result.outcome is Outcome.PASSED for result in self.results)

    def to_json(self) -> dict[str, object]:
        """The proof as JSON-able values; outcomes by their names in lower case."""

        def plain(value: object) -> object:
            if isinstance(value, Enum):
                return value.value
            if isinstance(value, dict):
                return {str(key): plain(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            return value

        return {"fourtuple_proof": 1, "passed": self.passed, **{k: plain(v) for k, v in asdict(self).items()}}


class Observer(Protocol):
    """Who is told while a proof runs: a live display, a log, a test."""

    def step_started(self, step: Step, number: int, of: int) -> None:
        """A step begins."""

    def claimed(self, claim: str) -> None:
        """A claim is about to be held against the kernel; its row follows."""

    def noted(self, text: str) -> None:
        """Something that belongs to the step but to no row."""

    def progressed(self, label: str, value: int, target: int | None) -> None:
        """A number that is growing, a few times a second."""

    def row_added(self, row: Row) -> None:
        """A claim was held against the kernel."""

    def step_ended(self, result: StepResult) -> None:
        """A step is over."""
