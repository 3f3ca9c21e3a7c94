"""The service's side of a handoff: notes, datagrams that bring nothing, and clients that come through a broker."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from fourtuple.service import Handed, Listener, Note, receive, start_server
from fourtuple.tuples import Endpoint
from tests.unit.handing import NO_HANDOFFS, VECTOR, connection, hand_over, no_handoffs, open_descriptors, send

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


def test_what_is_no_handoff_is_passed_over_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "service"
    with Listener(path) as listener:
        before = open_descriptors()
        no_handoffs(path)
        client = hand_over(path)
        with client, listener.accept().socket as handed:
            handed.sendall(b"hello")
            assert client.recv(5) == b"hello"
        assert open_descriptors() == before
        no_handoffs(path)
        for _ in range(NO_HANDOFFS):
            with pytest.raises(ValueError, match=r"wanted|no TCP socket|not connected|note|bytes"):
                receive(listener.socket)
        # Many descriptors, of which the kernel closes those that have no room; and an empty datagram.
        with connection() as (_, accepted):
            send(path, VECTOR, *[accepted.fileno()] * 100)
        send(path, b"")
        for _ in range(2):
            with pytest.raises(ValueError, match="was wanted"):
                receive(listener.socket)
        assert open_descriptors() == before
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not path.exists()


def test_without_a_free_descriptor_no_client_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "service"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Listener(path) as listener, hand_over(path) as client:
        used = os.dup(listener.fileno())
        os.close(used)
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                listener.accept()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with listener.accept().socket as handed:
            handed.sendall(b"hello")
        assert client.recv(5) == b"hello"


def test_a_stale_socket_file_is_replaced_and_another_is_not(tmp_path: Path) -> None:
    path = tmp_path / "service"
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind) as dead:
            dead.bind(str(path))
        with Listener(path), pytest.raises(BadConfig, match="in use"):
            Listener(path)
        with socket.socket(socket.AF_UNIX, kind) as live:
            live.bind(str(path))
            if kind == socket.SOCK_STREAM:
                live.listen()
            with pytest.raises(BadConfig, match="in use"):
                Listener(path)
        path.unlink()
    path.write_text("mine")
    with pytest.raises(BadConfig):
        Listener(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("mode", "umask"), [(0o600, 0), (0o660, 0o077), (0o600, 0o777)])
def test_the_mode_is_the_one_that_is_asked_for(tmp_path: Path, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        with Listener(tmp_path / "service", mode=mode) as listener:
            assert stat.S_IMODE(listener.path.stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_service_that_leaves_serves_who_is_queued_and_its_successor_the_others(tmp_path: Path) -> None:
    path = tmp_path / "service"
    old = Listener(path)
    with hand_over(path) as first, hand_over(path) as second:
        rest = old.drain()
        with pytest.raises(FileNotFoundError):
            hand_over(path)
        with Listener(path) as new, hand_over(path) as third:
            for client, handed in zip((first, second), rest, strict=True):
                with handed.socket:
                    handed.socket.sendall(b"old")
                assert client.recv(3) == b"old"
            with new.accept().socket as taken:
                taken.sendall(b"new")
            assert third.recv(3) == b"new"
            old.close()
            assert path.exists(), "it is another's by now"


def test_who_waits_hears_that_there_is_nothing_more(tmp_path: Path) -> None:
    heard: list[OSError] = []
    listener = Listener(tmp_path / "service")

    def wait() -> None:
        try:
            listener.accept()
        except OSError as error:
            heard.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    # It sleeps in recvmsg(), or has not come there yet: either way it hears of it.
    send(listener.path, b"no note")
    listener.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert heard[0].errno in (errno.EINVAL, errno.EBADF)


def test_processes_that_share_the_socket_share_the_queue(tmp_path: Path) -> None:
    path = tmp_path / "service"
    program = (
        "import socket, sys; from fourtuple.service import receive; source = socket.socket(fileno=int(sys.argv[1]))\n"
        "with receive(source).socket as client: client.sendall(sys.argv[2].encode())"
    )
    with Listener(path) as listener:
        children = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(listener.fileno()), word], pass_fds=[listener.fileno()]
            )
            for word in ("a", "b")
        ]
        said = []
        for _ in children:
            with hand_over(path) as client:
                client.settimeout(PATIENCE_S)
                said.append(client.recv(1))
        assert [child.wait(PATIENCE_S) for child in children] == [0, 0]
    assert sorted(said) == [b"a", b"b"]


def test_an_asyncio_service_passes_over_what_is_no_handoff_and_drains(tmp_path: Path) -> None:
    path = tmp_path / "service"

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Note) -> None:
        writer.write(await reader.readexactly(1) + note.service.encode())
        await writer.drain()

    async def scene() -> list[bytes]:
        before = open_descriptors()
        async with await start_server(connected, path) as server:
            no_handoffs(path)
            clients = [hand_over(path) for _ in range(2)]
            # Nobody has been taken yet: this coroutine has not waited.
            leaving = asyncio.ensure_future(server.drain())
            await asyncio.sleep(0)
            assert not path.exists()
            for client in clients:
                client.sendall(b"x")
            await leaving
            said = [client.recv(100) for client in clients]
            for client in clients:
                client.close()
        assert open_descriptors() == before
        return said

    assert asyncio.run(scene()) == [b"xshop"] * 2


def test_an_asyncio_service_without_a_free_descriptor_says_so_and_goes_on_later(tmp_path: Path) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Note) -> None:
        writer.write(b"hello")

    async def scene() -> None:
        loop, said = asyncio.get_running_loop(), asyncio.Queue[object]()
        loop.set_exception_handler(lambda _, context: said.put_nowait(context["exception"]))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with await start_server(connected, tmp_path / "service"):
            with hand_over(tmp_path / "service") as client:
                used = os.dup(client.fileno())
                os.close(used)
                resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
                try:
                    error = await asyncio.wait_for(said.get(), PATIENCE_S)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert isinstance(error, OSError)
                assert error.errno == errno.EMFILE
                client.setblocking(False)
                assert await asyncio.wait_for(loop.sock_recv(client, 5), PATIENCE_S) == b"hello"

    asyncio.run(scene())


def test_an_asyncio_service_that_closes_leaves_nothing_open(tmp_path: Path) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Note) -> None:
        await reader.read()

    async def scene() -> None:
        before = open_descriptors()
        server = await start_server(connected, tmp_path / "service")
        with hand_over(tmp_path / "service"), hand_over(tmp_path / "service") as client:
            await asyncio.sleep(0)
            await server.close()
            client.settimeout(PATIENCE_S)
            assert client.recv(1) == b""
        assert open_descriptors() == before

    asyncio.run(scene())


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


@pytest.mark.parametrize("carrier", CARRIERS, ids=lambda carrier: carrier.value)
def test_services_that_follow_one_another_lose_no_client(tmp_path: Path, carrier: CarrierName) -> None:
    path = tmp_path / "shop"
    enough = [threading.Event() for _ in range(5)]
    served: Counter[int] = Counter()
    serving: list[threading.Thread] = []

    def answer(handed: Handed, number: int) -> None:
        with handed.socket:
            handed.socket.recv(4096)
            handed.socket.sendall(b"served")
        served[number] += 1
        if served[number] == 20:
            enough[number].set()

    def serve(listener: Listener, number: int) -> None:
        # An OSError is the end of its place, which the main thread has brought about.
        with suppress(OSError):
            while True:
                answer(listener.accept(), number)

    def ask(port: int) -> list[bytes]:
        said = []
        while not enough[-1].is_set():
            said.append(asked(port, "shop.example")[1])
        return said

    with broker(service("shop.example", path), carrier) as (engine, port), ThreadPoolExecutor(8) as threads:
        listener = Listener(path)
        asking = [threads.submit(ask, port) for _ in range(8)]
        for number in range(5):
            serving.append(threading.Thread(target=serve, args=(listener, number)))
            serving[-1].start()
            assert enough[number].wait(PATIENCE_S)
            if number < 4:
                leaving, listener = listener, Listener(path, replace=True)
                for handed in leaving.drain():
                    answer(handed, number)
        said = [one for client in asking for one in client.result(PATIENCE_S)]
        listener.close()
        for thread in serving:
            thread.join(PATIENCE_S)
        ended = reasons(engine.wait_for(lambda now: now.ended_handed_off >= len(said), PATIENCE_S))
    assert set(said) == {b"served"}
    assert ended == {"handed_off": len(said)}
    assert not path.exists()


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
    trusting = BrokerFile.parse((listen + 'proxy_from = ["10.0.0.0/8"]\n').encode(), "test")
    with pytest.raises(BadConfig, match="proxy_from"), running(trusting):
        pass
    both = BrokerFile.parse((listen + service("a", tmp_path / "a")).encode(), "test")
    with pytest.raises(BadConfig, match="--store"), running(both, store=tmp_path):
        pass
    with pytest.raises(BadConfig, match="store"), running(BrokerFile.parse(listen.encode(), "test"), store=tmp_path):
        pass
