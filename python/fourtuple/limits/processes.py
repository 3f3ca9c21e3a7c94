"""Family J: processes and threads. They bound servers that take a thread or a process per connection, and no others.

Decides how many threads a host, a user, a cgroup or a process may have.
"""

from __future__ import annotations

from fourtuple.facts import Goal, Host, Role
from fourtuple.limits._model import (
    Evidence,
    Kind,
    Limit,
    NotApplicable,
    Remedy,
    Scope,
    Unknown,
    Usage,
    counter,
    error,
    in_program,
    log,
    set_sysctl,
    symptom,
)
from fourtuple.limits._terms import Answer, count, divided, number, unread

EVENT_LOOP = NotApplicable(reason="no thread per connection")
MAPS_PER_THREAD = 2
"""A stack and its guard page."""
USE_EVENTS = in_program("an event loop instead of threads; else raise J1 to J5 together")


def _threads(goal: Goal) -> int | None:
    return None if goal.role is Role.NAT or goal.threads_per_connection == 0 else goal.threads_per_connection


def _of_user(host: Host, goal: Goal) -> Answer:
    threads = _threads(goal)
    if threads is None:
        return EVENT_LOOP
    if host.process.effective_uid == 0 or {"CAP_SYS_RESOURCE", "CAP_SYS_ADMIN"} & set(host.process.capabilities):
        return NotApplicable(reason="root, CAP_SYS_RESOURCE and CAP_SYS_ADMIN are exempt (copy_process)")
    limit = host.process.rlimits.get("NPROC")
    if limit is None:
        return Unknown(reason=host.unread.get("rlimits", "RLIMIT_NPROC could not be read"))
    if limit.soft is None:
        return NotApplicable(reason="RLIMIT_NPROC is unlimited")
    return divided(limit.soft, threads, f"{limit.soft:,} threads of one user", count(threads, "thread"))


def _from_sysctl(host: Host, goal: Goal, name: str, each: int, what: str) -> Answer:
    threads = _threads(goal)
    if threads is None:
        return EVENT_LOOP
    most = number(host, name)
    if most is None:
        return unread(host, name)
    return divided(most, threads * each, f"{most:,} {what}", f"{threads * each:,} per connection")


def _of_host(host: Host, goal: Goal) -> Answer:
    return _from_sysctl(host, goal, "kernel.threads-max", 1, "threads on the host")


def _of_pids(host: Host, goal: Goal) -> Answer:
    return _from_sysctl(host, goal, "kernel.pid_max", 1, "process numbers")


def _of_maps(host: Host, goal: Goal) -> Answer:
    return _from_sysctl(host, goal, "vm.max_map_count", MAPS_PER_THREAD, "mappings of one process")


def _of_cgroup(host: Host, goal: Goal) -> Answer:
    threads = _threads(goal)
    if threads is None:
        return EVENT_LOOP
    if host.cgroup is None:
        return Unknown(reason=host.unread.get("cgroup", "the pids cgroup could not be read"))
    most, used = host.cgroup.pids_max, host.cgroup.pids_current or 0
    if most is None:
        return NotApplicable(reason="no pids.max in this cgroup or above it")
    return divided(most - used, threads, f"{most:,} pids.max - {used:,} in use", count(threads, "thread"))


def _cgroup_use(host: Host) -> tuple[Usage, ...]:
    if host.cgroup is None or host.cgroup.pids_max is None or host.cgroup.pids_current is None:
        return ()
    return (Usage(used=host.cgroup.pids_current, of=host.cgroup.pids_max, unit="threads of the cgroup"),)


LIMITS = (
    Limit(
        id="J1",
        name="user-processes",
        title="RLIMIT_NPROC",
        scope=Scope.USER,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why="Threads and processes of one user together. Root, CAP_SYS_RESOURCE and CAP_SYS_ADMIN are exempt.",
        read=("/proc/PID/limits, Max processes",),
        default="threads-max / 2: 96,365 on 24 GiB",
        formula="limit / threads per connection",
        bounds="Servers with a thread or process per connection.",
        hit=(error("clone", "EAGAIN", "Python: RuntimeError: can't start new thread", rank=1),),
        remedies=(
            USE_EVENTS,
            Remedy(
                text="raise it",
                command="ulimit -u 400000",
                persist="LimitNPROC= in the unit, or /etc/security/limits.d/*.conf",
            ),
        ),
        since="always",
        side_effects="none",
        sources=("copy_process() in kernel/fork.c",),
        bound=_of_user,
    ),
    Limit(
        id="J2",
        name="threads-max",
        title="kernel.threads-max",
        scope=Scope.HOST,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why="Threads of the whole host, computed so that their stacks take at most an eighth of the memory.",
        read=("kernel.threads-max",),
        default="memory / 8 / thread stack: 192,730 on 24 GiB",
        formula="threads-max / threads per connection",
        bounds="Servers with a thread or process per connection.",
        hit=(error("clone", "EAGAIN", rank=2),),
        remedies=(USE_EVENTS, set_sysctl("kernel.threads-max", "400000", "raise it")),
        since="always",
        side_effects="memory for stacks",
        sources=("set_max_threads() in kernel/fork.c",),
        bound=_of_host,
    ),
    Limit(
        id="J3",
        name="pid-max",
        title="kernel.pid_max",
        scope=Scope.HOST,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why="Every thread has a number of its own; there are as many as this, in each pid namespace.",
        read=("kernel.pid_max",),
        default="max(32768, 1024 x processors), at most 4,194,304",
        formula="pid_max / threads per connection",
        bounds="Servers with a thread or process per connection.",
        hit=(error("clone", "EAGAIN", rank=3),),
        remedies=(USE_EVENTS, set_sysctl("kernel.pid_max", "4194304", "raise it")),
        since="always",
        side_effects="none",
        sources=("pid_idr_init() in kernel/pid.c",),
        bound=_of_pids,
    ),
    Limit(
        id="J4",
        name="pids-cgroup",
        title="pids.max of the cgroup",
        scope=Scope.CGROUP,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why="Threads of a cgroup. systemd sets TasksMax for every service; containers have one, too.",
        read=("pids.max, pids.current, pids.events in each cgroup up to the root",),
        default="15 % of pid_max for a systemd service",
        formula="(pids.max - pids.current) / threads per connection",
        bounds="Servers with a thread or process per connection.",
        hit=(
            error("clone", "EAGAIN", rank=4),
            log(r"cgroup: fork rejected by pids controller"),
            counter("cgroup.pids_max"),
        ),
        remedies=(
            USE_EVENTS,
            Remedy(
                text="raise it",
                command="systemctl set-property SERVICE TasksMax=400000",
                persist="the property is written to a drop-in",
            ),
        ),
        since="4.3",
        side_effects="none",
        sources=("pids_can_fork() in kernel/cgroup/pids.c",),
        bound=_of_cgroup,
        usage=_cgroup_use,
    ),
    Limit(
        id="J5",
        name="memory-maps",
        title="vm.max_map_count",
        scope=Scope.PROCESS,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why=(
            "A thread takes two mappings, its stack and the guard page, so that a process ends at about 32,000 threads."
        ),
        read=("vm.max_map_count",),
        default="65,530",
        formula="max_map_count / 2 per thread",
        bounds="Servers with a thread per connection.",
        hit=(
            error("mmap", "ENOMEM", rank=1),
            error("clone", "EAGAIN", "as the C library reports it", rank=5),
        ),
        remedies=(USE_EVENTS, set_sysctl("vm.max_map_count", "1048576", "raise it")),
        since="2.6",
        side_effects="none",
        sources=("mm/mmap.c",),
        bound=_of_maps,
    ),
    Limit(
        id="J6",
        name="thread-stacks",
        title="Stacks of threads",
        scope=Scope.PROCESS,
        kind=Kind.COUNT,
        evidence=Evidence.ADVICE,
        why=(
            "Each thread reserves its stack, 8 MiB of addresses by default. It is charged in full where overcommit is"
            " off."
        ),
        read=("ulimit -s", "vm.overcommit_memory"),
        default="8 MiB, reserved only",
        formula="commit limit / stack size, with overcommit_memory 2",
        bounds="Servers with a thread per connection on such hosts.",
        hit=(error("mmap", "ENOMEM", "with overcommit_memory 2", rank=2), symptom("can't start new thread")),
        remedies=(USE_EVENTS, in_program("smaller stacks: pthread_attr_setstacksize, threading.stack_size")),
        since="always",
        side_effects="deep recursion overflows small stacks",
        sources=("pthread_create(3)",),
    ),
)
