"""`fourtuple load` against real servers that speak their own way, also where they have had enough: HAProxy in front of
nginx, PostgreSQL, Redis at its bound of clients.

nginx, Redis and a WebSocket server as they are meant to be used are in test_load.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fourtuple.lab import Lab
from tests.netns.loading import cause, program, run_load, serving, web_server

Loaded = Callable[..., dict[str, Any]]
NOBODY = 65_534
MOST_CLIENTS = 40
"""Of PostgreSQL here."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(("client", "server")) as made:
        yield made


@pytest.fixture
def load(lab: Lab) -> Loaded:
    return lambda *options: run_load(lab, lab["client"], *options)


# HAProxy, which passes on to nginx


@pytest.fixture(scope="module")
def haproxy(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address: TCP on port 8100, HTTP on 8101, and on 8102 HTTP for 50 connections at once."""
    program("haproxy")
    configuration = tmp_path_factory.mktemp("haproxy") / "haproxy.cfg"
    with web_server(lab, tmp_path_factory.mktemp("nginx")) as address:
        configuration.write_text(
            textwrap.dedent(f"""
                global
                    maxconn 2000
                defaults
                    timeout connect 5s
                    timeout client 30s
                    timeout server 30s
                listen bytes
                    mode tcp
                    bind {address}:8100 backlog 4096
                    server nginx {address}:8080
                listen requests
                    mode http
                    bind {address}:8101 backlog 4096
                    server nginx {address}:8080
                listen narrow
                    mode http
                    maxconn 50
                    bind {address}:8102 backlog 4096
                    server nginx {address}:8080
                """)
        )
        with serving(lab, "haproxy", "-db", "-q", "-f", str(configuration), port=8101) as address:
            yield address


@pytest.mark.parametrize("port", [8100, 8101], ids=["tcp", "http"])
def test_haproxy_passes_on(load: Loaded, haproxy: str, port: int) -> None:
    report = load(f"http://{haproxy}:{port}/", "-c", "300", "--duration", "1", "--ping-every", "0.3", "--window", "64")
    assert (report["status"], report["held"], report["stopped_by"]) == (0, 300, None)
    assert (report["rounds_failed"], report["closed_by_peer"]) == (0, 0)
    assert report["rounds_right"] >= 600


def test_haproxy_passes_on_what_nginx_refuses(load: Loaded, haproxy: str) -> None:
    report = load(f"http://{haproxy}:8101/no", "-c", "20", "--duration", "0.5")
    found = cause(report, what="it answers with an error status")
    assert (found["side"], found["count"]) == ("the other side", report["rounds"])


def test_haproxy_at_its_maxconn(load: Loaded, haproxy: str) -> None:
    report = load(f"http://{haproxy}:8102/", "-c", "120", "--duration", "1", "--answer-timeout", "0.5")
    missing = next(one for one in report["causes"] if one["what"].startswith("connected, but it does not answer"))
    assert (missing["side"], report["held"]) == ("the other side", 120), "the kernel accepts what HAProxy does not"
    assert "accept-at-limit" in missing["limits"]
    assert missing["count"] >= 70
    assert report["rounds_right"] >= 50


# PostgreSQL


@pytest.fixture(scope="module")
def postgres(lab: Lab) -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("PostgreSQL does not run as root, which everybody is in a lab made without root")
    # Not below pytest's folder, which is root's alone.
    folder = Path(tempfile.mkdtemp(prefix="fourtuple-postgres-"))
    as_nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env", f"HOME={folder}")
    try:
        os.chown(folder, NOBODY, NOBODY)
        data = str(folder / "data")
        made = [*as_nobody, program("initdb"), "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "--locale=C"]
        subprocess.run(made, check=True, capture_output=True, timeout=60)
        (folder / "data" / "pg_hba.conf").write_text("host all all 0.0.0.0/0 trust\n")
        settings = ("listen_addresses=*", f"max_connections={MOST_CLIENTS}", "superuser_reserved_connections=1",
                    "fsync=off", "shared_buffers=16MB", f"unix_socket_directories={folder}", "max_wal_senders=0",
                    "autovacuum=off", "logging_collector=off", "log_destination=stderr",
                    "log_min_messages=panic")  # fmt: skip
        options = [word for setting in settings for word in ("-c", setting)]
        with serving(lab, "postgres", "-D", data, *options, port=5432, prefix=as_nobody) as address:
            yield address
    finally:
        shutil.rmtree(folder)


POSTGRES_SCRIPT = '''
"""Frontend/backend protocol 3.0 (PostgreSQL's documentation, "Message Formats"): a message is its kind, its length
including the length itself, and its body; the very first has no kind."""

import struct

from fourtuple.dialogue import Dialogue, Expect, Say, Until


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack(">I", len(body) + 4) + body


READY = message(b"Z", b"I")
PROTOCOL_3 = struct.pack(">I", 196_608)
startup = message(b"", PROTOCOL_3 + b"user\\0postgres\\0database\\0postgres\\0\\0")
dialogue = Dialogue(
    opening=(Say(startup), Expect(message(b"R", bytes(4))), Until(READY)),
    round=(Say(message(b"Q", b"QUERY\\0")), Expect(b"T"), Until(message(b"C", b"SELECT 1\\0") + READY)),
)
'''


@pytest.fixture
def ask(load: Loaded, postgres: str, tmp_path: Path) -> Loaded:
    """A load run in which each connection asks a query in each round."""

    def run(query: str, *options: str) -> dict[str, Any]:
        script = tmp_path / "postgres.py"
        script.write_text(POSTGRES_SCRIPT.replace("QUERY", query))
        return load(f"tcp://{postgres}:5432", "--script", str(script), *options)

    return run


def test_postgres_answers_queries(ask: Loaded) -> None:
    report = ask("SELECT 1", "-c", "30", "--duration", "1", "--ping-every", "0.2")
    assert (report["status"], report["held"], report["openings_right"]) == (0, 30, 30)
    assert (report["rounds_failed"], report["closed_by_peer"]) == (0, 0)
    assert report["rounds_right"] >= 60


def test_postgres_says_that_a_query_is_wrong(ask: Loaded) -> None:
    report = ask("SELECT 1/0", "-c", "10", "--duration", "0.5")
    found = next(one for one in report["causes"] if one["what"].startswith("it answers with other bytes"))
    assert (found["side"], found["count"], report["openings_right"]) == ("the other side", 10, 10)


def test_postgres_has_too_many_clients(ask: Loaded) -> None:
    report = ask("SELECT 1", "-c", str(2 * MOST_CLIENTS), "--duration", "0.5", "--no-replace")
    assert (report["status"], report["stopped_by"]) == (1, "the other side")
    assert MOST_CLIENTS - 2 <= report["openings_right"] <= MOST_CLIENTS
    found = next(one for one in report["causes"] if one["what"].startswith("the opening handshake is garbled"))
    assert found["side"] == "the other side"


# Redis


def test_redis_at_its_maxclients(load: Loaded, lab: Lab) -> None:
    options = ("--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--maxclients", "50")
    with serving(lab, "redis-server", "--port", "6380", *options, port=6380) as address:
        report = load(
            f"tcp://{address}:6380", "-c", "150", "--say", r"PING\r\n", "--expect", r"+PONG\r\n",
            "--duration", "0.8", "--no-replace",
        )  # fmt: skip
    assert (report["status"], report["stopped_by"]) == (1, "the other side")
    assert "accept-at-limit" in cause(report, what="it closes connections that we hold")["limits"]
    assert 40 <= report["held"] <= 50
