"""An agent as its parent sees it: start it, ask it, learn how it died, end it.

Decides how an agent's process is started, what a death is called, and how long an end may take. Knows nothing of hosts,
links or what the operations do.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar, cast

from fourtuple.errors import EngineStopped, LimitReached
from fourtuple.lab.agent import Birth
from fourtuple.lab.channel import Asker
from fourtuple.lab.namespaces import Membership
from fourtuple.lab.operations import Held
from fourtuple.lab.readings import memory_room

P = ParamSpec("P")
R = TypeVar("R")

AGENT_MODULE = "fourtuple.lab.agent"
"""Every agent carries it in its command line, followed by the host's name and the parent's pid."""
UNSURPRISED = ("-W", "ignore::RuntimeWarning:runpy")
"""runpy warns that the package has imported the module before; in an agent's last words that would mislead."""
START_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 60.0
LAST_WORDS_BYTES = 2_000


class Agent:
    """A process in namespaces of its own (or of another agent). May be asked from any thread, one at a time."""

    def __init__(self, name: str, *, membership: Membership, refuse_io_uring: bool, descriptors: int | None) -> None:
        """Start the process; `await_birth` says when it is where it should be."""
        self.name = name
        self._lock = threading.Lock()
        self._oom_kills_before = _oom_kills()
        # What it prints (a panic, a traceback) is kept in memory: a file could be left behind, a pipe could fill up.
        self._words = os.memfd_create("fourtuple-lab-words", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *UNSURPRISED, "-m", AGENT_MODULE, name, str(os.getpid()), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # a terminal's Ctrl-C reaches the parent alone
                env={**os.environ, "PYTHONPATH": _python_path()},
            )
        except BaseException:
            ours.close()
            os.close(self._words)
            raise
        finally:
            theirs.close()
        self._asker: Asker | None = Asker(Connection(ours.detach()))
        self._birth = Birth(
            membership=membership,
            parent_pid=os.getpid(),
            die_with_thread=threading.current_thread() is threading.main_thread(),
            refuse_io_uring=refuse_io_uring,
            descriptors=descriptors,
        )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def await_birth(self) -> bool:
        """Send it into its namespaces; True if a user namespace was needed. Raises what stopped it."""
        return bool(self._exchange("birth", lambda asker: asker.begin(self._birth, START_TIMEOUT_S)))

    def ask(self, operation: Callable[Concatenate[Held, P], R], *positional: P.args, **named: P.kwargs) -> R:
        """Run an operation in the agent and return what it returns, or raise what it raises."""
        return self.ask_within(ANSWER_TIMEOUT_S, operation, *positional, **named)

    def ask_within(
        self, timeout_s: float, operation: Callable[Concatenate[Held, P], R], *positional: P.args, **named: P.kwargs
    ) -> R:
        """As `ask`, for an operation that may take longer; TimeoutError if it takes longer than that."""
        name = operation.__name__
        return cast(R, self._exchange(name, lambda asker: asker.ask(name, positional, named, timeout_s)))

    def read(self, reading: Callable[[int], R]) -> R:
        """A reading of its process taken from outside, by its pid; needs nothing of the process but that it lives."""

        def alive(asker: Asker) -> R:
            try:
                return reading(self.pid)
            except (FileNotFoundError, ProcessLookupError):
                raise EOFError from None

        return cast(R, self._exchange(reading.__name__, alive))

    def kill(self) -> None:
        """End it, without waiting."""
        self._process.kill()

    def gone(self, timeout_s: float) -> bool:
        """Wait for its process to be gone. The kernel closes its sockets first, which takes time when they are many."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def hang_up(self) -> None:
        """Let go of the channel and of what it printed."""
        with self._lock:
            if self._asker is not None:
                self._asker.close()
                self._asker = None
                os.close(self._words)

    def _exchange(self, name: str, talk: Callable[[Asker], object]) -> object:
        with self._lock:
            if self._asker is None:
                raise EngineStopped(f"lab host {self.name!r} is closed")
            try:
                return talk(self._asker)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise self._obituary(name) from None

    def _obituary(self, operation: str) -> EngineStopped | LimitReached:
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return EngineStopped(f"lab host {self.name!r} ({self.pid}) hung up during {operation} and is still ending")
        out_of_memory = -code == signal.SIGKILL and _oom_kills() > self._oom_kills_before
        if code >= 0:
            cause = f"ended with status {code}"
        elif out_of_memory:
            cause = "was killed (SIGKILL), and the kernel's out-of-memory killer has struck on this host meanwhile"
        else:
            cause = f"was killed by {signal.Signals(-code).name}"
        words = os.pread(self._words, LAST_WORDS_BYTES, max(0, os.fstat(self._words).st_size - LAST_WORDS_BYTES))
        last_words = words.decode(errors="replace").strip()
        said = f"; its last words: {last_words}" if last_words else ""
        story = f"lab host {self.name!r} (process {self.pid}) {cause} during {operation}{said}"
        return LimitReached(memory_room()[1], remedy=story) if out_of_memory else EngineStopped(story)


def end_all(agents: list[Agent], timeout_s: float) -> tuple[int, ...]:
    """Kill agents and wait for all of them together; the pids of those that the kernel is still taking down."""
    for agent in agents:
        agent.kill()
    deadline = time.monotonic() + timeout_s
    remaining = tuple(agent.pid for agent in agents if not agent.gone(max(0.0, deadline - time.monotonic())))
    for agent in agents:
        agent.hang_up()
    return remaining


def _python_path() -> str:
    """Where this very package is found, first: an agent runs the code that its parent runs."""
    ours = str(Path(__file__).parents[2])
    inherited = os.environ.get("PYTHONPATH", "")
    return f"{ours}{os.pathsep}{inherited}" if inherited else ours


def _oom_kills() -> int:
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
