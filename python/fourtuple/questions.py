"""What a running broker asks, and what it is told: the words between its engine and whoever starts services.

Decides the vocabulary alone. Each worker of an engine asks for itself, so the same question may come once from each,
and again later: whoever answers goes by the service. Every worker gets every answer.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

from msgspec import Struct

from fourtuple.tuples import Endpoint


class Wake(Struct, frozen=True, kw_only=True):
    """A connection waits for a service that sleeps: start it, or say why not. Asked once for all who wait."""

    worker: int
    service: str
    """Its name, or the target of a route."""
    start: str
    """How it is started: the name of a template."""
    target: str
    """Where it will listen, as the registry has it."""
    name: str
    """What the connection showed: a server name, a host; empty if none."""
    user: str
    """As whom it logs in, as far as that could stand in a command; or empty."""
    database: str
    """To which database; the same."""
    protocol: str
    """What it speaks, in the words of a route; empty if that is not known."""
    delivery: str
    """How connections are brought there: relay, handoff or inetd."""
    peer: Endpoint | None
    """Whose connection it is."""


class ServiceUsage(Struct, frozen=True, kw_only=True):
    """How much one service is used in one worker."""

    service: str
    live: int
    """Connections that do not wait: on their way to it, or relayed. Sockets handed off are not seen any more."""
    parked: int
    """Connections that wait for it to be up."""
    unused_s: float | None
    """How long there has been none of either; None if there are some, or if the worker knows nothing of it."""


class Usage(Struct, frozen=True, kw_only=True):
    """One worker's answer to `Engine.ask_usage`: a row for each service, in the order in which they were asked for."""

    worker: int
    ticket: int
    rows: tuple[ServiceUsage, ...]


class Held(Struct, frozen=True, kw_only=True):
    """One worker's answer to `Engine.hold`: its new connections wait from now on."""

    worker: int
    service: str
    live: int
    """As in `ServiceUsage`."""


class Sniff(Struct, frozen=True, kw_only=True):
    """A connection speaks what no probe knows: `Engine.opine` says what a plug-in makes of it."""

    worker: int
    ticket: int
    """Names the connection in its worker."""
    listener: int
    """The place of its listener."""
    opening: bytes
    """Its first bytes, 4,096 at most."""
    is_all: bool
    """No more will be shown."""


class Known(Struct, frozen=True, kw_only=True):
    """What a connection is."""

    protocol: str
    """As a route has it."""
    name: str | None = None
    user: str | None = None
    database: str | None = None
    client: str | None = None


class SeenConnection(Struct, frozen=True, kw_only=True):
    """A connection that a broker holds."""

    id: int
    """The same from accept to close, in the log as well."""
    peer: Endpoint | None
    service: str
    """Its name, or the target of a route; empty if it is not known yet."""
    state: str
    age_s: float
    bytes_up: int
    bytes_down: int
    listener: int
    """Place of the listener in the configuration."""


class Surveyed(Struct, frozen=True, kw_only=True):
    """One worker's answer to `Engine.ask_survey`: some of its connections."""

    worker: int
    ticket: int
    connections: tuple[SeenConnection, ...]
    next: int | None
    """Where to go on; None is the end."""


class Busiest(Struct, frozen=True, kw_only=True):
    """One worker's answer to `Engine.ask_busiest`: some of its services."""

    worker: int
    ticket: int
    services: tuple[tuple[str, int, int], ...]
    """Which; at most how much; of which so much may be others'."""
    next: int | None
    """Where to go on; None is the end."""
    least: int
    """What a service that was passed and is not among them may have."""


class Closed(Struct, frozen=True, kw_only=True):
    """One worker's answer to `Engine.ask_close`."""

    worker: int
    ticket: int
    found: bool
    next: int | None
    """Where to go on looking; None is the end."""


Question: TypeAlias = Wake | Usage | Held | Surveyed | Busiest | Closed | Sniff


class Up(Struct, frozen=True):
    """It listens: who waits is brought to it, in the order in which they came, and so is who comes."""

    service: str


class Slept(Struct, frozen=True):
    """It listens no more: who waits or comes asks for it anew."""

    service: str


class Failed(Struct, frozen=True):
    """It could not be started: who waits is told so and ended, who comes asks anew."""

    service: str


class Refused(Struct, frozen=True):
    """It is not started for this peer: those of its prefix (an IPv4 address, an IPv6 /64) who wait are ended. If others
    wait, they ask anew."""

    service: str
    peer: IPv4Address | IPv6Address | None
    """Of the question; None is whose address is not known."""


Answer: TypeAlias = Up | Slept | Failed | Refused
