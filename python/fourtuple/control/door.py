"""The supervisor's end of the control socket: it listens, and starts the API's process for the first client.

Decides when that process is started, what it is given, and what clients are told who come while it cannot be started.
Knows no HTTP but for that one answer. The process ends by itself when it has had no client for a while; who comes then
waits in the backlog, where this sees them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fourtuple.control.peers import Access
from fourtuple.control.verbs import Broken, Controlled, Say, Tally, serve_verbs, unsaid
from fourtuple.errors import BadConfig, MissingFeature

IDLE_S = 60.0
"""Without a client for so long, the process of the API ends."""
STUCK_S = 60.0
"""If it accepts nobody for so long, it is ended."""
BACKLOG = 64
COMMAND = (sys.executable, "-m", "fourtuple.control")
_LONGEST_PAUSE_S = 60.0
_TURNED_AWAY_AT_ONCE = 16
_STUCK_LOOKS = 3
_STARTS_WITHIN_S = 60.0
"""A busy machine takes its time to import a web server."""


def listen(path: Path, *, mode: int = 0o600, group: int | None = None) -> socket.socket:
    """A socket at `path`, in whose place nobody listens; BadConfig if somebody does, or it cannot be made."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise BadConfig(str(path), "is there, and is no socket; the control socket needs a place of its own")
            if _answers(path):
                raise BadConfig(str(path), "is the control socket of a broker that runs; give this one another")
            path.unlink()
        # Nobody may connect before owner and mode are what they are to be.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        if group is not None:
            os.chown(path, -1, group)
        path.chmod(mode)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise BadConfig(str(path), f"cannot be the control socket: {error.strerror or error}") from None
    except BaseException:
        listener.close()
        raise
    return listener


def unlink(path: Path, listener: socket.socket) -> None:
    """Remove the socket's file, if it still is this socket's: nobody answers there once it is closed."""
    listener.close()
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(path.lstat().st_mode) and not _answers(path):
            path.unlink()


def require_server() -> None:
    """MissingFeature if the API's libraries are not installed; looks without importing them."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise MissingFeature(f"{' and '.join(missing)} not installed; the control socket needs fourtuple[control]")


class Door:
    """Keeps the control socket; `keep` runs in the supervisor's event loop for as long as that does."""

    def __init__(
        self,
        controlled: Controlled,
        listener: socket.socket,
        access: Access,
        *,
        say: Say = unsaid,
        idle_s: float = IDLE_S,
        stuck_s: float = STUCK_S,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """`listener` stays the caller's, and is left open."""
        self._controlled, self._listener, self._access = controlled, listener, access
        self._say, self._command = say, command
        self._idle_s, self._stuck_s = idle_s, stuck_s
        self.tally = Tally()
        self.pid: int | None = None
        """Of the API's process, while there is one."""

    async def keep(self) -> None:
        """Serve clients until cancelled; then the API's process is ended, too."""
        pause_s = 0.0
        while True:
            if pause_s:
                await self._turn_away(pause_s)
            await self._readable()
            status = await self._serve()
            if status == 0:
                pause_s = 0.0
                continue
            self.tally.failed += 1
            pause_s = min(max(1.0, pause_s * 2), _LONGEST_PAUSE_S)
            self._say("control_failed", status=status, pause_s=pause_s)

    async def _serve(self) -> int:
        """One process of the API, from its start to its end; gives back its exit status."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with ours:
            with theirs:
                arguments = (f"--listener={self._listener.fileno()}", f"--verbs={theirs.fileno()}")
                try:
                    process = subprocess.Popen(
                        (*self._command, *arguments, f"--access={self._access.dumped()}", f"--idle={self._idle_s}"),
                        stdin=subprocess.DEVNULL,
                        pass_fds=(self._listener.fileno(), theirs.fileno()),
                    )
                except OSError as error:
                    self._say("control_failed", status=error.errno, pause_s=1)
                    return error.errno or 1
            self.tally.started += 1
            self.pid = process.pid
            self._say("control_started", pid=process.pid)
            accepts = asyncio.Event()
            watching = asyncio.get_running_loop().create_task(self._kill_if_stuck(process, accepts))
            try:
                await serve_verbs(self._controlled, ours, tally=self.tally, say=self._say, ready=accepts.set)
            except Broken as broken:
                self._say("control_broken", pid=process.pid, why=str(broken))
                process.kill()
            except BaseException:
                process.terminate()
                raise
            finally:
                watching.cancel()
                self.pid = None
                # It ends when its end of the pair is closed; ours is.
                ours.close()
                status = await asyncio.shield(_ended(process))
                self._say("control_ended", pid=process.pid, status=status)
        return status

    async def _kill_if_stuck(self, process: subprocess.Popen[bytes], accepts: asyncio.Event) -> None:
        """One that lives takes whoever comes; one that leaves somebody waiting for so long does not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STARTS_WITHIN_S):
                await accepts.wait()
        looks = 0
        while looks < _STUCK_LOOKS:
            await asyncio.sleep(self._stuck_s / _STUCK_LOOKS)
            waiting, _, _ = select.select((self._listener,), (), (), 0)
            looks = looks + 1 if waiting else 0
        self._say("control_broken", pid=process.pid, why=f"accepts nobody for {self._stuck_s:g} s")
        process.kill()

    async def _readable(self) -> None:
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._listener, came.set)
        try:
            await came.wait()
        finally:
            loop.remove_reader(self._listener)

    async def _turn_away(self, seconds: float) -> None:
        """Tell clients for so long that there is no API, so that none waits for what does not come."""
        why = "the process of the API ended with an error"
        problem = {"type": "about:blank", "title": "Service Unavailable", "status": 503, "detail": why}
        body = json.dumps(problem | {"remedy": "see the broker's log; is fourtuple[control] installed?"}).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\n"
            f"Retry-After: {seconds:.0f}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    await self._readable()
                    for _ in range(_TURNED_AWAY_AT_ONCE):
                        try:
                            client, _ = self._listener.accept()
                        except OSError:
                            break
                        with client:
                            client.setblocking(False)
                            # What it has asked is read: closing a unix socket with unread bytes is an error over there.
                            with contextlib.suppress(OSError):
                                client.recv(65_536)
                            with contextlib.suppress(OSError):
                                client.sendall(head.encode() + body)
                    await asyncio.sleep(0.05)


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process, also one that somebody else may reap; what does not end is killed."""
    if process.poll() is None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return process.wait()
        loop.add_reader(descriptor, over.set)
        try:
            async with asyncio.timeout(10):
                await over.wait()
        except TimeoutError:
            process.kill()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
    return process.wait()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except BlockingIOError:
            # Its backlog is full, so there is one.
            return True
        except OSError:
            return False
        return True
