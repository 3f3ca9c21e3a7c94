"""Reading and tuning as a process of another network namespace would: sysctl and netlink speak of the caller's own.

Decides whether a process shares our network namespace, what a namespace is called, and enters one: for a reading, in a
short thread, so that this process stays where it is; for tuning, with the thread that asks, so that what interrupts it
interrupts the work. Knows nothing of what is read or changed there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fourtuple.errors import BadConfig, MissingFeature, MissingPrivilege
from fourtuple.host.tree import Tree

NAMED = Path("/run/netns")
"""Where ip-netns(8) keeps the names that it gives."""
_NAME = re.compile(r"[^/\0]{1,255}")
_SO_NETNS_COOKIE = 71
"""Python does not name it (include/uapi/asm-generic/socket.h)."""
_CLONE_NEWNET = 0x4000_0000
_libc = ctypes.CDLL(None, use_errno=True)

Result = TypeVar("Result")


def shares_network(tree: Tree, home: str) -> bool | None:
    """Whether the process has our network namespace; None if that is hidden (it is of another user's process)."""
    theirs = tree.link(f"{home}/ns/net")
    return None if theirs is None else theirs == tree.link("proc/thread-self/ns/net")


def inside_network_of(home: str, read: Callable[[], Result]) -> Result:
    """Run `read` in a thread that has entered the network namespace of the process; OSError if it may not enter."""

    def enter_and_read() -> Result:
        # setns(2) on a network namespace moves the calling thread alone, and the thread ends with this call.
        descriptor = os.open(f"/{home}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(descriptor)
        finally:
            os.close(descriptor)
        return read()

    with ThreadPoolExecutor(max_workers=1) as one_thread:
        return one_thread.submit(enter_and_read).result()


@contextmanager
def inside_network_namespace(name: str) -> Iterator[str]:
    """Have this thread be in a network namespace for a while, by its ip-netns(8) name or by the path of its file.

    Yields what the kernel calls it, which no other namespace of this boot is called, whoever names it how. BadConfig
    where there is none of that name, or where it is the one that we are in: that would be no lab.
    """
    descriptor = _opened(name)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.path.sameopenfile(descriptor, home):
            raise BadConfig("--lab", f"{name!r} is the network namespace that this command runs in: leave out --lab")
        try:
            _enter(descriptor)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise BadConfig("--lab", f"{name!r} is no network namespace; {_WANTED}") from None
            why = f"entering the network namespace {name!r} needs root ({errno.errorcode.get(error.errno or 0, '?')})"
            raise MissingPrivilege(why) from None
        try:
            yield _cookie()
        finally:
            _enter(home)
    finally:
        os.close(home)
        os.close(descriptor)


_WANTED = "a name that ip netns list shows, or a path such as /proc/PID/ns/net, is wanted"


def _opened(name: str) -> int:
    if "/" not in name and (not _NAME.fullmatch(name) or name in (".", "..")):
        raise BadConfig("--lab", f"{name[:40]!r} is no name; {_WANTED}")
    try:
        # A name without a slash is one below NAMED; a path is itself.
        return os.open(NAMED / name if "/" not in name else name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise BadConfig("--lab", f"there is no network namespace {name[:200]!r}; {_WANTED}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MissingPrivilege(f"the network namespace {name[:200]!r} cannot be opened: {reason}") from None


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _cookie() -> str:
    """The kernel's number of the namespace that we are in (net->net_cookie, from 5.14 on): never given twice."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        try:
            (number,) = struct.unpack("=Q", one.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))
        except OSError:
            why = "telling network namespaces apart needs SO_NETNS_COOKIE (Linux 5.14); run tune with ip netns exec"
            raise MissingFeature(why) from None
    return str(number)
