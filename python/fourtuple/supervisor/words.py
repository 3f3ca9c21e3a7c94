"""Questions and answers of an engine as fields of messages, and back.

Decides their form between two processes that may be of two versions. Knows no channel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from ipaddress import ip_address

from fourtuple.engine import Engine
from fourtuple.questions import Answer, Failed, Held, Known, Question, Refused, Slept, Sniff, Up, Usage, Wake
from fourtuple.supervisor.channel import Fields

_PLAIN: dict[str, Callable[[str], Answer]] = {"up": Up, "slept": Slept, "failed": Failed}


def fields_of(question: Question) -> Fields:
    """A question, or a worker's answer to one of ours."""
    match question:
        case Wake(service=service, start=start, target=target, name=name, protocol=protocol, peer=peer):
            known = {"service": service, "start": start, "target": target, "name": name, "protocol": protocol}
            return {
                "kind": "wake",
                **known,
                "delivery": question.delivery,
                "peer": None if peer is None else str(peer.address),
            }
        case Usage(ticket=ticket, rows=rows):
            told = [[row.service, row.live + row.parked, row.unused_s] for row in rows]
            return {"kind": "usage", "ticket": ticket, "rows": told}
        case Held(service=service, live=live):
            return {"kind": "held", "service": service, "live": live}
        case Sniff(worker=worker, ticket=ticket, opening=opening, is_all=is_all):
            # An answer reaches all broker processes: only this one is to take it.
            whose = {"broker": os.getpid(), "worker": worker, "ticket": ticket}
            return {"kind": "sniff", **whose, "opening": opening.hex(), "is_all": is_all}
        case _:
            # The survey's, which never leaves the process.
            return {"kind": "none"}


def tell(engine: Engine, fields: Fields) -> None:
    """Say it to the engine; what this version does not know is nothing to it."""
    match fields.get("kind"):
        case "up" | "slept" | "failed":
            engine.answer(_PLAIN[fields["kind"]](fields["service"]))
        case "refused":
            peer = fields.get("peer")
            engine.answer(Refused(fields["service"], None if peer is None else ip_address(peer)))
        case "opinion" if fields["broker"] == os.getpid():
            known = None
            if (protocol := fields.get("protocol")) is not None:
                said = {key: fields.get(key) for key in ("name", "user", "database", "client")}
                known = Known(protocol=protocol, **said)
            engine.opine(fields["worker"], fields["ticket"], known, fields.get("more_than"))
        case "hold":
            engine.hold(fields["service"])
        case "usage":
            engine.ask_usage(fields["ticket"], fields["services"])
