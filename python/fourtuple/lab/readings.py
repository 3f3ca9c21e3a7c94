"""What is read of a process and of the kernel's memory while a lab runs.

Decides which numbers count as user memory and as kernel memory. Knows nothing of labs or agents: each function reads
/proc as the calling process sees it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fourtuple.errors import MissingPrivilege


@dataclass(frozen=True, slots=True, kw_only=True)
class UserMemory:
    """Memory of one process, in bytes, none of it the kernel's own.

    `rss_bytes` is all that is resident. `private_bytes` leaves out pages that other processes map too (the interpreter
    and its libraries), and counts what was swapped out: the number to add up over several processes.
    """

    rss_bytes: int
    private_bytes: int
    page_table_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """One of the kernel's object caches."""

    objects: int
    object_bytes: int
    cache_bytes: int
    """Pages held, in bytes, free objects included."""


def user_memory() -> UserMemory:
    """Memory of this process."""
    status = _kilobyte_fields(Path("/proc/self/status"))
    rollup = _kilobyte_fields(Path("/proc/self/smaps_rollup"))
    private = sum(rollup.get(name, 0) for name in ("Private_Clean", "Private_Dirty", "Private_Hugetlb", "Swap"))
    return UserMemory(
        rss_bytes=status.get("VmRSS", 0) + status.get("HugetlbPages", 0),
        private_bytes=private,
        page_table_bytes=status.get("VmPTE", 0),
    )


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return _kilobyte_fields(Path(f"/proc/{pid}/status")).get("VmRSS", 0)


def descriptors_open(pid: int) -> int:
    """Descriptors of another process. A process at its limit could not even open the directory that lists its own."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def kernel_memory_bytes() -> int:
    """Memory that the kernel of this host has taken for itself: objects, page tables, stacks, per-CPU data.

    Host-wide: the difference over a run is the run's only on a host that does nothing else.
    """
    fields = _kilobyte_fields(Path("/proc/meminfo"))
    return sum(fields.get(name, 0) for name in ("Slab", "PageTables", "KernelStack", "Percpu", "VmallocUsed"))


def memory_room() -> tuple[int, str]:
    """Memory that this process could still take, in bytes, and the limit that says so: the host's or a cgroup's.

    Both ends of a lab live in the cgroup of the process that made it, and sockets are charged there (catalogue C6).
    """
    from fourtuple.host import read_host

    free_bytes = _kilobyte_fields(Path("/proc/meminfo")).get("MemAvailable", 0)
    cgroup = read_host().cgroup
    if cgroup is None or cgroup.memory_max_bytes is None:
        return free_bytes, "kernel-memory"
    used_bytes = (cgroup.memory_current_bytes or 0) - (cgroup.memory_reclaimable_bytes or 0)
    allowed_bytes = max(0, cgroup.memory_max_bytes - used_bytes)
    return (allowed_bytes, "memory-cgroup") if allowed_bytes < free_bytes else (free_bytes, "kernel-memory")


def slabs(root: Path = Path("/")) -> dict[str, Slab]:
    """The kernel's object caches by name, host-wide; MissingPrivilege for anybody but root."""
    path = root / "proc/slabinfo"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise MissingPrivilege(f"{path} can be read by root alone ({error.strerror})") from None
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    found = {}
    for line in lines:
        # name active objects object-size per-slab pages-per-slab : tunables ... : slabdata active slabs shared
        match = re.match(r"(\S+)\s+(\d+)\s+\d+\s+(\d+)\s+\d+\s+(\d+)\s.*slabdata\s+\d+\s+(\d+)", line)
        if match:
            objects, object_bytes, pages_per_slab, slab_count = (int(number) for number in match.groups()[1:])
            cache_bytes = slab_count * pages_per_slab * page_bytes
            found[match[1]] = Slab(objects=objects, object_bytes=object_bytes, cache_bytes=cache_bytes)
    return found


def _kilobyte_fields(path: Path) -> dict[str, int]:
    """The "Name:  123 kB" lines of a file, in bytes; empty if the kernel has no such file."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    return {name: int(number) * 1024 for name, number in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
