"""What a broker tells of the connections that it holds: pages, the busiest services, names from accept to close."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fourtuple.control.client import Declined
from tests.netns.brokering import PATIENCE_S, get, wait_for
from tests.netns.controlling import Controlled, controlled, end

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
EACH = {1: 12, 2: 7, 3: 2, 4: 1}
"""Service, and connections to it."""


@contextmanager
def answering(path: Path) -> Iterator[None]:
    """A service that answers each request and keeps the connection."""
    loop = asyncio.new_event_loop()
    over = asyncio.Event()
    ready = threading.Event()

    async def serve() -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while await reader.readuntil(b"\r\n\r\n"):
                    writer.write(ANSWER)
            except (asyncio.IncompleteReadError, OSError):
                pass
            finally:
                writer.close()

        async with await asyncio.start_unix_server(connected, path):
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(PATIENCE_S)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(PATIENCE_S)
        end(loop)


@pytest.fixture(params=["uring", "epoll"])
def broker(request: pytest.FixtureRequest) -> Iterator[Controlled]:
    with controlled("--carrier", request.param, "--steps", services=100) as made, answering(made.folder / "service"):
        yield made


@pytest.fixture
def any_broker() -> Iterator[Controlled]:
    """Where the carrier is of no matter."""
    with controlled(services=100) as made, answering(made.folder / "service"):
        yield made


@contextmanager
def connected(broker: Controlled, service: int, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    """A client of the service that has been answered; ConnectionError if it is not."""
    with socket.create_connection(("127.0.0.1", broker.port), PATIENCE_S, (source, 0)) as client:
        client.sendall(get(f"s{service}.example.com"))
        if client.recv(100) != ANSWER:
            raise ConnectionAbortedError
        yield client


def all_pages(broker: Controlled, most: int, **query: str | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    after = None
    while True:
        page = broker.ask("GET", "/v1/connections", most=most, after=after, **query)
        assert len(page["connections"]) <= most
        rows += page["connections"]
        if (after := page["next"]) is None:
            return rows


def log(broker: Controlled) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (broker.folder / "log").read_text().splitlines()]


def test_what_it_holds_is_told_page_by_page_and_can_be_closed(broker: Controlled) -> None:
    with ExitStack() as stack:
        clients = [
            stack.enter_context(connected(broker, service, f"127.0.0.{service}"))
            for service, count in EACH.items()
            for _ in range(count)
        ]
        silent = stack.enter_context(socket.create_connection(("127.0.0.1", broker.port), PATIENCE_S))
        by_peer = {"{}:{}".format(*client.getsockname()): client for client in (*clients, silent)}
        wait_for(lambda: broker.ask("GET", "/v1/status")["sniffing"] == 1)
        rows = all_pages(broker, 5)
        assert len({row["id"] for row in rows}) == len(rows) == len(by_peer)
        for most in (256, 1):
            assert [row["id"] for row in all_pages(broker, most)] == [row["id"] for row in rows]
        assert {row["peer"] for row in rows} == set(by_peer)
        assert Counter(row["state"] for row in rows) == {"relaying": len(clients), "sniffing": 1}
        for row in rows:
            heard = (len(get(row["service"])), len(ANSWER)) if row["service"] else (0, 0)
            assert (row["bytes_up"], row["bytes_down"]) == heard
            assert row["listener"] == f"127.0.0.1:{broker.port}"
            assert 0 <= row["age_s"] < PATIENCE_S
        for service, count in EACH.items():
            named = all_pages(broker, 3, service=f"s{service}.example.com")
            assert {row["peer"].split(":")[0] for row in named} == {f"127.0.0.{service}"}
            assert [row["id"] for row in named] == [
                row["id"] for row in rows if row["service"] == f"s{service}.example.com"
            ]
            assert len(named) == count == broker.ask("GET", f"/v1/services/s{service}.example.com")["live"]
        assert all_pages(broker, 9, service="s99.example.com") == all_pages(broker, 9, service="nobody's") == []
        assert len(all_pages(broker, 9, source="127.0.0.2/31")) == EACH[2] + EACH[3]
        assert len(all_pages(broker, 9, source="127.0.0.2/31", service="s3.example.com")) == EACH[3]
        assert all_pages(broker, 9, source="::/0") == []

        chosen = next(row for row in rows if row["service"] == "s2.example.com")
        assert broker.ask("DELETE", f"/v1/connections/{chosen['id']}") == {"done": f"closed {chosen['id']}"}
        with pytest.raises(ConnectionResetError):
            by_peer[chosen["peer"]].recv(1)
        wait_for(lambda: len(all_pages(broker, 256)) == len(rows) - 1)
        with pytest.raises(Declined, match="there is no such connection"):
            broker.ask("DELETE", f"/v1/connections/{chosen['id']}")
        # The others have noticed nothing.
        for client in clients:
            if client is not by_peer[chosen["peer"]]:
                client.sendall(get("s1.example.com"))
                assert client.recv(100) == ANSWER

        top = broker.ask("GET", "/v1/services", by="live")["services"]
        expected = EACH | {2: EACH[2] - 1}
        assert top == [
            {"service": f"s{service}.example.com", "amount": count, "over": 0} for service, count in expected.items()
        ]
        assert broker.ask("GET", "/v1/services", by="live", most=2)["services"] == top[:2]
    # Each connection is the same in the survey and in the log, from accept to close.
    wait_for(lambda: len([one for one in log(broker) if one["event"] == "ended"]) == len(rows))
    steps: dict[str, list[dict[str, Any]]] = {}
    for entry in log(broker):
        steps.setdefault(entry["id"], []).append(entry)
    assert set(steps) == {row["id"] for row in rows}
    for row in rows:
        events = [(one["event"], one["peer"], one["service"]) for one in steps[row["id"]]]
        middle = [("found", row["peer"], row["service"]), ("delivered", row["peer"], row["service"])]
        assert events == [
            ("accepted", row["peer"], ""),
            *(middle if row["service"] else []),
            ("ended", row["peer"], row["service"]),
        ]
    # They sort by the time of accept, and say which of the two workers it was.
    first = {entry["id"]: entry["time"] for entry in reversed(log(broker)) if entry["event"] == "accepted"}
    for worker in (0, 1):
        mine = sorted(one for one in first if int(one, 16) % 1_024 == worker)
        assert [first[one] for one in mine] == sorted(first[one] for one in mine)
    assert {int(one, 16) % 1_024 for one in first} <= {0, 1}
    assert steps[chosen["id"]][-1]["reason"] == "stopped"
    total = broker.ask("GET", "/v1/services", by="total")["services"]
    assert total == [
        {"service": f"s{service}.example.com", "amount": count, "over": 0} for service, count in EACH.items()
    ]
    carried = {one["service"]: one["amount"] for one in broker.ask("GET", "/v1/services", by="bytes")["services"]}
    assert carried["s4.example.com"] == len(get("s4.example.com")) + len(get("s1.example.com")) + 2 * len(ANSWER)
    assert broker.metrics("fourtuple_delivery_seconds_count") == len(clients)


def test_limits_change_while_it_runs(any_broker: Controlled) -> None:
    broker = any_broker

    def is_taken() -> bool:
        """Whether another connection is served."""
        try:
            with connected(broker, 5):
                return True
        except ConnectionError:
            return False

    # Of two workers, each has half of it, and at least one.
    with connected(broker, 5):
        broker.ask("PATCH", "/v1/limits", {"most_per_source": 1})
        taken = [is_taken() for _ in range(12)]
        assert not all(taken)
        wait_for(lambda: broker.ask("GET", "/v1/reasons")["over_source"] == taken.count(False))
        broker.ask("PATCH", "/v1/limits", {"most_per_source": 0, "most_per_service": 1})
        taken = [is_taken() for _ in range(12)]
        assert not all(taken)
        wait_for(lambda: broker.ask("GET", "/v1/reasons")["over_service"] == taken.count(False))
        broker.ask("PATCH", "/v1/limits", {"most_per_service": 0})
        assert all(is_taken() for _ in range(12))
