"""Whether a connected UDP socket with a given four-tuple exists: the one question of the connected-socket dance.

Decides how the kernel is asked (sock_diag, one socket looked up by name, no dump). Knows no pool. Where sock_diag is
refused, nothing is known of other processes, and the pool's own book is all there is.
"""

from __future__ import annotations

import socket
import struct

from fourtuple.tuples import Endpoint

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY, _REQUEST, _ERROR = 20, 1, 2
_HEADER = struct.Struct("=IHHII")
_QUESTION = struct.Struct("=BBBxI")
_NAME = struct.Struct("!HH16s16s")
_ESTABLISHED = 1
_ANSWER_BYTES = 8_192


def is_connected(family: int, source: Endpoint, destination: Endpoint) -> bool:
    """Whether some UDP socket of this network namespace is connected from `source` to `destination`."""
    # A single look-up takes the ends as the arriving datagram has them, the remote one first (udp_dump_one).
    name = _NAME.pack(destination.port, source.port, destination.address.packed, source.address.packed)
    body = _QUESTION.pack(family, socket.IPPROTO_UDP, 0, 0xFFFFFFFF) + name + struct.pack("=I", 0) + b"\xff" * 8
    message = _HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST, 1, 0) + body
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as asker:
            asker.send(message)
            answer = asker.recv(_ANSWER_BYTES)
    except OSError:
        return False
    if len(answer) < _HEADER.size + 4 + _NAME.size or _HEADER.unpack_from(answer)[1] == _ERROR:
        return False  # ENOENT: nobody has it
    # struct inet_diag_msg: family, state, timer, retransmits, then the name, local end first.
    state = answer[_HEADER.size + 1]
    found = _NAME.unpack_from(answer, _HEADER.size + 4)
    address_bytes = len(source.address.packed)
    return (
        state == _ESTABLISHED
        and (found[0], found[1]) == (source.port, destination.port)
        and (
            found[2][:address_bytes],
            found[3][:address_bytes],
        )
        == (source.address.packed, destination.address.packed)
    )
