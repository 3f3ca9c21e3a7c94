"""Family F: hash tables and their locks. They bound speed, not number, and other defaults are computed from them.

Decides from what number of connections on a lookup costs more.
"""

from __future__ import annotations

from fourtuple.facts import Goal, Host, Role
from fourtuple.limits._model import (
    Bound,
    Check,
    Evidence,
    Kind,
    Limit,
    Remedy,
    Scope,
    Usage,
    in_program,
    log,
    set_sysctl,
    symptom,
)
from fourtuple.limits._terms import (
    HIGHEST_NUMBER,
    NAT_HAS_NO_SOCKETS,
    Answer,
    number,
    sockets_per_connection,
    unread,
)

EHASH = "net.ipv4.tcp_ehash_entries"
CHILD_EHASH = "net.ipv4.tcp_child_ehash_entries"
LISTENERS_SLOW = 10_000

LARGER_HASH = Remedy(
    text="a larger table by boot parameter (8 B per bucket)",
    command="grubby --update-kernel=ALL --args=thash_entries=4194304  # or GRUB_CMDLINE_LINUX and update-grub",
    persist="the boot loader; a reboot is needed",
    risk="tcp_max_orphans, tcp_max_tw_buckets and tcp_max_syn_backlog grow with it",
)


def _buckets(host: Host) -> int | None:
    # A child namespace that shares the host's table reads a negative number (proc_tcp_ehash_entries).
    value = host.sysctl_int(EHASH)
    return abs(value) if value and abs(value) <= HIGHEST_NUMBER else None


def _established(host: Host, goal: Goal) -> Answer:
    if goal.role is Role.NAT:
        return NAT_HAS_NO_SOCKETS
    buckets = _buckets(host)
    if buckets is None:
        return unread(host, EHASH)
    sockets = sockets_per_connection(goal)
    connections = buckets // sockets
    return Bound(
        connections=connections,
        arithmetic=f"{buckets:,} buckets / {sockets} = {connections:,} for an average chain of one",
        kind=Kind.SPEED,
    )


def _established_use(host: Host) -> tuple[Usage, ...]:
    buckets, used = _buckets(host), host.sockets.tcp_in_use
    if buckets is None or used is None:
        return ()
    total = used + (host.sockets.tcp6_in_use or 0) + (host.sockets.time_wait or 0)
    return (Usage(used=total, of=buckets, unit="sockets per bucket of the established hash", breaks=False),)


def _child_table(host: Host) -> Check | None:
    value = number(host, CHILD_EHASH)
    if value is None:
        return None
    return Check(
        setting=CHILD_EHASH,
        found=f"{value:,}",
        wanted="0 (share the host's table), or 65,536 and more",
        holds=value == 0 or value >= 65_536,
        meaning=(
            "new network namespaces get a small table, and small tcp_max_tw_buckets and tcp_max_syn_backlog with it"
        ),
    )


def _listeners(host: Host) -> Check | None:
    if not host.listeners:
        return None
    return Check(
        setting="listening sockets",
        found=f"{len(host.listeners):,}",
        wanted=f"<= {LISTENERS_SLOW:,}",
        holds=len(host.listeners) <= LISTENERS_SLOW,
        meaning=(
            "chains of the listener hash get long; one listener on a wildcard or by sk_lookup serves a whole prefix"
        ),
    )


LIMITS = (
    Limit(
        id="F1",
        name="established-hash",
        title="The established hash",
        scope=Scope.HOST,
        kind=Kind.SPEED,
        evidence=Evidence.MEASURED,
        why=(
            "Every segment is looked up in it. With more connections than buckets the chains grow and each packet"
            " costs more cache misses: 2 million over 524,288 buckets make chains of 3.8, 10 million of 19."
        ),
        read=(
            f"{EHASH} (6.1 and later; negative in a child namespace that shares the host's)",
            "the kernel log at boot",
        ),
        default="one bucket per 128 KiB of memory, less on large machines, at most 524,288; 262,144 on 24 GiB",
        formula="average chain = sockets / buckets",
        bounds="The cost of a packet, not the number of connections.",
        hit=(log(r"TCP: Hash tables configured \(established \d+ bind \d+\)", "at boot, for information"),),
        remedies=(LARGER_HASH,),
        since="readable from 6.1",
        side_effects="three other defaults are computed from it",
        sources=("tcp_init(), alloc_large_system_hash()",),
        bound=_established,
        usage=_established_use,
    ),
    Limit(
        id="F2",
        name="child-hash",
        title="A hash of its own for a network namespace",
        scope=Scope.NETNS,
        kind=Kind.SPEED,
        evidence=Evidence.MEASURED,
        why=(
            "Set in the parent before the namespace is made. The child's table is rounded up to a power of two, and its"
            " tcp_max_tw_buckets and tcp_max_syn_backlog follow: 1,000 gave 1,024, 512 and 128."
        ),
        read=(CHILD_EHASH, EHASH),
        default="0: share the host's table",
        formula="as F1",
        bounds="Speed in that namespace.",
        hit=(symptom("small tcp_max_tw_buckets in a container"),),
        remedies=(set_sysctl(CHILD_EHASH, "0", "share the host's table"),),
        since="6.1",
        side_effects="with its own table a namespace is isolated from the host's chains",
        sources=("tcp_set_hashinfo(), inet_pernet_hashinfo_alloc()",),
        check=_child_table,
    ),
    Limit(
        id="F3",
        name="bind-hash",
        title="The bind hash",
        scope=Scope.HOST,
        kind=Kind.SPEED,
        evidence=Evidence.SOURCE,
        why=(
            "At most 65,536 buckets, one table by port and from 6.1 one by port and address. bind() to a port with many"
            " owners walks them for conflicts."
        ),
        read=("the kernel log at boot: Hash tables configured",),
        default="65,536 on machines with a few GiB",
        formula="owners of a port / addresses",
        bounds="The cost of explicit binds.",
        hit=(symptom("slow bind() with many sockets on one port and address"),),
        remedies=(in_program("IP_BIND_ADDRESS_NO_PORT, or ports chosen one by one (A4)"),),
        since="second table 6.1",
        side_effects="none",
        sources=("inet_csk_bind_conflict()",),
    ),
    Limit(
        id="F4",
        name="hash-locks",
        title="Locks of the established hash",
        scope=Scope.HOST,
        kind=Kind.SPEED,
        evidence=Evidence.SOURCE,
        why="A power of two, about as many as two cache lines hold per processor, at least a page per memory node.",
        read=("not exposed",),
        default="computed at boot from the number of possible processors",
        formula="none",
        bounds="Only very high rates of connect and close.",
        hit=(symptom("spinning in inet_ehash_insert and __inet_check_established"),),
        remedies=(in_program("spread connections over network namespaces with tables of their own (F2)"),),
        since="always",
        side_effects="none",
        sources=("inet_ehash_locks_alloc()",),
    ),
    Limit(
        id="F5",
        name="listener-hash",
        title="The listener hash",
        scope=Scope.HOST,
        kind=Kind.SPEED,
        evidence=Evidence.MEASURED,
        why=(
            "One slot per 2 MiB of memory, at most 65,536: 16,384 on 24 GiB. It matters beyond some ten thousand"
            " listeners."
        ),
        read=("the kernel log at boot: tcp_listen_portaddr_hash hash table entries",),
        default="16,384 on 24 GiB",
        formula="average chain = listeners / slots",
        bounds="The cost of a SYN on hosts with very many listeners.",
        hit=(symptom("system time in __inet_lookup_listener"),),
        remedies=(in_program("one listener for many ports: wildcard, AnyIP, or a BPF sk_lookup program (K3)"),),
        since="2.6.25 in this form",
        side_effects="none",
        sources=("inet_hashinfo2_init()",),
        check=_listeners,
    ),
)
