"""Whether an earlier run left an agent behind: by design it cannot, and this is how one would be seen.

Decides what counts as left behind. Knows /proc and nothing else; ends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fourtuple.lab.process import AGENT_MODULE


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """An agent whose lab is gone."""

    pid: int
    host: str
    parent_pid: int
    """The process that made the lab, which is not its parent any more."""


def leftovers(proc: Path = Path("/proc")) -> tuple[Leftover, ...]:
    """Agents on this machine whose parent has died."""
    found = []
    for directory in proc.iterdir():
        if not directory.name.isdecimal():
            continue
        try:
            words = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
            stat = (directory / "stat").read_text(errors="replace")
        except OSError:
            continue  # it ended while we looked
        if AGENT_MODULE not in words:
            continue
        host, parent, *_ = [*words[words.index(AGENT_MODULE) + 1 :], "", ""]
        state, parent_now = stat.rpartition(")")[2].split()[:2]  # proc(5): the name in parentheses may hold anything
        if parent.isdecimal() and parent != parent_now and state not in "ZX":
            found.append(Leftover(pid=int(directory.name), host=host, parent_pid=int(parent)))
    return tuple(found)
