"""Services that sleep: the engine asks, the test answers and starts them, and clients get through or are told."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from fourtuple.engine import BrokerConfig, BrokerListener, CarrierName, Engine, uring_abilities
from fourtuple.errors import FourtupleError
from fourtuple.questions import Answer, Failed, Held, Question, Refused, Slept, Up, Usage, Wake
from fourtuple.registry import sealed
from fourtuple.services import Delivery, Service
from fourtuple.tuples import Endpoint

PATIENCE_S = 30.0
HOST = ip_address("127.0.0.1")


def request(name: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(params=["epoll", "uring"])
def carrier(request: pytest.FixtureRequest) -> CarrierName:
    name = CarrierName(request.param)
    if name is CarrierName.URING:
        try:
            if not uring_abilities()["lent_descriptors"]:
                pytest.skip("io_uring here cannot lend a descriptor")
        except FourtupleError as error:
            pytest.skip(f"no io_uring: {error}")
    return name


@contextmanager
def broker(
    services: list[Service], carrier: CarrierName, limits: dict[str, Any] | None = None, workers: int = 2
) -> Iterator[tuple[Engine, int]]:
    """An engine for these services, and its port."""
    port = free_port()
    config = BrokerConfig(
        listeners=(BrokerListener(endpoint=Endpoint(HOST, port)),),
        store=sealed(services, []),
        **{"delivery_timeout_s": PATIENCE_S, **(limits or {})},
    )
    with Engine.start(config, carrier, workers=workers) as engine:
        engine.wait_for(lambda now: now.listening_now == engine.workers, PATIENCE_S)
        yield engine, port


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), PATIENCE_S, source_address=(source, 0))
    client.settimeout(PATIENCE_S)
    return client


def rest(client: socket.socket) -> bytes:
    """What comes until the end; `ConnectionResetError` where it is cut."""
    heard = b""
    while block := client.recv(65_536):
        heard += block
    return heard


def wait_until(engine: Engine, counter: str, count: int) -> bool:
    return bool(engine.wait_for(lambda now: getattr(now, counter) == count, PATIENCE_S))


class Outside:
    """Answers questions in a thread, as a supervisor would."""

    def __init__(self, engine: Engine, answer: Callable[[Question], Answer | None]) -> None:
        self.asked: list[Question] = []
        self._engine, self._answer = engine, answer
        self._over, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._engine.questions_fd, selectors.EVENT_READ)
            selector.register(self._over, selectors.EVENT_READ)
            while not any(key.fileobj is self._over for key, _ in selector.select()):
                for question in self._engine.questions():
                    self.asked.append(question)
                    if (answer := self._answer(question)) is not None:
                        self._engine.answer(answer)

    def wait_for(self, count: int, kind: type[Question]) -> list[Any]:
        """The first so many questions of a kind."""
        until_s = time.monotonic() + PATIENCE_S
        while len(found := [one for one in self.asked if isinstance(one, kind)]) < count:
            assert time.monotonic() < until_s, f"{len(found)} of {count}"
            time.sleep(0.005)
        return found

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wake.close()
        self._thread.join()
        self._over.close()


@contextmanager
def answering(path: Path, backlog: int = 4_096) -> Iterator[None]:
    """A service that answers each connection with what it has heard, and closes."""

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                client.settimeout(PATIENCE_S)
                client.sendall(b"heard " + client.recv(4096))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(backlog)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE_S)
            path.unlink()


def sleeper(path: Path, name: str = "app.test", patience_ms: int | None = None) -> Service:
    return Service(name=name, target=f"unix:{path}", start="app", patience_ms=patience_ms)


def test_many_wait_for_one_service_and_all_get_through(tmp_path: Path, carrier: CarrierName) -> None:
    path, count = tmp_path / "app.sock", 1_000
    with ExitStack() as stack:
        engine, port = stack.enter_context(broker([sleeper(path)], carrier))
        clients = [stack.enter_context(connect(port)) for _ in range(count)]
        for client in clients:
            client.sendall(request("app.test"))
        engine.wait_for(lambda now: now.parked_now == count, PATIENCE_S)
        asked = engine.questions()
        assert 1 <= len(asked) <= engine.workers, "each worker asks once"
        first = asked[0]
        assert isinstance(first, Wake)
        assert (first.service, first.start, first.target) == ("app.test", "app", f"unix:{path}")
        assert (first.name, first.protocol) == ("app.test", "http1")
        assert first.peer is not None
        assert first.peer.address == HOST
        stack.enter_context(answering(path))
        engine.answer(Up("app.test"))
        for client in clients:
            assert rest(client) == b"heard " + request("app.test")
        with connect(port) as late:
            late.sendall(request("app.test"))
            assert rest(late) == b"heard " + request("app.test")
        now = engine.wait_for(lambda now: now.ended_relayed == count + 1, PATIENCE_S)
        assert (now.parked_now, now.wakes_asked) == (0, len(asked))
        assert engine.questions() == []


def test_who_fails_to_start_ends_those_who_wait_and_is_asked_for_again(tmp_path: Path, carrier: CarrierName) -> None:
    path = tmp_path / "app.sock"
    with broker([sleeper(path)], carrier) as (engine, port), Outside(engine, lambda _: Failed("app.test")) as outside:
        for number in range(2):
            with connect(port) as client, suppress(ConnectionResetError):
                client.sendall(request("app.test"))
                rest(client)
            assert wait_until(engine, "ended_start_failed", number + 1)
        assert len(outside.wait_for(2, Wake)) == 2


def test_a_refusal_ends_those_of_that_prefix_and_the_next_asks_anew(tmp_path: Path, carrier: CarrierName) -> None:
    path = tmp_path / "app.sock"
    with ExitStack() as stack:
        engine, port = stack.enter_context(broker([sleeper(path)], carrier, workers=1))
        bad = [stack.enter_context(connect(port, "127.0.0.66")) for _ in range(3)]
        for client in bad:
            client.sendall(request("app.test"))
        engine.wait_for(lambda now: now.parked_now == 3, PATIENCE_S)
        good = stack.enter_context(connect(port, "127.0.0.7"))
        good.sendall(request("app.test"))
        engine.wait_for(lambda now: now.parked_now == 4, PATIENCE_S)
        (asked,) = engine.questions()
        assert isinstance(asked, Wake)
        assert asked.peer is not None
        engine.answer(Refused("app.test", asked.peer.address))
        engine.wait_for(lambda now: now.ended_wake_refused == 3, PATIENCE_S)
        (again,) = engine.questions()
        assert isinstance(again, Wake)
        assert again.peer is not None
        assert again.peer.address == ip_address("127.0.0.7")
        stack.enter_context(answering(path))
        engine.answer(Up("app.test"))
        assert rest(good) == b"heard " + request("app.test")


def test_a_service_is_held_while_it_is_stopped(tmp_path: Path, carrier: CarrierName) -> None:
    path = tmp_path / "app.sock"
    with ExitStack() as stack:
        engine, port = stack.enter_context(broker([sleeper(path)], carrier, workers=1))
        outside = stack.enter_context(Outside(engine, lambda _: None))
        running = stack.enter_context(ExitStack())
        running.enter_context(answering(path))
        engine.answer(Up("app.test"))
        live = stack.enter_context(connect(port))
        live.sendall(b"GET / HTTP/1.1\r\nHost: app.test\r\n\r")
        live.sendall(b"\n")
        assert rest(live)
        engine.wait_for(lambda now: now.ended_relayed == 1, PATIENCE_S)
        engine.ask_usage(7, ["app.test", "nobody.test"])
        (usage,) = outside.wait_for(1, Usage)
        assert (usage.ticket, [row.live for row in usage.rows]) == (7, [0, 0])
        assert usage.rows[0].unused_s is not None
        assert usage.rows[1].unused_s is None
        engine.hold("app.test")
        (held,) = outside.wait_for(1, Held)
        assert (held.service, held.live) == ("app.test", 0)
        waiting = stack.enter_context(connect(port))
        waiting.sendall(request("app.test"))
        engine.wait_for(lambda now: now.parked_now == 1, PATIENCE_S)
        assert not [one for one in outside.asked if isinstance(one, Wake)], "nobody asks who is held"
        running.close()
        engine.answer(Slept("app.test"))
        outside.wait_for(1, Wake)
        running.enter_context(answering(path))
        engine.answer(Up("app.test"))
        assert rest(waiting) == b"heard " + request("app.test")


@pytest.mark.parametrize("limits", [{"most_parked": 4}, {"most_parked_per_service": 4}, {"parked_bytes": 4 * 65_600}])
def test_waiting_is_bounded(tmp_path: Path, carrier: CarrierName, limits: dict[str, Any]) -> None:
    path = tmp_path / "app.sock"
    with ExitStack() as stack:
        engine, port = stack.enter_context(broker([sleeper(path)], carrier, limits, workers=1))
        clients = [stack.enter_context(connect(port)) for _ in range(10)]
        for client in clients:
            client.sendall(request("app.test"))
        now = engine.wait_for(lambda now: now.ended_over_parked == 6, PATIENCE_S)
        assert now.parked_now == 4


def test_without_answers_patience_ends_it(tmp_path: Path, carrier: CarrierName) -> None:
    service = sleeper(tmp_path / "app.sock", patience_ms=50)
    with broker([service], carrier) as (engine, port), connect(port) as client, suppress(ConnectionResetError):
        client.sendall(request("app.test"))
        rest(client)
        engine.wait_for(lambda now: now.ended_service_absent == 1, PATIENCE_S)


def test_who_leaves_before_it_is_settled_wakes_nothing(tmp_path: Path, carrier: CarrierName) -> None:
    path = tmp_path / "app.sock"
    with broker([sleeper(path)], carrier, {"settle_s": 0.05}) as (engine, port), connect(port) as client:
        client.sendall(request("app.test"))
        engine.wait_for(lambda now: now.parked_now == 1, PATIENCE_S)
        engine.wait_for(lambda now: now.wakes_asked == 1, PATIENCE_S)


def test_inetd_gives_the_socket_to_the_supervisor(tmp_path: Path, carrier: CarrierName) -> None:
    from fourtuple.service import Listener

    path = tmp_path / "supervisor.sock"
    service = Service(name="app.test", target="unix:@unused", delivery=Delivery.INETD, start="app")
    with Listener(path) as listener, broker([service], carrier, {"inetd_path": path}) as (engine, port):
        with connect(port) as client:
            client.sendall(request("app.test"))
            handed = listener.accept()
            with handed.socket as taken:
                taken.settimeout(PATIENCE_S)
                assert taken.recv(4096) == request("app.test")
                taken.sendall(b"done")
            assert rest(client) == b"done"
        assert handed.note.service == "app.test"
        assert engine.wait_for(lambda now: now.ended_handed_off == 1, PATIENCE_S).wakes_asked == 0


@contextmanager
def failing(carrier: CarrierName, *services: Service) -> Iterator[tuple[Engine, int]]:
    """A broker whose sleepers cannot be started."""
    with ExitStack() as stack:
        engine, port = stack.enter_context(broker(list(services), carrier))
        stack.enter_context(Outside(engine, _failed))
        yield engine, port


def _failed(question: Question) -> Answer | None:
    return Failed(question.service) if isinstance(question, Wake) else None


def test_who_waited_in_vain_is_told_so_and_not_cut_off(tmp_path: Path, carrier: CarrierName) -> None:
    body = b"x" * 300_000
    post = b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n" % len(body)
    with failing(carrier, sleeper(tmp_path / "app.sock")) as (engine, port):
        for opening in (request("app.test"), post + body):
            with connect(port) as client:
                client.sendall(opening)
                head, _, text = rest(client).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nRetry-After: 5\r\n" in head
            assert text == b"This service could not be started.\n"
        engine.wait_for(lambda now: now.ended_start_failed == 2, PATIENCE_S)


def test_probes_are_answered_and_wake_nothing(tmp_path: Path, carrier: CarrierName) -> None:
    with broker([sleeper(tmp_path / "app.sock")], carrier) as (engine, port):
        for probe in (b"HEAD / HTTP/1.1\r\n", b"GET /healthz HTTP/1.1\r\n"):
            with connect(port) as client:
                client.sendall(probe + b"Host: app.test\r\n\r\n")
                head, _, text = rest(client).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert (text == b"") == probe.startswith(b"HEAD")
        now = engine.wait_for(lambda now: now.ended_answered_asleep == 2, PATIENCE_S)
        assert (now.wakes_asked, now.parked_now) == (0, 0)


def test_who_hangs_up_at_once_wakes_nothing(tmp_path: Path, carrier: CarrierName) -> None:
    with broker([sleeper(tmp_path / "app.sock")], carrier, {"settle_s": 1.0}) as (engine, port):
        with connect(port) as client:
            client.sendall(request("app.test"))
            engine.wait_for(lambda now: now.parked_now == 1, PATIENCE_S)
        with connect(port) as client:
            client.sendall(request("app.test"))
            engine.wait_for(lambda now: now.accepts_succeeded == 2 and now.parked_now >= 1, PATIENCE_S)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        now = engine.wait_for(lambda now: now.ended_client_left == 2, PATIENCE_S)
        assert now.wakes_asked == 0
