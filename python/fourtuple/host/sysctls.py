"""The sysctls that the catalogue reads, and what it means when one is absent.

Decides which settings are facts: a named table, never a whole directory (net.ipv4.tcp_fastopen_key is a secret). Knows
no limit. In a child network namespace some files are absent although their limits still bind (catalogue section 5).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from fourtuple.host.tree import Tree, excerpt, folded

HOST_ONLY = (
    "net.core.netdev_budget",
    "net.core.netdev_budget_usecs",
    "net.core.netdev_max_backlog",
    "net.ipv4.inet_peer_threshold",
    "net.ipv4.neigh.default.gc_thresh1",
    "net.ipv4.neigh.default.gc_thresh2",
    "net.ipv4.neigh.default.gc_thresh3",
    "net.ipv4.tcp_max_orphans",
    "net.ipv4.tcp_mem",
    "net.ipv6.neigh.default.gc_thresh1",
    "net.ipv6.neigh.default.gc_thresh2",
    "net.ipv6.neigh.default.gc_thresh3",
    "net.ipv6.route.max_size",
)
"""Absent in a child network namespace, binding all the same."""

EVERYWHERE = (
    "fs.aio-max-nr",
    "fs.aio-nr",
    "fs.epoll.max_user_watches",
    "fs.file-max",
    "fs.file-nr",
    "fs.inotify.max_user_instances",
    "fs.inotify.max_user_watches",
    "fs.nr_open",
    "kernel.dmesg_restrict",
    "kernel.io_uring_disabled",
    "kernel.pid_max",
    "kernel.threads-max",
    "net.core.optmem_max",
    "net.core.rmem_default",
    "net.core.rmem_max",
    "net.core.somaxconn",
    "net.core.wmem_default",
    "net.core.wmem_max",
    "net.ipv4.ip_autobind_reuse",
    "net.ipv4.ip_forward",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_nonlocal_bind",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_abort_on_overflow",
    "net.ipv4.tcp_challenge_ack_limit",
    "net.ipv4.tcp_child_ehash_entries",
    "net.ipv4.tcp_ehash_entries",
    "net.ipv4.tcp_fastopen",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_max_syn_backlog",
    "net.ipv4.tcp_max_tw_buckets",
    "net.ipv4.tcp_migrate_req",
    "net.ipv4.tcp_mtu_probing",
    "net.ipv4.tcp_no_metrics_save",
    "net.ipv4.tcp_orphan_retries",
    "net.ipv4.tcp_retries2",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syn_linear_timeouts",
    "net.ipv4.tcp_syn_retries",
    "net.ipv4.tcp_synack_retries",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_timestamps",
    "net.ipv4.tcp_tw_reuse",
    "net.ipv4.tcp_tw_reuse_delay",
    "net.ipv4.tcp_wmem",
    "net.ipv6.conf.all.disable_ipv6",
    "net.ipv6.ip_nonlocal_bind",
    "net.unix.max_dgram_qlen",
    "user.max_net_namespaces",
    "user.max_user_namespaces",
    "vm.max_map_count",
    "vm.min_free_kbytes",
    "vm.overcommit_memory",
)

OPTIONAL = (
    "kernel.apparmor_restrict_unprivileged_userns",
    "kernel.unprivileged_userns_clone",
    "net.ipv4.tcp_tw_recycle",
    "net.netfilter.nf_conntrack_buckets",
    "net.netfilter.nf_conntrack_count",
    "net.netfilter.nf_conntrack_max",
    "net.netfilter.nf_conntrack_tcp_loose",
    "net.netfilter.nf_conntrack_tcp_timeout_close",
    "net.netfilter.nf_conntrack_tcp_timeout_close_wait",
    "net.netfilter.nf_conntrack_tcp_timeout_established",
    "net.netfilter.nf_conntrack_tcp_timeout_fin_wait",
    "net.netfilter.nf_conntrack_tcp_timeout_last_ack",
    "net.netfilter.nf_conntrack_tcp_timeout_max_retrans",
    "net.netfilter.nf_conntrack_tcp_timeout_syn_recv",
    "net.netfilter.nf_conntrack_tcp_timeout_syn_sent",
    "net.netfilter.nf_conntrack_tcp_timeout_time_wait",
    "net.netfilter.nf_conntrack_tcp_timeout_unacknowledged",
)
"""Of one distribution, of old kernels, or of a module that may not be loaded: so absence is a fact."""

PER_INTERFACE = ("rp_filter", "arp_ignore", "arp_announce")
MOST_INTERFACES = 256
"""Interfaces whose settings are read one by one; a container host has thousands of them, all alike."""


def read_sysctls(tree: Tree, *, network: bool = True) -> dict[str, str]:
    """Every sysctl of the tables that can be read; without `network`, none of a network namespace."""
    wanted = [(name, "absent: this kernel does not have it, or not in this configuration") for name in EVERYWHERE]
    wanted += [(name, "a limit of the whole host, not shown in this network namespace") for name in HOST_ONLY]
    found: dict[str, str] = {}
    for name, absent in wanted:
        if network or not name.startswith("net."):
            _read(tree, name, found, absent=absent)
    if network:
        for name in (*OPTIONAL, *_interfaces(tree)):
            _read(tree, name, found, absent="")
    return dict(sorted(found.items()))


def is_known(name: str) -> bool:
    """Whether this sysctl is one that is read."""
    return name in (*EVERYWHERE, *HOST_ONLY, *OPTIONAL) or any(
        fnmatchcase(name, f"net.ipv4.conf.*.{setting}") for setting in PER_INTERFACE
    )


def _read(tree: Tree, name: str, found: dict[str, str], *, absent: str) -> None:
    # A dot inside a name, as of the interface eth0.100, is written "/" in dotted form (sysctl(8)).
    path = "proc/sys/" + "/".join(part.replace("/", ".") for part in name.split("."))
    text = tree.text(path, name, absent=absent)
    if text is None:
        return
    if "\ufffd" in text:
        tree.miss(name, f"not text: {excerpt(text)}")
        return
    found[name] = folded(text)


def _interfaces(tree: Tree) -> tuple[str, ...]:
    interfaces = tree.names("proc/sys/net/ipv4/conf")
    if len(interfaces) > MOST_INTERFACES:
        tree.miss("net.ipv4.conf", f"of {len(interfaces):,} interfaces only {MOST_INTERFACES} were read")
        interfaces = tuple(name for name in interfaces if name in ("all", "default")) + interfaces[:MOST_INTERFACES]
    return tuple(
        f"net.ipv4.conf.{interface.replace('.', '/')}.{setting}"
        for interface in interfaces
        for setting in PER_INTERFACE
    )
