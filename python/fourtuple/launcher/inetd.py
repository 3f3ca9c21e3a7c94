"""One process per connection: a broker hands sockets over, and each becomes the input and output of a new process.

Decides how many there may be, of one service and of one source too, and what such a process is told of its client. How
a process is started and ended is the launcher's; which service is meant, the note says (docs/handoff.md).
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from fourtuple.launcher.launcher import Launcher
from fourtuple.launcher.outcomes import StartFailed
from fourtuple.service import Handed, Listener, Note, Reader
from fourtuple.templates import Call
from fourtuple.tuples import Endpoint

REASONS = ("served", "unknown", "over_total", "over_service", "over_source", "not_started")
"""What became of connections."""
_SOURCE_BITS = 64
"""An IPv6 source is a /64: who has one address of it has them all."""


class Inetd:
    """Takes connections at a path. Each one's process has it as descriptors 0 and 1."""

    def __init__(
        self,
        launcher: Launcher,
        path: str | os.PathLike[str],
        called: Callable[[Note], Call | None],
        *,
        most: int = 1_000,
        most_per_service: int = 100,
        most_per_source: int = 20,
    ) -> None:
        """`called` says what to start for a connection, None for nothing. BadConfig if the path cannot be had."""
        self._launcher, self._called = launcher, called
        self._most, self._most_per_service, self._most_per_source = most, most_per_service, most_per_source
        self._services: Counter[object] = Counter()
        self._sources: Counter[object] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts = dict.fromkeys(REASONS, 0)
        self._listener = Listener(path)
        owner = launcher.socket_owner
        if owner is not None and owner != (os.geteuid(), os.getegid()):
            os.chown(Path(path), *owner, follow_symlinks=False)
        self._reader = Reader(self._listener, self._taken)

    def live(self, service: str) -> int:
        """Its connections now."""
        return self._services[service]

    async def aclose(self) -> None:
        """Take no more, and end those that there are as the launcher ends services."""
        self._reader.stop()
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _taken(self, handed: Handed) -> None:
        call = self._called(handed.note)
        peer, local = _ends(handed)
        source = None if peer is None else _source(peer.address)
        reason = self._refusal(call, source)
        if call is None or reason:
            self.counts[reason] += 1
            handed.socket.close()
            return
        self._services[call.service] += 1
        self._sources[source] += 1
        task = asyncio.get_running_loop().create_task(self._serve(handed, call, _told(peer, local)))
        self._tasks.add(task)

        def over(_: object) -> None:
            self._tasks.discard(task)
            for counter, key in ((self._services, call.service), (self._sources, source)):
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]

        task.add_done_callback(over)

    def _refusal(self, call: Call | None, source: object) -> str:
        if call is None:
            return "unknown"
        if len(self._tasks) >= self._most:
            return "over_total"
        if self._services[call.service] >= self._most_per_service:
            return "over_service"
        return "over_source" if self._sources[source] >= self._most_per_source else ""

    async def _serve(self, handed: Handed, call: Call, variables: dict[str, str]) -> None:
        with handed.socket:
            # The mode belongs to the connection and not to the descriptor, so that the process would have it, too.
            handed.socket.setblocking(True)
            try:
                ended = await self._launcher.serve(call, handed.socket, variables)
            except StartFailed:
                self.counts["not_started"] += 1
                return
            self.counts["served"] += 1
        await ended


def _ends(handed: Handed) -> tuple[Endpoint | None, Endpoint | None]:
    """Of the note, whose client may be behind a proxy; or else of the socket."""
    peer, local = handed.note.peer, handed.note.local
    try:
        if peer is None:
            peer = _endpoint(handed.socket.getpeername())
        if local is None:
            local = _endpoint(handed.socket.getsockname())
    except OSError:
        pass
    return peer, local


def _endpoint(name: tuple[str, int]) -> Endpoint:
    return Endpoint(ip_address(name[0].partition("%")[0]), name[1])


def _source(address: IPv4Address | IPv6Address) -> object:
    return address if address.version == 4 else int(address) >> 128 - _SOURCE_BITS


def _told(peer: Endpoint | None, local: Endpoint | None) -> dict[str, str]:
    """As ucspi-tcp (tcp-environ(5)), xinetd and systemd's Accept=yes tell a process of its connection."""
    found = {"PROTO": "TCP"}
    if peer is not None:
        host, port = str(peer.address), str(peer.port)
        found |= {"REMOTE_HOST": host, "REMOTE_ADDR": host, "REMOTE_PORT": port}
        found |= {"TCPREMOTEIP": host, "TCPREMOTEPORT": port}
    if local is not None:
        found |= {"TCPLOCALIP": str(local.address), "TCPLOCALPORT": str(local.port)}
    return found
