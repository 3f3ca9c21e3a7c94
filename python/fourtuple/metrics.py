"""The names, units and meanings of every number that an engine counts: `COUNTERS`, one row each.

Decides what a counter is called in Python. Knows no engine. It mirrors the table of `crates/engine/src/report.rs`; a
test holds the two equal.
"""

from __future__ import annotations

from msgspec import Struct


class Counter(Struct, frozen=True):
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
    Counter("sniffing_now", "connections", "connections whose first bytes a broker waits for or looks at"),
    Counter("delivering_now", "connections", "connections that a broker is bringing to their service"),
    Counter("relaying_now", "connections", "connections between whose two ends a broker carries bytes"),
    Counter("moving_now", "connections", "connections on their way to another process"),
    Counter("landed", "connections", "connections taken over from another process"),
    Counter(
        "landings_refused",
        "messages",
        "messages of another process that were not understood or not possible; what came with them stays there",
    ),
    Counter(
        "moves_returned",
        "connections",
        "moves that the other process refused or did not live to take; the connections live on here",
    ),
    Counter("ferries_now", "ferries", "sockets to other processes over which connections move"),
    Counter("ferries_lost", "ferries", "ferries that ended before either side had said that it was done"),
    Counter(
        "delivery_retries", "deliveries", "deliveries tried again because the service was absent or its queue full"
    ),
    Counter("handoffs_relayed", "deliveries", "handoffs that became relays, since the service takes connections"),
    Counter("ended_handed_off", "connections", "ended: the service was given the socket itself"),
    Counter("ended_relayed", "connections", "ended: relayed, and both sides said that they were done"),
    Counter("ended_client_broke", "connections", "ended: relayed, and the client broke off"),
    Counter("ended_service_broke", "connections", "ended: relayed, and the service broke off"),
    Counter("ended_client_left", "connections", "ended: the client left before it was delivered"),
    Counter("ended_no_route", "connections", "ended: what the client showed names no service"),
    Counter(
        "ended_sniff_deadline",
        "connections",
        "ended: the client had not shown enough by the deadline, and its listener has no default",
    ),
    Counter(
        "ended_sniff_too_long",
        "connections",
        "ended: the client showed more than may be looked at without naming a service",
    ),
    Counter("ended_garbage", "connections", "ended: what the client showed breaks its own protocol"),
    Counter(
        "ended_unproxied",
        "connections",
        "ended: a trusted proxy sent no PROXY header, a broken one, or none by the deadline",
    ),
    Counter("ended_service_absent", "connections", "ended: the service was absent until the deadline"),
    Counter(
        "ended_service_full",
        "connections",
        "ended: the service's queue was full, or its connect did not come about, until the deadline",
    ),
    Counter("ended_service_unreachable", "connections", "ended: the service could not be reached for another reason"),
    Counter(
        "ended_service_declined",
        "connections",
        "ended: the service did not do what the client was told in its name (PostgreSQL: TLS), or not in time",
    ),
    Counter("ended_over_total", "connections", "ended: more connections than may be open at once"),
    Counter("ended_over_source", "connections", "ended: more connections than one source prefix may have"),
    Counter("ended_over_service", "connections", "ended: more connections than the service may have"),
    Counter("ended_moved", "connections", "ended: another process has taken it over"),
    Counter("ended_stopped", "connections", "ended: the broker was told to close"),
    Counter("ended_start_failed", "connections", "ended: the service slept and could not be started"),
    Counter("ended_wake_refused", "connections", "ended: the service slept, and is not started for this client"),
    Counter(
        "ended_over_parked",
        "connections",
        "ended: the service slept, and more connections waited, or more of their bytes, than may",
    ),
    Counter("ended_answered_asleep", "connections", "ended: the service slept, and the client was answered without it"),
    Counter("parked_now", "connections", "connections that wait until their service has been started"),
    Counter("wakes_asked", "questions", "times that a broker asked for a service to be started"),
    Counter("question_waits", "questions", "times that a question had no room and was asked later"),
)
"""In the order in which an engine reports them."""
