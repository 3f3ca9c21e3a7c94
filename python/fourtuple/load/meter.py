"""What this process costs while it makes load: processor time and memory, from one moment to the next.

Decides how cost is measured. Knows nothing of load.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One moment."""

    at_s: float
    processor_s: float
    """Of all threads of this process."""
    waited_s: float
    """For a processor, by all threads that run now: what others had of it while this process wanted it."""
    rss_bytes: int
    kernel_bytes: int
    """Taken by the kernel of the whole host for itself (Slab, page tables, stacks, per-CPU data)."""

    @classmethod
    def now(cls) -> Self:
        """Read."""
        meminfo = _kilobyte_fields("/proc/meminfo")
        kernel = ("Slab", "PageTables", "KernelStack", "Percpu", "VmallocUsed")
        return cls(
            at_s=time.monotonic(),
            processor_s=time.process_time(),
            waited_s=_waited_s(),
            rss_bytes=_kilobyte_fields("/proc/self/status").get("VmRSS", 0),
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


def _waited_s() -> float:
    """The second number of schedstat: nanoseconds on a run queue (sched_info_queued); 0 where it is not kept."""
    waited_ns = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            waited_ns += int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError):  # the thread is gone, or this kernel has no CONFIG_SCHED_INFO
            continue
    return waited_ns / 1e9


def _kilobyte_fields(path: str) -> dict[str, int]:
    fields = {}
    for line in Path(path).read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * 1024
    return fields
