"""A program that a supervisor executes: `--broker` is a broker process, `--check FD` says whether this program could
take the supervisor's place, `--resume FD` does.

For the supervisor alone, which leaves what it has behind that descriptor (`succession`); `fourtuple serve` begins one.
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
from fourtuple.supervisor import brokerprocess
from fourtuple.supervisor.channel import Channel
from fourtuple.supervisor.life import Shown, live, obey_signals
from fourtuple.supervisor.listeners import Listeners
from fourtuple.supervisor.spec import Spec
from fourtuple.supervisor.succession import Estate, hand_over, has_handlers, take_over
from fourtuple.supervisor.supervisor import Settings, Supervisor
from fourtuple.supervisor.surroundings import Surroundings, surrounded


def main(arguments: list[str]) -> int:
    """Exit status 0: understood, or ended as asked."""
    match arguments:
        case ["--broker"]:
            return brokerprocess.main(Channel(socket.socket(fileno=brokerprocess.CHANNEL)))
        case ["--check", number] if number.isdecimal():
            return _check(int(number))
        case ["--resume", number] if number.isdecimal():
            return _resume(take_over(int(number)))
        case _:
            print("fourtuple serve starts a supervisor; this is for its successor alone", file=sys.stderr)
            return 64


def _check(descriptor: int) -> int:
    try:
        estate = Estate.read(descriptor)
        Settings.of(Spec.from_fields(estate.spec).file())
        Shown(**estate.shown)
    except (FourtupleError, OSError, TypeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _resume(estate: Estate) -> int:
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
