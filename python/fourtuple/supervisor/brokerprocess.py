"""The broker process until it serves: gets listeners from the supervisor, gives up what it does not need, and runs the
engine on them. What it does from then on is `brokerlife`'s.

Decides the order: clients are served before what answers questions about them is loaded, an event loop with all that it
brings along. Knows one channel, which is descriptor 3 when the process was made by executing a program, and of it the
message `begin`; it says `refused` if there is a reason not to serve.
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fourtuple import confinement
from fourtuple.broker import running
from fourtuple.brokerfile import BrokerFile
from fourtuple.confinement import Reach
from fourtuple.engine import CarrierName, Phase, uring_abilities
from fourtuple.errors import BadConfig, EngineStopped, FourtupleError, LimitReached, MissingFeature, MissingPrivilege
from fourtuple.registry import Registry, Sealed, sealed
from fourtuple.supervisor.channel import VERSION, Channel, ChannelBroken, Message
from fourtuple.supervisor.spec import Spec

if TYPE_CHECKING:
    from fourtuple.supervisor.brokerlife import Life

OBEYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What the supervisor has handlers for (`life`). Of a terminal's Ctrl-C both processes hear: here they are ignored. Who
makes a broker process before it has handlers blocks them so long."""
CHANNEL = 3
"""The descriptor of the channel in a process that was made by executing a program."""
_BEGINS_WITHIN_S = 30.0
_DESCRIPTORS_LATER = 8
"""That loading the rest, and an event loop, take at most."""


def main(channel: Channel, services: Reach | None = None) -> int:
    """Serve until told to end; the exit status of the process. `services` is where those of the registry lie, if
    somebody has looked."""
    for ignored in OBEYED:
        signal.signal(ignored, signal.SIG_IGN)
    try:
        first = next(iter(channel.wait(_BEGINS_WITHIN_S)), None)
        if first is None or first.kind != "begin" or first.fields.get("version") != VERSION:
            spoken = None if first is None else first.fields.get("version")
            channel.send("refused", {"why": f"version {spoken} is spoken to it, and it speaks {VERSION}"})
            return 1
        if first.lacks_descriptors:
            channel.send("refused", {"why": "it may have too few descriptors for the listeners (RLIMIT_NOFILE)"})
            return 1
        return _begun(channel, first, services)
    except ChannelBroken:
        return 1
    except (FourtupleError, OSError) as error:
        with suppress(ChannelBroken):
            channel.send("refused", {"why": str(error)})
        return 1


def _begun(channel: Channel, first: Message, services: Reach | None) -> int:
    spec = Spec.from_fields(first.fields["spec"])
    listeners, workers, file = list(first.descriptors), spec.workers, spec.file()
    with ExitStack() as stack:
        store, seen = _store(stack, spec, file)
        allowed = _allowed(spec, file, seen, services) if spec.is_confined else None
        if allowed is not None and not confinement.stays_readable(allowed.identity, allowed.read):
            _life()
        # Clients take the others.
        later = [os.dup(channel.fileno()) for _ in range(_DESCRIPTORS_LATER)]
        # What io_uring can do is found by trying it, which takes sockets that there are none of afterwards.
        carrier, fallback = _carrier(CarrierName(spec.carrier), allowed is None or allowed.uring)
        report = confinement.confine(allowed) if allowed is not None else None
        engine = stack.enter_context(
            running(
                file,
                store=store,
                limits=spec.limits,
                ledger=Path(spec.ledger) if spec.ledger else None,
                ledger_every=spec.ledger_every,
                ledger_steps=spec.ledger_steps,
                carrier=carrier,
                workers=workers,
                descriptors=[listeners[at : at + workers] for at in range(0, len(listeners), workers)],
                inetd=Path(spec.inetd) if spec.inetd else None,
            )
        )
        engine.wait_for(lambda now: now.phase is not Phase.RAMPING or not now.running, _BEGINS_WITHIN_S)
        if (stopped_by := engine.snapshot().stopped_by) is not None:
            raise EngineStopped(f"it cannot listen: {stopped_by}")
        for descriptor in later:
            os.close(descriptor)
        _life()(channel, spec, engine, seen, listeners, report, fallback).run()
    return 0


def _life() -> type[Life]:
    """Loaded when it is first asked for."""
    from fourtuple.supervisor.brokerlife import Life

    return Life


def _carrier(wanted: CarrierName, uring_allowed: bool) -> tuple[CarrierName, str]:
    """Which one, and why not io_uring if it is wanted where it can be had."""
    if wanted is not CarrierName.EPOLL and not uring_allowed:
        reason = 'sandbox = "required", and with TCP or abstract targets io_uring reaches out of it'
        if wanted is CarrierName.URING:
            raise BadConfig("carrier", f"{reason}: take epoll or auto")
        return CarrierName.EPOLL, reason
    if wanted is not CarrierName.AUTO:
        return wanted, ""
    try:
        if uring_abilities()["lent_descriptors"]:
            return CarrierName.URING, ""
        reason = "io_uring here cannot lend a descriptor (IORING_OP_FIXED_FD_INSTALL, Linux 6.8)"
    except (MissingFeature, MissingPrivilege, LimitReached) as refusal:
        reason = str(refusal)
    return CarrierName.EPOLL, reason


def _store(stack: ExitStack, spec: Spec, file: BrokerFile) -> tuple[Path | Sealed, Registry | Sealed]:
    """What the engine opens, and what of it is looked at here."""
    given = spec.services()
    if isinstance(given, Path):
        return given, stack.enter_context(Registry(given, create=False))
    made = given or sealed(file.services, file.routes)
    return made, made


def _allowed(spec: Spec, file: BrokerFile, seen: Registry | Sealed, services: Reach | None) -> confinement.Confinement:
    return confinement.plan(
        file,
        registry=seen if isinstance(seen, Registry) else None,
        services=services,
        log=Path(spec.ledger) if spec.ledger else None,
        uring=CarrierName(spec.carrier) is not CarrierName.EPOLL,
        served=True,
        identity=confinement.identity(file.confine.user, file.confine.group),
        read=confinement.libraries(),
        sockets=spec.sockets(),
    )
