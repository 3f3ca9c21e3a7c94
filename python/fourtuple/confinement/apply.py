"""Giving up what a broker does not need, step by step and for ever.

Decides the order, and what a step that cannot be taken is called. Each step tells what it did, or what the kernel said:
no version is compared. What is to be allowed, `model` has computed.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from msgspec.structs import replace

from fourtuple.confinement import landlock, mounts, seccomp
from fourtuple.confinement.kernel import CAPSET, call, prctl
from fourtuple.confinement.model import Confinement, Identity, NotWanted, Report, Step, StepName
from fourtuple.confinement.namespaces import own_network
from fourtuple.confinement.paths import folders
from fourtuple.errors import BadConfig, MissingPrivilege

# include/uapi/linux/prctl.h, capability.h
_SET_DUMPABLE, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT = 4, 24, 38, 47
_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x2008_0522
_MOST_CAPABILITIES = 64
_LOG_MODE = 0o640

Said: TypeAlias = str | tuple[str, tuple[str, ...]]
"""What a step did, and perhaps what it leaves open."""


def confine(confinement: Confinement) -> Report:
    """Give up all else than `confinement`, in this process and whatever it starts; there is no way back.

    Called with everything open, before the first thread is started: capabilities and mounts are a thread's, and kernel
    threads of io_uring keep what their maker had. MissingPrivilege if there are other threads already, or if a step
    that is required cannot be taken; the process must then end. BadConfig if the log cannot be opened.
    """
    if confinement.append is not None:
        _make_log(Path(confinement.append), confinement.identity)
    return _confined(confinement)


def explain(confinement: Confinement) -> Report:
    """What `confine` would come to here, found by doing it in a child that ends at once; makes no log."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(ours)
            try:
                said: dict[str, Any] = {"report": _confined(replace(confinement, required=False)).as_json}
            except BaseException as error:
                said = {"error": str(error)}
            with os.fdopen(theirs, "w") as opened:
                opened.write(json.dumps(said))
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as opened:
        text = opened.read()
    os.waitpid(child, 0)
    found: dict[str, Any] = json.loads(text) if text else {"error": "the kernel ended the child that tried it"}
    if "error" in found:
        raise MissingPrivilege(found["error"])
    return Report.from_json(found["report"])


def _confined(confinement: Confinement) -> Report:
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise MissingPrivilege(f"only a process of one thread can be confined, and this one has {threads}")
    known = folders(confinement.sockets)
    asks_at: list[int] = []
    steps = tuple(_steps(confinement, os.getpid(), asks_at))
    report = Report(steps=steps, folders=known, asks_at=asks_at[0] if asks_at else None)
    if confinement.required and report.missing:
        why = "; ".join(f"{step.name.value}: {step.detail}" for step in report.missing)
        raise MissingPrivilege(f"the broker is to be confined, and cannot be: {why}")
    return report


def _steps(confinement: Confinement, process: int, asks_at: list[int]) -> Iterator[Step]:
    yield (view := _step(confinement, StepName.MOUNTS, lambda: mounts.apply(confinement)))
    yield (network := _step(confinement, StepName.NETWORK, lambda: own_network(confinement)))
    applied = frozenset(step.name for step in (view, network) if step.applied)
    made: list[tuple[int, int]] = []

    def prepare() -> str:
        made.append(landlock.ruleset(confinement))
        return ""

    # While the folders can still be opened, and while the bounding set can still be changed.
    prepared = _step(confinement, StepName.LANDLOCK, prepare)
    bounded = _step(confinement, StepName.CAPABILITIES, _empty_bounding_set)
    yield _step(confinement, StepName.IDENTITY, lambda: _become(confinement.identity))
    yield _step(confinement, StepName.CAPABILITIES, lambda: _drop_all(bounded))
    yield _step(confinement, StepName.PRIVILEGES, _no_new_privileges)
    yield _step(confinement, StepName.DUMPABLE, _undumpable)
    if prepared.applied:
        descriptor, version = made.pop()
        yield _step(confinement, StepName.LANDLOCK, lambda: _restrict(confinement, descriptor, version, applied))
    else:
        yield prepared
    yield _step(confinement, StepName.SECCOMP, lambda: _filtered(confinement, process, asks_at))


def _step(confinement: Confinement, name: StepName, do: Callable[[], Said]) -> Step:
    if name in confinement.without:
        return Step(name=name, applied=False, detail="switched off", wanted=False)
    try:
        said = do()
    except NotWanted as why:
        return Step(name=name, applied=False, detail=str(why), wanted=False)
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "?")
        return Step(name=name, applied=False, detail=f"{error.strerror or error} ({code})")
    detail, gaps = (said, ()) if isinstance(said, str) else said
    return Step(name=name, applied=True, detail=detail, gaps=gaps)


def _empty_bounding_set() -> str:
    """No program that is started may ever have any; needs CAP_SETPCAP."""
    for capability in range(_MOST_CAPABILITIES):
        try:
            prctl(_CAPBSET_DROP, capability)
        except OSError as error:
            # What the kernel does not know ends the list (cap_valid()).
            if error.errno == errno.EINVAL:
                break
            raise
    return "the bounding set is empty"


def _drop_all(bounded: Step) -> Said:
    call(CAPSET, struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), struct.pack("=6I", *[0] * 6))
    with suppress(OSError):
        # Empty already, for a capability that is not permitted is not ambient (capabilities(7)).
        prctl(_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    if bounded.applied:
        return f"none; {bounded.detail}"
    # Without execve() and with PR_SET_NO_NEW_PRIVS it could give nothing.
    return "none; the bounding set stays, which only says what a program that is started may get"


def _become(identity: Identity | None) -> str:
    if identity is None or (identity.uid, identity.gid) == (os.geteuid(), os.getegid()):
        if os.geteuid() == 0:
            raise OSError(errno.EINVAL, "no user is named, so it stays root, without capabilities: [confine] user")
        return f"stays uid {os.geteuid()}, gid {os.getegid()}"
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    others = f", groups {', '.join(map(str, identity.groups))}" if identity.groups else ", no other group"
    return f"{identity.name} (uid {identity.uid}, gid {identity.gid}{others})"


def _no_new_privileges() -> str:
    prctl(_SET_NO_NEW_PRIVS, 1)
    return "nothing that is started gets more"


def _undumpable() -> str:
    prctl(_SET_DUMPABLE, 0)
    return "no core, and no look inside but by root"


def _restrict(confinement: Confinement, descriptor: int, version: int, applied: frozenset[StepName]) -> Said:
    landlock.restrict(descriptor, version)
    return f"ABI {version}: {landlock.summary(version, confinement)}", landlock.gaps(version, confinement, applied)


def _filtered(confinement: Confinement, process: int, asks_at: list[int]) -> Said:
    said, listener = seccomp.install(confinement, process)
    if listener is not None:
        asks_at.append(listener)
    return said


def _make_log(path: Path, identity: Identity | None) -> None:
    """An empty one that belongs to who will write it, if there is none yet; and one that can be written."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, _LOG_MODE)
        except FileExistsError:
            descriptor = os.open(path, flags)
        else:
            if identity is not None and os.geteuid() == 0:
                os.fchown(descriptor, identity.uid, identity.gid)
        os.close(descriptor)
    except OSError as error:
        raise BadConfig(str(path), f"cannot be written: {error.strerror}") from None
