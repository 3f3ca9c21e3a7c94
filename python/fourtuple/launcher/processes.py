"""Whose a process is, and how all processes of a start are ended, those included that have left its session.

Decides how descendants are found: by parentage, and by the mark that each start gives (`spawn.MARK`) once their parent
is gone, when they become ours (PR_SET_CHILD_SUBREAPER). Where a start has a cgroup, the kernel knows it all. Reaps only
what carries a mark of ours, so that other children of this process stay its other parts' own.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from errno import EPERM, ESRCH
from hashlib import blake2b
from pathlib import Path

from fourtuple.errors import MissingFeature
from fourtuple.launcher.spawn import MARK

_SET_CHILD_SUBREAPER = 36
_MAGIC = 0x14D7 << 48
_COUNTERS = 1 << 24
_PROC = Path("/proc")
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """From now on a descendant whose parent ends is a child of this process (prctl(2))."""
    if _libc.prctl(_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0):
        raise MissingFeature(f"PR_SET_CHILD_SUBREAPER: {os.strerror(ctypes.get_errno())}")


class Marks:
    """The marks of one launcher: each start has its own, and all tell whose they are."""

    def __init__(self, instance: str | None) -> None:
        """Of the launcher of that name: after a crash the next one of the name knows what the first has left."""
        seed = os.urandom(16) if instance is None else instance.encode()
        self._base = _MAGIC | int.from_bytes(blake2b(seed, digest_size=3).digest()) << 24
        self.next = int.from_bytes(os.urandom(3))

    def new(self) -> int:
        """For a start."""
        self.next = (self.next + 1) % _COUNTERS
        return self._base | self.next

    @property
    def saved(self) -> tuple[int, int]:
        """For `restore`."""
        return self._base, self.next

    def restore(self, saved: tuple[int, int]) -> None:
        """Go on as the launcher that was saved."""
        self._base, self.next = saved

    def ours(self, mark: int | None) -> bool:
        """Whether it is of this launcher, or of one of its name."""
        return mark is not None and mark & ~(_COUNTERS - 1) == self._base


def mark_of(pid: int) -> int | None:
    """None if it is gone, or has none."""
    try:
        soft, _ = resource.prlimit(pid, MARK)
    except ProcessLookupError:
        return None
    except PermissionError:
        # Another user's; the file can be read by everybody.
        try:
            for line in (_PROC / str(pid) / "limits").read_text().splitlines():
                if line.startswith("Max file locks"):
                    word = line.split()[3]
                    return int(word) if word.isdigit() else None
        except OSError:
            pass
        return None
    return soft if soft > 0 else None


def children(pid: int) -> Iterator[int]:
    """Of all its threads; zombies are among them."""
    with suppress(OSError):
        for task in (_PROC / str(pid) / "task").iterdir():
            with suppress(OSError):
                yield from map(int, (task / "children").read_text().split())


def descendants(roots: Iterable[int]) -> set[int]:
    """Those and all below them, as they are at this moment."""
    found: set[int] = set()
    left = list(roots)
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left.extend(children(pid))
    return found


def orphans(marks: Marks, known: Container[int]) -> dict[int, int]:
    """Children of this process that it has not started itself, with their marks."""
    found = {}
    for pid in children(os.getpid()):
        if pid not in known:
            mark = mark_of(pid)
            if mark is not None and marks.ours(mark):
                found[pid] = mark
    return found


def marked_anywhere(marks: Marks) -> list[int]:
    """Living processes of this pid namespace with a mark of ours, whoever their parent is."""
    ours = _pid_namespace("self")
    found = []
    for name in (entry.name for entry in _PROC.iterdir()):
        if name.isdigit() and marks.ours(mark_of(int(name))) and is_alive(int(name)) and _pid_namespace(name) == ours:
            found.append(int(name))
    return found


def is_alive(pid: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return False
    return stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3] not in (b"Z", b"X")


def reaped(pidfd: int) -> int | None:
    """Its status, negative for a signal, if our child has ended; it is then gone from the table."""
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def reap(pid: int) -> bool:
    """Whether our child `pid` had ended; it is gone from the table now."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False


def kill(pid: int, mark: int | None) -> None:
    """SIGKILL, if it still is the process with this mark; None is any."""
    with suppress(ProcessLookupError, PermissionError):
        pidfd = os.pidfd_open(pid)
        try:
            if mark is None or mark_of(pid) == mark:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def signal_to(pidfd: int, number: int) -> bool:
    """Whether it was there to be told."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except OSError as error:
        if error.errno not in (ESRCH, EPERM):
            raise
        return False
    return True


def _pid_namespace(pid: str) -> str | None:
    try:
        return str((_PROC / pid / "ns" / "pid").readlink())
    except OSError:
        return None
