"""Family A: bounds set by the four-tuple space itself, and by how the kernel chooses a source port in it.

Decides how many names a host can give its connections. Knows nothing of descriptors, memory or table entries.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv6Address, ip_address

from fourtuple.facts import Flow, Goal, Host, Role
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
    Usage,
    counter,
    error,
    in_program,
    log,
    set_sysctl,
    symptom,
)
from fourtuple.limits._terms import (
    PORT_RANGE,
    RESERVED_PORTS,
    TIME_WAIT_S,
    Answer,
    at_most,
    count,
    destinations,
    equals,
    is_client,
    no_source_ports,
    number,
    numbers,
    port_term,
    tuple_product,
    unread,
)
from fourtuple.tuples import HIGHEST_PORT, IPAddress, PortSet

SYN_SENT_S = 131
"""How long an unanswered connect() lives with 6 retries, the first 4 at one second each."""
CLOSE_WAIT_PERCENT = 5
DEFAULT_RANGE = 28_232
WIDEST_RANGE = 64_512

WIDEN = set_sysctl(
    PORT_RANGE,
    "1024 65535",
    "widen the range to 64,512 ports",
    risk="a service that binds a fixed port inside the range later can find it taken: reserve such ports first",
)
MORE_SOURCES = Remedy(
    text="use more source addresses; one local route makes a whole prefix bindable",
    command="ip route add local 10.77.0.0/16 dev lo",
    persist="a route of type local in networkd, netplan or NetworkManager",
    risk="the program has to bind them, and the other side needs a route back to the prefix",
)


def _uniqueness(host: Host, goal: Goal) -> Answer:
    if goal.role is Role.SERVER:
        return Bound(connections=2**48, arithmetic=f"2^32 client addresses x 2^16 ports, per listener = {2**48:,}")
    if not is_client(goal):
        return no_source_ports(goal)
    return tuple_product(goal, HIGHEST_PORT, f"{HIGHEST_PORT:,} ports")


def _ephemeral(host: Host, goal: Goal) -> Answer:
    if not is_client(goal):
        return no_source_ports(goal)
    term = port_term(host, searches_all=goal.searches_all_ports)
    if isinstance(term, Unknown):
        return term
    if goal.binds_first:
        return NotApplicable(reason="the program binds first: exclusive-bind counts")
    bound = tuple_product(goal, term.size, term.arithmetic, term.may_miss(term.ports))
    return replace(bound, remedy=MORE_SOURCES) if term.range_size >= WIDEST_RANGE else bound


def _ephemeral_use(host: Host) -> tuple[Usage, ...]:
    term = port_term(host)
    if isinstance(term, Unknown):
        return ()
    uses = [
        Usage(used=_held(host, flow), of=term.size, unit="ports", subject=f"{flow.source} -> {flow.destination}")
        for flow in host.flows
    ]
    return tuple(sorted(uses, key=lambda use: -use.used))


def _held(host: Host, flow: Flow) -> int:
    """Tuples that connect() cannot have: TIME_WAIT counts unless it gives way (tcp_twsk_unique)."""
    reuse, timestamps = number(host, "net.ipv4.tcp_tw_reuse"), number(host, "net.ipv4.tcp_timestamps")
    # 2 is for loopback alone: either address in 127.0.0.0/8 will do, or ::1.
    gives_way = reuse == 1 or (reuse == 2 and (flow.destination.address.is_loopback or _is_loopback(flow.source)))
    return flow.connections - (min(flow.time_wait, flow.connections) if gives_way and timestamps in (1, 2) else 0)


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


def _parity(host: Host, goal: Goal) -> Answer:
    if not is_client(goal):
        return no_source_ports(goal)
    term = port_term(host)
    if isinstance(term, Unknown):
        return term
    if goal.searches_all_ports and host.features.get("local_port_range_searches_all"):
        return NotApplicable(reason="with IP_LOCAL_PORT_RANGE the search steps by one: a flat cost at every fill")
    # The first pass of __inet_hash_connect() steps by two, and every later connect() repeats it in full.
    half = (term.size + 1) // 2
    bound = tuple_product(goal, half, f"{term.size:,} ports / 2")
    return Bound(connections=bound.connections, arithmetic=bound.arithmetic, kind=Kind.SPEED)


def _has_port_range_option(host: Host) -> Check | None:
    found = host.features.get("local_port_range")
    if found is None:
        return None
    return Check(
        setting="IP_LOCAL_PORT_RANGE",
        found="accepted" if found else "refused",
        wanted="accepted",
        holds=found,
        meaning="without it connect() cannot be kept at a flat cost, nor a port be chosen without poisoning it",
    )


def _reserved_use(host: Host) -> tuple[Usage, ...]:
    term = port_term(host)
    if isinstance(term, Unknown) or not term.reserved:
        return ()
    return (Usage(used=term.reserved, of=term.range_size, unit="ports of the range reserved"),)


def _poisoned_use(host: Host) -> tuple[Usage, ...]:
    term = port_term(host)
    if isinstance(term, Unknown) or not term.poisoned:
        return ()
    return (Usage(used=term.poisoned.size, of=term.range_size, unit="ports of the range poisoned"),)


def _unprivileged_start(host: Host) -> Check | None:
    start, bounds = number(host, "net.ipv4.ip_unprivileged_port_start"), numbers(host, PORT_RANGE, 2)
    if start is None or bounds is None:
        return None
    return Check(
        setting="net.ipv4.ip_unprivileged_port_start",
        found=f"{start:,}",
        wanted=f"<= {bounds[0]:,}, the low end of the port range",
        holds=start <= bounds[0],
        meaning="the range cannot be written again as it is: its low end would be refused with EINVAL",
    )


def _exclusive(host: Host, goal: Goal) -> Answer:
    if not is_client(goal):
        return no_source_ports(goal)
    if not goal.binds_first:
        return NotApplicable(reason="the program does not bind before connect(), or sets IP_BIND_ADDRESS_NO_PORT")
    term = port_term(host)
    if isinstance(term, Unknown):
        return term
    # bind() compares addresses (inet_csk_bind_conflict()): what listens elsewhere is poisoned for connect() alone.
    listening = _listening(host, ipv6=goal.ipv6)
    held = {port: addresses for port, addresses in listening.items() if port in term.poisoned}
    elsewhere = PortSet.of(*(port for port, addresses in held.items() if addresses is not None))
    one_each = sum(min(len(addresses), goal.sources) for addresses in held.values() if addresses is not None)
    ports = term.ports.union(elsewhere)
    size = ports.size - term.may_miss(ports)
    total = max(0, size * goal.sources - one_each)
    # Of a port that is poisoned and has no listener nobody can say for which address it was bound.
    unsure = term.poisoned.subtract(PortSet.of(*held))
    most = (ports.size + unsure.size) * goal.sources
    text = f"{term.range_text} - {term.poisoned.size - elsewhere.size:,} bound{term.missing_text(ports)}"
    text += f" = {size:,} ports x {count(goal.sources, 'source')}"
    text += f" - {one_each:,} that listen on one address" if one_each else ""
    return Bound(
        connections=total,
        may_reach=most if most > total else None,
        arithmetic=f"{text} = {total:,}{f' to {most:,}' if most > total else ''} to all destinations together",
    )


def _listening(host: Host, *, ipv6: bool) -> dict[int, set[IPAddress] | None]:
    """By port, the addresses beyond loopback at which somebody listens; None where it is at all of this family."""
    found: dict[int, set[IPAddress] | None] = {}
    for listener in host.listeners:
        address, port = listener.local.address, listener.local.port
        addresses = found.setdefault(port, set())
        whole = address.is_unspecified
        if isinstance(address, IPv6Address):
            # :: is taken to listen for IPv4 too: IPV6_V6ONLY does not show.
            address, both = address.ipv4_mapped or address, whole
        else:
            both = whole and not ipv6
        if both:
            found[port] = None
        elif addresses is not None and not whole and not address.is_loopback and (address.version == 6) == ipv6:
            addresses.add(address)
    return found


def _sticky_buckets(host: Host) -> Check | None:
    if len(host.kernel.version) < 2:
        return None
    return Check(
        setting="kernel",
        found=host.kernel.release,
        wanted="6.18 or later, or the patch backported",
        holds=host.kernel.version[:2] >= (6, 18),
        meaning="a port that was ever bound explicitly stays closed to connect() until its last socket is gone",
    )


def _timestamps(host: Host) -> Check | None:
    value = number(host, "net.ipv4.tcp_timestamps")
    if value is None:
        return None
    return Check(
        setting="net.ipv4.tcp_timestamps",
        found=str(value),
        wanted="1 or 2",
        holds=value in (1, 2),
        meaning="without timestamps no tuple in TIME_WAIT can be taken again before 60 s have passed",
    )


def _time_wait_rate(host: Host, goal: Goal) -> Answer:
    if not is_client(goal):
        return no_source_ports(goal)
    term = port_term(host)
    if isinstance(term, Unknown):
        return term
    reuse, timestamps = number(host, "net.ipv4.tcp_tw_reuse"), number(host, "net.ipv4.tcp_timestamps")
    if reuse is None:
        return unread(host, "net.ipv4.tcp_tw_reuse")
    product = tuple_product(goal, term.size, f"{term.size:,} ports")
    if reuse == 1 and timestamps in (1, 2):
        delay_ms = max(1, number(host, "net.ipv4.tcp_tw_reuse_delay") or 1_000)
        rate = product.connections * 1_000 // delay_ms
        arithmetic = f"({product.arithmetic}) / {delay_ms:,} ms = {rate:,} per second where this host closes first"
    else:
        rate = product.connections // TIME_WAIT_S
        arithmetic = f"({product.arithmetic}) / {TIME_WAIT_S} s = {rate:,} per second where this host closes first"
    return Bound(connections=rate, arithmetic=arithmetic, kind=Kind.RATE)


def _time_wait_use(host: Host) -> tuple[Usage, ...]:
    most, used = number(host, "net.ipv4.tcp_max_tw_buckets"), host.sockets.time_wait
    if most is None or used is None:
        return ()
    # Above it TIME_WAIT is skipped (inet_twsk_alloc): nothing fails.
    return (Usage(used=used, of=most, unit="sockets in TIME_WAIT", breaks=False),)


def _black_hole_rate(host: Host, goal: Goal) -> Answer:
    if not is_client(goal):
        return no_source_ports(goal)
    term = port_term(host)
    if isinstance(term, Unknown):
        return term
    retries = number(host, "net.ipv4.tcp_syn_retries")
    linear = number(host, "net.ipv4.tcp_syn_linear_timeouts")
    if retries != 6 or linear not in (None, 4):
        return Unknown(reason="how long SYN_SENT lasts is measured for the default retries only (6, of them 4 linear)")
    # Before 6.5 there are no linear timeouts: 1 + 2 + 4 + ... + 64 s.
    seconds = SYN_SENT_S if linear is not None else 127
    product = tuple_product(goal, term.size, f"{term.size:,} ports")
    rate = product.connections // seconds
    return Bound(
        connections=rate,
        arithmetic=f"({product.arithmetic}) / {seconds} s = {rate:,} per second to destinations that do not answer",
        kind=Kind.RATE,
    )


def _close_wait(host: Host) -> Check | None:
    if not host.sockets.by_state:
        return None
    total, held = sum(host.sockets.by_state.values()), host.sockets.by_state.get("CLOSE_WAIT", 0)
    return Check(
        setting="sockets in CLOSE_WAIT",
        found=f"{held:,} of {total:,}",
        wanted=f"<= {CLOSE_WAIT_PERCENT} %",
        holds=held * 100 <= total * CLOSE_WAIT_PERCENT,
        meaning=(
            "a program got the end of its connections and does not close them: each keeps descriptor, memory, tuple"
        ),
    )


def _own_addresses(host: Host, version: int) -> int:
    """Addresses of one family that a program can bind for traffic beyond this host and its links."""
    own = set()
    for address in host.addresses:
        try:
            parsed = ip_address(address.address)
        except ValueError:
            continue
        if parsed.version == version and not (parsed.is_loopback or parsed.is_link_local or address.any_ip):
            own.add(parsed)
    return len(own)


def _source_addresses(host: Host, goal: Goal) -> Answer:
    if not is_client(goal):
        return no_source_ports(goal)
    if goal.sources == 1:
        return NotApplicable(reason="one source address is wanted")
    if not host.addresses:
        return Unknown(reason=host.unread.get("addresses", "the local addresses could not be read"))
    if any(address.any_ip for address in host.addresses):
        return NotApplicable(reason="a local route makes a whole prefix bindable")
    own = _own_addresses(host, 6 if goal.ipv6 else 4)
    if goal.sources <= own:
        return NotApplicable(reason=f"the host has {count(own, 'address', 'addresses')}")
    term = port_term(host, searches_all=goal.searches_all_ports)
    if isinstance(term, Unknown):
        return term
    ways = destinations(goal)
    total, most = term.size * own * ways, (term.size + term.may_miss(term.ports)) * own * ways
    return Bound(
        connections=total,
        may_reach=most if most > total else None,
        arithmetic=(
            f"{term.arithmetic} x {count(own, 'address', 'addresses')} that the host has"
            f" (of {goal.sources:,} wanted) x {count(ways, 'destination')} = {total:,}"
            + (f" to {most:,}" if most > total else "")
        ),
    )


def _unused_addresses(host: Host) -> Check | None:
    if not host.addresses:
        return None
    own = _own_addresses(host, 4)
    return Check(
        setting="IPv4 addresses of this host",
        found=str(own),
        wanted="1, or programs that bind",
        holds=own <= 1,
        meaning="an unbound connect() uses the one source address of its route; the others add nothing by themselves",
    )


def _ipv6(host: Host) -> Check | None:
    value = number(host, "net.ipv6.conf.all.disable_ipv6")
    if value is None:
        return None
    return Check(
        setting="net.ipv6.conf.all.disable_ipv6",
        found=str(value),
        wanted="0",
        holds=value == 0,
        meaning="the tuples of IPv6 are not used: a /64 alone gives 2^64 source addresses",
    )


def _narrow_range(host: Host) -> Check | None:
    term = port_term(host)
    if isinstance(term, Unknown):
        return None
    return Check(
        setting=PORT_RANGE,
        found=f"{term.range_size:,} of the {WIDEST_RANGE:,} ports from 1024",
        wanted=f">= {DEFAULT_RANGE:,}, the default",
        holds=term.range_size >= DEFAULT_RANGE,
        meaning="fewer connections per source address and destination than by default",
    )


LIMITS = (
    Limit(
        id="A1",
        name="four-tuple",
        title="A four-tuple is unique",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "A TCP connection is its source address, source port, destination address and destination port; no two"
            " sockets of a network namespace may share all four, SYN_SENT and TIME_WAIT included. This is the only"
            " place where 65,535 comes from, and it holds for one pair of addresses and one destination port at a"
            " time."
        ),
        read=("sock_diag dump of family, source, source port, destination, destination port", "there is no counter"),
        default="structural: cannot be set",
        formula="per (source address, destination address, destination port): at most the usable ports, at most 65,535",
        bounds=(
            "Clients and the outgoing side of a proxy: 65,535 x sources x destinations. A server: 2^48 per listener."
        ),
        hit=(
            error("connect", "EADDRNOTAVAIL", "also for a duplicate tuple after an explicit bind", rank=1),
            symptom("nothing is logged and no counter moves (L4)"),
        ),
        remedies=(
            MORE_SOURCES,
            WIDEN,
            in_program("more destination addresses or ports on the server, or IPv6"),
        ),
        since="always",
        side_effects="sockets bound to different devices or VRFs do not collide with each other",
        sources=("__inet_check_established() in net/ipv4/inet_hashtables.c",),
        bound=_uniqueness,
    ),
    Limit(
        id="A2",
        name="ephemeral-ports",
        title="The ephemeral port range",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "A connect() without a chosen port takes one from net.ipv4.ip_local_port_range, for IPv4 and IPv6 alike."
            " Reserved and poisoned ports inside it are skipped. When none is left for the destination, connect()"
            " fails."
        ),
        read=(f"{PORT_RANGE} (low and high)",),
        default=(
            "32768 60999, which is 28,232 ports; a new network namespace starts with this, not with its parent's value"
        ),
        formula=(
            "high - low + 1 - reserved - poisoned. When the range has an odd size the kernel's scan is rounded down to"
            " an even number of ports: its first or last port is found only from one of the random starts. Most"
            " runs find both (5 of 5 measured here), some miss one, so that one port is not counted. A program that"
            " chooses its ports itself reaches it."
        ),
        bounds="Clients and the outgoing side of a proxy, per source address and destination. A server is not bounded.",
        hit=(
            error("connect", "EADDRNOTAVAIL", "automatic port, all taken for this destination", rank=2),
            error("bind", "EADDRINUSE", "port 0, all ports taken", rank=2),
            log(
                r"ip_local_port_range: prefer different parity for start/end values",
                "low and high are both odd or even",
            ),
        ),
        remedies=(WIDEN, MORE_SOURCES),
        since="always",
        side_effects=(
            "low may not be below ip_unprivileged_port_start nor above high (EINVAL). Firewall rules and NodePort"
            " ranges (30000-32767) may assume the default range."
        ),
        sources=("ipv4_local_port_range(), __inet_hash_connect()", "ip(7)", "ip-sysctl"),
        bound=_ephemeral,
        usage=_ephemeral_use,
    ),
    Limit(
        id="A3",
        name="port-parity",
        title="Half of the ports are cheap",
        scope=Scope.NETNS,
        kind=Kind.SPEED,
        evidence=Evidence.MEASURED,
        why=(
            "connect() first scans the ports that have the parity of the range's low end, in steps of two, and the"
            " others only when all of those are taken; bind to port 0 does it the other way round. Beyond half of the"
            " range each connect() scans the full half in vain before it finds a port."
        ),
        read=("not a setting: connections per source and destination against the port term",),
        default="on for every automatic choice without IP_LOCAL_PORT_RANGE",
        formula="cheap up to half of the port term per source address and destination",
        bounds=(
            "The cost of connect(), not the number: with 16,000 ports 6 us below half and 440 us above it (median); a"
            " failing connect() scans everything and costs 1.1 to 3.0 ms."
        ),
        hit=(symptom("no error: system time in __inet_hash_connect and __inet6_check_established, slow connect()"),),
        remedies=(
            in_program("set IP_LOCAL_PORT_RANGE to the whole range on each socket (6.8 and later): 7 us at every fill"),
            in_program("choose the port in the program, one at a time (A4), or keep each pair of addresses below half"),
            MORE_SOURCES,
        ),
        since="split 4.2; escape by socket option 6.8; search under RCU 6.15 (86c2bc293b81)",
        side_effects="below half only ports of one parity are in use, which costs RSS one bit of spread (I4)",
        sources=("__inet_hash_connect(), inet_csk_find_open_port()", "Cloudflare, connect() - why are you so slow?"),
        bound=_parity,
    ),
    Limit(
        id="A4",
        name="socket-port-range",
        title="IP_LOCAL_PORT_RANGE on a socket",
        scope=Scope.SOCKET,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "A socket option narrows the range for one socket. It cannot widen it: a half outside the sysctl range is"
            " ignored without an error. Set to the whole range it makes the search flat; set to one port it chooses"
            " that port without binding it, so that nobody else is kept from it."
        ),
        read=("getsockopt(IPPROTO_IP, 51): high << 16 | low, for IPv6 sockets too",),
        default="0: unset",
        formula="the ports of the sub-range per destination; an odd size loses none; reserved ports are still skipped",
        bounds="Clients that set it, per socket.",
        hit=(
            error("connect", "EADDRNOTAVAIL", "the sub-range is full for this tuple", rank=5),
            error("setsockopt", "EINVAL", "low above high, both set"),
        ),
        remedies=(in_program("try the next sub-range, or widen the sysctl range first (A2)"),),
        since="6.3, and 6.1.y by backport; steps by one through every parity only from 6.8",
        side_effects=(
            "Python has no constant for it and its int form overflows: pass struct.pack('=I', high << 16 | low)"
        ),
        sources=("inet_sk_get_local_port_range(), do_ip_setsockopt()",),
        check=_has_port_range_option,
    ),
    Limit(
        id="A5",
        name="reserved-ports",
        title="Reserved ports",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "Ports listed in net.ipv4.ip_local_reserved_ports are never chosen automatically, with"
            " IP_LOCAL_PORT_RANGE or without; an explicit bind may still take them. It is the supported way to keep"
            " services, or a port allocator of one's own, apart from the kernel's choice."
        ),
        read=(f"{RESERVED_PORTS} (such as 8080,9148-9150)",),
        default="empty",
        formula="the ports that list and range have in common are subtracted from the port term",
        bounds="Clients and the outgoing side of a proxy.",
        hit=(error("connect", "EADDRNOTAVAIL", "earlier than the range alone says", rank=20),),
        remedies=(
            Remedy(
                text="write the list that is needed; a newline clears it, an empty write changes nothing",
                command="sysctl -w net.ipv4.ip_local_reserved_ports=8080,9100",
                persist="/etc/sysctl.d/60-fourtuple.conf, then sysctl --system",
            ),
        ),
        since="2.6.35",
        side_effects="none on explicit binds",
        sources=("inet_is_local_reserved_port()", "ip-sysctl"),
        usage=_reserved_use,
    ),
    Limit(
        id="A6",
        name="unprivileged-port-start",
        title="The first unprivileged port",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "The low end of the port range may not be below it. With 0 the range may be 1 to 65535, which is all"
            " 65,535 ports."
        ),
        read=("net.ipv4.ip_unprivileged_port_start",),
        default="1024",
        formula="the widest range is this value to 65535",
        bounds="How far the port range of clients can be widened.",
        hit=(error("write", "EINVAL", "to ip_local_port_range below it, or to it above the current low end"),),
        remedies=(
            set_sysctl(
                "net.ipv4.ip_unprivileged_port_start",
                "0",
                "allow a range from port 1, on machines that only make load",
                risk="unprivileged processes may then bind low ports",
            ),
        ),
        since="4.11",
        side_effects="it also decides who may bind ports below 1024",
        sources=("ip-sysctl", "ipv4_privileged_ports() and ipv4_local_port_range() in sysctl_net_ipv4.c"),
        check=_unprivileged_start,
    ),
    Limit(
        id="A7",
        name="exclusive-bind",
        title="bind() before connect()",
        scope=Scope.SOCKET,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "A program that binds a source address with port 0 gets a port at once, before the kernel knows the"
            " destination, so the port is taken for all destinations. IP_BIND_ADDRESS_NO_PORT leaves the choice to"
            " connect(), where a port serves every destination. SO_REUSEADDR does not help."
        ),
        read=(
            "strace: bind to port 0 before connect without option 24",
            "a sock_diag dump in which no local port has two destinations",
        ),
        default="off: every bind takes its port",
        formula=(
            "without the option the port term per source address over all destinations together; with it, per"
            " destination. A port that somebody bound at another address alone counts: bind() compares addresses, while"
            " connect() skips the port (A8)"
        ),
        bounds="Clients that bind first. Measured with 90 ports and two destinations: 90 + 0 without, 90 + 90 with it.",
        hit=(error("bind", "EADDRINUSE", "port 0, all ports taken by binders", rank=1),),
        remedies=(
            in_program("set IP_BIND_ADDRESS_NO_PORT (IPPROTO_IP, 24) before bind, for IPv6 sockets too"),
            in_program("without changing the program: A11, a preloaded library or a BPF hook on bind"),
        ),
        since="4.2",
        side_effects="the error moves from bind to connect, and getsockname says port 0 until then",
        sources=("__inet_bind(), inet_csk_get_port()", "90c337da1524", "ip(7)"),
        bound=_exclusive,
    ),
    Limit(
        id="A8",
        name="poisoned-ports",
        title="Bind buckets that automatic choice skips",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "The bind table is keyed by port alone. A port that any socket got by bind() - a listener, a fixed port,"
            " port 0 without IP_BIND_ADDRESS_NO_PORT - is skipped by automatic choice for every address, every"
            " destination and both families, in TIME_WAIT for 60 s more. It is the first suspect when ports look free"
            " and connect() fails."
        ),
        read=(
            "listeners with a port in the range",
            "bound, unconnected sockets: sock_diag mask 1 << 13 (6.8 and later)",
            "a probe: connect to an unused loopback destination with IP_LOCAL_PORT_RANGE of the one port (10 us each)",
        ),
        default="none",
        formula="subtracted from the port term",
        bounds="Every client of the network namespace. One program that bound 100 ports of 100 left the others none.",
        hit=(error("connect", "EADDRNOTAVAIL", "far below the expected count", rank=3),),
        remedies=(
            in_program("set IP_BIND_ADDRESS_NO_PORT in every client that binds"),
            set_sysctl(RESERVED_PORTS, "8080,9100", "reserve the listening ports, or move them out of the range"),
            in_program("never mix explicit binding and automatic choice in one range of one network namespace"),
        ),
        since="always; released earlier from 6.18 (A9)",
        side_effects="an accepted connection keeps blocking its port after the listener closed",
        sources=("__inet_hash_connect() skips a bucket with fastreuse >= 0", "inet_csk_update_fastreuse()"),
        usage=_poisoned_use,
    ),
    Limit(
        id="A9",
        name="sticky-buckets",
        title="A bind bucket after its binder has left",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "Before 6.18 a port once bound explicitly stays closed to automatic choice until all of its sockets are"
            " gone, even if only ordinary connections remain: one bound query can cost a long-lived client the port"
            " for hours. 6.18 works the state out anew when a binder leaves."
        ),
        read=("not exposed; the kernel version, and the probe of A8",),
        default="sticky before 6.18",
        formula="subtracted from the port term with the poisoned ports",
        bounds="Clients that keep connections for long on kernels before 6.18.",
        hit=(error("connect", "EADDRNOTAVAIL", "as A8, with no binder in sight", rank=6),),
        remedies=(in_program("restart the long-lived client or the offender, or use 6.18 or later"),),
        since="recovery from 6.18 (d57f4b874946)",
        side_effects="none",
        sources=("tcp: Update bind bucket state on port release (d57f4b874946)",),
        check=_sticky_buckets,
    ),
    Limit(
        id="A10",
        name="explicit-bind",
        title="Ports chosen in the program by explicit bind",
        scope=Scope.SOCKET,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "bind to a chosen (address, port) with SO_REUSEADDR, then connect, uses every port for every destination"
            " at a flat 7.5 to 10 us, and reopens a tuple in TIME_WAIT at once where timestamps are on. The price is"
            " that it poisons the ports for everybody else (A8), and every holder has to set SO_REUSEADDR. It is flat"
            " only while few sockets share one address and port: bind compares with each of them, so that one port to"
            " 12,000 destinations costs 500 us per connection (13 us with A4's single-port form)."
        ),
        read=("the program",),
        default="not used",
        formula="the port term per destination, any port from 1 to 65535",
        bounds="Clients with a port allocator of their own.",
        hit=(
            error("bind", "EADDRINUSE", "a holder without SO_REUSEADDR, a listener, or TIME_WAIT of one", rank=4),
            error("connect", "EADDRNOTAVAIL", "the tuple is in TIME_WAIT and timestamps are off", rank=7),
        ),
        remedies=(
            set_sysctl(RESERVED_PORTS, "32768-60999", "reserve the allocator's ports, or give it a network namespace"),
            set_sysctl("net.ipv4.tcp_timestamps", "1", "timestamps on, so that TIME_WAIT does not block it"),
        ),
        since="always",
        side_effects="poisons the ports it uses",
        sources=("tcp_twsk_unique() with twp == NULL", "inet_bhash2_conflict()"),
        check=_timestamps,
    ),
    Limit(
        id="A11",
        name="autobind-reuse",
        title="net.ipv4.ip_autobind_reuse",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "Lets bind to port 0 with SO_REUSEADDR take ports that are in use when all are. The port is chosen"
            " without knowing the destination, so collisions come up at connect(): 3 of 90 succeeded before the first"
            " error."
        ),
        read=("net.ipv4.ip_autobind_reuse",),
        default="0",
        formula="none that holds: the program has to retry",
        bounds="Closed binaries that bind first; a last resort.",
        hit=(error("connect", "EADDRNOTAVAIL", "the blindly chosen tuple exists", rank=8),),
        remedies=(in_program("prefer IP_BIND_ADDRESS_NO_PORT (A7), and leave this at 0"),),
        since="5.7 (version not verified)",
        side_effects="ip-sysctl leaves it to experts",
        sources=("ip-sysctl", "inet_csk_find_open_port()"),
        check=equals(
            "net.ipv4.ip_autobind_reuse", 0, "bind picks ports in use, so connect() fails where it did not before"
        ),
    ),
    Limit(
        id="A12",
        name="time-wait",
        title="TIME_WAIT holds the tuple",
        scope=Scope.NETNS,
        kind=Kind.RATE,
        evidence=Evidence.MEASURED,
        why=(
            "The side that closes first keeps the tuple for 60 s, a time compiled into the kernel. tcp_tw_reuse lets"
            " connect() take it earlier where both ends use timestamps: 2, the default, only for loopback addresses;"
            " 1 for all."
        ),
        read=(
            "net.ipv4.tcp_tw_reuse",
            "net.ipv4.tcp_tw_reuse_delay (ms, 6.14 and later)",
            "net.ipv4.tcp_timestamps",
            "tw in /proc/net/sockstat",
        ),
        default="reuse 2 since 4.19, delay 1,000 ms, TIME_WAIT 60 s",
        formula="port term / 60 per second and destination; with reuse 1 and timestamps, port term per delay",
        bounds=(
            "The rate of short connections of a client that closes first: 470 per second with the default range,"
            " 1,075 with 1024 to 65535, per source and destination."
        ),
        hit=(
            error("connect", "EADDRNOTAVAIL", "with many sockets in TIME_WAIT", rank=4),
            error("bind", "EADDRINUSE", "fixed port, TIME_WAIT without SO_REUSEADDR", rank=5),
            counter("TcpExt.TW", "sockets that went through TIME_WAIT", breaks=False),
        ),
        remedies=(
            set_sysctl(
                "net.ipv4.tcp_tw_reuse",
                "1",
                "reuse TIME_WAIT for outgoing connections",
                risk="a NAT box that rewrites timestamps may break it",
            ),
            in_program("keep connections open, or let the server close first"),
        ),
        since="2 is the default since 4.19; tcp_tw_recycle is gone since 4.12",
        side_effects="256 B of slab each, and bind buckets; FIN_WAIT_2 is never reused",
        sources=("tcp_twsk_unique()", "TCP_TIMEWAIT_LEN"),
        bound=_time_wait_rate,
    ),
    Limit(
        id="A13",
        name="time-wait-buckets",
        title="net.ipv4.tcp_max_tw_buckets",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "Above this number TIME_WAIT is skipped and the port is free at once. It bounds no connections; it only"
            " takes away the protection against old segments."
        ),
        read=("net.ipv4.tcp_max_tw_buckets", "tw in /proc/net/sockstat"),
        default="half of the established hash: 131,072 on 24 GiB",
        formula="rate of closes x 60 s x 1.2 to keep all of them",
        bounds="No connections.",
        hit=(counter("TcpExt.TCPTimeWaitOverflow", "no log line", breaks=False),),
        remedies=(set_sysctl("net.ipv4.tcp_max_tw_buckets", "1048576", "raise it with the rate of closes"),),
        since="always",
        side_effects="lowered, old segments may meet a new connection",
        sources=("inet_twsk_alloc(), tcp_set_hashinfo()",),
        usage=_time_wait_use,
    ),
    Limit(
        id="A14",
        name="fin-wait-2",
        title="FIN_WAIT_2 and net.ipv4.tcp_fin_timeout",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "How long a socket that the program closed waits for the peer's FIN. If the peer never closes, the tuple"
            " is held that long. It does not change TIME_WAIT. Measured: with 3 s it is gone after 3 s."
        ),
        read=("net.ipv4.tcp_fin_timeout (s)",),
        default="60",
        formula="adds rate of half-closed connections x timeout to the tuples in use",
        bounds="Clients and proxies whose peers keep connections half-open.",
        hit=(symptom("many sockets in FIN_WAIT_2"),),
        remedies=(
            set_sysctl("net.ipv4.tcp_fin_timeout", "20", "15 to 30 s on proxies"),
            in_program("TCP_LINGER2 on a socket"),
        ),
        since="always",
        side_effects="a slow peer gets a reset for its late data",
        sources=("tcp(7)", "ip-sysctl"),
        check=at_most(
            "net.ipv4.tcp_fin_timeout", 60, "half-closed connections hold their tuple longer than by default"
        ),
    ),
    Limit(
        id="A15",
        name="syn-sent-hold",
        title="SYN_SENT holds port and descriptor",
        scope=Scope.NETNS,
        kind=Kind.RATE,
        evidence=Evidence.MEASURED,
        why=(
            "A connect() that nobody answers keeps its port and descriptor until the retries are over: 131 s by default"
            " (6 retries, the first 4 a second apart). Measured: of ten, the last was gone after 135 s."
        ),
        read=("net.ipv4.tcp_syn_retries", "net.ipv4.tcp_syn_linear_timeouts (6.5 and later)"),
        default="6 retries, 4 of them linear",
        formula="a destination that drops everything holds rate x 131 s ports",
        bounds="Clients whose destinations do not answer.",
        hit=(
            error("connect", "ETIMEDOUT", "after 131 s", rank=60),
            counter("TcpExt.TCPSynRetrans", "path loss", rank=1, breaks=False),
        ),
        remedies=(
            in_program("a timeout of a few seconds for connect; TCP_SYNCNT or TCP_USER_TIMEOUT on the socket"),
            set_sysctl("net.ipv4.tcp_syn_retries", "3", "fewer retries on crawlers"),
        ),
        since="linear timeouts 6.5",
        side_effects="fewer retries give up on slow paths",
        sources=("ip-sysctl", "tcp_retransmit_timer()"),
        bound=_black_hole_rate,
    ),
    Limit(
        id="A16",
        name="close-wait",
        title="CLOSE_WAIT that is never closed",
        scope=Scope.PROCESS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "The peer has closed and the program has not. No timer ends it: descriptor, memory and tuple are held"
            " until the program calls close(). A fault of the program, not a limit of the kernel."
        ),
        read=("sock_diag state 8, per process",),
        default="no timeout",
        formula="subtract from every other limit",
        bounds="Every role.",
        hit=(symptom("the number of sockets in CLOSE_WAIT only grows"),),
        remedies=(
            in_program("close the socket when a read returns 0"),
            Remedy(
                text="as a stopgap, destroy them (CONFIG_INET_DIAG_DESTROY)",
                command="ss -K state close-wait",
                persist="does not persist: it acts on the sockets there are",
                risk="the program sees ECONNABORTED",
            ),
        ),
        since="always",
        side_effects="none",
        sources=("RFC 9293 section 3.3.2",),
        check=_close_wait,
    ),
    Limit(
        id="A17",
        name="source-addresses",
        title="How many source addresses the host has",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "Each local address multiplies the port term. Addresses can be added one by one, or a whole prefix made"
            " local by one route (AnyIP): 50 sources x 100 ports gave 5,000 connections to one destination. For IPv6"
            " the route is not enough: the socket also sets IPV6_FREEBIND, or the host ip_nonlocal_bind."
        ),
        read=(
            "ip -j addr",
            "ip route show table local",
            "net.ipv4.ip_nonlocal_bind",
            "net.ipv6.ip_nonlocal_bind",
        ),
        default="the addresses of the interfaces",
        formula="port term x addresses",
        bounds="Clients and the outgoing side of a proxy.",
        hit=(error("bind", "EADDRNOTAVAIL", "the address is not local", rank=1),),
        remedies=(
            MORE_SOURCES,
            Remedy(
                text="add single addresses",
                command="ip addr add 10.0.0.7/32 dev eth0",
                persist="networkd, netplan or NetworkManager",
                risk="thousands of them slow down listing (H4)",
            ),
        ),
        since="always; IPV6_FREEBIND 4.15",
        side_effects="peers need a route back (H2, H3); clouds drop unknown source addresses",
        sources=("the local routing table", "ip(7)"),
        bound=_source_addresses,
    ),
    Limit(
        id="A18",
        name="route-source",
        title="An unbound connect() uses one source address",
        scope=Scope.SOCKET,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "Without bind() the source is the preferred address of the route: 50 of 50 connections from an interface"
            " with three addresses used the first. More addresses do nothing for a program that does not bind."
        ),
        read=("ip route get DESTINATION",),
        default="one address per route",
        formula="sources = 1 for programs that do not bind",
        bounds="Clients that do not bind.",
        hit=(
            error("connect", "EADDRNOTAVAIL", "at the port term of one address although the host has several", rank=9),
        ),
        remedies=(
            in_program("bind each socket to one of the addresses, with IP_BIND_ADDRESS_NO_PORT (A7)"),
            Remedy(
                text="routes with another src for each slice of the destinations",
                command="ip route add 203.0.113.0/25 via 10.0.0.1 src 10.0.0.8",
                persist="the same route in networkd, netplan or NetworkManager",
            ),
            in_program("one network namespace per address, or SNAT with several addresses (G4)"),
        ),
        since="always",
        side_effects="none",
        sources=("ip_route_output_key_hash_rcu()", "ip-route(8)"),
        check=_unused_addresses,
    ),
    Limit(
        id="A19",
        name="ipv6-tuples",
        title="IPv6 has tuples of its own",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "IPv6 shares the port range and the bind table with IPv4, but not the tuples: 100 + 100 connections on"
            " 100 ports. A /64 gives 2^64 source addresses, the cheapest way past the port term."
        ),
        read=("net.ipv6.conf.all.disable_ipv6",),
        default="on",
        formula="a port term of its own; 130 B more of memory per socket",
        bounds="Clients and the outgoing side of a proxy.",
        hit=(error("connect", "EADDRNOTAVAIL", "the IPv6 tuples of one address are full", rank=10),),
        remedies=(
            Remedy(
                text="make a /64 local; the socket sets IPV6_FREEBIND",
                command="ip -6 route add local 2001:db8:1::/64 dev lo",
                persist="a route of type local in networkd, netplan or NetworkManager",
            ),
        ),
        since="always",
        side_effects="a port bound in one family is poisoned in both (A8)",
        sources=("__inet6_check_established()",),
        check=_ipv6,
    ),
    Limit(
        id="A20",
        name="network-namespaces",
        title="Network namespaces, VRFs and bound devices",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "Each network namespace has its own tuples, port range, bind table and most of net.ipv4.*. Connections"
            " multiply only where each namespace shows another source address to the destination. Sockets bound to"
            " different devices do not collide here, but do on the wire if the addresses are equal."
        ),
        read=("/proc/self/ns/net", "user.max_net_namespaces"),
        default="one; 96,365 allowed per user on 24 GiB",
        formula="port term x namespaces with different addresses",
        bounds="Clients and proxies.",
        hit=(error("unshare", "ENOSPC", "no more namespaces for this user (K5)", rank=2),),
        remedies=(
            Remedy(
                text="one namespace per source address",
                command="ip netns add client1",
                persist="a oneshot unit; named namespaces last until reboot",
                risk="conntrack counts a connection once in each namespace it crosses (G1)",
            ),
        ),
        since="2.6.24",
        side_effects="a veth pair each; host limits are no longer visible inside",
        sources=("network_namespaces(7)",),
    ),
    Limit(
        id="A21",
        name="port-perturbation",
        title="The perturbation table of the port search",
        scope=Scope.HOST,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.SOURCE,
        why=(
            "Spreads the start of the port search so that ports cannot be guessed. 65,536 entries of 4 B; it bounds"
            " nothing."
        ),
        read=("CONFIG_INET_TABLE_PERTURB_ORDER of the kernel",),
        default="16, which is 65,536 entries",
        formula="none",
        bounds="Nothing.",
        hit=(symptom("none"),),
        remedies=(in_program("none is needed"),),
        since="always; how large it is depends on the kernel",
        side_effects="none",
        sources=("inet_hashtables.c",),
    ),
    Limit(
        id="A22",
        name="port-zero",
        title="Ports that no range can hold",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "Port 0 is never the port of a connection: bind takes it as a request to choose, and connect to it is"
            " refused. A range from 1024 keeps 64,512 ports; going below needs A6. So 65,535 is the most that one"
            " source address has for one destination."
        ),
        read=("net.ipv4.ip_unprivileged_port_start",),
        default="1024, so 64,512",
        formula="65535 - max(1, first unprivileged port) + 1",
        bounds="The most that widening the port range can give a client.",
        hit=(error("connect", "EADDRNOTAVAIL", "with the range as wide as it goes", rank=30),),
        remedies=(
            set_sysctl("net.ipv4.ip_unprivileged_port_start", "0", "lower the first unprivileged port (A6)"),
            MORE_SOURCES,
        ),
        since="always",
        side_effects="none",
        sources=("RFC 6335 section 6", "inet_csk_get_port()"),
        check=_narrow_range,
    ),
)
