"""The names, units and meanings of every number that an engine counts: `COUNTERS`, one row each.

Decides what a counter is called in Python. Knows no engine. It mirrors the table of `crates/engine/src/report.rs`; a
test holds the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Counter:
    """One number that an engine counts: a total since its start, or (a name that ends in `_now`) a gauge."""

    name: str
    unit: str
    meaning: str

    @property
    def is_gauge(self) -> bool:
        """Whether the number can go down."""
        return self.name.endswith("_now")


COUNTERS = (
    Counter("connects_attempted", "connections", "connect attempts handed to the carrier"),
    Counter("connects_succeeded", "connections", "attempts that became connections"),
    Counter("connects_failed", "connections", "attempts that failed, for whatever reason"),
    Counter("tuples_busy", "connections", "attempts that failed because that tuple was in use; another was taken"),
    Counter("accepts_succeeded", "connections", "connections accepted"),
    Counter("accepts_failed", "errors", "accept() errors (no connection behind them)"),
    Counter("open_now", "connections", "connections open now"),
    Counter("open_peak", "connections", "most connections open at one moment"),
    Counter("closed_by_us", "connections", "connections that ended because we closed them"),
    Counter("closed_by_peer", "connections", "connections whose peer sent FIN first"),
    Counter("broken", "connections", "connections that broke"),
    Counter("listening_now", "listeners", "listeners accepting now"),
    Counter("listens_failed", "listeners", "listeners that could not be made"),
    Counter("openings_right", "openings", "openings of a dialogue played to their end"),
    Counter("openings_now", "openings", "openings being played"),
    Counter(
        "openings_failed",
        "openings",
        "openings that the peer refused, broke off, answered with other bytes, or did not answer by the deadline",
    ),
    Counter("pings_sent", "tokens", "tokens sent, or rounds of a dialogue begun"),
    Counter("pings_right", "tokens", "tokens that came back right"),
    Counter("pings_refused", "tokens", "rounds whose answer was whole and said no (an HTTP status that is an error)"),
    Counter("pings_wrong", "tokens", "tokens that came back with other bytes"),
    Counter("pings_missing", "tokens", "tokens that did not come back by the deadline"),
    Counter(
        "datagrams_stray", "datagrams", "datagrams that answered nothing: late, doubled, unasked or with other bytes"
    ),
    Counter("bytes_in", "bytes", "payload bytes received"),
    Counter("bytes_out", "bytes", "payload bytes handed to the kernel"),
    Counter("buffer_waits", "waits", "times that no buffer was free to send with, and the work waited"),
    Counter("pauses", "pauses", "times that a connection's reading was paused for back-pressure"),
)
"""In the order in which an engine reports them."""
