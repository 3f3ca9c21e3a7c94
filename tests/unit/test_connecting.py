"""Which connections are made for a process that may make none. That it gets them: tests/netns/test_confinement.py."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from fourtuple.confinement.connecting import Addresses, packed


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

    def read() -> list[str]:
        nonlocal reads
        reads += 1
        return targets

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
