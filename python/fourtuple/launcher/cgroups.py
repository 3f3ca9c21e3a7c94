"""A cgroup for each start: made before it, joined on the way to its program, killed and removed after it.

Decides where version 2 is mounted and what to do in it. Which limits a cgroup has is whoever prepares its parent's:
controllers are not switched on here.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fourtuple.errors import MissingFeature


class Cgroup:
    """One below the version 2 root; `procs` is open for the child to join by."""

    def __init__(self, path: str) -> None:
        """Make it, and what is above it. MissingFeature says why it cannot be made."""
        self.folder = root() / path.lstrip("/")
        self.procs: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.procs = os.open(self.folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            self.remove()
            raise MissingFeature(f"the cgroup {path} cannot be made: {error.strerror}") from None

    @classmethod
    def of(cls, folder: str) -> Cgroup:
        """One that an earlier image of this process has made."""
        found = cls.__new__(cls)
        found.folder, found.procs = Path(folder), None
        return found

    def joined(self) -> None:
        """The child is in it, or never will be."""
        if self.procs is not None:
            os.close(self.procs)
            self.procs = None

    def members(self) -> list[int]:
        """Processes in it and below it."""
        found: list[int] = []
        for folder in (self.folder, *self._below()):
            with suppress(OSError):
                found.extend(map(int, (folder / "cgroup.procs").read_text().split()))
        return found

    def kill(self) -> None:
        """All at once, if the kernel can (from 5.14); who calls kills the members as well."""
        with suppress(OSError):
            (self.folder / "cgroup.kill").write_text("1")

    def remove(self) -> bool:
        """Whether it is gone."""
        self.joined()
        for folder in (*self._below(), self.folder):
            with suppress(OSError):
                folder.rmdir()
        return not self.folder.exists()

    def _below(self) -> list[Path]:
        """Those that the service has made in its own, the deepest first."""
        return [Path(path) for path, _, _ in os.walk(self.folder, topdown=False) if Path(path) != self.folder]


def root() -> Path:
    """Where version 2 is mounted."""
    with Path("/proc/self/mounts").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            fields = line.split()
            if fields[2] == "cgroup2":
                return Path(fields[1].encode().decode("unicode_escape"))
    raise MissingFeature("no cgroup version 2 hierarchy is mounted here")
