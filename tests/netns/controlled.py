"""A program: a broker of one process with its control socket, for tests. Ends when its standard input does.

    python -m tests.netns.controlled FOLDER PORT SERVICES [--readers NAME] [--admins NAME] [--idle SECONDS]

Services are sN.example.com at unix:FOLDER/service; the control socket is FOLDER/control, events go to FOLDER/events.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from fourtuple.broker import Limits as BrokerLimits
from fourtuple.broker import running
from fourtuple.brokerfile import BrokerFile, ListenTable
from fourtuple.control import door
from fourtuple.control.peers import Access
from fourtuple.control.verbs import Limits
from fourtuple.engine import CarrierName, Phase
from fourtuple.eventlog import EventLog
from fourtuple.registry import Registry, sealed
from fourtuple.services import Service
from fourtuple.sight import Sight


async def control(sight: Sight, given: argparse.Namespace, events: EventLog) -> None:
    path = given.folder / "control"
    listener = door.listen(path, mode=0o666)
    try:
        opened = door.Door(
            sight,
            listener,
            Access.named(given.readers, given.admins),
            say=events.say,
            idle_s=given.idle,
            stuck_s=given.stuck,
            command=tuple(given.command) or door.COMMAND,
        )
        loop = asyncio.get_running_loop()
        sight.follow()
        keeping = loop.create_task(opened.keep())
        print("ready", flush=True)
        await loop.run_in_executor(None, sys.stdin.read)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    finally:
        door.unlink(path, listener)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("services", type=int)
    parser.add_argument("--readers", action="append", default=[])
    parser.add_argument("--admins", action="append", default=[])
    parser.add_argument("--idle", type=float, default=60.0)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--stuck", type=float, default=door.STUCK_S)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--carrier", default="auto")
    parser.add_argument("--command", action="append", default=[])
    given = parser.parse_args()
    services = (
        Service(name=f"s{number}.example.com", target=f"unix:{given.folder}/service")
        for number in range(given.services)
    )
    file = BrokerFile(listen=(ListenTable(address=f"127.0.0.1:{given.port}", sniff_ms=600_000),))
    served = given.store or sealed(services, ())
    store = Registry(given.store, create=False) if given.store else served
    with (
        EventLog(given.folder / "events") as events,
        running(
            file,
            store=served,
            limits=BrokerLimits(delivery_timeout_s=60),
            ledger=given.folder / "log",
            ledger_steps=given.steps,
            carrier=CarrierName(given.carrier),
            workers=2,
        ) as engine,
    ):
        engine.wait_for(lambda now: now.phase is not Phase.RAMPING, 10)
        limits = Limits(most_connections=0, most_per_source=0, most_per_service=0)
        sight = Sight(engine, store, [f"127.0.0.1:{given.port}"], limits)
        asyncio.run(control(sight, given, events))


if __name__ == "__main__":
    main()
