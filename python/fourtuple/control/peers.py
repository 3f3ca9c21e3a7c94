"""Who is at the other end of the control socket, and what they may do.

Decides by what the kernel says of the peer (unix(7), SO_PEERCRED and SO_PEERGROUPS: as of its connect()), never by what
it sends. Knows no request.
"""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
import socket
import struct
from collections.abc import Sequence
from enum import Enum

from msgspec import Struct
from msgspec.structs import asdict

from fourtuple.errors import BadConfig

_SO_PEERGROUPS = 59
"""include/uapi/asm-generic/socket.h; since Linux 4.13. Not in Python's socket module."""
_GROUPS_BYTES = 1_024
"""For 256 groups; socket.getsockopt() takes no more."""
GROUP = "group:"


class Role(Enum):
    """What a peer may do: look, or look and change."""

    READER = "reader"
    ADMIN = "admin"


class Caller(Struct, frozen=True, kw_only=True):
    """A peer, as the kernel knows it."""

    pid: int
    uid: int
    groups: frozenset[int]
    """Its own and the supplementary ones."""

    @classmethod
    def of(cls, connection: socket.socket) -> Caller:
        """The process that connected; OSError if it cannot be known."""
        pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            listed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
            groups = struct.unpack(f"{len(listed) // 4}I", listed)
        except OSError as error:
            if error.errno != errno.ERANGE:
                raise
            groups = _groups_of(uid, gid)
        # -1, which is nobody's, stands for who cannot be told in this user namespace.
        return cls(pid=pid, uid=uid & 0xFFFF_FFFF, groups=frozenset((*groups, gid & 0xFFFF_FFFF)))


class Access(Struct, frozen=True, kw_only=True):
    """Who may do what. Root and the broker's own user may do everything."""

    owner: int
    """The user as whom the supervisor runs."""
    reader_users: frozenset[int] = frozenset()
    reader_groups: frozenset[int] = frozenset()
    admin_users: frozenset[int] = frozenset()
    admin_groups: frozenset[int] = frozenset()

    @classmethod
    def named(cls, readers: Sequence[str] = (), admins: Sequence[str] = ()) -> Access:
        """Of users (a name or a number) and groups (`group:` before it), as they are known now; BadConfig if not."""
        reader_users, reader_groups = _resolved("control.readers", readers)
        admin_users, admin_groups = _resolved("control.admins", admins)
        return cls(
            owner=os.geteuid(),
            reader_users=reader_users,
            reader_groups=reader_groups,
            admin_users=admin_users,
            admin_groups=admin_groups,
        )

    def role(self, caller: Caller) -> Role | None:
        """What it may do; None is nothing."""
        if caller.uid in (0, self.owner) or caller.uid in self.admin_users or caller.groups & self.admin_groups:
            return Role.ADMIN
        if caller.uid in self.reader_users or caller.groups & self.reader_groups:
            return Role.READER
        return None

    def dumped(self) -> str:
        """As JSON, for the process of the API."""
        return json.dumps(
            {key: sorted(one) if isinstance(one, frozenset) else one for key, one in asdict(self).items()}
        )

    @classmethod
    def loaded(cls, text: str) -> Access:
        """What `dumped` made."""
        found = json.loads(text)
        owner = int(found.pop("owner"))
        return cls(owner=owner, **{key: frozenset(map(int, one)) for key, one in found.items()})


def _groups_of(uid: int, gid: int) -> tuple[int, ...]:
    """Those that the user database says, for who has more than the kernel can tell here."""
    try:
        return tuple(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
    except KeyError:
        return ()


def _resolved(field: str, names: Sequence[str]) -> tuple[frozenset[int], frozenset[int]]:
    users: set[int] = set()
    groups: set[int] = set()
    for name in names:
        if name.startswith(GROUP):
            groups.add(group_id(name.removeprefix(GROUP), field))
        elif name.isascii() and name.isdigit():
            users.add(int(name))
        else:
            try:
                users.add(pwd.getpwnam(name).pw_uid)
            except KeyError:
                raise BadConfig(field, f"there is no user {name[:64]!r} here") from None
    return frozenset(users), frozenset(groups)


def group_id(name: str, field: str) -> int:
    """A group's number, by its name or as it stands; BadConfig names `field`."""
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise BadConfig(field, f"there is no group {name[:64]!r} here") from None
