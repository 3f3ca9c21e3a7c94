"""A supervisor's life as a command: signals, what is printed while it runs, and its last line.

Decides what a person and a script see. Knows no option: `fourtuple serve` has those, and a program that takes a
supervisor's place has them from the one before it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from msgspec import Struct

from fourtuple import systemd
from fourtuple.errors import EngineStopped, FourtupleError
from fourtuple.supervisor.brokerprocess import OBEYED
from fourtuple.supervisor.channel import Fields
from fourtuple.supervisor.supervisor import Supervisor

_GLANCE_S = 0.25


class Shown(Struct, frozen=True, kw_only=True):
    """What is printed."""

    as_json: bool = False
    every_s: float = 0.0
    """Between two lines; 0 is the last line alone."""


def obey_signals(supervisor: Supervisor, reopen: Callable[[], None]) -> None:
    """SIGTERM and SIGINT end it gracefully from now on, a second one at once. SIGHUP has it read its file again, and
    write its logs into files of their names: `reopen` opens those of this process."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.end, supervisor.spec.grace_s)
    loop.add_signal_handler(signal.SIGHUP, _HangUp(supervisor, reopen).come)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OBEYED)


class _HangUp:
    """SIGHUP: somebody wants the file read again; or the terminal is gone, and with it who has started this."""

    def __init__(self, supervisor: Supervisor, reopen: Callable[[], None]) -> None:
        self._supervisor, self._reopen = supervisor, reopen
        self._had_terminal = _has_terminal()
        self._is_wanted = False
        self._task: asyncio.Task[None] | None = None

    def come(self) -> None:
        supervisor = self._supervisor
        if supervisor.is_ending:
            return
        if self._had_terminal and not _has_terminal():
            return supervisor.end(supervisor.spec.grace_s)
        # However often it comes meanwhile, it is done once more.
        self._is_wanted = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._reload())
            supervisor.keep_task(self._task)

    async def _reload(self) -> None:
        while self._is_wanted:
            self._is_wanted = False
            with suppress(OSError):
                systemd.notify(reloading=True)
            try:
                self._reopen()
                renewed = self._supervisor.begin_reload()
            except (FourtupleError, OSError) as error:
                print(f"fourtuple serve: {error}", file=sys.stderr, flush=True)
                # What was there before still holds; the log of connections is the broker process's.
                renewed = self._supervisor.begin_renewal()
            await renewed
            with suppress(OSError):
                systemd.notify(ready=True)


def _has_terminal() -> bool:
    """Whether there is one that may send SIGHUP when it goes."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


async def live(
    supervisor: Supervisor,
    shown: Shown,
    *,
    beside: Callable[[], Awaitable[None]] | None = None,
    is_needed: Callable[[], str] = lambda: "",
    begun_s: float | None = None,
) -> None:
    """Until somebody says that it is over, `beside` has ended, or `is_needed` says why not.

    Raises EngineStopped with that reason.
    """
    begun_s = time.monotonic() if begun_s is None else begun_s
    grace_s = supervisor.spec.grace_s
    running = asyncio.create_task(supervisor.run())
    side = asyncio.ensure_future(beside()) if beside is not None else None
    why, next_s = "", begun_s + shown.every_s
    try:
        while not running.done():
            waited = [running] if side is None or side.done() else [running, side]
            await asyncio.wait(waited, timeout=_GLANCE_S, return_when=asyncio.FIRST_COMPLETED)
            if side is not None and side.done():
                supervisor.end(grace_s)
                side.result()
            if not why and (why := is_needed()):
                supervisor.end(0.0)
            if shown.every_s and time.monotonic() >= next_s and not running.done():
                next_s = time.monotonic() + shown.every_s
                show(await supervisor.summary(), begun_s, shown)
        await running
    finally:
        if not running.done():
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        if side is not None and not side.done():
            side.cancel()
    show(await supervisor.summary(), begun_s, shown)
    if why:
        raise EngineStopped(why)


def show(now: Fields, begun_s: float, shown: Shown) -> None:
    """Print the numbers."""
    gauges = {name: now[name] for name in ("accepted", "sniffing", "delivering", "relaying")}
    if shown.as_json:
        rest = {name: now[name] for name in ("ended", "retries", "failures", "plugins", "supervisor") if name in now}
        print(json.dumps({"seconds": round(time.monotonic() - begun_s, 3), **gauges, **rest}), flush=True)
        return
    text = ", ".join(f"{count:,} {name}" for name, count in gauges.items())
    print(text + "; ended: " + (", ".join(f"{name} {n:,}" for name, n in now["ended"].items()) or "none"), flush=True)
