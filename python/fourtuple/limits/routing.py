"""Family H: neighbours, addresses and routes: whether segments find their way there and back.

Decides nothing about number except where every peer is a neighbour.
"""

from __future__ import annotations

from fourtuple.facts import Goal, Host, Role
from fourtuple.limits._model import (
    Bound,
    Check,
    Evidence,
    Kind,
    Limit,
    NotApplicable,
    Remedy,
    Scope,
    Unknown,
    counter,
    error,
    in_program,
    log,
    set_sysctl,
    symptom,
)
from fourtuple.limits._terms import HOST_LIMIT, Answer, number, unread

NEIGHBOURS = "net.ipv4.neigh.default.gc_thresh3"
ADDRESSES_SLOW_TO_LIST = 1_000


def _neighbours(host: Host, goal: Goal) -> Answer:
    if goal.role not in (Role.CLIENT_MANY, Role.PROXY) or goal.destinations == 1:
        return NotApplicable(reason="routed traffic needs one neighbour, the gateway")
    most = number(host, NEIGHBOURS)
    if most is None:
        return Unknown(reason=unread(host, NEIGHBOURS, HOST_LIMIT).reason)
    if goal.destinations <= most:
        return NotApplicable(
            reason=f"{goal.destinations:,} destinations fit into {most:,} neighbours, even on the link"
        )
    return Bound(
        connections=most,
        arithmetic=f"{most:,} neighbours: of {goal.destinations:,} destinations, if all are on the link",
        kind=Kind.SPEED,
    )


def _reverse_path(host: Host) -> Check | None:
    value = number(host, "net.ipv4.conf.all.rp_filter")
    if value is None:
        return None
    return Check(
        setting="net.ipv4.conf.all.rp_filter",
        found=str(value),
        wanted="0 or 2",
        holds=value != 1,
        meaning="replies that arrive where the route back does not lead are dropped: SYN-ACK seen, connect() times out",
    )


def _many_addresses(host: Host) -> Check | None:
    if not host.addresses:
        return None
    single = sum(not address.any_ip for address in host.addresses)
    return Check(
        setting="addresses of this host",
        found=f"{single:,}",
        wanted=f"<= {ADDRESSES_SLOW_TO_LIST:,}; a local route (AnyIP) for more",
        holds=single <= ADDRESSES_SLOW_TO_LIST,
        meaning="every listing of addresses walks all of them: ip addr, routing daemons",
    )


LIMITS = (
    Limit(
        id="H1",
        name="neighbours",
        title="The neighbour table",
        scope=Scope.HOST,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why=(
            "Peers on the same link need an entry each, over all interfaces and namespaces together. Peers behind a"
            " router need one for the router. It matters when a test uses thousands of addresses on one link."
        ),
        read=(NEIGHBOURS, "net.ipv6.neigh.default.gc_thresh3", "/proc/net/stat/arp_cache"),
        default="128, 512, 1024",
        formula="neighbours that are not permanent <= gc_thresh3",
        bounds="Clients and proxies with many peers on the link. Absent in a child namespace, binding all the same.",
        hit=(
            log(r"neighbour: \S+: neighbor table overflow!"),
            counter("arp_cache.table_fulls"),
            error("connect", "ENOBUFS", rank=2),
            error("connect", "EHOSTUNREACH", "the neighbour does not answer", rank=2),
            error("connect", "ENETUNREACH", rank=2),
        ),
        remedies=(
            set_sysctl(NEIGHBOURS, "65536", "raise it, gc_thresh2 to half and gc_thresh1 to an eighth of it"),
            in_program("route the prefix through one gateway"),
        ),
        since="always",
        side_effects="memory for entries",
        sources=("neigh_alloc() in net/core/neighbour.c",),
        bound=_neighbours,
    ),
    Limit(
        id="H2",
        name="address-resolution",
        title="Answering for many source addresses",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.DOCUMENTED,
        why=(
            "With arp_ignore 0 the host answers for any local address on any interface, AnyIP ones included; from 1"
            " on it does not, and peers on the link cannot reply. Clouds ignore ARP: there the provider has to know"
            " the addresses."
        ),
        read=("net.ipv4.conf.all.arp_ignore", "net.ipv4.conf.all.arp_announce"),
        default="0 and 0",
        formula="none",
        bounds="Clients with more than one source address.",
        hit=(error("connect", "ETIMEDOUT", "the SYN leaves, nothing comes back", rank=8),),
        remedies=(
            set_sysctl("net.ipv4.conf.all.arp_ignore", "0", "answer for every local address"),
            set_sysctl("net.ipv4.conf.all.arp_announce", "2", "announce the matching address"),
        ),
        since="always",
        side_effects="port security and limits on switches",
        sources=("ip-sysctl",),
    ),
    Limit(
        id="H3",
        name="reverse-path-filter",
        title="net.ipv4.conf.*.rp_filter",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.SOURCE,
        why=(
            "Drops what arrives on another interface than the route to its source uses. The larger value of all and"
            " of the interface counts. With several uplinks the answers are lost."
        ),
        read=("net.ipv4.conf.all.rp_filter", "net.ipv4.conf.IFACE.rp_filter"),
        default="0 in the kernel; 1 or 2 in distributions",
        formula="none",
        bounds="Hosts with several uplinks or addresses routed elsewhere.",
        hit=(
            counter("TcpExt.IPReversePathFilter"),
            log(r"martian source", "with log_martians"),
            error("connect", "ETIMEDOUT", "tcpdump shows the SYN-ACK", rank=3),
        ),
        remedies=(set_sysctl("net.ipv4.conf.all.rp_filter", "2", "loose: any route back is enough"),),
        since="always",
        side_effects="less protection against forged sources",
        sources=("fib_validate_source()", "ip-sysctl"),
        check=_reverse_path,
    ),
    Limit(
        id="H4",
        name="interface-addresses",
        title="Thousands of addresses on an interface",
        scope=Scope.NETNS,
        kind=Kind.SPEED,
        evidence=Evidence.MEASURED,
        why=(
            "Each address takes 120 B, a local route 56 B and more. It is not the memory that hurts but every"
            " listing. A local route for a whole prefix (A17) has none of that."
        ),
        read=("ip -s addr",),
        default="as configured",
        formula="none",
        bounds="The cost of listing addresses.",
        hit=(symptom("slow ip addr, slow routing daemons"),),
        remedies=(
            Remedy(
                text="one route instead",
                command="ip route add local 10.77.0.0/16 dev lo",
                persist="a route of type local in networkd, netplan or NetworkManager",
            ),
        ),
        since="always",
        side_effects="none",
        sources=("struct in_ifaddr, fib_alias", "measured sizes"),
        check=_many_addresses,
    ),
    Limit(
        id="H5",
        name="path-mtu",
        title="Path MTU",
        scope=Scope.PEER,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.DOCUMENTED,
        why="Where ICMP is lost, large segments of a handshake vanish. At scale it looks like connections that hang.",
        read=("ip route get DESTINATION", "tracepath DESTINATION"),
        default="net.ipv4.tcp_mtu_probing 0",
        formula="none",
        bounds="Nothing.",
        hit=(symptom("TCP connects, TLS hangs"),),
        remedies=(set_sysctl("net.ipv4.tcp_mtu_probing", "1", "probe when a black hole is suspected"),),
        since="2.6.17",
        side_effects="smaller segments after losses",
        sources=("RFC 4821", "ip-sysctl"),
    ),
    Limit(
        id="H6",
        name="route-errors",
        title="Errors of routing, not of ports",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "No route, a neighbour that does not answer, or a route that forbids have errors of their own and say"
            " nothing of limits: measured ENETUNREACH without route, EHOSTUNREACH after 3 s without neighbour or at"
            " once by an unreachable route, EACCES by a prohibit and EINVAL by a blackhole route."
        ),
        read=("ip route get DESTINATION",),
        default="as routed",
        formula="none",
        bounds="Nothing.",
        hit=(
            error("connect", "ENETUNREACH", rank=1),
            error("connect", "EHOSTUNREACH", rank=1),
            error("connect", "EACCES", "prohibit route", rank=3),
            error("connect", "EINVAL", "blackhole route", rank=1),
        ),
        remedies=(in_program("add the route that is missing"),),
        since="always",
        side_effects="none",
        sources=("fib_props[] in net/ipv4/fib_semantics.c", "measured on 6.18"),
    ),
)
