"""One process: its resource limits, descriptors, capabilities, and the namespaces and container that it lives in.

Decides how /proc/PID is understood. Knows no limit of the catalogue. Another user's process shows less: what is hidden
is said, and never taken from this process instead.
"""

from __future__ import annotations

import os
import re
from itertools import islice

from fourtuple.facts import Isolation, Process, RLimit
from fourtuple.host.tree import Tree, folded, reason, whole

_LIMIT_NAMES = {
    "Max address space": "AS",
    "Max core file size": "CORE",
    "Max cpu time": "CPU",
    "Max data size": "DATA",
    "Max file size": "FSIZE",
    "Max locked memory": "MEMLOCK",
    "Max msgqueue size": "MSGQUEUE",
    "Max open files": "NOFILE",
    "Max pending signals": "SIGPENDING",
    "Max processes": "NPROC",
    "Max stack size": "STACK",
}
"""As /proc/PID/limits calls them (fs/proc/base.c, lnames) -> as getrlimit(2) does."""

_CAPABILITIES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
""".split()  # noqa: SIM905 - a list of 41 lines would hide the file
"""By bit (include/uapi/linux/capability.h)."""

_MOST_DESCRIPTORS_LISTED = 65_536
"""Listing /proc/PID/fd makes the kernel keep 0.9 KB for each descriptor (catalogue L3), so it is not done without
bound."""


def read_process(tree: Tree, home: str) -> Process:
    """The process whose directory is `home`, such as "proc/self"."""
    status = _fields(tree.text(f"{home}/status", "process.status") or "")
    uid = whole(status.get("Uid", "").split()[1]) if len(status.get("Uid", "").split()) > 1 else None
    pid = whole(status.get("Pid", ""))
    return Process(
        pid=pid if pid is not None and pid >= 0 else 0,
        name=folded(status.get("Name", "")),
        rlimits=_rlimits(tree, home),
        open_descriptors=_open_descriptors(tree, home),
        threads=_natural(status.get("Threads")),
        effective_uid=uid if uid is not None and uid >= 0 else 0,
        capabilities=_capabilities(status.get("CapEff", "")),
    )


def read_isolation(tree: Tree, home: str, *, initial_network: bool | None) -> Isolation:
    """Where the process stands; its network namespace is judged by whoever reads inside it."""
    status = _fields(tree.text(f"{home}/status") or "")
    user_map = (tree.text(f"{home}/uid_map") or "").split()
    seccomp = status.get("Seccomp")
    return Isolation(
        container=_container(tree, home),
        initial_network_namespace=initial_network,
        initial_user_namespace=user_map == ["0", "0", "4294967295"] if user_map else None,
        seccomp=seccomp != "0" if seccomp else None,
    )


def usable_processors(tree: Tree, home: str) -> int:
    """Processors that the process may run on; those of the machine if that is not said; 0 if nothing is."""
    status = _fields(tree.text(f"{home}/status") or "")
    text = status.get("Cpus_allowed_list") or tree.text("sys/devices/system/cpu/online") or ""
    count = _count_list(text.strip())
    if not count:
        tree.miss("machine.cpus", "neither /proc/self/status nor /sys/devices/system/cpu/online says")
    return count


def _fields(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, colon, value in pairs if colon}


def _natural(text: str | None) -> int | None:
    number = whole(text) if text else None
    return number if number is not None and number >= 0 else None


def _rlimits(tree: Tree, home: str) -> dict[str, RLimit]:
    found = {}
    for line in (tree.text(f"{home}/limits", "rlimits") or "").splitlines():
        # Columns of fixed width in the kernel, but names grow: two or more blanks part them.
        columns = re.split(r"\s{2,}", line.strip())
        name = _LIMIT_NAMES.get(columns[0])
        if name is None or len(columns) < 3:
            continue
        soft, hard = (_natural(column) for column in columns[1:3])
        bad = [
            text
            for text, value in zip(columns[1:3], (soft, hard), strict=True)
            if value is None and text != "unlimited"
        ]
        if bad:
            tree.miss(f"rlimits.{name}", f"neither a number nor unlimited: {bad[0]!r}")
        else:
            found[name] = RLimit(soft=soft, hard=hard)
    if not found and "rlimits" not in tree.unread:
        tree.miss("rlimits", f"no limit found in /{home}/limits")
    return found


def _open_descriptors(tree: Tree, home: str) -> int | None:
    folder = tree.root / home / "fd"
    try:
        # From 6.2 the size of the directory is the number of descriptors (proc_fd_getattr): one call, no memory.
        if size := folder.stat().st_size if tree.live else 0:
            return size
        with os.scandir(folder) as entries:
            count = sum(1 for _ in islice(entries, _MOST_DESCRIPTORS_LISTED))
    except (OSError, ValueError) as error:
        tree.miss("process.open_descriptors", reason(error) if isinstance(error, OSError) else str(error))
        return None
    if count == _MOST_DESCRIPTORS_LISTED:
        tree.miss("process.open_descriptors", f"more than {count:,}: counting them all would cost kernel memory (L3)")
    return count


def _capabilities(text: str) -> tuple[str, ...]:
    if not re.fullmatch(r"[0-9a-fA-F]{1,16}", text):
        return ()
    bits = int(text, 16)
    return tuple(f"CAP_{name}" for bit, name in enumerate(_CAPABILITIES) if bits >> bit & 1)


def _container(tree: Tree, home: str) -> str | None:
    if named := (tree.text("run/systemd/container") or "").strip():
        return folded(named)[:64]
    if tree.exists("run/.containerenv"):
        return "podman"
    cgroup = tree.text(f"{home}/cgroup") or ""
    for sign, name in (("kubepods", "kubernetes"), ("docker", "docker"), ("lxc", "lxc"), ("libpod", "podman")):
        if sign in cgroup:
            return name
    return "docker" if tree.exists(".dockerenv") else None


def _count_list(text: str) -> int:
    """Processors in a list such as "0-3,8"; 0 if it is not one."""
    if not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", text):
        return 0
    runs = [part.partition("-") for part in text.split(",")]
    return sum(max(0, int(last or first) - int(first) + 1) for first, _, last in runs)
