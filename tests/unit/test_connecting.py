"""Which connections are made for a process that may make none. That it gets them: tests/netns/test_confinement.py."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourtuple.confinement.connecting import Addresses, addresses_of, packed
from fourtuple.registry import Registry
from fourtuple.services import Service


def at(host: str, port: int) -> bytes:
    return ip_address(host).packed + port.to_bytes(2, "big")


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("tcp:127.0.0.1:80", at("127.0.0.1", 80)),
        ("tcp:[2001:db8::1]:65535", at("2001:db8::1", 65_535)),
        ("tcp:db.example.com:80", None),
        ("tcp:127.0.0.1:65536", None),
        ("tcp:127.0.0.1:-1", None),
        ("tcp::80", None),
        ("tcp:", None),
        ("", None),
        ("unix:/run/127.0.0.1:80", None),
        ("service:shop", None),
    ],
)
def test_targets(target: str, address: bytes | None) -> None:
    assert packed(target) == address


def test_the_registry_is_read_when_it_has_changed_and_somebody_asks_for_more() -> None:
    targets, version, reads = ["tcp:10.0.0.1:80", "unix:/run/a", "tcp:[::1]:443"], 1, 0

    def read() -> list[frozenset[bytes]]:
        nonlocal reads
        reads += 1
        return [addresses_of(targets)]

    addresses = Addresses(read, lambda: version, lambda: (5432,))
    assert reads == 0
    for _ in range(3):
        assert at("10.0.0.1", 80) in addresses
        assert at("::1", 443) in addresses
        # An IPv4 address is not the IPv6 address that maps it, nor a port another's.
        assert at("::ffff:10.0.0.1", 80) not in addresses
        assert at("10.0.0.1", 81) not in addresses
        assert at("10.0.0.2", 80) not in addresses
    assert reads == 1
    assert at("192.0.2.1", 5432) in addresses
    targets, version = ["tcp:10.0.0.2:80"], 2
    # What was allowed stays so until somebody asks for what was not.
    assert at("10.0.0.1", 80) in addresses
    assert at("10.0.0.2", 80) in addresses
    assert at("10.0.0.1", 80) not in addresses
    assert reads == 2


_HOSTS = st.one_of(
    st.ip_addresses(v=4), st.ip_addresses(v=6), st.sampled_from(list(map(ip_address, ("10.0.0.1", "::1"))))
)
_PLACES = st.tuples(_HOSTS, st.one_of(st.integers(1, 65_535), st.sampled_from((80, 443))))


def text_of(place: tuple[IPv4Address | IPv6Address, int]) -> str:
    host, port = place
    return f"tcp:[{host}]:{port}" if host.version == 6 else f"tcp:{host}:{port}"


@settings(max_examples=50)
@given(there=st.lists(_PLACES, max_size=20), asked=st.lists(_PLACES, max_size=20), has_options=st.booleans())
def test_a_registry_knows_its_addresses(
    there: list[tuple[IPv4Address | IPv6Address, int]],
    asked: list[tuple[IPv4Address | IPv6Address, int]],
    has_options: bool,
) -> None:
    services = [
        Service(
            name=f"{number}.example",
            target=text_of(place),
            patience_ms=7 if has_options else None,
            wide_port=number + 1 if number % 2 else None,
        )
        for number, place in enumerate(there)
    ]
    others = [Service(name="a", target="unix:/a"), Service(name="b", target="tcp:b.example:80")]
    with TemporaryDirectory(prefix="fourtuple-test-") as folder, Registry(Path(folder) / "store") as registry:
        registry.add([*services, *others])
        known = registry.addresses()
        for place in [*there, *asked]:
            assert (at(str(place[0]), place[1]) in known) is (place in there)
        for wrong in (b"", b"\0", at("10.0.0.1", 80)[:-1], at("10.0.0.1", 80) + b"\0", "10.0.0.1", None):
            assert wrong not in known
