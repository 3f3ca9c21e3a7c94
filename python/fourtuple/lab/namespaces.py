"""The kernel calls that make an agent: namespaces, death with the parent, io_uring refused. Each acts on this process.

Decides how a private network namespace is had with and without root, and what to say when it cannot be had. Knows
nothing of links, addresses or the conversation with the parent. ctypes, because Python has unshare and setns from 3.12.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fourtuple.errors import MissingFeature, MissingPrivilege

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000

IO_URING_SETUP = 425
"""The system call's number; the same on every architecture whose table was unified (x86-64 and arm64 among them)."""
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """The namespaces an agent is to live in: those of other processes, by pid, or new ones of its own."""

    user_of: int | None = None
    """Join the user namespace of this process."""
    network_of: int | None = None
    """Join the network namespace of this process; None makes a new one."""
    new_user: bool = False
    """Make a user namespace even where privileges would do without."""


def enter(membership: Membership) -> bool:
    """Move this process, while it has one thread, into its namespaces; True if one is a user namespace."""
    in_user_namespace = membership.new_user or membership.user_of is not None
    if membership.user_of is not None:
        _join(membership.user_of, "user", CLONE_NEWUSER)
    elif membership.new_user:
        _new_user_namespace()
    if membership.network_of is not None:
        _join(membership.network_of, "net", CLONE_NEWNET)
        return in_user_namespace
    try:
        _unshare(CLONE_NEWNET)
    except PermissionError:
        if in_user_namespace:
            raise _refused("a network namespace inside a user namespace", errno.EPERM) from None
        _new_user_namespace()
        in_user_namespace = True
        try:
            _unshare(CLONE_NEWNET)
        except OSError as error:
            what = "a network namespace inside a user namespace"
            raise _refused(what, error.errno or 0) from None
    except OSError as error:
        raise _refused("a network namespace", error.errno or 0) from None
    return in_user_namespace


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    After `enter`, because changed credentials clear the setting (commit_creds). A parent that died before the call
    sends no signal any more, so look whether it is still there.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def be_killed_first() -> None:
    """Have the out-of-memory killer take this process before any other of the host's.

    It judges by user memory (oom_badness), of which an agent has little, while its sockets fill the kernel's: it would
    kill the innocent one after the other.
    """
    with suppress(OSError):  # /proc may be read-only: then the host keeps its own order
        Path("/proc/self/oom_score_adj").write_text("1000")


def refuse_io_uring() -> None:
    """Make io_uring_setup fail with EPERM for this process and its children, as container runtimes do."""
    architecture = AUDIT_ARCHITECTURES.get(platform.machine())
    if architecture is None:
        known = ", ".join(AUDIT_ARCHITECTURES)
        raise MissingFeature(f"io_uring can be refused on {known}, not on {platform.machine()}")
    load, jump_if_equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    program = (
        (load, 0, 0, 4),  # seccomp_data.arch
        (jump_if_equal, 0, 2, architecture),
        (load, 0, 0, 0),  # seccomp_data.nr
        (jump_if_equal, 1, 0, IO_URING_SETUP),
        (give, 0, 0, SECCOMP_RET_ALLOW),
        (give, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM),
    )
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(instructions)))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


def _unshare(flags: int) -> None:
    if _libc.unshare(ctypes.c_int(flags)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _join(pid: int, kind: str, flag: int) -> None:
    descriptor = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(ctypes.c_int(descriptor), ctypes.c_int(flag)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)} (joining the {kind} namespace of process {pid})")
    finally:
        os.close(descriptor)


def _prctl(option: int, second: int, third: int = 0) -> None:
    # prctl is variadic and reads longs: an int argument would leave its upper half undefined.
    arguments = (ctypes.c_ulong(value) for value in (second, third, 0, 0))
    if _libc.prctl(ctypes.c_int(option), *arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (prctl {option})")


def _new_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    try:
        _unshare(CLONE_NEWUSER)
        # user_namespaces(7): without CAP_SETGID outside, setgroups has to be denied before a gid can be mapped.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    except OSError as error:
        raise _refused("a user namespace", error.errno or 0) from None


def _refused(what: str, number: int) -> MissingPrivilege:
    """Name what forbids it, with the remedy, from the settings that are known to; never more than they say."""
    setting_remedies = (
        ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=10000"),
        ("user/max_net_namespaces", "0", "sysctl -w user.max_net_namespaces=10000"),
        ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile that allows userns",
        ),
    )
    reasons = []
    for path, forbidding, remedy in setting_remedies:
        if _first_line(Path("/proc/sys") / path) == forbidding:
            reasons.append(f"{path.replace('/', '.')} is {forbidding} (remedy: {remedy})")
    if number == errno.ENOSPC and not reasons:
        reasons.append("user.max_user_namespaces or user.max_net_namespaces is used up (remedy: raise it)")
    if _status_field("Seccomp") == "2":
        reasons.append("a seccomp filter is active (remedy: a container profile that allows unshare)")
    if not reasons:
        reasons.append("CAP_SYS_ADMIN is missing and the kernel or a security module allows no namespace without it")
    name = errno.errorcode.get(number, str(number))
    counted = number == errno.ENOSPC or any("user.max_" in reason for reason in reasons)
    why = f"cannot make {what} ({name}): {'; '.join(reasons)}; or run as root with CAP_SYS_ADMIN"
    return MissingPrivilege(why, "namespaces-per-user" if counted else "security-modules")


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _status_field(name: str) -> str | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:")), None)
