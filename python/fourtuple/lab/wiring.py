"""Links, addresses and routes of the namespace that this process is in. The one file that speaks pyroute2.

Decides how an address or a prefix is made local and how it is reached. Knows nothing of processes or of the parent.
Imported inside agents only: the import costs a tenth of a second.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from fourtuple.tuples import IPAddress

IPInterface = IPv4Interface | IPv6Interface
IPNetwork = IPv4Network | IPv6Network

LOOPBACK_INDEX = 1
"""lo is the first link of every network namespace (loopback_net_init)."""
RTN_LOCAL, RT_TABLE_LOCAL, RT_SCOPE_HOST = "local", 255, 254
IFA_F_NODAD = 0x02
FIRST_VETH_INDEX = 1_000
"""Where both ends of a pair have the same index, the kernel takes up to a second to tell IPv6 that the link is up: it
knows a link that depends on another by their indexes (linkwatch_urgent_event). So one end gets a high one."""


def has_ipv6() -> bool:
    """Whether the kernel speaks IPv6 at all (it can be switched off at boot)."""
    return Path("/proc/sys/net/ipv6").is_dir()


def raise_loopback() -> None:
    """Set lo up, which brings 127.0.0.0/8 and ::1, and have no link wait for duplicate address detection."""
    if has_ipv6():
        # A tentative link-local address cannot ask for neighbours (ndisc_solicit): the first second would be lost.
        for scope in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{scope}/accept_dad").write_text("0")
    with _routes("set lo up") as routes:
        routes.link("set", index=LOOPBACK_INDEX, state="up")


def join_by_veth(interface: str, peer_interface: str, peer_pid: int) -> None:
    """Make a veth pair between this namespace and that of `peer_pid`; both ends are down at first."""
    with _routes(f"make the link {interface} to process {peer_pid}") as routes:
        index = FIRST_VETH_INDEX + len(routes.get_links())
        peer = {"ifname": peer_interface, "net_ns_pid": peer_pid}
        routes.link("add", index=index, ifname=interface, kind="veth", peer=peer)


def raise_link(interface: str, addresses: tuple[IPInterface, ...]) -> None:
    """Give a link its addresses and set it up."""
    with _routes(f"set {interface} up") as routes:
        index = _index(routes, interface)
        for address in addresses:
            flags = 0 if address.version == 4 else IFA_F_NODAD
            length = address.network.prefixlen
            routes.addr("add", index=index, address=str(address.ip), prefixlen=length, flags=flags)
        routes.link("set", index=index, state="up")


def add_aliases(addresses: tuple[IPAddress, ...]) -> None:
    """Put each address on lo, one alias each."""
    with _routes("add aliases to lo") as routes:
        for address in addresses:
            length, flags = (32, 0) if address.version == 4 else (128, IFA_F_NODAD)
            routes.addr("add", index=LOOPBACK_INDEX, address=str(address), prefixlen=length, flags=flags)


def add_local_prefix(prefix: IPNetwork) -> None:
    """Make every address of the prefix local with one route (AnyIP, catalogue A17)."""
    with _routes(f"make {prefix} local") as routes:
        routes.route(
            "add",
            dst=str(prefix),
            family=_family(prefix),
            type=RTN_LOCAL,
            table=RT_TABLE_LOCAL,
            scope=RT_SCOPE_HOST,
            oif=LOOPBACK_INDEX,
        )
    if prefix.version == 6:
        # For IPv6 the route alone is not enough: bind() says EADDRNOTAVAIL without this or IPV6_FREEBIND (A17).
        Path("/proc/sys/net/ipv6/ip_nonlocal_bind").write_text("1")


def add_route(prefix: IPNetwork, via: IPAddress) -> None:
    """Reach a prefix through a neighbour."""
    with _routes(f"route {prefix} via {via}") as routes:
        routes.route("add", dst=str(prefix), gateway=str(via), family=_family(prefix))


def interfaces() -> tuple[str, ...]:
    """Names of the links of this namespace."""
    return tuple(name for _, name in socket.if_nameindex())


@contextmanager
def _routes(purpose: str) -> Iterator[IPRoute]:
    """A netlink socket; what the kernel refuses becomes the OSError that it is, saying what was wanted."""
    try:
        with IPRoute() as routes:
            yield routes
    except NetlinkError as error:
        name = errno.errorcode.get(error.code, "?")
        raise OSError(error.code, f"could not {purpose}: {name}") from error


def _index(routes: IPRoute, interface: str) -> int:
    found = routes.link_lookup(ifname=interface)
    if not found:
        raise OSError(errno.ENODEV, f"no link is called {interface}")
    return int(found[0])


def _family(prefix: IPNetwork) -> int:
    return socket.AF_INET if prefix.version == 4 else socket.AF_INET6
