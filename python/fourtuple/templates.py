"""Templates: how a service that sleeps is started, and what of a connection may stand in its command line.

Decides which placeholders there are, which values may take their place, and what a template may say. Pure: starts
nothing, looks up no user. Values come from clients: each stays within its argument, within one component of a path, and
begins with no hyphen, so that none can name another file or be an option.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TypeVar

from msgspec import Struct, field
from msgspec.structs import force_setattr

from fourtuple.errors import BadConfig
from fourtuple.services import MOST_NAME_BYTES, Delivery

PLACEHOLDERS = ("name", "label", "socket", "target", "address", "port", "user", "database")
"""{name} and {label} of the service, {target} and its {socket} path or {address} and {port}, and what the client that
wakes it has shown: {user} and {database}."""
SIGNALS = ("TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "WINCH", "KILL")
LIMITS = (
    *("as", "core", "cpu", "data", "fsize", "memlock", "msgqueue", "nice", "nofile", "nproc"),
    *("rss", "rtprio", "rttime", "sigpending", "stack"),
)
"""The RLIMIT_ names that a template may set (getrlimit(2)); not `locks`, which bounds nothing and is our mark."""
OURS = re.compile(r"LISTEN_(PID|FDS|FDNAMES)|NOTIFY_SOCKET|FOURTUPLE_\w*")
"""Variables that the launcher sets itself."""
_WORD = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")
_DNS = re.compile(rf"(?=.{{1,{MOST_NAME_BYTES}}}$)[A-Za-z0-9_][A-Za-z0-9_-]*(\.[A-Za-z0-9_][A-Za-z0-9_-]*)*")
_PLAIN = re.compile(r"[A-Za-z0-9_.,:+=@%/\[\]-]+")
"""What of a target may stand in a command: whoever writes the registry writes no shell's `;` or `$(` into a script."""
_MOST_PATH_BYTES = 107
"""sun_path without its NUL (unix(7))."""
_MOST_ARGUMENTS, _MOST_ARGUMENT = 256, 4_096
_HIGHEST_LIMIT = 2**63 - 1
_LONGEST_S = 86_400.0
_E = TypeVar("_E", bound=Enum)


class Socket(Enum):
    """Who makes the listening socket."""

    PASS = "pass"
    """The launcher, before the start; the service has it as descriptor 3 (sd_listen_fds(3))."""
    OWN = "own"
    """The service itself."""


class Ready(Enum):
    """When a service counts as started."""

    STARTED = "started"
    """Its program is executed, and has not ended for `settle_ms`."""
    LISTENING = "listening"
    """Somebody listens at its target; with a socket that is passed, as `started`."""
    NOTIFY = "notify"
    """It has said READY=1 (sd_notify(3))."""


class Output(Enum):
    """Where its standard output and error go."""

    INHERIT = "inherit"
    """To the launcher's standard error."""
    NULL = "null"


class Missing(Enum):
    """What becomes of a start whose cgroup cannot be made."""

    REFUSE = "refuse"
    IGNORE = "ignore"


class Place(Struct, frozen=True, kw_only=True):
    """Where a service listens: what is behind `unix:` or `tcp:`."""

    path: str = ""
    """Of a unix socket; a name of the abstract space begins with @."""
    address: IPv4Address | IPv6Address | None = None
    port: int = 0

    @classmethod
    def parse(cls, target: str) -> Place:
        """Read a target. The registry has judged it; what it lets through and nobody can bind to is an error here."""
        if target.startswith("unix:"):
            return cls(path=_socket_path(target.removeprefix("unix:")))
        host, _, port = target.removeprefix("tcp:").rpartition(":")
        if target.startswith("tcp:") and port.isascii() and port.isdigit() and 1 <= int(port) <= 65_535:
            try:
                return cls(address=ip_address(host[1:-1] if host.startswith("[") else host), port=int(port))
            except ValueError:
                pass
        raise BadConfig("target", f"{_shown(target)} is no place to start a service at: unix:/PATH, tcp:ADDRESS:PORT")


class Call(Struct, frozen=True, kw_only=True):
    """Which service is to run, and what is known when it is called."""

    service: str
    """By this it is known from now on: the registry's name, or whatever else tells it from all others."""
    template: str
    target: str
    delivery: Delivery = Delivery.RELAY
    name: str | None = None
    """For {name}; if not given, `service`."""
    label: str | None = None
    user: str | None = None
    database: str | None = None

    def values(self) -> dict[str, str | None]:
        """By placeholder; None is not known. BadConfig, by the placeholder's name, for what may not be there."""
        place = Place.parse(self.target)
        # What a route's pattern leads to is known by its target, which is no name: so a client by user and database.
        is_named = self.name is not None or not self.service.startswith(("unix:", "tcp:"))
        name = (self.service if self.name is None else self.name) if is_named else None
        label = None if name is None else name.partition(".")[0]
        given = {
            "label": label if self.label is None else self.label,
            "user": self.user,
            "database": self.database,
        }
        for key, value in given.items():
            if value is not None and not _COMPONENT.fullmatch(value):
                raise BadConfig(
                    key,
                    f"{_shown(value)} cannot stand in a command: 1 to 63 of A-Z a-z 0-9 _ . - are, "
                    "the first neither a dot nor a hyphen",
                )
        if name is not None and not _DNS.fullmatch(name):
            raise BadConfig("name", f"{_shown(name)} cannot stand in a command: labels with dots between are needed")
        plain = _PLAIN.fullmatch(self.target) is not None
        return {
            **given,
            "name": name,
            "target": self.target if plain else None,
            "socket": place.path if plain and place.path else None,
            "address": None if place.address is None else str(place.address),
            "port": str(place.port) if place.port else None,
        }


class Command(Struct, frozen=True, kw_only=True):
    """A template whose placeholders are filled."""

    argv: tuple[str, ...]
    cwd: str
    env: dict[str, str]
    user: str | None
    group: str | None
    cgroup: str | None
    writable: tuple[str, ...]


class Template(Struct, frozen=True, kw_only=True):
    """How services of a kind are started and stopped."""

    name: str
    argv: tuple[str, ...]
    """The program, by its path or found in PATH, and its arguments. No shell reads them."""
    user: str | None = None
    """If not given, that of the launcher. A placeholder may stand behind a text, never at the beginning."""
    group: str | None = None
    """If not given, the user's own; the user's other groups come along."""
    cwd: str = "/"
    env: Mapping[str, str] = field(default_factory=dict)
    """Besides PATH, and HOME, USER, LOGNAME, SHELL of its user. Nothing of the launcher's environment is passed on."""
    umask: int = 0o022
    rlimits: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    """By name without RLIMIT_: soft and hard limit, or one number for both; -1 is none."""
    nice: int | None = None
    cgroup: str | None = None
    """A path below the root of the version 2 hierarchy, made for each start and removed after it: /services/{name}."""
    cgroup_missing: Missing = Missing.REFUSE
    no_new_privileges: bool = True
    """No program that it executes is more than its user is: set-user-ID bits and file capabilities do not count."""
    private_tmp: bool = False
    """An empty /tmp of its own, in memory."""
    private_network: bool = False
    """No network but what it is passed."""
    read_only: bool = False
    """All files are read-only, but `writable`, /dev/shm, its own /tmp and the folder of a socket that it makes."""
    writable: tuple[str, ...] = ()
    socket: Socket = Socket.OWN
    socket_mode: int = 0o600
    """Permissions of a socket file that the launcher makes; it belongs to who brings the clients."""
    backlog: int = 4_096
    ready: Ready = Ready.LISTENING
    settle_ms: int = 0
    forks: bool = False
    """Its first process ends with status 0 once another runs in its place, as daemon(3) does."""
    start_timeout_s: float = 30.0
    idle_s: float | None = 300.0
    """Stop it after so long without a connection; None is never."""
    stop_signal: str = "TERM"
    """To its first process; what is left after `stop_timeout_s`, and what that leaves behind, is killed."""
    stop_timeout_s: float = 10.0
    backoff_s: float = 1.0
    """After a crash it is not started again for so long; twice as long after each further one."""
    backoff_most_s: float = 60.0
    backoff_reset_s: float = 60.0
    """Crashes are forgotten after it has run for so long, or has not been called for so long after the pause."""
    output: Output = Output.INHERIT

    def __post_init__(self) -> None:
        _matches("name", self.name, _WORD, "1 to 32 of a-z 0-9 _ -")
        for key in ("argv", "writable"):
            force_setattr(self, key, _texts(key, getattr(self, key)))
        if not self.argv:
            raise BadConfig("argv", "is empty; a program is needed")
        if len(self.argv) > _MOST_ARGUMENTS:
            raise BadConfig("argv", f"has more than {_MOST_ARGUMENTS} arguments")
        if not _literal("argv", self.argv[0]) or self.argv[0].endswith("/"):
            raise BadConfig("argv", f"{_shown(self.argv[0])}: the program itself is fixed, and no placeholder")
        for argument in (*self.argv[1:], *self.writable):
            _parts("argv", argument)
        self._check_identity()
        self._check_environment()
        self._check_limits()
        for path in (self.cwd, *self.writable):
            _absolute("cwd" if path is self.cwd else "writable", path)
        if self.cgroup is not None:
            _absolute("cgroup", self.cgroup)
            if self.cgroup == "/":
                raise BadConfig("cgroup", "is the root; a path of its own is needed, such as /services/{name}")
        _whole("umask", self.umask, 0, 0o777)
        _whole("socket_mode", self.socket_mode, 0, 0o777)
        _whole("backlog", self.backlog, 1, 65_535)
        _whole("settle_ms", self.settle_ms, 0, 60_000)
        if self.nice is not None:
            _whole("nice", self.nice, -20, 19)
        for key in ("start_timeout_s", "stop_timeout_s", "backoff_s", "backoff_most_s", "backoff_reset_s"):
            _seconds(key, getattr(self, key))
        if self.idle_s is not None:
            _seconds("idle_s", self.idle_s)
        if self.stop_signal not in SIGNALS:
            raise BadConfig("stop_signal", f"is {_shown(self.stop_signal)}; one of {', '.join(SIGNALS)} is needed")
        kinds = (("socket", Socket), ("ready", Ready), ("output", Output), ("cgroup_missing", Missing))
        for key, kind in kinds:
            if not isinstance(getattr(self, key), kind):
                raise BadConfig(key, f"is {getattr(self, key)!r}; a {kind.__name__} is needed")
        if self.private_network and self.ready is Ready.NOTIFY:
            raise BadConfig("private_network", "its word would not be heard there (sd_notify)")
        if self.private_network and self.socket is Socket.OWN and self.ready is not Ready.STARTED:
            raise BadConfig("private_network", 'nobody reaches a socket that it makes there; socket = "pass" is needed')

    def fill(self, call: Call) -> Command:
        """The command for this call. BadConfig, by the key, for a placeholder that it has no value for."""
        values = call.values()

        def filled(key: str, text: str) -> str:
            return "".join(_valued(key, literal, word, values) for literal, word in _parts(key, text))

        command = Command(
            argv=tuple(filled("argv", text) for text in self.argv),
            cwd=filled("cwd", self.cwd),
            env={name: filled("env", text) for name, text in self.env.items()},
            user=None if self.user is None else filled("user", self.user),
            group=None if self.group is None else filled("group", self.group),
            cgroup=None if self.cgroup is None else filled("cgroup", self.cgroup),
            writable=tuple(filled("writable", text) for text in self.writable),
        )
        for key, path in (
            ("cwd", command.cwd),
            ("cgroup", command.cgroup),
            *(("writable", one) for one in command.writable),
        ):
            if path is not None and ".." in path.split("/"):
                raise BadConfig(key, f"{_shown(path)} leads out of where it begins")
        return command

    def row(self) -> dict[str, object]:
        """All of it as JSON has it; `from_row` reads it."""
        return {
            key: value.value
            if isinstance(value, Enum)
            else dict(value)
            if isinstance(value, Mapping)
            else list(value)
            if isinstance(value, tuple)
            else value
            for key in self.__struct_fields__
            for value in (getattr(self, key),)
        }

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> Template:
        """From what `row`, or a table of broker.toml, says. BadConfig names the key."""
        given = dict(row)
        for key, kind in (("socket", Socket), ("ready", Ready), ("output", Output), ("cgroup_missing", Missing)):
            if key in given:
                given[key] = _word_of(key, kind, given[key])
        if unknown := sorted(given.keys() - set(cls.__struct_fields__)):
            raise BadConfig(unknown[0], "is no key of a template")
        if missing := [key for key in ("name", "argv") if key not in given]:
            raise BadConfig(missing[0], "is needed")
        return cls(**given)  # type: ignore[arg-type]

    def _check_identity(self) -> None:
        for key, text in (("user", self.user), ("group", self.group)):
            if text is None:
                continue
            parts = _parts(key, _text(key, text))
            if not parts or not parts[0][0]:
                raise BadConfig(key, "begins with a placeholder: a client could choose any user, root among them")

    def _check_environment(self) -> None:
        if not isinstance(self.env, Mapping):
            raise BadConfig("env", "is no table of names and texts")
        for name, text in self.env.items():
            _matches("env", name, _VARIABLE, "a variable's name: letters, digits and _")
            if OURS.fullmatch(name):
                raise BadConfig("env", f"{name} is set by the launcher")
            _parts("env", _text("env", text))

    def _check_limits(self) -> None:
        if not isinstance(self.rlimits, Mapping):
            raise BadConfig("rlimits", "is no table of names and numbers")
        limits: dict[str, int | tuple[int, int]] = {}
        for name, given in self.rlimits.items():
            if name not in LIMITS:
                raise BadConfig("rlimits", f"{_shown(name)} is none of {', '.join(LIMITS)}")
            both = tuple(given) if isinstance(given, (list, tuple)) else (given, given)
            if len(both) != 2:
                raise BadConfig("rlimits", f"{name} has {len(both)} numbers; a soft and a hard limit are two")
            for number in both:
                _whole("rlimits", number, -1, _HIGHEST_LIMIT)
            soft, hard = both
            if hard != -1 and (soft == -1 or soft > hard):
                raise BadConfig("rlimits", f"{name}: the soft limit is above the hard one")
            limits[name] = (soft, hard)
        force_setattr(self, "rlimits", limits)


def by_name(templates: Iterable[Template]) -> dict[str, Template]:
    """BadConfig if two have one name."""
    found: dict[str, Template] = {}
    for template in templates:
        if found.setdefault(template.name, template) is not template:
            raise BadConfig("name", f"{template.name!r} is taken by an earlier template")
    return found


def _parts(key: str, text: str) -> list[tuple[str, str]]:
    """Literal text, and the placeholder behind it or ""; {{ and }} are braces."""
    found: list[tuple[str, str]] = []
    literal = ""
    at = 0
    while at < len(text):
        pair, one = text[at : at + 2], text[at]
        if pair in ("{{", "}}"):
            literal += one
            at += 2
        elif one == "{":
            word, brace, _ = text[at + 1 :].partition("}")
            if not brace or word not in PLACEHOLDERS:
                names = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
                raise BadConfig(
                    key, f"{_shown(text)}: {{{word[:20]} is none of {names}; a brace itself is written twice"
                )
            found.append((literal, word))
            literal = ""
            at += len(word) + 2
        elif one == "}":
            raise BadConfig(key, f"{_shown(text)} has a brace without its other half; a brace itself is written twice")
        else:
            literal += one
            at += 1
    if literal:
        found.append((literal, ""))
    return found


def _valued(key: str, literal: str, word: str, values: Mapping[str, str | None]) -> str:
    if not word:
        return literal
    value = values[word]
    if value is None:
        raise BadConfig(key, f"{{{word}}} is not known for this service, or has characters that no command may")
    return literal + value


def _literal(key: str, text: str) -> bool:
    return all(not word for _, word in _parts(key, text)) and text != ""


def _socket_path(path: str) -> str:
    name = path.removeprefix("@")
    bad = len(path.encode()) > _MOST_PATH_BYTES or any(not one.isprintable() for one in path)
    if path.startswith("@"):
        bad = bad or not name
    else:
        components = path.split("/")
        bad = bad or components[0] != "" or len(components) < 2 or any(one in ("", ".", "..") for one in components[1:])
    if bad:
        raise BadConfig("target", f"unix:{_shown(path)} is no path of a socket")
    return path


def _absolute(key: str, path: object) -> None:
    text = _text(key, path)
    _parts(key, text)
    if not text.startswith("/") or ".." in text.split("/"):
        raise BadConfig(key, f"{_shown(text)} is no absolute path without ..")


def _texts(key: str, given: object) -> tuple[str, ...]:
    if not isinstance(given, (list, tuple)):
        raise BadConfig(key, f"is {given!r}; a list of texts is needed")
    return tuple(_text(key, one) for one in given)


def _text(key: str, text: object) -> str:
    if not isinstance(text, str) or "\0" in text or len(text) > _MOST_ARGUMENT:
        raise BadConfig(key, f"is {str(text)[:60]!r}; a text of at most {_MOST_ARGUMENT:,} characters is needed")
    return text


def _matches(key: str, text: object, pattern: re.Pattern[str], wanted: str) -> None:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise BadConfig(key, f"is {str(text)[:60]!r}; {wanted} are needed")


def _whole(key: str, number: object, least: int, most: int) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
        raise BadConfig(key, f"is {number!r}; a whole number from {least} to {most} is needed")


def _seconds(key: str, number: object) -> None:
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 < number <= _LONGEST_S:
        raise BadConfig(key, f"is {number!r}; more than 0 and at most {_LONGEST_S:,.0f} seconds are needed")


def _word_of(key: str, kind: Callable[[object], _E] | type[_E], given: object) -> _E:
    if isinstance(given, Enum):
        return given  # type: ignore[return-value]
    try:
        return kind(given)
    except ValueError:
        words = ", ".join(str(one.value) for one in kind)  # type: ignore[union-attr]
        raise BadConfig(key, f"is {given!r}; one of {words} is needed") from None


def _shown(text: object) -> str:
    shown = str(text)
    return repr(shown if len(shown) <= 60 else f"{shown[:60]}…")
