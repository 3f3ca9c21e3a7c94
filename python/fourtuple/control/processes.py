"""A process in a few numbers, out of /proc. Decides what of them is told; knows nobody's role."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from fourtuple.control.verbs import ProcessView

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def view(role: str, pid: int) -> ProcessView | None:
    """The process; None if there is none (any more)."""
    folder = Path(f"/proc/{pid}")
    try:
        # proc(5): the command, in parentheses, may have any character.
        fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        status = (folder / "status").read_text(errors="replace")
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    kilobytes = {
        name: int(value) for name, value in re.findall(r"^(VmRSS|RssAnon|RssShmem):\s+(\d+) kB$", status, re.M)
    }
    try:
        descriptors = sum(1 for _ in (folder / "fd").iterdir())
    except OSError:
        descriptors = None
    return ProcessView(
        role=role,
        pid=pid,
        started=round(time.time() - uptime_s + int(fields[19]) / _TICKS_PER_S, 2),
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
        resident_bytes=kilobytes.get("VmRSS", 0) << 10,
        private_bytes=(kilobytes.get("RssAnon", 0) + kilobytes.get("RssShmem", 0)) << 10,
        descriptors=descriptors,
        threads=int(fields[17]),
    )
