"""What an engine may be given: one frozen dataclass for each core that it can run, checked when it is made."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from msgspec import Struct, field

from fourtuple import _core
from fourtuple.dialogue import Dialogue
from fourtuple.engine.checks import HIGHEST_COUNT, instance, seconds, whole, whole_or_none
from fourtuple.engine.sniffing import PROTOCOLS
from fourtuple.errors import BadConfig
from fourtuple.tuples import Endpoint, Protocol, TupleSpace


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


class TlsConfig(Struct, frozen=True, kw_only=True):
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
        instance("tls.server_name", self.server_name, str)
        instance("tls.insecure", self.insecure, bool)
        instance("tls.alpn", self.alpn, tuple)
        for path, value in (("tls.ca", self.ca), *(("tls.identity", one) for one in self.identity or ())):
            if value is not None:
                instance(path, value, bytes)


class LoadConfig(Struct, frozen=True, kw_only=True):
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
        instance("space", self.space, TupleSpace)
        for side in ("sources", "source_ports", "destinations", "destination_ports"):
            if not getattr(self.space, side):
                raise BadConfig(f"space.{side}", "is empty; at least one is needed")
        instance("choice", self.choice, SourceChoice)
        whole("connections", self.connections, 0, HIGHEST_COUNT)
        whole("window", self.window, 1, 65_535)
        whole("rate_per_s", self.rate_per_s, 0, HIGHEST_COUNT)
        seconds("connect_timeout_s", self.connect_timeout_s, 0.001)
        seconds("ping_timeout_s", self.ping_timeout_s, 0.001)
        whole("ping_window", self.ping_window, 1, 65_535)
        whole("token_bytes", self.token_bytes, 16, 2_048)
        whole("seed", self.seed, 0, 2**64 - 1)
        seconds("ping_every_s", self.ping_every_s, 0)
        whole("give_up_after", self.give_up_after, 1, HIGHEST_COUNT)
        instance("abort_on_close", self.abort_on_close, bool)
        instance("keep_fill_curve", self.keep_fill_curve, bool)
        instance("closed_loop", self.closed_loop, bool)
        if self.closed_loop and self.ping_every_s:
            raise BadConfig("closed_loop", "has no interval; leave out ping_every_s")
        if self.tls is not None:
            instance("tls", self.tls, TlsConfig)
            if self.space.protocol is Protocol.UDP:
                raise BadConfig("tls", "is for tcp, and the space is udp's")
        if self.dialogue is None:
            return
        instance("dialogue", self.dialogue, Dialogue)
        if self.space.protocol is Protocol.UDP:
            self.dialogue.require_datagrams()
        else:
            self.dialogue.require_stream()
        if self.closed_loop and not self.dialogue.round:
            raise BadConfig("closed_loop", "needs a round, and the dialogue has none")


class EchoConfig(Struct, frozen=True, kw_only=True):
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
        instance("listen", self.listen, tuple)
        if not self.listen:
            raise BadConfig("listen", "is empty; at least one endpoint is needed")
        for place, endpoint in enumerate(self.listen):
            instance(f"listen[{place}]", endpoint, Endpoint)
        if len(set(self.listen)) < len(self.listen):
            raise BadConfig("listen", "names an endpoint twice; each may be named once")
        whole("backlog", self.backlog, 1, 2**31 - 1)
        instance("reuse_port", self.reuse_port, bool)
        whole("most_connections", self.most_connections, 0, HIGHEST_COUNT)
        instance("accept", self.accept, bool)


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


class BytePattern(Struct, frozen=True, kw_only=True):
    """Bytes at an offset from the beginning of a connection. A route calls it `pattern:` and its name."""

    name: str
    offset: int
    bytes: bytes

    def __post_init__(self) -> None:
        instance("name", self.name, str)
        instance("bytes", self.bytes, bytes)
        if not 1 <= len(self.bytes) <= PATTERN_BYTES:
            raise BadConfig("bytes", f"are {len(self.bytes)}; 1 to {PATTERN_BYTES} are needed")
        whole("offset", self.offset, 0, PATTERN_ENDS - len(self.bytes))


DOORS = ("smtp", "imap", "pop3", "mysql", "ldap")
"""What a door may speak, in the words of a route."""


class Door(Struct, frozen=True, kw_only=True):
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


class BrokerListener(Struct, frozen=True, kw_only=True):
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
        instance("endpoint", self.endpoint, Endpoint)
        instance("postgres_tls", self.postgres_tls, PostgresTls)
        if self.door is not None:
            instance("door", self.door, Door)
            if self.proxy_optional:
                raise BadConfig("door", "greets first, and so cannot wait for a PROXY header that may not come")
        instance("fds", self.fds, tuple)
        for place, descriptor in enumerate(self.fds):
            whole(f"fds[{place}]", descriptor, 0, 2**31 - 1)
        instance("answers_socks", self.answers_socks, bool)
        seconds("sniff_timeout_s", self.sniff_timeout_s, 0.001)


class Manners(Struct, frozen=True, kw_only=True):
    """What clients of services that sleep are told, each in its protocol."""

    motd: str = "This service is asleep; it wakes when it is used."
    """What a probe gets to read: the text of an HTTP answer, a line in Minecraft's list of servers."""
    retry_after_s: int = 5
    """When an HTTP client may come again."""
    health_paths: tuple[str, ...] = ("/healthz", "/livez", "/readyz")
    """Paths of HTTP that are asked for to see whether a service is well: no reason to wake it."""

    def __post_init__(self) -> None:
        instance("motd", self.motd, str)
        if len(self.motd.encode()) > MOTD_BYTES or not self.motd.isprintable():
            raise BadConfig("motd", f"is {self.motd[:60]!r}; a line of at most {MOTD_BYTES} bytes is needed")
        whole("retry_after_s", self.retry_after_s, 0, HIGHEST_COUNT)
        instance("health_paths", self.health_paths, tuple)
        for path in self.health_paths:
            instance("health_paths", path, str)
            if not path.startswith("/"):
                raise BadConfig("health_paths", f"has {path!r}; paths such as /healthz are needed")


class BrokerConfig(Struct, frozen=True, kw_only=True):
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
        instance("listeners", self.listeners, tuple)
        if not self.listeners:
            raise BadConfig("listeners", "is empty; at least one is needed")
        if len({listener.endpoint for listener in self.listeners}) < len(self.listeners):
            raise BadConfig("listeners", "name an endpoint twice; each may be named once")
        instance("store", self.store, (Path, _core.Registry))
        whole("backlog", self.backlog, 1, 2**31 - 1)
        seconds("delivery_timeout_s", self.delivery_timeout_s, 0)
        whole("most_connections", self.most_connections, 0, HIGHEST_COUNT // 4)
        whole("most_per_source", self.most_per_source, 0, HIGHEST_COUNT)
        whole("most_per_service", self.most_per_service, 0, HIGHEST_COUNT)
        whole("most_parked", self.most_parked, 0, HIGHEST_COUNT)
        whole("most_parked_per_service", self.most_parked_per_service, 0, HIGHEST_COUNT)
        whole("parked_bytes", self.parked_bytes, 0, 2**63)
        seconds("settle_s", self.settle_s, 0)
        instance("manners", self.manners, Manners)
        instance("inetd_path", self.inetd_path, (Path, type(None)))
        whole("ledger_every", self.ledger_every, 1, HIGHEST_COUNT)
        instance("ledger_steps", self.ledger_steps, bool)
        if self.ledger_steps and self.ledger_every != 1:
            raise BadConfig("ledger_steps", "is for every connection, and ledger_every leaves some out")


class CarrierSettings(Struct, frozen=True, kw_only=True):
    """What a carrier may use in each worker; None leaves the choice to the carrier."""

    most_connections: int | None = None
    slots_per_ring: int | None = None
    """uring: direct descriptors per ring, at most RLIMIT_NOFILE; small values make many rings."""
    buffer_bytes: int | None = None
    buffers_per_chunk: int | None = None
    buffer_chunks: int | None = None

    def __post_init__(self) -> None:
        whole_or_none("most_connections", self.most_connections, 1, HIGHEST_COUNT)
        whole_or_none("slots_per_ring", self.slots_per_ring, 1, 32_768)
        whole_or_none("buffer_bytes", self.buffer_bytes, 64, 65_536)
        whole_or_none("buffers_per_chunk", self.buffers_per_chunk, 1, 32_768)
        whole_or_none("buffer_chunks", self.buffer_chunks, 1, 65_535)
