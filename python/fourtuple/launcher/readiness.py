"""When a service is there: what it says itself (sd_notify(3)), and news of the folder that its socket appears in.

Decides whose word counts, and how little is watched: one inotify descriptor for all starts, a socket per start that
waits for word. Whether somebody listens is asked in `sockets`.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from msgspec import Struct, field

from fourtuple.launcher.processes import mark_of

_CREDENTIALS = struct.Struct("=iII")
_MOST_BYTES = 4_096
_READ_BYTES = 65_536
_CREATE, _MOVED_TO, _ONLYDIR, _IGNORED, _OVERFLOW = 0x100, 0x80, 0x0100_0000, 0x8000, 0x4000
_EVENT = struct.Struct("=iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class Word:
    """Where one start's processes say READY=1: a socket in the abstract space, so that there is no file to leave."""

    def __init__(self, descriptor: int | None = None) -> None:
        """A new one, or one that an earlier image of this process has made."""
        if descriptor is not None:
            self.socket = socket.socket(fileno=descriptor)
        else:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            # Unbound and empty: the kernel chooses a free name (unix_autobind).
            self.socket.bind("")
        self.socket.setblocking(False)

    @property
    def name(self) -> str:
        """As NOTIFY_SOCKET has it."""
        return "@" + bytes(self.socket.getsockname()).removeprefix(b"\0").decode()

    def is_ready(self, mark: int, user: int) -> bool:
        """Whether a process of the start has said so since this was asked last."""
        ready = False
        with suppress(BlockingIOError):
            while True:
                data, control, _, _ = self.socket.recvmsg(_MOST_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size) * 2)
                ready = ready or (b"READY=1" in data.split(b"\n") and _is_theirs(control, mark, user))
        return ready

    def close(self) -> None:
        """Nothing more is listened to."""
        self.socket.close()


def _is_theirs(control: list[tuple[int, int, bytes]], mark: int, user: int) -> bool:
    theirs = False
    for level, kind, body in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(body) == _CREDENTIALS.size:
            pid, uid, _ = _CREDENTIALS.unpack(body)
            found = mark_of(pid)
            # systemd-notify(1) may have ended before this is read; then its user has to do.
            theirs = found == mark or (found is None and not Path(f"/proc/{pid}").exists() and uid in (0, user))
        elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            for at in range(0, len(body) - 3, 4):
                os.close(int.from_bytes(body[at : at + 4], sys.byteorder))
    return theirs


class _Folder(Struct):
    number: int
    waiting: dict[str, list[Callable[[], object]]] = field(default_factory=dict)


class Folders:
    """News of files that appear, by path; for one event loop. A folder is watched as long as somebody waits there."""

    def __init__(self) -> None:
        """Nothing is open before the first `watch`."""
        self._descriptor: int | None = None
        self._folders: dict[str, _Folder] = {}
        self._by_number: dict[int, _Folder] = {}

    def watch(self, path: str, told: Callable[[], object]) -> Callable[[], None]:
        """Call `told` whenever a file comes to be at `path`; gives what ends that. Without a word if it cannot be."""
        folder, _, name = path.rpartition("/")
        folder = folder or "/"
        watched = self._folders.get(folder)
        if watched is None:
            number = self._add(folder)
            if number is None:
                return lambda: None
            watched = self._folders[folder] = self._by_number[number] = _Folder(number)
        watched.waiting.setdefault(name, []).append(told)

        def end() -> None:
            told_of = watched.waiting.get(name, [])
            if told in told_of:
                told_of.remove(told)
            if not told_of:
                watched.waiting.pop(name, None)
            if not watched.waiting and self._folders.get(folder) is watched:
                del self._folders[folder], self._by_number[watched.number]
                if self._descriptor is not None:
                    _libc.inotify_rm_watch(self._descriptor, watched.number)

        return end

    def close(self) -> None:
        """Watch nothing more."""
        if self._descriptor is not None:
            with suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None
        self._folders.clear()
        self._by_number.clear()

    def _add(self, folder: str) -> int | None:
        if self._descriptor is None:
            descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if descriptor < 0:
                return None
            self._descriptor = descriptor
            asyncio.get_running_loop().add_reader(descriptor, self._read)
        number: int = _libc.inotify_add_watch(
            self._descriptor, os.fsencode(folder), ctypes.c_uint32(_CREATE | _MOVED_TO | _ONLYDIR)
        )
        # Two names of one folder share a number, and only the first has news; the other is looked at in turns.
        return None if number < 0 or number in self._by_number else number

    def _read(self) -> None:
        assert self._descriptor is not None
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        at = 0
        while at + _EVENT.size <= len(data):
            number, mask, _, length = _EVENT.unpack_from(data, at)
            name = os.fsdecode(data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0"))
            at += _EVENT.size + length
            if mask & _OVERFLOW:
                for folder in list(self._by_number.values()):
                    for told_of in list(folder.waiting.values()):
                        for told in list(told_of):
                            told()
            elif mask & _IGNORED:
                folder_gone = self._by_number.pop(number, None)
                self._folders = {path: one for path, one in self._folders.items() if one is not folder_gone}
            elif number in self._by_number:
                for told in list(self._by_number[number].waiting.get(name, ())):
                    told()
