"""`fourtuple run`: start a program that cannot be changed, with the right behaviour loaded into it.

Decides the options and what happens to this process, which becomes the program: its exit status is the command's. What
the program is started with, and whether it can work, is decided by `fourtuple.preload`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from fourtuple.errors import BadConfig


def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="The program to run.")],
    sources: Annotated[
        list[str],
        typer.Option(
            "--from",
            metavar="ADDRESSES",
            help="Where its connections come from: addresses, ranges and prefixes, such as 10.81.0.0/16; repeatable.",
        ),
    ],
    ports: Annotated[
        str | None,
        typer.Option("--range", metavar="LOW-HIGH", help="Ports to use; default: the host's whole ephemeral range."),
    ] = None,
) -> int:
    """Run COMMAND with its TCP connections spread over many source addresses.

    A library is loaded into it (LD_PRELOAD): connections that name no source get one out of ADDRESSES, each in turn,
    and the next one where no port is left; each port serves every destination. Write -- before COMMAND. Changes nothing
    on the host. Not for programs that are linked statically or written in Go, nor for UDP; a destination on loopback
    is left alone unless ADDRESSES are loopback, too.

    Exit status: the command's own; 64 wrong usage, 69 it cannot work with this command or host.
    """
    from fourtuple.preload import Sources, require_host, require_loadable

    wanted = Sources.parse(sources, ports)
    found = shutil.which(command[0])
    if found is None:
        raise BadConfig("COMMAND", f"{command[0]!r} is not found, or may not be executed")
    require_loadable(Path(found))
    require_host(wanted)
    environment = wanted.environment(os.environ)
    sys.stdout.flush()
    # Python ignores these two from its start on, and a program inherits what is ignored (execve(2)).
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(found, command, environment)
    except OSError as error:
        raise BadConfig("COMMAND", f"{found} cannot be run: {error.strerror}") from None
