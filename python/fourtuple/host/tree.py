"""Text and numbers from files below a root, and the reason for each one that could not be had.

Decides how hostile a file may be: absent, forbidden, binary, endless, negative. Knows no file by name. The root is "/"
on a live machine and any directory that holds a copied /proc in a test.
"""

from __future__ import annotations

import os
import stat
from errno import EACCES, ENOENT, ENOTDIR, EPERM, ESRCH
from pathlib import Path

from fourtuple.facts import LARGEST

LARGEST_FILE_BYTES = 1 << 20
"""No file that is read here is near it; a larger one is not what it claims to be."""

_REASONS = {
    ENOENT: "absent",
    ENOTDIR: "absent",
    ESRCH: "the process has ended",
    EACCES: "permission denied: needs root, or the user that owns it",
    EPERM: "not permitted: needs root, or a capability that this process lacks",
}


def reason(error: OSError) -> str:
    """Why a read or a call failed, in words."""
    return _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__


def whole(text: str) -> int | None:
    """A whole number that a kernel can have meant, or None. Python alone would also take "1_000" and other scripts'
    digits."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 20:
        return None
    number = int(text)
    return number if abs(number) <= LARGEST else None


class Tree:
    """Files below `root`. What cannot be read is None here and a line in `unread`, under the name that the caller
    gives."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.unread: dict[str, str] = {}

    @property
    def live(self) -> bool:
        """Whether this is the running machine, so that system calls speak of the same thing as the files."""
        return self.root == Path("/")

    def text(self, path: str, fact: str = "", *, absent: str = "absent") -> str | None:
        """The text of a file. With a `fact`, a failure is recorded under that name; `absent` says what its absence
        means."""
        try:
            return self._read(path)
        except OSError as error:
            missing = error.errno in (ENOENT, ENOTDIR)
            self.miss(fact, absent if missing else reason(error))
        except ValueError as error:
            self.miss(fact, str(error))
        return None

    def number(self, path: str, fact: str = "", *, absent: str = "absent") -> int | None:
        """The number, zero or more, that a file holds alone."""
        text = self.text(path, fact, absent=absent)
        if text is None:
            return None
        number = whole(text.strip())
        if number is None or number < 0:
            self.miss(fact, f"not a whole number: {excerpt(text)}")
            return None
        return number

    def names(self, path: str) -> tuple[str, ...]:
        """The names in a directory, sorted; none if it cannot be listed."""
        try:
            return tuple(sorted(entry.name for entry in (self.root / path).iterdir()))
        except (OSError, ValueError):
            return ()

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        try:
            return (self.root / path).exists()
        except (OSError, ValueError):
            return False

    def link(self, path: str) -> str | None:
        """What a symbolic link points at, such as "net:[4026531833]"."""
        try:
            return str((self.root / path).readlink())
        except (OSError, ValueError):
            return None

    def miss(self, fact: str, why: str) -> None:
        """Record that a fact could not be read; nothing where it has no name, or its absence needs no reason."""
        if fact and why:
            self.unread[fact] = why

    def _read(self, path: str) -> str:
        # O_NONBLOCK: a FIFO in a copied tree must not hold the doctor up.
        descriptor = os.open(self.root / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("not a regular file")
            pieces, size = [], 0
            while piece := os.read(descriptor, 1 << 16):
                pieces.append(piece)
                size += len(piece)
                if size > LARGEST_FILE_BYTES:
                    raise ValueError(f"longer than {LARGEST_FILE_BYTES:,} bytes")
        finally:
            os.close(descriptor)
        text = b"".join(pieces).decode("utf-8", "replace")
        if "\0" in text:
            raise ValueError("binary, where text is expected")
        return text


def excerpt(text: str) -> str:
    """A little of some text, printable, for a message."""
    shown = repr(text.strip())
    return shown if len(shown) <= 40 else shown[:37] + "..."


def folded(text: str) -> str:
    """Text with every run of blanks, tabs and line ends folded to one blank, and nothing unprintable in it."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
