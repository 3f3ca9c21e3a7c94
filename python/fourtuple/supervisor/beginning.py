"""How a broker process comes to be: by fork() of this program's memory, or by executing an interpreter.

Decides that it holds nothing of the supervisor's but its channel, and what it is told first. Needs no event loop, and
loads none: the first one is to be on its way before the supervisor is.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

from msgspec import Struct

from fourtuple.confinement import Reach
from fourtuple.errors import EngineStopped
from fourtuple.supervisor import brokerprocess
from fourtuple.supervisor.channel import MOST_DESCRIPTORS, VERSION, Channel, ChannelBroken, Fields
from fourtuple.supervisor.listeners import Listeners
from fourtuple.supervisor.spec import Spec

COMMAND = ("-P", "-m", "fourtuple.supervisor", "--broker")
"""What an interpreter is given to be a broker process; of whatever version, it has to understand this."""


class Begun(Struct):
    """A process that has been made; nobody watches it yet."""

    pid: int
    channel: Channel
    is_told: bool = False
    """What it is to be."""
    is_watched: bool = False
    """Somebody has taken it, who will end it, too."""

    def tell(self, spec: Spec, listeners: Listeners) -> None:
        """Say what it is to be; it answers by `ready`. Raises EngineStopped for too many listeners."""
        fields, descriptors = told(spec, listeners)
        self.is_told = True
        try:
            self.channel.send("begin", fields, descriptors)
        except ChannelBroken as error:
            raise EngineStopped(f"the broker process {self.pid} is gone: {error}") from None

    def forsake(self) -> None:
        """End it, unless it is watched."""
        if not self.is_watched:
            self.is_watched = True
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.channel.close()


def told(spec: Spec, listeners: Listeners) -> tuple[Fields, list[int]]:
    """The message `begin`, and the descriptors that go with it."""
    descriptors: list[int] = []
    names = []
    for endpoint in listeners.endpoints:
        names.append(str(endpoint))
        descriptors.extend(listeners.descriptors(endpoint, spec.workers))
    if len(descriptors) > MOST_DESCRIPTORS:
        raise EngineStopped(f"{len(descriptors)} listening sockets; {MOST_DESCRIPTORS} can be passed on")
    return {"version": VERSION, "spec": spec.fields(), "listeners": names}, descriptors


def forked(reach: Reach | None = None) -> Begun:
    """A process of this program's own memory, which must have no other thread; `reach` is where services lie, if that
    is known."""
    ours, theirs = Channel.pair()
    # A collector that looks through what was imported writes to every page that the two share.
    gc.freeze()
    pid = os.fork()
    gc.enable()
    if pid == 0:
        status = 1
        try:
            status = _child(theirs, reach)
        finally:
            os._exit(status)
    theirs.close()
    return Begun(pid, ours)


def executed(executable: str) -> Begun:
    """A process of another interpreter, and so of another version of the program. Raises EngineStopped if there is no
    such interpreter."""
    ours, theirs = Channel.pair()
    try:
        pid = os.posix_spawn(
            executable,
            [executable, *COMMAND],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), brokerprocess.CHANNEL)],
            setsigdef=[signal.SIGPIPE],
        )
    except OSError as error:
        ours.close()
        raise EngineStopped(f"{executable} cannot be executed: {error.strerror}") from None
    finally:
        theirs.close()
    return Begun(pid, ours)


def _child(channel: Channel, reach: Reach | None) -> int:
    # Nothing of the supervisor's is to live on in here: its listeners, its children's descriptors, its event loop's.
    if (loops := sys.modules.get("asyncio")) is not None:
        loops.set_event_loop(None)
        loops._set_running_loop(None)
    signal.set_wakeup_fd(-1)
    kept = channel.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, _highest_descriptor())
    try:
        return brokerprocess.main(channel, reach)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1


def _highest_descriptor() -> int:
    return max((int(entry.name) for entry in Path("/proc/self/fd").iterdir()), default=2) + 1
