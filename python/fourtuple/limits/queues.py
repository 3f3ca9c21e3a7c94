"""Family D: the way of a connection into a server: SYN queue, accept queue, what happens when they are full.

Decides how many connections can wait. Knows nothing of those that were accepted.
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
from fourtuple.limits._terms import Answer, at_least, equals, number, unread

SOMAXCONN = "net.core.somaxconn"

LARGER_BACKLOG = set_sysctl(
    SOMAXCONN, "65535", "raise it, and the backlog in the program, and restart the program: it counts at listen()"
)


def _accepting(goal: Goal) -> NotApplicable:
    if goal.role not in (Role.SERVER, Role.PROXY):
        return NotApplicable(reason="nothing listens in this role")
    return NotApplicable(reason="the program accepts: the queue bounds bursts, not connections")


def _queue_length(host: Host, goal: Goal) -> tuple[int, str] | Unknown:
    most = number(host, SOMAXCONN)
    if most is None:
        return unread(host, SOMAXCONN)
    if goal.backlog is None:
        return most, f"somaxconn {most:,}"
    return min(goal.backlog, most), f"min(backlog {goal.backlog:,}, somaxconn {most:,})"


def _accept_queue(host: Host, goal: Goal) -> Answer:
    if goal.role is not Role.SERVER or goal.accepts:
        return _accepting(goal)
    length = _queue_length(host, goal)
    if isinstance(length, Unknown):
        return length
    # sk_acceptq_is_full() asks for more than the backlog, so that one more gets in.
    return Bound(connections=length[0] + 1, arithmetic=f"{length[1]} + 1 = {length[0] + 1:,} waiting to be accepted")


def _accept_use(host: Host) -> tuple[Usage, ...]:
    uses = (
        Usage(
            used=listener.queue,
            of=listener.backlog + 1,
            unit="connections waiting",
            subject=f"listener {listener.local}",
        )
        for listener in host.listeners
    )
    return tuple(sorted(uses, key=lambda use: -use.used / use.of))


def _half_open(host: Host) -> tuple[Usage, ...]:
    waiting = host.sockets.by_state.get("SYN_RECV")
    if waiting is None or not host.listeners:
        return ()
    # Which listener a half-open connection belongs to is not in the facts: all of them against all of the room.
    room = sum(listener.backlog for listener in host.listeners)
    return (Usage(used=waiting, of=room, unit="half-open connections on all listeners", breaks=False),)


def _syn_backlog(host: Host) -> Check | None:
    most, cookies = number(host, "net.ipv4.tcp_max_syn_backlog"), number(host, "net.ipv4.tcp_syncookies")
    if most is None or cookies is None:
        return None
    return Check(
        setting="net.ipv4.tcp_max_syn_backlog",
        found=f"{most:,} with tcp_syncookies {cookies}",
        wanted="any, while tcp_syncookies is 1 or 2",
        holds=cookies != 0 or most >= 4_096,
        meaning="without cookies it bounds the half-open connections of each listener",
    )


LIMITS = (
    Limit(
        id="D1",
        name="accept-queue",
        title="listen() backlog and net.core.somaxconn",
        scope=Scope.SOCKET,
        kind=Kind.COUNT,
        evidence=Evidence.MEASURED,
        why=(
            "Connections that are complete and not yet accepted wait in the listener's queue, min(backlog, somaxconn)"
            " + 1 of them: with a backlog of 10 there were 11. When it is full the client's segments are dropped"
            " without a word."
        ),
        read=(
            "ss -ltn: Recv-Q waiting, Send-Q allowed (sock_diag rqueue and wqueue)",
            SOMAXCONN,
        ),
        default="somaxconn 4096 since 5.4, 128 before; asyncio listens with 100, aiohttp with 128",
        formula="min(backlog, somaxconn) + 1 waiting; a burst may be that plus accept rate x time",
        bounds="Servers whose program does not accept fast enough; for one that never accepts, all of its connections.",
        hit=(
            counter("TcpExt.ListenOverflows", "one per dropped segment", rank=1),
            counter("TcpExt.ListenDrops", "one per dropped segment", rank=1),
            error("connect", "ETIMEDOUT", "on the client, which retries each second in SYN_SENT", rank=1),
            counter("TcpExt.TCPSynRetrans", "on the client", rank=2, breaks=False),
        ),
        remedies=(LARGER_BACKLOG,),
        since="always",
        side_effects="a long queue hides that the program is too slow",
        sources=("__sys_listen_socket(), sk_acceptq_is_full(), tcp_conn_request()",),
        bound=_accept_queue,
        usage=_accept_use,
        check=at_least(SOMAXCONN, 4_096, "whatever backlog a program asks for, no listener gets more"),
    ),
    Limit(
        id="D2",
        name="syn-queue",
        title="Half-open connections of a listener",
        scope=Scope.SOCKET,
        kind=Kind.RATE,
        evidence=Evidence.SOURCE,
        why=(
            "Half-open connections are bounded by the same min(backlog, somaxconn) as complete ones. Beyond it the"
            " kernel answers with cookies, or drops where they are off."
        ),
        read=(SOMAXCONN, "sockets in SYN_RECV"),
        default="as D1",
        formula="min(backlog, somaxconn) / round trip time per second",
        bounds="The rate of servers.",
        hit=(
            counter("TcpExt.TCPReqQFullDoCookies", breaks=False),
            counter("TcpExt.TCPReqQFullDrop"),
            log(r"Possible SYN flooding on port .*(Sending cookies|Dropping request)", "once per listener"),
        ),
        remedies=(LARGER_BACKLOG,),
        since="4.4 in this form",
        side_effects="none",
        sources=("inet_csk_reqsk_queue_is_full(), tcp_conn_request()",),
        usage=_half_open,
    ),
    Limit(
        id="D3",
        name="syn-backlog",
        title="net.ipv4.tcp_max_syn_backlog",
        scope=Scope.NETNS,
        kind=Kind.RATE,
        evidence=Evidence.SOURCE,
        why=(
            "Used only where tcp_syncookies is 0: the last quarter of it is kept for peers that are known. On other"
            " hosts raising it changes nothing."
        ),
        read=("net.ipv4.tcp_max_syn_backlog",),
        default="max(128, established hash / 128): 2,048 with 262,144 buckets",
        formula="half-open connections / round trip time, cookies off",
        bounds="The rate of servers without cookies.",
        hit=(counter("TcpExt.TCPReqQFullDrop", rank=60),),
        remedies=(LARGER_BACKLOG,),
        since="always",
        side_effects="none",
        sources=("tcp_conn_request(), tcp_set_hashinfo()",),
        check=_syn_backlog,
    ),
    Limit(
        id="D4",
        name="syn-cookies",
        title="net.ipv4.tcp_syncookies",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.DOCUMENTED,
        why=(
            "With 1 a full SYN queue is answered by cookies, with 2 always, with 0 never. A connection made by a"
            " cookie loses window scaling and SACK unless timestamps are on. It is for floods, not for legal load."
        ),
        read=("net.ipv4.tcp_syncookies",),
        default="1",
        formula="none",
        bounds="Nothing: it keeps a server reachable.",
        hit=(
            counter("TcpExt.SyncookiesSent", breaks=False),
            counter("TcpExt.SyncookiesRecv", breaks=False),
            counter("TcpExt.SyncookiesFailed", breaks=False),
        ),
        remedies=(set_sysctl("net.ipv4.tcp_syncookies", "1", "leave it at 1"), LARGER_BACKLOG),
        since="always",
        side_effects="with 0 a small flood makes a listener unreachable",
        sources=("ip-sysctl",),
    ),
    Limit(
        id="D5",
        name="abort-on-overflow",
        title="net.ipv4.tcp_abort_on_overflow",
        scope=Scope.NETNS,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "With 1 the client gets a reset when its last ACK meets a full accept queue. In the measured overflow it"
            " changed nothing, because the SYNs are dropped before."
        ),
        read=("net.ipv4.tcp_abort_on_overflow",),
        default="0",
        formula="none",
        bounds="Nothing.",
        hit=(error("connect", "ECONNRESET", rank=1),),
        remedies=(set_sysctl("net.ipv4.tcp_abort_on_overflow", "0", "leave it at 0: a client that retries gets in"),),
        since="always",
        side_effects="with 1 bursts fail that would have succeeded",
        sources=("tcp_check_req()", "ip-sysctl"),
        check=equals("net.ipv4.tcp_abort_on_overflow", 0, "clients of a full listener are reset instead of retrying"),
    ),
    Limit(
        id="D6",
        name="synack-retries",
        title="net.ipv4.tcp_synack_retries",
        scope=Scope.NETNS,
        kind=Kind.RATE,
        evidence=Evidence.DOCUMENTED,
        why="How long a half-open connection that nobody completes keeps its place in the SYN queue (D2).",
        read=("net.ipv4.tcp_synack_retries",),
        default="5, so up to 63 s",
        formula="places held = rate of dead SYNs x lifetime",
        bounds="The rate of servers under a flood.",
        hit=(symptom("many sockets in SYN_RECV"),),
        remedies=(set_sysctl("net.ipv4.tcp_synack_retries", "2", "2 or 3 under a flood"),),
        since="always",
        side_effects="clients on lossy paths give up earlier",
        sources=("ip-sysctl",),
    ),
    Limit(
        id="D7",
        name="one-listener",
        title="One listener, many processors",
        scope=Scope.SOCKET,
        kind=Kind.RATE,
        evidence=Evidence.ADVICE,
        why=(
            "A listener has one accept queue with one lock. SO_REUSEPORT gives each worker a listener and a queue of"
            " its own; connections are spread by hash, so the queues fill unevenly."
        ),
        read=("ss -ltn", "net.ipv4.tcp_migrate_req"),
        default="one queue",
        formula="none: rate, not number",
        bounds="The accept rate of servers with many processors.",
        hit=(
            counter(
                "TcpExt.TCPMigrateReqSuccess", "a queue moved when its listener closed (5.14 and later)", breaks=False
            ),
            counter("TcpExt.TCPMigrateReqFailure"),
        ),
        remedies=(
            in_program("SO_REUSEPORT listeners, each with 1.5 times the even share of the backlog; EPOLLEXCLUSIVE"),
            set_sysctl("net.ipv4.tcp_migrate_req", "1", "do not lose a queue when its listener closes"),
        ),
        since="SO_REUSEPORT 3.9, migration 5.14",
        side_effects="closing a listener drops its queue",
        sources=("reuseport_select_sock()",),
    ),
    Limit(
        id="D8",
        name="fast-open-queue",
        title="The TCP Fast Open queue",
        scope=Scope.SOCKET,
        kind=Kind.RATE,
        evidence=Evidence.ADVICE,
        why="Each listener allows a number of fast-open requests at once; beyond it a normal handshake is made.",
        read=("net.ipv4.tcp_fastopen", "the TCP_FASTOPEN value of the program"),
        default="off for servers",
        formula="queue length / round trip time",
        bounds="Fast-open requests, not connections.",
        hit=(counter("TcpExt.TCPFastOpenListenOverflow"),),
        remedies=(in_program("a larger TCP_FASTOPEN value"),),
        since="3.7",
        side_effects="none",
        sources=("RFC 7413", "tcp_fastopen_queue_check()"),
    ),
    Limit(
        id="D9",
        name="defer-accept",
        title="TCP_DEFER_ACCEPT",
        scope=Scope.SOCKET,
        kind=Kind.BEHAVIOUR,
        evidence=Evidence.MEASURED,
        why=(
            "The listener does not hand a connection over before its first byte arrived; until then it counts as"
            " half-open (D2). Measured: an idle connection was established for the client and SYN_RECV for the"
            " server, and accept() returned only after a byte. Idle connections against such a server are never"
            " accepted."
        ),
        read=("the program",),
        default="off",
        formula="as D2",
        bounds="Idle connections to such servers.",
        hit=(counter("TcpExt.TCPDeferAcceptDrop"),),
        remedies=(in_program("send a byte first, or switch the option off"),),
        since="2.4",
        side_effects="none",
        sources=("tcp_check_req()", "tcp(7)"),
    ),
)
