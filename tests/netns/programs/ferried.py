"""A broker process as the test of moving connections drives it: told by messages on descriptor 3, each answered.

ferried.py CARRIER WORKERS TARGET PORT LISTENER_FD...
"""

from __future__ import annotations

import json
import socket
import sys
from ipaddress import ip_address

from fourtuple.engine import BrokerConfig, BrokerListener, CarrierName, Engine
from fourtuple.registry import sealed
from fourtuple.services import Service
from fourtuple.tuples import Endpoint

_CONTROL = 3
_NUMBERS = ("accepts_succeeded", "landed", "relaying_now", "moving_now", "ferries_now", "ferries_lost", "listening_now")


def main(carrier: str, workers: str, target: str, port: str, *fds: str) -> None:
    listener = BrokerListener(
        endpoint=Endpoint(ip_address("127.0.0.1"), int(port)),
        sniff_timeout_s=5,
        default="service:only",
        fds=tuple(int(fd) for fd in fds),
    )
    config = BrokerConfig(listeners=(listener,), store=sealed([Service(name="only", target=target)], []))
    control = socket.socket(fileno=_CONTROL)
    with Engine.start(config, CarrierName(carrier), workers=int(workers)) as engine:
        engine.wait_for(lambda now: now.listening_now == len(fds), 20)
        control.send(b"{}")
        while True:
            order, given, _, _ = socket.recv_fds(control, 4096, 16)
            match order.decode():
                case "land":
                    engine.land(given)
                case "ferry":
                    engine.ferry(given)
                case "resume":
                    engine.resume()
                case "close":
                    engine.close()
                case "":
                    return
                case _:
                    pass
            for one in given:
                socket.close(one)
            now = engine.snapshot()
            numbers = {name: getattr(now, name) for name in now.__struct_fields__ if name in _NUMBERS}
            ended = {
                name: value
                for name in now.__struct_fields__
                if name.startswith("ended_") and (value := getattr(now, name))
            }
            control.send(json.dumps({**numbers, **ended, "running": now.running, "errors": now.errors}).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
