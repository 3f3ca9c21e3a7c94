"""Listening sockets that a broker is given: copied, shared with whoever else holds them, and checked."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address

import pytest

from fourtuple.engine import BrokerConfig, BrokerListener, CarrierName, Engine
from fourtuple.errors import BadConfig
from fourtuple.registry import sealed
from fourtuple.services import Service
from fourtuple.tuples import Endpoint

PATIENCE_S = 20


@pytest.fixture
def service() -> Iterator[str]:
    """An echo; its target."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(client: socket.socket) -> None:
            with client, suppress(OSError):
                while heard := client.recv(65_536):
                    client.sendall(heard)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def _bound(count: int) -> list[socket.socket]:
    """So many sockets on one port, bound and not listening."""
    made: list[socket.socket] = []
    for _ in range(count):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(("127.0.0.1", made[0].getsockname()[1] if made else 0))
        made.append(one)
    return made


def _config(sockets: list[socket.socket], target: str) -> BrokerConfig:
    endpoint = Endpoint(ip_address("127.0.0.1"), sockets[0].getsockname()[1])
    fds = tuple(one.fileno() for one in sockets)
    listener = BrokerListener(endpoint=endpoint, sniff_timeout_s=0.05, default="service:echo", fds=fds)
    return BrokerConfig(listeners=(listener,), store=sealed([Service(name="echo", target=target)], []))


def _echoes(at: tuple[str, int], word: bytes) -> None:
    with socket.create_connection(at, PATIENCE_S) as client:
        client.sendall(word)
        assert client.recv(len(word), socket.MSG_WAITALL) == word


@pytest.mark.parametrize("carrier", [CarrierName.EPOLL, CarrierName.URING])
def test_a_broker_listens_with_copies_of_what_it_is_given(carrier: CarrierName, service: str) -> None:
    sockets = _bound(2)
    at = sockets[0].getsockname()
    config = _config(sockets, service)
    with Engine.start(config, carrier) as first:
        assert first.workers == 2
        first.wait_for(lambda now: now.listening_now == 2, PATIENCE_S)
        for _ in range(10):
            _echoes(at, b"\xff\xfeone")
        first.drain()
        first.join(PATIENCE_S)
    # What comes between two brokers waits for the second.
    with socket.create_connection(at, PATIENCE_S) as early:
        early.sendall(b"\xff\xfeearly")
        with Engine.start(config, carrier) as second:
            for one in sockets:
                one.close()
            assert early.recv(7, socket.MSG_WAITALL) == b"\xff\xfeearly"
            _echoes(at, b"\xff\xfetwo")
            assert second.snapshot().listens_failed == 0


def test_what_is_no_socket_to_listen_with_is_named_or_counted(service: str) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        with pytest.raises(BadConfig, match="are 1, and there are 3 workers"):
            Engine.start(_config([one], service), CarrierName.EPOLL, workers=3)
        closed = _config([one], service)
    with pytest.raises(BadConfig, match="descriptor"):
        Engine.start(closed, CarrierName.EPOLL)
    here, there = os.pipe()
    try:
        listener = BrokerListener(endpoint=closed.listeners[0].endpoint, fds=(here,))
        with Engine.start(BrokerConfig(listeners=(listener,), store=closed.store), CarrierName.EPOLL) as engine:
            assert engine.join(PATIENCE_S)
            assert engine.snapshot().listens_failed == 1
    finally:
        os.close(here)
        os.close(there)
