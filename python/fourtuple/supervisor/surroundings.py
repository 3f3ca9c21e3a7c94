"""What stands around a supervisor that runs as a command: the control socket, the place where sockets for processes of
their own are brought, the registry as far as it is looked into, and the init system.

Decides what of these there is, and that nothing of it is left behind. Knows no connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Container, Hashable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from socket import socket

from msgspec import Struct, field

from fourtuple import confinement, systemd
from fourtuple.brokerfile import BrokerFile
from fourtuple.control import door
from fourtuple.errors import FourtupleError
from fourtuple.eventlog import EventLog
from fourtuple.launcher import Inetd
from fourtuple.registry import Registry
from fourtuple.service import Note
from fourtuple.services import Delivery, Service
from fourtuple.supervisor.channel import Fields
from fourtuple.supervisor.controlled import Control
from fourtuple.supervisor.spec import Spec
from fourtuple.supervisor.supervisor import Supervisor
from fourtuple.templates import Call


class Services(Struct):
    """Services by their names, wherever they stand. A registry is opened when it is first asked: not before a broker
    process is forked, for LMDB is not to be taken along."""

    spec: Callable[[], Spec]
    """As it is now: the file may have been read again."""
    _registry: Registry | None = None
    _named: dict[str, Service] = field(default_factory=dict)
    _text: str | None = None
    """In which they are named."""

    def find(self, name: str) -> Service | None:
        """The service of that name; BadConfig if it is no name."""
        registry, spec = self._opened(), self.spec()
        if registry is not None:
            return registry.service(name)
        if self._text != spec.text:
            self._named, self._text = {one.name: one for one in spec.file().services}, spec.text
        return self._named.get(name)

    def version(self) -> Hashable:
        """As long as it is the same, nothing has changed."""
        registry = self._opened()
        return self.spec().text if registry is None else registry.version

    def addresses(self) -> Iterable[Container[bytes]]:
        """Of the TCP targets of all services, routes and defaults."""
        return confinement.addresses(self.spec().file(), self._opened())

    def _opened(self) -> Registry | None:
        store = self.spec().store
        if self._registry is None and store is not None:
            self._registry = Registry(Path(store), create=False)
        return self._registry

    def close(self) -> None:
        """Close the registry, if it was opened; who asks again opens it again."""
        if self._registry is not None:
            self._registry.close()
            self._registry = None


class Surroundings(Struct):
    """What there is of them."""

    control: socket | None = None
    control_path: Path | None = None
    inetd: Inetd | None = None
    events: EventLog | None = None
    events_path: str | None = None
    opened: door.Door | None = None
    keeping: asyncio.Task[None] | None = None
    """Of the control socket, by that door."""
    shown: Fields = field(default_factory=dict)
    begun_s: float = 0.0
    services: Services | None = None

    async def quiet(self) -> None:
        """End the process of the control API; who asks it next wakes another."""
        if self.keeping is not None:
            await _cancelled(self.keeping)

    def let_go(self) -> None:
        """Close the registry: LMDB's descriptor and its place in the table of readers would outlive an execve()."""
        if self.services is not None:
            self.services.close()

    def reopen(self) -> None:
        """Write events into a file of their name: the one before may have been moved away (logrotate)."""
        if self.events is not None:
            self.events.reopen()

    def stay(self) -> None:
        """The control socket is heard again."""
        if self.opened is not None:
            self.keeping = asyncio.create_task(self.opened.keep())

    def left(self) -> Fields:
        """What a successor has to know of this."""
        control = None if self.control is None else self.control.fileno()
        return {
            "shown": self.shown,
            "begun_s": self.begun_s,
            "control": control,
            "events": self.events_path,
            "kept": [] if control is None else [control],
        }


@asynccontextmanager
async def surrounded(
    supervisor: Supervisor, file: BrokerFile, around: Surroundings, say: Callable[..., None]
) -> AsyncIterator[None]:
    """While the block runs, they are there."""
    async with AsyncExitStack() as stack:
        services = around.services = Services(lambda: supervisor.spec)
        stack.callback(services.close)
        supervisor.dormancy.registered = services
        if supervisor.spec.inetd is not None:
            around.inetd = _inetd(supervisor, services)
            stack.push_async_callback(around.inetd.aclose)
        if around.control is not None and file.control is not None:
            opened = door.Door(Control(supervisor, services.find), around.control, file.control.access, say=say)
            supervisor.control_of = lambda: opened.pid
            around.opened = opened
            around.stay()
            stack.callback(_unlinked, around)
            stack.push_async_callback(around.quiet)
        if (every_s := systemd.watchdog_s()) is not None:
            beating = asyncio.create_task(_beat(supervisor, every_s))
            stack.push_async_callback(_cancelled, beating)
        yield
        systemd.notify(stopping=True)


def _unlinked(around: Surroundings) -> None:
    if around.control is not None and around.control_path is not None:
        door.unlink(around.control_path, around.control)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _beat(supervisor: Supervisor, every_s: float) -> None:
    """Tell the init system that all is well, while a broker process is there."""
    while True:
        if supervisor.accepting is not None:
            with suppress(OSError):
                systemd.notify(watchdog=True)
        await asyncio.sleep(every_s)


def _inetd(supervisor: Supervisor, services: Services) -> Inetd:
    def called(note: Note) -> Call | None:
        try:
            found = services.find(note.service)
        except FourtupleError:
            return None
        if found is None or found.start is None or found.delivery is not Delivery.INETD:
            return None
        return Call(
            service=found.name, template=found.start, target=found.target, delivery=Delivery.INETD, name=found.name
        )

    assert supervisor.spec.inetd is not None
    Path(supervisor.spec.inetd).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    return Inetd(supervisor.launcher, supervisor.spec.inetd, called)
