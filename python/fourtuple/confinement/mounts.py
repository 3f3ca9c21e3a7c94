"""A private mount namespace: a root that holds the allowed folders and nothing else.

Decides what is seen where. It is what bounds connect() by path where Landlock does not (before ABI 9): what is not
there has no path, for system calls and for io_uring alike. Needs CAP_SYS_ADMIN, or else a user namespace of its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from fourtuple.confinement.kernel import MACHINE, MOUNT_SETATTR, MOVE_MOUNT, OPEN_TREE, PIVOT_ROOT, call, checked, libc
from fourtuple.confinement.model import Confinement
from fourtuple.confinement.namespaces import NEW_MOUNTS, unshare

# include/uapi/linux/mount.h, fcntl.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE, _MS_MOVE = 2, 4, 8, 1 << 14, 1 << 18, 1 << 13
_MNT_DETACH = 2
_OPEN_TREE_CLONE = 1
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_MOVE_EMPTY_PATH = 4
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
_BUILT_AT = ("/tmp", "/run", "/var", "/usr", "/dev")
"""Covered, in our own namespace alone."""
_MOST_LINKS = 40
"""As the kernel's MAXSYMLINKS."""


class _Shown(Struct, frozen=True, kw_only=True):
    """A folder or file of the view."""

    real: str
    """Without links."""
    links: tuple[tuple[str, str], ...]
    """Links on the way to it, and what they say."""
    writable: bool
    is_folder: bool
    tree: int


def apply(confinement: Confinement) -> str:
    """Have nothing but the allowed folders; says what there is. OSError: what is seen has not changed."""
    wanted = dict(_wanted(confinement))
    if "/" in wanted:
        raise OSError(errno.EINVAL, "a template's folder is /, which is everything")
    if PIVOT_ROOT is None:
        raise OSError(errno.ENOSYS, f"the number of pivot_root() is not known for {MACHINE}")
    by = unshare(NEW_MOUNTS, confinement)
    # Nothing that happens here is seen outside, and nothing outside gets in.
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    shown: list[_Shown] = []
    try:
        for path, writable in wanted.items():
            if (one := _cloned(path, writable)) is not None:
                shown.append(one)
        _enter(sorted(shown, key=lambda one: one.real))
    finally:
        for one in shown:
            os.close(one.tree)
    absent = len(wanted) - len(shown)
    return f"{by}: {len(shown)} folders and files are all there is" + (f"; {absent} were not there" if absent else "")


def _wanted(confinement: Confinement) -> Iterator[tuple[str, bool]]:
    """What is seen, and whether it may be written there; the last word about a path counts."""
    for path in confinement.sockets | confinement.read:
        # connect() to a socket needs no more (sb_permission() looks at files, folders and links).
        yield path, False
    for path in confinement.write:
        yield path, True
    if confinement.append is not None:
        yield confinement.append, True


def _cloned(path: str, writable: bool) -> _Shown | None:
    """With a copy of what is mounted at `path` and below, not to be seen anywhere yet; None if there is nothing."""
    try:
        tree = call(OPEN_TREE, _AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    try:
        # Libraries are mapped for execution, so that not everything can be NOEXEC; execve() is refused by others.
        _restrict(tree, _ATTR_NOSUID | _ATTR_NODEV | (_ATTR_NOEXEC if writable else _ATTR_RDONLY))
        real, links = _resolved(path)
        is_folder = stat.S_ISDIR(os.fstat(tree).st_mode)
    except BaseException:
        os.close(tree)
        raise
    return _Shown(real=real, links=links, writable=writable, is_folder=is_folder, tree=tree)


def _resolved(path: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """A path without links, and those that it went through."""
    links: list[tuple[str, str]] = []
    done, left = "/", [part for part in path.split("/") if part]
    while left:
        step = os.path.normpath(f"{done}/{left.pop(0)}")
        if not Path(step).is_symlink():
            done = step
            continue
        if len(links) == _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        text = str(Path(step).readlink())
        links.append((step, text))
        left = [part for part in text.split("/") if part and part != "."] + left
        done = "/" if text.startswith("/") else done
    return done, tuple(links)


def _enter(shown: list[_Shown]) -> None:
    """Build the view where nobody sees it, and make it the root."""
    at = next(path for path in _BUILT_AT if Path(path).is_dir())
    _mount("fourtuple", at, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "mode=755,size=4m")
    try:
        for one in shown:
            for link, text in one.links:
                if not os.path.lexists(at + link):
                    Path(at + link).parent.mkdir(parents=True, exist_ok=True)
                    Path(at + link).symlink_to(text)
            place = Path(at + one.real)
            if one.is_folder:
                place.mkdir(parents=True, exist_ok=True)
            elif not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            call(MOVE_MOUNT, one.tree, b"", _AT_FDCWD, os.fsencode(place), _MOVE_EMPTY_PATH)
        os.chdir(at)
        try:
            call(PIVOT_ROOT, b".", b".")
        except OSError:
            # The root is the rootfs, from which nobody pivots (pivot_root(2)); covered, as switch_root(8) does.
            _mount(".", "/", None, _MS_MOVE)
            os.chroot(".")
        else:
            # The old root lies on top of the new one now.
            checked(libc.umount2(b".", _MNT_DETACH))
    except BaseException:
        os.chdir("/")
        libc.umount2(os.fsencode(at), _MNT_DETACH)
        raise
    os.chdir("/")
    _restrict_root()


def _restrict_root() -> None:
    given = (ctypes.c_uint64 * 4)(_ATTR_RDONLY, 0, 0, 0)
    call(MOUNT_SETATTR, _AT_FDCWD, b"/", 0, given, ctypes.sizeof(given))


def _restrict(tree: int, attributes: int) -> None:
    given = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    call(MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, given, ctypes.sizeof(given))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    checked(libc.mount(*texts, ctypes.c_ulong(flags), None if data is None else data.encode()))
