"""Names and counting: what a connection is called, and how many such names a set of addresses and ports gives.

Decides the arithmetic of the four-tuple space, exactly, for IPv4 and IPv6, TCP and UDP alike. Knows no socket, host or
limit: how many of these names a kernel lets a program use is the business of `fourtuple.limits`. Nothing is stored per
address, port or tuple, so that a /64 costs as much as one address.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from itertools import chain, combinations
from math import prod
from typing import Any, NoReturn

from msgspec import Struct
from msgspec.structs import force_setattr, replace

from fourtuple.errors import BadConfig
from fourtuple.ranges import RangeSet, Run, cuts

IPAddress = IPv4Address | IPv6Address
HIGHEST_PORT = 65_535
"""A port is 16 bits wide (RFC 9293 section 3.1). Port 0 is not one of them: to bind(2) it means "choose one for me"."""


class Protocol(Enum):
    """Each protocol has a tuple space of its own: a TCP and a UDP connection may have the same four-tuple."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of a connection."""

    address: IPAddress
    port: int

    def __post_init__(self) -> None:
        if not 1 <= self.port <= HIGHEST_PORT:
            _refuse("port", self.port, "a port is a whole number from 1 to 65535")

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read "192.0.2.1:80" or "[2001:db8::1]:80"."""
        host, colon, port = text.strip().rpartition(":")
        if not colon:
            _refuse("endpoint", text, "it is ADDRESS:PORT, such as 192.0.2.1:80 or [2001:db8::1]:80")
        bracketed = host.startswith("[") and host.endswith("]")
        address = _parse_address("endpoint", host[1:-1] if bracketed else host)
        if bracketed != (address.version == 6):
            _refuse("endpoint", text, "brackets are for IPv6 addresses, and those need them: [2001:db8::1]:80")
        return cls(address, _parse_port("endpoint", port))

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


class FourTuple(Struct, frozen=True):
    """The name of a connection: no two live connections of one protocol on a host share it (RFC 9293 section 3.3.1)."""

    source: Endpoint
    destination: Endpoint

    def __post_init__(self) -> None:
        if self.source.address.version != self.destination.address.version:
            _refuse("destination", self.destination, f"its family is not that of the source, {self.source}")

    def reversed(self) -> FourTuple:
        """The same connection as its other end names it."""
        return FourTuple(self.destination, self.source)

    def __str__(self) -> str:
        return f"{self.source} -> {self.destination}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PortSet(RangeSet[int]):
    """Ports, such as `PortSet.parse("1024-65535,80")` or `PortSet(runs=((1024, 65535), (80, 80)))`."""

    def __post_init__(self) -> None:
        for first, last in self.runs:
            if not 1 <= first <= last <= HIGHEST_PORT:
                _refuse("ports", f"{first}-{last}", "a range goes upward, from 1 at the lowest to 65535 at the highest")
        RangeSet.__post_init__(self)

    @classmethod
    def of(cls, *ports: int) -> PortSet:
        """The set of these ports."""
        return cls(runs=tuple((port, port) for port in ports))

    @classmethod
    def parse(cls, text: str) -> PortSet:
        """Read ports and ranges with commas between them: "1024-65535,80"."""
        runs: list[Run] = []
        for part in _parts("ports", text):
            first, dash, last = part.partition("-")
            runs.append((_parse_port("ports", first), _parse_port("ports", last if dash else first)))
        return cls(runs=tuple(runs))

    def _item(self, number: int) -> int:
        return number

    def _number(self, item: object) -> int | None:
        return item if isinstance(item, int) else None


ALL_PORTS = PortSet(runs=((1, HIGHEST_PORT),))


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressSet(RangeSet[IPAddress]):
    """Addresses of one family as integers, such as `AddressSet.parse("10.0.0.0/16,10.7.0.1-10.7.0.9")`.

    A prefix means each of its addresses, first and last included: that is what an AnyIP route makes local.
    """

    version: int = 4

    def __post_init__(self) -> None:
        highest = addresses_of(self.version) - 1
        for first, last in self.runs:
            if not 0 <= first <= last <= highest:
                _refuse("addresses", f"{first}-{last}", f"a range goes upward, inside IPv{self.version}")
        RangeSet.__post_init__(self)

    @classmethod
    def of(cls, *addresses: IPAddress) -> AddressSet:
        """The set of these addresses, at least one."""
        return cls._joined((one, one) for one in addresses)

    @classmethod
    def parse(cls, text: str) -> AddressSet:
        """Read addresses, prefixes and ranges with commas between them: "10.0.0.0/16,10.7.0.1-10.7.0.9"."""
        return cls._joined(_parse_range(part) for part in _parts("addresses", text))

    @classmethod
    def whole(cls, version: int) -> AddressSet:
        """Every address that the header of this IP version can hold."""
        return cls(version=version, runs=((0, addresses_of(version) - 1),))

    @classmethod
    def usable(cls, version: int) -> AddressSet:
        """Every address that can be an end of a connection between hosts (RFC 1122 3.2.1.3, RFC 4291 2.4).

        Left out are, for IPv4, 0.0.0.0/8, loopback, multicast and the reserved 240.0.0.0/4; for IPv6 the unspecified
        address, loopback, IPv4-mapped addresses and multicast.
        """
        return cls.whole(version).subtract(cls.parse(_UNUSABLE[version]))

    @classmethod
    def _joined(cls, ranges: Iterable[tuple[IPAddress, IPAddress]]) -> AddressSet:
        """The set of all addresses from each first to its last; they settle the family, so there is at least one."""
        found = tuple(ranges)
        versions = {one.version for pair in found for one in pair}
        if len(versions) != 1:
            _refuse("addresses", ",".join(map(str, found)), "one or more addresses are needed, all of one family")
        return cls(version=versions.pop(), runs=tuple((int(first), int(last)) for first, last in found))

    def _item(self, number: int) -> IPAddress:
        return IPv4Address(number) if self.version == 4 else IPv6Address(number)

    def _number(self, item: object) -> int | None:
        return int(item) if isinstance(item, IPv4Address if self.version == 4 else IPv6Address) else None

    def _require_same_kind(self, other: AddressSet) -> None:
        if self.version != other.version:
            _refuse("addresses", other, f"IPv{other.version} and IPv{self.version} do not go into one set")


class Axis(Enum):
    """The four sets that a tuple space is the product of; each value is the name of the field."""

    SOURCE = "sources"
    SOURCE_PORT = "source_ports"
    DESTINATION = "destinations"
    DESTINATION_PORT = "destination_ports"


ENGINE_ORDER = (Axis.SOURCE, Axis.DESTINATION, Axis.DESTINATION_PORT, Axis.SOURCE_PORT)
"""Fastest first, as the engine uses tuples: the source address changes with each tuple, which spreads them best over
the kernel's hash and over NIC queues; the source port comes last, so that part of a space uses few ports everywhere."""


class TupleSpace(Struct, frozen=True, kw_only=True):
    """Every tuple of a source address, a source port, a destination address and a destination port out of four sets."""

    protocol: Protocol = Protocol.TCP
    sources: AddressSet
    source_ports: PortSet = ALL_PORTS
    destinations: AddressSet
    destination_ports: PortSet

    def __post_init__(self) -> None:
        if self.sources.version != self.destinations.version:
            _refuse("destinations", self.destinations, f"they need to be IPv{self.sources.version}, as the sources are")

    @classmethod
    def of(cls, name: FourTuple, protocol: Protocol = Protocol.TCP) -> TupleSpace:
        """The space of one tuple."""
        return cls(
            protocol=protocol,
            sources=AddressSet.of(name.source.address),
            source_ports=PortSet.of(name.source.port),
            destinations=AddressSet.of(name.destination.address),
            destination_ports=PortSet.of(name.destination.port),
        )

    @property
    def size(self) -> int:
        """How many tuples, exactly; `len` is the same, but Python bounds it at sys.maxsize."""
        return prod(self._sizes(ENGINE_ORDER))

    def __len__(self) -> int:
        return self.size

    def __bool__(self) -> bool:
        return self.size > 0

    def __contains__(self, name: object) -> bool:
        return (
            isinstance(name, FourTuple)
            and name.source.address in self.sources
            and name.source.port in self.source_ports
            and name.destination.address in self.destinations
            and name.destination.port in self.destination_ports
        )

    def __iter__(self) -> Iterator[FourTuple]:
        return self.tuples()

    def tuples(self, order: Sequence[Axis] = ENGINE_ORDER) -> Iterator[FourTuple]:
        """All tuples, the first axis of `order` changing fastest."""
        _require_order(order)
        fastest, fast, slow, slowest = (self._members(axis) for axis in order)
        return (
            _named(dict(zip(order, (a, b, c, d), strict=True)))
            for d in slowest
            for c in slow
            for b in fast
            for a in fastest
        )

    def nth(self, index: int, order: Sequence[Axis] = ENGINE_ORDER) -> FourTuple:
        """The tuple at `index`, from 0, the first axis of `order` changing fastest; IndexError outside."""
        _require_order(order)
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is not in 0..{self.size - 1}")
        members: dict[Axis, Any] = {}
        for axis in order:
            index, position = divmod(index, self._members(axis).size)
            members[axis] = self._members(axis).nth(position)
        return _named(members)

    def intersect(self, other: TupleSpace) -> TupleSpace:
        """Tuples of both; a product again."""
        if self.protocol is not other.protocol:
            _refuse("protocol", other.protocol.value, f"{self.protocol.value} is needed: each has a space of its own")
        shared = self
        for axis in Axis:
            shared = shared._with(axis, self._members(axis).intersect(other._members(axis)))
        return shared

    def subtract(self, other: TupleSpace | FourTuple) -> TupleSpaces:
        """Tuples of this space that the other lacks: at most four products."""
        shared = self.intersect(TupleSpace.of(other, self.protocol) if isinstance(other, FourTuple) else other)
        if not shared:
            return TupleSpaces(parts=(self,))
        # Narrow this space to the shared one, an axis at a time: what each step gives up is a product.
        parts: list[TupleSpace] = []
        rest = self
        for axis in Axis:
            parts.append(rest._with(axis, rest._members(axis).subtract(shared._members(axis))))
            rest = rest._with(axis, shared._members(axis))
        return TupleSpaces(parts=tuple(parts))

    def between(self, start: int, stop: int) -> TupleSpaces:
        """The tuples at positions start..stop-1 in the engine's order: at most seven products."""
        return TupleSpaces(parts=tuple(self._boxes(ENGINE_ORDER, max(start, 0), min(stop, self.size))))

    def split(self, shares: int) -> tuple[TupleSpaces, ...]:
        """Disjoint shares that together are this space, in its order; their sizes differ by at most one tuple."""
        return tuple(self.between(start, stop) for start, stop in cuts(self.size, shares))

    def _boxes(self, order: Sequence[Axis], start: int, stop: int) -> Iterator[TupleSpace]:
        """Products that together are the tuples at start..stop-1: a part row, whole rows, and a part row again."""
        if start >= stop:
            return
        *faster, slowest = order
        row = prod(self._sizes(faster))
        (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
        if first == last:
            yield from self._rows(slowest, first, first + 1)._boxes(faster, head, tail)
            return
        if head:
            yield from self._rows(slowest, first, first + 1)._boxes(faster, head, row)
            first += 1
        if first < last:
            yield self._rows(slowest, first, last)
        if tail:
            yield from self._rows(slowest, last, last + 1)._boxes(faster, 0, tail)

    def _rows(self, axis: Axis, start: int, stop: int) -> TupleSpace:
        return self._with(axis, self._members(axis).between(start, stop))

    def _members(self, axis: Axis) -> RangeSet[Any]:
        members: RangeSet[Any] = getattr(self, axis.value)
        return members

    def _with(self, axis: Axis, members: RangeSet[Any]) -> TupleSpace:
        changed: dict[str, Any] = {axis.value: members}
        return replace(self, **changed)

    def _sizes(self, order: Iterable[Axis]) -> list[int]:
        return [self._members(axis).size for axis in order]


class TupleSpaces(Struct, frozen=True, kw_only=True):
    """Disjoint spaces taken together: what is left of one after `subtract`, or a share of it after `split`."""

    parts: tuple[TupleSpace, ...] = ()

    def __post_init__(self) -> None:
        parts = tuple(part for part in self.parts if part)
        for one, other in combinations(parts, 2):
            if one.intersect(other):
                _refuse("parts", f"{one} and {other}", "no tuple may be in two of them")
        force_setattr(self, "parts", parts)

    @property
    def size(self) -> int:
        """How many tuples, exactly."""
        return sum(part.size for part in self.parts)

    def __len__(self) -> int:
        return self.size

    def __bool__(self) -> bool:
        return bool(self.parts)

    def __contains__(self, name: object) -> bool:
        return any(name in part for part in self.parts)

    def __iter__(self) -> Iterator[FourTuple]:
        return chain.from_iterable(self.parts)

    def intersect(self, other: TupleSpace) -> TupleSpaces:
        """Tuples of both."""
        return TupleSpaces(parts=tuple(part.intersect(other) for part in self.parts))

    def subtract(self, other: TupleSpace | FourTuple) -> TupleSpaces:
        """Tuples of these spaces that the other lacks."""
        return TupleSpaces(parts=tuple(left for part in self.parts for left in part.subtract(other).parts))


# The textbook questions. Each figure says what it counts; none of them is a limit of a real host.


def addresses_of(version: int) -> int:
    """Addresses that the header can hold: 2^32 for IPv4 (RFC 791), 2^128 for IPv6 (RFC 8200)."""
    if version not in _ADDRESS_BITS:
        _refuse("version", version, "4 or 6")
    return 1 << _ADDRESS_BITS[version]


PORT_FIELD = 1 << 16
"""Values that the port field can hold, 0 included (RFC 9293 section 3.1)."""


def connections_per_pair() -> int:
    """Connections at once from one source address to one destination endpoint: 65,535, one for each source port but 0.

    This is the figure that "65,535" is usually a memory of. It is the same for IPv6, and for UDP.
    """
    return connections()


def connections(*, sources: int = 1, destinations: int = 1, source_ports: int = HIGHEST_PORT, ports: int = 1) -> int:
    """Connections at once from m source addresses to n destination addresses, each listening on `ports` ports.

    m x n x source_ports x ports: each source port is used once for every pair of a source address and a destination.
    """
    for name, value in (("sources", sources), ("destinations", destinations)):
        if value < 0:
            _refuse(name, value, "a whole number, 0 or more")
    for name, value in (("source_ports", source_ports), ("ports", ports)):
        if not 0 <= value <= HIGHEST_PORT:
            _refuse(name, value, "a whole number from 0 to 65535")
    return sources * destinations * source_ports * ports


def names_per_listener(version: int = 4) -> int:
    """Clients that one listener (a local address and port) can tell apart by header: address x port, 2^48 (IPv6 2^144).

    Counts every value of the two fields. `connections_per_listener` leaves out those that no client can have.
    """
    return addresses_of(version) * PORT_FIELD


def connections_per_listener(version: int = 4) -> int:
    """Connections at once to one listener, from clients elsewhere: without source port 0 and `AddressSet.usable` only.

    For IPv4 that is 3,724,541,952 addresses x 65,535 ports = 244,087,856,824,320, which is 87 % of 2^48.
    """
    return AddressSet.usable(version).size * HIGHEST_PORT


def names_per_local_address(version: int = 4) -> int:
    """Tuples with one given local address: local port x remote address x remote port, 2^64 (IPv6 2^160)."""
    return PORT_FIELD * names_per_listener(version)


def names_in_all(version: int = 4) -> int:
    """Every four-tuple that two headers can spell: 2^96 (IPv6 2^288), for each protocol."""
    return addresses_of(version) * names_per_local_address(version)


_ADDRESS_BITS = {4: 32, 6: 128}
_UNUSABLE = {4: "0.0.0.0/8,127.0.0.0/8,224.0.0.0/4,240.0.0.0/4", 6: "::/128,::1/128,::ffff:0:0/96,ff00::/8"}
_SHOWN_CHARACTERS = 80


def _refuse(path: str, value: object, allowed: str) -> NoReturn:
    shown = str(value)
    raise BadConfig(path, f"{shown[:_SHOWN_CHARACTERS]!r}{'...' if len(shown) > _SHOWN_CHARACTERS else ''}: {allowed}")


def _parts(path: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        _refuse(path, text, "one or more values with commas between them, none of them empty")
    return parts


def _parse_port(path: str, text: str) -> int:
    digits = text.strip()
    # isdecimal alone would let other scripts' digits through, and int() takes underscores and signs.
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 5 and 1 <= int(digits) <= HIGHEST_PORT):
        _refuse(path, text, "a port is a whole number from 1 to 65535")
    return int(digits)


def _parse_address(path: str, text: str) -> IPAddress:
    try:
        return ip_address(text.strip())
    except ValueError:
        _refuse(path, text, "an IPv4 or IPv6 address is needed")


def _parse_range(text: str) -> tuple[IPAddress, IPAddress]:
    first, dash, last = text.partition("-")
    if dash:
        low, high = _parse_address("addresses", first), _parse_address("addresses", last)
        if int(low) > int(high):
            _refuse("addresses", text, "a range goes upward")
        return low, high
    try:
        network = ip_network(text)
    except ValueError as problem:
        _refuse("addresses", text, f"ADDRESS, PREFIX/LENGTH or FIRST-LAST is needed ({problem})"[:200])
    return network[0], network[-1]


def _require_order(order: Sequence[Axis]) -> None:
    if len(order) != len(Axis) or set(order) != set(Axis):
        _refuse("order", ", ".join(str(axis) for axis in order), "each of the four axes, once")


def _named(members: dict[Axis, Any]) -> FourTuple:
    return FourTuple(
        Endpoint(members[Axis.SOURCE], members[Axis.SOURCE_PORT]),
        Endpoint(members[Axis.DESTINATION], members[Axis.DESTINATION_PORT]),
    )
