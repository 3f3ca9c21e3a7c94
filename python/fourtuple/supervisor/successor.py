"""A supervisor that takes another one's place, in its process: says beforehand whether it could, and does it.

Decides what happens if it cannot: the program before takes its place back. What is left to it, `succession` says.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

from msgspec.structs import replace

from fourtuple.control.verbs import unsaid
from fourtuple.errors import FourtupleError
from fourtuple.eventlog import EventLog
from fourtuple.supervisor.life import Shown, live, obey_signals
from fourtuple.supervisor.listeners import Listeners
from fourtuple.supervisor.spec import Spec
from fourtuple.supervisor.succession import Estate, hand_over, has_handlers, take_over
from fourtuple.supervisor.supervisor import Settings, Supervisor
from fourtuple.supervisor.surroundings import Surroundings, surrounded


def check(descriptor: int) -> int:
    """Whether what lies behind the descriptor could be taken over, as an exit status; says why not."""
    try:
        estate = Estate.read(descriptor)
        Settings.of(Spec.from_fields(estate.spec).file())
        Shown(**estate.shown)
    except (FourtupleError, OSError, TypeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def resume(descriptor: int) -> int:
    """Take the place of the process that has left it; the exit status once all has ended."""
    estate = take_over(descriptor)
    try:
        return asyncio.run(_live(estate))
    except FourtupleError as error:
        if isinstance(error, _NotBegun) and estate.previous:
            hand_over(estate.previous, replace(estate, previous="", why_back=str(error)))
        print(f"fourtuple serve: {error}", file=sys.stderr)
        return 1


class _NotBegun(FourtupleError):
    """The place cannot be taken; nothing has been touched."""


async def _live(estate: Estate) -> int:
    try:
        spec = Spec.from_fields(estate.spec)
        file = spec.file()
        events = EventLog(Path(estate.events)) if estate.events is not None else None
        say = unsaid if events is None else events.say
        listeners = Listeners.adopted(estate.listeners)
        supervisor = Supervisor(spec, Settings.of(file), listeners, say, estate)
        around = Surroundings(events=events, events_path=estate.events, shown=estate.shown, begun_s=estate.begun_s)
        if estate.control is not None and file.control is not None:
            around.control = socket.socket(fileno=estate.control)
            around.control.setblocking(False)
            around.control_path = file.control.path
    except Exception as error:
        raise _NotBegun(f"{type(error).__name__}: {error}") from error
    supervisor.around = around
    obey_signals(supervisor, around.reopen)
    has_handlers()
    if estate.renews:
        supervisor.fork_anew()
    with events or nullcontext():
        async with surrounded(supervisor, file, around, say):
            await live(supervisor, Shown(**estate.shown), begun_s=estate.begun_s)
    return 0
