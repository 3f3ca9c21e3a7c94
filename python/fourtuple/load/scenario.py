"""What a load run is to do: a target, how many connections, from where, how fast, what is said, for how long.

Decides what a URL means and which numbers are allowed. Pure: knows no socket; a name in a URL is resolved by the run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fourtuple.dialogue import Dialogue
from fourtuple.engine import HIGHEST_COUNT, TlsConfig
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
    TLS = "tls"
    HTTPS = "https"
    WSS = "wss"

    @property
    def words(self) -> Scheme:
        """What is said within TLS, if there is TLS."""
        return _WITHIN.get(self, self)

    @property
    def secured(self) -> bool:
        """Whether there is."""
        return self in _WITHIN


_WITHIN = {Scheme.TLS: Scheme.TCP, Scheme.HTTPS: Scheme.HTTP, Scheme.WSS: Scheme.WS}
_PLAIN = (Scheme.TCP, Scheme.UDP, Scheme.TLS)
"""Schemes without a path: what is said is for --say or --script, or tokens that come back."""
_DEFAULT_PORTS = {Scheme.HTTP: "80", Scheme.WS: "80", Scheme.HTTPS: "443", Scheme.WSS: "443"}
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
        """Read tcp://HOST:PORT, udp://HOST:PORT, http://HOST[:PORT]/PATH or ws://HOST[:PORT]/PATH; tls, https and wss
        are tcp, http and ws within TLS.

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
    def name(self) -> str | None:
        """The name that was typed, resolved or not; None if addresses were."""
        return self.host if _addresses(self.host) is None else None

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
        if self.addresses is not None and self.name is None:
            first = next(iter(self.addresses))
            host = f"[{first}]" if first.version == 6 else str(first)
        return f"{host}:{next(iter(self.ports))}"

    def __str__(self) -> str:
        path = "" if self.is_plain else self.path
        return f"{self.scheme.value}://{self.host}:{self.ports}{path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """How a secured target is spoken to. Files come as their contents, in PEM."""

    ca: bytes | None = None
    """Certificates to trust; None is the system's."""
    insecure: bool = False
    """Accept any certificate."""
    server_name: str | None = None
    """The name that the certificate has to be for; None is the URL's host."""
    alpn: tuple[str, ...] | None = None
    """Protocols to offer; None is http/1.1 for https and wss, none for tls."""
    certificate: bytes | None = None
    key: bytes | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            missing = "--tls-cert" if self.certificate is None else "--tls-key"
            raise BadConfig(missing, "is missing: a certificate of ours and its key go together")
        if self.insecure and self.ca is not None:
            raise BadConfig("--tls-insecure", "accepts any certificate; leave out --tls-ca")

    def config(self, target: Target) -> TlsConfig | None:
        """What the engine is told; None where the target is not secured."""
        if not target.scheme.secured:
            for option, value in (
                ("--tls-ca", self.ca),
                ("--tls-insecure", self.insecure or None),
                ("--tls-server-name", self.server_name),
                ("--tls-alpn", self.alpn),
                ("--tls-cert", self.certificate),
            ):
                if value is not None:
                    raise BadConfig(option, f"is for tls, https and wss targets; this one is {target.scheme.value}")
            return None
        usual = () if target.scheme is Scheme.TLS else ("http/1.1",)
        return TlsConfig(
            server_name=self.server_name or target.name or self._address_to_check(target),
            ca=self.ca,
            insecure=self.insecure,
            alpn=tuple(name.encode() for name in (usual if self.alpn is None else self.alpn)),
            identity=None if self.certificate is None or self.key is None else (self.certificate, self.key),
        )

    def _address_to_check(self, target: Target) -> str:
        addresses = target.addresses
        if addresses is None:
            raise AssertionError("what is no name is addresses")
        if len(addresses) > 1 and not self.insecure:
            raise BadConfig(
                "--tls-server-name",
                f"is needed: the URL names {len(addresses):,} addresses, and certificates are checked against one name",
            )
        return str(next(iter(addresses)))


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
    tls: TlsOptions = TlsOptions()
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
        self.tls.config(self.target)
        if self.script is not None and self.target.scheme.secured:
            raise BadConfig("--script", f"a session speaks no TLS, and {self.target.scheme.value} asks for it")
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
            if self.round_every_s:
                raise BadConfig("--ping-every", "is the engine's; a session says itself when its rounds are")
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
