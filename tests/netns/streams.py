"""Long-lived connections whose every byte is known by its place: who reads one out of place, or none, says so.

A client's first bytes are a number, by which the service's end of the same connection is known. Both ends are in this
process, on one thread.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from dataclasses import dataclass, field

_BLOCK = random.Random(4).randbytes(65_521)
_GREETING = b"\xff\xfe"
_HEAD_BYTES = len(_GREETING) + 4
_TICK_S = 0.002


def _bytes_at(key: int, place: int, count: int) -> bytes:
    start = (key * 977 + place) % len(_BLOCK)
    out = _BLOCK[start : start + count]
    while len(out) < count:
        out += _BLOCK[: count - len(out)]
    return out


@dataclass
class Manner:
    """How one end behaves; bytes per tick."""

    says: int = 200
    reads: int = 1 << 20
    bulk: int = 0
    """Said at once, in addition, when `Streams.burst` is called."""
    stops_at: int | None = None
    """After so many bytes it says no more, and sends FIN."""


@dataclass
class _End:
    socket: socket.socket
    key: int
    manner: Manner
    hears: int
    """The key of the bytes that come here."""
    said: int = 0
    owed: int = 0
    heard: int = 0
    shut: bool = False
    ended: bool = False
    trouble: str = ""


@dataclass
class Streams:
    """All of them, moving on a thread of their own from `start` to `finish`."""

    ends: dict[int, list[_End | None]] = field(default_factory=dict)
    _finishing: threading.Event = field(default_factory=threading.Event)
    _bursting: threading.Event = field(default_factory=threading.Event)
    _is_over: threading.Event = field(default_factory=threading.Event)
    _listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0), backlog=4096))
    _manners: dict[int, Manner] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    trouble: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener.setblocking(False)
        self._thread = threading.Thread(target=self._turns, daemon=True)

    @property
    def target(self) -> str:
        return f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"

    def start(self) -> None:
        self._thread.start()

    def add(self, at: tuple[str, int], number: int, client: Manner, service: Manner) -> None:
        """Connect another one."""
        made = socket.create_connection(at, 20)
        made.sendall(_GREETING + number.to_bytes(4, "big"))
        made.setblocking(False)
        with self._lock:
            self._manners[number] = service
            self.ends.setdefault(number, [None, None])[0] = _End(made, 2 * number, client, 2 * number + 1)

    def standing(self) -> int:
        """How many are known at both ends."""
        with self._lock:
            return sum(all(pair) for pair in self.ends.values())

    def moved(self) -> int:
        """Bytes that have come through so far."""
        with self._lock:
            return sum(end.heard for pair in self.ends.values() for end in pair if end)

    def burst(self) -> None:
        self._bursting.set()

    def finish(self, patience_s: float) -> None:
        """Everybody says FIN, reads until the other's, and has then heard what the other has said."""
        self._finishing.set()
        if not self._is_over.wait(patience_s):
            with self._lock:
                left = [
                    f"{number}: {[(end.said, end.heard, end.shut, end.ended) if end else None for end in pair]}"
                    for number, pair in self.ends.items()
                    if not all(end and end.ended and end.shut for end in pair)
                ]
            self.trouble.append(f"{len(left)} do not end: {left[:5]}")
        self._is_over.set()
        self._thread.join()
        for number, (client, service) in self.ends.items():
            assert client is not None
            if service is None:
                self.trouble.append(f"{number} has not come to the service")
                continue
            for end, other in ((client, service), (service, client)):
                if end.trouble:
                    self.trouble.append(f"{number}: {end.trouble}")
                elif end.heard != other.said:
                    self.trouble.append(f"{number}: {other.said} bytes were said, and {end.heard} heard")
                end.socket.close()
        self._listener.close()

    def _turns(self) -> None:
        while not self._is_over.is_set():
            with self._lock:
                self._accept()
                bursting = self._bursting.is_set()
                self._bursting.clear()
                live = [end for pair in self.ends.values() for end in pair if end and not (end.ended and end.shut)]
                if not live and self._finishing.is_set():
                    self._is_over.set()
                for end in live:
                    try:
                        self._turn(end, bursting)
                    except OSError as error:
                        end.trouble = f"{error} after {end.said} said and {end.heard} heard"
                        end.ended = end.shut = True
            time.sleep(_TICK_S)

    def _accept(self) -> None:
        while True:
            try:
                made, _ = self._listener.accept()
            except BlockingIOError:
                return
            made.settimeout(20)
            head = made.recv(_HEAD_BYTES, socket.MSG_WAITALL)
            made.setblocking(False)
            number = int.from_bytes(head[len(_GREETING) :], "big")
            end = _End(made, 2 * number + 1, self._manners.get(number, Manner()), 2 * number)
            self.ends.setdefault(number, [None, None])[1] = end

    def _turn(self, end: _End, bursting: bool) -> None:
        self._say(end, bursting)
        left = end.manner.reads if not self._finishing.is_set() else 1 << 20
        while left > 0 and not end.ended:
            try:
                heard = end.socket.recv(min(left, 65_536))
            except BlockingIOError:
                return
            if heard != _bytes_at(end.hears, end.heard, len(heard)):
                end.trouble = f"other bytes came at {end.heard}"
            end.heard += len(heard)
            left -= len(heard)
            end.ended = not heard

    def _say(self, end: _End, bursting: bool) -> None:
        manner = end.manner
        is_last = self._finishing.is_set()
        if not end.shut and not is_last and end.owed < 100_000:
            end.owed += manner.says + (manner.bulk if bursting else 0)
        if manner.stops_at is not None:
            end.owed = min(end.owed, manner.stops_at - end.said)
            is_last = is_last or end.said >= manner.stops_at
        while end.owed > 0 and not end.shut:
            try:
                sent = end.socket.send(_bytes_at(end.key, end.said, min(end.owed, 65_521)))
            except BlockingIOError:
                return
            end.said += sent
            end.owed -= sent
        if is_last and not end.shut:
            end.socket.shutdown(socket.SHUT_WR)
            end.shut = True
