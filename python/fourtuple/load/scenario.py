"""What a load run is to do: a target, how many connections, from where, how fast, what is said, for how long.

Decides what a URL means and which numbers are allowed. Pure: knows no socket; a name in a URL is resolved by the run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fourtuple.dialogue import Dialogue
from fourtuple.engine import HIGHEST_COUNT
from fourtuple.errors import BadConfig
from fourtuple.tuples import AddressSet, PortSet

MOST_SECONDS = 604_800
MOST_TARGET_ENDPOINTS = 1_000_000


class Scheme(Enum):
    """What is spoken."""

    TCP = "tcp"
    UDP = "udp"
    HTTP = "http"
    WS = "ws"


_PLAIN = (Scheme.TCP, Scheme.UDP)
"""Schemes without a path: what is said is for --say or --script, or tokens that come back."""
_DEFAULT_PORTS = {Scheme.HTTP: "80", Scheme.WS: "80"}
_SHAPE = re.compile(
    r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*)://(?P<host>\[[^\]/]*\]|[^/?#:\[\]]*)(?::(?P<ports>[^/?#]*))?(?P<path>[/?][^#]*)?"
)
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,252})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where to: one or more addresses (or a name), one or more ports, and for HTTP a path."""

    scheme: Scheme
    host: str
    """As typed: an address, a range such as 10.0.0.1-10.0.0.8, a list with commas, or a name."""
    addresses: AddressSet | None
    """None while `host` is a name that nobody has resolved."""
    ports: PortSet
    path: str = "/"

    @classmethod
    def parse(cls, url: str) -> Target:
        """Read tcp://HOST:PORT, udp://HOST:PORT, http://HOST[:PORT]/PATH or ws://HOST[:PORT]/PATH.

        HOST and PORT may be ranges.
        """
        matched = _SHAPE.fullmatch(url)
        if matched is None:
            raise BadConfig("URL", f"{url[:80]!r} is none; such as tcp://127.0.0.1:6379 or http://[::1]:8080/path")
        scheme = next((one for one in Scheme if one.value == matched["scheme"].lower()), None)
        if scheme is None:
            allowed = ", ".join(one.value for one in Scheme)
            raise BadConfig("URL", f"{matched['scheme'][:20]!r} is not a scheme that is spoken here: {allowed}")
        ports = matched["ports"] or _DEFAULT_PORTS.get(scheme)
        if not ports:
            raise BadConfig("URL", f"{url[:80]!r} names no port; such as {scheme.value}://{matched['host']}:PORT")
        path = matched["path"] or "/"
        if path[0] == "?":
            path = f"/{path}"
        if scheme in _PLAIN and path != "/":
            raise BadConfig("URL", f"a {scheme.value} target has no path, and {path[:40]!r} is one")
        if not all("!" <= letter <= "~" for letter in path) or len(path) > 2_000:
            raise BadConfig("URL", "a path is at most 2,000 visible ASCII characters; write others as %XX")
        target = cls(
            scheme=scheme,
            host=matched["host"],
            addresses=_addresses(matched["host"]),
            ports=_ports(ports),
            path=path,
        )
        if target.addresses is not None and len(target.addresses) * len(target.ports) > MOST_TARGET_ENDPOINTS:
            raise BadConfig("URL", f"names more than {MOST_TARGET_ENDPOINTS:,} endpoints")
        return target

    @property
    def is_plain(self) -> bool:
        """Whether the scheme has no words of its own."""
        return self.scheme in _PLAIN

    @property
    def noun(self) -> str:
        """What is held."""
        return "flows" if self.scheme is Scheme.UDP else "connections"

    @property
    def authority(self) -> str:
        """What a Host header says (RFC 9110 7.2): of several, the first."""
        host = self.host
        if self.addresses is not None:
            first = next(iter(self.addresses))
            host = f"[{first}]" if first.version == 6 else str(first)
        return f"{host}:{next(iter(self.ports))}"

    def __str__(self) -> str:
        path = "" if self.is_plain else self.path
        return f"{self.scheme.value}://{self.host}:{self.ports}{path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A load run. The numbers are the whole run's, whatever the number of workers."""

    target: Target
    connections: int
    sources: AddressSet | None = None
    """Source addresses; None is the one that the host's routes choose."""
    rate_per_s: int = 0
    """New connections per second; 0 is as fast as possible."""
    round_every_s: float = 0.0
    """A round (ping, request, script) on every connection at this interval; 0 is never: connect and hold."""
    closed_loop: bool = False
    """Each connection begins its next round as soon as its last is over."""
    size_bytes: int = 16
    """Bytes of an echo ping; of no meaning where a dialogue is played."""
    duration_s: float = 10.0
    """How long to hold after the ramp."""
    ramp_timeout_s: float = 120.0
    """The ramp ends after this, reached or not."""
    connect_timeout_s: float = 10.0
    answer_timeout_s: float = 10.0
    window: int = 256
    """Attempts under way at once, at most: what a server's accept queue has to bear."""
    replace: bool = True
    """Connections that end are made anew, so that the number held is exact."""
    close_with_fin: bool = False
    """Close as a well-bred client does, which leaves each port in TIME_WAIT for 60 s; else with RST."""
    dialogue: Dialogue | None = None
    """None is tokens that the peer sends back, if there are rounds at all."""
    script: Path | None = None
    """A Python file whose `async def session(connection)` is played in worker processes, in place of a dialogue."""
    workers: int | None = None
    carrier: str = "auto"

    def __post_init__(self) -> None:
        _whole("--connections", self.connections, 1, HIGHEST_COUNT)
        _whole("--rate", self.rate_per_s, 0, HIGHEST_COUNT)
        _whole("--size", self.size_bytes, 16, 2_048)
        _whole("--window", self.window, 1, 65_535)
        if self.workers is not None:
            _whole("--workers", self.workers, 1, 1_024)
        _seconds("--ping-every", self.round_every_s, 0, MOST_SECONDS)
        _seconds("--duration", self.duration_s, 0, MOST_SECONDS)
        _seconds("--ramp-timeout", self.ramp_timeout_s, 0.1, MOST_SECONDS)
        _seconds("--connect-timeout", self.connect_timeout_s, 0.01, 3_600)
        _seconds("--answer-timeout", self.answer_timeout_s, 0.01, 3_600)
        if self.closed_loop and self.round_every_s:
            raise BadConfig("--closed-loop", "has no interval; leave out --ping-every")
        if self.script is not None and (self.closed_loop or self.target.scheme is Scheme.UDP):
            raise BadConfig("--script", "has a session, which sets its own pace, and speaks over TCP")
        if self.close_with_fin and self.target.scheme is Scheme.UDP:
            raise BadConfig("--fin", "is for TCP: a UDP flow has no end that the other side is told of")
        if self.script is not None:
            if self.target.scheme is not Scheme.TCP:
                raise BadConfig("--script", f"is for tcp targets; {self.target.scheme.value} has its own words")
            if self.carrier != "auto":
                raise BadConfig("--carrier", "is the engine's; a session is played by asyncio in worker processes")
            if self.round_every_s or self.closed_loop:
                option = "--ping-every" if self.round_every_s else "--closed-loop"
                raise BadConfig(option, "is the engine's; a session says itself when its rounds are")
        versions = {one.version for one in (self.sources, self.target.addresses) if one is not None}
        if len(versions) > 1:
            raise BadConfig("--from", "the source addresses are of another family than the target's")


def _addresses(host: str) -> AddressSet | None:
    bare = host[1:-1] if host.startswith("[") else host
    if not bare:
        raise BadConfig("URL", "names no host; such as tcp://127.0.0.1:80")
    if ":" not in bare and re.search("[A-Za-z]", bare):
        if _NAME.fullmatch(bare) is None:
            raise BadConfig("URL", f"{bare[:80]!r} is neither an address nor a name")
        return None
    return address_set("URL", bare)


def address_set(option: str, text: str) -> AddressSet:
    """Addresses as they are typed; an error names the option that they were typed for."""
    try:
        return AddressSet.parse(text)
    except BadConfig as problem:
        raise BadConfig(option, problem.why) from None


def _ports(text: str) -> PortSet:
    try:
        return PortSet.parse(text)
    except BadConfig as problem:
        raise BadConfig("URL", problem.why) from None


def _whole(option: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise BadConfig(option, f"is {value:,}; a whole number from {least:,} to {most:,} is needed")


def _seconds(option: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise BadConfig(option, f"is {value:g} s; from {least:g} to {most:,} s are allowed")
