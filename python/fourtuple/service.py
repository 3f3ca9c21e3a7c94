"""The service's side of a handoff: accept sockets that a broker passes over, as if they had been accepted here.

Decides how a note is read (docs/handoff.md) and what becomes of a channel that brings none. Knows no broker, route or
engine; needs the standard library alone. A blocking service uses `Listener`; an asyncio one `start_server`.

    with Listener("/run/shop") as listener:
        while True:
            handed = listener.accept()
            handed.socket.sendall(b"hello " + str(handed.peer).encode())
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from types import TracebackType
from typing import Self

from fourtuple.errors import BadConfig
from fourtuple.tuples import Endpoint

MAGIC = b"4TUP"
VERSION = 1
FIXED_BYTES = 48
MOST_BYTES = FIXED_BYTES + 2 * 256
PATIENCE_S = 5.0
"""A channel that brings no note for so long is closed."""
_DESCRIPTORS = 4
"""Room for more than the one that there is, so that too many are seen and closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a broker says about a socket."""

    peer: Endpoint | None
    """The client; None if the connection was broken already when the broker asked."""
    local: Endpoint | None
    """What the client connected to."""
    service: str
    matched: str
    """What named the service: a server name, a host; empty if nothing did."""
    seen_bytes: int
    """Bytes that the broker has looked at; all of them are still to be read from the socket."""

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a note; ValueError says what is wrong with it."""
        if len(data) < FIXED_BYTES or data[:4] != MAGIC:
            raise ValueError("no note of a fourtuple broker")
        version, family = data[4], data[5]
        if version != VERSION:
            raise ValueError(f"a note of version {version}; this is {VERSION}")
        if int.from_bytes(data[6:8]) != len(data):
            raise ValueError(f"{len(data)} bytes, of which the note says {int.from_bytes(data[6:8])}")
        names = []
        at = FIXED_BYTES
        for _ in range(2):
            end = at + 1 + (data[at] if at < len(data) else 0)
            if end > len(data):
                raise ValueError("a name is longer than the note")
            names.append(data[at + 1 : end].decode())
            at = end
        if family not in (0, 4, 6) or at != len(data):
            raise ValueError("neither version 4 nor 6, or bytes behind the names")
        endpoints = [_endpoint(data[16:32], data[8:10], family), _endpoint(data[32:48], data[10:12], family)]
        return cls(
            peer=endpoints[0],
            local=endpoints[1],
            service=names[0],
            matched=names[1],
            seen_bytes=int.from_bytes(data[12:16]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """A client's socket, with its note."""

    socket: socket.socket
    note: Note

    @property
    def peer(self) -> Endpoint | None:
        """The client."""
        return self.note.peer


def receive(channel: socket.socket) -> Handed:
    """Take the socket that comes over `channel`, a connection that a broker has made; ValueError if none comes."""
    data, control, flags, _ = channel.recvmsg(MOST_BYTES, socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, body in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(body[: len(body) - len(body) % descriptors.itemsize])
    try:
        if len(descriptors) != 1 or flags & socket.MSG_CTRUNC or not stat.S_ISSOCK(os.fstat(descriptors[0]).st_mode):
            raise ValueError(f"{len(descriptors)} descriptors came; one socket was wanted")
        note = Note.parse(data)
        handed = socket.socket(fileno=descriptors[0])
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return Handed(socket=handed, note=note)


class Listener:
    """Where a broker hands sockets to; a context manager. A socket file that nobody listens on any more is replaced."""

    def __init__(self, path: str | os.PathLike[str], *, backlog: int = 1024, mode: int = 0o600) -> None:
        """Listen at `path`. `mode` says who may hand sockets over: with 0o600 the same user and root."""
        self.path = Path(path)
        self._socket = _listening(self.path, backlog, mode)

    def accept(self) -> Handed:
        """Wait for the next client. What brings no socket, or no note, is closed and passed over."""
        while True:
            channel, _ = self._socket.accept()
            with channel:
                channel.settimeout(PATIENCE_S)
                try:
                    handed = receive(channel)
                except (ValueError, OSError):
                    continue
                handed.socket.setblocking(True)
                return handed

    def fileno(self) -> int:
        """For select() and the like: readable when `accept` has something to look at."""
        return self._socket.fileno()

    def close(self) -> None:
        """Listen no more, and remove the socket file."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            self.path.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Handed]:
        while True:
            yield self.accept()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Note], Awaitable[None]]


class Server:
    """An asyncio server that gets its clients from a broker; `start_server` makes one."""

    def __init__(self, path: Path, listening: socket.socket, connected: Connected) -> None:
        """For `start_server`; not called otherwise."""
        self._path, self._socket, self._connected = path, listening, connected
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(listening.fileno(), self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            channel, _ = self._socket.accept()
            channel.setblocking(False)
            task = self._loop.create_task(self._take(channel))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take(self, channel: socket.socket) -> None:
        with channel:
            ready = asyncio.Event()
            self._loop.add_reader(channel.fileno(), ready.set)
            try:
                await asyncio.wait_for(ready.wait(), PATIENCE_S)
                handed = receive(channel)
            except (ValueError, OSError, TimeoutError):
                return
            finally:
                self._loop.remove_reader(channel.fileno())
        handed.socket.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=handed.socket)
        try:
            await self._connected(reader, writer, handed.note)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def close(self) -> None:
        """Listen no more, remove the socket file, cancel what is being served."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def start_server(
    connected: Connected, path: str | os.PathLike[str], *, backlog: int = 1024, mode: int = 0o600
) -> Server:
    """As `asyncio.start_unix_server`, but `connected(reader, writer, note)` speaks with the client itself."""
    listening = _listening(Path(path), backlog, mode)
    listening.setblocking(False)
    return Server(Path(path), listening, connected)


def _listening(path: Path, backlog: int, mode: int) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            listening.bind(str(path))
        except OSError:
            if not _is_stale(path):
                raise
            path.unlink()
            listening.bind(str(path))
        # Before anybody can connect.
        path.chmod(mode)
        listening.listen(backlog)
    except OSError as error:
        listening.close()
        raise BadConfig("path", f"{path}: {error.strerror or error}") from None
    return listening


def _is_stale(path: Path) -> bool:
    """Whether it is a socket file behind which nobody is."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


def _endpoint(address: bytes, port: bytes, family: int) -> Endpoint | None:
    if family == 0:
        return None
    wide = IPv6Address(address)
    return Endpoint(wide.ipv4_mapped or wide if family == 4 else wide, int.from_bytes(port))
