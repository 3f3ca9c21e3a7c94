"""Family C: memory behind connections: kernel slabs, buffers, cgroups, the program's own.

Decides how many connections the memory of a host or a cgroup holds. Knows nothing of names or handles.
"""

from __future__ import annotations

from fourtuple.facts import Cgroup, Goal, Host, Role
from fourtuple.limits._model import (
    Check,
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
from fourtuple.limits._terms import (
    HOST_LIMIT,
    MEMORY_SHARE_PERCENT,
    NAT_HAS_NO_SOCKETS,
    Answer,
    at_least,
    bytes_per_connection,
    divided,
    is_client,
    no_source_ports,
    numbers,
    queued_bytes,
    sockets_per_connection,
    unread,
)

BIND_BUCKET_BYTES = 128
"""A tcp_bind2_bucket in its slab (C2)."""
TIME_WAIT_BYTES = 256
REQUEST_BYTES = 320
MEBIBYTE = 2**20


def _kernel_memory(host: Host, goal: Goal) -> Answer:
    if goal.role is Role.NAT:
        return NAT_HAS_NO_SOCKETS
    available = host.machine.memory_available_bytes
    if available is None:
        return Unknown(reason=host.unread.get("meminfo", "the available memory could not be read"))
    each, text = bytes_per_connection(goal)
    return divided(
        available * MEMORY_SHARE_PERCENT // 100,
        each,
        f"{MEMORY_SHARE_PERCENT} % of {available:,} B available",
        text,
    )


def _bind_buckets(host: Host, goal: Goal) -> Answer:
    if not is_client(goal):
        return no_source_ports(goal)
    available = host.machine.memory_available_bytes
    if available is None:
        return Unknown(reason="the available memory could not be read")
    if goal.sources == 1:
        return NotApplicable(reason="at most 65,535 buckets with one source address: 8 MB")
    return divided(
        available * MEMORY_SHARE_PERCENT // 100,
        BIND_BUCKET_BYTES,
        f"{MEMORY_SHARE_PERCENT} % of {available:,} B available",
        f"{BIND_BUCKET_BYTES} B for a port and address of its own each",
    )


def _tcp_mem(host: Host, goal: Goal) -> Answer:
    if goal.role is Role.NAT:
        return NAT_HAS_NO_SOCKETS
    if goal.bytes_queued == 0:
        return NotApplicable(reason="idle sockets are not charged to it; only queued bytes are")
    pages = numbers(host, "net.ipv4.tcp_mem", 3)
    if pages is None:
        return unread(host, "net.ipv4.tcp_mem", HOST_LIMIT)
    sockets = sockets_per_connection(goal)
    each = queued_bytes(goal, host.kernel.page_bytes) * sockets
    text = f"(1.25 x {goal.bytes_queued:,} B queued, in whole pages)"
    return divided(
        pages[2] * host.kernel.page_bytes,
        each,
        f"{pages[2]:,} pages x {host.kernel.page_bytes:,} B",
        text if sockets == 1 else f"({sockets} x {text})",
    )


def _tcp_mem_use(host: Host) -> tuple[Usage, ...]:
    pages, used = numbers(host, "net.ipv4.tcp_mem", 3), host.sockets.memory_pages_host
    if pages is None or used is None:
        return ()
    return (Usage(used=used, of=pages[2], unit="pages of TCP buffers"),)


def _receive_maximum(host: Host) -> Check | None:
    values = numbers(host, "net.ipv4.tcp_rmem", 3)
    if values is None:
        return None
    return Check(
        setting="net.ipv4.tcp_rmem, maximum",
        found=f"{values[2]:,}",
        wanted=f"<= {6 * MEBIBYTE:,} for a million connections",
        holds=values[2] <= 6 * MEBIBYTE,
        meaning=f"a single slow reader may hold {values[2]:,} B of kernel memory",
    )


def _cgroup_bytes(cgroup: Cgroup) -> int | None:
    """Bytes in use that cannot be given back; None if the use was not read."""
    if cgroup.memory_current_bytes is None:
        return None
    return max(0, cgroup.memory_current_bytes - (cgroup.memory_reclaimable_bytes or 0))


def _memory_cgroup(host: Host, goal: Goal) -> Answer:
    if goal.role is Role.NAT:
        return NAT_HAS_NO_SOCKETS
    cgroup = host.cgroup
    if cgroup is None:
        return Unknown(reason=host.unread.get("cgroup", "the memory cgroup could not be read"))
    if cgroup.memory_max_bytes is None:
        return NotApplicable(reason="no memory.max in this cgroup or above it")
    used = _cgroup_bytes(cgroup)
    each, text = bytes_per_connection(goal)
    total = f"{cgroup.memory_max_bytes:,} B memory.max"
    total += " - use, not read" if used is None else f" - {used:,} B in use"
    return divided(cgroup.memory_max_bytes - (used or 0), each, total, text)


def _memory_cgroup_use(host: Host) -> tuple[Usage, ...]:
    if host.cgroup is None or host.cgroup.memory_max_bytes is None:
        return ()
    used = _cgroup_bytes(host.cgroup)
    if used is None:
        return ()
    return (Usage(used=used, of=host.cgroup.memory_max_bytes, unit="bytes of the memory cgroup"),)


def _cgroup_v1_tcp(host: Host, goal: Goal) -> Answer:
    limit = None if host.cgroup is None else host.cgroup.kmem_tcp_limit_bytes
    if host.cgroup is None or limit is None:
        return NotApplicable(reason="no TCP limit of a version 1 cgroup")
    if goal.role is Role.NAT:
        return NAT_HAS_NO_SOCKETS
    if goal.bytes_queued == 0:
        return NotApplicable(reason="idle sockets are not charged to it; only queued bytes are")
    used = host.cgroup.kmem_tcp_usage_bytes or 0
    each = queued_bytes(goal, host.kernel.page_bytes) * sockets_per_connection(goal)
    return divided(limit - used, each, f"{limit:,} B - {used:,} B in use", f"{each:,} B queued")


def _cgroup_v1_tcp_use(host: Host) -> tuple[Usage, ...]:
    cgroup = host.cgroup
    if cgroup is None or cgroup.kmem_tcp_limit_bytes is None or cgroup.kmem_tcp_usage_bytes is None:
        return ()
    return (Usage(used=cgroup.kmem_tcp_usage_bytes, of=cgroup.kmem_tcp_limit_bytes, unit="bytes of kmem.tcp"),)


def _user_memory(host: Host, goal: Goal) -> Answer:
    if goal.user_bytes == 0:
        return NotApplicable(reason="the goal says nothing of the program's own memory")
    available = host.machine.memory_available_bytes
    if available is None:
        return Unknown(reason="the available memory could not be read")
    return divided(
        available * MEMORY_SHARE_PERCENT // 100,
        goal.user_bytes,
        f"{MEMORY_SHARE_PERCENT} % of {available:,} B available",
        f"{goal.user_bytes:,} B of the program alone",
    )


def _closing_memory_use(host: Host) -> tuple[Usage, ...]:
    available, waiting = host.machine.memory_available_bytes, host.sockets.time_wait
    if available is None or waiting is None:
        return ()
    half_open = host.sockets.by_state.get("SYN_RECV", 0)
    used = waiting * TIME_WAIT_BYTES + half_open * REQUEST_BYTES
    return (Usage(used=used, of=available, unit="bytes for TIME_WAIT and half-open connections"),)


LIMITS = (
    Limit(
        id="C1",
        name="kernel-memory",
        title="Kernel memory of a connection",
        scope=Scope.HOST,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "An idle TCP socket with its descriptor takes 3.75 kB of kernel memory that cannot be swapped: the socket"
            " 2,368, its inode 832, file 192, dentry 192, security label, bind buckets. epoll adds 0.2 kB, IPv6 0.13"
            " kB."
        ),
        read=("/proc/slabinfo (root): TCP, TCPv6, sock_inode_cache, filp, dentry", "SUnreclaim in /proc/meminfo"),
        default="3.75 kB per socket on 6.18 with SLUB; 7,473 B for a loopback pair",
        formula=f"{MEMORY_SHARE_PERCENT} % of available memory / bytes per connection; queued bytes count 1.25 times",
        bounds="Clients and servers one socket, a proxy two. A NAT box has none.",
        hit=(
            error("socket", "ENOMEM", rank=1),
            error("socket", "ENOBUFS", "IPv6", rank=1),
            log(r"SLUB: Unable to allocate memory"),
            log(r"Out of memory: Killed process", "the OOM killer"),
        ),
        remedies=(
            in_program("more memory, or fewer sockets per connection: hand a connection over instead of relaying it"),
            in_program("connections without kernel sockets"),
        ),
        since="always; 3.0 kB on 2.6.32",
        side_effects="none",
        sources=("measured, 8,000 loopback pairs on 6.18", "/proc/slabinfo"),
        bound=_kernel_memory,
    ),
    Limit(
        id="C2",
        name="bind-buckets",
        title="Bind buckets",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "Each port in use has a bucket of 128 B, and from 6.1 each port and address another. With many source"
            " addresses a client may need one per connection."
        ),
        read=("/proc/slabinfo: tcp_bind_bucket, tcp_bind2_bucket",),
        default="128 B each",
        formula="memory / 128 B where every connection has a port and address of its own",
        bounds="Clients with several source addresses.",
        hit=(error("connect", "ENOMEM", rank=2), error("bind", "ENOMEM", rank=2)),
        remedies=(in_program("use one port and address for many destinations before taking another"),),
        since="the second table from 6.1",
        side_effects="none",
        sources=("inet_bind2_bucket_create()",),
        bound=_bind_buckets,
    ),
    Limit(
        id="C3",
        name="tcp-buffer-memory",
        title="net.ipv4.tcp_mem",
        scope=Scope.HOST,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "The pages that queued bytes of all TCP sockets may take together. Idle sockets take none: 16,000 of them"
            " added 0 pages; 16 KB unread on each of 2,000 took 4.94 pages each."
        ),
        read=("net.ipv4.tcp_mem (pages: minimum, pressure, maximum)", "mem in /proc/net/sockstat (pages)"),
        default="4.68, 6.25 and 9.37 % of memory: 287,898 383,867 575,796 pages on 24 GiB",
        formula="maximum x page size / (1.25 x bytes queued per connection, in whole pages)",
        bounds=(
            "Connections whose bytes wait to be read or sent. The file is absent in a child namespace, the limit is"
            " not."
        ),
        hit=(
            log(r"TCP: out of memory -- consider tuning tcp_mem"),
            counter("TcpExt.TCPMemoryPressures"),
            counter("TcpExt.TCPMemoryPressuresChrono", "milliseconds under pressure"),
            counter("TcpExt.PruneCalled"),
            counter("TcpExt.RcvPruned"),
            counter("TcpExt.TCPRcvQDrop"),
            counter("TcpExt.TCPAbortOnMemory", rank=60),
            error("send", "ENOBUFS", rank=1),
            error("send", "EAGAIN", rank=9),
        ),
        remedies=(
            set_sysctl(
                "net.ipv4.tcp_mem",
                "1048576 1572864 3145728",
                "raise it, to at most half of the memory on a machine that does nothing else",
                risk="the memory cannot be swapped",
            ),
            in_program("smaller buffers (C4), and read what arrives"),
        ),
        since="always",
        side_effects="under pressure windows shrink for everybody",
        sources=("tcp_init_mem(), __sk_mem_raise_allocated()",),
        bound=_tcp_mem,
        usage=_tcp_mem_use,
    ),
    Limit(
        id="C4",
        name="socket-buffers",
        title="net.ipv4.tcp_rmem and tcp_wmem",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "Minimum, default and maximum of a socket's buffers. Nothing is allocated beforehand; they bound what a"
            " single busy or stuck connection may hold."
        ),
        read=("net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
        default="rmem 4096 131072 6 MiB up to 6.12, 32 MiB on 6.18; wmem 4096 16384 4 MiB",
        formula="connections x average queued; at worst connections x (rmem maximum + wmem maximum)",
        bounds="Every role with traffic.",
        hit=(symptom("as C1 and C3"),),
        remedies=(
            set_sysctl(
                "net.ipv4.tcp_rmem",
                "4096 16384 1048576",
                "small maxima for millions of mostly idle connections",
                risk="less throughput on long fat paths",
            ),
            set_sysctl("net.ipv4.tcp_wmem", "4096 16384 1048576", "the same for sending"),
        ),
        since="always; a new namespace copies the first one's values",
        side_effects="throughput",
        sources=("tcp_init()", "ip-sysctl"),
        check=_receive_maximum,
    ),
    Limit(
        id="C5",
        name="buffer-maxima",
        title="net.core.rmem_max, wmem_max, optmem_max",
        scope=Scope.HOST,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "Cap what a program may ask for by SO_RCVBUF and SO_SNDBUF, and memory for ancillary data. They bound no"
            " connections unless the program sets large buffers; setting SO_RCVBUF also ends automatic tuning."
        ),
        read=("net.core.rmem_max", "net.core.wmem_max", "net.core.optmem_max"),
        default="4,194,304 on 6.18, 212,992 before; optmem_max 131,072",
        formula="as C4 with the explicit size",
        bounds="Programs that set buffer sizes.",
        hit=(symptom("getsockopt says less than was set"),),
        remedies=(
            set_sysctl("net.core.rmem_max", "4194304", "raise the cap"),
            in_program("do not set buffer sizes"),
        ),
        since="always; rmem_max and wmem_max are read-only in a child namespace",
        side_effects="none",
        sources=("sk_setsockopt()",),
        check=at_least("net.core.rmem_max", 212_992, "programs get smaller receive buffers than they ask for"),
    ),
    Limit(
        id="C6",
        name="memory-cgroup",
        title="memory.max of the cgroup",
        scope=Scope.CGROUP,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "Socket structures, inodes, files, epoll items, bind buckets and queued bytes are charged to the cgroup"
            " of the program. Accepted sockets are charged only from 6.12 on, so that an upgrade moves the same"
            " server 2.4 kB per connection closer to its limit. The tightest limit on the way to the root binds."
        ),
        read=(
            "memory.max, memory.current, memory.stat (sock, slab, kernel), memory.events, in each cgroup up to the"
            " root",
        ),
        default="max: none",
        formula="(memory.max - use that cannot be reclaimed) / bytes per connection",
        bounds=(
            "Every role that has sockets. Measured in a version 1 cgroup with room for 9,839 connections of a client:"
            " the kernel killed it at 9,589."
        ),
        hit=(
            log(r"Memory cgroup out of memory"),
            counter("cgroup.memory_max", "the limit was met and memory reclaimed", breaks=False),
            counter("cgroup.memory_oom_kill"),
            counter("cgroup.memory_failcnt", "version 1", breaks=False),
            error("socket", "ENOMEM", rank=2),
            error("socket", "ENOBUFS", rank=2),
        ),
        remedies=(
            Remedy(
                text="raise it, or give the program a slice of its own",
                command="systemctl set-property SERVICE MemoryMax=16G",
                persist="the property is written to a drop-in",
            ),
        ),
        since="4.5; accepted sockets 6.12",
        side_effects="under pressure the windows of its sockets are clamped; TCP has no counter for it",
        sources=("mem_cgroup_charge_skmem(), kmem_cache_charge() in accept", "admin-guide/cgroup-v2.rst"),
        bound=_memory_cgroup,
        usage=_memory_cgroup_use,
    ),
    Limit(
        id="C7",
        name="memory-cgroup-v1-tcp",
        title="memory.kmem.tcp of a version 1 cgroup",
        scope=Scope.CGROUP,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why="A limit of its own for TCP buffers in version 1 cgroups, still there with CONFIG_MEMCG_V1.",
        read=("memory.kmem.tcp.limit_in_bytes, .usage_in_bytes, .failcnt",),
        default="unlimited",
        formula="(limit - use) / (1.25 x bytes queued per connection, in whole pages)",
        bounds=(
            "Connections whose bytes wait, in that cgroup. Measured: 4 MiB hold 204 queues of 16 KiB that came in"
            " segments of 1,460 B. The first segment of a queue is taken whatever the limit says."
        ),
        hit=(symptom("sends stall; memory.kmem.tcp.failcnt grows, on 6.18 no more: usage_in_bytes is at the limit"),),
        remedies=(
            Remedy(
                text="lift it, or move to version 2",
                command="echo -1 > /sys/fs/cgroup/memory/GROUP/memory.kmem.tcp.limit_in_bytes",
                persist="a oneshot unit: the file system forgets it at boot",
            ),
        ),
        since="3.3",
        side_effects="none",
        sources=("mm/memcontrol-v1.c",),
        bound=_cgroup_v1_tcp,
        usage=_cgroup_v1_tcp_use,
    ),
    Limit(
        id="C8",
        name="reclaim",
        title="Free pages for packets in interrupts",
        scope=Scope.HOST,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.ADVICE,
        why=(
            "Memory for incoming segments is taken without waiting. When few pages are free these allocations fail"
            " first, although much could be reclaimed."
        ),
        read=("MemAvailable", "vm.min_free_kbytes", "vm.overcommit_memory"),
        default="67,584 kB on 24 GiB",
        formula="none",
        bounds="Rates on fast links.",
        hit=(
            log(r"page allocation failure: order:0, mode:.*GFP_ATOMIC"),
            counter("TcpExt.TCPBacklogDrop", "or a slow reader"),
            counter("TcpExt.ListenDrops", rank=60),
            error("socket", "ENOMEM", rank=3),
            error("socket", "ENOBUFS", rank=3),
        ),
        remedies=(
            set_sysctl("vm.min_free_kbytes", "262144", "keep more pages free on machines with 10 Gbit/s and more"),
        ),
        since="always",
        side_effects="less memory for the rest",
        sources=("general knowledge",),
    ),
    Limit(
        id="C9",
        name="program-memory",
        title="The program's own memory of a connection",
        scope=Scope.PROCESS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "What the program keeps. Measured with CPython 3.11: a bare descriptor 60 B, a socket object 125 B, an"
            " asyncio protocol 1.8 kB, asyncio streams 3.5 kB, with a waiting task 4.7 kB, uvloop 1.5 and 3.2 kB,"
            " aiohttp 3.2 kB."
        ),
        read=("VmRSS in /proc/PID/status",),
        default="as programmed",
        formula="memory / bytes of the program per connection, together with C1",
        bounds="Every role with a program.",
        hit=(log(r"Out of memory: Killed process", "the OOM killer", rank=60),),
        remedies=(
            in_program("keep one small record per connection; give buffers only to connections that have bytes"),
        ),
        since="always",
        side_effects="TLS adds tens of kB unless buffers are released (not verified)",
        sources=("measured",),
        bound=_user_memory,
    ),
    Limit(
        id="C10",
        name="closing-memory",
        title="Memory of half-open and closing connections",
        scope=Scope.HOST,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why="A half-open connection takes 320 B, one in TIME_WAIT 256 B. Small beside C1, but part of the slab.",
        read=("/proc/slabinfo: request_sock_TCP, tw_sock_TCP",),
        default="320 B and 256 B",
        formula="rate x 60 s x 256 B",
        bounds="Nothing before C1 does.",
        hit=(symptom("none of its own"),),
        remedies=(in_program("none is needed"),),
        since="always",
        side_effects="none",
        sources=("measured on 6.18",),
        usage=_closing_memory_use,
    ),
    Limit(
        id="C11",
        name="ipv6-route-cache",
        title="net.ipv6.route.max_size",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why=(
            "Old kernels kept at most 4,096 IPv6 destinations at once. In 6.1 and later it is practically unlimited."
            " IPv4 has had no route cache since 3.6."
        ),
        read=("net.ipv6.route.max_size",),
        default="4096 in old kernels, 2,147,483,647 in 6.1.192 and 6.12",
        formula="distinct IPv6 destinations",
        bounds="Clients to many IPv6 destinations on old kernels.",
        hit=(
            log(r"Route cache is full: consider increasing sysctl net\.ipv6\.route\.max_size"),
            error("connect", "ENETUNREACH", "old kernels", rank=20),
        ),
        remedies=(set_sysctl("net.ipv6.route.max_size", "2147483647", "raise it"),),
        since="bounded in old kernels only",
        side_effects="none",
        sources=("net/ipv6/route.c",),
        check=at_least("net.ipv6.route.max_size", 1_048_576, "connections to many IPv6 destinations fail"),
    ),
    Limit(
        id="C12",
        name="tcp-metrics",
        title="TCP metrics and peer records",
        scope=Scope.HOST,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.SOURCE,
        why="Caches of what was learned about destinations. They are reclaimed and bound no connections.",
        read=("ip tcp_metrics show", "net.ipv4.inet_peer_threshold"),
        default="hash sized at boot; peer threshold 65,664",
        formula="none",
        bounds="Nothing.",
        hit=(symptom("none"),),
        remedies=(set_sysctl("net.ipv4.tcp_no_metrics_save", "1", "spare the memory on machines that make load"),),
        since="always",
        side_effects="new connections start without what was learned",
        sources=("net/ipv4/tcp_metrics.c, inetpeer.c",),
    ),
)
