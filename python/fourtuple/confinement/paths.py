"""What of this machine a plan needs: who a user is, where Python's own files are, whether a folder is still the same.

Decides nothing.
"""

from __future__ import annotations

import grp
import os
import pwd
import sys
from collections.abc import Iterable
from pathlib import Path

from fourtuple.confinement.model import Folder, Identity, Report
from fourtuple.errors import BadConfig

_READ, _ENTERED = 4, 1
"""Of a file's mode, for one class of users."""


def identity(user: str | None, group: str | None = None) -> Identity | None:
    """Who that is, with the user's other groups; numbers are taken, too. None if nobody is named."""
    if user is None:
        if group is not None:
            raise BadConfig("group", "needs a user")
        return None
    try:
        found = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        if not user.isdecimal():
            raise BadConfig("user", f"{user!r} is no user of this machine") from None
        gid = int(user) if group is None else _group(group)
        return Identity(name=user, uid=int(user), gid=gid)
    gid = found.pw_gid if group is None else _group(group)
    others = tuple(sorted(one.gr_gid for one in grp.getgrall() if found.pw_name in one.gr_mem and one.gr_gid != gid))
    return Identity(name=found.pw_name, uid=found.pw_uid, gid=gid, groups=others)


def libraries() -> frozenset[str]:
    """Where Python and this package are read from, by what is imported late: folders, and files of shared objects."""
    named = {str(Path(os.__file__).parent)}
    ours = (Path(sys.prefix), Path(sys.base_prefix))
    # Not the folder that a program was started in, which `python -m` puts there, too.
    named |= {path for path in sys.path if any(Path(path).is_relative_to(prefix) for prefix in ours)}
    named.add(str(Path(__file__).parent.parent))
    # What the loader looks for on behalf of an extension module.
    named |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"}
    return frozenset(path for path in named if Path(path).is_absolute() and _folder(path).inode is not None)


def stays_readable(identity: Identity | None, paths: Iterable[str]) -> bool:
    """Whether the process may still read what lies there once it is who it is to be and has no capability: what is not
    sure to be can only be loaded before."""
    if identity is None:
        uid, groups = os.geteuid(), {os.getegid(), *os.getgroups()}
    else:
        uid, groups = identity.uid, {identity.gid, *identity.groups}

    def allows(path: Path, wanted: int) -> bool:
        found = path.stat()
        shift = 6 if found.st_uid == uid else 3 if found.st_gid in groups else 0
        return found.st_mode >> shift & wanted == wanted

    try:
        real = [Path(path).resolve() for path in paths]
        on_the_way = {parent for path in real for parent in path.parents}
        return all(allows(one, _ENTERED) for one in on_the_way) and all(
            allows(one, _READ | _ENTERED if one.is_dir() else _READ) for one in real
        )
    except OSError:
        return False


def folders(paths: Iterable[str]) -> tuple[Folder, ...]:
    """Which folders these are now."""
    return tuple(_folder(path) for path in sorted(paths))


def moved(report: Report) -> tuple[str, ...]:
    """Folders of sockets that are not those any more that a confined broker was given: made anew, or made at all. Only
    a new broker reaches what is in them. To be asked by who is not confined."""
    return tuple(before.path for before in report.folders if _folder(before.path) != before)


def _folder(path: str) -> Folder:
    try:
        found = Path(path).stat()
    except OSError:
        return Folder(path=path, device=None, inode=None)
    return Folder(path=path, device=found.st_dev, inode=found.st_ino)


def _group(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise BadConfig("group", f"{group!r} is no group of this machine") from None
