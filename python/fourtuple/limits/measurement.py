"""Family L: what can be seen of connections, what looking costs, and which numbers mislead.

Decides nothing about connections; it keeps a diagnosis honest.
"""

from __future__ import annotations

from fourtuple.facts import Host
from fourtuple.limits._model import Check, Evidence, Kind, Limit, Remedy, Scope, error, in_program, symptom
from fourtuple.limits._terms import OBSERVER_BYTES_PER_DESCRIPTOR

DUMP_US_PER_SOCKET = 0.8
DUMP_BYTES_PER_SOCKET = 124
DUMP_SLOW_SOCKETS = 1_000_000
OBSERVER_DESCRIPTORS = 100_000


def _host_wide(host: Host) -> Check | None:
    initial = host.isolation.initial_network_namespace
    if initial is None:
        return None
    return Check(
        setting="network namespace",
        found="the first one" if initial else "a child",
        wanted="the first one, to read orphan, alloc and mem as this namespace's",
        holds=initial,
        meaning="orphan, alloc and mem in /proc/net/sockstat are the whole host's, inuse and tw this namespace's",
    )


def _dump_cost(host: Host) -> Check | None:
    sockets = host.sockets.tcp_in_use
    if sockets is None:
        return None
    total = sockets + (host.sockets.tcp6_in_use or 0) + (host.sockets.time_wait or 0)
    seconds = total * DUMP_US_PER_SOCKET / 1e6
    return Check(
        setting="sockets to list",
        found=f"{total:,}: about {seconds:.1f} s and {total * DUMP_BYTES_PER_SOCKET:,} B for one dump",
        wanted=f"<= {DUMP_SLOW_SOCKETS:,}",
        holds=total <= DUMP_SLOW_SOCKETS,
        meaning="list by state, leave at least five times the dump between two, never with processes (ss -p)",
    )


def _observer(host: Host) -> Check | None:
    used = host.process.open_descriptors
    if used is None:
        return None
    return Check(
        setting=f"descriptors of process {host.process.pid}",
        found=f"{used:,}: listing /proc/{host.process.pid}/fd makes {used * OBSERVER_BYTES_PER_DESCRIPTOR:,} B of slab",
        wanted=f"<= {OBSERVER_DESCRIPTORS:,}, or no monitor that lists them",
        holds=used <= OBSERVER_DESCRIPTORS,
        meaning="a monitoring daemon that walks it costs more memory than the epoll items of the sockets",
    )


LIMITS = (
    Limit(
        id="L1",
        name="sockstat-scope",
        title="What /proc/net/sockstat counts",
        scope=Scope.NETNS,
        kind=Kind.MEASUREMENT,
        evidence=Evidence.MEASURED,
        why=(
            "inuse and tw are of the network namespace; orphan, alloc and mem are of the whole host, even when read"
            " inside: a namespace with no socket showed alloc 9 and mem 107. sockstat6 has inuse only."
        ),
        read=("/proc/net/sockstat", "/proc/net/sockstat6"),
        default="as described",
        formula="none",
        bounds="What can be concluded inside a container.",
        hit=(symptom("memory in use where there is no socket"),),
        remedies=(in_program("count by sock_diag inside the namespace"),),
        since="always",
        side_effects="none",
        sources=("sockstat_seq_show() in net/ipv4/proc.c", "measured on 6.18"),
        check=_host_wide,
    ),
    Limit(
        id="L2",
        name="dump-cost",
        title="What listing sockets costs",
        scope=Scope.HOST,
        kind=Kind.MEASUREMENT,
        evidence=Evidence.MEASURED,
        why=(
            "Per socket: sock_diag 0.8 us and 124 B, with tcp_info 1.2 us and 408 B, /proc/net/tcp 3 us, ss -tn 4 us,"
            " ss -p 20 us because it walks every /proc/PID/fd. A filter in the kernel saves the copy, not the walk; a"
            " dump of nothing walks 262,144 buckets in 2 ms."
        ),
        read=("sock_diag",),
        default="as measured",
        formula="2 million sockets: 1.7 s of processor time, 248 MB of messages",
        bounds="How often a monitor may look.",
        hit=(symptom("a monitor that uses a processor by itself"),),
        remedies=(
            Remedy(
                text="list one state only",
                command="ss -tn state established",
                persist="does not persist: it only reads",
            ),
            in_program(
                "a BPF iter/tcp program that counts in the kernel, or the socket-destroy multicast of sock_diag"
            ),
        ),
        since="sock_diag 3.3; iter/tcp 5.9",
        side_effects="bucket locks are held while their sockets are copied",
        sources=("inet_diag_dump_icsk()", "measured with 18,000 sockets"),
        check=_dump_cost,
    ),
    Limit(
        id="L3",
        name="observer-memory",
        title="Listing /proc/PID/fd takes memory",
        scope=Scope.HOST,
        kind=Kind.MEASUREMENT,
        evidence=Evidence.MEASURED,
        why=(
            "Each entry that is listed gets an inode and a directory entry, about 0.9 kB of slab that can be"
            " reclaimed: 0.9 GB for a process with a million descriptors."
        ),
        read=("SReclaimable in /proc/meminfo",),
        default="as measured",
        formula="0.9 kB x descriptors",
        bounds="Memory that C1 counts on.",
        hit=(symptom("slab grows when a monitoring daemon starts"),),
        remedies=(in_program("read FDSize, or the size of /proc/PID/fd by stat (6.2 and later), instead of listing"),),
        since="always",
        side_effects="none",
        sources=("proc_fd_instantiate()", "measured"),
        check=_observer,
    ),
    Limit(
        id="L4",
        name="no-counter",
        title="Failing for want of a port is counted nowhere",
        scope=Scope.NETNS,
        kind=Kind.MEASUREMENT,
        evidence=Evidence.MEASURED,
        why=(
            "100 connects that failed with EADDRNOTAVAIL moved no counter in /proc/net/snmp or /proc/net/netstat, not"
            " even AttemptFails. Only the caller knows, or who counts the tuples."
        ),
        read=("strace", "a kretprobe on __inet_hash_connect (-99)", "the number of tuples per source and destination"),
        default="none",
        formula="distance to exhaustion = port term - tuples in use",
        bounds="What monitoring can see.",
        hit=(error("connect", "EADDRNOTAVAIL", "and no counter moves", rank=40),),
        remedies=(in_program("watch connections per source and destination against the port term"),),
        since="always",
        side_effects="none",
        sources=("measured on 6.18",),
    ),
    Limit(
        id="L5",
        name="snapshot-races",
        title="A listing is not one moment",
        scope=Scope.NETNS,
        kind=Kind.MEASUREMENT,
        evidence=Evidence.MEASURED,
        why=(
            "Sockets move while they are listed: expect a tenth of a percent more or less, and duplicates. Half-open"
            " requests are listed apart, and a socket bound with IP_BIND_ADDRESS_NO_PORT is invisible before"
            " connect()."
        ),
        read=("sock_diag",),
        default="as described",
        formula="0.1 %",
        bounds="The precision of counts.",
        hit=(symptom("two listings that differ"),),
        remedies=(in_program("remove duplicates by cookie; compare only differences above a tenth of a percent"),),
        since="always",
        side_effects="none",
        sources=("inet_diag_dump_icsk()", "measured"),
    ),
)
