"""The socket that takes its local name from a pool: connect() chooses the tuple, close() gives it back.

Decides how a chosen tuple is put on a socket, what an EADDRNOTAVAIL means for it, and when it is free again. Which
tuple is the pool's choice; waiting in an event loop is the business of the file of that library. To every client it is
a `socket.socket`: what a library does with a socket, it does with this one, so that one class serves them all.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from errno import EACCES, EADDRINUSE, EADDRNOTAVAIL
from functools import lru_cache
from ipaddress import ip_address
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

from fourtuple.connect import kernel, udp
from fourtuple.errors import BadConfig, LimitReached, MissingPrivilege
from fourtuple.sources import Lease, Mechanism, SourcePool
from fourtuple.tuples import Endpoint, IPAddress, Protocol

MOST_REFUSALS = 256
"""Tuples in a row that others hold before one connect() pauses: at 10 us each it stays a matter of milliseconds."""
REFUSED_FOR_S = 1.0
"""How long a tuple that somebody else holds is left alone. Trying it again costs 10 us."""
GLANCE_S = 0.05
"""The pause then; and how often a caller that waits looks whether a socket that left our sight is closed."""

_ON, _OFF = struct.pack("=i", 1), struct.pack("=i", 0)
_LINGER = struct.Struct("=ii")
_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _CLOSING = b"\x01", b"\x04", b"\x05", b"\x0b"
_WE_CLOSE_FIRST = (_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _CLOSING)
"""First byte of TCP_INFO (include/net/tcp_states.h): in these states our close() leads to TIME_WAIT."""


class SourceSocket(socket.socket):
    """A socket whose connect() uses a tuple of `pool`. Do not bind() it: its name is the pool's choice.

    A blocking socket waits for a tuple as long as its timeout and the pool's `patience_s` allow; a non-blocking one
    raises LimitReached at once.
    """

    __slots__ = ("_bound_to", "_first", "_lease", "_mechanism", "_options", "_pool")

    def __init__(self, pool: SourcePool, type: int = socket.SOCK_STREAM, lease: Lease | None = None) -> None:
        """`lease` is one that the caller waited for; the first connect() to its destination uses it."""
        super().__init__(family_of(pool), type)
        self._pool = pool
        self._first = lease
        self._lease: Lease | None = None
        self._mechanism = Mechanism.BIND
        self._bound_to = ""
        self._options: list[tuple[Any, ...]] = []

    @property
    def pool(self) -> SourcePool:
        """Where its name comes from."""
        return self._pool

    @property
    def protocol(self) -> Protocol:
        """Whose tuple space it is in."""
        return Protocol.UDP if self.type == socket.SOCK_DGRAM else Protocol.TCP

    def connect(self, address: Any) -> None:
        """Connect from the tuple that the pool chooses, and from the next one while others hold it."""
        if self._lease is not None:  # the second look at a connect() that was under way
            super().connect(address)
            return
        destination = destination_of(self._pool, address)
        if address[0] != str(destination.address):  # a name: it may mean another address if it is asked for again
            address = (str(destination.address), destination.port, *address[2:])
        timeout_s = self.gettimeout()
        patience_s = self._pool.patience_s if timeout_s is None else min(timeout_s, self._pool.patience_s)
        deadline = time.monotonic() + patience_s
        for attempt in count(1):
            lease, self._first = self._first or self._take(destination, deadline), None
            if lease.destination != destination:
                lease = self._take(destination, deadline)
            try:
                if self.protocol is Protocol.UDP:
                    self._connect_flow(lease, destination, address)
                else:
                    self._connect_from(lease, address)
            except _Refused:
                lease.refused(time.monotonic() + REFUSED_FOR_S)
                if attempt % MOST_REFUSALS == 0:
                    if time.monotonic() >= deadline:
                        raise self._pool.exhausted(destination, time.monotonic(), protocol=self.protocol) from None
                    time.sleep(GLANCE_S)
            except (BlockingIOError, InterruptedError, TimeoutError):
                self._lease = lease  # under way: the kernel holds the tuple until the socket is closed
                self._check_port(lease)
                raise
            except BaseException:
                lease.release()  # and not by its own end: whoever keeps the exception would keep the lease
                raise
            else:
                self._lease = lease
                self._check_port(lease)
                return

    def connect_ex(self, address: Any) -> int:
        """As connect(), with the error as a number; EADDRNOTAVAIL if nothing is left."""
        try:
            self.connect(address)
        except LimitReached:
            return EADDRNOTAVAIL
        except OSError as error:
            if error.errno is None:
                raise
            return error.errno
        return 0

    def setsockopt(self, *arguments: Any) -> None:
        """As usual; remembered until it is connected, in case another descriptor has to take this one's place."""
        super().setsockopt(*arguments)
        if self._lease is None:
            self._options.append(arguments)

    def close(self) -> None:
        """Close, and give the tuple back once no makefile() uses the socket."""
        lease = self._lease
        if lease is None:
            super().close()
            if self._first is not None:
                self._first.release()
            return
        rests_until = None if self.fileno() == -1 else when_free(self, self._pool, lease, self._mechanism)
        super().close()
        if self.fileno() == -1:
            self._lease = None
            lease.release(rests_until)

    def detach(self) -> int:
        """Let go of the descriptor. Its tuple is free when that descriptor no longer names this socket."""
        lease, self._lease = self._lease, None
        descriptor = super().detach()
        if lease is not None and descriptor != -1:
            _watch(self._pool, lease, descriptor)
        return descriptor

    def hand_over(self) -> tuple[socket.socket, Callable[[], None]]:
        """A plain socket in place of this one, and what closes it and gives its tuple back: for libraries that take no
        subclass and tell when they close."""
        lease, self._lease = self._lease, None
        plain = socket.socket(self.family, self.type, self.proto, fileno=super().detach())
        pool, mechanism = self._pool, self._mechanism

        def close() -> None:
            rests_until = None if lease is None else when_free(plain, pool, lease, mechanism)
            plain.close()
            if lease is not None:
                lease.release(rests_until)

        return plain, close

    def dup(self) -> socket.socket:  # type: ignore[override]
        """A plain socket for the same connection. While it is open the tuple is refused to the next user, no more."""
        return socket.socket(self.family, self.type, self.proto, fileno=os.dup(self.fileno()))

    def _take(self, destination: Endpoint, deadline: float) -> Lease:
        now = time.monotonic()
        lease = self._pool.take(destination, now, protocol=self.protocol)
        if lease is not None:
            return lease
        if self.gettimeout() == 0:
            raise self._pool.exhausted(destination, now, protocol=self.protocol)
        return wait_for_lease(self._pool, destination, deadline, protocol=self.protocol)

    def _connect_from(self, lease: Lease, address: Any) -> None:
        known = kernel.kernel_for(self._pool)
        mechanism = known.mechanisms[lease.port]
        if self._bound_to and Mechanism.BIND in (mechanism, self._mechanism):
            self._begin_again()
        first = not self._bound_to
        self._mechanism = mechanism
        if mechanism is Mechanism.BIND:
            if first:
                super().setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, _ON)
            self._bind(lease.address, lease.port)
        else:
            if first:
                super().setsockopt(socket.IPPROTO_IP, kernel.BIND_ADDRESS_NO_PORT, _ON)
            if self._bound_to != lease.address:
                self._bind(lease.address, 0)
            if mechanism is Mechanism.SINGLE_PORT:
                wanted = struct.pack("=I", lease.port << 16 | lease.port)
                super().setsockopt(socket.IPPROTO_IP, kernel.LOCAL_PORT_RANGE, wanted)
        try:
            super().connect(address)
        except OSError as error:
            # Both say that this very tuple is not to be had: it exists (A1, TIME_WAIT included), or automatic choice
            # skips the port because somebody bound it by number (A8).
            if error.errno == EADDRNOTAVAIL:
                raise _Refused from None
            raise

    def _connect_flow(self, lease: Lease, destination: Endpoint, address: Any) -> None:
        if self._bound_to:
            self._begin_again()
        self._mechanism = Mechanism.BIND
        # The kernel lets two UDP sockets have one four-tuple, and gives all datagrams to one of them. So: bind beside
        # those that share the port, then share it no longer, so that nobody else can come in while we look whether the
        # tuple is free; connect; and share again.
        super().setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, _ON)
        self._bind(lease.address, lease.port)
        super().setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, _OFF)
        if udp.is_connected(self.family, Endpoint(_address(lease.address), lease.port), destination):
            raise _Refused
        super().connect(address)
        super().setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, _ON)

    def _bind(self, address: str, port: int) -> None:
        if self._pool in kernel.NEED_FREEBIND:
            super().setsockopt(socket.IPPROTO_IPV6, kernel.FREEBIND, _ON)
        try:
            super().bind((address, port))
        except OSError as error:
            if error.errno == EADDRINUSE:
                raise _Refused from None
            if error.errno == EACCES and port:
                raise MissingPrivilege(_below_start(port), "unprivileged-port-start") from None
            if error.errno != EADDRNOTAVAIL:
                raise
            if self.family != socket.AF_INET6 or not kernel.has_route_alone(address):
                raise BadConfig("sources", _not_ours(address)) from None
            kernel.NEED_FREEBIND.add(self._pool)
            super().setsockopt(socket.IPPROTO_IPV6, kernel.FREEBIND, _ON)
            super().bind((address, port))
        self._bound_to = address

    def _begin_again(self) -> None:
        """Put an unbound descriptor in the place of this one: a port bound by number stays bound (tcp_disconnect)."""
        blocking_s = self.gettimeout()
        with socket.socket(self.family, self.type, self.proto) as fresh:
            os.dup2(fresh.fileno(), self.fileno(), inheritable=os.get_inheritable(self.fileno()))
        self.settimeout(blocking_s)
        for arguments in self._options:
            super().setsockopt(*arguments)
        self._bound_to = ""

    def _check_port(self, lease: Lease) -> None:
        """See which port it became: another one if the range was narrowed meanwhile, or the choice was the kernel's."""
        self._options.clear()
        port = super().getsockname()[1]
        if port != lease.port and port:
            lease.port = port
            if self._mechanism is Mechanism.SINGLE_PORT:
                kernel.look_again(self._pool)


class _Refused(Exception):
    """The kernel does not give us this tuple."""


def family_of(pool: SourcePool) -> socket.AddressFamily:
    """The address family of a pool's sources."""
    return socket.AF_INET if pool.sources.version == 4 else socket.AF_INET6


def destination_of(pool: SourcePool, address: Any) -> Endpoint:
    """The endpoint that a socket address such as ("192.0.2.1", 443) means to a socket of this pool."""
    try:
        return _endpoint(address[0], address[1])
    except (BadConfig, ValueError):  # a name, or nothing that can be connected to: the resolver says which
        found = socket.getaddrinfo(address[0], address[1], family_of(pool), socket.SOCK_STREAM)[0][4]
        return _endpoint(str(found[0]), int(found[1]))


def when_free(connected: socket.socket, pool: SourcePool, lease: Lease, mechanism: Mechanism) -> float | None:
    """When TIME_WAIT will have let go of the tuple, if this is closed now; None if there is none to come."""
    try:
        if connected.type != socket.SOCK_STREAM:
            return None
        if connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) not in _WE_CLOSE_FIRST:
            return None
        if connected.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.size) == _LINGER.pack(1, 0):
            return None
        peer = connected.getpeername()[0]
    except OSError:
        return None
    rest_s = kernel.kernel_for(pool).rest_s(mechanism, lease.address, peer)
    return time.monotonic() + rest_s if rest_s else None


def wait_for_lease(pool: SourcePool, destination: Endpoint, deadline: float, *, protocol: Protocol) -> Lease:
    """Wait in this thread; LimitReached if nothing came back in time."""
    # SimpleQueue.put is reentrant: it may be called by an object's end in the middle of our own get().
    woken: SimpleQueue[None] = SimpleQueue()

    def wake() -> bool:
        woken.put(None)
        return True

    while True:
        now = time.monotonic()
        lease = pool.take(destination, now, protocol=protocol, wake=wake)
        if lease is not None:
            return lease
        try:
            if deadline <= now:
                raise pool.exhausted(destination, now, protocol=protocol)
            woken.get(timeout=wait_s(pool, now, deadline))
        except Empty:
            pool.give_up(destination, wake, protocol=protocol)
        except BaseException:
            pool.give_up(destination, wake, protocol=protocol)
            raise


def wait_s(pool: SourcePool, now: float, deadline: float) -> float:
    """How long to wait for being woken before looking again: for what time alone sets free wakes nobody."""
    due = pool.due()
    until = deadline if due is None else min(deadline, due)
    if pool.doubtful:
        until = min(until, now + GLANCE_S)
    return max(until - now, 0.001)


@lru_cache(maxsize=4_096)
def _endpoint(host: str, port: int) -> Endpoint:
    return Endpoint(_address(host), port)


@lru_cache(maxsize=4_096)
def _address(text: str) -> IPAddress:
    return ip_address(text)


def _watch(pool: SourcePool, lease: Lease, descriptor: int) -> None:
    """Have the pool find out by itself when a descriptor that it does not own stops naming the socket it names now."""
    try:
        inode = os.fstat(descriptor).st_ino
    except OSError:  # closed before it was let go of, as uvloop does
        lease.release()
        return

    def is_over() -> bool:
        try:
            return os.fstat(descriptor).st_ino != inode
        except OSError:
            return True

    pool.doubt(lease, is_over)


def _not_ours(address: str) -> str:
    return (
        f"{address} is not an address of this host; add it (`ip addr add {address} dev lo`) or make its whole prefix"
        f" local (`ip route add local PREFIX dev lo`): `fourtuple limits show source-addresses`"
    )


def _below_start(port: int) -> str:
    return (
        f"port {port} is below net.ipv4.ip_unprivileged_port_start, and this process has no CAP_NET_BIND_SERVICE; give"
        f" the pool ports from there on (1024 by default): `fourtuple limits show unprivileged-port-start`"
    )
