"""Requests to cancel through `fourtuple serve`: a query of one of two PostgreSQL clusters is cancelled, whose key the
broker has overheard, or could not."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.netns.brokering import wait_for
from tests.netns.test_serve_postgres import CARRIERS, Clusters, asked, broker, clusters, psql, served

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")

__all__ = ["clusters"]
SLEEPS = "select pg_sleep(60)"


def sleeping(clusters: Clusters, name: str) -> int:
    """How many sleep there."""
    query = f"select count(*) from pg_stat_activity where query = '{SLEEPS}' and state = 'active'"
    return int(asked(clusters.ports[name], "localhost", "disable", query))


@contextmanager
def query(port: int, name: str, sslmode: str) -> Iterator[Any]:
    """A connection in which a query sleeps that has to be cancelled."""
    where = f"host={name}.pg.example.com hostaddr=127.0.0.1 port={port} sslmode={sslmode} gssencmode=disable"
    ended: list[BaseException] = []

    def run() -> None:
        try:
            connection.execute(SLEEPS)
        except psycopg.Error as error:
            ended.append(error)

    with psycopg.connect(f"{where} user=postgres dbname=d_{name}", autocommit=True) as connection:
        thread = threading.Thread(target=run)
        thread.start()
        yield connection
        thread.join(30)
        assert not thread.is_alive()
        assert isinstance(ended[0], psycopg.errors.QueryCanceled), ended


@CARRIERS
@pytest.mark.parametrize("sslmode", ["disable", "require"])
def test_a_query_is_cancelled_in_its_cluster(tmp_path: Path, clusters: Clusters, carrier: str, sslmode: str) -> None:
    with broker(tmp_path, clusters, carrier) as (port, counted):
        queries = (query(port, name, sslmode) for name in ("one", "two"))
        with next(queries) as first, next(queries) as second:
            wait_for(lambda: sleeping(clusters, "one") == 1 and sleeping(clusters, "two") == 1)
            for connection, name, other in ((first, "one", "two"), (second, "two", "one")):
                before = sleeping(clusters, other)
                connection.cancel()
                wait_for(lambda name=name: sleeping(clusters, name) == 0)  # type: ignore[misc]
                assert sleeping(clusters, other) == before
    assert served(counted) == 4


def test_a_wrong_key_cancels_nothing(tmp_path: Path, clusters: Clusters) -> None:
    with broker(tmp_path, clusters, "uring") as (port, counted), query(port, "one", "disable") as connection:
        wait_for(lambda: sleeping(clusters, "one") == 1)
        process = connection.info.backend_pid
        for secret in (0, 0xFFFFFFFF):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                client.sendall(struct.pack("!IIII", 16, 80_877_102, process, secret))
                assert client.recv(1) == b""
        assert sleeping(clusters, "one") == 1
        connection.cancel()
    assert served(counted) == 4


def test_the_usual_psql_is_cancelled(tmp_path: Path, clusters: Clusters) -> None:
    """Ctrl-C of psql, which opens a connection of its own."""
    with broker(tmp_path, clusters, "uring") as (port, _):
        command = [*psql(port, "two.pg.example.com", "require", database="d_two"), "-c", SLEEPS]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
            wait_for(lambda: sleeping(clusters, "two") == 1)
            running.send_signal(signal.SIGINT)
            output, _ = running.communicate(timeout=30)
        assert "canceling statement due to user request" in output
