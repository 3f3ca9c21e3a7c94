"""Clients of the chaos run: each visits one service in some manner, and every byte that it hears is compared.

Decides what a client does, and whether what it heard is all of its service's words, a beginning of them, a polite
refusal, or something that nobody may hear. Knows neither the broker nor what was done to it meanwhile: what a loss was
due to, the checker says.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

DEADLINE_S = 60.0
"""Whoever has no end after this hangs: far beyond what a broker may wait for a service, and a manner takes."""
REFUSED = b"HTTP/1.1 503 "
"""How an HTTP client hears that its service cannot be had."""


class Manner(Enum):
    """What a client does."""

    ASKS = "asks"
    """A request, its last byte, and the answer to its end: half closed while the service speaks."""
    BULK = "bulk"
    """Says much, and hears it while it says it."""
    SLOW = "slow"
    """A few bytes at a time, its request as well."""
    RESTS = "rests"
    """Says something now and then, for seconds."""
    READS_SLOWLY = "reads slowly"
    """Says much, with little room for the answer, and takes that in pieces."""
    RESETS = "resets"
    """Goes in the middle, by RST."""
    SILENT = "silent"
    """Says nothing."""
    GARBAGE = "garbage"
    """Says what is no protocol."""


class Outcome(Enum):
    """What a client heard."""

    RIGHT = "right"
    TOLD = "told"
    """A polite refusal."""
    LOST = "lost"
    """A beginning of what it should have heard, perhaps nothing."""
    LEFT = "left"
    """It went first; what it heard until then was right."""
    WRONG = "wrong"
    """Bytes that it should not have heard."""
    HUNG = "hung"
    """Nothing more, and no end."""


@dataclass(slots=True, kw_only=True)
class Visit:
    """One client, from before it connects to its end."""

    service: str
    """The name that it asks for."""
    manner: Manner
    paths: tuple[str, ...]
    """Where its service may say that it is: one, or two if it is being moved."""
    source: str
    begun_s: float = field(default_factory=time.monotonic)
    connected_s: float = 0.0
    ended_s: float = 0.0
    said: bytearray = field(default_factory=bytearray)
    heard: bytearray = field(default_factory=bytearray)
    error: str = ""
    port: int = 0
    outcome: Outcome = Outcome.HUNG

    def __str__(self) -> str:
        took_s = self.ended_s - self.begun_s
        words = f"{self.manner.value} {self.service} from {self.source}:{self.port}: {self.outcome.value} "
        return words + f"after {took_s:.2f} s, {len(self.heard)} of {len(self.said)} bytes, {self.error or 'EOF'}"


async def visit(one: Visit, port: int, dice: random.Random) -> Visit:
    """From connect() to what it heard; `dice` decide what it says."""
    pieces, pause_s = _words(one, dice)
    reads_slowly = one.manner is Manner.READS_SLOWLY
    goes_after = dice.randrange(1, len(pieces) + 1) if one.manner is Manner.RESETS else None
    sock = socket.socket()
    sock.setblocking(False)
    writer: asyncio.StreamWriter | None = None
    try:
        if reads_slowly:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.bind((one.source, 0))
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
            one.connected_s, one.port = time.monotonic(), sock.getsockname()[1]
            reader, writer = await asyncio.open_connection(sock=sock, limit=8192 if reads_slowly else 65_536)
            if goes_after is not None:
                await _say(one, writer, pieces[:goes_after], pause_s, ends=False)
                await asyncio.sleep(dice.uniform(0, 0.2))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                hearing = asyncio.create_task(_hear(one, reader, 0.02 if reads_slowly else 0.0))
                try:
                    await _say(one, writer, pieces, pause_s, ends=one.manner is not Manner.SILENT)
                except OSError as error:
                    one.error = type(error).__name__
                await hearing
    except TimeoutError:
        one.error = "deadline"
    except OSError as error:
        one.error = type(error).__name__
    finally:
        if writer is not None:
            writer.transport.abort()
        sock.close()
    one.ended_s = time.monotonic()
    one.outcome = _outcome(one, is_gone=goes_after is not None)
    return one


async def _say(
    one: Visit, writer: asyncio.StreamWriter, pieces: Sequence[bytes], pause_s: float, *, ends: bool
) -> None:
    for piece in pieces:
        one.said += piece
        writer.write(piece)
        await writer.drain()
        if pause_s:
            await asyncio.sleep(pause_s)
    if ends:
        writer.write_eof()


async def _hear(one: Visit, reader: asyncio.StreamReader, pause_s: float) -> None:
    try:
        while block := await reader.read(16_384):
            one.heard += block
            if pause_s:
                await asyncio.sleep(pause_s)
    except OSError as error:
        one.error = type(error).__name__


def _words(one: Visit, dice: random.Random) -> tuple[list[bytes], float]:
    """What it says, in pieces, and the time between them."""
    request = f"GET /{dice.randrange(1 << 32):x} HTTP/1.1\r\nHost: {one.service}\r\n\r\n".encode()
    match one.manner:
        case Manner.ASKS | Manner.RESETS:
            return [request, dice.randbytes(dice.randrange(2_000))], 0.0
        case Manner.BULK:
            return [request, *(dice.randbytes(16_384) for _ in range(dice.randrange(4, 40)))], 0.0
        case Manner.SLOW:
            cuts = sorted(dice.sample(range(1, len(request)), 3))
            return [request[a:b] for a, b in zip([0, *cuts], [*cuts, len(request)], strict=True)], 0.1
        case Manner.RESTS:
            pieces = [request, *(dice.randbytes(dice.randrange(1, 3_000)) for _ in range(dice.randrange(3, 15)))]
            return pieces, dice.uniform(0.3, 1.0)
        case Manner.READS_SLOWLY:
            return [request, *(dice.randbytes(16_384) for _ in range(dice.randrange(4, 12)))], 0.0
        case Manner.SILENT:
            return [], 0.0
        case Manner.GARBAGE:
            return [b"\xff" + dice.randbytes(dice.randrange(1, 200))], 0.0


def _outcome(one: Visit, *, is_gone: bool) -> Outcome:
    heard = bytes(one.heard)
    if one.manner in (Manner.SILENT, Manner.GARBAGE):
        # Nobody's service is meant: the end, without a word, is the right answer.
        return Outcome.WRONG if heard else Outcome.HUNG if one.error == "deadline" else Outcome.RIGHT
    whole = [f"{path} heard ".encode() + one.said for path in one.paths]
    if heard in whole and not one.error and not is_gone:
        return Outcome.RIGHT
    if heard.startswith(REFUSED):
        return Outcome.TOLD
    if not any(words.startswith(heard) for words in whole):
        return Outcome.WRONG
    if is_gone:
        return Outcome.LEFT
    return Outcome.HUNG if one.error == "deadline" else Outcome.LOST
