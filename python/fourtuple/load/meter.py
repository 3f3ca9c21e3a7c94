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
            rss_bytes=_kilobyte_fields("/proc/self/status").get("VmRSS", 0),
            kernel_bytes=sum(meminfo.get(name, 0) for name in kernel),
        )

    def busy_since(self, earlier: Reading) -> float:
        """Share of the processors that this process may use which it did use."""
        passed_s = (self.at_s - earlier.at_s) * len(os.sched_getaffinity(0))
        return (self.processor_s - earlier.processor_s) / passed_s if passed_s > 0 else 0.0


def _kilobyte_fields(path: str) -> dict[str, int]:
    fields = {}
    for line in Path(path).read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * 1024
    return fields
