"""An agent: the process that is one host of a lab. `python -m fourtuple.lab.agent NAME PARENT DESCRIPTOR`.

Decides how such a process is born into its namespaces, answers, and dies. Nothing but agents holds the namespaces,
which have neither a name nor a file, so that no agent left means nothing left. An agent ends when its parent ends,
however that happens: the kernel kills it (PR_SET_PDEATHSIG), and a thread watches for the channel's other end to go.
Ctrl-C is the parent's affair and ignored here. What can be asked is the table in `operations`.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import NoReturn

from fourtuple.lab import namespaces
from fourtuple.lab.channel import Answer, Failure, Request
from fourtuple.lab.operations import OPERATIONS, Held, limit_descriptors


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """How an agent is to be: sent once, before the first request."""

    membership: namespaces.Membership
    parent_pid: int
    die_with_thread: bool
    """PR_SET_PDEATHSIG speaks of the thread that started the agent: right for a main thread, wrong for any other."""
    refuse_io_uring: bool
    descriptors: int | None


def main(arguments: list[str]) -> NoReturn:
    """Be an agent until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # At the lowest number that is free: RLIMIT_NOFILE bounds numbers, and a parent with much open gives a high one.
    given = int(arguments[2])
    connection = Connection(os.dup(given))
    os.close(given)
    held = Held()
    try:
        birth = connection.recv()
        connection.send(_answer(0, partial(_be_born, birth, held)))
        threading.Thread(target=_end_with_channel, args=(connection.fileno(),), daemon=True).start()
        while True:
            request: Request = connection.recv()
            work = partial(OPERATIONS[request.operation], held, *request.positional, **request.named)
            connection.send(_answer(request.serial, work))
    except (EOFError, OSError):
        os._exit(0)  # no tidying: the kernel closes what is open faster than Python would


def _be_born(birth: Birth, held: Held) -> bool:
    """Take on namespaces and limits; says whether a user namespace was needed."""
    namespaces.be_killed_first()
    in_user_namespace = namespaces.enter(birth.membership)
    if birth.die_with_thread:
        namespaces.die_with(birth.parent_pid)
    if birth.descriptors is not None:
        limit_descriptors(held, birth.descriptors, None)
    if birth.refuse_io_uring:
        namespaces.refuse_io_uring()  # before there is a second thread: a filter binds the thread that installs it
    return in_user_namespace


def _answer(serial: int, work: Callable[[], object]) -> Answer:
    try:
        return Answer(serial=serial, value=work())
    except Exception as error:
        trace = "".join(traceback.format_exception(error)).rstrip()
        return Answer(serial=serial, failure=Failure.of(error, f"in lab agent {sys.argv[1]} ({os.getpid()}):\n{trace}"))


def _end_with_channel(descriptor: int) -> None:
    """End this process when the parent's end of the channel closes, even in the middle of a long operation."""
    watch = select.poll()
    watch.register(descriptor, select.POLLRDHUP)
    while not any(event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, event in watch.poll()):
        pass
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
