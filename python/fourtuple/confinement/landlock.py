"""Landlock (Documentation/userspace-api/landlock.rst): which files, ports, names and processes are still in reach.

Decides which rights of a kernel's ABI are taken away, and which are given back to what. All of it is taken away that
the kernel knows; an ABI that is newer than this file costs nothing but what it adds.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress

from fourtuple.confinement.kernel import LANDLOCK_ADD_RULE, LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF, call
from fourtuple.confinement.model import Confinement, StepName

NEWEST = 10
"""The newest ABI whose rights stand here."""
# include/uapi/linux/landlock.h
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = (1 << bit for bit in range(4))
TRUNCATE, RESOLVE_UNIX = 1 << 14, 1 << 16
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
"""What a rule for a file, not a folder, may give."""
BIND_TCP, CONNECT_TCP, BIND_UDP, CONNECT_SEND_UDP = (1 << bit for bit in range(4))
SCOPE_ABSTRACT, SCOPE_SIGNAL = 1, 2
TSYNC = 1 << 3
_FILES_BY_ABI = {1: 0x1FFF, 2: 1 << 13, 3: TRUNCATE, 5: 1 << 15, 9: RESOLVE_UNIX}
_PORTS_BY_ABI = {4: BIND_TCP | CONNECT_TCP, 10: BIND_UDP | CONNECT_SEND_UDP}
_PATH_BENEATH, _NET_PORT = 1, 2
_CREATE_VERSION = 1


def abi() -> int:
    """Of this kernel; OSError: ENOSYS if it was built without, EOPNOTSUPP if it was booted without."""
    return call(LANDLOCK_CREATE_RULESET, None, 0, _CREATE_VERSION)


def handled(version: int, confinement: Confinement) -> tuple[int, int, int]:
    """Rights to files and to ports, and scopes, that are taken away."""
    files = sum(rights for since, rights in _FILES_BY_ABI.items() if since <= version)
    ports = sum(rights for since, rights in _PORTS_BY_ABI.items() if since <= version)
    # A scope is all or nothing: where one abstract target is wanted, all abstract names stay.
    scopes = 0 if version < 6 else SCOPE_SIGNAL | (0 if confinement.abstract else SCOPE_ABSTRACT)
    return files, ports, scopes


def rules(confinement: Confinement) -> Iterator[tuple[str, int]]:
    """Which rights to files are given back to what."""
    for path in confinement.read:
        yield path, READ_FILE | READ_DIR
    for path in confinement.write:
        yield path, READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE
    if confinement.append is not None:
        yield confinement.append, WRITE_FILE
    for path in confinement.sockets:
        yield path, RESOLVE_UNIX


def ruleset(confinement: Confinement) -> tuple[int, int]:
    """A ruleset's descriptor, made while paths can still be opened, and the ABI. What is not there gets no rule."""
    version = abi()
    files, ports, scopes = handled(version, confinement)
    attributes = struct.pack("=QQQ", files, ports, scopes)
    size = 8 if version < 4 else 16 if version < 6 else 24
    made = call(LANDLOCK_CREATE_RULESET, attributes, size, 0)
    try:
        for path, rights in rules(confinement):
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                _allow_path(made, path, rights & files)
        if version >= 4:
            given = dict.fromkeys(confinement.bind_ports, BIND_TCP)
            for port in () if confinement.asks else confinement.connect_ports:
                given[port] = given.get(port, 0) | CONNECT_TCP
            for port, rights in given.items():
                call(LANDLOCK_ADD_RULE, made, _NET_PORT, struct.pack("=QQ", rights, port), 0)
    except BaseException:
        os.close(made)
        raise
    return made, version


def restrict(made: int, version: int) -> None:
    """From here on this thread, and what it starts; from ABI 8 on every thread. Closes the ruleset."""
    try:
        call(LANDLOCK_RESTRICT_SELF, made, TSYNC if version >= 8 else 0)
    finally:
        os.close(made)


def summary(version: int, confinement: Confinement) -> str:
    """In a line, what is left."""
    ports = ", ".join(map(str, sorted(() if confinement.asks else confinement.connect_ports))) or "none"
    bound = ", ".join(map(str, sorted(confinement.bind_ports))) or "none"
    written = len(confinement.write) + (confinement.append is not None)
    tcp = f"TCP connect() to ports {ports}; bind() to {bound}" if version >= 4 else "TCP not bounded"
    return f"{len(confinement.read) + written} folders and files, {written} of them written; {tcp}"


def gaps(version: int, confinement: Confinement, applied: frozenset[StepName]) -> tuple[str, ...]:
    """What this ABI leaves open, and no step that was taken before; each says since when it does not."""
    found = []
    isolated = StepName.NETWORK in applied
    if version < 3:
        found.append("truncate() of any file that may be opened otherwise (Landlock 3)")
    if version < 4 and not isolated:
        found.append("TCP ports (Landlock 4, Linux 6.7)")
    if version < 6 and not isolated:
        found.append("abstract unix names (Landlock 6, Linux 6.12)")
    elif confinement.abstract:
        found.append("abstract unix names: a target is one, and Landlock knows all or none")
    if version < 9 and StepName.MOUNTS not in applied:
        found.append("unix sockets by path (Landlock 9, Linux 7.1), for there is no mount view")
    if version < 10 and confinement.uring and not isolated:
        found.append("UDP by io_uring (Landlock 10, Linux 7.2); carrier = epoll leaves no way to it")
    if confinement.uring and not isolated:
        # github.com/landlock-lsm/linux, issues 54 and 41.
        found.append("Multipath TCP and TCP Fast Open by io_uring (net.mptcp.enabled=0, net.ipv4.tcp_fastopen=0)")
    if not isolated:
        # An unbound socket is bound by it (inet_autobind()), which Landlock does not ask about.
        found.append("listening on a port that the kernel chooses, by listen() alone")
    if confinement.connect_ports and not confinement.asks:
        found.append("which hosts are connected to: Landlock knows ports alone")
    return tuple(found)


def _allow_path(made: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= OF_FILES
        if rights:
            # struct landlock_path_beneath_attr is packed.
            call(LANDLOCK_ADD_RULE, made, _PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)
