"""Services, routes, and what a connection shows: the words of the registry.

Decides what a name is (RFC 1123 2.1, RFC 5891 for other scripts) and which fields a service and a route have. Pure: the
file, the grammar of targets and the precedence of routes are the registry's (`fourtuple.registry`, in Rust), so that
nothing is judged twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum

from msgspec import Struct, field
from msgspec.structs import force_setattr

from fourtuple.errors import BadConfig
from fourtuple.tuples import Endpoint

MOST_NAME_BYTES = 253
"""Without the dot at its end (RFC 1035 2.3.4)."""
HIGHEST = 2**32 - 1
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_TEMPLATE = re.compile(r"[a-z0-9_-]{1,32}")
_STARS = re.compile(r"(\*{1,2})(?:\.(.*))?", re.DOTALL)


class Delivery(Enum):
    """How a connection reaches its service."""

    RELAY = "relay"
    """Bytes are carried between client and service."""
    HANDOFF = "handoff"
    """The accepted socket itself is passed to the service, over its unix socket."""
    INETD = "inetd"
    """A process is started for each connection, with the accepted socket as its standard input and output."""


def canonical_name(text: object, path: str = "name") -> str:
    """The one spelling of a name: A-labels, lower case, no dot at the end. An error names `path`.

    >>> canonical_name("Bücher.Example.")
    'xn--bcher-kva.example'
    """
    if not isinstance(text, str):
        raise BadConfig(path, f"is {text!r}; a name such as api.example.com is needed")
    name = text.lower() if text.isascii() else _encoded(text, path)
    name = name.removesuffix(".")
    if len(name) > MOST_NAME_BYTES:
        raise BadConfig(path, f"{_shown(text)} is longer than {MOST_NAME_BYTES} bytes")
    for label in name.split("."):
        if _LABEL.fullmatch(label) is None:
            why = "labels of 1 to 63 letters, digits, hyphens (not first or last) and underscores, with dots between"
            raise BadConfig(path, f"{_shown(text)} is no name: {why}")
    return name


def canonical_pattern(text: object, path: str = "name") -> str:
    """The one spelling of a name, of `*.suffix` (one label more), `**.suffix` (one or more), `*` or `**`."""
    stars = _STARS.fullmatch(text) if isinstance(text, str) else None
    if stars is None:
        return canonical_name(text, path)
    return stars[1] if stars[2] is None else f"{stars[1]}.{canonical_name(stars[2], path)}"


def whole_or_none(path: str, value: object, least: int, most: int) -> None:
    """Raise unless it is None or such a number; `path` names it."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadConfig(path, f"is {value!r}; a whole number from {least} to {most} is needed")


class Service(Struct, frozen=True, kw_only=True):
    """What stands behind a name: a target, and perhaps a wide port that means it too."""

    name: str
    """A DNS name; whatever its script, it is kept in its one spelling."""
    target: str
    """`unix:/PATH`, `unix:@NAME`, `tcp:ADDRESS:PORT` or `tcp:NAME:PORT`."""
    delivery: Delivery = Delivery.RELAY
    wide_port: int | None = None
    """From 1 to 4,294,967,295."""
    patience_ms: int | None = None
    """How long a connection waits for a service that is absent or full."""
    connections: int | None = None
    """Most at once."""
    proxy: int | None = None
    """Version of the PROXY header that a relayed connection begins with."""
    start: str | None = None
    """The template (`[[template]]` in broker.toml) by which it is started when it is called; None is never."""

    def __post_init__(self) -> None:
        force_setattr(self, "name", canonical_name(self.name))
        _check_options(self)
        whole_or_none("wide_port", self.wide_port, 1, HIGHEST)

    @property
    def row(self) -> tuple[str, str, str, int | None, int | None, int | None, int | None, str | None]:
        """As the registry takes it."""
        numbers = (self.wide_port, self.patience_ms, self.connections, self.proxy)
        return (self.name, self.target, self.delivery.value, *numbers, self.start)

    @classmethod
    def from_row(cls, row: tuple[str, str, str, int | None, int | None, int | None, int | None, str | None]) -> Service:
        """As the registry gives it."""
        name, target, delivery, wide_port, patience_ms, connections, proxy, start = row
        return cls(
            name=name,
            target=target,
            delivery=Delivery(delivery),
            wide_port=wide_port,
            patience_ms=patience_ms,
            connections=connections,
            proxy=proxy,
            start=start,
        )


class Match(Struct, frozen=True, kw_only=True):
    """What a connection must show; all of what is given. The order is that of precedence."""

    wide_port: int | None = None
    name: str | None = None
    """SNI, Host or :authority: a name, `*.suffix` (one label more) or `**.suffix` (one or more)."""
    path: str | None = None
    """This path and all below it, compared byte by byte as it was sent."""
    protocol: str | None = None
    alpn: str | None = None
    database: str | None = None
    """This one, or `*` for any."""
    user: str | None = None
    client: str | None = None
    """MQTT client id."""
    destination: str | None = None
    """Address or prefix that the client connected to."""
    destination_port: int | None = None
    source: str | None = None
    source_port: int | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            force_setattr(self, "name", canonical_pattern(self.name))
        whole_or_none("wide_port", self.wide_port, 1, HIGHEST)
        whole_or_none("destination_port", self.destination_port, 1, 65_535)
        whole_or_none("source_port", self.source_port, 1, 65_535)
        for name, value in self.given():
            if not isinstance(value, int) and not isinstance(value, str):
                raise BadConfig(name, f"is {value!r}; text is needed")

    def given(self) -> Iterator[tuple[str, int | str]]:
        """The conditions that there are."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None:
                yield name, value

    @property
    def row(self) -> list[tuple[str, str]]:
        """As the registry takes it."""
        return [(name, str(value)) for name, value in self.given()]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.given()) or "(any connection)"


class Route(Struct, frozen=True, kw_only=True):
    """What a connection must show, and where it then goes."""

    match: Match = field(default_factory=Match)
    to: str
    """`service:NAME` or a target; {name}, {label}, {user}, {database} and {client} are what the connection shows."""
    delivery: Delivery = Delivery.RELAY
    """Of a target; a service knows that itself."""
    patience_ms: int | None = None
    connections: int | None = None
    proxy: int | None = None
    start: str | None = None
    """The template by which what listens at the target is started."""

    def __post_init__(self) -> None:
        if not isinstance(self.to, str):
            raise BadConfig("to", f"is {self.to!r}; service:NAME or a target is needed")
        _check_options(self)

    @property
    def row(self) -> tuple[list[tuple[str, str]], str, str, int | None, int | None, int | None, str | None]:
        """As the registry takes it."""
        options = (self.patience_ms, self.connections, self.proxy, self.start)
        return (self.match.row, self.to, self.delivery.value, *options)


class Seen(Struct, frozen=True, kw_only=True):
    """What a connection shows, as it was sent; what it does not show is None."""

    wide_port: int | None = None
    name: bytes | None = None
    path: bytes | None = None
    protocol: str | None = None
    alpn: tuple[bytes, ...] | None = None
    user: bytes | None = None
    database: bytes | None = None
    client: bytes | None = None
    source: Endpoint | None = None
    destination: Endpoint | None = None

    def __post_init__(self) -> None:
        whole_or_none("wide_port", self.wide_port, 0, HIGHEST)
        if any(not 1 <= len(name) <= 255 for name in self.alpn or ()):
            raise BadConfig("alpn", "names have 1 to 255 bytes each")

    @property
    def alpn_list(self) -> bytes | None:
        """The ProtocolNameList as TLS writes it (RFC 7301 3.1), without its own length."""
        return None if self.alpn is None else b"".join(bytes([len(name)]) + name for name in self.alpn)


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of a lookup: a target, or why there is none."""

    kind: str
    """found, no-route, no-service or refused."""
    service: str | None = None
    """The service that was found, or that a route names and is not there."""
    target: str | None = None
    delivery: Delivery | None = None
    patience_ms: int | None = None
    connections: int | None = None
    proxy: int | None = None
    start: str | None = None
    why: str | None = None
    """Of a refusal: what the client sent cannot stand in the route's template."""


def _encoded(text: str, path: str) -> str:
    """A-labels for labels of other scripts; the others stay, for underscores are no IDNA."""
    # Few need it, and nobody is to wait for its tables.
    import idna

    try:
        mapped = idna.uts46_remap(text, std3_rules=False, transitional=False)
        return ".".join(
            label if label.isascii() else idna.alabel(label).decode("ascii") for label in mapped.split(".")
        ).lower()
    except (idna.IDNAError, UnicodeError) as error:
        raise BadConfig(path, f"{_shown(text)} is no name: {error}") from None


def _check_options(one: Service | Route) -> None:
    if isinstance(one, Service) and not isinstance(one.target, str):
        raise BadConfig("target", f"is {one.target!r}; such as unix:/run/app.sock or tcp:127.0.0.1:8080")
    if not isinstance(one.delivery, Delivery):
        raise BadConfig("delivery", f"is {one.delivery!r}; Delivery.RELAY, .HANDOFF or .INETD is needed")
    whole_or_none("patience_ms", one.patience_ms, 0, HIGHEST)
    whole_or_none("connections", one.connections, 1, HIGHEST)
    whole_or_none("proxy", one.proxy, 1, 2)
    start: object = one.start
    if start is not None and not (isinstance(start, str) and _TEMPLATE.fullmatch(start)):
        raise BadConfig("start", f"is {start!r}; the name of a template is needed: 1 to 32 of a-z, 0-9, _ and -")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
