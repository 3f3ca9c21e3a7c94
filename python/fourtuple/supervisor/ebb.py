"""Memory that many had needed goes back to the kernel when they are gone.

Decides when: the allocators keep what is freed for the next flood, and most of a flood's pages hold nothing but that.
Knows only how many there are now.
"""

from __future__ import annotations

import ctypes
import gc

_LEAST = 256
"""Fewer are not worth a look through the heap, which takes milliseconds."""
_FALLEN_TO = 1 / 8
_libc = ctypes.CDLL(None)


class Ebb:
    """Watches one number rise and fall."""

    def __init__(self) -> None:
        """Nobody has been there yet."""
        self._most = 0
        self._is_flood = False

    def seen(self, count: int) -> bool:
        """There are so many now; says whether memory was given back. Cheap enough to be told twice a second."""
        self._most = max(self._most, count)
        self._is_flood = self._is_flood or count >= _LEAST
        if not self._is_flood or count > self._most * _FALLEN_TO:
            return False
        self._most, self._is_flood = count, count > 0
        gc.collect()
        if hasattr(_libc, "malloc_trim"):
            # glibc's: whole pages in the middle of every arena, too, since 2.8.
            _libc.malloc_trim(0)
        return True
