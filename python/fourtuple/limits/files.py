"""Family B: descriptors, files and what watches them: of a process, a user, a ring, the host.

Decides how many handles connections can have. Knows nothing of ports or of the memory behind a handle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fourtuple.facts import Goal, Host, RLimit, Role
from fourtuple.limits._model import (
    Bound,
    Check,
    Evidence,
    Kind,
    Limit,
    NotApplicable,
    Remedy,
    Scope,
    Unknown,
    Usage,
    error,
    in_program,
    log,
    set_sysctl,
    symptom,
)
from fourtuple.limits._terms import (
    NAT_HAS_NO_SOCKETS,
    Answer,
    count,
    divided,
    number,
    numbers,
    sockets_per_connection,
    unread,
)

SELECT_DESCRIPTORS = 1_024
"""FD_SETSIZE."""
DIRECT_DESCRIPTORS_PER_RING = 2**20
"""IORING_MAX_FIXED_FILES in io_uring/rsrc.c."""

DIRECT_DESCRIPTORS_USE_NONE = NotApplicable(reason="direct descriptors take no place in the descriptor table")
IN_UNIT = "LimitNOFILE= in the systemd unit, or /etc/security/limits.d/*.conf for logins"

RAISE_HARD = Remedy(
    text="set it where the process is started",
    command="systemctl edit SERVICE  # [Service] LimitNOFILE=4194304",
    persist=IN_UNIT,
)


def _descriptors(goal: Goal) -> int:
    return goal.descriptors_per_connection * sockets_per_connection(goal)


def _each(goal: Goal, singular: str) -> str:
    return count(_descriptors(goal), singular)


def _nofile(host: Host) -> RLimit | Unknown:
    limit = host.process.rlimits.get("NOFILE")
    if limit is None:
        return Unknown(reason=host.unread.get("rlimits", f"the limits of process {host.process.pid} could not be read"))
    return limit


def _descriptor_bound(host: Host, goal: Goal, which: str, total: int | None) -> Answer:
    if goal.role is Role.NAT:
        return NAT_HAS_NO_SOCKETS
    if goal.descriptors_per_connection == 0:
        return DIRECT_DESCRIPTORS_USE_NONE
    if total is None:
        return NotApplicable(reason=f"{which} is unlimited; fs.nr_open bounds it")
    used = host.process.open_descriptors
    text = f"{total:,} {which} - {used:,} open" if used is not None else f"{total:,} {which} - open ones, not read"
    return divided(total - (used or 0), _descriptors(goal), text, _each(goal, "descriptor"))


def _soft(host: Host, goal: Goal) -> Answer:
    limit = _nofile(host)
    if isinstance(limit, Unknown):
        return limit
    bound = _descriptor_bound(host, goal, "soft", limit.soft)
    if isinstance(bound, Bound) and limit.soft == limit.hard:
        # Raising soft to hard changes nothing where they are equal.
        return replace(bound, remedy=RAISE_HARD)
    return bound


def _hard(host: Host, goal: Goal) -> Answer:
    limit = _nofile(host)
    return limit if isinstance(limit, Unknown) else _descriptor_bound(host, goal, "hard", limit.hard)


def _soft_use(host: Host) -> tuple[Usage, ...]:
    limit, used = _nofile(host), host.process.open_descriptors
    if isinstance(limit, Unknown) or limit.soft is None or used is None:
        return ()
    subject = f"process {host.process.pid} {host.process.name}".rstrip()
    return (Usage(used=used, of=limit.soft, unit="descriptors", subject=subject),)


def _can_raise(host: Host) -> Check | None:
    limit = _nofile(host)
    if isinstance(limit, Unknown) or limit.hard is None or not host.process.capabilities:
        return None
    allowed = "CAP_SYS_RESOURCE" in host.process.capabilities
    return Check(
        setting="RLIMIT_NOFILE hard",
        found=f"{limit.hard:,} and {'CAP_SYS_RESOURCE' if allowed else 'no CAP_SYS_RESOURCE'}",
        wanted="1,048,576, or CAP_SYS_RESOURCE to raise it",
        holds=allowed or limit.hard >= 1_048_576,
        meaning="not even root raises it from inside without that capability: the unit or the container runtime has to",
    )


def _nr_open(host: Host, goal: Goal) -> Answer:
    most = number(host, "fs.nr_open")
    if most is None and goal.role is not Role.NAT and goal.descriptors_per_connection:
        return unread(host, "fs.nr_open")
    return _descriptor_bound(host, goal, "fs.nr_open", most)


def _file_max(host: Host, goal: Goal) -> Answer:
    if goal.role is Role.NAT:
        return NAT_HAS_NO_SOCKETS
    if "CAP_SYS_ADMIN" in host.process.capabilities:
        return NotApplicable(reason="a process with CAP_SYS_ADMIN is exempt (alloc_empty_file)")
    most = number(host, "fs.file-max")
    if most is None:
        return unread(host, "fs.file-max")
    usage = numbers(host, "fs.file-nr", 3)
    allocated = usage[0] if usage else 0
    # A direct descriptor is a file too; a connection without a descriptor of its own still has one.
    files = max(1, goal.descriptors_per_connection) * sockets_per_connection(goal)
    text = f"{most:,} files - {allocated:,} allocated" if usage else f"{most:,} files - allocated ones, not read"
    return divided(most - allocated, files, text, count(files, "file"))


def _file_use(host: Host) -> tuple[Usage, ...]:
    most, usage = number(host, "fs.file-max"), numbers(host, "fs.file-nr", 3)
    if most is None or usage is None:
        return ()
    return (Usage(used=usage[0], of=most, unit="files on the host"),)


def _direct(host: Host, goal: Goal) -> Answer:
    if goal.role is Role.NAT:
        return NAT_HAS_NO_SOCKETS
    if goal.descriptors_per_connection:
        return NotApplicable(reason="the program uses ordinary descriptors")
    if not host.io_uring.available:
        return Bound(
            connections=0, arithmetic=f"io_uring cannot be used here: {host.io_uring.reason or 'not tried'} = 0"
        )
    limit = _nofile(host)
    if isinstance(limit, Unknown):
        return limit
    if limit.soft is None:
        return NotApplicable(reason=f"{DIRECT_DESCRIPTORS_PER_RING:,} slots per ring, and no limit to the rings")
    # A ring is a descriptor itself. One is open when the program is examined, and one more has to stay free: the socket
    # that is about to get a slot.
    used, slots = host.process.open_descriptors, min(limit.soft, DIRECT_DESCRIPTORS_PER_RING)
    rings = max(0, limit.soft - (used or 0))
    text = f"{limit.soft:,} soft - {used:,} open" if used is not None else f"{limit.soft:,} soft - open ones, not read"
    total = rings * slots // sockets_per_connection(goal)
    sockets = " / 2 sockets" if sockets_per_connection(goal) == 2 else ""
    return Bound(
        connections=total, arithmetic=f"({text}) = {rings:,} rings x {slots:,} slots each{sockets} = {total:,}"
    )


def _uring_allowed(host: Host) -> Check | None:
    value = number(host, "kernel.io_uring_disabled")
    if value is None:
        return None
    return Check(
        setting="kernel.io_uring_disabled",
        found=str(value),
        wanted="0",
        holds=value == 0,
        meaning="io_uring is refused, to all (2) or to the unprivileged (1): descriptors bound every connection",
    )


def _watches(host: Host, goal: Goal) -> Answer:
    if goal.role is Role.NAT:
        return NAT_HAS_NO_SOCKETS
    if not goal.uses_epoll:
        return NotApplicable(reason="the program does not use epoll")
    most = number(host, "fs.epoll.max_user_watches")
    if most is None:
        return unread(host, "fs.epoll.max_user_watches")
    watches = sockets_per_connection(goal)
    return divided(most, watches, f"{most:,} watches of one user", count(watches, "watch", "watches"))


def _select_range(host: Host) -> Check | None:
    used = host.process.open_descriptors
    if used is None:
        return None
    return Check(
        setting=f"descriptors of process {host.process.pid}",
        found=f"{used:,}",
        wanted=f"< {SELECT_DESCRIPTORS:,}, or no select()",
        holds=used < SELECT_DESCRIPTORS,
        meaning="a program that uses select() cannot watch these descriptors",
    )


def _accept_spins(threshold_percent: int) -> Callable[[Host], Check | None]:
    def check(host: Host) -> Check | None:
        uses = _soft_use(host)
        if not uses or not host.listeners:
            return None
        return Check(
            setting="descriptors left for accept()",
            found=f"{max(0, uses[0].of - uses[0].used):,}",
            wanted=f"at least {100 - threshold_percent} % of the limit",
            holds=uses[0].used * 100 <= uses[0].of * threshold_percent,
            meaning=(
                "at EMFILE the connection stays in the accept queue: a naive loop spins, asyncio pauses for a second"
            ),
        )

    return check


LIMITS = (
    Limit(
        id="B1",
        name="descriptors-soft",
        title="RLIMIT_NOFILE, soft",
        scope=Scope.PROCESS,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why=(
            "The number of descriptors a process may have. On most hosts it is the first limit of all, at 1,024. Any"
            " process may raise it to the hard limit by itself."
        ),
        read=("/proc/PID/limits, Max open files", "getrlimit"),
        default="1024 (the kernel's and systemd's)",
        formula="soft - open descriptors, divided by the descriptors of a connection",
        bounds="Clients and servers: one each; a proxy: two. Direct descriptors of io_uring are not counted (B5).",
        hit=(
            error("socket", "EMFILE", rank=1),
            error("accept", "EMFILE", "the connection stays in the accept queue (B11)", rank=1),
            error("dup", "EMFILE"),
            error("epoll_create", "EMFILE"),
        ),
        remedies=(
            Remedy(
                text="raise soft to hard when the program starts, or in the unit",
                command="ulimit -Sn hard",
                persist=IN_UNIT,
                risk="programs that use select (B8), and programs that close every descriptor in a loop",
            ),
            in_program("io_uring with direct descriptors: none of them counts here"),
        ),
        since="always",
        side_effects="none",
        sources=("alloc_fd(), get_unused_fd_flags() in fs/file.c", "getrlimit(2)"),
        bound=_soft,
        usage=_soft_use,
    ),
    Limit(
        id="B2",
        name="descriptors-hard",
        title="RLIMIT_NOFILE, hard",
        scope=Scope.PROCESS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "How far the soft limit can be raised without privilege. Raising the hard limit needs CAP_SYS_RESOURCE,"
            " which root in a container often lacks, and may not go beyond fs.nr_open."
        ),
        read=("/proc/PID/limits, Max open files",),
        default="4096 (kernel), 524288 (systemd)",
        formula="as B1",
        bounds="As B1, after the soft limit was raised.",
        hit=(error("setrlimit", "EPERM", "no CAP_SYS_RESOURCE", rank=1),),
        remedies=(
            RAISE_HARD,
            Remedy(
                text="for a container, at its runtime",
                command="docker run --ulimit nofile=4194304:4194304 IMAGE",
                persist="default-ulimits in /etc/docker/daemon.json",
            ),
            in_program("io_uring with direct descriptors: none of them counts here"),
        ),
        since="always",
        side_effects="none",
        sources=("do_prlimit() in kernel/sys.c",),
        bound=_hard,
        check=_can_raise,
    ),
    Limit(
        id="B3",
        name="descriptors-ceiling",
        title="fs.nr_open",
        scope=Scope.HOST,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why="No process may have a hard limit above it.",
        read=("fs.nr_open",),
        default="1,048,576; systemd from 240 sets 1,073,741,816 at boot",
        formula="as B1",
        bounds="Every process that uses descriptors.",
        hit=(
            error("setrlimit", "EPERM", "above fs.nr_open", rank=2),
            error("dup", "EMFILE", "the table cannot grow further"),
        ),
        remedies=(
            set_sysctl(
                "fs.nr_open",
                "4194304",
                "raise it before the limit of the process",
                risk="with LimitNOFILE=infinity old programs loop over every possible descriptor",
            ),
        ),
        since="2.6.25",
        side_effects="none",
        sources=("fs/file.c", "do_prlimit() in kernel/sys.c"),
        bound=_nr_open,
    ),
    Limit(
        id="B4",
        name="files-on-host",
        title="fs.file-max",
        scope=Scope.HOST,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why=(
            "All open files of the host together. Processes with CAP_SYS_ADMIN are exempt. On hosts with systemd it"
            " is set to the maximum and never binds."
        ),
        read=("fs.file-max", "fs.file-nr (allocated, 0, max)"),
        default=(
            "about one file per 10 KiB of memory, at least 8192 (2,466,170 on 24 GiB); systemd from 240: the maximum"
        ),
        formula="file-max - allocated, divided by the files of a connection",
        bounds="Every unprivileged process; direct descriptors count, too.",
        hit=(
            error("socket", "ENFILE", rank=1),
            error("accept", "ENFILE", rank=1),
            log(r"VFS: file-max limit \d+ reached"),
        ),
        remedies=(set_sysctl("fs.file-max", "10000000", "raise it"),),
        since="always",
        side_effects="none; memory binds first",
        sources=("alloc_empty_file(), files_maxfiles_init() in fs/file_table.c",),
        bound=_file_max,
        usage=_file_use,
    ),
    Limit(
        id="B5",
        name="direct-descriptors",
        title="The fixed file table of io_uring",
        scope=Scope.PROCESS,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why=(
            "Direct descriptors live in a table of the ring, not of the process. A ring holds 2^20 of them, and no"
            " more at registration than RLIMIT_NOFILE allows, although none is a descriptor. The rings themselves are"
            " descriptors, so the soft limit counts twice over: with 64, 57 rings of 64 slots held 3,648 connections."
        ),
        read=("io_uring_register result", "RLIMIT_NOFILE"),
        default="min(RLIMIT_NOFILE, 1,048,576) slots per ring",
        formula="slots x rings, of which there are as many as descriptors are left",
        bounds=(
            "Programs that use direct descriptors: about the square of the soft limit, a million with 1,024. One ring"
            " alone ends at the soft limit."
        ),
        hit=(
            error("io_uring_register", "EMFILE", "more slots than RLIMIT_NOFILE", rank=1),
            error("accept", "ENFILE", "no free slot: in the completion of the request", rank=2),
            error("io_uring_setup", "EMFILE", "no descriptor left for another ring", rank=1),
            error("socket", "EMFILE", "a socket is a descriptor until it has its slot; rings took the others", rank=3),
        ),
        remedies=(in_program("open another ring; raise the soft limit when none can be opened (B1)"),),
        since="5.1; accept into a slot 5.15",
        side_effects="the files still count in fs.file-max and take the same kernel memory",
        sources=("io_sqe_files_register() in io_uring/rsrc.c", "io_uring/filetable.c"),
        bound=_direct,
    ),
    Limit(
        id="B6",
        name="ring-size",
        title="Rings, completion queues and locked memory",
        scope=Scope.PROCESS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.SOURCE,
        why=(
            "A submission queue has at most 32,768 entries, a completion queue 65,536 by default doubling. Registered"
            " buffers count against RLIMIT_MEMLOCK. More events at once than the queue holds overflow into a slower"
            " list."
        ),
        read=("kernel.io_uring_disabled (6.6 and later)", "/proc/PID/limits, Max locked memory"),
        default="enabled; 8 MiB of locked memory",
        formula="none: events in flight, not connections",
        bounds="Programs that use io_uring.",
        hit=(
            error("io_uring_register", "ENOMEM", "locked memory", rank=1),
            error("io_uring_setup", "EPERM", "kernel.io_uring_disabled is 1 or 2, or seccomp", rank=1),
        ),
        remedies=(
            set_sysctl("kernel.io_uring_disabled", "0", "allow io_uring"),
            in_program("LimitMEMLOCK= in the unit; size provided buffers by traffic, not by connections"),
        ),
        since="5.1; the switch 6.6",
        side_effects="io_uring is off in many containers on purpose",
        sources=("io_uring/io_uring.c",),
        check=_uring_allowed,
    ),
    Limit(
        id="B7",
        name="epoll-watches",
        title="fs.epoll.max_user_watches",
        scope=Scope.USER,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why="The descriptors that all epoll instances of one user may watch together.",
        read=("fs.epoll.max_user_watches",),
        default="4 % of low memory / 184 B: 5,491,511 on 24 GiB",
        formula="watches / sockets of a connection",
        bounds="Every role that uses epoll, over all processes of the user.",
        hit=(error("epoll_ctl", "ENOSPC", rank=1),),
        remedies=(set_sysctl("fs.epoll.max_user_watches", "20000000", "raise it"),),
        since="2.6.28",
        side_effects="184 B of kernel memory per watch",
        sources=("fs/eventpoll.c", "epoll(7)"),
        bound=_watches,
    ),
    Limit(
        id="B8",
        name="select-size",
        title="select() ends at descriptor 1,023",
        scope=Scope.PROCESS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why="The bit set of select() has 1,024 places. Python refuses a larger descriptor, C overwrites memory.",
        read=("the program",),
        default="FD_SETSIZE 1024, compiled into the C library",
        formula="1,024 - descriptors that are open anyway",
        bounds="Programs that use select().",
        hit=(symptom("ValueError: filedescriptor out of range in select()"),),
        remedies=(in_program("use epoll, or poll"),),
        since="always",
        side_effects="none",
        sources=("select(2)",),
        check=_select_range,
    ),
    Limit(
        id="B9",
        name="descriptor-table-growth",
        title="The descriptor table grows by doubling",
        scope=Scope.PROCESS,
        kind=Kind.SPEED,
        evidence=Evidence.SOURCE,
        why=(
            "Each slot takes 8 B and some bits; at a million descriptors a doubling copies 8 MiB. In a process with"
            " several threads each doubling also waits for synchronize_rcu(), a stall of tens of milliseconds."
        ),
        read=("FDSize in /proc/PID/status",),
        default="64 slots at the start",
        formula="log2(descriptors / 64) stalls",
        bounds="The ramp of processes with threads, not the number.",
        hit=(symptom("single connects or accepts that take tens of milliseconds, at powers of two"),),
        remedies=(in_program("grow it before threads start: fcntl(F_DUPFD) to a high number"),),
        since="always",
        side_effects="memory for the table",
        sources=("expand_fdtable() in fs/file.c",),
    ),
    Limit(
        id="B10",
        name="manager-limits",
        title="Limits that service and container managers set",
        scope=Scope.PROCESS,
        kind=Kind.COUNT,
        evidence=Evidence.ADVICE,
        why=(
            "A unit's LimitNOFILE and TasksMax, Docker's --ulimit nofile and the units of containerd decide for what"
            " they start; Kubernetes has no setting per pod. What a shell says about its own limits says nothing"
            " about a service."
        ),
        read=("/proc/PID/limits of the process that matters", "systemctl show SERVICE -p LimitNOFILE -p TasksMax"),
        default="the manager's",
        formula="as B1 and J4",
        bounds="Every role, in services and containers.",
        hit=(
            error("socket", "EMFILE", "inside the container, with the host in order", rank=2),
            error("accept", "EMFILE", "inside the container, with the host in order", rank=2),
        ),
        remedies=(
            Remedy(
                text="set it at the manager and check the limits of the running process",
                command="systemctl edit SERVICE  # [Service] LimitNOFILE=1048576",
                persist="the drop-in that the command writes",
            ),
        ),
        since="always",
        side_effects="none",
        sources=("systemd.exec(5)", "docker run reference"),
    ),
    Limit(
        id="B11",
        name="accept-at-limit",
        title="What accept loops do at EMFILE",
        scope=Scope.PROCESS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.SOURCE,
        why=(
            "accept() takes the descriptor first and leaves the connection in the queue when there is none, so the"
            " listener stays readable. A naive loop spins; asyncio logs and stops accepting for a second; nginx logs."
        ),
        read=("descriptors against the limit of each listening process",),
        default="as programmed",
        formula="as B1",
        bounds="Servers and proxies.",
        hit=(
            symptom("asyncio: socket.accept() out of system resource"),
            symptom("nginx: accept4() failed (24: Too many open files)"),
        ),
        remedies=(in_program("keep a spare descriptor and close it at EMFILE, or stop polling until one is free"),),
        since="always",
        side_effects="the accept queue fills and clients time out (D1)",
        sources=("__sys_accept4()", "CPython asyncio/selector_events.py, ACCEPT_RETRY_DELAY"),
        check=_accept_spins(95),
    ),
)
