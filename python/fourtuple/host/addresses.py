"""Local addresses, and the local routes that make each address of a prefix bindable (AnyIP, catalogue A17).

Decides which routes count as addresses. Knows no socket.
"""

from __future__ import annotations

import socket
import struct
import sys
from contextlib import suppress
from ipaddress import ip_address

from fourtuple.facts import Address
from fourtuple.host.netlink import ROUTE, attributes, dump

MOST_ADDRESSES = 4_096
_MOST_MESSAGES = 100_000
_GET_ADDRESS, _GET_ROUTE = 22, 26
_ADDRESS_MESSAGE = struct.Struct("=BBBBI")
_ROUTE_MESSAGE = struct.Struct("=BBBBBBBBI")
_LOCAL_TABLE, _LOCAL_TYPE = 255, 2
_BYTES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}


def read_addresses() -> tuple[tuple[Address, ...], bool]:
    """The addresses of both families, and whether they are all; OSError where netlink is refused."""
    names = dict(socket.if_nameindex())
    own, complete = _own(names)
    known = {address.address for address in own}
    routes, routes_complete = _local_routes(names)
    bits = {4: 32, 6: 128}
    # Every host has 127.0.0.0/8, which widens nothing beyond itself; a route to one own address is that address again.
    any_ip = [
        route
        for route in routes
        if not ip_address(route.address).is_loopback
        and (route.prefix_length < bits[ip_address(route.address).version] or route.address not in known)
    ]
    found = (*own, *any_ip)
    return found[:MOST_ADDRESSES], complete and routes_complete and len(found) <= MOST_ADDRESSES


def _own(names: dict[int, str]) -> tuple[list[Address], bool]:
    found: list[Address] = []
    body = _ADDRESS_MESSAGE.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    for count, (_, data, start, end) in enumerate(dump(ROUTE, _GET_ADDRESS, body)):
        if count >= _MOST_MESSAGES:
            return found, False
        if end - start < _ADDRESS_MESSAGE.size:
            continue
        family, length, _, _, index = _ADDRESS_MESSAGE.unpack_from(data, start)
        values = attributes(data, start + _ADDRESS_MESSAGE.size, end)
        # IFA_LOCAL (2) is the own address; of a point-to-point link IFA_ADDRESS (1) is the peer's. IPv6 sends only the
        # latter.
        packed = values.get(2) or values.get(1)
        if packed is not None and len(packed) == _BYTES.get(family):
            found.append(Address(interface=names.get(index, str(index)), address=_text(packed), prefix_length=length))
    return found, True


def _local_routes(names: dict[int, str]) -> tuple[list[Address], bool]:
    found: list[Address] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        body = _ROUTE_MESSAGE.pack(family, 0, 0, 0, _LOCAL_TABLE, 0, 0, _LOCAL_TYPE, 0)
        # A namespace whose loopback was never up has no local table yet, and answers ENOENT (inet_dump_fib).
        with suppress(FileNotFoundError):
            for count, (_, data, start, end) in enumerate(dump(ROUTE, _GET_ROUTE, body)):
                if count >= _MOST_MESSAGES:
                    return found, False
                if (route := _local_route(names, family, data, start, end)) is not None:
                    found.append(route)
    return found, True


def _local_route(names: dict[int, str], family: int, data: bytes, start: int, end: int) -> Address | None:
    if end - start < _ROUTE_MESSAGE.size:
        return None
    shown, length, _, _, table, _, _, kind, _ = _ROUTE_MESSAGE.unpack_from(data, start)
    if (shown, table, kind) != (family, _LOCAL_TABLE, _LOCAL_TYPE):
        return None
    values = attributes(data, start + _ROUTE_MESSAGE.size, end)
    # RTA_DST (1), absent for a default route; RTA_OIF (4).
    packed = values.get(1, bytes(_BYTES[family]))
    if len(packed) != _BYTES[family]:
        return None
    index = int.from_bytes(values.get(4, b""), sys.byteorder)
    return Address(interface=names.get(index, str(index)), address=_text(packed), prefix_length=length, any_ip=True)


def _text(packed: bytes) -> str:
    return str(ip_address(packed))
