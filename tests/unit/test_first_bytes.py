"""What a broker does with first bytes besides looking at them: reads PROXY headers, answers in a service's name."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from fourtuple.broker import Limits, reasons, running
from fourtuple.brokerfile import BrokerFile
from fourtuple.engine import CarrierName, Engine
from fourtuple.errors import BadConfig
from fourtuple.service import Note
from fourtuple.tuples import Endpoint

PATIENCE_S = 20
CARRIERS = pytest.mark.parametrize("carrier", [CarrierName.EPOLL, CarrierName.URING], ids=lambda carrier: carrier.value)
REQUEST = b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
CLIENT = Endpoint(ip_address("192.0.2.7"), 56_324)
REACHED = Endpoint(ip_address("198.51.100.1"), 443)
LINE = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n"
BINARY = SIGNATURE + bytes([0x21, 0x11, 0, 16, 192, 0, 2, 7, 198, 51, 100, 1, 0xDC, 4, 1, 187, 0xEE, 0, 1, 9])
LOCAL = SIGNATURE + bytes([0x20, 0, 0, 0])
TLS_REQUEST = bytes([0, 0, 0, 8, 4, 210, 22, 47])


@contextmanager
def broker(
    listen: str,
    text: str,
    carrier: CarrierName = CarrierName.AUTO,
    limits: Limits | None = None,
    log: Path | None = None,
) -> Iterator[tuple[Engine, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    file = BrokerFile.parse(f'[[listen]]\naddress = "127.0.0.1:{port}"\n{listen}{text}'.encode(), "test")
    with running(file, carrier=carrier, workers=1, limits=limits, ledger=log) as engine:
        engine.wait_for(lambda now: now.listening_now == 1, PATIENCE_S)
        yield engine, port


def service(path: Path, delivery: str = "handoff", name: str = "shop.example") -> str:
    return f'[[service]]\nname = "{name}"\ntarget = "unix:{path}"\ndelivery = "{delivery}"\n'


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S, source_address=(source, 0))


@contextmanager
def door(path: Path) -> Iterator[Callable[[], tuple[Note, bytes]]]:
    """A service that is handed sockets: the next note, and all that its client says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(path))
        bound.settimeout(PATIENCE_S)

        def taken() -> tuple[Note, bytes]:
            note, descriptors, _, _ = socket.recv_fds(bound, 600, 1)
            with socket.socket(fileno=descriptors[0]) as handed:
                handed.setblocking(True)
                said = b""
                while block := handed.recv(4096):
                    said += block
            return Note.parse(note), said

        yield taken


@CARRIERS
def test_a_trusted_header_says_who_comes_and_is_taken_away(tmp_path: Path, carrier: CarrierName) -> None:
    path, log = tmp_path / "shop", tmp_path / "log"
    listen = 'proxy_from = ["127.0.0.1/32"]\nsniff_ms = 300\n'
    with door(path) as taken, broker(listen, service(path), carrier, log=log) as (engine, port):
        for header in (LINE, BINARY, LOCAL):
            with connect(port) as client:
                own = Endpoint(ip_address("127.0.0.1"), client.getsockname()[1])
                for part in (header[:9], header[9:], REQUEST[:20], REQUEST[20:]):
                    client.sendall(part)
                client.shutdown(socket.SHUT_WR)
                note, said = taken()
            assert said == REQUEST
            assert note.seen_bytes is not None
            assert note.seen_bytes <= len(REQUEST)
            expected = (own, Endpoint(ip_address("127.0.0.1"), port)) if header is LOCAL else (CLIENT, REACHED)
            assert (note.peer, note.local, note.service) == (*expected, "shop.example")
        # Others are what their socket says, and their headers are bytes.
        with connect(port, "127.0.0.2") as client:
            client.sendall(REQUEST)
            client.shutdown(socket.SHUT_WR)
            note, said = taken()
        assert note.peer is not None
        assert (note.peer.address, said) == (ip_address("127.0.0.2"), REQUEST)
        for source, said in (
            ("127.0.0.2", BINARY + REQUEST),
            ("127.0.0.1", REQUEST),
            ("127.0.0.1", b"PROXY TCP4 nonsense\r\n" + REQUEST),
            ("127.0.0.1", BINARY[:20]),
            ("127.0.0.1", b""),
        ):
            with connect(port, source) as client:
                client.sendall(said)
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
        ended = reasons(engine.wait_for(lambda now: now.ended_unproxied == 4, PATIENCE_S))
    assert ended == {"handed_off": 4, "no_route": 1, "unproxied": 4}
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["peer"] for entry in entries[:2]] == ["192.0.2.7:56324"] * 2


def test_a_limit_counts_the_client_and_not_its_proxy(tmp_path: Path) -> None:
    path = tmp_path / "shop"
    listen = 'proxy_from = ["127.0.0.0/8"]\n'
    other = LINE.replace(b"192.0.2.7", b"192.0.2.8")
    with (
        socket.socket(socket.AF_UNIX) as backend,
        broker(listen, service(path, "relay"), limits=Limits(most_per_source=2)) as (engine, port),
    ):
        backend.bind(str(path))
        backend.listen()
        clients = [connect(port) for _ in range(5)]
        for client, header in zip(clients, (LINE, LINE, other, other, LINE), strict=True):
            client.sendall(header + REQUEST)
        now = engine.wait_for(lambda now: now.ended_over_source == 1 and now.relaying_now == 4, PATIENCE_S)
        assert (now.ended_over_source, now.relaying_now) == (1, 4)
        for client in clients:
            client.close()


@CARRIERS
def test_a_header_goes_in_and_another_out(tmp_path: Path, carrier: CarrierName) -> None:
    path = tmp_path / "shop"
    options = service(path, "relay") + "proxy = 1\n"
    route = '[[route]]\nsource = "192.0.2.0/24"\ndestination_port = 443\nto = "service:shop.example"\n'
    with (
        socket.socket(socket.AF_UNIX) as backend,
        broker('proxy_from = ["127.0.0.1"]\nproxy_optional = true\nsniff_ms = 200\n', options + route, carrier) as (
            engine,
            port,
        ),
    ):
        backend.bind(str(path))
        backend.listen()
        backend.settimeout(PATIENCE_S)
        # Found by the endpoints that the header names: the client is silent.
        with connect(port) as client:
            client.sendall(BINARY)
            with backend.accept()[0] as served:
                assert served.recv(100) == LINE
                served.sendall(b"220 hello")
                assert client.recv(100) == b"220 hello"
                client.sendall(b"quit")
                assert served.recv(100) == b"quit"
        # Without a header the socket's own are meant, which have no route.
        with connect(port) as client, pytest.raises(ConnectionResetError):
            client.recv(1)
        engine.wait_for(lambda now: now.ended_sniff_deadline == 1, PATIENCE_S)


@CARRIERS
def test_a_declined_request_does_not_reach_who_is_handed_the_socket(tmp_path: Path, carrier: CarrierName) -> None:
    path = tmp_path / "db"
    startup = b"\0\0\0\x14\0\x03\0\0user\0alice\0\0"
    route = '[[route]]\nuser = "alice"\nto = "service:db"\n'
    with (
        door(path) as taken,
        broker('postgres_tls = "declined"\n', service(path, name="db") + route, carrier) as (_, port),
        connect(port) as client,
    ):
        client.sendall(TLS_REQUEST)
        assert client.recv(10) == b"N"
        client.sendall(startup)
        client.shutdown(socket.SHUT_WR)
        note, said = taken()
    assert (said, note.service, note.seen_bytes) == (startup, "db", len(startup))


def test_what_a_listener_cannot_mean_is_said() -> None:
    listen = '[[listen]]\naddress = "127.0.0.1:1"\n'
    for line, key in (
        ('proxy_from = ["10.0.0.1/8"]', r"line 3, listen\[0\].proxy_from"),
        ("proxy_optional = true", r"line 3, listen\[0\].proxy_optional: there is no proxy_from"),
        ('postgres_tls = "yes"', r"line 3, listen\[0\].postgres_tls"),
    ):
        with pytest.raises(BadConfig, match=key):
            BrokerFile.parse((listen + line + "\n").encode(), "test")
