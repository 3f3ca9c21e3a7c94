"""The service's side of a handoff: notes, channels that bring nothing, and clients that come through a broker."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourtuple.broker import Limits, reasons, running
from fourtuple.brokerfile import BrokerFile
from fourtuple.engine import CarrierName, Engine
from fourtuple.errors import BadConfig
from fourtuple.service import Listener, Note, receive, start_server
from fourtuple.tuples import Endpoint

VECTOR = bytes.fromhex(
    "34545550 01 04 0046 03e8 01bb 00000205"
    "00000000000000000000ffffc0000207 00000000000000000000ffffc6336401"
    "04 73686f70 10 73686f702e6578616d706c652e636f6d"
)
"""The one of docs/handoff.md, which the Rust writer is held to as well."""
CARRIERS = [CarrierName.EPOLL, CarrierName.URING]
PATIENCE_S = 20


def test_note_of_the_document() -> None:
    assert Note.parse(VECTOR) == Note(
        peer=Endpoint(ip_address("192.0.2.7"), 1000),
        local=Endpoint(ip_address("198.51.100.1"), 443),
        service="shop",
        matched="shop.example.com",
        seen_bytes=517,
    )


@given(st.one_of(st.binary(max_size=600), st.tuples(st.integers(0, len(VECTOR) - 1), st.integers(0, 255))))
def test_any_bytes_are_a_note_or_a_value_error(given_bytes: bytes | tuple[int, int]) -> None:
    if isinstance(given_bytes, tuple):
        place, value = given_bytes
        given_bytes = VECTOR[:place] + bytes([value]) + VECTOR[place + 1 :]
    with suppress(ValueError):
        assert len(Note.parse(given_bytes).service) < 256


@pytest.mark.parametrize("count", [0, 2, 3])
def test_another_number_of_descriptors_is_refused_and_they_are_closed(count: int) -> None:
    here, there = socket.socketpair()
    with here, there, socket.socket() as given_away:
        before = open_descriptors()
        socket.send_fds(here, [VECTOR], [given_away.fileno()] * count)
        with pytest.raises(ValueError, match="one socket was wanted"):
            receive(there)
        assert open_descriptors() == before


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_what_is_no_handoff_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "service"
    with Listener(path) as listener:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(path))
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        here, there = socket.socketpair()
        with socket.socket(socket.AF_UNIX) as broker, here:
            broker.connect(str(path))
            socket.send_fds(broker, [VECTOR], [there.fileno()])
            there.close()
            with listener.accept().socket as handed:
                handed.sendall(b"hello")
                assert here.recv(5) == b"hello"
    assert not path.exists()


def test_a_stale_socket_file_is_replaced_and_another_is_not(tmp_path: Path) -> None:
    path = tmp_path / "service"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Listener(path), pytest.raises(BadConfig, match="in use"):
        Listener(path)
    path.write_text("mine")
    with pytest.raises(BadConfig):
        Listener(path)
    assert path.read_text() == "mine"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def broker(text: str, carrier: CarrierName, limits: Limits | None = None) -> Iterator[tuple[Engine, int]]:
    port = free_port()
    listen = f'[[listen]]\naddress = "127.0.0.1:{port}"\nsniff_ms = 200\n'
    file = BrokerFile.parse((listen + text).encode(), "test")
    with running(file, carrier=carrier, workers=1, limits=limits) as engine:
        engine.wait_for(lambda now: now.listening_now == 1, PATIENCE_S)
        yield engine, port


def service(name: str, path: Path) -> str:
    return f'[[service]]\nname = "{name}"\ntarget = "unix:{path}"\ndelivery = "handoff"\n'


def asked(port: int, host: str) -> tuple[Endpoint, bytes]:
    """Who we are, and what the service says."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        address, own_port = client.getsockname()
        said = b""
        while block := client.recv(4096):
            said += block
        return Endpoint(ip_address(address), own_port), said


@pytest.mark.parametrize("carrier", CARRIERS, ids=lambda carrier: carrier.value)
def test_a_blocking_service_sees_the_client_itself(tmp_path: Path, carrier: CarrierName) -> None:
    path = tmp_path / "shop"
    heard: list[tuple[Note, Endpoint, bytes]] = []

    def serve(listener: Listener) -> None:
        for _ in range(3):
            handed = listener.accept()
            with handed.socket:
                request = handed.socket.recv(4096)
                address, port = handed.socket.getpeername()
                heard.append((handed.note, Endpoint(ip_address(address), port), request))
                handed.socket.sendall(b"served")

    with Listener(path) as listener, broker(service("shop.example", path), carrier) as (engine, port):
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        clients = [asked(port, "SHOP.example:80") for _ in range(3)]
        thread.join(PATIENCE_S)
        ended = reasons(engine.wait_for(lambda now: now.ended_handed_off == 3, PATIENCE_S))
    assert ended == {"handed_off": 3}
    assert [said for _, said in clients] == [b"served"] * 3
    for (client, _), (note, peer, request) in zip(clients, heard, strict=True):
        assert (note.peer, peer, note.local) == (client, client, Endpoint(ip_address("127.0.0.1"), port))
        assert (note.service, note.matched, note.seen_bytes) == ("shop.example", "shop.example", len(request))


@pytest.mark.parametrize("carrier", CARRIERS, ids=lambda carrier: carrier.value)
def test_an_asyncio_service_sees_the_client_itself(tmp_path: Path, carrier: CarrierName) -> None:
    path = tmp_path / "shop"

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Note) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        writer.write(f"{note.peer} {note.service} {len(request)}".encode())
        await writer.drain()

    async def scene(port: int) -> list[tuple[Endpoint, bytes]]:
        async with await start_server(connected, path):
            return await asyncio.gather(*(asyncio.to_thread(asked, port, "shop.example") for _ in range(5)))

    with broker(service("shop.example", path), carrier) as (_, port):
        clients = asyncio.run(scene(port))
    request = len(b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n")
    assert [said for _, said in clients] == [f"{client} shop.example {request}".encode() for client, _ in clients]


def test_limits_of_a_source_and_of_a_service_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "shop"
    text = f'[[service]]\nname = "shop.example"\ntarget = "unix:{path}"\nconnections = 2\n'
    with (
        socket.socket(socket.AF_UNIX) as backend,
        broker(text, CarrierName.AUTO, Limits(most_per_source=3)) as (engine, port),
    ):
        backend.bind(str(path))
        backend.listen()
        clients = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) for _ in range(2)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n")
        engine.wait_for(lambda now: now.relaying_now == 2, PATIENCE_S)
        assert not asked_or_reset(port)
        engine.wait_for(lambda now: now.ended_over_service == 1, PATIENCE_S)
        clients.append(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S))
        engine.wait_for(lambda now: now.sniffing_now == 1, PATIENCE_S)
        assert not asked_or_reset(port)
        engine.wait_for(lambda now: now.ended_over_source == 1, PATIENCE_S)
        for client in clients:
            client.close()


def asked_or_reset(port: int) -> bytes:
    try:
        return asked(port, "shop.example")[1]
    except ConnectionError:
        return b""


def test_files_that_cannot_be_served_say_why(tmp_path: Path) -> None:
    listen = f'[[listen]]\naddress = "127.0.0.1:{free_port()}"\n'
    both = BrokerFile.parse((listen + service("a", tmp_path / "a")).encode(), "test")
    with pytest.raises(BadConfig, match="--store"), running(both, store=tmp_path):
        pass
    with pytest.raises(BadConfig, match="store"), running(BrokerFile.parse(listen.encode(), "test"), store=tmp_path):
        pass
