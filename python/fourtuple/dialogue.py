"""What is said on a connection: `Dialogue`, an opening and a round, each a few acts of the engine's step language.

Decides which acts there are and which cannot be played. Knows no protocol by itself (`fourtuple.load.presets` does) and
no time: when a round is due, the load configuration says. The engine plays a dialogue in 16 bytes per connection.
"""

from __future__ import annotations

from msgspec import Struct

from fourtuple.errors import BadConfig

MOST_ACTS = 250
MOST_BYTES = 65_535
"""Of one act that waits for them."""
ACCEPT_BYTES = 28
"""Of a Sec-WebSocket-Accept: the base64 of a SHA-1."""
MOST_WAIT_S = 86_400
MOST_SAID_BYTES = 2_048
"""Of one Say: what a buffer of the engine holds. More is several, which `said` makes."""


class Say(Struct, frozen=True):
    """Send these bytes, at most 2,048; `said` sends more."""

    data: bytes

    @property
    def row(self) -> tuple[str, bytes, int, int]:
        """The act as the engine takes it."""
        return ("say", self.data, 0, 0)


class Expect(Struct, frozen=True):
    """Exactly these bytes come."""

    data: bytes

    @property
    def row(self) -> tuple[str, bytes, int, int]:
        """The act as the engine takes it."""
        return ("expect", self.data, 0, 0)


class Until(Struct, frozen=True):
    """Anything comes up to and with this mark, at most `most_bytes` in all."""

    mark: bytes
    most_bytes: int = 65_536

    @property
    def row(self) -> tuple[str, bytes, int, int]:
        """The act as the engine takes it."""
        return ("until", self.mark, self.most_bytes, 0)


class Skip(Struct, frozen=True):
    """So many bytes come, whatever they are."""

    count: int

    @property
    def row(self) -> tuple[str, bytes, int, int]:
        """The act as the engine takes it."""
        return ("skip", b"", self.count, 0)


class Rest(Struct, frozen=True):
    """What is left of the datagram, whatever it is, nothing included. Only for UDP."""

    @property
    def row(self) -> tuple[str, bytes, int, int]:
        """The act as the engine takes it."""
        return ("rest", b"", 0, 0)


class Wait(Struct, frozen=True):
    """Nothing for so long: think time. Neither --answer-timeout nor the answer's latency goes on meanwhile."""

    seconds: float

    @property
    def row(self) -> tuple[str, bytes, int, int]:
        """The act as the engine takes it."""
        whole = int(self.seconds)
        return ("wait", b"", whole, int((self.seconds - whole) * 1e9))


class Response(Struct, frozen=True):
    """A whole HTTP/1.1 response comes (RFC 9112); a status outside of the two, both included, is a refusal."""

    least_status: int = 200
    most_status: int = 399

    @property
    def row(self) -> tuple[str, bytes, int, int]:
        """The act as the engine takes it."""
        return ("response", b"", self.least_status, self.most_status)


class Upgrade(Struct, frozen=True):
    """The answer to a WebSocket's opening comes: status 101 and this Sec-WebSocket-Accept (RFC 6455 4.1)."""

    accept: bytes

    @property
    def row(self) -> tuple[str, bytes, int, int]:
        """The act as the engine takes it."""
        return ("upgrade", self.accept, 0, 0)


class Pong(Struct, frozen=True):
    """WebSocket frames come (RFC 6455) until a pong that carries these bytes."""

    data: bytes

    @property
    def row(self) -> tuple[str, bytes, int, int]:
        """The act as the engine takes it."""
        return ("pong", self.data, 0, 0)


def said(data: bytes) -> tuple[Say, ...]:
    """Bytes of any number, as one Say after the other."""
    return tuple(Say(data[start : start + MOST_SAID_BYTES]) for start in range(0, len(data), MOST_SAID_BYTES))


Act = Say | Expect | Until | Skip | Rest | Wait | Response | Upgrade | Pong


class Dialogue(Struct, frozen=True, kw_only=True):
    """An opening, played once when a connection stands, and a round, played each time that one is due.

    dialogue = Dialogue(round=(Say(b"PING\\r\\n"), Expect(b"+PONG\\r\\n")))
    """

    opening: tuple[Act, ...] = ()
    round: tuple[Act, ...] = ()

    def __post_init__(self) -> None:
        for part, acts in (("opening", self.opening), ("round", self.round)):
            if not isinstance(acts, tuple):
                raise BadConfig(part, f"is {type(acts).__name__}; a tuple of acts is needed")
            for place, act in enumerate(acts):
                _check(f"{part}[{place}]", act)
        if len(self.opening) + len(self.round) > MOST_ACTS:
            raise BadConfig("dialogue", f"has {len(self.opening) + len(self.round)} acts; at most {MOST_ACTS}")

    def require_datagrams(self) -> None:
        """BadConfig if an act is for streams only: a datagram is heard whole, and its acts end with it."""
        for part, acts in (("opening", self.opening), ("round", self.round)):
            for place, act in enumerate(acts):
                if isinstance(act, Response | Pong):
                    raise BadConfig(f"{part}[{place}]", f"is {type(act).__name__}, which is for streams, not datagrams")

    def require_stream(self) -> None:
        """BadConfig if an act is for datagrams only."""
        for part, acts in (("opening", self.opening), ("round", self.round)):
            if Rest() in acts:
                raise BadConfig(
                    f"{part}[{acts.index(Rest())}]", "is Rest, which is for datagrams: a stream has no end of one"
                )

    @property
    def longest_say_bytes(self) -> int:
        """Of all of its acts; 0 if it says nothing."""
        return max((len(act.data) for act in self.opening + self.round if isinstance(act, Say)), default=0)


def _check(path: str, act: object) -> None:
    match act:
        case Say(data=data):
            _bytes(path, data, 1, MOST_SAID_BYTES)
        case Expect(data=data) | Until(mark=data):
            _bytes(path, data, 1, MOST_BYTES)
        case Pong(data=data):
            _bytes(path, data, 0, 125)  # RFC 6455 5.5: a control frame carries no more
        case Upgrade(accept=data):
            _bytes(path, data, ACCEPT_BYTES, ACCEPT_BYTES)
        case Skip(count=number):
            _whole(path, number, 1, 2**32 - 1)
        case Wait(seconds=seconds):
            _seconds(path, seconds)
        case Rest():
            pass
        case Response(least_status=least, most_status=most):
            _whole(f"{path}.least_status", least, 100, 599)
            _whole(f"{path}.most_status", most, least, 599)
        case _:
            allowed = "Say, Expect, Until, Skip, Rest, Wait, Response, Upgrade, Pong"
            raise BadConfig(path, f"is {act!r}; one of {allowed} is needed")
    if isinstance(act, Until):
        _whole(f"{path}.most_bytes", act.most_bytes, len(act.mark), 2**32 - 1)


def _seconds(path: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST_WAIT_S:
        raise BadConfig(path, f"is {value!r}; more than 0 and at most {MOST_WAIT_S:,} s are needed")


def _bytes(path: str, data: object, least: int, most: int) -> None:
    if not isinstance(data, bytes) or not least <= len(data) <= most:
        found = f"{len(data):,} bytes" if isinstance(data, bytes) else repr(data)
        raise BadConfig(path, f"is {found}; {least} to {most:,} bytes are needed")


def _whole(path: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadConfig(path, f"is {value!r}; a whole number from {least} to {most} is needed")
