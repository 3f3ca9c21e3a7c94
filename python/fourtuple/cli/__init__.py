"""The command line. This file holds what all commands share: exit statuses, and counts as people write them.

Knows no command and no terminal; importing it costs nothing, so that `fourtuple --help` is quick.
"""

from __future__ import annotations

import re
from enum import IntEnum


class Exit(IntEnum):
    """What the exit status of a command means. Usage errors are not 2, which would read as a critical finding."""

    HEALTHY = 0
    """Done; for doctor: nothing is wrong."""
    WARNING = 1
    """For doctor: a limit is near, or a goal is out of reach."""
    CRITICAL = 2
    """For doctor: a limit is being hit, or is about to be."""
    USAGE = 64
    """An option, argument or file cannot be used (EX_USAGE)."""
    UNABLE = 69
    """A privilege, a kernel feature or a resource is missing (EX_UNAVAILABLE)."""
    OUTPUT = 74
    """The output could not be written (EX_IOERR)."""
    INTERRUPTED = 130
    """Ctrl-C."""


_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def count(text: str) -> int:
    """A count such as 65535, 65,535, 65_535, 100k or 2M. ValueError says what is allowed."""
    matched = re.fullmatch(r"([0-9][0-9_,]{0,29})([kKmMgG]?)", text.strip())
    number = int(re.sub("[_,]", "", matched[1])) * _SUFFIXES[matched[2].lower()] if matched else 0
    if not 1 <= number < 2**64:
        allowed = "a whole number from 1 to 2^64 - 1, such as 65535, 100k or 2M"
        raise ValueError(f"{text[:40]!r} is not a count; allowed is {allowed}")
    return number
