"""The socket at a service's target: made before it starts, looked for while it starts, removed when it has ended.

Decides what a socket file that is in the way means, and how one sees that somebody listens without being a client:
sock_diag(7) is asked, since a connection to try with is one that some services serve and then end.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

from fourtuple.errors import BadConfig
from fourtuple.host.netlink import SOCK_DIAG, ask, attributes, dump
from fourtuple.services import Delivery
from fourtuple.templates import Place

_DIAG_BY_FAMILY = 20
_LISTEN = 10
_INET_REQUEST = struct.Struct("=BBBBI2s2s16s16sIII")
_UNIX_REQUEST = struct.Struct("=BBHIIIII")
_UNIX_HEADER_BYTES = 16
_SHOW_NAME, _SHOW_VFS = 1, 2
_NAME, _VFS = 0, 1
_NO_COOKIE = 2**32 - 1


def bound(place: Place, delivery: Delivery, *, mode: int, backlog: int, owner: tuple[int, int] | None) -> socket.socket:
    """A socket at `place` that listens, or for a handoff takes datagrams. OSError; a file that nobody is behind is
    replaced."""
    if place.path:
        kind = socket.SOCK_DGRAM if delivery is Delivery.HANDOFF else socket.SOCK_STREAM
        made = socket.socket(socket.AF_UNIX, kind)
    elif place.address is None or delivery is Delivery.HANDOFF:
        raise BadConfig("target", "a handoff goes to a unix socket")
    else:
        made = socket.socket(socket.AF_INET if place.address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        if not place.path:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((str(place.address), place.port))
        elif place.path.startswith("@"):
            made.bind("\0" + place.path[1:])
        else:
            # The file gets the mode of the socket less the umask (unix_bind_bsd), before anybody can connect to it.
            os.fchmod(made.fileno(), mode if owner is None else 0o600)
            clear(place)
            made.bind(place.path)
            if owner is not None and owner != (os.geteuid(), os.getegid()):
                os.chown(place.path, *owner, follow_symlinks=False)
            Path(place.path).chmod(mode)
        if made.type == socket.SOCK_STREAM:
            made.listen(backlog)
    except BaseException:
        made.close()
        raise
    return made


def clear(place: Place) -> None:
    """Remove a socket file that nobody is behind. OSError (EADDRINUSE) if somebody is, or it is no socket."""
    if not place.path or place.path.startswith("@"):
        return
    path = Path(place.path)
    if not os.path.lexists(path):
        return
    if not path.is_socket() or not _is_stale(place.path):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    path.unlink(missing_ok=True)


def remove(place: Place, file: tuple[int, int] | None) -> None:
    """After the end of a service: the file that was bound, or whatever socket file nobody is behind any more."""
    with suppress(OSError):
        if place.path and file is not None and identity(place.path) == file:
            Path(place.path).unlink()
        else:
            clear(place)


def identity(path: str) -> tuple[int, int] | None:
    """What tells this file from another that takes its place."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def is_there(place: Place, delivery: Delivery) -> bool:
    """Whether somebody listens at `place`, or for a handoff takes datagrams there. Nobody notices the question."""
    if not place.path:
        return _tcp_listens(place)
    if delivery is Delivery.HANDOFF and _connects(place.path, socket.SOCK_DGRAM):
        return True
    if not place.path.startswith("@"):
        # The type is compared before anything else (unix_find_bsd), so that this disturbs nobody.
        found = _answer(place.path, socket.SOCK_SEQPACKET)
        if found not in (errno.EPROTOTYPE, 0):
            return False
    try:
        return _unix_listens(place.path)
    except OSError:
        return _connects(place.path, socket.SOCK_STREAM)


def _tcp_listens(place: Place) -> bool:
    assert place.address is not None
    family = socket.AF_INET if place.address.version == 4 else socket.AF_INET6
    local = place.address.packed.ljust(16, b"\0")
    request = _INET_REQUEST.pack(
        *(family, socket.IPPROTO_TCP, 0, 0, 1 << _LISTEN),
        *(place.port.to_bytes(2, "big"), bytes(2), local, bytes(16), 0, _NO_COOKIE, _NO_COOKIE),
    )
    try:
        # Not a dump: the kernel looks up who would get a SYN to this address (inet_diag_find_one_icsk).
        answer = ask(SOCK_DIAG, _DIAG_BY_FAMILY, request)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(0.2)
            return probe.connect_ex((str(place.address), place.port)) == 0
    return len(answer) > 1 and answer[1] == _LISTEN


def _unix_listens(path: str) -> bool:
    if path.startswith("@"):
        wanted, show = b"\0" + path[1:].encode(), _SHOW_NAME
    else:
        found = Path(path).stat()
        # Not by device as well: what stat() says of it differs from the superblock's on overlayfs.
        wanted, show = struct.pack("=I", found.st_ino & 0xFFFF_FFFF), _SHOW_VFS
    request = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, 1 << _LISTEN, 0, show, _NO_COOKIE, _NO_COOKIE)
    for _, data, start, end in dump(SOCK_DIAG, _DIAG_BY_FAMILY, request):
        held = attributes(data, start + _UNIX_HEADER_BYTES, end)
        if (held.get(_NAME) if show == _SHOW_NAME else held.get(_VFS, b"")[:4]) == wanted:
            return True
    return False


def _is_stale(path: str) -> bool:
    # A listener of another type answers EPROTOTYPE, which is an answer.
    return _answer(path, socket.SOCK_DGRAM) == errno.ECONNREFUSED


def _connects(path: str, kind: int) -> bool:
    return _answer(path, kind) == 0


def _answer(path: str, kind: int) -> int:
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex("\0" + path[1:] if path.startswith("@") else path)
