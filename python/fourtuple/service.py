"""The service's side of a handoff: accept sockets that a broker passes over, as if they had been accepted here.

Decides how a note is read and what becomes of a datagram that is no handoff (docs/handoff.md). Knows no broker, route
or engine; needs the standard library alone. A blocking service uses `Listener`; an asyncio one `start_server`; an ASGI
application is served by `fourtuple.asgi`.

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
import select
import socket
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv6Address
from pathlib import Path
from types import TracebackType
from typing import Self

from msgspec import Struct

from fourtuple.errors import BadConfig
from fourtuple.tuples import Endpoint

MAGIC = b"4TUP"
VERSION = 1
FIXED_BYTES = 48
MOST_BYTES = FIXED_BYTES + 2 * 256
MOST_PASSED_OVER = 64
"""Datagrams that are no handoff, after which a call that must not block comes back with nothing."""
_DESCRIPTORS = 4
"""Room for more than the one that there is, so that too many are seen; the kernel closes what has no room."""
_NO_CONNECTION = frozenset({2, 7, 10})
"""TCP_SYN_SENT, TCP_CLOSE and TCP_LISTEN of include/net/tcp_states.h: not connected yet, no longer, never."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE_S = 1.0
"""Wait so long when there are no descriptors, as asyncio does (ACCEPT_RETRY_DELAY)."""


class Note(Struct, frozen=True, kw_only=True):
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


class Handed(Struct, frozen=True, kw_only=True):
    """A client's socket, with its note."""

    socket: socket.socket
    note: Note

    @property
    def peer(self) -> Endpoint | None:
        """The client."""
        return self.note.peer


def receive(source: socket.socket) -> Handed:
    """Take one datagram off `source`, a socket that brokers send to, and the client that it brings.

    ValueError if it brings none; it is gone, and what came with it is closed. OSError as accept(2): BlockingIOError if
    there is none, EMFILE before one is taken, EINVAL after shutdown(SHUT_RD).
    """
    # A descriptor for which there is no room is closed by the kernel (scm_detach_fds), and the client with it.
    os.close(os.dup(source.fileno()))
    data, control, flags, _ = source.recvmsg(MOST_BYTES, socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, body in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(body[: len(body) - len(body) % descriptors.itemsize])
    try:
        if len(descriptors) != 1 or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            if not data and _is_shut(source):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            raise ValueError(f"{len(data)} bytes with {len(descriptors)} descriptors came; a note with one was wanted")
        note = Note.parse(data)
        handed = _connection(descriptors[0])
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return Handed(socket=handed, note=note)


class Listener:
    """Where a broker hands sockets to; a context manager. A socket file that nobody is behind any more is replaced."""

    def __init__(self, path: str | os.PathLike[str], *, mode: int = 0o600, replace: bool = False) -> None:
        """Be there at `path`. `mode` says who may hand sockets over: with 0o600 the same user and root.

        With `replace` the path is taken over from a service that is there, which then has to `drain`.
        """
        self.path = Path(path)
        self.socket = _bound_over(self.path, mode) if replace else _bound(self.path, mode)
        self._file = _file_at(self.path)

    def accept(self) -> Handed:
        """Wait for the next client. What brings none is passed over. OSError as `receive`."""
        passed_over = 0
        while True:
            try:
                handed = receive(self.socket)
            except ValueError:
                passed_over += 1
                if passed_over >= MOST_PASSED_OVER and self.socket.gettimeout() == 0:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
                continue
            handed.socket.setblocking(True)
            return handed

    def fileno(self) -> int:
        """For select() and the like: readable when `accept` has something to look at."""
        return self.socket.fileno()

    def settimeout(self, seconds: float | None) -> None:
        """As that of a socket: None waits, 0 makes `accept` raise BlockingIOError, and else TimeoutError is raised."""
        self.socket.settimeout(seconds)

    def drain(self) -> Iterator[Handed]:
        """Leave without losing a client: nothing more can be sent here; yields what is queued already, and closes.

        A broker that comes later finds the next service at this path, or waits for it. The end is one for every process
        that shares the socket.
        """
        self._unlink()
        # From here on a sender gets EPIPE (unix_dgram_sendmsg), so that an empty queue stays empty.
        self.socket.shutdown(socket.SHUT_RD)
        self.settimeout(0)
        return self._queued()

    def _queued(self) -> Iterator[Handed]:
        with self:
            while True:
                try:
                    handed = receive(self.socket)
                except ValueError:
                    continue
                except BlockingIOError:
                    return
                handed.socket.setblocking(True)
                yield handed

    def close(self) -> None:
        """Be there no more, and remove the socket file. Clients still in the queue lose their connection: `drain`."""
        if self.socket.fileno() >= 0:
            # Wakes who waits in `accept` in another thread, which close() alone does not.
            self.socket.shutdown(socket.SHUT_RDWR)
            self.socket.close()
            self._unlink()

    def _unlink(self) -> None:
        """Remove the socket file, unless another service has put its own there meanwhile."""
        if self._file is not None and _file_at(self.path) == self._file:
            self.path.unlink(missing_ok=True)
        self._file = None

    def __iter__(self) -> Iterator[Handed]:
        while True:
            yield self.accept()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Reader:
    """Takes clients off a `Listener` in an asyncio event loop; each is passed to `taken` with a non-blocking socket."""

    def __init__(self, listener: Listener, taken: Callable[[Handed], object]) -> None:
        """Begin; the loop is the running one."""
        listener.settimeout(0)
        self._listener, self._taken = listener, taken
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._begin()

    def _begin(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener.fileno(), self._read)

    def _read(self) -> None:
        # Not all that there is: other work of the loop has its turn as well.
        for _ in range(MOST_PASSED_OVER):
            try:
                handed = receive(self._listener.socket)
            except ValueError:
                continue
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._loop.remove_reader(self._listener.fileno())
                if error.errno in _EXHAUSTED:
                    self._loop.call_exception_handler({"message": "no client can be taken now", "exception": error})
                    self._pause = self._loop.call_later(_PAUSE_S, self._begin)
                return
            handed.socket.setblocking(False)
            self._taken(handed)

    def stop(self) -> None:
        """Take no more."""
        if self._pause is not None:
            self._pause.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())

    def drain(self) -> None:
        """Take what is queued, and be there no more."""
        self.stop()
        for handed in self._listener.drain():
            handed.socket.setblocking(False)
            self._taken(handed)


Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Note], Awaitable[None]]


class Server:
    """An asyncio server that gets its clients from a broker; `start_server` makes one."""

    def __init__(self, listener: Listener, connected: Connected) -> None:
        """For `start_server`; not called otherwise."""
        self._listener, self._connected = listener, connected
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._reader = Reader(listener, self._taken)

    def _taken(self, handed: Handed) -> None:
        task = self._loop.create_task(self._serve(handed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, handed: Handed) -> None:
        reader, writer = await asyncio.open_connection(sock=handed.socket)
        try:
            await self._connected(reader, writer, handed.note)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def drain(self) -> None:
        """Take no more than is queued, remove the socket file, wait until everybody is served."""
        if self._listener.fileno() >= 0:
            self._reader.drain()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Be there no more, remove the socket file, cancel what is being served."""
        self._reader.stop()
        self._listener.close()
        # A task that is cancelled before its first step would never close what it was given.
        await asyncio.sleep(0)
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
    connected: Connected, path: str | os.PathLike[str], *, mode: int = 0o600, replace: bool = False
) -> Server:
    """As `asyncio.start_unix_server`, but `connected(reader, writer, note)` speaks with the client itself."""
    return Server(Listener(path, mode=mode, replace=replace), connected)


def _bound(path: Path, mode: int) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        # The file gets the mode of the socket less the umask (unix_bind_bsd), before anybody can send to it.
        os.fchmod(bound.fileno(), mode)
        try:
            bound.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            path.unlink()
            bound.bind(str(path))
        path.chmod(mode)
    except OSError as error:
        bound.close()
        raise BadConfig("path", f"{path}: {error.strerror or error}") from None
    return bound


def _bound_over(path: Path, mode: int) -> socket.socket:
    """Bound to another name beside it, and then moved there: at each moment somebody is at the path."""
    beside = path.with_name(f".{os.getpid()}")
    bound = _bound(beside, mode)
    try:
        beside.rename(path)
    except OSError as error:
        bound.close()
        beside.unlink()
        raise BadConfig("path", f"{path}: {error.strerror}") from None
    return bound


def _file_at(path: Path) -> tuple[int, int] | None:
    """What tells this file from another that takes its place."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_stale(path: Path) -> bool:
    """Whether it is a socket file behind which nobody is."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        # A listener of another type answers EPROTOTYPE, which is an answer.
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


def _is_shut(source: socket.socket) -> bool:
    """Whether an empty answer means that nothing will ever come, and not an empty datagram (unix_dgram_poll)."""
    poll = select.poll()
    poll.register(source.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


def _connection(descriptor: int) -> socket.socket:
    """The socket behind it; ValueError if that is no TCP connection."""
    try:
        handed = socket.socket(fileno=descriptor)
        try:
            # Only TCP has an answer, and its first byte is the state.
            state = handed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except BaseException:
            handed.detach()
            raise
    except OSError as error:
        raise ValueError(f"the descriptor is no TCP socket: {error.strerror}") from None
    if state in _NO_CONNECTION:
        handed.detach()
        raise ValueError("the socket that came is not connected")
    return handed


def _endpoint(address: bytes, port: bytes, family: int) -> Endpoint | None:
    if family == 0:
        return None
    wide = IPv6Address(address)
    return Endpoint(wide.ipv4_mapped or wide if family == 4 else wide, int.from_bytes(port))
