"""A `Controlled` in another process: every method is a message, and its answer is waited for.

Decides how long. Knows no HTTP. The process of the API asks the supervisor so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from fourtuple.control.verbs import (
    MOST_BYTES,
    MOST_WAIT_S,
    Connections,
    FailureRow,
    Limits,
    Numbers,
    Refused,
    ServiceView,
    Status,
    Top,
    Upgrade,
    built,
    decoded,
)

T = TypeVar("T")
CALLER: ContextVar[int | None] = ContextVar("caller", default=None)
"""The user for whom something is asked."""
_PATIENCE_S = 15.0
"""A little longer than the supervisor gives itself."""


class Gone(Exception):  # nobody's fault
    """The supervisor has closed its end."""


class Remote:
    """Asks over `sock`, the other end of `serve_verbs`; `run` reads the answers."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a non-blocking socket."""
        self._sock = sock
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, object]]] = {}
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Read answers until the supervisor closes its end."""
        loop = asyncio.get_running_loop()
        try:
            with contextlib.suppress(OSError):
                while data := await loop.sock_recv(self._sock, MOST_BYTES + 1):
                    message = decoded(data)
                    number = message.get("n")
                    waiting = self._waiting.pop(number, None) if isinstance(number, int) else None
                    if waiting is not None and not waiting.done():
                        waiting.set_result(message)
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(Gone)

    async def told_denied(self, uid: int | None) -> None:
        """Let the supervisor count somebody who may not do what was tried."""
        with contextlib.suppress(OSError, TimeoutError):
            await self._send({"tell": "denied", "by": uid})

    async def told_ready(self) -> None:
        """Let the supervisor know that clients are accepted from now on."""
        with contextlib.suppress(OSError):
            await self._send({"tell": "ready"})

    async def raw_numbers(self) -> dict[str, Any]:
        """`numbers`, with the supervisor's tally of this socket as `control`."""
        return await self._ask("numbers", dict[str, Any])

    async def status(self) -> Status:
        """As `Controlled`; so are all below."""
        return await self._ask("status", Status)

    async def numbers(self) -> Numbers:
        return await self._ask("numbers", Numbers)

    async def connections(self, after: str | None, most: int, service: str | None, source: str | None) -> Connections:
        return await self._ask("connections", Connections, after=after, most=most, service=service, source=source)

    async def close_connection(self, id: str) -> None:  # as in Controlled
        await self._ask("close_connection", type(None), id=id)

    async def top(self, by: str, most: int) -> Top:
        return await self._ask("top", Top, by=by, most=most)

    async def service(self, name: str) -> ServiceView:
        return await self._ask("service", ServiceView, name=name)

    async def reasons(self) -> dict[str, int]:
        return await self._ask("reasons", dict[str, int])

    async def failures(self) -> tuple[FailureRow, ...]:
        return await self._ask("failures", tuple[FailureRow, ...])

    async def wake(self, service: str, wait_s: float) -> ServiceView:
        return await self._ask("wake", ServiceView, service=service, wait_s=wait_s)

    async def stop(self, service: str, wait_s: float) -> ServiceView:
        return await self._ask("stop", ServiceView, service=service, wait_s=wait_s)

    async def drain(self, grace_s: float | None) -> None:
        await self._ask("drain", type(None), grace_s=grace_s)

    async def limits(self) -> Limits:
        return await self._ask("limits", Limits)

    async def set_limits(self, changes: Mapping[str, int]) -> Limits:
        return await self._ask("set_limits", Limits, changes=dict(changes))

    async def upgrade(self, executable: str | None) -> Upgrade:
        return await self._ask("upgrade", Upgrade, executable=executable)

    async def reload(self) -> None:
        await self._ask("reload", type(None))

    async def _ask(self, verb: str, kind: type[T], **arguments: object) -> T:
        number = next(self._numbers)
        waiting: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        waits = arguments.get("wait_s")
        patience_s = _PATIENCE_S + (min(float(waits), MOST_WAIT_S) if isinstance(waits, int | float) else 0.0)
        try:
            async with asyncio.timeout(patience_s):
                await self._send({"n": number, "verb": verb, "with": arguments, "by": CALLER.get()})
                message = await waiting
        except (TimeoutError, OSError, Gone):
            remedy = "look whether it runs, and at its log"
            raise Refused("unavailable", "the supervisor does not answer", remedy=remedy) from None
        finally:
            self._waiting.pop(number, None)
        refused = message.get("refused")
        if isinstance(refused, dict):
            raise Refused(**refused)
        found: T = built(kind, message.get("answer"))
        return found

    async def _send(self, message: dict[str, object]) -> None:
        async with self._sending:
            await asyncio.get_running_loop().sock_sendall(self._sock, json.dumps(message).encode())
