"""The only door to the compiled half: what an engine is asked, and what it says.

Decides which values an engine may be given, which carrier runs it, and how many workers. Knows nothing of how a
connection is made (Rust's) or of which limit stops one (`fourtuple.limits`). Configuration crosses once, as one frozen
dataclass; numbers come back as one `Snapshot`, as often as somebody asks. No Python runs per connection.
"""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import TracebackType
from typing import Self

from fourtuple import _core
from fourtuple.dialogue import Dialogue
from fourtuple.errors import BadConfig, EngineStopped, LimitReached, MissingFeature, MissingPrivilege
from fourtuple.metrics import COUNTERS
from fourtuple.questions import (
    Answer,
    Busiest,
    Closed,
    Held,
    Known,
    Question,
    Refused,
    SeenConnection,
    ServiceUsage,
    Sniff,
    Surveyed,
    Usage,
    Wake,
)
from fourtuple.tuples import Endpoint, Protocol, TupleSpace

HIGHEST_COUNT = 2**32 - 1
"""Connections are numbered by 32 bits in each worker."""
CONNECTIONS_PER_WORKER = 1_000
"""Below this many connections another worker costs more than it brings."""
SECURED_PER_WORKER = 50
"""The same where each connection costs a TLS handshake."""
_GLANCE_S = 0.01


class CarrierName(Enum):
    """What moves the bytes: io_uring with descriptors of its own, epoll, or the first of the two that works here."""

    AUTO = "auto"
    URING = "uring"
    EPOLL = "epoll"


class SourceChoice(Enum):
    """How the local endpoint of an outgoing connection comes about (limits catalogue A3, A4, A7, A8, A10)."""

    KERNEL = "kernel"
    """connect() alone: the kernel picks address and port."""
    KERNEL_PORT = "kernel-port"
    """Our address, bound with IP_BIND_ADDRESS_NO_PORT; the kernel searches a port, even ones first."""
    KERNEL_RANGE = "kernel-range"
    """As KERNEL_PORT, with IP_LOCAL_PORT_RANGE: one pass over every port (flat since Linux 6.8)."""
    SINGLE_PORT = "single-port"
    """Our address and port, by IP_LOCAL_PORT_RANGE [p, p]: poisons nobody; p must lie in the sysctl's range (A4)."""
    BIND = "bind"
    """Our address and port, by bind() with SO_REUSEADDR: any port, cheapest; poisons it for automatic choice (A8).

    Not for one port to many destinations: bind() compares with each socket on that address and port
    (inet_csk_bind_conflict), and SINGLE_PORT does not.
    """


class Phase(Enum):
    """Where an engine stands; of several workers, the one with most left to do speaks."""

    RAMPING = "ramping"
    CLOSING = "closing"
    PINGING = "pinging"
    HOLDING = "holding"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """TLS around all that a load engine says. Every connection makes a whole handshake: no session is resumed."""

    server_name: str
    """A name or an address: the certificate has to be for it; a name is sent to the server (SNI)."""
    ca: bytes | None = None
    """Certificates to trust, PEM; None is the system's."""
    insecure: bool = False
    """Accept any certificate. That the server has its key is still checked."""
    alpn: tuple[bytes, ...] = ()
    """Protocols to offer, the best first; none is no offer."""
    identity: tuple[bytes, bytes] | None = None
    """Our certificate with those above it, and its key; both PEM."""

    def __post_init__(self) -> None:
        _instance("tls.server_name", self.server_name, str)
        _instance("tls.insecure", self.insecure, bool)
        _instance("tls.alpn", self.alpn, tuple)
        for path, value in (("tls.ca", self.ca), *(("tls.identity", one) for one in self.identity or ())):
            if value is not None:
                _instance(path, value, bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """What a load engine is to do: connect over `space`, hold, ping on request, close. Numbers are the engine's."""

    space: TupleSpace
    """Tuples that it may use, each once at a time; its protocol says what is connected. Of the kernel's choices only
    KERNEL_RANGE uses its source ports."""
    connections: int
    choice: SourceChoice = SourceChoice.BIND
    window: int = 256
    """Attempts under way at once, at most."""
    rate_per_s: int = 0
    """New connections per second; 0 is as fast as possible."""
    connect_timeout_s: float = 10.0
    ping_timeout_s: float = 10.0
    """After this a token that has not come back is missing."""
    ping_window: int = 256
    """Tokens under way at once, at most."""
    token_bytes: int = 16
    seed: int = 0
    """Makes this run's tokens differ from any other's."""
    ping_every_s: float = 0.0
    """Ping every connection at this interval while holding; 0 is never."""
    closed_loop: bool = False
    """From the first `Engine.ping` on, each connection begins its next round as soon as its last is over."""
    give_up_after: int = 64
    """Stop making connections after this many failures in a row that say that a limit is reached."""
    abort_on_close: bool = False
    """Close with RST: no TIME_WAIT, unsent bytes dropped."""
    keep_fill_curve: bool = False
    """Keep the connect time by fill (`Snapshot.fill_curves`)."""
    dialogue: Dialogue | None = None
    """What is said on each connection; None is the token, which the peer has to send back."""
    tls: TlsConfig | None = None
    """None is no TLS: the bytes as they are."""

    def __post_init__(self) -> None:
        _instance("space", self.space, TupleSpace)
        for side in ("sources", "source_ports", "destinations", "destination_ports"):
            if not getattr(self.space, side):
                raise BadConfig(f"space.{side}", "is empty; at least one is needed")
        _instance("choice", self.choice, SourceChoice)
        _whole("connections", self.connections, 0, HIGHEST_COUNT)
        _whole("window", self.window, 1, 65_535)
        _whole("rate_per_s", self.rate_per_s, 0, HIGHEST_COUNT)
        _seconds("connect_timeout_s", self.connect_timeout_s, 0.001)
        _seconds("ping_timeout_s", self.ping_timeout_s, 0.001)
        _whole("ping_window", self.ping_window, 1, 65_535)
        _whole("token_bytes", self.token_bytes, 16, 2_048)
        _whole("seed", self.seed, 0, 2**64 - 1)
        _seconds("ping_every_s", self.ping_every_s, 0)
        _whole("give_up_after", self.give_up_after, 1, HIGHEST_COUNT)
        _instance("abort_on_close", self.abort_on_close, bool)
        _instance("keep_fill_curve", self.keep_fill_curve, bool)
        _instance("closed_loop", self.closed_loop, bool)
        if self.closed_loop and self.ping_every_s:
            raise BadConfig("closed_loop", "has no interval; leave out ping_every_s")
        if self.tls is not None:
            _instance("tls", self.tls, TlsConfig)
            if self.space.protocol is Protocol.UDP:
                raise BadConfig("tls", "is for tcp, and the space is udp's")
        if self.dialogue is None:
            return
        _instance("dialogue", self.dialogue, Dialogue)
        if self.space.protocol is Protocol.UDP:
            self.dialogue.require_datagrams()
        else:
            self.dialogue.require_stream()
        if self.closed_loop and not self.dialogue.round:
            raise BadConfig("closed_loop", "needs a round, and the dialogue has none")


@dataclass(frozen=True, slots=True, kw_only=True)
class EchoConfig:
    """What an echo engine is to do: listen, accept, send back what comes."""

    listen: tuple[Endpoint, ...]
    backlog: int = 4_096
    """As for listen(2); bounded by net.core.somaxconn."""
    reuse_port: bool = False
    """SO_REUSEPORT: other engines listen on the same endpoints. Set by itself where several workers do."""
    most_connections: int = 0
    """Accept no more than this many at once, shared out evenly to the workers; 0 is no bound of its own."""
    accept: bool = True
    """If false, listen and never accept: what the accept queue alone holds (catalogue D1)."""

    def __post_init__(self) -> None:
        _instance("listen", self.listen, tuple)
        if not self.listen:
            raise BadConfig("listen", "is empty; at least one endpoint is needed")
        for place, endpoint in enumerate(self.listen):
            _instance(f"listen[{place}]", endpoint, Endpoint)
        if len(set(self.listen)) < len(self.listen):
            raise BadConfig("listen", "names an endpoint twice; each may be named once")
        _whole("backlog", self.backlog, 1, 2**31 - 1)
        _instance("reuse_port", self.reuse_port, bool)
        _whole("most_connections", self.most_connections, 0, HIGHEST_COUNT)
        _instance("accept", self.accept, bool)


PROBES: tuple[str, ...] = tuple(name for name, _, _ in _core.probes() if name != "pattern")
"""What connections may be sniffed for, in order of precedence; patterns are a broker's own."""

PROTOCOLS = tuple(probe for probe in PROBES if probe not in {"socks4", "socks5", "tcpmux"})
"""What a broker looks for if nobody says. Three are left out, which would take what is another's: `tcpmux` is any line
of text, SOCKS begins with a byte or two that many have, and both are answered in the service's place."""


class PostgresTls(Enum):
    """What becomes of a PostgreSQL client's request for TLS (or for GSSAPI, which is declined unless it is left)."""

    OFFERED = "offered"
    """The client is told to begin: its server name (SNI) is known. A service that is relayed is then asked as well; one
    that is handed the socket gets a connection that begins with the hello."""
    DECLINED = "declined"
    """The client is told that there is none: user and database are known, if it goes on without."""
    LEFT = "left"
    """The service answers; only the protocol is known."""


MOTD_BYTES = 256
PATTERN_BYTES = 64
PATTERN_ENDS = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class BytePattern:
    """Bytes at an offset from the beginning of a connection. A route calls it `pattern:` and its name."""

    name: str
    offset: int
    bytes: bytes

    def __post_init__(self) -> None:
        _instance("name", self.name, str)
        _instance("bytes", self.bytes, bytes)
        if not 1 <= len(self.bytes) <= PATTERN_BYTES:
            raise BadConfig("bytes", f"are {len(self.bytes)}; 1 to {PATTERN_BYTES} are needed")
        _whole("offset", self.offset, 0, PATTERN_ENDS - len(self.bytes))


DOORS = ("smtp", "imap", "pop3", "mysql", "ldap")
"""What a door may speak, in the words of a route."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Who stands at a listener whose clients wait to be spoken to, or ask for TLS before they say whom they mean."""

    protocol: str
    host: str = "localhost"
    """Whom it says it is; for MySQL the version of the server."""
    requires_tls: bool = False
    """Who goes on without TLS is told that it has to come first."""

    def __post_init__(self) -> None:
        if self.protocol not in DOORS:
            raise BadConfig("door", f"{self.protocol!r} is not one of {', '.join(DOORS)}")
        if not (self.host.isascii() and self.host.isprintable() and 1 <= len(self.host) <= 255):
            raise BadConfig("door", "a host of 1 to 255 visible ASCII characters is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerListener:
    """Where a broker takes connections."""

    endpoint: Endpoint
    sniff_timeout_s: float = 3.0
    """How long a connection may take to show what it wants."""
    default: str | None = None
    """Who gets the silent and the unknown: `service:NAME` or a target."""
    proxy_from: tuple[str, ...] = ()
    """Prefixes whose PROXY headers are believed; from there each connection has to begin with one."""
    proxy_optional: bool = False
    """Connections from there may do without."""
    postgres_tls: PostgresTls = PostgresTls.OFFERED
    answers_socks: bool = True
    """What a SOCKS client asks for is answered here, and its service sees what comes behind. If false, a service gets
    all of it and answers itself; of version 5 only the protocol is known then."""
    protocols: tuple[str, ...] = PROTOCOLS
    """Probes, by their names."""
    patterns: tuple[BytePattern, ...] = ()
    """Asked after all probes, in their order."""
    door: Door | None = None
    """With one, neither probes nor patterns are asked."""
    consults: bool = False
    """What none of these know is asked about (`questions.Sniff`); it waits for the answer until its deadline."""
    fds: tuple[int, ...] = ()
    """Sockets bound to the endpoint, one per worker, to listen with instead of new ones.

    The engine copies them: they may be closed once it has started. What waits in their queues outlives it as long as
    somebody else holds them, and several processes may accept from one. They become non-blocking for all of these. Who
    binds them need not call listen(): what the engine sets before it makes room for long hellos.
    """

    def __post_init__(self) -> None:
        _instance("endpoint", self.endpoint, Endpoint)
        _instance("postgres_tls", self.postgres_tls, PostgresTls)
        if self.door is not None:
            _instance("door", self.door, Door)
            if self.proxy_optional:
                raise BadConfig("door", "greets first, and so cannot wait for a PROXY header that may not come")
        _instance("fds", self.fds, tuple)
        for place, descriptor in enumerate(self.fds):
            _whole(f"fds[{place}]", descriptor, 0, 2**31 - 1)
        _instance("answers_socks", self.answers_socks, bool)
        _seconds("sniff_timeout_s", self.sniff_timeout_s, 0.001)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manners:
    """What clients of services that sleep are told, each in its protocol."""

    motd: str = "This service is asleep; it wakes when it is used."
    """What a probe gets to read: the text of an HTTP answer, a line in Minecraft's list of servers."""
    retry_after_s: int = 5
    """When an HTTP client may come again."""
    health_paths: tuple[str, ...] = ("/healthz", "/livez", "/readyz")
    """Paths of HTTP that are asked for to see whether a service is well: no reason to wake it."""

    def __post_init__(self) -> None:
        _instance("motd", self.motd, str)
        if len(self.motd.encode()) > MOTD_BYTES or not self.motd.isprintable():
            raise BadConfig("motd", f"is {self.motd[:60]!r}; a line of at most {MOTD_BYTES} bytes is needed")
        _whole("retry_after_s", self.retry_after_s, 0, HIGHEST_COUNT)
        _instance("health_paths", self.health_paths, tuple)
        for path in self.health_paths:
            _instance("health_paths", path, str)
            if not path.startswith("/"):
                raise BadConfig("health_paths", f"has {path!r}; paths such as /healthz are needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """What a broker is to do: accept, look at the first bytes, ask the registry, hand off or relay.

    Limits are shared out evenly to the workers.
    """

    listeners: tuple[BrokerListener, ...]
    store: Path | _core.Registry
    """The folder of the registry, or a sealed one (`fourtuple.registry.sealed`)."""
    backlog: int = 4_096
    delivery_timeout_s: float = 5.0
    """How long a connection waits for a service that is absent or full, unless the service says it."""
    most_connections: int = 0
    """At once; 0 is no bound."""
    most_per_source: int = 0
    """At once from one IPv4 address or IPv6 /64; 0 is no bound."""
    most_per_service: int = 0
    """At once to one service, unless the service says it; 0 is no bound."""
    most_parked: int = 0
    """At once waiting for services that sleep; 0 is no bound."""
    most_parked_per_service: int = 0
    """The same, for one service."""
    parked_bytes: int = 0
    """What all who wait may have the kernel hold: what they have sent, and a window of 64 kB each; 0 is no bound."""
    settle_s: float = 0.0
    """A client has to wait so long before its service is woken: who leaves at once wakes nothing."""
    inetd_path: Path | None = None
    """Who starts a process for each connection of a service whose delivery is `inetd`: gets its sockets here, as in a
    handoff."""
    manners: Manners = field(default_factory=Manners)
    ledger: Path | None = None
    """Append a line of JSON for each connection that has ended."""
    ledger_every: int = 1
    """One line for so many."""
    ledger_steps: bool = False
    """A line also when a connection is accepted, has found its service, and is delivered."""

    def __post_init__(self) -> None:
        _instance("listeners", self.listeners, tuple)
        if not self.listeners:
            raise BadConfig("listeners", "is empty; at least one is needed")
        if len({listener.endpoint for listener in self.listeners}) < len(self.listeners):
            raise BadConfig("listeners", "name an endpoint twice; each may be named once")
        _instance("store", self.store, (Path, _core.Registry))
        _whole("backlog", self.backlog, 1, 2**31 - 1)
        _seconds("delivery_timeout_s", self.delivery_timeout_s, 0)
        _whole("most_connections", self.most_connections, 0, HIGHEST_COUNT // 4)
        _whole("most_per_source", self.most_per_source, 0, HIGHEST_COUNT)
        _whole("most_per_service", self.most_per_service, 0, HIGHEST_COUNT)
        _whole("most_parked", self.most_parked, 0, HIGHEST_COUNT)
        _whole("most_parked_per_service", self.most_parked_per_service, 0, HIGHEST_COUNT)
        _whole("parked_bytes", self.parked_bytes, 0, 2**63)
        _seconds("settle_s", self.settle_s, 0)
        _instance("manners", self.manners, Manners)
        _instance("inetd_path", self.inetd_path, (Path, type(None)))
        _whole("ledger_every", self.ledger_every, 1, HIGHEST_COUNT)
        _instance("ledger_steps", self.ledger_steps, bool)
        if self.ledger_steps and self.ledger_every != 1:
            raise BadConfig("ledger_steps", "is for every connection, and ledger_every leaves some out")


@dataclass(frozen=True, slots=True, kw_only=True)
class CarrierSettings:
    """What a carrier may use in each worker; None leaves the choice to the carrier."""

    most_connections: int | None = None
    slots_per_ring: int | None = None
    """uring: direct descriptors per ring, at most RLIMIT_NOFILE; small values make many rings."""
    buffer_bytes: int | None = None
    buffers_per_chunk: int | None = None
    buffer_chunks: int | None = None

    def __post_init__(self) -> None:
        _whole_or_none("most_connections", self.most_connections, 1, HIGHEST_COUNT)
        _whole_or_none("slots_per_ring", self.slots_per_ring, 1, 32_768)
        _whole_or_none("buffer_bytes", self.buffer_bytes, 64, 65_536)
        _whole_or_none("buffers_per_chunk", self.buffers_per_chunk, 1, 32_768)
        _whole_or_none("buffer_chunks", self.buffer_chunks, 1, 65_535)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Failures of one kind: at which step (socket, bind, connect, ...), which errno, how many."""

    step: str
    errno: int
    count: int

    @property
    def name(self) -> str:
        """The errno's name, such as EADDRNOTAVAIL."""
        return errno.errorcode.get(self.errno, str(self.errno))

    def __str__(self) -> str:
        return f"{self.name} at {self.step} x {self.count:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """A histogram in eight numbers: nanoseconds, but for `count`. All zero when nothing was measured."""

    count: int
    least: int
    mean: int
    p50: int
    p90: int
    p99: int
    p999: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CarrierNumbers:
    """What the carriers of an engine's workers use, added up."""

    rings: int
    slots: int
    slots_in_use: int
    enters: int
    """io_uring_enter or epoll_wait calls."""
    receive_rearms: int
    cq_overflows: int
    buffers_in_use: int
    accept_lost: int
    """Connections that the kernel closed because a ring was full; a bug of ours if not zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that an engine has counted, all workers together. What a counter means is in `fourtuple.metrics`.

    Of several workers `open_peak` is the sum of their peaks, which need not have come at the same moment.
    """

    connects_attempted: int
    connects_succeeded: int
    connects_failed: int
    tuples_busy: int
    accepts_succeeded: int
    accepts_failed: int
    open_now: int
    open_peak: int
    closed_by_us: int
    closed_by_peer: int
    broken: int
    listening_now: int
    listens_failed: int
    openings_right: int
    openings_now: int
    openings_failed: int
    pings_sent: int
    pings_right: int
    pings_refused: int
    pings_wrong: int
    pings_missing: int
    datagrams_stray: int
    bytes_in: int
    bytes_out: int
    buffer_waits: int
    pauses: int
    sniffing_now: int
    delivering_now: int
    relaying_now: int
    moving_now: int
    landed: int
    landings_refused: int
    moves_returned: int
    ferries_now: int
    ferries_lost: int
    delivery_retries: int
    handoffs_relayed: int
    ended_handed_off: int
    ended_relayed: int
    ended_client_broke: int
    ended_service_broke: int
    ended_client_left: int
    ended_no_route: int
    ended_sniff_deadline: int
    ended_sniff_too_long: int
    ended_garbage: int
    ended_unproxied: int
    ended_service_absent: int
    ended_service_full: int
    ended_service_unreachable: int
    ended_service_declined: int
    ended_over_total: int
    ended_over_source: int
    ended_over_service: int
    ended_moved: int
    ended_stopped: int
    ended_start_failed: int
    ended_wake_refused: int
    ended_over_parked: int
    ended_answered_asleep: int
    parked_now: int
    wakes_asked: int
    question_waits: int
    taken_s: float
    """Seconds since the engine started."""
    phase: Phase
    running: bool
    failures: tuple[Failure, ...]
    stopped_by: Failure | None
    """The failure that made it stop making connections, if one did."""
    opening_reasons: tuple[tuple[str, int], ...]
    """Why openings failed, and how many of each; `fourtuple.load.reasons` explains the names."""
    round_reasons: tuple[tuple[str, int], ...]
    """The same of rounds that were wrong."""
    connect_ns: Quantiles
    opening_ns: Quantiles
    """From the connection's coming to the end of its opening, a TLS handshake included."""
    echo_ns: Quantiles
    fill_curves: tuple[tuple[tuple[int, int], ...], ...]
    """Per worker: (median connect time in ns, count) per hundredth of its share of the space."""
    listeners_served: int
    carrier: CarrierNumbers
    errors: tuple[str, ...]
    """Why workers ended before their work did; empty if none has."""

    @property
    def pings_answered(self) -> int:
        """Tokens whose fate is known: right, refused, wrong or missing."""
        return self.pings_right + self.pings_refused + self.pings_wrong + self.pings_missing


class Engine:
    """One core on a carrier, in one or more workers. A context manager: leaving it stops and joins the workers."""

    def __init__(self, workers: _core.Workers, carrier: CarrierName, fallback_reason: str) -> None:
        """For `start`; not called otherwise."""
        self._workers = workers
        self._started_s = time.monotonic()
        self.carrier = carrier
        """Which carrier runs: URING or EPOLL."""
        self.fallback_reason = fallback_reason
        """Why AUTO did not take uring; empty if it did, or was not asked."""

    @classmethod
    def start(
        cls,
        config: LoadConfig | EchoConfig | BrokerConfig,
        carrier: CarrierName = CarrierName.AUTO,
        workers: int | None = None,
        settings: CarrierSettings | None = None,
    ) -> Engine:
        """Start the workers; by default one per usable CPU, as far as the work is worth it."""
        _instance("config", config, (LoadConfig, EchoConfig, BrokerConfig))
        _instance("carrier", carrier, CarrierName)
        _whole_or_none("workers", workers, 1, 1_024)
        count = workers or _worth_while(config)
        _require_a_listener_each(config, count)
        chosen = settings or CarrierSettings()
        _require_room_to_say(config, chosen)
        if carrier is not CarrierName.AUTO:
            return cls(_core.Workers.start(config, carrier.value, count, chosen), carrier, "")
        try:
            if isinstance(config, BrokerConfig) and not _core.uring_abilities()["lent_descriptors"]:
                raise MissingFeature("io_uring here cannot lend a descriptor (IORING_OP_FIXED_FD_INSTALL, Linux 6.8)")
            return cls(_core.Workers.start(config, CarrierName.URING.value, count, chosen), CarrierName.URING, "")
        except (MissingFeature, MissingPrivilege, LimitReached) as refusal:
            reason = str(refusal)
        return cls(_core.Workers.start(config, CarrierName.EPOLL.value, count, chosen), CarrierName.EPOLL, reason)

    @property
    def workers(self) -> int:
        """How many workers it was started with."""
        return self._workers.count

    @property
    def running(self) -> bool:
        """Whether any worker still works."""
        return self._workers.running

    def snapshot(self) -> Snapshot:
        """The numbers now; workers publish theirs every 50 ms and when they end. Never raises for what went wrong."""
        raw = self._workers.snapshot()
        stopped_by = raw["stopped_by"]
        failures = tuple(Failure(step=step, errno=error, count=count) for step, error, count in raw["failures"])
        return Snapshot(
            **{row.name: value for row, value in zip(COUNTERS, raw["counters"], strict=True)},
            taken_s=time.monotonic() - self._started_s,
            phase=Phase(raw["phase"]),
            running=raw["running"],
            failures=failures,
            stopped_by=next((row for row in failures if (row.step, row.errno) == stopped_by), None),
            opening_reasons=tuple(raw["opening_reasons"]),
            round_reasons=tuple(raw["round_reasons"]),
            connect_ns=Quantiles(**raw["connect_ns"]),
            opening_ns=Quantiles(**raw["opening_ns"]),
            echo_ns=Quantiles(**raw["echo_ns"]),
            fill_curves=tuple(tuple(curve) for curve in raw["fill_curves"]),
            listeners_served=raw["listeners_served"],
            carrier=CarrierNumbers(**raw["carrier"]),
            errors=tuple(raw["errors"]),
        )

    def ping(self) -> None:
        """Send the token on every connection once and check what comes back.

        How far it is, `Snapshot.pings_answered` says. The phase does not: it may not have changed yet when somebody
        looks, or have changed back already.
        """
        self._workers.order("ping")

    def set_rate(self, rate_per_s: int) -> None:
        """New connections per second from now on; 0 is as fast as possible."""
        _whole("rate_per_s", rate_per_s, 0, HIGHEST_COUNT)
        self._workers.order("rate", rate_per_s)

    def set_target(self, connections: int) -> None:
        """Raise (or lower, never below what is open) the number of connections to hold."""
        _whole("connections", connections, 0, HIGHEST_COUNT)
        self._workers.order("target", connections)

    def close(self) -> None:
        """Make no new connections and close all; the engine ends when they are closed."""
        self._workers.order("close")

    def drain(self) -> None:
        """Accept no more; the engine ends when the connections that there are have ended by themselves."""
        self._workers.order("drain")

    def ferry(self, fds: Sequence[int]) -> None:
        """As `drain`, and move the connections that there are to another process, which takes them with `land`.

        One socket (SOCK_SEQPACKET) per worker; the engine copies them, and the caller closes its own, so that an end
        is seen. A relay moves at any time, with every byte that is on its way in it; a client that is looked at or
        waits for its service, as soon as nothing is under way for it; what the other process does not take lives on
        here. The engine ends when it has nothing more, or accepts again after `resume`.
        """
        if len(fds) != self.workers:
            raise BadConfig("fds", f"are {len(fds)}, and there are {self.workers} workers")
        self._workers.give("ferry", list(fds))

    def land(self, fds: Sequence[int]) -> None:
        """Take over the connections that come through these sockets, dealt out to the workers; copied as by `ferry`.

        `Snapshot.ferries_now` is 0 when all have said that nothing more comes, or are lost.
        """
        self._workers.give("land", list(fds))

    def resume(self) -> None:
        """Accept again after `drain` or `ferry`, unless the engine has ended by then, and move nothing more."""
        self._workers.order("resume")

    @property
    def questions_fd(self) -> int:
        """A descriptor that is readable while there are questions, for a poll or an event loop; not to be read."""
        return self._workers.questions_fd

    def questions(self, most: int = 1_024) -> list[Question]:
        """What its workers have asked and nobody has taken, the oldest first; never waits."""
        return [_question(row) for row in self._workers.questions(most)]

    def answer(self, answer: Answer) -> None:
        """Tell all workers what became of a service."""
        peer = answer.peer if isinstance(answer, Refused) else None
        self._workers.answer(type(answer).__name__.lower(), answer.service, peer)

    def opine(self, worker: int, ticket: int, known: Known | None, more_than: int | None = None) -> None:
        """Answer a `Sniff`: what it is; or that more than so many bytes are needed; or that nobody knows."""
        row = None
        if known is not None:
            row = (known.protocol, known.name, known.user, known.database, known.client)
        self._workers.opine(worker, ticket, more_than, row)

    def hold(self, service: str) -> None:
        """New connections of the service wait, until `Up` or `Slept` is answered; each worker says `Held`."""
        self._workers.hold(service)

    def ask_usage(self, ticket: int, services: Sequence[str]) -> None:
        """How much are these used? Each worker says `Usage` with this ticket."""
        self._workers.ask_usage(ticket, services)

    def ask_survey(
        self,
        worker: int,
        ticket: int,
        start: int,
        most: int,
        service: str | None = None,
        source: tuple[IPv4Address | IPv6Address, int] | None = None,
    ) -> bool:
        """Which connections are there, of one service, from one prefix (address and bits), or at all? The worker says
        `Surveyed`, having looked at some thousand places from `start` on. False if it works no more."""
        return self._workers.ask_survey(worker, ticket, start, most, service, source)

    def ask_busiest(self, worker: int, ticket: int, by: str, start: int, most: int) -> bool:
        """Which services are the busiest, by `live`, `total` or `bytes`? The worker says `Busiest`."""
        return self._workers.ask_busiest(worker, ticket, by, start, most)

    def ask_close(self, worker: int, ticket: int, connection: int, start: int) -> bool:
        """Close a connection, by its id. The worker says `Closed`, as of `ask_survey`."""
        return self._workers.ask_close(worker, ticket, connection, start)

    def set_limits(self, most_connections: int, most_per_source: int, most_per_service: int) -> None:
        """Bounds of a broker from now on, as in `BrokerConfig`; what there is may stay."""
        _whole("most_connections", most_connections, 0, HIGHEST_COUNT // 4)
        _whole("most_per_source", most_per_source, 0, HIGHEST_COUNT)
        _whole("most_per_service", most_per_service, 0, HIGHEST_COUNT)
        self._workers.set_limits(most_connections, most_per_source, most_per_service)

    def stop(self) -> None:
        """End now, whatever is open."""
        self._workers.stop()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; says whether it came in time. Raises EngineStopped if a worker ended before its work."""
        if timeout_s is not None:
            _seconds("timeout_s", timeout_s, 0)
        return self._workers.join(timeout_s)

    def wait_for(self, predicate: Callable[[Snapshot], bool], timeout_s: float) -> Snapshot:
        """The first snapshot of which `predicate` is true; TimeoutError or EngineStopped if there will be none."""
        _seconds("timeout_s", timeout_s, 0)
        deadline_s = time.monotonic() + timeout_s
        while not predicate(now := self.snapshot()):
            if not now.running:
                raise EngineStopped("; ".join(now.errors) or f"the engine was done before ({_in_short(now)})")
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"not within {timeout_s:g} s ({_in_short(now)})")
            time.sleep(_GLANCE_S)
        return now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is None:
            self.join()
            return
        try:
            self.join()
        except EngineStopped as stopped:  # the error on its way out is the one to see
            if error is not None:
                error.add_note(f"the engine: {stopped}")


def raise_soft_descriptors() -> None:
    """Of this process, up to what it may have without asking anybody (catalogue B1).

    It bounds epoll's connections, and how many direct descriptors a ring has: of many small rings each costs its turn.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def uring_abilities() -> dict[str, bool]:
    """What io_uring can do for this process, each ability tried; raises, naming the reason, where there is none."""
    return dict(_core.uring_abilities())


class Prelude(Enum):
    """Whether a PROXY header stands in front of what is sniffed."""

    NONE = "none"
    ALLOWED = "allowed"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sniffed:
    """What the first bytes of a connection show. What its protocol does not have, or it left out, is None."""

    verdict: str
    """match; no: no probe knows it; more: nothing can be said yet; refused: broken where a route depends on it."""
    protocol: str | None
    answers: tuple[bytes, ...]
    """What a broker sends on the way: a PostgreSQL client waits for it."""
    needed: int | None = None
    """With more: how many bytes a match takes at least."""
    why: str | None = None
    """With refused: the reason, as it is counted."""
    intent: str | None = None
    """With match: use, or probe where it bears the mark of one (HEAD, TLS without a server name, ...)."""
    end: int | None = None
    name: str | None = None
    port: int | None = None
    number: int | None = None
    path: bytes | None = None
    path_is_plain: bool = True
    alpn: tuple[bytes, ...] = ()
    ech: bool = False
    user: bytes | None = None
    database: bytes | None = None
    client: bytes | None = None
    cancel: bytes | None = None
    starttls: bool = False
    """It asks to go on with TLS, within the protocol, before anything else."""
    reply: bytes | None = None
    """What it waits for, to be told when its service is reached; all up to `end` is then not for the service."""
    proxied: tuple[str, str] | None = None
    """Source and destination out of a PROXY header."""


def sniff(
    opening: bytes,
    *,
    probes: Sequence[str] = PROBES,
    prelude: Prelude = Prelude.NONE,
    postgres_tls: bool = True,
) -> Sniffed:
    """What a broker would see in the first bytes of a connection; for people and tests, not for its own path.

    `postgres_tls` says whether a PostgreSQL client that asks for TLS is told to begin.
    """
    for name in probes:
        if name not in PROBES:
            raise BadConfig("probes", f"{name[:40]!r} is no probe; allowed are {', '.join(PROBES)}")
    _instance("opening", opening, bytes)
    _instance("prelude", prelude, Prelude)
    return Sniffed(**_core.sniff(opening, list(probes), prelude.value, postgres_tls))


def _question(row: _core._Question) -> Question:
    match row:
        case ("wake", worker, wake):
            peer = wake["peer"]
            return Wake(
                worker=worker,
                service=wake["service"],
                start=wake["start"],
                target=wake["target"],
                name=wake["name"],
                protocol=wake["protocol"],
                delivery=wake["delivery"],
                peer=None if peer is None else Endpoint(*peer),
            )
        case ("usage", worker, usage):
            rows = (
                ServiceUsage(service=service, live=live, parked=parked, unused_s=unused_s)
                for service, live, parked, unused_s in usage["rows"]
            )
            return Usage(worker=worker, ticket=usage["ticket"], rows=tuple(rows))
        case ("sniff", worker, sniff):
            return Sniff(worker=worker, **sniff)
        case ("surveyed", worker, surveyed):
            found = tuple(
                SeenConnection(
                    id=seen["id"],
                    peer=None if seen["peer"] is None else Endpoint(*seen["peer"]),
                    service=seen["service"],
                    state=seen["state"],
                    age_s=seen["age_s"],
                    bytes_up=seen["bytes_up"],
                    bytes_down=seen["bytes_down"],
                    listener=seen["listener"],
                )
                for seen in surveyed["rows"]
            )
            return Surveyed(worker=worker, ticket=surveyed["ticket"], connections=found, next=surveyed["next"])
        case ("busiest", worker, busiest):
            return Busiest(
                worker=worker,
                ticket=busiest["ticket"],
                services=tuple(busiest["rows"]),
                next=busiest["next"],
                least=busiest["least"],
            )
        case ("closed", worker, closed):
            return Closed(worker=worker, **closed)
        case (_, worker, held):
            return Held(worker=worker, service=held["service"], live=held["live"])


def _require_room_to_say(config: LoadConfig | EchoConfig | BrokerConfig, settings: CarrierSettings) -> None:
    if isinstance(config, LoadConfig) and config.dialogue is not None and settings.buffer_bytes is not None:
        longest = config.dialogue.longest_say_bytes
        if longest > settings.buffer_bytes:
            raise BadConfig("settings.buffer_bytes", f"is {settings.buffer_bytes}; the dialogue says {longest} at once")


def _require_a_listener_each(config: LoadConfig | EchoConfig | BrokerConfig, workers: int) -> None:
    for place, listener in enumerate(config.listeners if isinstance(config, BrokerConfig) else ()):
        if listener.fds and len(listener.fds) != workers:
            raise BadConfig(f"listeners[{place}].fds", f"are {len(listener.fds)}, and there are {workers} workers")


def _worth_while(config: LoadConfig | EchoConfig | BrokerConfig) -> int:
    cpus = len(os.sched_getaffinity(0))
    match config:
        case LoadConfig(connections=connections, rate_per_s=rate_per_s, tls=tls):
            enough = CONNECTIONS_PER_WORKER if tls is None else SECURED_PER_WORKER
            return max(1, min(cpus, connections // enough, rate_per_s or cpus))
        case EchoConfig(most_connections=most) if most:
            return max(1, min(cpus, most // CONNECTIONS_PER_WORKER))
        case BrokerConfig(listeners=listeners) if any(listener.fds for listener in listeners):
            return max(len(listener.fds) for listener in listeners)
        case _:
            return cpus


def _in_short(now: Snapshot) -> str:
    failures = ", ".join(str(failure) for failure in now.failures)
    return f"{now.phase.value}, {now.open_now:,} open" + (f", {failures}" if failures else "")


def _instance(path: str, value: object, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise BadConfig(path, f"is {value!r}; a {names} is needed")


def _whole(path: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadConfig(path, f"is {value!r}; a whole number from {least} to {most} is needed")


def _whole_or_none(path: str, value: object, least: int, most: int) -> None:
    if value is not None:
        _whole(path, value, least, most)


def _seconds(path: str, value: object, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= HIGHEST_COUNT:
        raise BadConfig(path, f"is {value!r}; a number of seconds from {least:g} to {HIGHEST_COUNT} is needed")
