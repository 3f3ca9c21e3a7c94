"""`fourtuple run`: start a program that cannot be changed, with many source addresses, or as a broker's service.

Decides the options and what becomes of this process: with the preload library it turns into the program, with a cgroup
it waits for the program and ends as that did. What the program is started with, and whether that can work, is decided
by `fourtuple.preload` and `fourtuple.hook`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals to us that are meant for the program. Those of the terminal reach it without us."""


class By(StrEnum):
    """What gives the program its sources."""

    PRELOAD = "preload"
    CGROUP = "cgroup"


def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="The program to run, and its arguments.")],
    sources: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="ADDRESSES",
            help="Where its connections come from: addresses, ranges and prefixes, such as 10.81.0.0/16; repeatable.",
        ),
    ] = None,
    ports: Annotated[
        str | None,
        typer.Option("--range", metavar="LOW-HIGH", help="Ports to use; default: the host's whole ephemeral range."),
    ] = None,
    by: Annotated[
        By, typer.Option(help="A library loaded into the program, or a BPF program on a cgroup (root; any program).")
    ] = By.PRELOAD,
    handoff: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LISTENER=PATH",
            help="What it listens on, ADDRESS:PORT or an absolute path, and the socket file at which a broker hands it "
            'the clients instead (a service with delivery = "handoff"); repeatable.',
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(metavar="MODE", help="Permissions of the socket files: who may hand clients over; default 600."),
    ] = None,
) -> int:
    """Run COMMAND with its TCP connections spread over many source addresses, or with clients that a broker hands over.

    By preload: connections that name no source get one out of ADDRESSES, each in turn, and the next one where no port
    is left; each port serves every destination; the port search is flat. Not for programs that are linked statically
    or written in Go. By cgroup: for those too, but the address is chosen by chance and that is all.

    With --handoff COMMAND does not listen itself, and sees each client's real address. By preload only.

    Write -- before COMMAND. UDP is left alone, and so is a destination on loopback, unless ADDRESSES are loopback, too.
    Changes nothing on the host that outlasts COMMAND but the socket files of --handoff.

    Exit status: the command's own; 64 wrong usage, 69 it cannot work with this command or host.
    """
    from fourtuple.preload import (
        HANDOFF_OTHERWISE,
        SOURCES_OTHERWISE,
        Handoffs,
        Sources,
        environment,
        require_host,
        require_loadable,
    )

    if not sources and not handoff:
        raise BadConfig(
            "--from", "--from ADDRESSES or --handoff LISTENER=PATH is needed: what is COMMAND to be run with?"
        )
    wanted = Sources.parse(sources, ports) if sources else None
    if wanted is None and ports is not None:
        raise BadConfig("--range", "is for connections: --from is needed as well")
    if by is By.CGROUP and ports is not None:
        raise BadConfig("--range", "not possible with --by cgroup: a BPF program cannot set IP_LOCAL_PORT_RANGE")
    if by is By.CGROUP and handoff:
        raise BadConfig("--handoff", "not possible with --by cgroup: a BPF program cannot take a listener's place")
    if mode is not None and not handoff:
        raise BadConfig("--mode", "is for socket files: --handoff is needed as well")
    listeners = Handoffs.parse(handoff, mode) if handoff else None
    found = shutil.which(command[0])
    if found is None:
        raise BadConfig("COMMAND", f"{command[0]!r} is not found, or may not be executed")
    if by is By.PRELOAD:
        require_loadable(Path(found), SOURCES_OTHERWISE if wanted else HANDOFF_OTHERWISE)
    if wanted is not None:
        require_host(wanted)
    sys.stdout.flush()
    if by is By.PRELOAD or wanted is None:
        _become(found, command, environment(os.environ, *(one for one in (wanted, listeners) if one is not None)))

    from fourtuple.hook import cgroup_with, require_bindable

    require_bindable(wanted)
    with cgroup_with(wanted) as folder:
        status = _wait_for(found, command, folder)
    if status < 0:
        _end_by(-status)
    return status


def _become(found: str, command: list[str], environment: Mapping[str, str]) -> NoReturn:
    # Python ignores these two from its start on, and a program inherits what is ignored (execve(2)).
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(found, command, environment)
    except OSError as error:
        raise BadConfig("COMMAND", f"{found} cannot be run: {error.strerror}") from None


def _wait_for(found: str, command: list[str], folder: Path) -> int:
    """Run it in the cgroup; its exit status, or the signal that ended it as a negative number."""

    # What is ignored stays ignored, as nohup(1) wants it.
    heeded = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        started[0].send_signal(number)

    def join() -> None:
        (folder / "cgroup.procs").write_text("0")
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded)

    # The program may run before we know of it: until then a signal waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, heeded)
    for number in heeded:
        signal.signal(number, pass_on)
    try:
        started.append(subprocess.Popen(command, executable=found, preexec_fn=join))
    except OSError as error:
        raise BadConfig("COMMAND", f"{found} cannot be run: {error.strerror}") from None
    except subprocess.SubprocessError:
        raise BadConfig("--by", f"this process may not join {folder}") from None
    signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded)
    # Ctrl-C and Ctrl-\ go to both of us; what becomes of it is the program's affair.
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    return started[0].wait()


def _end_by(number: int) -> None:
    """End as the program did, without a second core dump."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
