"""Reading as a process of another network namespace would: sysctl and netlink speak of the caller's own.

Decides whether a process shares our network namespace, and enters its namespace for the time of one reading. Only one
short thread enters, so that this process stays where it is.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fourtuple.host.tree import Tree

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
            if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            os.close(descriptor)
        return read()

    with ThreadPoolExecutor(max_workers=1) as one_thread:
        return one_thread.submit(enter_and_read).result()
