"""The program that takes a supervisor's place: `--check FD` says whether it could, `--resume FD` does.

For the supervisor alone, which leaves what it has behind that descriptor (`succession`); `fourtuple serve` begins one.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

from fourtuple.errors import FourtupleError
from fourtuple.supervisor.life import Shown, live, obey_signals
from fourtuple.supervisor.spec import Spec
from fourtuple.supervisor.succession import Estate, hand_over, has_handlers, take_over
from fourtuple.supervisor.supervisor import Settings, Supervisor


def main(arguments: list[str]) -> int:
    """Exit status 0: understood, or ended as asked."""
    match arguments:
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
        supervisor = Supervisor.resumed(estate)
    except Exception as error:
        raise _NotBegun(str(error)) from error
    obey_signals(supervisor)
    has_handlers()
    await live(supervisor, Shown(**estate.shown), begun_s=estate.begun_s)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
