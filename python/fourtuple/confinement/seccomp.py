"""Which system calls are left: a table, and the program of the kernel's filter that is assembled from it.

Decides which calls the engine and Python need, with which arguments; everything else is refused with EPERM, what is
newer than this table with ENOSYS, so that a libc falls back. A filter sees numbers, not what a pointer leads to: paths
and addresses are Landlock's and the mount view's. io_uring's operations are no system calls and pass by it. A connect()
that says in registers where it leads can be handed over to whoever makes it (`connecting`).
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable, Iterable

from msgspec import Struct

from fourtuple.confinement.connecting import MARK
from fourtuple.confinement.kernel import MACHINE, SECCOMP, call
from fourtuple.confinement.model import Confinement

# include/uapi/linux/bpf_common.h, filter.h, seccomp.h, audit.h
_LOAD, _AND, _JUMP_EQUAL, _JUMP_LEAST, _JUMP_ANY, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x25, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO, _USER_NOTIF = 0x7FFF_0000, 0x8000_0000, 0x0005_0000, 0x7FC0_0000
_SET_MODE_FILTER, _TSYNC, _NEW_LISTENER = 1, 1, 8
_AUDIT = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
_X32 = 0x4000_0000
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16
"""In struct seccomp_data; of an argument the lower half comes first on both machines."""
_NEWEST = 462
"""mseal: what is newer is not known here."""


class Argument(Struct, frozen=True):
    """A condition on half an argument: what of it is in `mask` is one of `values`. What the kernel takes is 32 bits."""

    place: int
    values: tuple[int, ...]
    mask: int = 0xFFFF_FFFF
    is_upper: bool = False


class Call(Struct, frozen=True):
    """A system call that is allowed where all conditions hold; a number is None where a machine has no such call."""

    name: str
    x86_64: int | None
    aarch64: int | None
    conditions: tuple[Argument, ...] = ()
    wanted: Callable[[Confinement], bool] = lambda _: True
    is_asked: bool = False
    """Not allowed, but handed over to who has the filter's listener."""

    def number(self, machine: str) -> int | None:
        """On a machine."""
        return self.x86_64 if machine == "x86_64" else self.aarch64


_SELF = -1
"""Stands for the process's own number, which is known when the filter is made."""
_THREAD, _NAMESPACES = 0x0001_0000, 0x7E02_0080
"""CLONE_THREAD; every CLONE_NEW* (include/uapi/linux/sched.h). A process of its own is no thread."""
_ONLY_STREAMS = (Argument(0, (2, 10)), Argument(1, (1,), 0xF), Argument(2, (0, 6)))
"""AF_INET and AF_INET6, SOCK_STREAM, TCP: Multipath TCP is not bound by Landlock."""
_ONLY_UNIX = (Argument(0, (1,)),)
_NO_FAST_OPEN = 0x2000_0000
"""MSG_FASTOPEN connects without a connect(), which Landlock does not see."""
_OF_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032, 1034)
"""Not F_SETOWN, F_SETSIG and the like: they send signals to others."""
_OF_IOCTL = (0x5401, 0x5411, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCOUTQ, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
_OF_PRCTL = (3, 15, 16, 21, 23, 39, 0x5356_4D41)
"""Reading what one is, naming threads and memory."""
_LEVELS = (0, 1, 6, 41)
"""IPPROTO_IP, SOL_SOCKET, IPPROTO_TCP, IPPROTO_IPV6."""


def _uring(confinement: Confinement) -> bool:
    return confinement.uring


def _asks(confinement: Confinement) -> bool:
    return confinement.asks


def _binds(confinement: Confinement) -> bool:
    return bool(confinement.bind_ports)


CALLS = (
    # Bytes, first what moves them.
    Call("read", 0, 63),
    Call("write", 1, 64),
    Call("readv", 19, 65),
    Call("writev", 20, 66),
    Call("recvfrom", 45, 207),
    Call("recvmsg", 47, 212),
    Call("sendto", 44, 206, (Argument(3, (0,), _NO_FAST_OPEN),)),
    Call("sendmsg", 46, 211, (Argument(2, (0,), _NO_FAST_OPEN),)),
    Call("splice", 275, 76),
    Call("epoll_wait", 232, None),
    Call("epoll_pwait", 281, 22),
    Call("epoll_pwait2", 441, 441),
    Call("epoll_ctl", 233, 21),
    Call("epoll_create1", 291, 20),
    Call("io_uring_enter", 426, 426, wanted=_uring),
    Call("io_uring_register", 427, 427, wanted=_uring),
    Call("io_uring_setup", 425, 425, wanted=_uring),
    Call("accept4", 288, 242),
    Call("accept", 43, 202),
    # First: what is handed over. What is left leads to unix sockets, or into a network with nothing in it.
    Call("connect", 42, 203, (Argument(5, (MARK,), is_upper=True),), _asks, is_asked=True),
    Call("connect", 42, 203),
    Call("shutdown", 48, 210),
    Call("close", 3, 57),
    Call("close_range", 436, 436),
    Call("socket", 41, 198, _ONLY_STREAMS),
    Call("socket", 41, 198, _ONLY_UNIX),
    Call("socketpair", 53, 199, _ONLY_UNIX),
    Call("bind", 49, 200, wanted=_binds),
    Call("listen", 50, 201),
    Call("getsockname", 51, 204),
    Call("getpeername", 52, 205),
    Call("setsockopt", 54, 208, (Argument(1, _LEVELS),)),
    Call("getsockopt", 55, 209),
    Call("poll", 7, None),
    Call("ppoll", 271, 73),
    Call("select", 23, None),
    Call("pselect6", 270, 72),
    Call("eventfd2", 290, 19),
    Call("timerfd_create", 283, 85),
    Call("timerfd_settime", 286, 86),
    Call("timerfd_gettime", 287, 87),
    Call("pipe2", 293, 59),
    Call("dup", 32, 23),
    Call("dup2", 33, None),
    Call("dup3", 292, 24),
    Call("fcntl", 72, 25, (Argument(1, _OF_FCNTL),)),
    Call("ioctl", 16, 29, (Argument(1, _OF_IOCTL),)),
    # Files; which, is Landlock's. The log, the store, and what Python imports late.
    Call("openat", 257, 56),
    Call("openat2", 437, 437),
    Call("open", 2, None),
    Call("fstat", 5, 80),
    Call("newfstatat", 262, 79),
    Call("stat", 4, None),
    Call("lstat", 6, None),
    Call("statx", 332, 291),
    Call("statfs", 137, 43),
    Call("fstatfs", 138, 44),
    Call("lseek", 8, 62),
    Call("pread64", 17, 67),
    Call("pwrite64", 18, 68),
    Call("preadv", 295, 69),
    Call("pwritev", 296, 70),
    Call("access", 21, None),
    Call("faccessat", 269, 48),
    Call("faccessat2", 439, 439),
    Call("readlink", 89, None),
    Call("readlinkat", 267, 78),
    Call("getcwd", 79, 17),
    Call("getdents64", 217, 61),
    Call("flock", 73, 32),
    Call("fsync", 74, 82),
    Call("fdatasync", 75, 83),
    Call("ftruncate", 77, 46),
    Call("fadvise64", 221, 223),
    # Memory.
    Call("mmap", 9, 222),
    Call("munmap", 11, 215),
    Call("mremap", 25, 216),
    Call("mprotect", 10, 226),
    Call("madvise", 28, 233),
    Call("mincore", 27, 232),
    Call("msync", 26, 227),
    Call("brk", 12, 214),
    # Threads and time. clone3() has its flags behind a pointer: without it glibc takes clone().
    Call("clone", 56, 220, (Argument(0, (_THREAD,), _THREAD | _NAMESPACES),)),
    Call("exit", 60, 93),
    Call("exit_group", 231, 94),
    Call("futex", 202, 98),
    Call("futex_waitv", 449, 449),
    Call("membarrier", 324, 283),
    Call("rseq", 334, 293),
    Call("set_robust_list", 273, 99),
    Call("get_robust_list", 274, 100),
    Call("set_tid_address", 218, 96),
    Call("arch_prctl", 158, None),
    Call("sched_yield", 24, 124),
    Call("sched_getaffinity", 204, 123),
    Call("sched_setaffinity", 203, 122),
    Call("sched_getparam", 143, 121),
    Call("sched_getscheduler", 145, 120),
    Call("getcpu", 309, 168),
    Call("nanosleep", 35, 101),
    Call("clock_nanosleep", 230, 115),
    Call("clock_gettime", 228, 113),
    Call("clock_getres", 229, 114),
    Call("gettimeofday", 96, 169),
    Call("time", 201, None),
    Call("times", 100, 153),
    Call("restart_syscall", 219, 128),
    # Signals, to oneself.
    Call("rt_sigaction", 13, 134),
    Call("rt_sigprocmask", 14, 135),
    Call("rt_sigreturn", 15, 139),
    Call("rt_sigpending", 127, 136),
    Call("rt_sigtimedwait", 128, 137),
    Call("rt_sigsuspend", 130, 133),
    Call("sigaltstack", 131, 132),
    Call("pause", 34, None),
    Call("kill", 62, 129, (Argument(0, (_SELF,)),)),
    Call("tgkill", 234, 131, (Argument(0, (_SELF,)),)),
    # Who and where one is, and chance.
    Call("getpid", 39, 172),
    Call("getppid", 110, 173),
    Call("gettid", 186, 178),
    Call("getuid", 102, 174),
    Call("geteuid", 107, 175),
    Call("getgid", 104, 176),
    Call("getegid", 108, 177),
    Call("getgroups", 115, 158),
    Call("getresuid", 118, 148),
    Call("getresgid", 120, 150),
    Call("getpgid", 121, 155),
    Call("getsid", 124, 156),
    Call("capget", 125, 90),
    Call("getrandom", 318, 278),
    Call("getrusage", 98, 165),
    Call("getrlimit", 97, 163),
    Call("prlimit64", 302, 261, (Argument(0, (0, _SELF)),)),
    Call("sysinfo", 99, 179),
    Call("uname", 63, 160),
    Call("prctl", 157, 167, (Argument(0, _OF_PRCTL),)),
)
"""Rows of one name are alternatives; the first that fits holds."""
_CLONE3 = 435
"""Refused with ENOSYS, for which a libc has an answer."""


def left(confinement: Confinement) -> tuple[Call, ...]:
    """Rows that hold here."""
    return tuple(row for row in CALLS if row.wanted(confinement))


def program(confinement: Confinement, machine: str, process: int) -> bytes:
    """The filter for that machine and process; KeyError for a machine without numbers."""
    lines = [
        _line(_LOAD, _MACHINE_AT),
        _line(_JUMP_EQUAL, _AUDIT[machine], 1, 0),
        _line(_RETURN, _KILL_PROCESS),
        _line(_LOAD, _NUMBER_AT),
    ]
    if machine == "x86_64":
        # The same entry, with other numbers: none of ours uses it.
        lines += [_line(_JUMP_LEAST, _X32, 0, 1), _line(_RETURN, _KILL_PROCESS)]
    rows: dict[int, list[Call]] = {}
    for row in left(confinement):
        if (number := row.number(machine)) is not None:
            rows.setdefault(number, []).append(row)
    for number, alternatives in rows.items():
        body = _any_of(alternatives, process)
        lines += [_line(_JUMP_EQUAL, number, 0, len(body)), *body]
    lines += [_line(_JUMP_EQUAL, _CLONE3, 1, 0), _line(_JUMP_ANY, _NEWEST, 0, 1), _line(_RETURN, _ERRNO | errno.ENOSYS)]
    lines += [_line(_RETURN, _ERRNO | errno.EPERM)]
    return b"".join(lines)


def install(confinement: Confinement, process: int) -> tuple[str, int | None]:
    """From here on, in every thread; says what is left, and gives the listener where connections are asked for, if they
    are. PR_SET_NO_NEW_PRIVS must be set."""
    try:
        code = program(confinement, MACHINE, process)
    except KeyError:
        raise OSError(errno.ENOSYS, f"system calls of {MACHINE} are not known here") from None
    text = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("@HP", len(code) // 8, ctypes.addressof(text))
    listener = None
    if confinement.asks:
        # Not together with TSYNC before Linux 5.7; there is one thread.
        listener = call(SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, filter_)
    # TSYNC fails, and with the number of a thread, if one of them has a filter that ours does not begin with.
    elif thread := call(SECCOMP, _SET_MODE_FILTER, _TSYNC, filter_):
        raise OSError(errno.EBUSY, f"thread {thread} has another filter")
    names = {row.name for row in left(confinement)}
    limited = {row.name for row in left(confinement) if row.conditions and not row.is_asked}
    asked = "; TCP connections are asked for" if confinement.asks else ""
    return f"{len(names)} system calls are left, {len(limited)} of them by their arguments{asked}", listener


def _any_of(alternatives: Iterable[Call], process: int) -> list[bytes]:
    """Allow, or hand over, if all conditions of any alternative hold, else EPERM."""
    lines: list[bytes] = []
    for row in alternatives:
        lines += _all_of(row.conditions, _USER_NOTIF if row.is_asked else _ALLOW, process)
    return [*lines, _line(_RETURN, _ERRNO | errno.EPERM)]


def _all_of(conditions: tuple[Argument, ...], action: int, process: int) -> list[bytes]:
    """That action if all hold, else fall through."""
    lines = [_line(_RETURN, action)]
    for condition in reversed(conditions):
        values = [process if value == _SELF else value for value in condition.values]
        tests = []
        for place, value in enumerate(values):
            last = place == len(values) - 1
            # A match goes on behind the other tests; after the last, what does not match leaves.
            tests.append(_line(_JUMP_EQUAL, value, len(values) - 1 - place, len(lines) if last else 0))
        mask = [] if condition.mask == 0xFFFF_FFFF else [_line(_AND, condition.mask)]
        at = _ARGUMENTS_AT + 8 * condition.place + 4 * condition.is_upper
        lines = [_line(_LOAD, at), *mask, *tests, *lines]
    return lines


def _line(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    """struct sock_filter."""
    return struct.pack("=HBBI", code, true, false, value)
