"""What a supervisor leaves to the program that takes its place: the same process, so that its children stay its own.

Decides the form of that, what is checked before, and that a successor that cannot go on gives the place back. Knows
nothing of how a successor lives.

The place changes by execve(): the process number, the children and the descriptors that are named here stay. First a
child with the new program has to read the same words and say that it understands them.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import NoReturn

from msgspec import Struct, field
from msgspec.structs import asdict

from fourtuple.engine import PROGRAM_VERSION
from fourtuple.errors import BadConfig, EngineStopped
from fourtuple.supervisor.channel import Fields

VERSION = 2
MODULE = "fourtuple.supervisor"
CHECKS_WITHIN_S = 60.0
_MOST_BYTES = 256 << 20
_WAITING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals that wait for the successor to have its handlers."""


class Estate(Struct, frozen=True, kw_only=True):
    """All that is left: numbers, words, and the numbers of open descriptors."""

    spec: Fields
    shown: Fields
    begun_s: float
    """Of CLOCK_MONOTONIC."""
    listeners: dict[str, list[int]]
    brokers: list[Fields]
    """Of each broker process what `BrokerChild.left` says: the one that accepts, then those that are leaving."""
    ended: Fields
    """What is counted of broker processes that are gone."""
    counts: dict[str, int]
    launcher: Fields
    words: list[int]
    """Descriptors of the launcher's, in its order."""
    running: dict[str, str]
    """Services that are up, and their templates."""
    unsettled: list[str]
    """Services that are being started or stopped."""
    control: int | None = None
    """The control socket."""
    inetd: int | None = None
    """Where the broker process brings clients who get a process of their own."""
    events: str | None = None
    """Where events are written."""
    upgraded: Fields = field(default_factory=dict)
    """How the last upgrade has gone, if this is none."""
    upgrade_began: float | None = None
    previous: str = ""
    """The interpreter that gets the place back if the successor cannot go on."""
    why_back: str = ""
    """Why it has it back."""
    only_version: str = ""
    """Of the program: no other is to take the place, for nobody has asked for an upgrade."""
    renews: bool = False
    """The successor makes a broker process of its own memory, before anything else."""
    version: int = VERSION
    kept: list[int] = field(default_factory=list)
    """All descriptors that are to stay open."""

    def write(self) -> int:
        """Into a file without a name; returns its descriptor."""
        memory = os.memfd_create("fourtuple-estate", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(memory), "w") as out:
            json.dump(asdict(self), out)
        return memory

    @classmethod
    def read(cls, descriptor: int) -> Estate:
        """What stands there; raises BadConfig if this version of the program does not understand it."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            with os.fdopen(os.dup(descriptor)) as opened:
                fields = json.loads(opened.read(_MOST_BYTES))
            if fields["version"] != VERSION:
                raise BadConfig("estate", f"is of version {fields['version']}, and {VERSION} is understood")
            estate = cls(**fields)
            if estate.only_version not in ("", PROGRAM_VERSION):
                raise BadConfig("estate", f"is for version {estate.only_version} of the program, not another")
            return estate
        except (ValueError, TypeError, KeyError) as error:
            raise BadConfig("estate", f"is not understood: {error}") from None


async def check(executable: str, estate: Estate) -> None:
    """Let a child with the new program read it; raises EngineStopped with what it said if it does not understand."""
    memory = estate.write()
    try:
        process = await asyncio.create_subprocess_exec(
            *_command(executable, "--check", memory),
            pass_fds=(memory,),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise EngineStopped(f"{executable} cannot be executed: {error.strerror}") from None
    finally:
        os.close(memory)
    try:
        async with asyncio.timeout(CHECKS_WITHIN_S):
            _, said = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise EngineStopped(f"{executable} did not say within {CHECKS_WITHIN_S:g} s that it understands") from None
    if process.returncode != 0:
        last = (said.decode(errors="replace").strip().splitlines() or ["without a word"])[-1]
        raise EngineStopped(f"{executable} cannot take over (status {process.returncode}): {last}")


def hand_over(executable: str, estate: Estate) -> NoReturn:
    """Give the place to the program; does not return. Raises EngineStopped if it cannot be executed."""
    memory = estate.write()
    for descriptor in (memory, *estate.kept):
        os.set_inheritable(descriptor, True)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITING)
    command = _command(executable, "--resume", memory)
    try:
        os.execv(executable, command)
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITING)
        for descriptor in estate.kept:
            os.set_inheritable(descriptor, False)
        os.close(memory)
        raise EngineStopped(f"{executable} cannot be executed: {error.strerror}") from None


def take_over(descriptor: int) -> Estate:
    """What a predecessor has left; its descriptors are passed on to nobody from here on."""
    estate = Estate.read(descriptor)
    os.close(descriptor)
    for kept in estate.kept:
        os.set_inheritable(kept, False)
    return estate


def has_handlers() -> None:
    """Signals that came meanwhile are delivered now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITING)


def _command(executable: str, verb: str, memory: int) -> list[str]:
    return [executable, "-P", "-m", MODULE, verb, str(memory)]
