"""What this process and its workers cost while they make load: processor time and memory, between two moments.

Decides how cost is measured. Knows nothing of load.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One moment."""

    at_s: float
    processor_s: float
    """Of all threads of this process, and of its workers'."""
    waited_s: float
    """For a processor, by all threads that run now: what others had of it while this process wanted it."""
    rss_bytes: int
    kernel_bytes: int
    """Taken by the kernel of the whole host for itself (Slab, page tables, stacks, per-CPU data)."""

    @classmethod
    def now(cls, workers: Iterable[int] = ()) -> Self:
        """Read; `workers` are further processes that make load, and count as this one."""
        pids = ("self", *map(str, workers))
        meminfo = _kilobyte_fields("/proc/meminfo")
        kernel = ("Slab", "PageTables", "KernelStack", "Percpu", "VmallocUsed")
        return cls(
            at_s=time.monotonic(),
            processor_s=sum(map(_processor_s, pids)),
            waited_s=sum(map(_waited_s, pids)),
            rss_bytes=sum(_kilobyte_fields(f"/proc/{pid}/status").get("VmRSS", 0) for pid in pids),
            kernel_bytes=sum(meminfo.get(name, 0) for name in kernel),
        )

    def busy_since(self, earlier: Reading) -> float:
        """Share of the processors that this process may use which it did use."""
        return _share(self.processor_s - earlier.processor_s, self.at_s - earlier.at_s)

    def wanted_since(self, earlier: Reading) -> float:
        """Share of the processors that this process may use which it used, or would have used had they been free."""
        used_s = self.processor_s - earlier.processor_s
        # Several threads may wait for one processor: more than all of it nobody can want.
        return min(1.0, _share(used_s + max(0.0, self.waited_s - earlier.waited_s), self.at_s - earlier.at_s))


def _share(used_s: float, passed_s: float) -> float:
    there_s = passed_s * len(os.sched_getaffinity(0))
    return used_s / there_s if there_s > 0 else 0.0


def _processor_s(pid: str) -> float:
    """utime and stime, by their place after the name, which may have blanks and parentheses (proc_pid_stat(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # gone
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _waited_s(pid: str) -> float:
    """The second number of schedstat: nanoseconds on a run queue (sched_info_queued); 0 where it is not kept."""
    waited_ns = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            # A thread may be gone; a kernel may have no CONFIG_SCHED_INFO.
            with contextlib.suppress(OSError, IndexError):
                waited_ns += int((task / "schedstat").read_text().split()[1])
    return waited_ns / 1e9


def _kilobyte_fields(path: str) -> dict[str, int]:
    fields: dict[str, int] = {}
    try:
        text = Path(path).read_text()
    except OSError:  # a worker that is gone
        return fields
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * 1024
    return fields
