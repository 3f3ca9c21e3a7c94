"""One rule for each limit that a change can raise: the least change that makes it enough for the goal.

Decides how far each knob is turned, and writes down why. Knows no order and no search: `search` asks the rule of the
limit that binds. A rule returns None where nothing raises its limit on this host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fourtuple.errors import BadConfig
from fourtuple.facts import Goal, Host, Role, SourceNat
from fourtuple.limits import Unknown
from fourtuple.limits._terms import (
    PORT_RANGE,
    RESERVED_PORTS,
    TIME_WAIT_S,
    bytes_per_connection,
    count,
    destinations,
    number,
    numbers,
    port_term,
    queued_bytes,
    sockets_per_connection,
)
from fourtuple.plan.draft import Draft, local_addresses
from fourtuple.tuples import HIGHEST_PORT, AddressSet, PortSet

Rule = Callable[[Draft], Draft | None]

OWN_DESCRIPTORS = 64
"""What the program has open beside its connections: libraries, logs, epoll, listeners."""
TRACKED_PERCENT = 110
"""Entries per connection: those that have just closed stay (G3)."""
ENTRY_BYTES = 256
"""A nf_conn in its slab (G1)."""
ENTRIES_PER_BUCKET = 4
BUCKETS_PER_PAGE = 512
"""nf_ct_alloc_hashtable() rounds up to pages of 8-byte heads."""
SNAT_PORTS = 64_512
NAT_FILL_PERCENT = 94
"""nf_nat tries about 248 ports from random offsets (G4): at this fill one in 4.6 million finds none, 0.94^248."""
TIME_WAIT_TRACKED_S = 30
LARGEST_QUEUE = 65_535
QUEUE_S = 1
"""A queue that covers so long a pause of accept() loses nobody: a lost SYN is repeated after a second."""


def more_ports(draft: Draft) -> Draft | None:
    """Addresses that the host has, else the whole port range, else further addresses."""
    return _more_tuples(draft, -(-draft.wanted // destinations(draft.goal)), "A2")


def _more_tuples(draft: Draft, each: int, limit: str) -> Draft | None:
    """Source ports and addresses for `each` tuples to every destination."""
    term = port_term(draft.host)
    if isinstance(term, Unknown):
        return None
    if not term.size or -(-each // term.size) > max(1, _own(draft)):
        widened = _widened(draft)
        if widened is not None:
            return widened
    if not term.size:
        return None
    wanted = -(-each // term.size)
    if wanted <= draft.goal.sources:
        return None
    ways = destinations(draft.goal)
    target = f"{each:,} to each of {ways:,} destinations" if ways > 1 else f"{each:,} to one destination"
    arithmetic = f"{target} / {term.size:,} ports = {count(wanted, 'source address', 'source addresses')}"
    return draft.with_sources(wanted, limit, arithmetic)


def _own(draft: Draft) -> int:
    """Addresses that are there already and may be used."""
    pool = draft.means.sources
    if pool is None:
        return len(draft.own_addresses())
    return pool.intersect(local_addresses(draft.found, pool.version)).size


def _widened(draft: Draft) -> Draft | None:
    """The whole range, its listeners' ports reserved first; None if it is as wide as it can be."""
    low = max(number(draft.host, "net.ipv4.ip_unprivileged_port_start") or 1_024, 1_024)
    bounds = numbers(draft.host, PORT_RANGE, 2)
    if bounds is None or low > HIGHEST_PORT or bounds[1] - bounds[0] >= HIGHEST_PORT - low:
        return None
    widened = draft
    reserved, listening = _reserved(draft.host), _listening(draft.host, low)
    if listening.subtract(reserved):
        both = reserved.union(listening)
        why = f"{count(listening.size, 'port')} of listeners lie in the range: connect() is not to take them"
        widened = widened.with_sysctl(RESERVED_PORTS, str(both), "A5", why)
    size = HIGHEST_PORT - low + 1
    was = bounds[1] - bounds[0] + 1
    arithmetic = f"{HIGHEST_PORT} - {low} + 1 = {size:,} ports instead of {was:,}"
    return widened.with_sysctl(PORT_RANGE, f"{low} {HIGHEST_PORT}", "A2", arithmetic)


def _reserved(host: Host) -> PortSet:
    text = host.sysctl.get(RESERVED_PORTS, "").strip()
    try:
        return PortSet.parse(text) if text else PortSet()
    except BadConfig:
        return PortSet()


def _listening(host: Host, low: int) -> PortSet:
    return PortSet.of(*(one.local.port for one in host.listeners if one.local.port >= low))


def bind_late(draft: Draft) -> Draft | None:
    """IP_BIND_ADDRESS_NO_PORT."""
    knob, why = "bind() before connect()", "without the option each port serves one destination only, for all programs"
    new = "setsockopt(IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1) first"
    return draft.with_program(knob, "takes a port exclusively", new, "A7", why, binds_first=False)


def make_local(draft: Draft) -> Draft | None:
    """Local prefixes for the addresses that the goal wants to use."""
    if any(one.any_ip for one in draft.host.addresses):
        return None
    wanted = draft.goal.sources
    return draft.with_sources(wanted, "A17", f"the program uses {count(wanted, 'source address', 'source addresses')}")


def more_descriptors(draft: Draft) -> Draft | None:
    """fs.nr_open where it is lower, and the limit of the process."""
    each = draft.goal.descriptors_per_connection * sockets_per_connection(draft.goal)
    used = draft.host.process.open_descriptors or 0
    wanted = draft.wanted * each + used + OWN_DESCRIPTORS
    arithmetic = f"{draft.wanted:,} x {count(each, 'descriptor')} + {used:,} open + {OWN_DESCRIPTORS} = {wanted:,}"
    ceiling = number(draft.host, "fs.nr_open")
    raised = (
        draft
        if ceiling is None or ceiling >= wanted
        else draft.with_sysctl("fs.nr_open", str(wanted), "B3", arithmetic)
    )
    limit = draft.host.process.rlimits.get("NOFILE")
    enough = limit is not None and (limit.soft is None or limit.soft >= wanted)
    return raised if enough else raised.with_descriptors(wanted, "B1", arithmetic)


def more_files(draft: Draft) -> Draft | None:
    """fs.file-max."""
    usage = numbers(draft.host, "fs.file-nr", 3)
    allocated = usage[0] if usage else 0
    each = max(1, draft.goal.descriptors_per_connection) * sockets_per_connection(draft.goal)
    wanted = draft.wanted * each + allocated + OWN_DESCRIPTORS
    arithmetic = f"{draft.wanted:,} x {count(each, 'file')} + {allocated:,} open + {OWN_DESCRIPTORS} = {wanted:,}"
    return draft.with_sysctl("fs.file-max", str(wanted), "B4", arithmetic)


def ordinary_descriptors(draft: Draft) -> Draft | None:
    """Without io_uring, descriptors of the process."""
    reason = draft.host.io_uring.reason or "not tried"
    why = f"io_uring cannot be used here: {reason}"
    return draft.with_program(
        "descriptors", "direct ones of io_uring", "ordinary ones", "B5", why, descriptors_per_connection=1
    )


def more_watches(draft: Draft) -> Draft | None:
    """fs.epoll.max_user_watches."""
    each = sockets_per_connection(draft.goal)
    wanted = draft.wanted * each + OWN_DESCRIPTORS
    arithmetic = f"{draft.wanted:,} x {count(each, 'watch', 'watches')} + {OWN_DESCRIPTORS} = {wanted:,}"
    return draft.with_sysctl("fs.epoll.max_user_watches", str(wanted), "B7", arithmetic)


def more_buffers(draft: Draft) -> Draft | None:
    """net.ipv4.tcp_mem, up to half of the memory; the kernel's own proportions of its three numbers (C3)."""
    total = draft.host.machine.memory_total_bytes
    page = draft.host.kernel.page_bytes or 4_096
    each = queued_bytes(draft.goal, page) * sockets_per_connection(draft.goal)
    wanted = -(-draft.wanted * each // page)
    most = wanted if total is None else min(wanted, total // 2 // page)
    now = numbers(draft.host, "net.ipv4.tcp_mem", 3)
    if now is not None and most <= now[2]:
        return None
    arithmetic = f"{draft.wanted:,} x {each:,} B queued and their overhead / {page:,} B = {wanted:,} pages"
    if most < wanted:
        arithmetic += f", of which half of the memory is {most:,}"
    return draft.with_sysctl("net.ipv4.tcp_mem", f"{most // 2} {most * 2 // 3} {most}", "C3", arithmetic)


def more_cgroup_memory(draft: Draft) -> Draft | None:
    """memory.max, as far as the machine has it: beyond that kernel-memory binds."""
    cgroup = draft.host.cgroup
    if cgroup is None:
        return None
    used = max(0, (cgroup.memory_current_bytes or 0) - (cgroup.memory_reclaimable_bytes or 0))
    each, text = bytes_per_connection(draft.goal)
    wanted = draft.wanted * each + used
    arithmetic = f"{draft.wanted:,} x {text} + {used:,} B in use = {wanted:,} B"
    return draft.with_memory_max(wanted, "C6", arithmetic)


def more_cgroup_buffers(draft: Draft) -> Draft | None:
    """memory.kmem.tcp.limit_in_bytes."""
    used = 0 if draft.host.cgroup is None else draft.host.cgroup.kmem_tcp_usage_bytes or 0
    each = queued_bytes(draft.goal, draft.host.kernel.page_bytes) * sockets_per_connection(draft.goal)
    wanted = draft.wanted * each + used
    arithmetic = f"{draft.wanted:,} x {each:,} B queued + {used:,} B in use = {wanted:,} B"
    return draft.with_kmem_tcp(wanted, "C7", arithmetic)


def longer_queue(draft: Draft) -> Draft | None:
    """somaxconn and the backlog, for a program that does not accept: the queue is all there is."""
    wanted = draft.wanted - 1
    arithmetic = f"min(backlog, somaxconn) + 1 wait: {draft.wanted:,} - 1 = {wanted:,}"
    return _with_queue(draft, wanted, arithmetic)


def queue_for_rate(draft: Draft) -> Draft:
    """A queue that holds what arrives in a second, where the goal names a rate."""
    accepting = draft.goal.role in (Role.SERVER, Role.PROXY) and draft.goal.accepts
    if not accepting or not draft.goal.rate_per_s:
        return draft
    wanted = min(LARGEST_QUEUE, draft.goal.rate_per_s * QUEUE_S)
    arithmetic = f"{draft.goal.rate_per_s:,} per second x {QUEUE_S} s without accept(), at most {LARGEST_QUEUE:,}"
    return _with_queue(draft, wanted, f"{arithmetic} = {wanted:,}")


def _with_queue(draft: Draft, wanted: int, arithmetic: str) -> Draft:
    most, backlog = number(draft.host, "net.core.somaxconn"), draft.goal.backlog
    longer = draft
    if most is not None and most < wanted:
        longer = longer.with_sysctl("net.core.somaxconn", str(wanted), "D1", arithmetic)
    if longer is not draft or (backlog is not None and backlog < wanted):
        old = "the program's" if backlog is None else str(backlog)
        longer = longer.with_program("listen() backlog", old, str(wanted), "D1", arithmetic, backlog=wanted)
    return longer


def more_tracked(draft: Draft) -> Draft | None:
    """nf_conntrack_max, and buckets for chains that stay short."""
    used = draft.host.conntrack.count or 0
    each = 1 if draft.goal.role is Role.NAT else sockets_per_connection(draft.goal)
    wanted = used + -(-draft.wanted * each * TRACKED_PERCENT // 100)
    arithmetic = (
        f"{draft.wanted:,} x {count(each, 'entry', 'entries')} x {TRACKED_PERCENT} % + {used:,} in use = {wanted:,}"
    )
    raised = draft.with_tracked(wanted, "G1", arithmetic)
    buckets = draft.host.conntrack.buckets
    if buckets is not None and wanted > buckets * ENTRIES_PER_BUCKET:
        pages = -(-wanted // (ENTRIES_PER_BUCKET * BUCKETS_PER_PAGE))
        arithmetic = f"{wanted:,} entries / {ENTRIES_PER_BUCKET}, in pages of {BUCKETS_PER_PAGE}"
        new = str(pages * BUCKETS_PER_PAGE)
        raised = raised.with_sysctl("net.netfilter.nf_conntrack_buckets", new, "G2", f"{arithmetic} = {int(new):,}")
    return raised


def more_snat(draft: Draft) -> Draft | None:
    """SNAT addresses, filled no further than the search is certain to find a port."""
    ways = destinations(draft.goal)
    bounded = next((rule.ports for rule in draft.host.source_nat if rule.ports is not None), None)
    ports = SNAT_PORTS if bounded is None else bounded[1] - bounded[0] + 1
    each = ports * NAT_FILL_PERCENT // 100
    wanted = -(-draft.wanted // max(1, each * ways))
    if wanted <= sum(max(1, rule.addresses) for rule in draft.host.source_nat):
        return None
    arithmetic = (
        f"{draft.wanted:,} / ({ports:,} ports x {NAT_FILL_PERCENT} % x {count(ways, 'destination')})"
        f" = {count(wanted, 'address', 'addresses')}"
    )
    pool = draft.means.sources
    if pool is not None and pool.size < wanted:
        wanted = pool.size
    chosen = None if pool is None else pool.between(0, wanted)
    old = "; ".join(rule.rule for rule in draft.host.source_nat[:3])
    new = f"snat to {count(wanted, 'address', 'addresses')}" if chosen is None else _snat(chosen, bounded)
    named = draft.with_rules("source NAT", old, new, "G4", arithmetic)
    rule = SourceNat(table="ip fourtuple", rule=new, addresses=wanted, ports=bounded)
    if number(draft.host, "net.ipv4.ip_forward") == 0:
        named = named.with_sysctl("net.ipv4.ip_forward", "1", "G4", "a NAT box forwards packets")
    return replace(
        named,
        host=named.host.model_copy(update={"source_nat": (rule,)}),
        goal=named.goal.model_copy(update={"sources": wanted}),
        sources=chosen,
        unnamed_sources=wanted if pool is None else 0,
    )


def _snat(chosen: AddressSet, ports: tuple[int, int] | None) -> str:
    """As nft(8) writes it; ports only where the rules before had them, for they need a protocol."""
    if ports is None:
        return f"snat to {chosen}"
    ends = [f"[{one}]" if chosen.version == 6 else str(one) for one in dict.fromkeys(chosen.ranges()[0])]
    return f"meta l4proto tcp snat to {'-'.join(ends)}:{ports[0]}-{ports[1]}"


def use_events(draft: Draft) -> Draft | None:
    """An event loop instead of threads."""
    threads = draft.goal.threads_per_connection
    why = f"{draft.wanted:,} x {count(threads, 'thread')} are {draft.wanted * threads:,} threads"
    return draft.with_program(
        "threads", f"{threads} per connection", "an event loop", "J1", why, threads_per_connection=0
    )


def reuse_time_wait(draft: Draft) -> Draft | None:
    """tcp_tw_reuse, where timestamps are on; else more tuples."""
    host, rate = draft.host, draft.goal.rate_per_s
    if number(host, "net.ipv4.tcp_tw_reuse") != 1 and number(host, "net.ipv4.tcp_timestamps") in (1, 2):
        why = (
            f"{rate:,} per second x {TIME_WAIT_S} s = {rate * TIME_WAIT_S:,} tuples would wait; with it each waits 1 s"
        )
        return draft.with_sysctl("net.ipv4.tcp_tw_reuse", "1", "A12", why)
    delay_ms = TIME_WAIT_S * 1_000
    if number(host, "net.ipv4.tcp_tw_reuse") == 1 and number(host, "net.ipv4.tcp_timestamps") in (1, 2):
        delay_ms = max(1, number(host, "net.ipv4.tcp_tw_reuse_delay") or 1_000)
    return _more_tuples(draft, -(-rate * delay_ms // 1_000 // destinations(draft.goal)), "A12")


def forget_sooner(draft: Draft) -> Draft | None:
    """A shorter stay of closed connections in the tracking table, else a larger table."""
    name = "net.netfilter.nf_conntrack_tcp_timeout_time_wait"
    seconds, rate = number(draft.host, name), draft.goal.rate_per_s
    if seconds is None:
        return None
    each = sockets_per_connection(draft.goal)
    if seconds > TIME_WAIT_TRACKED_S:
        why = f"{rate:,} per second x {TIME_WAIT_TRACKED_S} s = {rate * TIME_WAIT_TRACKED_S * each:,} closing entries"
        return draft.with_sysctl(name, str(TIME_WAIT_TRACKED_S), "G3", why)
    wanted = rate * seconds * each
    return draft.with_tracked(wanted, "G3", f"{rate:,} per second x {seconds} s x {each} = {wanted:,} entries")


COUNT_RULES: Mapping[str, Rule] = {
    "A1": more_ports,
    "A2": more_ports,
    "A7": bind_late,
    "A17": make_local,
    "B1": more_descriptors,
    "B2": more_descriptors,
    "B3": more_descriptors,
    "B4": more_files,
    "B5": ordinary_descriptors,
    "B7": more_watches,
    "C3": more_buffers,
    "C6": more_cgroup_memory,
    "C7": more_cgroup_buffers,
    "D1": longer_queue,
    "G1": more_tracked,
    "G4": more_snat,
    "J1": use_events,
    "J2": use_events,
    "J3": use_events,
    "J4": use_events,
    "J5": use_events,
}
"""By catalogue id, for limits on connections at once. No change raises C1, C2 and C9: memory is what a machine has."""

RATE_RULES: Mapping[str, Rule] = {"A12": reuse_time_wait, "G3": forget_sooner}
"""For limits on connections per second. A15 speaks of destinations that do not answer, which no goal asks for."""


def memory(goal: Goal, tracked: int) -> tuple[int, str]:
    """What the connections of one machine take, in kernel and program, `tracked` entries included; how it adds up."""
    connections = goal.connections or 0
    table = f" + {tracked:,} tracked x {ENTRY_BYTES} B" if tracked else ""
    if goal.role is Role.NAT:
        return tracked * ENTRY_BYTES, f"{tracked:,} tracked x {ENTRY_BYTES} B = {tracked * ENTRY_BYTES:,} B"
    each, text = bytes_per_connection(goal)
    total = connections * each + tracked * ENTRY_BYTES
    return total, f"{connections:,} x {text}{table} = {total:,} B"
