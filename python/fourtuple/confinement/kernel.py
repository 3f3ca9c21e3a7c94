"""System calls that Python does not have, and their numbers. Decides nothing."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

MACHINE = os.uname().machine
# From 424 on numbers are the same on every machine (include/uapi/asm-generic/unistd.h).
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(MACHINE)
SECCOMP = {"x86_64": 317, "aarch64": 277}.get(MACHINE)
CAPSET = {"x86_64": 126, "aarch64": 91}.get(MACHINE)


def call(number: int | None, *arguments: object) -> int:
    """A system call by its number; OSError where it fails, ENOSYS for a machine that it is not known of."""
    if number is None:
        raise OSError(38, f"its number is not known for {MACHINE}")
    # An int would be passed as an int, and half a register could hold anything.
    return checked(libc.syscall(ctypes.c_long(number), *map(_register, arguments)))


def prctl(option: int, *arguments: int) -> int:
    """prctl(2), which wants what it does not use to be zero."""
    four = (*arguments, 0, 0, 0, 0)[:4]
    return checked(libc.prctl(option, *(ctypes.c_ulong(argument) for argument in four)))


def checked(answer: int) -> int:
    """`answer`, unless it says that errno has the reason."""
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return answer


def _register(argument: object) -> object:
    return ctypes.c_long(argument) if isinstance(argument, int) else argument
