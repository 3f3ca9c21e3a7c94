"""What systemd and a service say to each other: sd_notify(3), descriptors handed over (sd_listen_fds(3)), and kept.

Decides the wire, and that a process that was not started by systemd says nothing and gets nothing. Knows no broker.
Needs the standard library alone.
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Iterable, Mapping, MutableMapping
from typing import NamedTuple

from fourtuple.errors import BadConfig

FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START."""
MOST_DESCRIPTORS = 253
"""In one message (SCM_MAX_FD of include/net/scm.h)."""
_MOST_STORED = 4_096
_MOST_NAME_BYTES = 255
_TIMEOUT_S = 1.0
"""systemd reads these in its main loop; one that is stuck must not stop a broker."""
_OURS = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


class Given(NamedTuple):
    """A descriptor that systemd has handed over."""

    fd: int
    name: str
    """FileDescriptorName= of its socket unit, or what it was stored by; the unit's own name if nothing is said."""


def notify(
    *,
    ready: bool = False,
    stopping: bool = False,
    reloading: bool = False,
    watchdog: bool = False,
    status: str | None = None,
    main_pid: int | None = None,
    errno: int | None = None,
    extend_timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Tell systemd; says whether there is somebody to tell. OSError if that one cannot be told.

    After `reloading` (Type=notify-reload), `ready` says that it is over.
    """
    lines = [
        text
        for wanted, text in (
            (reloading, "RELOADING=1"),
            # Of CLOCK_MONOTONIC, in microseconds: what systemd is to know this message from an older one by.
            (reloading, f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000}"),
            (ready, "READY=1"),
            (stopping, "STOPPING=1"),
            (watchdog, "WATCHDOG=1"),
            (status is not None, f"STATUS={_one_line(status or '')}"),
            (main_pid is not None, f"MAINPID={main_pid}"),
            (errno is not None, f"ERRNO={errno}"),
            (extend_timeout_s is not None, f"EXTEND_TIMEOUT_USEC={round((extend_timeout_s or 0) * 1e6)}"),
        )
        if wanted
    ]
    return bool(lines) and _send("\n".join(lines), (), environment)


def store(
    descriptors: Iterable[int], name: str, *, poll: bool = True, environment: Mapping[str, str] | None = None
) -> bool:
    """Have systemd keep them for the next start of this unit, which gets them with `listen_fds`; says whether there is
    somebody to keep them. FileDescriptorStoreMax= says how many. Without `poll` they are kept though they were hung up.
    """
    known = _checked(name)
    waiting = list(descriptors)
    text = f"FDSTORE=1\nFDNAME={known}" + ("" if poll else "\nFDPOLL=0")
    sent = False
    for place in range(0, len(waiting), MOST_DESCRIPTORS):
        sent = _send(text, waiting[place : place + MOST_DESCRIPTORS], environment)
    return sent


def forget(name: str, *, environment: Mapping[str, str] | None = None) -> bool:
    """Have systemd let go of all that it keeps by that name."""
    return _send(f"FDSTOREREMOVE=1\nFDNAME={_checked(name)}", (), environment)


def barrier(timeout_s: float, *, environment: Mapping[str, str] | None = None) -> bool:
    """Wait until systemd has read all that was sent before, so that a process may end (sd_notify_barrier(3)); says
    whether it has in time, or there is nobody."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            if not _send("BARRIER=1", (theirs,), environment):
                return True
        finally:
            os.close(theirs)
        return _hung_up(ours, timeout_s)
    finally:
        os.close(ours)


def watchdog_s(environment: Mapping[str, str] | None = None) -> float | None:
    """How often, in seconds, `notify(watchdog=True)` is to be called at least; None if nobody waits for it."""
    given = os.environ if environment is None else environment
    microseconds = _whole(given.get("WATCHDOG_USEC", ""))
    if not microseconds or given.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    # sd_watchdog_enabled(3) advises half of it.
    return microseconds / 2e6


def listen_fds(environment: MutableMapping[str, str] | None = None) -> tuple[Given, ...]:
    """What systemd has handed to this very process, in its order; none if there was nothing, or it is another's.

    They are closed on exec() from here on, and the environment no longer names them: to be called once. BadConfig if
    what the environment says cannot be.
    """
    given = os.environ if environment is None else environment
    taken = {key: given.pop(key, "") for key in _OURS}
    if taken["LISTEN_PID"] != str(os.getpid()):
        return ()
    count = _whole(taken["LISTEN_FDS"])
    if count is None or count > _MOST_STORED:
        raise BadConfig("LISTEN_FDS", f"is {taken['LISTEN_FDS'][:20]!r}; a number up to {_MOST_STORED} is needed")
    names = taken["LISTEN_FDNAMES"].split(":") if taken["LISTEN_FDNAMES"] else ["unknown"] * count
    if len(names) != count:
        raise BadConfig("LISTEN_FDNAMES", f"has {len(names)} names for {count} descriptors")
    found = tuple(Given(fd=FIRST_DESCRIPTOR + place, name=name) for place, name in enumerate(names))
    for one in found:
        try:
            os.set_inheritable(one.fd, False)
        except OSError:
            raise BadConfig("LISTEN_FDS", f"is {count}, and descriptor {one.fd} is not open") from None
    return found


def _send(text: str, descriptors: Iterable[int], environment: Mapping[str, str] | None) -> bool:
    address = (os.environ if environment is None else environment).get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address[0] not in "/@" or len(address) < 2:
        raise BadConfig("NOTIFY_SOCKET", f"is {address[:60]!r}; a path or an abstract name is needed")
    rights = array.array("i", descriptors)
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(_TIMEOUT_S)
        sender.sendmsg([text.encode()], control, 0, "\0" + address[1:] if address[0] == "@" else address)
    return True


def _hung_up(descriptor: int, timeout_s: float) -> bool:
    import select

    poller = select.poll()
    poller.register(descriptor, 0)
    return bool(poller.poll(timeout_s * 1_000))


def _checked(name: str) -> str:
    """fdname_is_valid() of systemd."""
    if not 0 < len(name) <= _MOST_NAME_BYTES or any(not " " <= letter < "\x7f" or letter == ":" for letter in name):
        raise BadConfig("name", f"{name[:40]!r} cannot name a stored descriptor: printable ASCII without a colon can")
    return name


def _one_line(text: str) -> str:
    return " ".join(text.split("\n"))


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None
