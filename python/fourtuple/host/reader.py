"""One `Host` from everything that can be read of a machine.

Decides the order of reading and what belongs to which process and namespace. Knows no file format: each source has a
module beside this one. Files of a tree that is not "/" are read alone: system calls would speak of another machine.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from fourtuple.errors import BadConfig
from fourtuple.facts import Address, Conntrack, Host, IoUring, Kernel, Machine, Sockets
from fourtuple.host import trials
from fourtuple.host.addresses import MOST_ADDRESSES, read_addresses
from fourtuple.host.cgroups import read_cgroup
from fourtuple.host.counters import read_counters, read_gauges
from fourtuple.host.firewall import Ruleset, read_conntrack, read_rules
from fourtuple.host.namespace import inside_network_of, shares_network
from fourtuple.host.process import read_isolation, read_process, usable_processors
from fourtuple.host.sockdiag import MOST_LISTENERS, MOST_SOCKETS, Census, census
from fourtuple.host.sysctls import read_sysctls
from fourtuple.host.tree import Tree, folded, reason, whole
from fourtuple.tuples import HIGHEST_PORT

_ANOTHER_MACHINE = "this is a copied tree: what system calls would say is not known"


def read_host(
    pid: int | None = None,
    root: Path = Path("/"),
    *,
    probe_ports: bool = True,
    most_sockets: int = MOST_SOCKETS,
    label: str = "",
) -> Host:
    """Read this machine as process `pid` (by default this one) sees it. BadConfig if there is no such process.

    `root` may be a directory with a copied /proc and /sys. `probe_ports` tries each port of the ephemeral range for
    poisoning (A8); without it, only listeners and bound sockets are known. Above `most_sockets` the census stops.
    """
    tree = Tree(root)
    home = "proc/self" if pid is None else f"proc/{pid}"
    if pid is not None and (pid < 1 or not tree.exists(f"{home}/status")):
        raise BadConfig("--pid", f"there is no process {pid}; a process id of this machine is wanted, as ps shows it")

    def read_network() -> _Network:
        # The network of a process is read through the directory of the very thread that reads (namespace.py).
        net = "proc/thread-self/net" if tree.exists("proc/thread-self/net") else "proc/net"
        return _read_network(tree, net, probe_ports=probe_ports, most_sockets=most_sockets)

    network = _network_of(tree, home, own=pid is None or pid == os.getpid(), read=read_network)
    cgroup, cgroup_counters = read_cgroup(tree, home)
    return Host(
        label=label,
        taken_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        kernel=_kernel(tree),
        machine=_machine(tree, home),
        process=read_process(tree, home),
        isolation=read_isolation(tree, home, initial_network=network.initial),
        cgroup=cgroup,
        sysctl=network.sysctl,
        sockets=network.sockets,
        flows=network.census.flows,
        listeners=network.census.listeners,
        addresses=network.addresses,
        poisoned_ports=network.poisoned_ports,
        conntrack=network.conntrack,
        source_nat=network.rules.source_nat,
        rule_limits=network.rules.rule_limits,
        io_uring=trials.read_io_uring() if tree.live else IoUring(available=False, reason=_ANOTHER_MACHINE),
        features=dict(network.features),
        counters=dict(sorted((network.counters | cgroup_counters).items())),
        unread=dict(sorted(tree.unread.items())),
    )


class _Network(NamedTuple):
    """What belongs to a network namespace."""

    sysctl: dict[str, str]
    counters: dict[str, int]
    sockets: Sockets = Sockets()
    census: Census = Census()
    addresses: tuple[Address, ...] = ()
    poisoned_ports: tuple[tuple[int, int], ...] | None = None
    features: Mapping[str, bool] = MappingProxyType({})
    conntrack: Conntrack = Conntrack(loaded=False)
    rules: Ruleset = Ruleset()
    initial: bool | None = None


def _network_of(tree: Tree, home: str, *, own: bool, read: Callable[[], _Network]) -> _Network:
    shared = True if own or not tree.live else shares_network(tree, home)
    if shared is None:
        tree.miss(
            "network namespace",
            "which one the process has is hidden (needs root, or its user); network facts are of this one",
        )
    if shared is not False:
        return read()
    try:
        return inside_network_of(home, read)
    except OSError as error:
        tree.miss("network namespace", f"that of the process is another one, and entering it failed: {reason(error)}")
    net = f"{home}/net"
    return _Network(
        sysctl=read_sysctls(tree, network=False),
        counters=read_counters(tree, net),
        sockets=_sockets(tree, net, Census()),
    )


def _read_network(tree: Tree, net: str, *, probe_ports: bool, most_sockets: int) -> _Network:
    sysctl = read_sysctls(tree)
    counters = read_counters(tree, net)
    # A child network namespace does not show the host-wide settings of TCP (catalogue section 5).
    initial = "net.ipv4.tcp_mem" in sysctl if sysctl else None
    if not tree.live:
        for fact in ("addresses", "listeners", "flows", "poisoned_ports", "features", "nft"):
            tree.miss(fact, _ANOTHER_MACHINE)
        conntrack = read_conntrack(tree, tracks=None, established=0)
        return _Network(sysctl, counters, _sockets(tree, net, Census()), conntrack=conntrack, initial=initial)
    found = _census(tree, most_sockets)
    sockets = _sockets(tree, net, found)
    addresses = _addresses(tree)
    ephemeral = _ephemeral(sysctl)
    poisoned = _poisoned(tree, ephemeral, found, probe=probe_ports)
    free = (port for port in ephemeral if port not in poisoned) if poisoned is not None else None
    features = trials.read_features(free)
    rules = read_rules(tree, net)
    established = found.by_state.get("ESTABLISHED", 0)
    conntrack = read_conntrack(tree, tracks=rules.tracks, established=established)
    runs = None if poisoned is None else tuple(_runs(sorted(poisoned)))
    return _Network(sysctl, counters, sockets, found, addresses, runs, features, conntrack, rules, initial)


def _kernel(tree: Tree) -> Kernel:
    release = folded(tree.text("proc/sys/kernel/osrelease", "kernel.release") or "") or "unknown"
    numbers = re.match(r"(\d{1,6})(?:\.(\d{1,6}))?(?:\.(\d{1,6}))?", release)
    architecture = folded(tree.text("proc/sys/kernel/arch") or "") or (os.uname().machine if tree.live else "unknown")
    return Kernel(
        release=release,
        version=tuple(int(number) for number in numbers.groups() if number) if numbers else (0,),
        architecture=architecture,
        page_bytes=os.sysconf("SC_PAGE_SIZE") if tree.live else 4096,
    )


def _machine(tree: Tree, home: str) -> Machine:
    fields = {}
    for line in (tree.text("proc/meminfo", "meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        number = whole(rest.removesuffix("kB").strip())
        if number is not None and 0 <= number < 1 << 50:
            fields[name] = number * 1024
    for name in ("MemTotal", "MemAvailable"):
        if name not in fields and "meminfo" not in tree.unread:
            tree.miss(f"meminfo.{name}", "/proc/meminfo does not say")
    return Machine(
        cpus=usable_processors(tree, home),
        memory_total_bytes=fields.get("MemTotal"),
        memory_available_bytes=fields.get("MemAvailable"),
        slab_unreclaimable_bytes=fields.get("SUnreclaim"),
    )


def _sockets(tree: Tree, net: str, found: Census) -> Sockets:
    gauges = read_gauges(tree, net)
    return Sockets(
        tcp_in_use=gauges.get("TCP.inuse"),
        tcp6_in_use=gauges.get("TCP6.inuse"),
        time_wait=gauges.get("TCP.tw"),
        orphans_host=gauges.get("TCP.orphan"),
        allocated_host=gauges.get("TCP.alloc"),
        memory_pages_host=gauges.get("TCP.mem"),
        by_state=dict(sorted(found.by_state.items())),
    )


def _census(tree: Tree, most_sockets: int) -> Census:
    try:
        found = census(most_sockets)
    except OSError as error:
        tree.miss("sockets", f"sock_diag: {reason(error)}")
        return Census()
    if not found.complete:
        tree.miss(
            "sockets.by_state", f"only the first {most_sockets:,} sockets were read; states and flows count those"
        )
    if not found.flows_complete:
        tree.miss("flows", "too many groups of connections to count them all; the largest may be missing")
    if not found.listeners_complete:
        tree.miss("listeners", f"only the first {MOST_LISTENERS:,} are listed")
    return found


def _addresses(tree: Tree) -> tuple[Address, ...]:
    try:
        addresses, complete = read_addresses()
    except OSError as error:
        tree.miss("addresses", f"rtnetlink: {reason(error)}")
        return ()
    if not complete:
        tree.miss("addresses", f"only the first {MOST_ADDRESSES:,} are listed")
    return addresses


def _ephemeral(sysctl: dict[str, str]) -> tuple[int, ...]:
    """The ports of the ephemeral range that are not reserved; none if the range cannot be read."""
    bounds = [whole(word) for word in sysctl.get("net.ipv4.ip_local_port_range", "").split()]
    low, high = bounds if len(bounds) == 2 else (None, None)
    if low is None or high is None or not 0 <= low <= high <= HIGHEST_PORT:
        return ()
    reserved: set[int] = set()
    for part in sysctl.get("net.ipv4.ip_local_reserved_ports", "").replace(",", " ").split():
        first, _, last = part.partition("-")
        ends = whole(first), whole(last or first)
        if ends[0] is not None and ends[1] is not None and 0 <= ends[0] <= ends[1] <= HIGHEST_PORT:
            reserved.update(range(ends[0], ends[1] + 1))
    return tuple(port for port in range(max(low, 1), high + 1) if port not in reserved)


def _poisoned(tree: Tree, ephemeral: tuple[int, ...], found: Census, *, probe: bool) -> frozenset[int] | None:
    if not ephemeral:
        tree.miss("poisoned_ports", "the ephemeral range is not known")
        return None
    seen = found.bound_ports & frozenset(ephemeral)
    if not probe:
        tree.miss("poisoned_ports", "not probed, as asked: only listeners and bound sockets are counted")
        return seen
    blocked, why = trials.poisoned_ports(ephemeral)
    if why:
        tree.miss("poisoned_ports", f"{why}: otherwise only listeners and bound sockets are counted")
    return blocked | seen


def _runs(ports: Iterable[int]) -> Iterable[tuple[int, int]]:
    """First and last of each run of consecutive ports."""
    first = last = None
    for port in ports:
        if first is None or last is None:
            first = port
        elif port != last + 1:
            yield first, last
            first = port
        last = port
    if first is not None and last is not None:
        yield first, last
