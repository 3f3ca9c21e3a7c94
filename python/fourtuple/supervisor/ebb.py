"""Memory that many had needed goes back to the kernel when they are gone.

Decides when a flood is over, and what is too much then: the allocators keep what is freed for the next flood, and most
of its pages hold nothing but that, yet few hold nothing at all. Knows only how many there are now, and what the kernel
says of a process.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from pathlib import Path

_LEAST = 256
"""Fewer are not worth a look through the heap, which takes milliseconds."""
_FALLEN_TO = 1 / 8
_SETTLES_S = 5.0
"""From the end of a flood until what is left of it is looked at."""
_MUCH_BYTES = 8 << 20
_ANONYMOUS = ("Pss_Anon:", "Pss_Shmem:", "RssAnon:", "RssShmem:")
"""The former in smaps_rollup, the latter in status (proc(5))."""
_libc = ctypes.CDLL(None)


class Ebb:
    """Watches one number rise and fall."""

    def __init__(self) -> None:
        """Nobody has been there yet."""
        self._most = 0
        self._is_flood = False

    def seen(self, count: int) -> bool:
        """There are so many now; says whether so many are gone that memory is to be given back."""
        self._most = max(self._most, count)
        self._is_flood = self._is_flood or count >= _LEAST
        if not self._is_flood or count > self._most * _FALLEN_TO:
            return False
        self._most, self._is_flood = count, count > 0
        return True


class Surplus:
    """Watches what processes hold at rest, before a flood and some time after it."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._at_rest: int | None = None
        self._was_flood = False
        self._rests_since_s: float | None = None

    def begins(self, pids: Iterable[int]) -> None:
        """Nobody can have been there yet, if this is said for the first time."""
        if self._at_rest is None:
            self._at_rest = anonymous_bytes(pids)

    def seen(self, count: int, now_s: float, pids: Iterable[int]) -> tuple[int, int] | None:
        """There are so many now. Memory before and after a flood, in bytes: once, if a flood has left much behind."""
        if count >= _LEAST:
            self._was_flood, self._rests_since_s = True, None
            return None
        if self._rests_since_s is None:
            self._rests_since_s = now_s
        if self._at_rest is None:
            self.begins(pids)
        elif self._was_flood and now_s - self._rests_since_s >= _SETTLES_S:
            self._was_flood = False
            now = anonymous_bytes(pids)
            if now is not None and now - self._at_rest > _MUCH_BYTES:
                return self._at_rest, now
        return None


def give_back() -> None:
    """What the allocators of this process have free, as far as it is whole pages. Takes milliseconds."""
    gc.collect()
    if hasattr(_libc, "malloc_trim"):
        # glibc's: whole pages in the middle of every arena, too, since 2.8.
        _libc.malloc_trim(0)


def anonymous_bytes(pids: Iterable[int]) -> int | None:
    """Memory of processes that is no file's, what two share counting one half for each; None if one is gone.

    Where a process may not be looked into (another user's, without CAP_SYS_PTRACE), what it shares counts in full.
    """
    total = 0
    for pid in pids:
        try:
            text = _about(pid)
        except OSError:
            return None
        total += sum(int(row.split()[1]) << 10 for row in text.splitlines() if row.startswith(_ANONYMOUS))
    return total


def _about(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/smaps_rollup").read_text()
    except PermissionError:
        return Path(f"/proc/{pid}/status").read_text()
