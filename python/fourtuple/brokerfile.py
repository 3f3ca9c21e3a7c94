"""broker.toml: listeners, patterns, templates, services and routes of a small installation in one file.

Decides what such a file may say, and that an error names its line and key. Knows no open registry and no socket: what
becomes of a listener is the broker's.
"""

# Annotations are evaluated here: msgspec asks for all of them, and to make them of text takes 2 ms of each start.

import re
import socket
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import msgspec
from msgspec import Meta

from fourtuple.control import default_socket
from fourtuple.control.peers import Access, group_id
from fourtuple.engine import DOORS, MOTD_BYTES, PATTERN_ENDS, PROBES, BytePattern, Door, Manners
from fourtuple.errors import BadConfig
from fourtuple.registry import check
from fourtuple.services import HIGHEST, Delivery, Match, Route, Service
from fourtuple.templates import Template
from fourtuple.tuples import Endpoint

LARGEST_BYTES = 4 << 20
"""Some ten thousand services; CSV and JSON lines are for more."""
MYSQL_VERSION = "8.0.11-fourtuple"
"""What a door says that speaks MySQL."""
_Number = Annotated[int, Meta(ge=1, le=HIGHEST)]
_Patience = Annotated[int, Meta(ge=0, le=HIGHEST)]
_Port = Annotated[int, Meta(ge=1, le=65_535)]
_Key = tuple[int | str, ...]
"""Names of tables and keys, numbers of tables in a list: what leads to a value."""
_PATTERN = "pattern:"
_SPOKEN = {"http1" if probe == "http" else probe: probe for probe in PROBES}
"""What a listener may look for, in the words of a route, and the probe that does."""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a table may say. msgspec and not pydantic: of what a broker takes to start, that was a third."""


class _Unfit(ValueError):
    """A key has a value of the right type that cannot be used."""

    def __init__(self, key: str, why: str) -> None:
        """`key` is the table's."""
        super().__init__(why)
        self.key = key


class _Options(_Table, frozen=True, kw_only=True):
    delivery: Delivery = Delivery.RELAY
    patience_ms: _Patience | None = None
    connections: _Number | None = None
    proxy: Annotated[int, Meta(ge=1, le=2)] | None = None
    start: Annotated[str, Meta(pattern=r"^[a-z0-9_-]{1,32}\Z")] | None = None


class ServiceTable(_Options, frozen=True, kw_only=True):
    """`[[service]]`: a service of the registry."""

    name: str
    target: str
    wide_port: _Number | None = None

    def service(self) -> Service:
        """As the registry has it."""
        return Service(**msgspec.structs.asdict(self))


class RouteTable(_Options, frozen=True, kw_only=True):
    """`[[route]]`: conditions, and where to."""

    wide_port: _Number | None = None
    name: str | None = None
    path: str | None = None
    protocol: str | None = None
    alpn: str | None = None
    database: str | None = None
    user: str | None = None
    client: str | None = None
    destination: str | None = None
    destination_port: _Port | None = None
    source: str | None = None
    source_port: _Port | None = None
    to: str

    def route(self) -> Route:
        """As the registry has it."""
        given = msgspec.structs.asdict(self)
        rest = {name: given.pop(name) for name in ("to", *_Options.__struct_fields__)}
        return Route(match=Match(**given), **rest)


class PatternTable(_Table, frozen=True, kw_only=True):
    """`[[pattern]]`: bytes at an offset, by which a route can tell what no probe knows."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9_-]{1,32}\Z")]
    """A route has it as `protocol = "pattern:NAME"`."""
    offset: Annotated[int, Meta(ge=0, lt=PATTERN_ENDS)] = 0
    """Bytes of the connection before it."""
    text: str | None = None
    """Its bytes, as UTF-8; or else `hex`."""
    hex: str | None = None
    """Its bytes in hexadecimal digits; blanks between bytes do not count."""

    def __post_init__(self) -> None:
        """One of both, and bytes that a pattern may have."""
        if (self.text is None) == (self.hex is None):
            raise ValueError("text or hex is needed, and not both")
        key = "text" if self.hex is None else "hex"
        try:
            self.pattern()
        except BadConfig as error:
            raise _Unfit(key, f"{error.path}: {error.why}") from None
        except ValueError as error:
            raise _Unfit(key, str(error)) from None

    def pattern(self) -> BytePattern:
        """As the engine has it."""
        data = bytes.fromhex(self.hex) if self.hex is not None else (self.text or "").encode()
        return BytePattern(name=self.name, offset=self.offset, bytes=data)


class TemplateTable(_Table, frozen=True, kw_only=True):
    """`[[template]]`: how services that sleep are started. What a value may be, `Template` decides."""

    name: str
    argv: tuple[str, ...]
    user: str | None = None
    group: str | None = None
    cwd: str | None = None
    env: dict[str, str] | None = None
    umask: int | None = None
    rlimits: dict[str, int | tuple[int, int]] | None = None
    nice: int | None = None
    cgroup: str | None = None
    cgroup_missing: str | None = None
    no_new_privileges: bool | None = None
    private_tmp: bool | None = None
    private_network: bool | None = None
    read_only: bool | None = None
    writable: tuple[str, ...] | None = None
    socket: str | None = None
    socket_mode: int | None = None
    backlog: int | None = None
    ready: str | None = None
    settle_ms: int | None = None
    forks: bool | None = None
    start_timeout_s: float | None = None
    idle_s: float | None = None
    """0 is never."""
    stop_signal: str | None = None
    stop_timeout_s: float | None = None
    backoff_s: float | None = None
    backoff_most_s: float | None = None
    backoff_reset_s: float | None = None
    output: str | None = None

    def template(self) -> Template:
        """As the launcher has it."""
        given = {key: value for key, value in msgspec.structs.asdict(self).items() if value is not None}
        if given.get("idle_s") == 0:
            given["idle_s"] = None
        return Template.from_row(given)


class ListenTable(_Table, frozen=True, kw_only=True):
    """`[[listen]]`: where the broker takes connections, and what holds for these."""

    address: str
    """ADDRESS:PORT, an IPv6 address in brackets."""
    default: str | None = None
    """Where a connection goes that nothing else matches: `service:NAME` or a target."""
    sniff_ms: Annotated[int, Meta(ge=1, le=3_600_000)] | None = None
    """How long a connection may take to show what it wants; if not given, 3,000, and 30,000 at a door."""
    protocols: tuple[str, ...] | None = None
    """What is looked for, in the words of a route; if not given, everything but SOCKS and tcpmux."""
    proxy_from: tuple[str, ...] = ()
    """Prefixes whose PROXY headers are believed, and demanded."""
    proxy_optional: bool = False
    """From there, a connection may come without."""
    postgres_tls: Literal["offered", "declined", "left"] = "offered"
    """What a PostgreSQL client is told that asks for TLS; `left` to the service, it is routed by its protocol alone."""

    door: str | None = None
    """What is spoken here before the service is known: the broker greets, and reads the server name behind STARTTLS."""
    door_name: Annotated[str, Meta(pattern=r"^[!-~]{1,255}\Z")] | None = None
    """Whom the door says it is; for MySQL the version of the server."""
    door_tls: Literal["offered", "required"] = "offered"
    """Whether a client may go on without TLS."""

    @property
    def opened(self) -> Door | None:
        """The door, if there is one."""
        if self.door is None:
            return None
        usual = MYSQL_VERSION if self.door == "mysql" else socket.gethostname()
        return Door(protocol=self.door, host=self.door_name or usual, requires_tls=self.door_tls == "required")

    @property
    def sniff_s(self) -> float:
        """`sniff_ms` or its default, in seconds."""
        return (self.sniff_ms or (3_000 if self.door is None else 30_000)) / 1000

    socks: Literal["answered", "left"] = "answered"
    """What a SOCKS client asks for is answered here, or left to the service, which then gets all that is said."""

    def __post_init__(self) -> None:
        """Its values are what their keys are for, and go together."""
        _require_endpoint("address", self.address)
        for name in self.protocols or ():
            if name not in _SPOKEN and not name.startswith(_PATTERN):
                raise _Unfit("protocols", f"{name[:40]!r} is none of {', '.join(_SPOKEN)}, pattern:NAME")
        _require_networks("proxy_from", self.proxy_from)
        if self.door is not None and self.door not in DOORS:
            raise _Unfit("door", f"{self.door[:40]!r} is none of {', '.join(DOORS)}")
        if self.proxy_optional and not self.proxy_from:
            raise _Unfit("proxy_optional", "there is no proxy_from whose connections may come without a header")
        if self.door is None and (self.door_name is not None or self.door_tls == "required"):
            raise ValueError("door_name, door_tls: there is no door")
        if self.door is not None and (self.proxy_optional or self.protocols is not None):
            raise _Unfit("door", "goes neither with protocols nor with proxy_optional")

    @property
    def endpoint(self) -> Endpoint:
        """`address`, read."""
        return Endpoint.parse(self.address)

    @property
    def probes(self) -> tuple[str, ...] | None:
        """Those of `protocols`, by their names; None if there is no such list."""
        if self.protocols is None:
            return None
        return tuple(_SPOKEN[name] for name in self.protocols if name in _SPOKEN)

    def wants(self, pattern: PatternTable) -> bool:
        """Whether it looks for a pattern of the file."""
        return self.protocols is None or _PATTERN + pattern.name in self.protocols


class PluginTable(_Table, frozen=True, kw_only=True):
    """`[[plugin]]`: a Python module with sniffers (docs/doors.md)."""

    module: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*\Z")]
    """As it is imported; found as `python -m` finds it."""
    limit_ms: Annotated[int, Meta(ge=1, le=60_000)] = 100
    """For one question; then its process is killed, and made anew."""
    memory_mb: Annotated[int, Meta(ge=64, le=1 << 20)] = 512
    """Address space of its process."""
    user: str | None = None
    """Who its process becomes."""


class WakeTable(_Table, frozen=True, kw_only=True):
    """`[wake]`: who may wake a service that sleeps, how often, and how many run; 0 is no bound."""

    allow: tuple[str, ...] = ()
    """Prefixes; if there are any, nobody else may."""
    deny: tuple[str, ...] = ()
    """Prefixes that may not, whatever `allow` says."""
    per_minute: _Patience = 0
    per_source_per_minute: _Patience = 0
    """By one IPv4 address or IPv6 /64."""
    most_starting: Annotated[int, Meta(ge=1, le=10_000)] = 32
    """Starts at once; the others wait for their turn."""
    most_running: _Patience = 0

    def __post_init__(self) -> None:
        """Prefixes are some."""
        _require_networks("allow", self.allow)
        _require_networks("deny", self.deny)


class AsleepTable(_Table, frozen=True, kw_only=True):
    """`[asleep]`: what the clients of services that sleep are told, and how many of them may wait; 0 is no bound."""

    motd: Annotated[str, Meta(max_length=MOTD_BYTES)] = Manners().motd
    """What a probe gets to read, in protocols that have a place for it."""
    retry_after_s: Annotated[int, Meta(ge=0, le=HIGHEST)] = Manners().retry_after_s
    """When an HTTP client may come again."""
    health_paths: tuple[str, ...] = Manners().health_paths
    """Paths of HTTP for which no service is woken."""
    most_parked: _Patience = 20_000
    """Connections that wait."""
    most_parked_per_service: _Patience = 2_000
    parked_bytes: Annotated[int, Meta(ge=0, le=2**62)] = 2 << 30
    """What they may have the kernel hold: what each has sent, and a window of 64 kB."""
    settle_ms: Annotated[int, Meta(ge=0, le=60_000)] = 0
    """How long a client has to wait before its service is woken."""

    def __post_init__(self) -> None:
        """What clients are told can be said."""
        try:
            self.manners()
        except BadConfig as error:
            raise ValueError(f"{error.path}: {error.why}") from None

    def manners(self) -> Manners:
        """As the engine has it."""
        return Manners(motd=self.motd, retry_after_s=self.retry_after_s, health_paths=self.health_paths)


class ConfineTable(_Table, frozen=True, kw_only=True):
    """`[confine]`: what the broker's process gives up before it moves the first byte (docs/confinement.md)."""

    sandbox: Literal["auto", "required", "off"] = "auto"
    """As far as the kernel has it; all of it, or no start; or only another user."""
    without: tuple[Literal["mounts", "network", "capabilities", "dumpable", "landlock", "seccomp"], ...] = ()
    """Steps that are not taken."""
    user: str | None = None
    """Who to become; a name or a number."""
    group: str | None = None
    """Its group, if it is not the user's own."""
    allow_folders: tuple[str, ...] = ()
    """Where unix sockets of services lie that the registry has not got yet."""
    allow_ports: tuple[_Port, ...] = ()
    """TCP ports of services that the registry has not got yet."""
    allow_abstract: bool = False
    """Whether it may come to have services with abstract unix names."""

    def __post_init__(self) -> None:
        """Its values are what their keys are for, and go together."""
        for path in self.allow_folders:
            if not path.startswith("/") or any(part in ("", ".", "..") for part in path[1:].split("/")):
                raise _Unfit("allow_folders", f"{path[:60]!r} is no absolute path without . or ..")
        if self.group is not None and self.user is None:
            raise _Unfit("group", "needs a user")
        if self.sandbox == "required" and self.without:
            raise _Unfit("without", "leaves steps out, and sandbox requires them all")


class ControlTable(_Table, frozen=True, kw_only=True):
    """`[control]`: that there is a control socket, where, and for whom. Without the table there is none."""

    socket: Annotated[str, Meta(pattern=r"^/[^\x00]{1,100}\Z")] | None = None
    """Its path; if not given, that of `fourtuple.control.default_socket`."""
    mode: Annotated[str, Meta(pattern=r"^0?[0-7]{3}\Z")] | None = None
    """Permissions of the file, octal: who may connect at all. If not given: its owner; with a group, that, too; with
    readers or admins, everybody, for each is asked for by its credentials."""
    group: str | None = None
    """Whose the file is."""
    readers: tuple[str, ...] = ()
    """Users, and groups (`group:NAME`), that may look."""
    admins: tuple[str, ...] = ()
    """Users and groups that may change things, too."""

    @property
    def path(self) -> Path:
        """Of the socket."""
        return default_socket() if self.socket is None else Path(self.socket)

    @property
    def permissions(self) -> int:
        """As of chmod()."""
        if self.mode is not None:
            return int(self.mode, 8)
        return 0o666 if self.readers or self.admins else 0o660 if self.group is not None else 0o600

    @property
    def group_id(self) -> int | None:
        """Of `group`; BadConfig if there is none of that name here."""
        return None if self.group is None else group_id(self.group, "control.group")

    @property
    def access(self) -> Access:
        """Who may do what; BadConfig if a name is nobody's here."""
        return Access.named(self.readers, self.admins)


class BrokerFile(_Table, frozen=True, kw_only=True):
    """The whole file."""

    wake: WakeTable = msgspec.field(default_factory=WakeTable)
    asleep: AsleepTable = msgspec.field(default_factory=AsleepTable)
    listen: tuple[ListenTable, ...] = ()
    pattern: tuple[PatternTable, ...] = ()
    plugin: tuple[PluginTable, ...] = ()
    template: tuple[TemplateTable, ...] = ()
    service: tuple[ServiceTable, ...] = ()
    route: tuple[RouteTable, ...] = ()
    confine: ConfineTable = msgspec.field(default_factory=ConfineTable)
    control: ControlTable | None = None

    @property
    def services(self) -> tuple[Service, ...]:
        """Of the tables `[[service]]`."""
        return tuple(table.service() for table in self.service)

    @property
    def templates(self) -> tuple[Template, ...]:
        """Of the tables `[[template]]`."""
        return tuple(table.template() for table in self.template)

    @property
    def routes(self) -> tuple[Route, ...]:
        """Of the tables `[[route]]`."""
        return tuple(table.route() for table in self.route)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file; an error names it, the line and the key."""
        return cls.parse(cls.bytes_of(path), str(path))

    @classmethod
    def bytes_of(cls, path: Path) -> bytes:
        """What stands in a file, as `parse` takes it; of one that is too long, enough to see that."""
        try:
            with path.open("rb") as opened:
                return opened.read(LARGEST_BYTES + 1)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise BadConfig(str(path), f"cannot be read: {why}") from None

    @classmethod
    def parse(cls, data: bytes, named: str) -> Self:
        """As `read`, of bytes that are there already."""
        if len(data) > LARGEST_BYTES:
            raise BadConfig(
                named, f"is longer than {LARGEST_BYTES >> 20} MiB; import takes CSV and JSON lines of any size"
            )
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise BadConfig(named, "is not UTF-8") from None
        try:
            tree = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            # Its message ends with line and column.
            raise BadConfig(named, f"is no TOML: {error or 'too deeply nested'}") from None
        try:
            found = msgspec.convert(tree, cls)
        except msgspec.ValidationError as error:
            key, why = _problem(error)
            is_there, value = _reached(tree, key)
            is_shown = is_there and isinstance(value, str | int | float | list)
            raise _at(named, text, key, f"{why}, not {_shown(value)}" if is_shown else why) from None
        for place, service in enumerate(found.service):
            _judge(named, text, ("service", place), partial(_check_service, service))
        for place, route in enumerate(found.route):
            _judge(named, text, ("route", place), partial(_check_route, route))
        for place, template in enumerate(found.template):
            _judge(named, text, ("template", place), partial(_check_template, template))
        found._require_once(named, text)
        found._require_templates(named, text)
        found._require_patterns(named, text)
        return found

    def _require_once(self, named: str, text: str) -> None:
        for key in ("name", "wide_port"):
            places: dict[object, int] = {}
            for place, service in enumerate(self.services):
                value = getattr(service, key)
                if value is not None and places.setdefault(value, place) != place:
                    raise _at(named, text, ("service", place, key), f"{value!r} is taken by an earlier service")
        names = {service.name for service in self.services}
        for place, listener in enumerate(self.listen):
            if listener.default is not None:
                try:
                    check([], [Route(to=listener.default)])
                except BadConfig as error:
                    raise _at(named, text, ("listen", place, "default"), error.why) from None
                name = listener.default.removeprefix("service:")
                if name != listener.default and name not in names and names:
                    raise _at(named, text, ("listen", place, "default"), f"there is no service {name} in this file")

    def _require_templates(self, named: str, text: str) -> None:
        names: dict[str, int] = {}
        for place, template in enumerate(self.template):
            if names.setdefault(template.name, place) != place:
                raise _at(
                    named, text, ("template", place, "name"), f"{template.name!r} is taken by an earlier template"
                )
        starting: list[tuple[tuple[str, int, str], _Options]] = [
            (("service", place, "start"), service) for place, service in enumerate(self.service)
        ]
        starting += [(("route", place, "start"), table) for place, table in enumerate(self.route)]
        for key, table in starting:
            start = getattr(table, "start", None)
            if start is not None and start not in names:
                raise _at(named, text, key, f"there is no [[template]] named {start!r} in this file")

    def _require_patterns(self, named: str, text: str) -> None:
        names: dict[str, int] = {}
        for place, pattern in enumerate(self.pattern):
            if names.setdefault(_PATTERN + pattern.name, place) != place:
                raise _at(named, text, ("pattern", place, "name"), f"{pattern.name!r} is taken by an earlier pattern")
        wanted: list[tuple[tuple[str, int, str], str]] = [
            (("listen", place, "protocols"), name)
            for place, listener in enumerate(self.listen)
            for name in listener.protocols or ()
        ]
        wanted += [(("route", place, "protocol"), route.protocol or "") for place, route in enumerate(self.route)]
        for key, name in wanted:
            if name.startswith(_PATTERN) and name not in names:
                raise _at(
                    named, text, key, f"there is no [[pattern]] named {name.removeprefix(_PATTERN)!r} in this file"
                )


def _require_endpoint(key: str, text: str) -> None:
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65_535):
        raise _Unfit(key, "ADDRESS:PORT is needed, such as 0.0.0.0:443 or [::]:443")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        version = ip_address(host[1:-1] if bracketed else host).version
    except ValueError as error:
        raise _Unfit(key, str(error)) from None
    if version != (6 if bracketed else 4):
        raise _Unfit(key, "an IPv6 address stands in brackets, and an IPv4 address without")


def _require_networks(key: str, texts: Sequence[str]) -> None:
    for text in texts:
        try:
            ip_network(text)
        except ValueError as error:
            raise _Unfit(key, str(error)) from None


def _problem(error: msgspec.ValidationError) -> tuple[_Key, str]:
    """Where it is, and what: msgspec says "what - at `$.listen[0].address`", or of a whole table "what"."""
    why, _, place = str(error).partition(" - at `$")
    steps = re.findall(r"\.([^.\[\]`]+)|\[([0-9]+)\]", place)
    key: _Key = tuple(name or int(number) for name, number in steps)
    if isinstance(error.__cause__, _Unfit):
        return (*key, error.__cause__.key), why
    if (unknown := re.fullmatch(r"Object contains unknown field `(.*)`", why, re.DOTALL)) is not None:
        return (*key, unknown[1]), "there is no such key"
    if (missing := re.fullmatch(r"Object missing required field `(.*)`", why)) is not None:
        return (*key, missing[1]), "is missing"
    if why.startswith("Invalid enum value"):
        return key, f"one of {', '.join(_choices(BrokerFile, key))} is needed"
    return key, re.sub(r"^Expected `(\w+(?: \| \w+)*)`(.*?)(?:, got `?\w+`?)?$", r"\1\2 is needed", why)


def _choices(of: type[_Table], key: _Key) -> list[str]:
    """What a key takes that takes one of some words."""
    wanted: Any = of
    for part in key:
        if isinstance(part, str):
            wanted = next(field.type for field in msgspec.structs.fields(wanted) if field.name == part)
        # What is behind `| None`, and what a list has in it.
        while isinstance(wanted, UnionType) or (get_origin(wanted) is tuple and isinstance(part, int)):
            wanted, part = get_args(wanted)[0], ""
    return [repr(getattr(one, "value", one)) for one in get_args(wanted) or wanted]


def _check_service(table: ServiceTable) -> None:
    check([table.service()], [])


def _check_route(table: RouteTable) -> None:
    check([], [table.route()])


def _check_template(table: TemplateTable) -> None:
    table.template()


def _judge(named: str, text: str, table: tuple[str, int], judge: Callable[[], None]) -> None:
    try:
        judge()
    except BadConfig as error:
        raise _at(named, text, (*table, error.path.rpartition(" ")[2]), error.why) from None


def _at(named: str, text: str, key: _Key, why: str) -> BadConfig:
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")
    return BadConfig(named, f"line {_line(text, key)}, {shown}: {why}")


def _line(text: str, key: _Key) -> int:
    """The line on which a key's value ends: the first with which the file, cut behind it, has the key. tomllib tells no
    lines, and to read TOML a second time in another way would be to read it wrongly."""
    lines = text.split("\n")

    def has(count: int) -> bool:
        for shorter in range(count, -1, -1):
            # Inside a value of several lines the file does not parse; there, what was before counts.
            try:
                return _reached(tomllib.loads("\n".join(lines[:shorter])), key)[0]
            except tomllib.TOMLDecodeError:
                continue
        return False

    # A key that is missing is looked for in its table.
    while key and not has(len(lines)):
        key = key[:-1]
    low, high = 0, len(lines)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if has(middle) else (middle + 1, high)
    return max(1, low)


def _reached(tree: object, key: _Key) -> tuple[bool, object]:
    """Whether a tree has a key, and what it has there."""
    for part in key:
        branches = dict(enumerate(tree)) if isinstance(tree, list) else tree
        if not isinstance(branches, dict) or part not in branches:
            return False, None
        tree = branches[part]
    return True, tree


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
