"""SourcePool as pure policy: no tuple twice, none lost, the roomiest address first, whatever comes back when."""

from __future__ import annotations

import gc
from collections import Counter
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourtuple.errors import BadConfig
from fourtuple.sources import Lease, Mechanism, SourcePool, Usage, choose_mechanism
from fourtuple.tuples import AddressSet, Endpoint, PortSet, Protocol

HERE = Endpoint.parse("192.0.2.1:80")
THERE = Endpoint.parse("192.0.2.2:80")


def taken(pool: SourcePool, destination: Endpoint = HERE, now: float = 0.0) -> Lease:
    lease = pool.take(destination, now)
    assert lease is not None
    return lease


def name(lease: Lease) -> tuple[str, int]:
    return (lease.address, lease.port)


def test_every_port_of_every_address_serves_every_destination() -> None:
    pool = SourcePool("10.0.0.1-10.0.0.3", "1000-1004,2000")
    for destination in (HERE, THERE):
        held = [taken(pool, destination) for _ in range(18)]
        assert len(set(map(name, held))) == 18
        assert {lease.port for lease in held} == set(pool.ports)
        assert pool.take(destination, 0.0) is None
        for lease in held:
            assert lease.destination == destination
            lease.release()
    assert pool.usage(HERE, 0.0) == Usage(capacity=18, held=0, resting=0, others=0, waiting=0)


def test_what_overlaps_is_used_once() -> None:
    pool = SourcePool("10.0.0.0/31,10.0.0.1,10.0.0.1-10.0.0.2", "1000-1001,1001,1000-1000")
    held = [taken(pool) for _ in range(3 * 2)]
    assert len(set(map(name, held))) == 6
    assert pool.take(HERE, 0.0) is None


def test_the_address_with_most_room_comes_first() -> None:
    pool = SourcePool("10.0.0.0/29", "1000-1099")
    held = [taken(pool) for _ in range(400)]
    assert set(Counter(lease.address for lease in held).values()) == {50}
    for lease in held:
        if lease.address == "10.0.0.3":
            lease.release()
    assert {taken(pool).address for _ in range(10)} == {"10.0.0.3"}


@pytest.mark.parametrize("sources", ["fd00::/64", "10.0.0.0/8"])
def test_a_large_prefix_costs_what_is_used_of_it(sources: str) -> None:
    pool = SourcePool(sources, "1000-1001", spread=4)
    destination = HERE if "." in sources else Endpoint.parse("[2001:db8::1]:80")
    held = [taken(pool, destination) for _ in range(8)]
    assert len({lease.address for lease in held}) == 4
    assert taken(pool, destination).address not in {lease.address for lease in held}, "further ones when these are full"


def test_few_connections_to_many_destinations_come_from_many_addresses() -> None:
    pool = SourcePool("10.0.0.0/24", "1000-1999", randomness=Random(5))
    held = [taken(pool, Endpoint.parse(f"192.0.2.{number}:80")) for number in range(200)]
    assert len({lease.address for lease in held}) > 100
    assert len({lease.port for lease in held}) > 150, "and from ports that are not to be guessed (RFC 6056)"


def test_what_was_given_back_longest_ago_comes_first() -> None:
    pool = SourcePool("10.0.0.1", "1000-1299")
    held = [taken(pool) for _ in range(300)]
    for _ in range(3):  # more often than the queue is long, so that it is shortened in between
        keep, *others = held
        order = [lease.port for lease in others]
        for lease in others:
            lease.release()
            lease.release()
        held = [keep, *(taken(pool) for _ in others)]
        assert [lease.port for lease in held[1:]] == order


def test_time_wait_rests_and_what_others_have_is_left_alone() -> None:
    pool = SourcePool("10.0.0.1", "1000-1002")
    resting, other, ours = (taken(pool) for _ in range(3))
    resting.release(60.0)
    other.refused(1.0)
    assert pool.usage(HERE, 0.0) == Usage(capacity=3, held=1, resting=1, others=1, waiting=0)
    assert pool.usage(HERE, 0.0).free == 0
    assert pool.take(HERE, 0.5) is None
    assert pool.due() == 1.0
    error = pool.exhausted(HERE, 0.5)
    assert (error.limit, error.have, error.need) == ("four-tuple", 3, 4)
    assert "10.0.0.1 ports 1000-1002 to 192.0.2.1:80 (1 by this pool, 1 in TIME_WAIT, 1 by others)" in str(error)
    again = taken(pool, now=1.0)
    assert again.port == other.port
    assert pool.due() == 60.0
    assert taken(pool, now=60.0).port == resting.port
    assert pool.due() is None
    ours.release()


def test_who_waits_is_woken_in_line() -> None:
    pool = SourcePool("10.0.0.1", "1000-1001")
    first, second = taken(pool), taken(pool)
    woken: list[str] = []

    def waiter(who: str, hears: bool = True) -> object:
        def wake() -> bool:
            woken.append(who)
            return hears

        assert pool.take(HERE, 0.0, wake=wake) is None
        return wake

    waiter("gone", hears=False)
    waiter("a")
    b = waiter("b")
    waiter("c")
    assert pool.usage(HERE, 0.0).waiting == 4
    first.release()
    assert woken == ["gone", "a"]
    pool.give_up(HERE, b)  # type: ignore[arg-type]
    second.release(5.0)
    assert woken == ["gone", "a", "c"], "c looks again, and learns when something is due"
    pool.give_up(HERE, b)  # type: ignore[arg-type]
    pool.give_up(THERE, b)  # type: ignore[arg-type]


def test_a_lease_that_is_dropped_is_given_back_and_nothing_is_remembered() -> None:
    pool = SourcePool("10.0.0.1", "1000")
    for number in range(1_000):
        assert pool.take(Endpoint.parse(f"192.0.{number // 250}.{number % 250 + 1}:80"), 0.0) is not None
    gc.collect()
    pool.usage(HERE, 0.0)
    assert not pool._towards
    assert not pool._returned


def test_protocols_have_spaces_of_their_own() -> None:
    pool = SourcePool("10.0.0.1", "1000")
    tcp, udp = taken(pool), pool.take(HERE, 0.0, protocol=Protocol.UDP)
    assert udp is not None
    assert name(tcp) == name(udp)


def test_shares_are_disjoint_and_together_everything() -> None:
    pool = SourcePool("10.0.0.1", "1000-1009,2000", spread=7, patience_s=3)
    shares = [pool.share(index, of=3) for index in range(3)]
    assert sorted(port for share in shares for port in share.ports) == sorted(pool.ports)
    assert {share.patience_s for share in shares} == {3}
    assert {share.sources for share in shares} == {pool.sources}


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: SourcePool("", "1000"), "addresses"),
        (lambda: SourcePool("10.0.0.1,", "1000"), "addresses"),
        (lambda: SourcePool(AddressSet(version=4), "1000"), "sources"),
        (lambda: SourcePool("10.0.0.300", "1000"), "addresses"),
        (lambda: SourcePool("10.0.0.1,fd00::1", "1000"), "addresses"),
        (lambda: SourcePool("10.0.0.1", "0-70000"), "ports"),
        (lambda: SourcePool("10.0.0.1", ""), "ports"),
        (lambda: SourcePool("10.0.0.1", PortSet()), "ports"),
        (lambda: SourcePool("10.0.0.1", "1000", spread=0), "spread"),
        (lambda: SourcePool("10.0.0.1", "1000", patience_s=float("nan")), "patience_s"),
        (lambda: SourcePool("10.0.0.1", "1000", patience_s=-1), "patience_s"),
        (lambda: SourcePool("10.0.0.1", "1000").share(0, of=2), "of"),
        (lambda: SourcePool("10.0.0.1", "1000-1001").share(2, of=2), "index"),
        (lambda: SourcePool("10.0.0.1", "1000").take(Endpoint.parse("[::1]:80"), 0.0), "destination"),
    ],
)
def test_what_cannot_be_used_is_named(make: object, path: str) -> None:
    with pytest.raises(BadConfig) as bad:
        make()  # type: ignore[operator]
    assert bad.value.path == path


@pytest.mark.parametrize(
    ("no_port", "port_range", "known", "wanted", "inside", "outside", "why"),
    [
        (True, True, True, None, Mechanism.SINGLE_PORT, Mechanism.BIND, "names one port"),
        (True, False, True, None, Mechanism.NO_PORT, Mechanism.BIND, "no IP_LOCAL_PORT_RANGE"),
        (True, True, False, None, Mechanism.NO_PORT, Mechanism.BIND, "cannot be read"),
        (False, True, True, None, Mechanism.BIND, Mechanism.BIND, "no IP_BIND_ADDRESS_NO_PORT"),
        (False, False, True, Mechanism.SINGLE_PORT, Mechanism.BIND, Mechanism.BIND, "reserve"),
        (True, False, True, Mechanism.SINGLE_PORT, Mechanism.NO_PORT, Mechanism.BIND, "no IP_LOCAL_PORT_RANGE"),
        (False, False, True, Mechanism.NO_PORT, Mechanism.BIND, Mechanism.BIND, "no IP_BIND_ADDRESS_NO_PORT"),
        (True, True, True, Mechanism.NO_PORT, Mechanism.NO_PORT, Mechanism.NO_PORT, "told to"),
        (True, True, True, Mechanism.BIND, Mechanism.BIND, Mechanism.BIND, "told to"),
    ],
)
def test_the_mechanism_is_the_best_that_the_kernel_has(
    no_port: bool,
    port_range: bool,
    known: bool,
    wanted: Mechanism | None,
    inside: Mechanism,
    outside: Mechanism,
    why: str,
) -> None:
    choice = choose_mechanism(
        bind_address_no_port=no_port, local_port_range=port_range, range_known=known, wanted=wanted
    )
    assert (choice.inside, choice.outside) == (inside, outside)
    assert why in choice.why


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["take", "release", "rest", "refuse", "doubt", "drop", "wait"]), st.integers(0, 50)),
    max_size=200,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(operations=OPERATIONS, ports=st.integers(1, 7), addresses=st.integers(1, 4), spread=st.integers(1, 4))
def test_no_tuple_is_ever_lent_twice_and_none_is_lost(
    operations: list[tuple[str, int]], ports: int, addresses: int, spread: int
) -> None:
    pool = SourcePool(f"10.0.0.1-10.0.0.{addresses}", f"1000-{999 + ports}", spread=spread)
    held: list[tuple[Endpoint, Lease]] = []
    rested: list[tuple[float, Endpoint, tuple[str, int]]] = []
    now = 0.0
    for what, number in operations:
        now += 0.25
        destination = (HERE, THERE)[number % 2]
        if what in ("take", "wait"):
            lease = pool.take(destination, now, wake=(lambda: True) if what == "wait" else None)
            out = [name(one) for to, one in held if to == destination]
            kept = [one for until, to, one in rested if to == destination and until > now]
            if lease is None:
                assert len(out) + len(kept) == ports * addresses, "something was left"
            else:
                assert name(lease) not in out
                assert name(lease) not in kept
                held.append((destination, lease))
        elif held:
            to, lease = held.pop(number % len(held))
            if what == "release":
                lease.release()
            elif what in ("rest", "refuse"):
                rested.append((now + number, to, name(lease)))
                (lease.release if what == "rest" else lease.refused)(now + number)
            elif what == "doubt":
                pool.doubt(lease, lambda: True)
            del lease
        for to in (HERE, THERE):
            usage = pool.usage(to, now)
            assert usage.held == sum(1 for one, _ in held if one == to)
            assert usage.resting + usage.others == sum(1 for until, one, _ in rested if one == to and until > now)
            assert usage.free >= 0
