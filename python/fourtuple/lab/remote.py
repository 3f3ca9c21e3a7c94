"""An engine in another process, used as if it were here: the methods of `fourtuple.engine.Engine`.

Decides nothing; each method is one exchange with the agent, and nothing per connection crosses. Knows no namespace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fourtuple.errors import EngineStopped
from fourtuple.lab import operations
from fourtuple.lab.operations import Started
from fourtuple.lab.process import Agent

if TYPE_CHECKING:
    from fourtuple.engine import Snapshot

GLANCE_S = 0.05
"""Workers publish their numbers this often; looking more often shows nothing new."""


class RemoteEngine:
    """An `Engine` in an agent. Leaving it as a context manager stops it and gives its memory back."""

    def __init__(self, agent: Agent, started: Started) -> None:
        self._agent = agent
        self._number = started.number
        self.carrier = started.carrier
        """Which carrier runs."""
        self.fallback_reason = started.fallback_reason
        """Why AUTO did not take uring; empty if it did, or was not asked."""
        self.workers = started.workers
        """How many workers it was started with."""

    @property
    def running(self) -> bool:
        """Whether any worker still works."""
        return self.snapshot().running

    def snapshot(self) -> Snapshot:
        """The numbers now."""
        return self._agent.ask(operations.engine_snapshot, self._number)

    def ping(self) -> None:
        """Send the token on every connection once and check what comes back."""
        self._order("ping")

    def set_rate(self, rate_per_s: int) -> None:
        """New connections per second from now on; 0 is as fast as possible."""
        self._order("set_rate", rate_per_s)

    def set_target(self, connections: int) -> None:
        """Raise (or lower, never below what is open) the number of connections to hold."""
        self._order("set_target", connections)

    def close(self) -> None:
        """Make no new connections and close all; the engine ends when they are closed."""
        self._order("close")

    def stop(self) -> None:
        """End now, whatever is open."""
        self._order("stop")

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; says whether it came in time. EngineStopped if a worker ended before its work did."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = GLANCE_S if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            # Short waits in the agent, so that another thread's snapshot gets its turn.
            if self._agent.ask(operations.engine_join, self._number, min(left_s, GLANCE_S)):
                return True
            if left_s == 0:
                return False

    def wait_for(self, predicate: Callable[[Snapshot], bool], timeout_s: float) -> Snapshot:
        """The first snapshot of which `predicate` is true; TimeoutError or EngineStopped if there will be none."""
        deadline_s = time.monotonic() + timeout_s
        while not predicate(now := self.snapshot()):
            if not now.running:
                raise EngineStopped("; ".join(now.errors) or f"the engine was done before ({now.open_now:,} open)")
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"not within {timeout_s:g} s ({now.phase.value}, {now.open_now:,} open)")
            time.sleep(GLANCE_S)
        return now

    def forget(self) -> None:
        """Stop it if it runs and give its memory back; it is not to be used again."""
        self._agent.ask(operations.engine_forget, self._number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.forget()
        except EngineStopped as stopped:
            if error is None:
                raise
            error.add_note(f"the engine: {stopped}")  # the error on its way out is the one to see

    def _order(self, order: str, value: int | None = None) -> None:
        self._agent.ask(operations.engine_order, self._number, order, value)
