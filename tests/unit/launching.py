"""A launcher as its tests use it: templates for `launched.py`, and nothing left behind when a test is over."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fourtuple.launcher import Exit, Launcher
from fourtuple.launcher.processes import children, mark_of
from fourtuple.services import Delivery
from fourtuple.templates import Call, Output, Ready, Socket, Template
from tests.unit.handing import open_descriptors

SERVICE = (sys.executable, "-I", "-S", str(Path(__file__).with_name("launched.py")))
PATIENCE_S = 30.0


def template(name: str, *arguments: str, **more: Any) -> Template:  # noqa: ANN401 - whatever a template has
    """One that runs `launched.py`."""
    return Template(**{"name": name, "argv": (*SERVICE, *arguments), "output": Output.NULL, **more})


def program(name: str, *argv: str, **more: Any) -> Template:  # noqa: ANN401 - whatever a template has
    """One that runs something else, and is there as soon as that runs."""
    given = {"socket": Socket.PASS, "ready": Ready.STARTED, "output": Output.NULL, **more}
    return Template(name=name, argv=argv, **given)


def call(folder: Path, template: str, service: str | None = None, **more: Any) -> Call:  # noqa: ANN401
    """For a service of that template, at a path of its own."""
    service = service or template
    return Call(**{"service": service, "template": template, "target": f"unix:{folder / service}", **more})


def handed(folder: Path, template: str) -> Call:
    """Whose clients are handed over."""
    return call(folder, template, delivery=Delivery.HANDOFF)


class Exits(list[Exit]):
    """Those that have ended by themselves."""

    async def next(self) -> Exit:
        """The next one."""
        await eventually(lambda: bool(self))
        return self.pop(0)


@asynccontextmanager
async def launching(*templates: Template, **more: Any) -> AsyncIterator[tuple[Launcher, Exits]]:  # noqa: ANN401
    """A launcher; at the end, neither processes nor descriptors may be left."""
    before, exits = open_descriptors(), Exits()
    launcher = Launcher(templates, exited=exits.append, **more)
    try:
        yield launcher, exits
    finally:
        await launcher.aclose()
    left = [pid for pid in children(os.getpid()) if launcher.knows(mark_of(pid))]
    assert not left, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
    assert open_descriptors() == before


async def eventually(holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until_s, "it does not come true"
        await asyncio.sleep(0.005)


def answer(path: Path) -> int:
    """The process that answers there."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE_S)
        client.connect(str(path))
        return int(client.recv(100))


def runs(pid: int) -> bool:
    """Whether it is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
