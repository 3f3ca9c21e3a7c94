"""The compiled half of fourtuple, as `fourtuple.engine` sees it. Use that module; this one decides nothing."""

from typing import TypedDict, final

from fourtuple.engine import CarrierSettings, EchoConfig, LoadConfig

__all__ = ["Workers", "counters", "reasons", "uring_abilities"]

class _Quantiles(TypedDict):
    count: int
    least: int
    mean: int
    p50: int
    p90: int
    p99: int
    p999: int
    most: int

class _CarrierNumbers(TypedDict):
    rings: int
    slots: int
    slots_in_use: int
    enters: int
    receive_rearms: int
    cq_overflows: int
    buffers_in_use: int
    accept_lost: int

class _Snapshot(TypedDict):
    running: bool
    phase: str
    counters: list[int]
    failures: list[tuple[str, int, int]]
    stopped_by: tuple[str, int] | None
    opening_reasons: list[tuple[str, int]]
    round_reasons: list[tuple[str, int]]
    connect_ns: _Quantiles
    opening_ns: _Quantiles
    echo_ns: _Quantiles
    fill_curves: list[list[tuple[int, int]]]
    listeners_served: int
    carrier: _CarrierNumbers
    errors: list[str]

@final
class Workers:
    """One worker per core of an engine, until all have ended."""

    @staticmethod
    def start(config: LoadConfig | EchoConfig, carrier: str, workers: int, settings: CarrierSettings) -> Workers:
        """Share `config` out to `workers` threads on the carrier of that name, and start them."""

    def snapshot(self) -> _Snapshot:
        """Counters, failures and histograms of all workers together."""

    def order(self, kind: str, value: int = 0) -> None:
        """Ask every running worker for something; `value` is the whole engine's and is shared out."""

    @property
    def running(self) -> bool:
        """Whether any worker still works."""

    @property
    def count(self) -> int:
        """How many workers there are, ended ones included."""

    def stop(self) -> None:
        """Tell every worker to end now; connections still open are closed by their carriers."""

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until all workers have ended, at most `timeout_s` seconds; says whether they have."""

def counters() -> list[tuple[str, str, str]]:
    """One row per counter, in the order of a snapshot's counters: name, unit, meaning."""

def reasons() -> list[str]:
    """Every name that a snapshot's reasons may have."""

def uring_abilities() -> dict[str, bool]:
    """What io_uring can do here, each ability tried and not guessed; raises where there is no io_uring."""
