"""Entries for the connection tracking table of a lab's host: as many of others' connections as a test wants there.

net.netfilter.nf_conntrack_max is the whole host's, so a test fills the table of its own namespace instead of lowering
the bound. Needs root, and connection tracking on in that namespace.
"""

from __future__ import annotations

import itertools
import socket
import struct

from fourtuple.host.namespace import inside_network_of
from fourtuple.lab import LabHost

NETLINK_NETFILTER = 12
"""Python 3.11 does not name it (include/uapi/linux/netlink.h)."""


def fill_table(host: LabHost, entries: int) -> None:
    """Put other hosts' connections into the table, as conntrackd does when it takes over for another box."""
    netlink = inside_network_of(
        f"proc/{host.pid}", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    )
    with netlink:
        messages = (entry(number) for number in range(entries))
        while batch := b"".join(itertools.islice(messages, 400)):
            netlink.send(batch)


def entry(number: int) -> bytes:
    """IPCTNL_MSG_CT_NEW for an established, assured TCP connection between addresses of RFC 2544."""
    there = struct.pack(">I", 0xC613_0000 + number // 60_000)
    port, service = struct.pack(">H", 1_024 + number % 60_000), struct.pack(">H", 443)
    here = socket.inet_aton("198.18.0.1")
    body = (
        struct.pack("=BBH", socket.AF_INET, 0, 0)
        + flow(1, here, there, port, service)
        + flow(2, there, here, service, port)
        + attribute(3, struct.pack(">I", 0b1110))  # IPS_SEEN_REPLY, IPS_ASSURED, IPS_CONFIRMED
        + attribute(4, attribute(1, attribute(1, b"\x03")))  # TCP_CONNTRACK_ESTABLISHED
        + attribute(7, struct.pack(">I", 86_400))
    )
    create_new = 0x1 | 0x400 | 0x200
    return struct.pack("=IHHII", 16 + len(body), 1 << 8, create_new, 0, 0) + body


def flow(kind: int, source: bytes, destination: bytes, source_port: bytes, destination_port: bytes) -> bytes:
    """CTA_TUPLE_ORIG (1) or CTA_TUPLE_REPLY (2)."""
    addresses = attribute(1, attribute(1, source) + attribute(2, destination))
    protocol = attribute(1, b"\x06") + attribute(2, source_port) + attribute(3, destination_port)
    return attribute(kind, addresses + attribute(2, protocol))


def attribute(kind: int, body: bytes) -> bytes:
    """A netlink attribute; ctnetlink does not ask nested ones to say so."""
    return struct.pack("=HH", 4 + len(body), kind) + body + bytes(-len(body) % 4)
