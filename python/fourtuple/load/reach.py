"""Which addresses a target means here, from which one this host would go there, and whether that leaves this host.

Decides what counts as one's own target: an address of this host, or any in a network namespace with no way out, such
as a lab's. Knows nothing of load. Asks the resolver and the routing table; sends no packet to the target.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from ipaddress import ip_address
from itertools import islice

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from fourtuple.errors import BadConfig
from fourtuple.facts import Host
from fourtuple.load.scenario import Target
from fourtuple.tuples import AddressSet, IPAddress

_RTN_LOCAL = 2
"""linux/rtnetlink.h."""
_MOST_ASKED = 1_024
_OUTSIDE = ("192.0.2.1", "2001:db8::1")
"""Of the ranges for documentation (RFC 5737, RFC 3849): only a default route leads there."""


def resolve(target: Target) -> Target:
    """The target with its addresses; a name means all of its addresses of one family, IPv4 first."""
    if target.addresses is not None:
        return target
    try:
        found = socket.getaddrinfo(target.host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BadConfig("URL", f"the name {target.host!r} cannot be resolved: {error}") from None
    addresses = {ip_address(row[4][0]) for row in found}
    version = min(address.version for address in addresses)
    return replace(target, addresses=AddressSet.of(*(one for one in addresses if one.version == version)))


def source_for(addresses: AddressSet) -> AddressSet:
    """The source address that this host's routes choose for the first of these."""
    first = next(iter(addresses))
    family = socket.AF_INET6 if first.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(first), 9))  # of a datagram socket: only the route is looked up
        except OSError as error:
            raise BadConfig("URL", f"there is no way to {first} from here: {error.strerror}") from None
        return AddressSet.of(ip_address(probe.getsockname()[0]))


def require_own(addresses: AddressSet, host: Host) -> None:
    """BadConfig unless every address is this host's, or nothing leads out of this network namespace."""
    with IPRoute() as routes:
        enclosed = host.isolation.initial_network_namespace is False and not any(
            _route_kind(routes, ip_address(text)) is not None for text in _OUTSIDE
        )
        if enclosed:
            return
        asked = list(islice(addresses, _MOST_ASKED))
        foreign = next((one for one in asked if _route_kind(routes, one) != _RTN_LOCAL), None)
    if foreign is not None or len(asked) < len(addresses):
        named = f"{foreign} is not an address of this host" if foreign is not None else "that is a great many addresses"
        raise BadConfig("URL", f"{named}; give --i-own-this-target if you may put load on it")


def _route_kind(routes: IPRoute, address: IPAddress) -> int | None:
    """The type of the route to an address; None if there is none."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        found = routes.route("get", dst=str(address), family=family)
    except NetlinkError:
        return None
    return next((int(message["type"]) for message in found), None)
