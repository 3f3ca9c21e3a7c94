"""The arithmetic of the tuple space: textbook figures as literal numbers, everything else against brute force."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise, permutations
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourtuple import tuples
from fourtuple.errors import BadConfig
from fourtuple.facts import Flow
from fourtuple.ranges import RangeSet
from fourtuple.tuples import (
    ALL_PORTS,
    ENGINE_ORDER,
    AddressSet,
    Axis,
    Endpoint,
    FourTuple,
    PortSet,
    Protocol,
    TupleSpace,
    TupleSpaces,
)

FIRST_ADDRESS = {4: int(IPv4Address("10.0.0.250")), 6: int(IPv6Address("2001:db8::fffa"))}
"""Close to where an octet or a group carries into the next."""


def port_sets(size: int = 4) -> st.SearchStrategy[PortSet]:
    """A few small ranges out of the lowest and the highest ports, overlapping as they come."""
    lows = st.sampled_from([1, 2, 3, 5, 8, 9, 65_530, 65_533])
    run = st.tuples(lows, st.integers(0, 2)).map(lambda pair: (pair[0], min(pair[0] + pair[1], 65_535)))
    return st.lists(run, max_size=size).map(lambda runs: PortSet(runs=tuple(runs)))


def address_sets(version: int, size: int = 3) -> st.SearchStrategy[AddressSet]:
    first = FIRST_ADDRESS[version]
    run = st.tuples(st.integers(0, 8), st.integers(0, 2)).map(lambda pair: (first + pair[0], first + sum(pair)))
    return st.lists(run, max_size=size).map(lambda runs: AddressSet(version=version, runs=tuple(runs)))


@st.composite
def spaces(draw: st.DrawFn, version: int = 4) -> TupleSpace:
    return TupleSpace(
        sources=draw(address_sets(version, 2)),
        source_ports=draw(port_sets(2)),
        destinations=draw(address_sets(version, 2)),
        destination_ports=draw(port_sets(2)),
    )


def brute(space: Iterable[FourTuple]) -> set[FourTuple]:
    names = list(space)
    assert len(names) == len(set(names)), "a tuple came twice"
    return set(names)


def tuple_of(text: str) -> FourTuple:
    source, _, destination = text.partition(" -> ")
    return FourTuple(Endpoint.parse(source), Endpoint.parse(destination))


class TestTextbook:
    """Each figure of the question "how many connections can a host have?", as a literal."""

    def test_one_source_address_to_one_destination(self) -> None:
        assert tuples.connections_per_pair() == 65_535

    def test_widening_any_set_multiplies(self) -> None:
        assert tuples.connections(sources=4, destinations=3) == 4 * 3 * 65_535
        assert tuples.connections(sources=2, destinations=5, source_ports=28_232, ports=7) == 1_976_240
        assert tuples.connections(destinations=0) == 0

    def test_figures_are_sizes_of_spaces(self) -> None:
        space = TupleSpace(
            sources=AddressSet.parse("10.0.0.1-10.0.0.4"),
            destinations=AddressSet.parse("10.1.0.0/24"),
            destination_ports=PortSet.of(80, 443),
        )
        assert space.size == tuples.connections(sources=4, destinations=256, ports=2) == 134_215_680

    @pytest.mark.parametrize(
        ("figure", "ipv4", "ipv6"),
        [
            (tuples.addresses_of, 4_294_967_296, 2**128),
            (tuples.names_per_listener, 281_474_976_710_656, 2**144),
            (tuples.names_per_local_address, 18_446_744_073_709_551_616, 2**160),
            (tuples.names_in_all, 79_228_162_514_264_337_593_543_950_336, 2**288),
        ],
    )
    def test_names_in_the_header(self, figure: Callable[[int], int], ipv4: int, ipv6: int) -> None:
        assert (figure(4), figure(6)) == (ipv4, ipv6)

    def test_connections_per_listener(self) -> None:
        assert tuples.connections_per_listener() == 3_724_541_952 * 65_535 == 244_087_856_824_320
        # Without ::, ::1, the 2^32 mapped addresses and the 2^120 multicast ones.
        assert tuples.connections_per_listener(6) == (2**128 - 2 - 2**32 - 2**120) * 65_535

    @pytest.mark.parametrize(
        "address", ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "::", "::1", "ff02::1"]
    )
    def test_an_unusable_address(self, address: str) -> None:
        one = ip_address(address)
        assert one not in AddressSet.usable(one.version)
        assert one in AddressSet.whole(one.version)

    @pytest.mark.parametrize("address", ["1.0.0.0", "126.255.255.255", "223.255.255.255", "10.0.0.1", "2001:db8::1"])
    def test_a_usable_address(self, address: str) -> None:
        one = ip_address(address)
        assert one in AddressSet.usable(one.version)

    def test_no_fifth_version(self) -> None:
        with pytest.raises(BadConfig, match="4 or 6"):
            tuples.addresses_of(5)

    @pytest.mark.parametrize("wrong", [{"sources": -1}, {"source_ports": 65_536}, {"ports": -1}])
    def test_impossible_counts(self, wrong: dict[str, int]) -> None:
        with pytest.raises(BadConfig, match=next(iter(wrong))):
            tuples.connections(**wrong)


class TestEndpoint:
    @pytest.mark.parametrize("text", ["192.0.2.1:80", "[::1]:65535", "[2001:db8::1]:1", "[fe80::1%eth0]:22"])
    def test_text_round_trip(self, text: str) -> None:
        assert str(Endpoint.parse(text)) == text

    @pytest.mark.parametrize(
        "text",
        [
            *["", ":", "80", "1.2.3.4", "1.2.3.4:", ":80", "1.2.3.4:0", "1.2.3.4:65536", "1.2.3.4:-1", "1.2.3.4:+80"],
            *["1.2.3.4:8_0", "1.2.3.4:٨٠", "1.2.3.4:0x50", "1.2.3:80", "1.2.3.4.5:80", "256.1.1.1:80", "host:80"],
            *["::1:80", "[::1:80", "::1]:80", "[1.2.3.4]:80", "[::1]80", "[]:80", "1.2.3.4:80:80", "1.2.3.4:80\x00"],
            "1.2.3.4:" + "9" * 5_000,
        ],
    )
    def test_hostile_text(self, text: str) -> None:
        with pytest.raises(BadConfig) as refused:
            Endpoint.parse(text)
        assert len(str(refused.value)) < 300

    def test_no_port_zero(self) -> None:
        with pytest.raises(BadConfig, match="port: '0'"):
            Endpoint(IPv4Address("10.0.0.1"), 0)

    def test_families_do_not_mix(self) -> None:
        with pytest.raises(BadConfig, match="family"):
            tuple_of("10.0.0.1:1 -> [::1]:1")

    def test_reversed(self) -> None:
        assert tuple_of("10.0.0.1:1 -> 10.0.0.2:2").reversed() == tuple_of("10.0.0.2:2 -> 10.0.0.1:1")

    def test_a_model_holds_it(self) -> None:
        flow = Flow(source="10.0.0.1", destination=Endpoint.parse("[::1]:80"), connections=3)
        assert Flow.model_validate_json(flow.model_dump_json()) == flow
        with pytest.raises(ValueError, match="from 1 to 65535"):
            Flow.model_validate_json(flow.model_dump_json().replace("80", "0"))


class TestSets:
    @pytest.mark.parametrize(
        ("text", "size", "normal"),
        [
            ("80", 1, "80"),
            ("1-65535", 65_535, "1-65535"),
            ("1024-65535,8080", 64_512, "1024-65535"),
            ("443, 80 ,81-90", 12, "80-90,443"),
            ("5-7,1-3,4", 7, "1-7"),
        ],
    )
    def test_ports(self, text: str, size: int, normal: str) -> None:
        ports = PortSet.parse(text)
        assert (ports.size, len(ports), str(ports)) == (size, size, normal)
        assert PortSet.parse(str(ports)) == ports

    @pytest.mark.parametrize(
        ("text", "size", "normal"),
        [
            ("10.0.0.0/16", 65_536, "10.0.0.0-10.0.255.255"),
            ("10.0.0.9", 1, "10.0.0.9"),
            ("10.0.0.1-10.0.0.9,10.0.0.10", 10, "10.0.0.1-10.0.0.10"),
            ("0.0.0.0/0", 2**32, "0.0.0.0-255.255.255.255"),
            ("2001:db8::/64", 2**64, "2001:db8::-2001:db8::ffff:ffff:ffff:ffff"),
        ],
    )
    def test_addresses(self, text: str, size: int, normal: str) -> None:
        addresses = AddressSet.parse(text)
        assert (addresses.size, str(addresses)) == (size, normal)
        assert AddressSet.parse(str(addresses)) == addresses

    @pytest.mark.parametrize(
        "text",
        [
            *["", ",", "80,", ",80", "80,,81", "0", "65536", "0-80", "80-65536", "90-80", "-", "-80", "80-", "1-2-3"],
            *["http", "8 0", "²", "1e3", "80;81", "9" * 5_000],
        ],
    )
    def test_hostile_ports(self, text: str) -> None:
        with pytest.raises(BadConfig, match="ports"):
            PortSet.parse(text)

    @pytest.mark.parametrize(
        "text",
        [
            *["", ",", "10.0.0.1,", "10.0.0.1/16", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0", "10.0.0.9-10.0.0.1", "x"],
            *[
                "10.0.0.1-",
                "-10.0.0.1",
                "10.0.0.1-::1",
                "10.0.0.1,::1",
                "::/129",
                "::1-10.0.0.1",
                "010.0.0.1",
                "fe80::1%",
            ],
            "1" * 5_000,
        ],
    )
    def test_hostile_addresses(self, text: str) -> None:
        with pytest.raises(BadConfig, match="addresses") as refused:
            AddressSet.parse(text)
        assert len(str(refused.value)) < 400

    @given(st.text(alphabet="0123456789.:-/,[]% abcdef٣", max_size=24))
    def test_any_text_is_a_value_or_bad_config(self, text: str) -> None:
        for parse in (PortSet.parse, AddressSet.parse, Endpoint.parse):
            try:
                value = parse(text)
            except BadConfig:
                continue
            assert parse(str(value)) == value

    def test_sizes_beyond_what_len_can_say(self) -> None:
        everything = AddressSet.whole(6)
        assert everything.size == 2**128 > sys.maxsize
        assert everything
        assert everything.nth(2**127) == IPv6Address("8000::")
        with pytest.raises(OverflowError):
            len(everything)

    def test_families_do_not_mix(self) -> None:
        four, six = AddressSet.parse("10.0.0.1"), AddressSet.parse("::1")
        for operation in (AddressSet.union, AddressSet.intersect, AddressSet.subtract):
            with pytest.raises(BadConfig, match="IPv6 and IPv4"):
                operation(four, six)
        assert IPv6Address("::1") not in four
        assert ALL_PORTS.subtract(ALL_PORTS).size == 0

    def test_an_empty_list_of_addresses_has_no_family(self) -> None:
        with pytest.raises(BadConfig, match="one or more"):
            AddressSet.of()

    @given(st.lists(st.integers(1, 65_535)))
    def test_of_is_the_set(self, ports: list[int]) -> None:
        assert list(PortSet.of(*ports)) == sorted(set(ports))

    @given(port_sets(), port_sets())
    def test_port_laws(self, ours: PortSet, theirs: PortSet) -> None:
        check_laws(ours, theirs)

    @given(st.sampled_from([4, 6]).flatmap(lambda version: st.tuples(address_sets(version), address_sets(version))))
    def test_address_laws(self, pair: tuple[AddressSet, AddressSet]) -> None:
        check_laws(*pair)

    @given(port_sets(), st.integers(1, 9))
    def test_split(self, ports: PortSet, count: int) -> None:
        shares = ports.split(count)
        assert [port for share in shares for port in share] == list(ports)
        assert max(share.size for share in shares) - min(share.size for share in shares) <= 1

    @given(port_sets(), st.integers(-3, 20), st.integers(-3, 20))
    def test_between_is_a_slice(self, ports: PortSet, start: int, stop: int) -> None:
        assert list(ports.between(start, stop)) == list(ports)[max(start, 0) : max(stop, 0)]

    @pytest.mark.parametrize("index", [-1, 3, 2**70])
    def test_nth_outside(self, index: int) -> None:
        with pytest.raises(IndexError):
            PortSet.of(1, 2, 3).nth(index)

    def test_no_shares(self) -> None:
        with pytest.raises(BadConfig, match="shares"):
            ALL_PORTS.split(0)


Kind = TypeVar("Kind", PortSet, AddressSet)


def check_laws(ours: Kind, theirs: Kind) -> None:
    """Set arithmetic is what Python's own sets make of the members."""
    mine, other = set(ours), set(theirs)
    assert list(ours) == sorted(mine)
    assert ours.size == len(mine)
    assert [ours.nth(index) for index in range(ours.size)] == list(ours)
    assert set(ours.union(theirs)) == mine | other
    assert set(ours.intersect(theirs)) == mine & other
    assert set(ours.subtract(theirs)) == mine - other
    assert all((one in ours) == (one in mine) for one in mine | other)
    # Equal sets are equal values, whatever they were made of.
    assert ours.union(theirs) == theirs.union(ours)
    assert ours.subtract(theirs).union(ours.intersect(theirs)) == ours
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(ours.runs))


class TestSpace:
    def test_engine_order(self) -> None:
        space = TupleSpace(
            sources=AddressSet.parse("10.0.0.1-10.0.0.2"),
            source_ports=PortSet.of(7, 9),
            destinations=AddressSet.parse("10.1.0.1-10.1.0.2"),
            destination_ports=PortSet.of(80, 81),
        )
        assert [str(name) for name in space][:9] == [
            "10.0.0.1:7 -> 10.1.0.1:80",
            "10.0.0.2:7 -> 10.1.0.1:80",
            "10.0.0.1:7 -> 10.1.0.2:80",
            "10.0.0.2:7 -> 10.1.0.2:80",
            "10.0.0.1:7 -> 10.1.0.1:81",
            "10.0.0.2:7 -> 10.1.0.1:81",
            "10.0.0.1:7 -> 10.1.0.2:81",
            "10.0.0.2:7 -> 10.1.0.2:81",
            "10.0.0.1:9 -> 10.1.0.1:80",
        ]

    def test_a_space_too_large_to_store(self) -> None:
        space = TupleSpace(
            protocol=Protocol.UDP,
            sources=AddressSet.parse("2001:db8::/64"),
            destinations=AddressSet.parse("2001:db8:1::/64"),
            destination_ports=ALL_PORTS,
        )
        assert space.size == 2**128 * 65_535**2
        last = space.nth(space.size - 1)
        assert str(last) == "[2001:db8::ffff:ffff:ffff:ffff]:65535 -> [2001:db8:1:0:ffff:ffff:ffff:ffff]:65535"
        assert last in space
        assert space.subtract(last).size == space.size - 1
        assert sum(share.size for share in space.split(7)) == space.size

    @given(st.sampled_from([4, 6]).flatmap(spaces), st.permutations(list(Axis)))
    def test_nth_iteration_and_membership_agree(self, space: TupleSpace, order: list[Axis]) -> None:
        names = list(space.tuples(order))
        assert space.size == len(set(names)) == len(names)
        assert bool(space) == bool(names)
        assert [space.nth(index, order) for index in range(space.size)] == names
        assert all(name in space for name in names)
        for outside in (-1, space.size):
            with pytest.raises(IndexError):
                space.nth(outside, order)

    def test_every_order_is_its_own(self) -> None:
        two = "10.0.0.1-10.0.0.2"
        space = TupleSpace(
            sources=AddressSet.parse(two),
            source_ports=PortSet.of(1, 2),
            destinations=AddressSet.parse(two),
            destination_ports=PortSet.of(3, 4),
        )
        assert len({tuple(space.tuples(order)) for order in permutations(Axis)}) == 24

    @pytest.mark.parametrize("order", [(), (Axis.SOURCE,) * 4, (*ENGINE_ORDER, Axis.SOURCE), ENGINE_ORDER[:3]])
    def test_an_order_names_each_axis_once(self, order: tuple[Axis, ...]) -> None:
        space = TupleSpace.of(tuple_of("10.0.0.1:1 -> 10.0.0.2:2"))
        with pytest.raises(BadConfig, match="order"):
            space.nth(0, order)
        with pytest.raises(BadConfig, match="order"):
            space.tuples(order)

    @given(spaces(), spaces())
    def test_subtract_and_intersect(self, ours: TupleSpace, theirs: TupleSpace) -> None:
        mine, other = brute(ours), brute(theirs)
        rest, shared = ours.subtract(theirs), ours.intersect(theirs)
        assert brute(rest) == mine - other
        assert brute(shared) == mine & other
        assert rest.size + shared.size == ours.size
        assert len(rest.parts) <= 4
        assert all((name in rest) == (name in mine - other) for name in mine | other)

    @given(spaces(), spaces(), spaces())
    def test_subtracting_twice(self, ours: TupleSpace, theirs: TupleSpace, others: TupleSpace) -> None:
        rest = ours.subtract(theirs)
        assert brute(rest.subtract(others)) == brute(ours) - brute(theirs) - brute(others)
        assert brute(rest.intersect(others)) == (brute(ours) - brute(theirs)) & brute(others)

    @given(spaces().filter(bool), st.data())
    def test_subtracting_one_tuple(self, space: TupleSpace, data: st.DataObject) -> None:
        name = space.nth(data.draw(st.integers(0, space.size - 1)))
        rest = space.subtract(name)
        assert brute(rest) == brute(space) - {name}
        assert rest.subtract(name) == rest

    @given(spaces(), st.integers(1, 12))
    def test_split_is_disjoint_complete_even_and_in_order(self, space: TupleSpace, count: int) -> None:
        shares = space.split(count)
        assert len(shares) == count
        assert [name for share in shares for name in share] == list(space)
        sizes = [share.size for share in shares]
        assert sizes == [len(brute(share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert all(len(share.parts) <= 7 for share in shares)

    @given(spaces(), st.integers(-5, 40), st.integers(-5, 40))
    def test_between_is_a_slice(self, space: TupleSpace, start: int, stop: int) -> None:
        assert list(space.between(start, stop)) == list(space)[max(start, 0) : max(stop, 0)]

    def test_families_do_not_mix(self) -> None:
        four, six = AddressSet.parse("10.0.0.1"), AddressSet.parse("::1")
        with pytest.raises(BadConfig, match="destinations"):
            TupleSpace(sources=four, destinations=six, destination_ports=ALL_PORTS)
        space = TupleSpace(sources=four, destinations=four, destination_ports=ALL_PORTS)
        other = TupleSpace(sources=six, destinations=six, destination_ports=ALL_PORTS)
        for operation in (space.subtract, space.intersect):
            with pytest.raises(BadConfig, match="IPv6 and IPv4"):
                operation(other)
        assert tuple_of("[::1]:1 -> [::1]:1") not in space

    def test_protocols_do_not_mix(self) -> None:
        name = tuple_of("10.0.0.1:1 -> 10.0.0.2:2")
        tcp, udp = TupleSpace.of(name), TupleSpace.of(name, Protocol.UDP)
        with pytest.raises(BadConfig, match="protocol: 'udp'"):
            tcp.intersect(udp)
        assert udp.subtract(name).size == 0

    def test_spaces_are_disjoint(self) -> None:
        space = TupleSpace.of(tuple_of("10.0.0.1:1 -> 10.0.0.2:2"))
        with pytest.raises(BadConfig, match="no tuple may be in two"):
            TupleSpaces(parts=(space, space))

    def test_sets_hold_nothing_but_runs(self) -> None:
        assert not hasattr(AddressSet.whole(6), "__dict__")
        assert issubclass(PortSet, RangeSet)
