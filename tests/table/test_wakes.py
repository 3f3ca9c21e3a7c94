"""Who may wake a service: lists first, then what its source has used, then what all have."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from fourtuple.supervisor.wakes import WakeRules, Wakes, source_of


def networks(*texts: str) -> tuple:  # type: ignore[type-arg]
    return tuple(ip_network(text) for text in texts)


@pytest.mark.parametrize(
    ("allow", "deny", "peer", "why"),
    [
        ((), (), "192.0.2.1", ""),
        ((), ("192.0.2.0/24",), "192.0.2.1", "denied"),
        ((), ("192.0.2.0/24",), "192.0.3.1", ""),
        (("192.0.2.0/24",), (), "192.0.2.1", ""),
        (("192.0.2.0/24",), (), "192.0.3.1", "not allowed"),
        (("192.0.2.0/24",), ("192.0.2.1/32",), "192.0.2.1", "denied"),
        (("192.0.2.0/24",), (), "::ffff:192.0.2.1", ""),
        ((), ("192.0.2.0/24",), "::ffff:192.0.2.1", "denied"),
        (("2001:db8::/32",), (), "2001:db8::1", ""),
        (("2001:db8::/32",), (), "192.0.2.1", "not allowed"),
        (("192.0.2.0/24",), (), None, "unknown"),
        ((), (), None, ""),
    ],
)
def test_lists(allow: tuple[str, ...], deny: tuple[str, ...], peer: str | None, why: str) -> None:
    wakes = Wakes(WakeRules(allow=networks(*allow), deny=networks(*deny)))
    assert wakes.refusal(ip_address(peer) if peer else None, 0.0) == why


def test_a_source_has_its_burst_and_then_its_rate_and_no_other_pays_for_it() -> None:
    wakes = Wakes(WakeRules(per_source_per_minute=6))
    one, other = ip_address("192.0.2.1"), ip_address("192.0.2.2")
    assert [wakes.refusal(one, 0.0) for _ in range(8)] == [""] * 6 + ["too many from its source"] * 2
    assert wakes.refusal(other, 0.0) == ""
    assert [wakes.refusal(one, 10.0), wakes.refusal(one, 10.0)] == ["", "too many from its source"]
    assert [wakes.refusal(one, 1e6) for _ in range(7)] == [""] * 6 + ["too many from its source"]


def test_all_addresses_of_a_64_are_one_source() -> None:
    wakes = Wakes(WakeRules(per_source_per_minute=1))
    assert wakes.refusal(ip_address("2001:db8::1"), 0.0) == ""
    assert wakes.refusal(ip_address("2001:db8::ffff:0:1"), 0.0) == "too many from its source"
    assert wakes.refusal(ip_address("2001:db8:0:1::1"), 0.0) == ""
    assert str(source_of(ip_address("2001:db8::1"))) == "2001:db8::/64"


def test_who_is_refused_for_all_has_not_used_what_is_its_own() -> None:
    wakes = Wakes(WakeRules(per_minute=1, per_source_per_minute=1))
    one, other = ip_address("192.0.2.1"), ip_address("192.0.2.2")
    assert wakes.refusal(one, 0.0) == ""
    assert wakes.refusal(other, 0.0) == "too many in all"
    # A minute later there is one more in all, and it is still its own.
    assert wakes.refusal(other, 60.0) == ""


def test_a_clock_that_goes_back_gives_and_takes_nothing() -> None:
    wakes = Wakes(WakeRules(per_minute=2))
    peer = ip_address("192.0.2.1")
    assert [wakes.refusal(peer, at) for at in (100.0, 50.0, 0.0, 100.0)] == [
        "",
        "",
        "too many in all",
        "too many in all",
    ]


def test_a_flood_of_sources_is_not_remembered_without_bound() -> None:
    wakes = Wakes(WakeRules(per_source_per_minute=1))
    for number in range(70_000):
        assert wakes.refusal(ip_address(number), 0.0) == ""
    assert len(wakes._sources) <= 65_536
