"""Namespaces of one's own: by CAP_SYS_ADMIN, or else within a user namespace.

Decides when a network of one's own is possible: without TCP targets that it connects to itself, listeners or abstract
names of its own, a broker needs none. Its listeners and what they accept stay in the network that they were made in,
and a unix socket is found by its path from any; what is made here leads nowhere, by whatever protocol and whoever asks,
io_uring included.
"""

from __future__ import annotations

import os
from pathlib import Path

from fourtuple.confinement.kernel import checked, libc
from fourtuple.confinement.model import Confinement, NotWanted

# include/uapi/linux/sched.h
NEW_MOUNTS, _NEW_USER, _NEW_NETWORK = 0x0002_0000, 0x1000_0000, 0x4000_0000


def own_network(confinement: Confinement) -> str:
    """Leave the host's network for an empty one. NotWanted if it is needed."""
    if confinement.bind_ports:
        raise NotWanted("this process binds its listeners itself")
    if confinement.connect_ports and not confinement.asks:
        raise NotWanted(f"there are TCP targets, on {len(confinement.connect_ports)} ports")
    if confinement.abstract:
        raise NotWanted("a target is an abstract unix name, which belongs to a network")
    return f"{unshare(_NEW_NETWORK, confinement)}: new sockets are in an empty one, not even with a loopback"


def unshare(kind: int, confinement: Confinement) -> str:
    """unshare(2); says by which right. A user namespace will do where the user stays: it knows nobody else."""
    try:
        checked(libc.unshare(kind))
        return "by CAP_SYS_ADMIN"
    except PermissionError:
        if confinement.identity is not None and confinement.identity.uid != os.geteuid():
            raise
    uid, gid = os.geteuid(), os.getegid()
    checked(libc.unshare(kind | _NEW_USER))
    # user_namespaces(7): without a capability outside, only oneself, and no setgroups().
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path("/proc/self", name).write_text(text)
    return "in a user namespace"
