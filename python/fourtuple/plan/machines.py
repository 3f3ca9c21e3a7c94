"""Past one machine: what the load balancer before several serving machines has to hold.

Decides the arithmetic of a balancer in its two forms. Knows no product.
"""

from __future__ import annotations

from fourtuple.facts import Goal, Host, Role
from fourtuple.limits._terms import EPOLL_BYTES, IPV6_BYTES, MEMORY_SHARE_PERCENT, SOCKET_BYTES
from fourtuple.plan.model import Balancer
from fourtuple.plan.rules import ENTRY_BYTES, SNAT_PORTS, TRACKED_PERCENT


def in_front(goal: Goal, machines: int) -> bool:
    """Whether something has to spread clients over the machines: those that connect spread themselves."""
    return machines > 1 and goal.role in (Role.SERVER, Role.PROXY)


def balancer(goal: Goal, host: Host, machines: int, connections: int) -> Balancer:
    """What it takes to bring `connections` to so many machines, by machines of this host's shape."""
    entries = -(-connections * TRACKED_PERCENT // 100)
    passes_on = (
        f"with state {connections:,} x {TRACKED_PERCENT} % = {entries:,} entries x {ENTRY_BYTES} B ="
        f" {entries * ENTRY_BYTES:,} B; without state (ECMP, or a consistent hash with direct return) none"
    )
    socket = SOCKET_BYTES + EPOLL_BYTES + (IPV6_BYTES if goal.ipv6 else 0)
    size = 2 * socket * connections
    usable = (host.machine.memory_available_bytes or 0) * MEMORY_SHARE_PERCENT // 100
    relays_each = max(1, usable // (2 * socket))
    relays = -(-connections // relays_each)
    # A relaying machine opens its part of each serving machine's connections to that one's one endpoint.
    to_each = -(-connections // (relays * machines))
    sources = -(-to_each // SNAT_PORTS)
    text = (
        f"2 x {connections:,} sockets x {socket:,} B = {size:,} B, {relays_each:,} connections each in"
        f" {MEMORY_SHARE_PERCENT} % of {host.machine.memory_available_bytes or 0:,} B: {relays:,} machines; each opens"
        f" {to_each:,} to each serving machine / {SNAT_PORTS:,} ports = {sources:,} source addresses"
    )
    return Balancer(
        connections=connections,
        passes_on=passes_on,
        relays=text,
        relay_machines=relays,
        relay_sources_each=sources,
    )
