"""From a filled template to a process: who it is, what it may, and what it has open.

Decides how names become numbers (users, limits, programs) and which environment a service begins with. The steps
between clone() and execve() are Rust's (`crates/py/src/spawn.rs`), and this the only module that calls them.
"""

from __future__ import annotations

import grp
import os
import pwd
import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TypeVar

from msgspec import Struct

from fourtuple._core import spawn as _spawn
from fourtuple.errors import BadConfig
from fourtuple.templates import Command, Output, Socket, Template

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MARK = 10
"""RLIMIT_LOCKS: bounds nothing since Linux 2.4.25 (setrlimit(2)), passes to every descendant whatever it executes or
whose session it joins, and can be read of any process. So its soft limit tells of which start a process comes."""
_MOST_GROUPS = 65_536
_E = TypeVar("_E")


class Birth(Struct, frozen=True, kw_only=True):
    """What the child does on the way to its program; by these names Rust reads it."""

    program: str
    argv: Sequence[str]
    environment: Sequence[str]
    directory: str
    descriptors: Sequence[int]
    """They become 0, 1, 2 and so on; there are no others."""
    user: int | None = None
    group: int | None = None
    groups: Sequence[int] = ()
    umask: int = 0o022
    limits: Sequence[tuple[int, int, int]] = ()
    """Of getrlimit(2): number, soft, hard."""
    nice: int | None = None
    cgroup: int | None = None
    """A cgroup.procs that is open for writing."""
    session: bool = True
    """One of its own; else a process group of its own within ours."""
    no_new_privileges: bool = True
    die_with_parent: bool = True
    private_network: bool = False
    private_tmp: bool = False
    read_only: bool = False
    writable: Sequence[str] = ()


def birth(
    template: Template,
    command: Command,
    *,
    mark: int,
    descriptors: Sequence[int],
    variables: Mapping[str, str],
    cgroup: int | None,
    socket_folder: str | None,
    soft_descriptors: int | None = None,
) -> Birth:
    """Looks up all that can be known before there is a process. BadConfig, by its key, for what is not there.

    `soft_descriptors`: RLIMIT_NOFILE where the template says nothing of it, if this process has raised its own.
    """
    user, group, groups, environment = _identity(command)
    environment |= command.env | dict(variables)
    program = shutil.which(command.argv[0], path=environment["PATH"])
    if program is None:
        raise BadConfig("argv", f"{command.argv[0]}: there is no such program in {environment['PATH']}")
    writable = [*command.writable, *(["/dev/shm"] if os.path.ismount("/dev/shm") else [])]
    if socket_folder is not None and template.socket is Socket.OWN:
        writable.append(socket_folder)
    return Birth(
        program=program,
        argv=command.argv,
        environment=[f"{name}={value}" for name, value in environment.items()],
        directory=command.cwd,
        descriptors=descriptors,
        user=user,
        group=group,
        groups=groups,
        umask=template.umask,
        limits=(_mark(mark), *_limits(template, soft_descriptors)),
        nice=template.nice,
        cgroup=cgroup,
        session=_has_terminal(),
        no_new_privileges=template.no_new_privileges,
        private_network=template.private_network,
        private_tmp=template.private_tmp,
        read_only=template.read_only,
        writable=writable if template.read_only else (),
    )


def spawn(born: Birth) -> tuple[int, int]:
    """Start it; gives pid and pidfd. OSError says which step could not be done.

    The thread waits until the program is executed. The process dies with the thread that calls this.
    """
    try:
        return _spawn(born)
    except OSError as error:
        number, step = error.args
        raise OSError(number, f"cannot {step}: {os.strerror(number)}") from None


def standard(output: Output) -> list[int]:
    """New descriptors for 0, 1 and 2, to be closed after the start."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    if output is Output.NULL:
        return [null, os.dup(null), os.dup(null)]
    try:
        return [null, os.dup(2), os.dup(2)]
    except OSError:
        return [null, os.dup(null), os.dup(null)]


def uid_of(name: str) -> int:
    """By name or number. BadConfig if there is none."""
    return int(name) if name.isascii() and name.isdigit() else _entry("user", pwd.getpwnam, name).pw_uid


def _identity(command: Command) -> tuple[int | None, int | None, Sequence[int], dict[str, str]]:
    environment = {"PATH": PATH}
    if command.user is None and command.group is None:
        return None, None, (), environment
    own = (os.getuid(), os.getgid())
    uid = own[0] if command.user is None else uid_of(command.user)
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        gid, name = own[1], None
    else:
        gid, name = entry.pw_gid, entry.pw_name
        environment |= {"HOME": entry.pw_dir, "USER": name, "LOGNAME": name, "SHELL": entry.pw_shell or "/bin/sh"}
    if command.group is not None:
        numeric = command.group.isascii() and command.group.isdigit()
        gid = int(command.group) if numeric else _entry("group", grp.getgrnam, command.group).gr_gid
    groups = [gid] if name is None else os.getgrouplist(name, gid)
    if (uid, gid) == own and os.geteuid() != 0:
        return None, None, (), environment
    return uid, gid, groups[:_MOST_GROUPS], environment


@cache
def _has_terminal() -> bool:
    """Whether services have to be kept from a terminal. Where there is none, a session of its own would only put each
    into a scheduling group of its own (sched_autogroup_create_attach), behind all others just while we wait for it."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _entry(key: str, look_up: Callable[[str], _E], name: str) -> _E:
    try:
        return look_up(name)
    except KeyError:
        raise BadConfig(key, f"there is no {key} {name!r} here") from None


def _mark(mark: int) -> tuple[int, int, int]:
    _, hard = resource.getrlimit(MARK)
    return (MARK, mark, _unsigned(hard))


def _limits(template: Template, soft_descriptors: int | None) -> list[tuple[int, int, int]]:
    found = []
    if soft_descriptors is not None and "nofile" not in template.rlimits:
        # A program that uses select() would write behind its sets (select(2)) if it had more.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        found.append((resource.RLIMIT_NOFILE, _unsigned(soft_descriptors), _unsigned(hard)))
    for name, both in template.rlimits.items():
        soft, hard = both if isinstance(both, tuple) else (both, both)
        found.append((getattr(resource, f"RLIMIT_{name.upper()}"), _unsigned(soft), _unsigned(hard)))
    return found


def _unsigned(limit: int) -> int:
    return limit & 2**64 - 1
