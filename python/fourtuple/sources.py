"""Which local names we may use: source addresses and ports, handed out so that every port serves every destination.

Decides which tuple comes next towards a destination, from the address with most room there, and when a tuple may be
used again. Knows no socket, no kernel and no clock: times are arguments, in seconds of any steady clock, and what a
kernel said of a tuple is told to it. Waiting is the caller's business; who has to be woken is remembered here.

Choosing costs the same whether nothing or all is used. Two bytes are kept per port of the pool and two per port that
was given back, plus a record for each (source address, destination) with something in use; a port that nobody has used
costs nothing per destination, and a /64 of addresses nothing per address. Any thread may call anything; `release` and
`refused` take no lock, so that they may be called while an object is being destroyed, whatever the thread was doing.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush
from itertools import chain, count
from math import gcd
from random import Random
from threading import Lock

from fourtuple.errors import BadConfig, LimitReached
from fourtuple.tuples import AddressSet, Endpoint, PortSet, Protocol

Wake = Callable[[], bool]
"""Called when something may be free again; False if nobody hears it any more. Must not block."""

_DEFAULT_SPREAD = 1_024
_DOUBTS_PER_TAKE, _DOUBTS_WHEN_FULL = 2, 512


class Mechanism(Enum):
    """How a socket is made to use the tuple that was chosen."""

    SINGLE_PORT = "single-port"
    """IP_LOCAL_PORT_RANGE [p, p] with IP_BIND_ADDRESS_NO_PORT: connect() takes p and poisons nothing (A4)."""
    NO_PORT = "no-port"
    """IP_BIND_ADDRESS_NO_PORT: the address is ours, the port is the kernel's choice, and its search costs (A3, A7)."""
    BIND = "bind"
    """bind(address, port) with SO_REUSEADDR: any kernel; poisons the port for automatic choice (A8, A10)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MechanismChoice:
    """What one kernel and one network namespace make the right mechanism, and why."""

    inside: Mechanism
    """For ports that automatic choice takes from: net.ipv4.ip_local_port_range without the reserved ones."""
    outside: Mechanism
    """For all other ports."""
    why: str


def choose_mechanism(
    *, bind_address_no_port: bool, local_port_range: bool, range_known: bool = True, wanted: Mechanism | None = None
) -> MechanismChoice:
    """The best that these options of IPPROTO_IP allow, or what is wanted where it can be had.

    The one place where it is decided, for a pool's sockets as for the doctor, whichever of them tried the options.
    """
    best = Mechanism.BIND
    if bind_address_no_port:
        best = Mechanism.SINGLE_PORT if local_port_range and range_known else Mechanism.NO_PORT
    if wanted is None or wanted is Mechanism.SINGLE_PORT:
        # Outside the range, or on a reserved port, IP_LOCAL_PORT_RANGE is ignored without an error (A4), and explicit
        # binding disturbs nobody: automatic choice never goes there.
        return MechanismChoice(inside=best, outside=Mechanism.BIND, why=_why(best, local_port_range))
    if wanted is Mechanism.NO_PORT and not bind_address_no_port:
        return MechanismChoice(inside=best, outside=best, why=_why(best, local_port_range))
    return MechanismChoice(inside=wanted, outside=wanted, why="the pool was told to")


def _why(best: Mechanism, local_port_range: bool) -> str:
    match best:
        case Mechanism.SINGLE_PORT:
            return (
                "IP_LOCAL_PORT_RANGE names one port to connect(), and IP_BIND_ADDRESS_NO_PORT keeps bind() from taking"
                " one: the cost is flat up to the last port, and none is poisoned"
            )
        case Mechanism.NO_PORT:
            missing = (
                "net.ipv4.ip_local_port_range cannot be read"
                if local_port_range
                else "this kernel has no IP_LOCAL_PORT_RANGE (it came with 6.3)"
            )
            return (
                f"{missing}: the kernel chooses the port at connect(), with IP_BIND_ADDRESS_NO_PORT, and none is"
                " poisoned; its search costs more past half of the range, and `ports` of a pool that lie outside the"
                " range stay flat"
            )
        case Mechanism.BIND:
            return (
                "this kernel has no IP_BIND_ADDRESS_NO_PORT (it came with 4.2): ports are bound by number, which"
                " poisons them for automatic choice; give a pool ports outside net.ipv4.ip_local_port_range, or"
                " reserve its own (net.ipv4.ip_local_reserved_ports)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a pool has towards one destination."""

    capacity: int
    held: int
    """Tuples that this pool's sockets use."""
    resting: int
    """Tuples that this pool closed first and that TIME_WAIT is believed to hold still."""
    others: int
    """Tuples that were refused lately: somebody else uses them, or the kernel holds them."""
    waiting: int
    """Callers that wait for one."""

    @property
    def free(self) -> int:
        """Tuples that can be handed out now."""
        return self.capacity - self.held - self.resting - self.others


class Lease:
    """One tuple on loan: `address` and `port` are the local name. Dropping the last reference gives it back."""

    __slots__ = ("_lent", "_pair", "_pool", "address", "port")

    def __init__(self, pool: SourcePool, pair: _Pair, port: int) -> None:
        self.address = pair.address
        self.port = port
        self._lent = port  # `port` may be corrected by whoever sees that the kernel chose another one
        self._pair: _Pair | None = pair
        self._pool = pool

    @property
    def destination(self) -> Endpoint | None:
        """Where the tuple leads; None once it was given back."""
        return None if self._pair is None else self._pair.towards.key[0]

    @property
    def over(self) -> bool:
        """Whether it was given back."""
        return self._pair is None

    def release(self, rests_until: float | None = None) -> None:
        """Give the tuple back; again does no harm. `rests_until` is when TIME_WAIT will be over, if there is one."""
        self._end(_Returned.FREE if rests_until is None else _Returned.RESTING, rests_until)

    def refused(self, until: float) -> None:
        """The kernel does not let us have it: somebody else does. It is not handed out again before `until`."""
        self._end(_Returned.OTHERS, until)

    def __del__(self) -> None:
        self._end(_Returned.FREE, None)

    def _end(self, what: _Returned, until: float | None) -> None:
        pair, self._pair = self._pair, None
        if pair is not None:
            self._pool._take_back(pair, self._lent, what, until)


class SourcePool:
    """Local names towards any number of destinations.

        pool = SourcePool("10.0.0.0/28", ports="1024-65535")
        lease = pool.take(Endpoint.parse("192.0.2.1:443"), now)

    `sources` are addresses, prefixes and ranges of one family that this host owns (a prefix through an AnyIP route);
    what overlaps counts once.
    `ports` best lie inside net.ipv4.ip_local_port_range, where no other program's choice is disturbed. `spread` is over
    how many addresses connections to a destination rotate; further ones join when these are full. `mechanism` None is
    the best that the kernel can do. `patience_s` bounds waiting for a tuple where the caller sets no shorter time.
    """

    def __init__(
        self,
        sources: AddressSet | str,
        ports: PortSet | str,
        *,
        spread: int = _DEFAULT_SPREAD,
        mechanism: Mechanism | None = None,
        patience_s: float = 30.0,
        randomness: Random | None = None,
    ) -> None:
        self.sources = AddressSet.parse(sources) if isinstance(sources, str) else sources
        self.ports = PortSet.parse(ports) if isinstance(ports, str) else ports
        if not self.sources:
            raise BadConfig("sources", "one address or more is needed")
        if not self.ports:
            raise BadConfig("ports", "one port or more is needed")
        if spread < 1:
            raise BadConfig("spread", f"{spread}: a whole number of addresses, 1 or more")
        if not patience_s >= 0:
            raise BadConfig("patience_s", f"{patience_s}: seconds, 0 or more")
        self.mechanism = mechanism
        self.patience_s = patience_s
        self._spread = min(spread, self.sources.size)
        self._random = randomness or Random()
        self._numbers = array("H", self.ports)
        self._towards: dict[tuple[Endpoint, Protocol], _Towards] = {}
        # What comes back before its time is over: (until, a number that makes entries comparable, pair, port, what).
        self._later: list[tuple[float, int, _Pair, int, _Returned]] = []
        self._serial = count()
        self._returned: deque[tuple[_Pair, int, _Returned, float | None]] = deque()
        self._doubts: deque[tuple[Lease, Callable[[], bool]]] = deque()
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"SourcePool({str(self.sources)!r}, ports={str(self.ports)!r})"

    def share(self, index: int, of: int) -> SourcePool:
        """One of `of` pools with disjoint ports, index 0 to of - 1: for processes that use the same addresses."""
        if not 1 <= of <= self.ports.size:
            raise BadConfig("of", f"{of}: from 1 to as many shares as there are ports, {self.ports.size:,}")
        if not 0 <= index < of:
            raise BadConfig("index", f"{index}: shares of {of} are numbered from 0 to {of - 1}")
        return SourcePool(
            self.sources,
            self.ports.split(of)[index],
            spread=self._spread,
            mechanism=self.mechanism,
            patience_s=self.patience_s,
        )

    def take(
        self, destination: Endpoint, now: float, *, protocol: Protocol = Protocol.TCP, wake: Wake | None = None
    ) -> Lease | None:
        """A tuple towards `destination`, or None if none is left: then `wake` is called, once, when one may be.

        A caller that stops waiting says so with `give_up`. What only time sets free wakes nobody: see `due`.
        """
        key = (destination, protocol)
        with self._lock:
            lease = self._attempt(key, now, _DOUBTS_PER_TAKE)
            if lease is None and self._doubts:
                lease = self._attempt(key, now, _DOUBTS_WHEN_FULL)
            if lease is None and wake is not None:
                waiters = self._towards[key].waiters
                waiters.append(wake)
                # A release between the attempt and here saw nobody waiting; one from here on sees this caller.
                if self._returned and (lease := self._attempt(key, now, 0)) is not None and wake in waiters:
                    waiters.remove(wake)
            return lease

    def give_up(self, destination: Endpoint, wake: Wake, *, protocol: Protocol = Protocol.TCP) -> None:
        """Wait no longer. If `wake` was called meanwhile, the next in line is woken instead."""
        with self._lock:
            towards = self._towards.get((destination, protocol))
            if towards is None:
                return
            try:
                towards.waiters.remove(wake)
            except ValueError:
                towards.wake_one()
            if towards.idle:
                self._forget(towards)

    def due(self) -> float | None:
        """When the next tuple comes back by time alone; None if none does."""
        with self._lock:
            return self._later[0][0] if self._later else None

    def doubt(self, lease: Lease, is_over: Callable[[], bool]) -> None:
        """Watch over a lease whose end nobody will report: `is_over` is asked now and then, more when all is full."""
        self._doubts.append((lease, is_over))

    @property
    def doubtful(self) -> bool:
        """Whether a lease may end that nobody reports."""
        return bool(self._doubts)

    def usage(self, destination: Endpoint, now: float, *, protocol: Protocol = Protocol.TCP) -> Usage:
        """What is in use towards a destination, and by whom."""
        with self._lock:
            self._resolve_doubts(len(self._doubts))
            self._settle(now)
            towards = self._towards.get((destination, protocol))
            capacity = self.sources.size * self.ports.size
            if towards is None:
                return Usage(capacity=capacity, held=0, resting=0, others=0, waiting=0)
            return Usage(
                capacity=capacity,
                held=towards.count[_Returned.FREE],
                resting=towards.count[_Returned.RESTING],
                others=towards.count[_Returned.OTHERS],
                waiting=len(towards.waiters),
            )

    def exhausted(self, destination: Endpoint, now: float, *, protocol: Protocol = Protocol.TCP) -> LimitReached:
        """The error to raise when nothing is left: which limit, how many are in use, by whom, and the way past it."""
        usage = self.usage(destination, now, protocol=protocol)
        shown = f"{usage.held:,} by this pool, {usage.resting:,} in TIME_WAIT, {usage.others:,} by others"
        return LimitReached(
            "four-tuple",
            have=usage.capacity,
            need=usage.capacity + 1,
            remedy=(
                f"no source endpoint is left from {_shortened(self.sources)} ports {_shortened(self.ports)} to"
                f" {destination} ({shown}); add source addresses or ports to the pool, give the server more addresses"
                f" or ports, or close connections: `fourtuple limits show four-tuple`"
            ),
        )

    def _take_back(self, pair: _Pair, port: int, what: _Returned, until: float | None) -> None:
        """Called by leases, perhaps in the middle of anything, this class's own methods included: takes no lock."""
        self._returned.append((pair, port, what, until))
        # Even if it rests first: whoever waits did not know that something will be due.
        pair.towards.wake_one()

    def _attempt(self, key: tuple[Endpoint, Protocol], now: float, doubts: int) -> Lease | None:
        self._resolve_doubts(doubts)
        self._settle(now)
        return self._lend(self._towards.get(key) or self._begin(key))

    def _begin(self, key: tuple[Endpoint, Protocol]) -> _Towards:
        if key[0].address.version != self.sources.version:
            raise BadConfig("destination", f"{key[0]}: IPv{self.sources.version} is needed, as the sources are")
        towards = self._towards[key] = _Towards(key, self._random.randrange(self._spread))
        return towards

    def _lend(self, towards: _Towards) -> Lease | None:
        if towards.opened < self._spread or (towards.most_room == 0 and towards.opened < self.sources.size):
            pair = self._open(towards)
        elif towards.most_room == 0:
            return None
        else:
            pair = towards.pop_roomiest()
        port = pair.next_port(self._numbers)
        towards.set_room(pair, pair.room - 1)
        towards.count[_Returned.FREE] += 1
        return Lease(self, pair, port)

    def _open(self, towards: _Towards) -> _Pair:
        """A further source address for this destination: the first ones from anywhere, so that few connections to many
        destinations do not all come from one address."""
        index = towards.opened
        if index < self._spread:
            index = (towards.start + index) % self._spread
        towards.opened += 1
        size = len(self._numbers)
        stride = self._random.randrange(1, size + 1)
        while gcd(stride, size) != 1:
            stride = self._random.randrange(1, size + 1)
        return _Pair(towards, str(self.sources.nth(index)), size, self._random.randrange(size), stride)

    def _settle(self, now: float) -> None:
        """Take note of all that came back since, and of all whose time is over."""
        while self._returned:
            pair, port, what, until = self._returned.popleft()
            pair.towards.count[_Returned.FREE] -= 1
            if until is None or until <= now:
                self._free(pair, port)
            else:
                pair.towards.count[what] += 1
                heappush(self._later, (until, next(self._serial), pair, port, what))
        while self._later and self._later[0][0] <= now:
            _, _, pair, port, what = heappop(self._later)
            pair.towards.count[what] -= 1
            self._free(pair, port)

    def _free(self, pair: _Pair, port: int) -> None:
        towards = pair.towards
        pair.given_back.append(port)
        towards.drop(pair)
        towards.set_room(pair, pair.room + 1)
        if towards.idle:
            self._forget(towards)

    def _forget(self, towards: _Towards) -> None:
        """Nothing is in use towards this destination: a crawler would otherwise keep a record of every host it saw."""
        del self._towards[towards.key]
        towards.by_room.clear()  # pairs refer back to it, and would have to wait for the garbage collector

    def _resolve_doubts(self, most: int) -> None:
        for _ in range(min(most, len(self._doubts))):
            lease, is_over = self._doubts.popleft()
            if is_over():
                lease.release()
            elif not lease.over:
                self._doubts.append((lease, is_over))


class _Returned(Enum):
    """What is known of a tuple that no lease holds; FREE also counts the leases themselves."""

    FREE = "free"
    RESTING = "resting"
    OTHERS = "others"


class _Towards:
    """All source addresses in use towards one destination, by how much room each has."""

    __slots__ = ("by_room", "count", "key", "most_room", "opened", "start", "waiters")

    def __init__(self, key: tuple[Endpoint, Protocol], start: int) -> None:
        self.key = key
        self.start = start
        self.opened = 0
        # A bucket gives its last member, which then goes to the next lower one: addresses with equal room take turns.
        self.by_room: dict[int, dict[_Pair, None]] = {}
        self.most_room = 0
        self.count = dict.fromkeys(_Returned, 0)
        self.waiters: deque[Wake] = deque()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to remember."""
        return not self.waiters and not any(self.count.values())

    def pop_roomiest(self) -> _Pair:
        bucket = self.by_room[self.most_room]
        pair, _ = bucket.popitem()
        if not bucket:
            del self.by_room[self.most_room]
        return pair

    def drop(self, pair: _Pair) -> None:
        """Take a pair out of its bucket; a pair without room is in none."""
        bucket = self.by_room.get(pair.room)
        if bucket is not None and pair in bucket:
            del bucket[pair]
            if not bucket:
                del self.by_room[pair.room]

    def set_room(self, pair: _Pair, room: int) -> None:
        """Put a pair that is in no bucket where it belongs."""
        pair.room = room
        if room:
            self.by_room.setdefault(room, {})[pair] = None
        if room > self.most_room:
            self.most_room = room
        # One step at the most: whatever left the highest bucket went to the next lower one.
        while self.most_room and self.most_room not in self.by_room:
            self.most_room -= 1

    def wake_one(self) -> None:
        while True:
            try:
                wake = self.waiters.popleft()
            except IndexError:
                return
            if wake():
                return


class _Pair:
    """One source address towards one destination: which of its ports nobody has, oldest first."""

    __slots__ = ("address", "fresh", "given_back", "head", "room", "start", "stride", "towards")

    def __init__(self, towards: _Towards, address: str, room: int, start: int, stride: int) -> None:
        self.towards = towards
        self.address = address
        self.room = room
        # RFC 6056 section 3: ports are not to be guessed from earlier ones. A start and a stride of chance that walk
        # over all ports cost nothing to store; two processes that use one range seldom want the same port at once.
        self.start, self.stride = start, stride
        self.fresh = 0
        self.given_back = array("H")
        self.head = 0

    def next_port(self, numbers: array[int]) -> int:
        """Ports never used first, then the one given back longest ago: the kernel may still hold later ones."""
        if self.fresh < len(numbers):
            position = (self.start + self.fresh * self.stride) % len(numbers)
            self.fresh += 1
            return numbers[position]
        port = self.given_back[self.head]
        self.head += 1
        if self.head > 64 and 2 * self.head > len(self.given_back):
            del self.given_back[: self.head]
            self.head = 0
        return port


def _shortened(members: AddressSet | PortSet) -> str:
    runs = [f"{first}" if first == last else f"{first}-{last}" for first, last in members.ranges()[:3]]
    return ",".join(chain(runs, ["..."] if len(members.runs) > len(runs) else []))
