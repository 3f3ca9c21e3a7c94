"""Writes the six constructed hosts beside this file; `--check` only compares. Run after a change of the `Host` model.

Decides nothing of its own: each number is a documented default or follows from one, and the document stands beside it.
A constructed host says so in its file. `recorded.json` is not made here: it was saved on a real machine, names removed.
"""

from __future__ import annotations

import sys
from ipaddress import ip_address
from pathlib import Path

from fourtuple.facts import (
    Address,
    Cgroup,
    Conntrack,
    Flow,
    Host,
    IoUring,
    Isolation,
    Kernel,
    Listener,
    Machine,
    Process,
    RLimit,
    Sockets,
    SourceNat,
)
from fourtuple.tuples import Endpoint

HERE = Path(__file__).parent
GIBIBYTE = 1 << 30
ABSENT_IN_CHILD = "a limit of the whole host, not shown in this network namespace"

KERNEL_DEFAULTS = {
    # Documentation/networking/ip-sysctl.rst
    "net.ipv4.ip_local_port_range": "32768 60999",
    "net.ipv4.ip_local_reserved_ports": "",
    "net.ipv4.ip_unprivileged_port_start": "1024",
    "net.ipv4.ip_autobind_reuse": "0",
    "net.ipv4.ip_nonlocal_bind": "0",
    "net.ipv4.ip_forward": "0",
    "net.ipv4.tcp_abort_on_overflow": "0",
    "net.ipv4.tcp_fastopen": "1",
    "net.ipv4.tcp_fin_timeout": "60",
    "net.ipv4.tcp_keepalive_intvl": "75",
    "net.ipv4.tcp_keepalive_probes": "9",
    "net.ipv4.tcp_keepalive_time": "7200",
    "net.ipv4.tcp_orphan_retries": "0",
    "net.ipv4.tcp_retries2": "15",
    "net.ipv4.tcp_syn_retries": "6",
    "net.ipv4.tcp_synack_retries": "5",
    "net.ipv4.tcp_syncookies": "1",
    "net.ipv4.tcp_timestamps": "1",
    "net.ipv4.tcp_tw_reuse": "2",
    "net.ipv4.tcp_rmem": "4096 131072 6291456",
    "net.ipv4.tcp_wmem": "4096 16384 4194304",
    "net.ipv4.neigh.default.gc_thresh1": "128",
    "net.ipv4.neigh.default.gc_thresh2": "512",
    "net.ipv4.neigh.default.gc_thresh3": "1024",
    "net.ipv6.conf.all.disable_ipv6": "0",
    # Documentation/admin-guide/sysctl/net.rst
    "net.core.netdev_budget": "300",
    "net.core.netdev_max_backlog": "1000",
    "net.core.rmem_max": "212992",
    "net.core.wmem_max": "212992",
    "net.core.somaxconn": "4096",
    # Documentation/admin-guide/sysctl/fs.rst
    "fs.nr_open": "1048576",
    # Documentation/admin-guide/sysctl/vm.rst
    "vm.max_map_count": "65530",
}
AT_24_GIB = {
    # Computed at boot from memory; ip-sysctl.rst, epoll(7), fs.rst give the rules.
    "net.ipv4.tcp_mem": "287898 383867 575796",
    "net.ipv4.tcp_max_orphans": "131072",
    "net.ipv4.tcp_max_tw_buckets": "131072",
    "net.ipv4.tcp_max_syn_backlog": "2048",
    "net.ipv4.tcp_ehash_entries": "262144",
    "fs.epoll.max_user_watches": "5491511",
    "fs.file-max": "2466170",
    "kernel.threads-max": "192730",
    "kernel.pid_max": "4194304",
    "user.max_net_namespaces": "96365",
}
SYSTEMD = {
    # systemd NEWS 240: fs.nr_open and fs.file-max are raised at boot.
    "fs.nr_open": "1073741816",
    "fs.file-max": "9223372036854775807",
    "fs.file-nr": "2048 0 9223372036854775807",
}
MODERN = {
    "bind_address_no_port": True,
    "bound_inactive": True,
    "ipv6": True,
    "ipv6_freebind": True,
    "local_port_range": True,
    "local_port_range_searches_all": True,
}
LOOPBACK = Address(interface="lo", address="127.0.0.1", prefix_length=8)
NO_ROOT = {"nft": "nft cannot list the rules: needs CAP_NET_ADMIN"}


def process(soft: int, hard: int, *, name: str, opened: int = 3, uid: int = 1000, tasks: int = 96_365) -> Process:
    """A process with NOFILE limits; the other limits as getrlimit(2) and fork_init() have them."""
    return Process(
        pid=1000,
        name=name,
        rlimits={
            "NOFILE": RLimit(soft=soft, hard=hard),
            "NPROC": RLimit(soft=tasks, hard=tasks),
            "MEMLOCK": RLimit(soft=8 << 20, hard=8 << 20),
        },
        open_descriptors=opened,
        threads=1,
        effective_uid=uid,
    )


def machine(gibibytes: int, cpus: int) -> Machine:
    """Memory with one sixteenth of it in use."""
    total = gibibytes * GIBIBYTE
    return Machine(
        cpus=cpus,
        memory_total_bytes=total,
        memory_available_bytes=total // 16 * 15,
        slab_unreclaimable_bytes=total // 256,
    )


def stock_distribution() -> Host:
    """A server distribution as installed: nothing tuned, a shell that systemd started, nobody tracks connections."""
    return Host(
        label="stock distribution, 24 GiB: systemd-system.conf(5) (NOFILE 1024:524288), ip-sysctl.rst defaults",
        origin="constructed",
        kernel=Kernel(release="6.12.48-generic", version=(6, 12, 48), architecture="x86_64"),
        machine=machine(24, 8),
        process=process(1_024, 524_288, name="bash"),
        isolation=Isolation(initial_network_namespace=True, initial_user_namespace=True, seccomp=False),
        # systemd.resource-control(5): DefaultTasksMax is 15 % of the smaller of pid_max and threads-max.
        cgroup=Cgroup(version=2, path="/user.slice/user-1000.slice/session-1.scope", pids_max=28_909, pids_current=12),
        sysctl=KERNEL_DEFAULTS | AT_24_GIB | SYSTEMD,
        sockets=Sockets(
            tcp_in_use=2, tcp6_in_use=1, time_wait=0, orphans_host=0, allocated_host=4, memory_pages_host=1
        ),
        addresses=(LOOPBACK, Address(interface="eth0", address="192.0.2.20", prefix_length=24)),
        listeners=(Listener(local=Endpoint(ip_address("0.0.0.0"), 22), queue=0, backlog=128),),
        poisoned_ports=(),
        conntrack=Conntrack(loaded=False, active=False),
        io_uring=IoUring(available=True, direct_descriptors=True, multishot=True),
        features=MODERN,
        counters={"TcpExt.ListenOverflows": 0, "TcpExt.ListenDrops": 0, "softnet.dropped": 0},
        unread=NO_ROOT,
    )


def tuned_server() -> Host:
    """What tuning guides arrive at: every knob they name is raised, and NOFILE is two million."""
    raised = {
        "net.ipv4.ip_local_port_range": "1024 65535",
        "net.core.somaxconn": "65535",
        "net.core.netdev_max_backlog": "16384",
        "net.ipv4.tcp_max_syn_backlog": "65535",
        "net.ipv4.tcp_tw_reuse": "1",
        "net.ipv4.tcp_mem": "767700 1023600 1535400",
        "net.ipv4.tcp_max_orphans": "262144",
        "net.ipv4.tcp_max_tw_buckets": "2000000",
        "fs.nr_open": "4194304",
        "fs.epoll.max_user_watches": "20000000",
    }
    return Host(
        label="tuned server, 64 GiB: ip-sysctl.rst settings as guides raise them, systemd.exec(5) LimitNOFILE=2000000",
        origin="constructed",
        kernel=Kernel(release="6.12.48-generic", version=(6, 12, 48), architecture="x86_64"),
        machine=machine(64, 32),
        process=process(2_000_000, 2_000_000, name="proxy", opened=40),
        isolation=Isolation(initial_network_namespace=True, initial_user_namespace=True, seccomp=False),
        cgroup=Cgroup(version=2, path="/system.slice/proxy.service", pids_max=77_094, pids_current=33),
        sysctl=KERNEL_DEFAULTS | AT_24_GIB | SYSTEMD | raised,
        sockets=Sockets(
            tcp_in_use=3, tcp6_in_use=0, time_wait=0, orphans_host=0, allocated_host=6, memory_pages_host=2
        ),
        addresses=(LOOPBACK, Address(interface="eth0", address="192.0.2.30", prefix_length=24)),
        # A guide that widens the range to 1024 and forgets to reserve its own port loses it (catalogue A2, A8).
        listeners=(Listener(local=Endpoint(ip_address("0.0.0.0"), 8443), queue=0, backlog=65_535),),
        poisoned_ports=((8443, 8443),),
        conntrack=Conntrack(loaded=False, active=False),
        io_uring=IoUring(available=True, direct_descriptors=True, multishot=True),
        features=MODERN,
        unread=NO_ROOT,
    )


def container() -> Host:
    """A pod: a child network namespace without the host's settings, 2 GiB of memory, the runtime's descriptor limit."""
    hidden: tuple[str, ...] = (
        "net.ipv4.tcp_mem",
        "net.ipv4.tcp_max_orphans",
        "net.core.netdev_max_backlog",
        "net.core.netdev_budget",
    )
    hidden += tuple(f"net.ipv4.neigh.default.gc_thresh{level}" for level in (1, 2, 3))
    shown = {name: text for name, text in (KERNEL_DEFAULTS | AT_24_GIB | SYSTEMD).items() if name not in hidden}
    return Host(
        label="container, memory.max 2 GiB: cgroup-v2.rst, network_namespaces(7), containerd unit LimitNOFILE=1048576",
        origin="constructed",
        kernel=Kernel(release="6.12.48-generic", version=(6, 12, 48), architecture="x86_64"),
        machine=machine(24, 2),
        process=process(1_048_576, 1_048_576, name="app", opened=8),
        isolation=Isolation(
            container="kubernetes", initial_network_namespace=False, initial_user_namespace=True, seccomp=True
        ),
        cgroup=Cgroup(
            version=2,
            path="/",
            memory_max_bytes=2 * GIBIBYTE,
            memory_current_bytes=200 << 20,
            memory_reclaimable_bytes=0,
            memory_socket_bytes=0,
            pids_max=4_096,
            pids_current=5,
        ),
        # The table of a child that shares the host's shows as negative (catalogue F1).
        sysctl=shown | {"net.ipv4.tcp_ehash_entries": "-262144"},
        sockets=Sockets(
            tcp_in_use=1, tcp6_in_use=0, time_wait=0, orphans_host=3, allocated_host=900, memory_pages_host=107
        ),
        addresses=(LOOPBACK, Address(interface="eth0", address="10.244.1.17", prefix_length=24)),
        poisoned_ports=(),
        conntrack=Conntrack(loaded=False, active=False),
        io_uring=IoUring(
            available=False, reason="refused: kernel.io_uring_disabled, or a seccomp filter of the container"
        ),
        features=MODERN,
        unread=NO_ROOT | dict.fromkeys(hidden, ABSENT_IN_CHILD),
    )


def old_kernel() -> Host:
    """Linux 4.18 with the limits that the kernel itself sets: NOFILE 1024:4096, an accept queue of 128."""
    before_its_time = ("net.ipv4.tcp_ehash_entries", "net.ipv4.ip_autobind_reuse")
    older = {name: text for name, text in (KERNEL_DEFAULTS | AT_24_GIB).items() if name not in before_its_time}
    older |= {
        # ip-sysctl.rst: 128 before 5.4, tcp_tw_reuse 0 before 4.19; tcp(7): the receive buffer's default before 4.20.
        "net.core.somaxconn": "128",
        "net.ipv4.tcp_tw_reuse": "0",
        "net.ipv4.tcp_rmem": "4096 87380 6291456",
        "fs.file-nr": "1024 0 2466170",
    }
    absent = "absent: this kernel does not have it, or not in this configuration"
    return Host(
        label="old kernel, 24 GiB: getrlimit(2) and INR_OPEN_MAX 1024:4096, ip-sysctl.rst of 4.18 (somaxconn 128)",
        origin="constructed",
        kernel=Kernel(release="4.18.0-553.el8.x86_64", version=(4, 18, 0), architecture="x86_64"),
        machine=machine(24, 8),
        process=process(1_024, 4_096, name="java", opened=96),
        isolation=Isolation(initial_network_namespace=True, initial_user_namespace=True, seccomp=False),
        cgroup=Cgroup(version=1, path="/system.slice/java.service"),
        sysctl=older,
        sockets=Sockets(
            tcp_in_use=9, tcp6_in_use=0, time_wait=0, orphans_host=0, allocated_host=12, memory_pages_host=4
        ),
        addresses=(LOOPBACK, Address(interface="eth0", address="192.0.2.40", prefix_length=24)),
        listeners=(Listener(local=Endpoint(ip_address("0.0.0.0"), 8080), queue=0, backlog=100),),
        # IP_LOCAL_PORT_RANGE came with 6.3, so that ports cannot be probed; no listener lies in the range.
        poisoned_ports=(),
        conntrack=Conntrack(loaded=False, active=False),
        io_uring=IoUring(available=False, reason="this kernel has none, or a seccomp filter hides it"),
        features={
            "bind_address_no_port": True,
            "bound_inactive": False,
            "ipv6": True,
            "ipv6_freebind": True,
            "local_port_range": False,
        },
        unread={
            "poisoned_ports": (
                "not to be probed on this kernel: Protocol not available: "
                "otherwise only listeners and bound sockets are counted"
            ),
        }
        | dict.fromkeys(before_its_time, absent),
    )


def nat_box() -> Host:
    """A router with one public address that masquerades a private network, its table a third full."""
    return Host(
        label="NAT box, 8 GiB: nf_conntrack-sysctl.rst (262,144 entries above 4 GiB), nft(8) masquerade",
        origin="constructed",
        kernel=Kernel(release="6.12.48-generic", version=(6, 12, 48), architecture="x86_64"),
        machine=machine(8, 4),
        process=process(1_024, 524_288, name="sh", uid=0),
        isolation=Isolation(initial_network_namespace=True, initial_user_namespace=True, seccomp=False),
        cgroup=Cgroup(version=2, path="/init.scope"),
        sysctl=KERNEL_DEFAULTS
        | AT_24_GIB
        | SYSTEMD
        | {
            "net.ipv4.ip_forward": "1",
            "net.netfilter.nf_conntrack_max": "262144",
            "net.netfilter.nf_conntrack_buckets": "262144",
            "net.netfilter.nf_conntrack_count": "87000",
            "net.netfilter.nf_conntrack_tcp_timeout_established": "432000",
            "net.netfilter.nf_conntrack_tcp_timeout_time_wait": "120",
        },
        sockets=Sockets(
            tcp_in_use=2, tcp6_in_use=0, time_wait=0, orphans_host=0, allocated_host=4, memory_pages_host=1
        ),
        addresses=(
            LOOPBACK,
            Address(interface="wan", address="203.0.113.7", prefix_length=24),
            Address(interface="lan", address="10.0.0.1", prefix_length=16),
        ),
        poisoned_ports=(),
        conntrack=Conntrack(loaded=True, active=True, count=87_000, maximum=262_144, buckets=262_144),
        source_nat=(SourceNat(table="ip nat postrouting", rule="masquerade", addresses=0),),
        io_uring=IoUring(available=True, direct_descriptors=True, multishot=True),
        features=MODERN,
        counters={"conntrack.drop": 0, "conntrack.insert_failed": 0, "conntrack.early_drop": 0},
    )


def exhausted_client() -> Host:
    """A client that closes first and has one destination: nearly all its ports are taken, two thirds by TIME_WAIT."""
    destination = Endpoint(ip_address("198.51.100.10"), 443)
    return Host(
        label="exhausted client, 24 GiB: ip-sysctl.rst range, tcp(7) TIME_WAIT of 60 s, LimitNOFILE=65536",
        origin="constructed",
        kernel=Kernel(release="6.12.48-generic", version=(6, 12, 48), architecture="x86_64"),
        machine=machine(24, 8),
        process=process(65_536, 65_536, name="crawler", opened=8_140),
        isolation=Isolation(initial_network_namespace=True, initial_user_namespace=True, seccomp=False),
        cgroup=Cgroup(version=2, path="/system.slice/crawler.service", pids_max=28_909, pids_current=4),
        sysctl=KERNEL_DEFAULTS | AT_24_GIB | SYSTEMD,
        sockets=Sockets(
            tcp_in_use=8_133,
            tcp6_in_use=0,
            time_wait=20_000,
            orphans_host=0,
            allocated_host=8_133,
            memory_pages_host=12,
            by_state={"BOUND_INACTIVE": 30, "ESTABLISHED": 8_100, "LISTEN": 3, "TIME_WAIT": 20_000},
        ),
        flows=(Flow(source="192.0.2.50", destination=destination, connections=28_100),),
        addresses=(LOOPBACK, Address(interface="eth0", address="192.0.2.50", prefix_length=24)),
        listeners=tuple(
            Listener(local=Endpoint(ip_address("127.0.0.1"), port), queue=0, backlog=4_096) for port in (35_001, 41_000)
        ),
        # Two listeners, and thirty ports that an agent has bound and not connected.
        poisoned_ports=((35_001, 35_001), (41_000, 41_000), (50_000, 50_029)),
        conntrack=Conntrack(loaded=False, active=False),
        io_uring=IoUring(available=True, direct_descriptors=True, multishot=True),
        features=MODERN,
        counters={"TcpExt.TCPTimeWaitOverflow": 0, "TcpExt.TW": 900_000},
        unread=NO_ROOT,
    )


CONSTRUCTED = (stock_distribution, tuned_server, container, old_kernel, nat_box, exhausted_client)


def main() -> int:
    """Write the files, or with --check say which differ."""
    stale = []
    for make in CONSTRUCTED:
        path = HERE / f"{make.__name__}.json"
        text = make().model_dump_json(indent=1) + "\n"
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"stale: {', '.join(stale)}; run python tests/hosts/construct.py")
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
