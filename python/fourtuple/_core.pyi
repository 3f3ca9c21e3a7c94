"""The compiled half of fourtuple, as `fourtuple.engine` sees it. Use that module; this one decides nothing."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from os import PathLike
from typing import Literal, NotRequired, TypeAlias, TypedDict, final

from fourtuple.engine import BrokerConfig, CarrierSettings, EchoConfig, LoadConfig
from fourtuple.launcher.spawn import Birth
from fourtuple.services import Seen

__all__ = [
    "Addresses",
    "Importer",
    "Pages",
    "Reaching",
    "Registry",
    "Workers",
    "check_rows",
    "counters",
    "probes",
    "reasons",
    "refusals",
    "sniff",
    "spawn",
    "uring_abilities",
    "version",
]

_ServiceRow: TypeAlias = tuple[str, str, str, int | None, int | None, int | None, int | None, str | None]
_RouteRow: TypeAlias = tuple[Sequence[tuple[str, str]], str, str, int | None, int | None, int | None, str | None]
_OutcomeRow: TypeAlias = tuple[str, str | None, tuple[str, str, int | None, int | None, int | None, str | None] | None]

class _Sizes(TypedDict):
    services: int
    wide_ports: int
    routes: int
    services_bytes: int
    file_bytes: int
    version: int
    readers: int
    most_readers: int

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

class _Wake(TypedDict):
    service: str
    start: str
    target: str
    name: str
    user: str
    database: str
    protocol: str
    delivery: str
    peer: tuple[IPv4Address | IPv6Address, int] | None

class _Usage(TypedDict):
    ticket: int
    rows: list[tuple[str, int, int, float | None]]

class _Held(TypedDict):
    service: str
    live: int

class _Sniff(TypedDict):
    ticket: int
    listener: int
    opening: bytes
    is_all: bool

class _SeenConnection(TypedDict):
    id: int
    peer: tuple[IPv4Address | IPv6Address, int] | None
    service: str
    state: str
    age_s: float
    bytes_up: int
    bytes_down: int
    listener: int

class _Surveyed(TypedDict):
    ticket: int
    rows: list[_SeenConnection]
    next: int | None

class _Busiest(TypedDict):
    ticket: int
    rows: list[tuple[str, int, int]]
    next: int | None
    least: int

class _Closed(TypedDict):
    ticket: int
    found: bool
    next: int | None

_Question: TypeAlias = (
    tuple[Literal["wake"], int, _Wake]
    | tuple[Literal["usage"], int, _Usage]
    | tuple[Literal["held"], int, _Held]
    | tuple[Literal["sniff"], int, _Sniff]
    | tuple[Literal["surveyed"], int, _Surveyed]
    | tuple[Literal["busiest"], int, _Busiest]
    | tuple[Literal["closed"], int, _Closed]
)
_Known: TypeAlias = tuple[str, str | None, str | None, str | None, str | None]

class _Seen(TypedDict):
    verdict: str
    protocol: str | None
    answers: tuple[bytes, ...]
    needed: NotRequired[int]
    why: NotRequired[str]
    intent: NotRequired[str]
    end: NotRequired[int]
    name: NotRequired[str | None]
    port: NotRequired[int | None]
    number: NotRequired[int | None]
    path: NotRequired[bytes | None]
    path_is_plain: NotRequired[bool]
    alpn: NotRequired[tuple[bytes, ...]]
    ech: NotRequired[bool]
    user: NotRequired[bytes | None]
    database: NotRequired[bytes | None]
    client: NotRequired[bytes | None]
    cancel: NotRequired[bytes | None]
    starttls: NotRequired[bool]
    reply: NotRequired[bytes | None]
    proxied: NotRequired[tuple[str, str] | None]

@final
class Workers:
    """One worker per core of an engine, until all have ended."""

    @staticmethod
    def start(
        config: LoadConfig | EchoConfig | BrokerConfig, carrier: str, workers: int, settings: CarrierSettings
    ) -> Workers:
        """Share `config` out to `workers` threads on the carrier of that name, and start them."""

    def snapshot(self) -> _Snapshot:
        """Counters, failures and histograms of all workers together."""

    def order(self, kind: str, value: int = 0) -> None:
        """Ask every running worker for something; `value` is the whole engine's and is shared out."""

    def give(self, kind: str, fds: Sequence[int]) -> None:
        """Give copies of sockets to running workers, dealt out from the first on.

        "ferry" moves their connections to whoever is at the other end, "land" takes what comes.
        """

    @property
    def questions_fd(self) -> int:
        """Readable while there are questions; it is closed with this object."""

    def questions(self, most: int) -> list[_Question]:
        """The oldest questions, at most so many: kind, number of the worker, fields."""

    def answer(self, kind: str, service: str, peer: IPv4Address | IPv6Address | None = None) -> None:
        """Tell every running worker what became of a service."""

    def opine(self, worker: int, ticket: int, more_than: int | None = None, known: _Known | None = None) -> None:
        """Tell one worker what a connection is that it asked about: known, or of which more than so many bytes are
        needed."""

    def ask_survey(
        self,
        worker: int,
        ticket: int,
        start: int,
        most: int,
        service: str | None = None,
        source: tuple[IPv4Address | IPv6Address, int] | None = None,
    ) -> bool:
        """Ask one worker for connections, those from place `start` on; false if it works no more."""

    def ask_busiest(self, worker: int, ticket: int, by: str, start: int, most: int) -> bool:
        """Ask one worker for its busiest services, those from place `start` on; false if it works no more."""

    def ask_close(self, worker: int, ticket: int, id: int, start: int) -> bool:
        """Have one worker close a connection, looking for it from place `start` on; false if it works no more."""

    def set_limits(self, connections: int, per_source: int, per_service: int) -> None:
        """Bounds from now on; each is the whole engine's and is shared out, and 0 is no bound."""

    def hold(self, service: str) -> None:
        """Have new connections of the service wait, in every running worker."""

    def ask_usage(self, ticket: int, services: Sequence[str]) -> None:
        """Ask every running worker how much these services are used."""

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

def version() -> str: ...
def uring_abilities() -> dict[str, bool]:
    """What io_uring can do here, each ability tried and not guessed; raises where there is no io_uring."""

def probes() -> list[tuple[str, int, str]]:
    """One row per probe, in order of precedence: name, bytes looked at at most, what it shows."""

def refusals() -> list[tuple[str, str]]:
    """One row per reason to refuse a connection: name, meaning."""

def sniff(bytes: bytes, probes: list[str], prelude: str, postgres_tls: bool) -> _Seen:
    """What these probes see in `bytes`."""

def spawn(birth: Birth) -> tuple[int, int]:
    """Start a process; gives its id and a pidfd. OSError says what could not be done."""

@final
class Registry:
    """An open registry; `fourtuple.registry.Registry` is its face."""

    @staticmethod
    def open(path: str | PathLike[str], create: bool, most_bytes: int | None) -> Registry:
        """Open the folder, made if `create`, for at most so many bytes."""

    @staticmethod
    def sealed(path: str | PathLike[str], services: Sequence[_ServiceRow], routes: Sequence[_RouteRow]) -> Registry:
        """A registry of these rows alone, in the empty file at `path`, which nobody else opens; it never changes."""

    def put(self, rows: Sequence[_ServiceRow], mode: str) -> tuple[int, int]:
        """Write rows in one transaction; gives back how many were new and how many replaced."""

    def remove(self, names: Sequence[str]) -> list[str]:
        """Remove services in one transaction; gives back which there were not."""

    def service(self, name: str) -> _ServiceRow | None:
        """The service of that name."""

    def service_at(self, wide_port: int) -> _ServiceRow | None:
        """The service with that wide port."""

    def pages(self, after: str | None) -> Pages:
        """A snapshot whose services can be had page by page, those after a name or all."""

    def importer(self, format: str, mode: str, batch_rows: int) -> Importer:
        """Take text in blocks."""

    def add_routes(self, rows: Sequence[_RouteRow], replace: bool) -> None:
        """Add routes in one transaction, or replace those of equal conditions."""

    def remove_route(self, conditions: Sequence[tuple[str, str]]) -> bool:
        """Remove the route with these conditions; says whether there was one."""

    def routes(self) -> list[_RouteRow]:
        """All routes in the order of their precedence."""

    def resolve(self, seen: Seen) -> _OutcomeRow:
        """Which service a connection means."""

    def time_lookups(self, names: Sequence[bytes], snapshot_each: bool) -> list[int]:
        """Nanoseconds of each of these lookups by name; a snapshot each, or one for all."""

    def sizes(self) -> _Sizes:
        """How large it is."""

    def reach(self) -> tuple[list[str], list[int], bool]:
        """Where the targets of all services lie: folders of unix sockets, TCP ports, whether any name is abstract."""

    def addresses(self) -> Addresses:
        """The addresses that targets of services name."""

    @property
    def version(self) -> int:
        """Number of the last transaction of any process."""

    def clear_stale_readers(self) -> int:
        """Free the places of readers whose processes are gone."""

    def close(self) -> None:
        """Let go of the file; every later call is an error."""

@final
class Addresses:
    """Addresses of a registry as they were."""

    def __contains__(self, packed: object, /) -> bool:
        """Whether one of its targets is at this address and port, packed as `confinement.connecting.packed` does."""

@final
class Reaching:
    """`Registry.reach` of a folder, found by a thread of its own; fork() is safe again once it has been joined."""

    def __new__(cls, path: str | PathLike[str]) -> Reaching: ...
    def join(self, wanted: bool) -> tuple[list[str], list[int], bool] | None:
        """Wait for its end, or bring it about; what it has found, None if not `wanted` or joined before."""

@final
class Pages:
    """The services of one snapshot, in the order of their names."""

    def rows(self, most: int) -> list[_ServiceRow]:
        """The next so many rows; fewer at the end."""

    def text(self, format: str, most: int) -> bytes:
        """The next so many rows as lines of text; empty at the end."""

@final
class Importer:
    """Text becomes services, a transaction per `batch_rows` of them."""

    def feed(self, block: bytes) -> None:
        """The next block, of any size. After an error what waits for its transaction is forgotten."""

    def finish(self) -> None:
        """The last line, and the last transaction."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """Lines read, services added, services replaced: the last two are on the disk."""

def check_rows(services: Sequence[_ServiceRow], routes: Sequence[_RouteRow]) -> None:
    """Services and routes as a registry would take them, without one: the first that it would not is the error."""
