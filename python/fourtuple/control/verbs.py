"""Verbs: what can be asked of a broker and told it, and how the process of the API asks the supervisor.

Decides the words (`Controlled`, and plain dataclasses for answers), the messages (JSON in datagrams of a SOCK_SEQPACKET
pair) and their bounds. Knows no HTTP and no engine; imports little, for the supervisor is to stay small.

A request is {"n": number, "verb": name, "with": {argument: value}, "by": uid}; its answer is {"n": the same, "answer":
...} or {"n": the same, "refused": {...}}. {"tell": "denied" or "ready"} has none. Whoever breaks these rules is hung up
on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import types
import typing
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

MOST_BYTES = 131_072
"""Of one message; within what a socket's buffer has room for on any host (net.core.wmem_default is 212,992)."""
MOST_ROWS = 256
"""Of one page."""
MOST_TEXT = 1_024
"""Characters of a text."""
HIGHEST = 2**32 - 1
MOST_WAIT_S = 60.0
_MOST_AT_ONCE = 16
_ANSWERED_WITHIN_S = 10.0
_SENT_WITHIN_S = 5.0
_DESCRIBED: dict[str, bool] = {"use_attribute_docstrings": True}
"""For pydantic, which describes these classes to clients of the API; not imported here."""

KINDS = ("invalid", "absent", "conflict", "unavailable", "slow")
"""Of a refusal: a value is wrong, there is no such thing, not in this state, not now, not in time."""


class Refused(Exception):  # an answer, and no fault of anybody's
    """What was asked is not done; says why, and what would help."""

    def __init__(
        self, kind: str, detail: str, *, field: str | None = None, value: object = None, remedy: str | None = None
    ) -> None:
        """`kind` is one of KINDS; `field` and `value` name the argument, if one is to blame."""
        assert kind in KINDS, kind
        super().__init__(detail)
        self.kind, self.detail, self.field, self.value, self.remedy = kind, detail, field, value, remedy

    def message(self) -> dict[str, object]:
        """As it crosses."""
        shown = None if self.value is None else str(self.value)[:MOST_TEXT]
        return {
            "kind": self.kind,
            "detail": self.detail[:MOST_TEXT],
            "field": self.field,
            "value": shown,
            "remedy": self.remedy,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessView:
    """A process of the broker, as the kernel sees it."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    role: str
    """supervisor, broker or control."""
    pid: int
    started: float
    """Seconds since 1970."""
    cpu_s: float
    resident_bytes: int
    """Memory that it holds, the store's pages included."""
    private_bytes: int | None = None
    """Of these, what it shares with no file; None where it may not be read."""
    descriptors: int | None = None
    """Open ones; None where they may not be counted."""
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Standings:
    """How many services there are, by what is known of them."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    known: int
    """In the registry."""
    awake: int = 0
    """Started by the broker, and up."""
    starting: int = 0
    stopping: int = 0
    failed: int = 0
    """Not started again before a pause is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgrade:
    """The last upgrade."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    state: str
    """none, running, done or failed; a failed one was rolled back."""
    why: str | None = None
    """What failed."""
    began: float | None = None
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The broker in short."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    version: str
    state: str
    """serving, draining, ended (nothing left to serve), or absent (the broker process is being started again)."""
    carrier: str
    """uring or epoll."""
    workers: int
    listeners: tuple[str, ...]
    """Addresses."""
    accepted: int
    """Connections so far."""
    sniffing: int
    """Of them, now: before their service is known."""
    delivering: int
    """Now on the way to it, waiting for a sleeping one included."""
    relaying: int
    """Now being carried."""
    ended: int
    services: Standings
    processes: tuple[ProcessView, ...]
    restarts: int = 0
    """Broker processes started because one had ended by itself."""
    upgrade: Upgrade = Upgrade(state="none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A connection that the broker holds."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    id: str
    """The same from accept to close, in the log as well: 16 hexadecimal digits."""
    peer: str | None
    """The client's address and port."""
    service: str
    """A service's name or a route's target; empty if none is known yet."""
    state: str
    """sniffing, delivering, asking, relaying or ending."""
    age_s: float
    """Since it was accepted."""
    bytes_up: int
    """Carried to the service."""
    bytes_down: int
    listener: str
    """The address of the listener that it came to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """A page of connections. Who has been there all the time is on exactly one page; others may be on one, or none."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    connections: tuple[Connection, ...]
    next: str | None
    """What to give as `after` for the next page, which there may be after an empty one, too; None on the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopRow:
    """A service among the busiest."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    service: str
    amount: int
    """At most so much."""
    over: int
    """How much of it may be others': the amount is at least `amount - over`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """The busiest services, the busiest first."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    by: str
    services: tuple[TopRow, ...]


TOP_BY = ("live", "total", "bytes")
"""Connections now; connections that have ended; bytes that those carried, both ways."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView:
    """One service of the registry."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    name: str
    target: str
    delivery: str
    standing: str
    """asleep, starting, awake, stopping, failed; or unmanaged, if the broker does not start it."""
    start: str | None = None
    """The template that starts it."""
    pids: tuple[int, ...] = ()
    since: float | None = None
    """When it came to stand so; seconds since 1970."""
    live: int = 0
    """Its connections that the broker holds."""
    why: str | None = None
    """What failed last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many connections there may be at once; 0 is no bound. What there is already may stay."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    most_connections: int
    """In all."""
    most_per_source: int
    """From one IPv4 address or IPv6 /64."""
    most_per_service: int
    """Of one service that says nothing itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRow:
    """System calls that failed."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    step: str
    errno: str
    """Its name, such as ECONNREFUSED."""
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A distribution in a few numbers; nanoseconds but for `count`."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    count: int
    mean: int
    p50: int
    p90: int
    p99: int
    p999: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """All that is counted: how much of it there is does not depend on how many services there are."""

    __pydantic_config__: ClassVar[dict[str, bool]] = _DESCRIBED
    version: str
    carrier: str
    counters: dict[str, int]
    """By their names (`fourtuple.metrics`)."""
    failures: tuple[FailureRow, ...]
    delivery: Spread
    """From accept to delivery."""
    services: Standings
    processes: tuple[ProcessView, ...]
    restarts: int = 0
    wakes: dict[str, int] = dataclasses.field(default_factory=dict)
    """What the launcher counts, by its own names."""


class Controlled(Protocol):
    """What can be asked of a broker, and told it. Each may raise `Refused`; arguments are within their bounds."""

    async def status(self) -> Status:
        """The broker in short."""
        ...

    async def numbers(self) -> Numbers:
        """Everything that is counted."""
        ...

    async def connections(self, after: str | None, most: int, service: str | None, source: str | None) -> Connections:
        """A page of at most `most` connections, of one service or one source (an address or a prefix) or of all."""
        ...

    async def close_connection(self, id: str) -> None:  # as it is called everywhere
        """Close it now, as `stopped`; `Refused("absent")` if there is none of that id."""
        ...

    async def top(self, by: str, most: int) -> Top:
        """The busiest services by one of TOP_BY."""
        ...

    async def service(self, name: str) -> ServiceView:
        """One service."""
        ...

    async def reasons(self) -> dict[str, int]:
        """How connections have ended, by reason; all reasons."""
        ...

    async def failures(self) -> tuple[FailureRow, ...]:
        """System calls that failed."""
        ...

    async def wake(self, service: str, wait_s: float) -> ServiceView:
        """Start it, if it is asleep; give back how it stands when it is up, has failed, or `wait_s` are over."""
        ...

    async def stop(self, service: str, wait_s: float) -> ServiceView:
        """Stop it; who comes then wakes it again."""
        ...

    async def drain(self, grace_s: float | None) -> None:
        """Accept no more, and end when what there is has ended, or after `grace_s`. Answers at once."""
        ...

    async def limits(self) -> Limits:
        """What there may be."""
        ...

    async def set_limits(self, changes: Mapping[str, int]) -> Limits:
        """Change those named, from now on."""
        ...

    async def upgrade(self, executable: str | None) -> Upgrade:
        """Begin; answers at once. How it ends, `status` says."""
        ...

    async def reload(self) -> None:
        """Read the file again."""
        ...


# ---- arguments -----------------------------------------------------------------------------------------------------

Check = Callable[[object], bool]


def _text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MOST_TEXT


def _perhaps_text(value: object) -> bool:
    return value is None or _text(value)


def _rows(value: object) -> bool:
    return isinstance(value, int) and 1 <= value <= MOST_ROWS


def _seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_WAIT_S


def _perhaps_seconds(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= HIGHEST)


def _by(value: object) -> bool:
    return value in TOP_BY


def _changes(value: object) -> bool:
    names = {field.name for field in dataclasses.fields(Limits)}
    return (
        isinstance(value, dict)
        and bool(value)
        and value.keys() <= names
        and all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= HIGHEST for one in value.values())
    )


@dataclass(frozen=True, slots=True)
class Verb:
    """One row of VERBS: what it is given, and whether it changes anything."""

    name: str
    arguments: Mapping[str, Check] = dataclasses.field(default_factory=dict)
    changes: bool = False


VERBS = {
    verb.name: verb
    for verb in (
        Verb("status"),
        Verb("numbers"),
        Verb("connections", {"after": _perhaps_text, "most": _rows, "service": _perhaps_text, "source": _perhaps_text}),
        Verb("close_connection", {"id": _text}, changes=True),
        Verb("top", {"by": _by, "most": _rows}),
        Verb("service", {"name": _text}),
        Verb("reasons"),
        Verb("failures"),
        Verb("wake", {"service": _text, "wait_s": _seconds}, changes=True),
        Verb("stop", {"service": _text, "wait_s": _seconds}, changes=True),
        Verb("drain", {"grace_s": _perhaps_seconds}, changes=True),
        Verb("limits"),
        Verb("set_limits", {"changes": _changes}, changes=True),
        Verb("upgrade", {"executable": _perhaps_text}, changes=True),
        Verb("reload", changes=True),
    )
}
"""Exactly the methods of `Controlled`."""


# ---- the supervisor's half -----------------------------------------------------------------------------------------


class Say(Protocol):
    """Where events are written (`fourtuple.eventlog.EventLog.say`)."""

    def __call__(self, event: str, **fields: object) -> None:
        """One event."""


def unsaid(event: str, **fields: object) -> None:
    """Writes nothing."""


@dataclass(slots=True)
class Tally:
    """What has happened at the control socket; kept by the supervisor, for processes of the API come and go."""

    requests: int = 0
    """Verbs asked."""
    refused: int = 0
    """Verbs that were refused."""
    denied: int = 0
    """Clients, or requests of readers, that were not allowed."""
    started: int = 0
    """Processes of the API."""
    failed: int = 0
    """Of these, how many ended with an error."""


class Broken(Exception):  # about the other end
    """The other process does not keep to the rules of messages."""


async def serve_verbs(
    controlled: Controlled,
    sock: socket.socket,
    *,
    tally: Tally,
    say: Say = unsaid,
    ready: Callable[[], None] | None = None,
) -> None:
    """Answer what comes on `sock`, non-blocking and of SOCK_SEQPACKET, until the other end is closed. Broken if it does
    not keep to the rules, or does not take its answers. Reads no further while enough is being answered. `ready` is
    called, once or again, when the other end says or shows that it takes clients."""
    loop, room, sending = asyncio.get_running_loop(), asyncio.Semaphore(_MOST_AT_ONCE), asyncio.Lock()
    tasks: set[asyncio.Task[None]] = set()
    broken: asyncio.Future[None] = loop.create_future()

    async def answer(number: int, verb: Verb, arguments: dict[str, object]) -> None:
        try:
            message = _encoded({"n": number, **await _outcome(controlled, verb, arguments, tally)})
            async with sending, asyncio.timeout(_SENT_WITHIN_S):
                await loop.sock_sendall(sock, message)
        except (OSError, TimeoutError) as error:
            if not broken.done():
                broken.set_exception(Broken(f"takes no answers: {error or 'in time'}"))
        finally:
            room.release()

    async def read() -> None:
        while data := await loop.sock_recv(sock, MOST_BYTES + 1):
            message = decoded(data)
            by = message.get("by")
            # Who asks for a client takes clients, also before it has come to say so.
            if ready is not None:
                ready()
            if message.get("tell") == "ready":
                continue
            if message.get("tell") == "denied":
                tally.denied += 1
                say("control_denied", uid=by)
                continue
            number, verb, arguments = _request(message)
            tally.requests += 1
            if verb.changes:
                say("control_told", verb=verb.name, uid=by, **{f"with_{key}": one for key, one in arguments.items()})
            await room.acquire()
            task = loop.create_task(answer(number, verb, arguments))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    reading = loop.create_task(read())
    try:
        await asyncio.wait((reading, broken), return_when=asyncio.FIRST_COMPLETED)
        if broken.done():
            broken.result()
        with contextlib.suppress(ConnectionError):
            reading.result()
    finally:
        broken.cancel()
        for task in (reading, *tasks):
            task.cancel()
        await asyncio.gather(reading, *tasks, return_exceptions=True)


async def _outcome(controlled: Controlled, verb: Verb, arguments: dict[str, object], tally: Tally) -> dict[str, object]:
    method: Callable[..., Awaitable[object]] = getattr(controlled, verb.name)
    waits = arguments.get("wait_s")
    patience_s = _ANSWERED_WITHIN_S + (float(waits) if isinstance(waits, int | float) else 0.0)
    try:
        async with asyncio.timeout(patience_s):
            answer = await method(**arguments)
        if verb.name == "numbers":
            answer = plain(answer)
            assert isinstance(answer, dict)
            answer["control"] = dataclasses.asdict(tally)
        return {"answer": plain(answer)}
    except Refused as refused:
        tally.refused += 1
        return {"refused": refused.message()}
    except TimeoutError:
        tally.refused += 1
        remedy = "ask again; fourtuple status says whether the broker answers at all"
        return {"refused": Refused("slow", f"no answer within {patience_s:g} s", remedy=remedy).message()}


def plain(value: object) -> object:
    """Dataclasses as dictionaries, however deep."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return value


def built(kind: Any, value: Any) -> Any:  # noqa: ANN401  # what `plain` made of any answer
    """What `plain` was given, by its type."""
    if value is None or kind is type(None):
        return None
    if isinstance(kind, types.UnionType):
        return built(next(one for one in kind.__args__ if one is not type(None)), value)
    if typing.get_origin(kind) is tuple:
        return tuple(built(kind.__args__[0], one) for one in value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind) if field.name in value]
        return cast(Any, kind)(**{name: built(hints[name], value[name]) for name in names})
    return value


def _request(message: dict[str, object]) -> tuple[int, Verb, dict[str, object]]:
    number, name, arguments = message.get("n"), message.get("verb"), message.get("with", {})
    verb = VERBS.get(name) if isinstance(name, str) else None
    if not isinstance(number, int) or verb is None or not isinstance(arguments, dict):
        raise Broken("asks without a number, a verb or arguments")
    if arguments.keys() != verb.arguments.keys():
        raise Broken(f"{verb.name}: other arguments than {', '.join(verb.arguments) or 'none'}")
    for key, check in verb.arguments.items():
        if not check(arguments[key]):
            raise Broken(f"{verb.name}: {key} is out of its bounds")
    return number, verb, arguments


def decoded(data: bytes) -> dict[str, object]:
    """A message; Broken if it is none."""
    if len(data) > MOST_BYTES:
        raise Broken(f"a message of more than {MOST_BYTES} bytes")
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Broken(f"a message that is no JSON: {error}") from None
    if not isinstance(message, dict):
        raise Broken("a message that is no object")
    return message


def _encoded(message: dict[str, object]) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) <= MOST_BYTES:
        return data
    refused = Refused(
        "unavailable", f"the answer has {len(data):,} bytes; {MOST_BYTES:,} are the most", remedy="ask for fewer rows"
    )
    return json.dumps({"n": message["n"], "refused": refused.message()}).encode()
