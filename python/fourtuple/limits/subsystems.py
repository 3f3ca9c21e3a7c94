"""Family K: other subsystems that are in the path, or are mistaken for it.

Decides little: most of these bound something else and are here so that an error is not blamed on the wrong limit.
"""

from __future__ import annotations

from fourtuple.facts import Host
from fourtuple.limits._model import (
    Check,
    Evidence,
    Kind,
    Limit,
    Scope,
    error,
    in_program,
    set_sysctl,
    symptom,
)
from fourtuple.limits._terms import at_least

EPOLL_EVENT_BYTES = 12
EPOLL_ARRAY_LARGE = 200_000


def _epoll_array(host: Host) -> Check | None:
    used = host.process.open_descriptors
    if used is None or not host.process.name.startswith("python"):
        return None
    return Check(
        setting=f"descriptors of process {host.process.pid}",
        found=f"{used:,}, so up to {used * EPOLL_EVENT_BYTES:,} B per turn of its loop",
        wanted=f"<= {EPOLL_ARRAY_LARGE:,} for CPython's own event loop",
        holds=used <= EPOLL_ARRAY_LARGE,
        meaning="selectors asks epoll for as many events as there are descriptors, and allocates for all of them",
    )


def _seccomp(host: Host) -> Check | None:
    if host.isolation.seccomp is None:
        return None
    refused = host.isolation.seccomp and not host.io_uring.available
    return Check(
        setting="seccomp",
        found="a filter" if host.isolation.seccomp else "no filter",
        wanted="none, or one that lets io_uring through",
        holds=not refused,
        meaning="io_uring does not work here, and a filter is in place: descriptors bound every connection",
    )


LIMITS = (
    Limit(
        id="K1",
        name="unix-sockets",
        title="AF_UNIX queues",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "A datagram socket queues net.unix.max_dgram_qlen messages: measured 11, then EAGAIN. A stream listener"
            " queues its backlog + 1: with 2 the fourth non-blocking connect() got EAGAIN at once. Descriptors in"
            " flight over SCM_RIGHTS are bounded by RLIMIT_NOFILE."
        ),
        read=("net.unix.max_dgram_qlen", "ss -xl"),
        default="10",
        formula="none",
        bounds="Proxies that log or hand connections over by AF_UNIX.",
        hit=(
            error("connect", "EAGAIN", "AF_UNIX: the listener's queue is full", rank=1),
            error("send", "EAGAIN", "AF_UNIX datagrams", rank=1),
            error("sendmsg", "ETOOMANYREFS", "too many descriptors in flight", rank=1),
        ),
        remedies=(
            set_sysctl("net.unix.max_dgram_qlen", "512", "raise it"),
            in_program("a larger backlog; receive descriptors faster"),
        ),
        since="always",
        side_effects="memory for queued messages",
        sources=("unix_dgram_sendmsg(), unix_stream_connect()", "unix(7)"),
        check=at_least("net.unix.max_dgram_qlen", 10, "datagram logging blocks or loses messages"),
    ),
    Limit(
        id="K2",
        name="inotify",
        title="inotify instances",
        scope=Scope.USER,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.ADVICE,
        why="Not in the path of connections, but its EMFILE is often taken for a limit on sockets.",
        read=("fs.inotify.max_user_instances",),
        default="128",
        formula="none",
        bounds="Nothing here.",
        hit=(error("inotify_init", "EMFILE", rank=1),),
        remedies=(set_sysctl("fs.inotify.max_user_instances", "1024", "raise it"),),
        since="2.6.13",
        side_effects="none",
        sources=("inotify(7)",),
    ),
    Limit(
        id="K3",
        name="bpf-programs",
        title="BPF programs on sockets",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.ADVICE,
        why=(
            "Programs at connect4, bind4 and sk_lookup can redirect, rewrite or refuse. A sockmap holds max_entries"
            " sockets, which bounds proxies that splice through it. On the other hand sk_lookup lets one socket serve"
            " every port of a prefix."
        ),
        read=("bpftool prog", "bpftool cgroup tree"),
        default="none",
        formula="as programmed",
        bounds="Whatever the program decides.",
        hit=(
            error("connect", "EPERM", rank=1),
            error("bind", "EPERM"),
            error("bpf", "E2BIG", "a sockmap is full"),
        ),
        remedies=(in_program("find the program by bpftool cgroup tree, and who installed it"),),
        since="4.17 for cgroup hooks, 5.9 for sk_lookup",
        side_effects="none",
        sources=("bpf(2)", "Documentation/bpf/prog_sk_lookup.rst"),
    ),
    Limit(
        id="K4",
        name="security-modules",
        title="LSM and seccomp",
        scope=Scope.PROCESS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "Refuse connect, bind or setsockopt by policy: SELinux name_connect and port labels, a seccomp filter."
            " Their labels add 24 B per file and 32 B per inode to C1."
        ),
        read=("/sys/kernel/security/lsm", "Seccomp in /proc/PID/status", "the audit log"),
        default="the distribution's",
        formula="none",
        bounds="Nothing by number.",
        hit=(
            error("connect", "EPERM", rank=2),
            error("connect", "EACCES", rank=1),
            error("bind", "EACCES", "port labels, or a privileged port"),
            error("io_uring_setup", "EPERM", "seccomp", rank=2),
        ),
        remedies=(in_program("read the denial in the audit log and change the policy"),),
        since="always",
        side_effects="none",
        sources=("security_socket_connect()", "seccomp(2)"),
        check=_seccomp,
    ),
    Limit(
        id="K5",
        name="namespaces-per-user",
        title="user.max_net_namespaces and max_user_namespaces",
        scope=Scope.USER,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why="How many network namespaces a user may have. Many namespaces are one way to more tuples (A20).",
        read=("user.max_net_namespaces", "user.max_user_namespaces"),
        default="half of threads-max: 96,365 on 24 GiB",
        formula="none",
        bounds="Labs and containers.",
        hit=(error("unshare", "ENOSPC", rank=1),),
        remedies=(set_sysctl("user.max_net_namespaces", "200000", "raise it"),),
        since="4.9",
        side_effects="none",
        sources=("inc_ucount() in kernel/ucount.c", "namespaces(7)"),
        check=at_least("user.max_net_namespaces", 64, "fourtuple's own lab needs network namespaces"),
    ),
    Limit(
        id="K6",
        name="aio-requests",
        title="fs.aio-max-nr",
        scope=Scope.HOST,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.ADVICE,
        why="Bounds requests of the old asynchronous interface, io_submit. Sockets rarely use it.",
        read=("fs.aio-max-nr", "fs.aio-nr"),
        default="65,536",
        formula="none",
        bounds="Nothing here.",
        hit=(error("io_setup", "EAGAIN", rank=1),),
        remedies=(set_sysctl("fs.aio-max-nr", "1048576", "raise it"),),
        since="2.6",
        side_effects="memory",
        sources=("io_setup(2)",),
    ),
    Limit(
        id="K7",
        name="reuseport-group",
        title="Sockets of a SO_REUSEPORT group",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.ADVICE,
        why="Sockets that share an address and port by SO_REUSEPORT form a group of at most 65,535.",
        read=("ss -ltn",),
        default="65,535",
        formula="none",
        bounds="Listeners of one port.",
        hit=(error("listen", "ENOMEM", rank=1), error("bind", "ENOMEM", rank=3)),
        remedies=(in_program("fewer listeners: one per processor is enough"),),
        since="3.9",
        side_effects="none",
        sources=("reuseport_grow() in net/core/sock_reuseport.c",),
    ),
    Limit(
        id="K8",
        name="lifetime",
        title="How long a connection may live",
        scope=Scope.PEER,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.ADVICE,
        why="TCP has no limit. NAT, connection tracking and load balancers forget idle ones (G3, G6).",
        read=("the timeouts of what is in the path",),
        default="unlimited",
        formula="none",
        bounds="Idle connections through middleboxes.",
        hit=(symptom("resets or silence after a fixed idle time"),),
        remedies=(in_program("keepalive below the shortest timeout (E3)"),),
        since="always",
        side_effects="none",
        sources=("RFC 9293", "RFC 5382"),
    ),
    Limit(
        id="K9",
        name="tls-handshakes",
        title="TLS handshakes",
        scope=Scope.PROCESS,
        kind=Kind.RATE,
        evidence=Evidence.ADVICE,
        why=(
            "A full handshake takes a good part of a millisecond of processor time. It bounds the ramp, not the number."
        ),
        read=("openssl speed",),
        default="about 1,000 to 3,000 per second and core",
        formula="time to connect = connections / (cores x rate)",
        bounds="The rate of servers and clients that speak TLS.",
        hit=(symptom("processors busy in the TLS library"),),
        remedies=(in_program("resume sessions, use ECDSA keys, ramp slowly"),),
        since="always",
        side_effects="none",
        sources=("general knowledge",),
    ),
    Limit(
        id="K10",
        name="cpython-epoll",
        title="CPython asks epoll for everything at once",
        scope=Scope.PROCESS,
        kind=Kind.SPEED,
        evidence=Evidence.SOURCE,
        why=(
            "EpollSelector.select() asks for as many events as descriptors are registered, so that each turn of the"
            " loop allocates 12 B for each: 12 MB at a million."
        ),
        read=("the program",),
        default="on in asyncio",
        formula="12 B x descriptors per turn",
        bounds="Speed of asyncio with very many connections.",
        hit=(symptom("time in memory allocation at each turn of the loop"),),
        remedies=(in_program("a loop outside CPython above some 200,000 connections"),),
        since="3.4",
        side_effects="none",
        sources=("CPython Lib/selectors.py, Modules/selectmodule.c",),
        check=_epoll_array,
    ),
)
