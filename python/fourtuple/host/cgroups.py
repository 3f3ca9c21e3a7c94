"""The tightest memory and process limits between a process's cgroup and the root, in cgroup v1, v2 or both mixed.

Decides where the files are (from mountinfo, so that a container's view works) and which of several limits on the way up
is the tight one. Knows nothing of what a connection costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from fourtuple.facts import Cgroup
from fourtuple.host.tree import Tree, whole

_UNLIMITED_V1 = 1 << 62
"""Version 1 writes "no limit" as the largest multiple of a page below 2^63 (PAGE_COUNTER_MAX)."""
_DEEPEST = 64


def read_cgroup(tree: Tree, home: str) -> tuple[Cgroup | None, dict[str, int]]:
    """The limits, and the counters of how often they were hit; None where the process has no cgroup that can be
    read."""
    membership = _membership(tree, home)
    if membership is None:
        return None, {}
    mounts = _mounts(tree)
    memory, version = _controller(tree, membership, mounts, "memory", "memory.current", "memory.usage_in_bytes")
    pids, pids_version = _controller(tree, membership, mounts, "pids", "pids.current", "pids.current")
    version = version or pids_version
    if not version:
        tree.miss("cgroup", "no cgroup file system with the memory or pids controller is mounted here")
        return None, {}
    if not memory:
        tree.miss("cgroup.memory", "the memory controller is not on in this cgroup, or its files cannot be read")
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    memory_max, tight = _tightest(tree, memory, names[0])
    pids_max, pids_tight = _tightest(tree, pids, "pids.max")
    tcp_max, tcp_tight = _tightest(tree, memory if version == 1 else (), "memory.kmem.tcp.limit_in_bytes")
    counters = {
        "cgroup.memory_max": _line(tree, f"{tight}/memory.events", "max") if tight else None,
        "cgroup.memory_oom_kill": _line(tree, f"{tight}/memory.events", "oom_kill") if tight else None,
        "cgroup.memory_failcnt": tree.number(f"{tight}/memory.failcnt") if tight and version == 1 else None,
        "cgroup.pids_max": _line(tree, f"{pids_tight}/pids.events", "max") if pids_tight else None,
    }
    facts = Cgroup(
        version=version,
        path=membership.get("memory" if version == 1 else "", membership.get("", "")),
        memory_max_bytes=memory_max,
        memory_current_bytes=tree.number(f"{tight}/{names[1]}") if tight else None,
        memory_reclaimable_bytes=_reclaimable(tree, tight, version) if tight else None,
        memory_socket_bytes=_line(tree, f"{tight}/memory.stat", "sock") if tight else None,
        pids_max=pids_max,
        pids_current=tree.number(f"{pids_tight}/pids.current") if pids_tight else None,
        kmem_tcp_limit_bytes=tcp_max,
        kmem_tcp_usage_bytes=tree.number(f"{tcp_tight}/memory.kmem.tcp.usage_in_bytes") if tcp_tight else None,
        kmem_tcp_failures=tree.number(f"{tcp_tight}/memory.kmem.tcp.failcnt") if tcp_tight else None,
    )
    return facts, {name: count for name, count in counters.items() if count is not None}


def _membership(tree: Tree, home: str) -> dict[str, str] | None:
    """Controller -> path in its hierarchy; "" is version 2 (cgroups(7), /proc/PID/cgroup)."""
    text = tree.text(f"{home}/cgroup", "cgroup", absent="this kernel has no cgroups")
    if text is None:
        return None
    found = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and number.isdigit():
            found.update(dict.fromkeys(controllers.split(","), path))
    if not found:
        tree.miss("cgroup", f"/{home}/cgroup has no line that can be understood")
        return None
    return found


def _mounts(tree: Tree) -> list[tuple[str, str, str, frozenset[str]]]:
    """Type, root inside the hierarchy, mount point and options of each cgroup mount (proc_pid_mountinfo(5))."""
    found = []
    for line in (tree.text("proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) >= 5 and len(right) >= 3 and right[0] in ("cgroup", "cgroup2"):
            found.append((right[0], left[3], left[4], frozenset(right[2].split(","))))
    return found


def _controller(
    tree: Tree,
    membership: dict[str, str],
    mounts: list[tuple[str, str, str, frozenset[str]]],
    controller: str,
    sign_v2: str,
    sign_v1: str,
) -> tuple[tuple[str, ...], int]:
    """Directories from the process's cgroup up to the root of what is mounted here, and the version that they are of.

    The root cgroup of a machine has no `sign` file, so that any directory on the way may show which version holds it.
    """
    for kind, root, point, options in mounts:
        version = 2 if kind == "cgroup2" else 1
        path = membership.get("" if version == 2 else controller)
        if path is None or (version == 1 and controller not in options):
            continue
        directories = tuple(_upwards(point, root, path))
        if any(tree.exists(f"{directory}/{sign_v2 if version == 2 else sign_v1}") for directory in directories):
            return directories, version
    return (), 0


def _upwards(point: str, root: str, path: str) -> Iterator[str]:
    # Inside a container without a cgroup namespace the path is the host's, and the mount shows its subtree `root` only.
    # A path with ".." lies outside this cgroup namespace: then only what is mounted can be seen.
    here, top = PurePosixPath(path), PurePosixPath(root)
    inside = here.relative_to(top) if here.is_relative_to(top) and ".." not in here.parts else PurePosixPath()
    if here == top or len(inside.parts) > _DEEPEST:
        inside = PurePosixPath()
    directory = PurePosixPath(point.lstrip("/"))
    yield str(directory / inside)
    for parent in inside.parents if inside.parts else ():
        yield str(directory / parent)


def _tightest(tree: Tree, directories: tuple[str, ...], name: str) -> tuple[int | None, str]:
    """The smallest limit on the way up, and the directory that has it; with no limit, the process's own directory."""
    limits = []
    for directory in directories:
        text = (tree.text(f"{directory}/{name}") or "").strip()
        number = whole(text)
        if number is not None and 0 <= number < _UNLIMITED_V1:
            limits.append((number, directory))
        elif text and text != "max" and (number is None or number < 0):
            tree.miss(f"cgroup.{name}", f"neither a number nor max, in /{directory}")
    if limits:
        return min(limits)
    return None, next((directory for directory in directories if tree.exists(f"{directory}/{name}")), "")


def _reclaimable(tree: Tree, directory: str, version: int) -> int | None:
    """What the kernel would give up before it kills: page cache, and slab that can be freed."""
    total = "total_" if version == 1 else ""
    names = (f"{total}inactive_file", f"{total}active_file", *(("slab_reclaimable",) if version == 2 else ()))
    known = [part for name in names if (part := _line(tree, f"{directory}/memory.stat", name)) is not None]
    return sum(known) if known else None


def _line(tree: Tree, path: str, name: str) -> int | None:
    for line in (tree.text(path) or "").splitlines():
        word, _, value = line.partition(" ")
        if word == name:
            number = whole(value.strip())
            return number if number is not None and number >= 0 else None
    return None
