"""Family G: connection tracking, address translation, firewall rules, the datapaths of clusters and clouds.

Decides how many connections may pass a host, whoever holds their sockets.
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
    Usage,
    counter,
    error,
    in_program,
    log,
    set_sysctl,
    symptom,
)
from fourtuple.limits._terms import Answer, count, divided, number, sockets_per_connection
from fourtuple.tuples import HIGHEST_PORT

MAXIMUM = "net.netfilter.nf_conntrack_max"
TIME_WAIT_TIMEOUT = "net.netfilter.nf_conntrack_tcp_timeout_time_wait"
SNAT_PORTS = (1_024, HIGHEST_PORT)
"""What nf_nat chooses from where the original source port is 1024 or above."""
PORTS_ALL_TRIED = 128
"""NF_NAT_MAX_ATTEMPTS: of more ports than that nf_nat_l4proto_unique_tuple() tries some, from random offsets."""

GIBIBYTE = 2**30

MORE_ENTRIES = Remedy(
    text="raise the table",
    command=f"sysctl -w {MAXIMUM}=4194304",
    persist=(
        "/etc/sysctl.d/60-fourtuple.conf, and nf_conntrack in /etc/modules-load.d/nf_conntrack.conf: the key does"
        " not exist before the module is loaded"
    ),
    risk="256 B and more of kernel memory per entry",
)


def _table(host: Host, goal: Goal) -> Answer:
    tracking, translates = host.conntrack, goal.role is Role.NAT
    if not tracking.loaded:
        if "conntrack" in host.unread:
            return Unknown(reason=f"conntrack could not be read: {host.unread['conntrack']}")
        return _table_once_loaded(host) if translates else NotApplicable(reason="nf_conntrack is not loaded")
    # Translation registers the hooks itself: a NAT box tracks, whatever the rules do now.
    if tracking.active is False and not translates:
        return NotApplicable(reason="nf_conntrack is loaded, but no rule of this network namespace tracks")
    if tracking.maximum is None:
        return Unknown(reason="nf_conntrack_max could not be read; a host limit that binds all the same")
    if tracking.active is None and not translates:
        return Unknown(
            reason=f"whether a rule tracks connections cannot be told from here; if so, {tracking.maximum:,}"
        )
    used = tracking.count or 0
    entries = sockets_per_connection(goal)
    return divided(
        tracking.maximum - used,
        entries,
        f"{tracking.maximum:,} entries - {used:,} in use",
        count(entries, "entry", "entries"),
    )


def _table_once_loaded(host: Host) -> Answer:
    """What nf_conntrack_init_start() would set on a 64-bit kernel."""
    total = host.machine.memory_total_bytes
    if total is None:
        return Unknown(reason="nf_conntrack is not loaded, and the memory that sets its default could not be read")
    most = 262_144 if total > 4 * GIBIBYTE else 65_536 if total > GIBIBYTE else max(1_024, total // 16_384 // 8)
    return Bound(
        connections=most, arithmetic=f"nf_conntrack is not loaded; by default with this memory = {most:,} entries"
    )


def _table_use(host: Host) -> tuple[Usage, ...]:
    tracking = host.conntrack
    if tracking.active is False or tracking.maximum is None or tracking.count is None:
        return ()
    return (Usage(used=tracking.count, of=tracking.maximum, unit="conntrack entries"),)


def _chain(host: Host) -> Check | None:
    tracking = host.conntrack
    if not tracking.maximum or not tracking.buckets:
        return None
    # Each entry is in the hash twice, once per direction.
    return Check(
        setting="net.netfilter.nf_conntrack_buckets",
        found=f"{tracking.buckets:,} for at most {tracking.maximum:,} entries",
        wanted="nf_conntrack_max / 4 or more: chains of 8 at most",
        holds=tracking.maximum <= 4 * tracking.buckets,
        meaning="chains get long when the table fills: softirq time, and drops as chaintoolong",
    )


def _churn(host: Host, goal: Goal) -> Answer:
    tracking = host.conntrack
    if not tracking.loaded or tracking.active is not True or tracking.maximum is None:
        return NotApplicable(reason="connections are not known to be tracked here")
    seconds = number(host, TIME_WAIT_TIMEOUT)
    if not seconds:
        return Unknown(reason=f"{TIME_WAIT_TIMEOUT} could not be read")
    rate = tracking.maximum // (seconds * sockets_per_connection(goal))
    return Bound(
        connections=rate,
        arithmetic=f"{tracking.maximum:,} entries / {seconds} s after closing = {rate:,} short connections per second",
        kind=Kind.RATE,
    )


def _source_ports(host: Host, goal: Goal) -> Answer:
    if goal.role is not Role.NAT:
        return NotApplicable(reason="this host's own connections, not translated ones")
    if not host.source_nat:
        # Translation tracks (nf_ct_netns_get): where nothing does, no unread rule translates.
        if "nft" in host.unread and host.conntrack.active is not False:
            return Unknown(reason=f"the NAT rules could not be read: {host.unread['nft']}")
        names = goal.sources * (SNAT_PORTS[1] - SNAT_PORTS[0] + 1)
        total = names * goal.destinations
        return Bound(
            connections=total,
            arithmetic=(
                f"no SNAT rule here; with {count(goal.sources, 'address', 'addresses')} x (65535 - 1024 + 1) ports"
                f" x {count(goal.destinations, 'destination')} = {total:,}"
            ),
        )
    # A masquerade rule has one address per interface: the interface's own.
    addresses = sum(max(1, rule.addresses) for rule in host.source_nat)
    widest = [rule.ports or SNAT_PORTS for rule in host.source_nat]
    if all(ports == SNAT_PORTS for ports in widest):
        names = addresses * (SNAT_PORTS[1] - SNAT_PORTS[0] + 1)
        text = f"{count(addresses, 'SNAT address', 'SNAT addresses')} x (65535 - 1024 + 1) ports"
    else:
        names = sum(
            max(1, rule.addresses) * max(0, ports[1] - ports[0] + 1)
            for rule, ports in zip(host.source_nat, widest, strict=True)
        )
        text = f"{names:,} addresses and ports over {count(len(host.source_nat), 'SNAT rule')}"
    total = names * goal.destinations
    text += f" x {count(goal.destinations, 'destination')} = {total:,}"
    if any(ports[1] - ports[0] >= PORTS_ALL_TRIED for ports in widest):
        text += "; the search may fail earlier"
    return Bound(connections=total, arithmetic=text)


def _rules(host: Host, goal: Goal) -> Answer:
    if host.rule_limits:
        more = f", and {len(host.rule_limits) - 1} more" if len(host.rule_limits) > 1 else ""
        return Unknown(reason=f"a firewall rule bounds connections by itself: {host.rule_limits[0][:120]}{more}")
    if "nft" in host.unread:
        return Unknown(reason=f"the firewall rules could not be read: {host.unread['nft']}")
    return NotApplicable(reason="no rule counts or rates connections")


LIMITS = (
    Limit(
        id="G1",
        name="conntrack-table",
        title="net.netfilter.nf_conntrack_max",
        scope=Scope.HOST,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "One number for the host, compared with the entries of each network namespace by itself. A connection"
            " takes an entry in every namespace it crosses. It counts only where a rule, NAT or a ct expression makes"
            " the kernel track; a loaded module alone tracks nothing."
        ),
        read=(MAXIMUM, "net.netfilter.nf_conntrack_count", "/proc/net/stat/nf_conntrack (hexadecimal, per processor)"),
        default="262,144 above 4 GiB, 65,536 above 1 GiB; kube-proxy sets max(131,072, 32,768 x cores)",
        formula=(
            "(maximum - entries) / entries per connection: one, two where it is proxied. Certain, and less than there"
            " may be: entries that are not assured (half-open, one-way UDP) give way to new ones. Measured: with room"
            " for 500 beside such entries 627 connections stood, and early_drop had risen by 127."
        ),
        bounds="Every role, where connections are tracked; also those that are closing (G3).",
        hit=(
            log(r"nf_conntrack: (nf_conntrack: )?table full(, dropping packet| in netns)"),
            counter("conntrack.drop", rank=1),
            counter("conntrack.early_drop", breaks=False),
            error("connect", "ETIMEDOUT", "the SYN vanishes on this host", rank=2),
            error("sendto", "EPERM", "UDP", rank=1),
            counter("TcpExt.TCPSynRetrans", "the SYN vanishes on this host", rank=3, breaks=False),
        ),
        remedies=(
            MORE_ENTRIES,
            Remedy(
                text="do not track the port at all",
                command="nft add rule ip raw prerouting tcp dport 443 notrack  # and the same in output",
                persist="/etc/nftables.conf",
                risk="stateful rules no longer see these connections",
            ),
        ),
        since="always; the log names the namespace on 6.18",
        side_effects="2 million entries take about 0.5 GB",
        sources=("__nf_conntrack_alloc(), nf_conntrack_init_start()",),
        bound=_table,
        usage=_table_use,
    ),
    Limit(
        id="G2",
        name="conntrack-buckets",
        title="net.netfilter.nf_conntrack_buckets",
        scope=Scope.HOST,
        kind=Kind.SPEED,
        evidence=Evidence.SOURCE,
        why=(
            "The hash of the table. Every entry is in it twice, so with as many buckets as entries chains are two long."
        ),
        read=("net.netfilter.nf_conntrack_buckets",),
        default="as many as nf_conntrack_max",
        formula="average chain = 2 x entries / buckets",
        bounds="The cost of a packet.",
        hit=(counter("conntrack.chaintoolong"), symptom("softirq time in nf_conntrack")),
        remedies=(
            Remedy(
                text="more buckets",
                command="sysctl -w net.netfilter.nf_conntrack_buckets=1048576",
                persist="options nf_conntrack hashsize=1048576 in /etc/modprobe.d/nf_conntrack.conf",
                risk="set as a parameter, it also sets nf_conntrack_max to eight times as much",
            ),
        ),
        since="always",
        side_effects="8 B per bucket",
        sources=("nf_conntrack_hash_resize(), nf_conntrack_init_start()", "nf_conntrack-sysctl.rst"),
        check=_chain,
    ),
    Limit(
        id="G3",
        name="conntrack-timeouts",
        title="How long conntrack remembers",
        scope=Scope.NETNS,
        kind=Kind.RATE,
        evidence=Evidence.MEASURED,
        why=(
            "A closed connection keeps its entry for 120 s, an established one without traffic for five days. 2,000"
            " short connections a second fill the default table."
        ),
        read=(TIME_WAIT_TIMEOUT, "net.netfilter.nf_conntrack_tcp_timeout_established"),
        default=(
            "established 432,000 s; time_wait, syn_sent, fin_wait 120; syn_recv, close_wait 60; last_ack 30; close 10"
        ),
        formula="entries that are closing = rate x 120 s",
        bounds="The rate of short connections where they are tracked.",
        hit=(symptom("many entries in TIME_WAIT: conntrack -L"),),
        remedies=(
            set_sysctl(TIME_WAIT_TIMEOUT, "30", "forget closed connections earlier"),
            set_sysctl(
                "net.netfilter.nf_conntrack_tcp_timeout_established",
                "86400",
                "forget silent connections after a day",
                risk="idle connections are cut if it is below their keepalive",
            ),
        ),
        since="always",
        side_effects="none",
        sources=("nf_conntrack_proto_tcp.c",),
        bound=_churn,
    ),
    Limit(
        id="G4",
        name="snat-ports",
        title="Ports of a translating address",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.SOURCE,
        why=(
            "Translated connections of one protocol from one address to one destination need different ports: 1024 to"
            " 65535 where the original port is 1024 or above. The kernel tries about 248 ports at random places and"
            " gives up, so it fails now and then before all are taken."
        ),
        read=("nft -j list ruleset: snat, masquerade", "conntrack -L"),
        default="64,512 ports per SNAT address and destination",
        formula="SNAT addresses x 64,512 x destinations",
        bounds="A NAT box, and everything behind it.",
        hit=(
            counter("conntrack.insert_failed"),
            counter("conntrack.drop", rank=60),
            error("connect", "ETIMEDOUT", "behind the NAT", rank=5),
        ),
        remedies=(
            Remedy(
                text="more SNAT addresses",
                command="nft add rule ip nat postrouting oifname eth0 snat to 192.0.2.10-192.0.2.40 fully-random",
                persist="/etc/nftables.conf",
                risk="the addresses have to be routed to this host",
            ),
            in_program("avoid NAT: route, or IPv6"),
        ),
        since="always; the bounded search as read in 6.12",
        side_effects="none",
        sources=("nf_nat_l4proto_unique_tuple() in nf_nat_core.c",),
        bound=_source_ports,
    ),
    Limit(
        id="G5",
        name="ebpf-datapath",
        title="Maps of an eBPF datapath",
        scope=Scope.HOST,
        kind=Kind.COUNT,
        evidence=Evidence.DOCUMENTED,
        why=(
            "Cilium tracks and translates in maps of fixed size: 512 k for NAT and for TCP, or a share of the memory."
            " None of it shows in nf_conntrack; the limits live in its daemon."
        ),
        read=("cilium status --verbose", "cilium bpf ct list global"),
        default="512 k entries, or bpf-map-dynamic-size-ratio 0.0025 with at least 131,072",
        formula="one entry per connection and direction",
        bounds="Pods of such a cluster.",
        hit=(symptom("drop reason: No mapping for NAT masquerade; cilium_drop_count_total rises"),),
        remedies=(
            Remedy(
                text="larger maps",
                command="cilium config set bpf-map-dynamic-size-ratio 0.01",
                persist="the configuration map of the cluster",
            ),
        ),
        since="as deployed",
        side_effects="memory",
        sources=("docs.cilium.io, eBPF Maps",),
    ),
    Limit(
        id="G6",
        name="cloud-nat",
        title="NAT gateways and connection tracking of clouds",
        scope=Scope.PEER,
        kind=Kind.COUNT,
        evidence=Evidence.DOCUMENTED,
        why=(
            "An AWS NAT gateway allows 55,000 connections per destination and address, with up to 8 addresses; an"
            " Azure one 50,000 per address to one destination. Instances have an allowance of tracked connections."
            " Not observable from the host."
        ),
        read=("ethtool -S: conntrack_allowance_exceeded on ENA", "ErrorPortAllocation in the provider's metrics"),
        default="as above",
        formula="addresses of the gateway x 55,000 per destination",
        bounds="Clients behind such a gateway.",
        hit=(error("connect", "ETIMEDOUT", "with nothing wrong on the host", rank=6),),
        remedies=(in_program("more addresses on the gateway, or endpoints and addresses that avoid it"),),
        since="as offered",
        side_effects="idle flows are forgotten after 350 s on AWS",
        sources=("AWS: attach multiple IPs to a NAT gateway; ErrorPortAllocation", "Azure NAT gateway documentation"),
    ),
    Limit(
        id="G7",
        name="firewall-rules",
        title="Firewall rules that count connections",
        scope=Scope.NETNS,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "connlimit, hashlimit, recent, and the limit rate and ct count of nft are limits that somebody made."
            " Measured: with ct count over 5 the sixth connection is refused."
        ),
        read=("nft -j list ruleset: ct count over, limit rate", "iptables-save: connlimit, hashlimit"),
        default="none",
        formula="as the rule says",
        bounds="Whatever the rule matches.",
        hit=(
            error("connect", "ECONNREFUSED", "at a round number, where the rule rejects", rank=2),
            error("connect", "ETIMEDOUT", "at a round number, where the rule drops", rank=7),
        ),
        remedies=(
            Remedy(
                text="change the rule",
                command="nft -a list ruleset | grep -E 'ct count|limit rate'",
                persist="/etc/nftables.conf",
            ),
        ),
        since="always",
        side_effects="it was made for a reason",
        sources=("nft(8)", "measured on 6.18"),
        bound=_rules,
    ),
)
