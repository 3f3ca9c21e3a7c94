"""Family I: the way of a packet: queues between card, kernel and socket. They bound the rate and lose SYNs in bursts.

Decides nothing about how many connections may exist.
"""

from __future__ import annotations

from fourtuple.limits._model import (
    Evidence,
    Kind,
    Limit,
    Remedy,
    Scope,
    counter,
    error,
    in_program,
    set_sysctl,
    symptom,
)
from fourtuple.limits._terms import at_least

LIMITS = (
    Limit(
        id="I1",
        name="backlog-queue",
        title="net.core.netdev_max_backlog",
        scope=Scope.HOST,
        kind=Kind.RATE,
        evidence=Evidence.SOURCE,
        why=(
            "Packets of loopback, veth and RPS wait in a queue per processor. At bursts of connections inside one"
            " machine or between containers it overflows and SYNs are lost."
        ),
        read=("net.core.netdev_max_backlog", "/proc/net/softnet_stat, column 2 (hexadecimal, per processor)"),
        default="1000 packets per processor",
        formula="none: packets in a burst",
        bounds="Bursts on loopback and veth. The file is absent in a child namespace.",
        hit=(
            counter("softnet.dropped", "column 2"),
            error("connect", "ETIMEDOUT", "or a second of delay", rank=4),
            symptom("drop reason CPU_BACKLOG"),
        ),
        remedies=(set_sysctl("net.core.netdev_max_backlog", "16384", "raise it"),),
        since="always",
        side_effects="latency when it is full",
        sources=("enqueue_to_backlog() in net/core/dev.c",),
        check=at_least("net.core.netdev_max_backlog", 1_000, "bursts on loopback and veth lose SYNs"),
    ),
    Limit(
        id="I2",
        name="softirq-budget",
        title="net.core.netdev_budget",
        scope=Scope.HOST,
        kind=Kind.RATE,
        evidence=Evidence.SOURCE,
        why="How many packets, and how many microseconds, one round of softirq work takes before it yields.",
        read=(
            "net.core.netdev_budget",
            "net.core.netdev_budget_usecs",
            "/proc/net/softnet_stat, column 3 (hexadecimal, per processor)",
        ),
        default="300 packets; 8,000 us at 250 Hz",
        formula="none: packets per second",
        bounds="Packet rate.",
        hit=(counter("softnet.time_squeeze", "column 3", breaks=False),),
        remedies=(set_sysctl("net.core.netdev_budget", "600", "raise it"),),
        since="2.6; the time 4.12",
        side_effects="programs wait longer for the processor",
        sources=("net_rx_action() in net/core/dev.c",),
        check=at_least("net.core.netdev_budget", 300, "softirq yields earlier than by default"),
    ),
    Limit(
        id="I3",
        name="card-rings",
        title="Rings and queues of the network card",
        scope=Scope.HOST,
        kind=Kind.RATE,
        evidence=Evidence.ADVICE,
        why="Packets that find the receive ring full are lost before the kernel sees them: no TCP counter moves.",
        read=("ethtool -g IFACE", "ethtool -l IFACE", "ethtool -S IFACE: rx_missed, rx_no_buffer"),
        default="the driver's",
        formula="none: packets per second",
        bounds="Packet rate of a physical or virtual card.",
        hit=(error("connect", "ETIMEDOUT", "with card counters rising", rank=4),),
        remedies=(
            Remedy(
                text="larger rings, as many queues as processors",
                command="ethtool -G eth0 rx 4096",
                persist="a udev rule or a networkd .link file",
            ),
        ),
        since="always",
        side_effects="latency",
        sources=("ethtool(8)",),
    ),
    Limit(
        id="I4",
        name="receive-spread",
        title="Spreading packets over processors",
        scope=Scope.HOST,
        kind=Kind.SPEED,
        evidence=Evidence.ADVICE,
        why=(
            "One source and one destination address differ in the source port only. Cards that hash addresses alone"
            " put all of it on one queue, and source ports that are all even waste a bit of the hash (A3)."
        ),
        read=("ethtool -n IFACE rx-flow-hash tcp4", "mpstat -P ALL"),
        default="the driver's",
        formula="none",
        bounds="Rate.",
        hit=(symptom("one processor at 100 % softirq"),),
        remedies=(
            Remedy(
                text="hash addresses and ports",
                command="ethtool -N eth0 rx-flow-hash tcp4 sdfn",
                persist="a udev rule",
            ),
            in_program("more addresses"),
        ),
        since="always",
        side_effects="none",
        sources=("ethtool(8)", "Documentation/networking/scaling.rst"),
    ),
    Limit(
        id="I5",
        name="queueing-discipline",
        title="Limits of queueing disciplines",
        scope=Scope.NETNS,
        kind=Kind.RATE,
        evidence=Evidence.ADVICE,
        why="Outgoing packets wait in a queue of limited length: fq 10,000 packets, 100 per flow; pfifo_fast 1,000.",
        read=("tc -s qdisc show",),
        default="as above; loopback has none",
        formula="none: packets in a burst",
        bounds="Bursts of SYNs.",
        hit=(symptom("dropped in tc -s qdisc"),),
        remedies=(
            Remedy(
                text="a longer queue, or pace connects",
                command="tc qdisc replace dev eth0 root fq limit 100000",
                persist="net.core.default_qdisc, or a networkd [FairQueueing] section",
            ),
        ),
        since="always",
        side_effects="latency",
        sources=("tc-fq(8)",),
    ),
    Limit(
        id="I6",
        name="connect-cost",
        title="What a connection costs a processor",
        scope=Scope.PROCESS,
        kind=Kind.RATE,
        evidence=Evidence.MEASURED,
        why=(
            "Measured on 2 processors over loopback: connect and accept in one Python loop 25,600 per second, asyncio"
            " 3,400 to 3,900, uvloop 8,800 to 10,200, the connector of aiohttp 3,200. Two million at 10,000 per"
            " second take 200 s."
        ),
        read=("the program",),
        default="as programmed",
        formula="time to connect = connections / rate",
        bounds="How long it takes to get there.",
        hit=(symptom("one processor at 100 % in the program"),),
        remedies=(in_program("several processes or threads, each with a share of the tuples"),),
        since="always",
        side_effects="none",
        sources=("measured on 6.18",),
    ),
    Limit(
        id="I7",
        name="path-rate",
        title="Rate limits of peers and middleboxes",
        scope=Scope.PEER,
        kind=Kind.RATE,
        evidence=Evidence.ADVICE,
        why="SYN proxies and load balancers bound new connections per source. On the host only lost SYNs are seen.",
        read=("not observable from here",),
        default="unknown",
        formula="none",
        bounds="The rate of clients.",
        hit=(counter("TcpExt.TCPSynRetrans", "with no drop on this host", rank=4, breaks=False),),
        remedies=(in_program("spread over source addresses and time, or ask who runs it"),),
        since="always",
        side_effects="none",
        sources=("general knowledge",),
    ),
)
