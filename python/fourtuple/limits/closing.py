"""Family E: what connections cost that are closed, dead or merely quiet.

Decides nothing about open, live ones.
"""

from __future__ import annotations

from fourtuple.facts import Goal, Host, Role
from fourtuple.limits._model import (
    Bound,
    Evidence,
    Kind,
    Limit,
    Scope,
    Unknown,
    Usage,
    counter,
    in_program,
    log,
    set_sysctl,
    symptom,
)
from fourtuple.limits._terms import HOST_LIMIT, NAT_HAS_NO_SOCKETS, Answer, at_least, number, unread

ORPHANS = "net.ipv4.tcp_max_orphans"


def _orphans(host: Host, goal: Goal) -> Answer:
    if goal.role is Role.NAT:
        return NAT_HAS_NO_SOCKETS
    most = number(host, ORPHANS)
    if most is None:
        return Unknown(reason=unread(host, ORPHANS, HOST_LIMIT).reason)
    # Connections closed at one moment, before the peers have answered.
    return Bound(connections=most, arithmetic=f"{most:,} orphans: more closed at one moment are reset", kind=Kind.SPEED)


def _orphan_use(host: Host) -> tuple[Usage, ...]:
    most, used = number(host, ORPHANS), host.sockets.orphans_host
    if most is None or used is None:
        return ()
    return (Usage(used=used, of=most, unit="orphaned sockets on the host"),)


LIMITS = (
    Limit(
        id="E1",
        name="orphans",
        title="net.ipv4.tcp_max_orphans",
        scope=Scope.HOST,
        kind=Kind.SPEED,
        evidence=Evidence.SOURCE,
        why=(
            "Sockets that the program has closed and TCP has not finished with. Above the number they are reset"
            " instead of closed; under suspicion each counts two or four times. It is hit when a program with very"
            " many connections ends or closes all at once."
        ),
        read=(ORPHANS, "orphan in /proc/net/sockstat (of the whole host)"),
        default="half of the established hash: 131,072 on 24 GiB",
        formula="connections that may be closed at one moment",
        bounds="Closing, not holding. The file is absent in a child namespace, the limit is not.",
        hit=(
            log(r"TCP: too many orphaned sockets"),
            counter("TcpExt.TCPAbortOnMemory", rank=1),
            symptom("peers see resets instead of FIN"),
        ),
        remedies=(
            set_sysctl(ORPHANS, "1048576", "raise it"),
            in_program("close in waves"),
        ),
        since="always",
        side_effects="each may hold up to 64 kB that cannot be swapped",
        sources=("tcp_check_oom(), tcp_too_many_orphans()", "ip-sysctl"),
        bound=_orphans,
        usage=_orphan_use,
    ),
    Limit(
        id="E2",
        name="retries",
        title="net.ipv4.tcp_orphan_retries and tcp_retries2",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.DOCUMENTED,
        why="How long a peer that is gone keeps an orphan, or an established connection with unacknowledged bytes.",
        read=("net.ipv4.tcp_orphan_retries", "net.ipv4.tcp_retries2"),
        default="0, which means 8; 15, about 924.6 s",
        formula="connections held = rate of dying peers x time",
        bounds="Every role, in descriptors and memory.",
        hit=(symptom("many sockets in FIN_WAIT_1 or LAST_ACK, or established with a send queue"),),
        remedies=(
            set_sysctl("net.ipv4.tcp_orphan_retries", "3", "let orphans of dead peers go earlier"),
            in_program("TCP_USER_TIMEOUT on the socket"),
        ),
        since="always; TCP_USER_TIMEOUT 2.6.37",
        side_effects="connections over long outages break",
        sources=("ip-sysctl", "tcp(7)"),
    ),
    Limit(
        id="E3",
        name="keepalive",
        title="Keepalive",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "Without it the connections of dead peers stay for ever. It takes no memory - 8,000 sockets added no slab"
            " - but packets: connections / interval per second, a million at 60 s 16,667 and as many answers."
            " Middleboxes forget idle flows long before the default of two hours."
        ),
        read=("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes"),
        default="7200 s, 75 s, 9 probes; off unless the program sets SO_KEEPALIVE",
        formula="packets per second = connections / interval",
        bounds="Dead connections among the counted ones; packet rate.",
        hit=(
            symptom("connections whose peer no longer exists"),
            counter("TcpExt.TCPKeepAlive", "probes sent", breaks=False),
        ),
        remedies=(
            set_sysctl("net.ipv4.tcp_keepalive_time", "300", "below the idle timeout of what is in the path"),
            in_program("TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT on the socket"),
        ),
        since="always",
        side_effects="packets, and radios that wake",
        sources=("tcp_keepalive_timer()", "RFC 9293 section 3.8.4"),
        check=at_least("net.ipv4.tcp_keepalive_time", 60, "a million connections would send more than 16,667 probes/s"),
    ),
)
