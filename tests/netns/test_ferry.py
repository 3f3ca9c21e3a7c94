"""Brokers in processes of their own that take each other's connections over, while bytes go both ways."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.netns.streams import Manner, Streams

PATIENCE_S = 30
WORKERS = 2
_PROGRAM = Path(__file__).parent / "programs" / "ferried.py"
CARRIERS = ("epoll", "epoll", "uring", "uring", "epoll")
"""Of the brokers, in turn: from each to each."""


class Broker:
    """A broker process on listeners that are this one's."""

    def __init__(self, carrier: str, listeners: list[socket.socket], target: str) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(PATIENCE_S)
        fds = [one.fileno() for one in listeners]
        port = str(listeners[0].getsockname()[1])
        places = {fd: 10 + place for place, fd in enumerate(fds)}
        script = "".join(f"exec {place}<&{fd}; " for fd, place in places.items()) + f"exec 3<&{theirs.fileno()}; "
        command = (sys.executable, str(_PROGRAM), carrier, str(len(fds)), target, port, *map(str, places.values()))
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", script + 'exec "$@"', "bash", *command], pass_fds=(*fds, theirs.fileno())
        )
        theirs.close()
        assert self.control.recv(4096)

    def tell(self, order: str, fds: list[int] | None = None) -> dict[str, Any]:
        """Its numbers after an order."""
        socket.send_fds(self.control, [order.encode()], fds or [])
        answer: dict[str, Any] = json.loads(self.control.recv(65_536))
        return answer

    def wait_for(self, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        until_s = time.monotonic() + PATIENCE_S
        while not ready(now := self.tell("look")):
            assert time.monotonic() < until_s, now
            time.sleep(0.01)
        return now

    def move_to(self, other: Broker) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(WORKERS)]
        other.tell("land", [there.fileno() for _, there in pairs])
        self.tell("ferry", [here.fileno() for here, _ in pairs])
        for pair in pairs:
            for end in pair:
                end.close()

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> None:
        self.control.close()
        self.process.wait(PATIENCE_S)


@contextmanager
def bound(count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        made: list[socket.socket] = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(("127.0.0.1", made[0].getsockname()[1] if made else 0))
            made.append(one)
        yield made


def _manners(number: int) -> tuple[Manner, Manner]:
    """Of the client and of the service: most talk both ways, some read slowly, some are silent, some half closed."""
    match number % 8:
        case 0:
            return Manner(says=0), Manner(says=0)
        case 1:
            return Manner(reads=100, says=2000), Manner(says=2000)
        case 2:
            return Manner(says=3000), Manner(reads=150, says=2000)
        case 3:
            return Manner(stops_at=5000), Manner()
        case 4:
            return Manner(), Manner(stops_at=20_000, says=1000)
        case 5:
            return Manner(bulk=1_000_000), Manner(bulk=1_000_000, reads=20_000)
        case _:
            return Manner(), Manner()


def test_live_relays_move_again_and_again_and_no_byte_is_lost() -> None:
    count = 320
    streams = Streams()
    with bound(WORKERS) as listeners:
        at = listeners[0].getsockname()
        broker = Broker(CARRIERS[0], listeners, streams.target)
        streams.start()
        for number in range(count):
            streams.add(at, number, *_manners(number))
        broker.wait_for(lambda now: now["relaying_now"] == count)
        for move, carrier in enumerate(CARRIERS[1:]):
            other = Broker(carrier, listeners, streams.target)
            if move % 2 == 0:
                streams.burst()
            broker.move_to(other)
            # Who comes while all is moving is served.
            streams.add(at, count, *_manners(6))
            count += 1
            ended = broker.wait_for(lambda now: not now["running"])
            assert ended["errors"] == []
            assert ended["ferries_lost"] == 0
            assert set(ended) & {"ended_stopped", "ended_client_broke", "ended_service_broke"} == set()
            broker.end()
            broker = other
            before = streams.moved()
            until_s = time.monotonic() + PATIENCE_S
            while streams.moved() < before + 100_000:
                assert time.monotonic() < until_s, "nothing moves"
                time.sleep(0.01)
        now = broker.wait_for(lambda now: now["ferries_now"] == 0 and now["relaying_now"] == count)
        streams.finish(PATIENCE_S)
        assert streams.trouble == []
        broker.wait_for(lambda now: now.get("ended_relayed") == now["landed"] + now["accepts_succeeded"])
        assert now["landed"] >= 320
        broker.end()


@pytest.mark.parametrize("carrier", ["epoll", "uring"])
def test_whatever_a_process_that_dies_has_not_taken_lives_on(carrier: str) -> None:
    count = 300
    streams = Streams()
    with bound(WORKERS) as listeners:
        at = listeners[0].getsockname()
        broker = Broker(carrier, listeners, streams.target)
        streams.start()
        for number in range(count):
            streams.add(at, number, *_manners(number))
        broker.wait_for(lambda now: now["relaying_now"] == count)
        # It answers nothing.
        dying = Broker(carrier, listeners, streams.target)
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(WORKERS)]
        dying.tell("land", [there.fileno() for _, there in pairs])
        dying.process.send_signal(signal.SIGSTOP)
        # Until the last of its threads has stopped, the others go on.
        assert os.WIFSTOPPED(os.waitpid(dying.process.pid, os.WUNTRACED)[1])
        broker.tell("ferry", [here.fileno() for here, _ in pairs])
        for end in (end for pair in pairs for end in pair):
            end.close()
        broker.wait_for(lambda now: now["moving_now"] >= 64)
        dying.kill()
        broker.wait_for(lambda now: now["ferries_lost"] == WORKERS and now["relaying_now"] == count)
        broker.tell("resume")
        broker.wait_for(lambda now: now["listening_now"] == WORKERS)
        streams.add(at, count, *_manners(6))
        broker.wait_for(lambda now: now["relaying_now"] == count + 1)
        # It dies with what it has taken, and with nothing else.
        dying = Broker(carrier, listeners, streams.target)
        broker.move_to(dying)
        broker.wait_for(lambda now: now.get("ended_moved", 0) > 0)
        dying.kill()
        now = broker.wait_for(lambda now: (now["ferries_now"] == 0 and now["moving_now"] == 0) or not now["running"])
        moved = now["ended_moved"]
        if now["running"]:
            assert now["relaying_now"] == count + 1 - moved
        streams.finish(PATIENCE_S)
        assert len({line.partition(":")[0] for line in streams.trouble}) <= moved
        if now["running"]:
            broker.wait_for(lambda now: now.get("ended_relayed", 0) == count + 1 - moved)
        broker.end()
