"""Real clients of services that cannot be started: each is told so in its protocol, and says what it has understood."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from select import select

import pytest

from fourtuple.engine import BrokerConfig, BrokerListener, Engine
from fourtuple.questions import Failed, Wake
from fourtuple.registry import sealed
from fourtuple.services import Match, Route, Service
from fourtuple.tuples import Endpoint
from tests.netns.brokering import PATIENCE_S, free_port, needed

PROTOCOLS = ("redis", "postgres", "mqtt", "ssh")


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a broker all of whose services sleep, and cannot be started."""
    folder: Path = tmp_path_factory.mktemp("sleepers")
    port, names = free_port(), ("app.test", *PROTOCOLS)
    services = [Service(name=name, target=f"unix:{folder}/{name}", start="never") for name in names]
    routes = [Route(match=Match(protocol=protocol), to=f"service:{protocol}") for protocol in PROTOCOLS]
    listener = BrokerListener(endpoint=Endpoint(ip_address("127.0.0.1"), port), default="service:app.test")
    config = BrokerConfig(listeners=(listener,), store=sealed(services, routes), delivery_timeout_s=PATIENCE_S)
    with Engine.start(config) as engine, failing(engine):
        engine.wait_for(lambda now: now.listening_now == engine.workers, PATIENCE_S)
        yield port


@contextmanager
def failing(engine: Engine) -> Iterator[None]:
    over = threading.Event()

    def answer() -> None:
        while not over.is_set():
            select([engine.questions_fd], [], [], 0.1)
            for question in engine.questions():
                if isinstance(question, Wake):
                    engine.answer(Failed(question.service))

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def said(*command: str, stdin: str | None = "") -> str:
    """What a client prints."""
    needed(command[0])
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return done.stdout + done.stderr


def test_curl_reads_503_and_when_to_come_again(port: int) -> None:
    resolve = ("--resolve", f"app.test:{port}:127.0.0.1", "-sS", "-i")
    for version in ("--http1.1", "--http2-prior-knowledge"):
        text = said("curl", *resolve, version, f"http://app.test:{port}/").lower()
        assert text.startswith(("http/1.1 503", "http/2 503")), text
        assert "retry-after: 5" in text
    assert "http/1.1 503" in said("curl", *resolve, "--head", f"http://app.test:{port}/").lower()


def test_openssl_reads_an_alert(port: int) -> None:
    text = said("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "app.test", "-tls1_3")
    assert "alert internal error" in text, text


def test_psql_reads_that_it_cannot_connect_now(port: int) -> None:
    where = f"host=127.0.0.1 port={port} user=a dbname=a connect_timeout=10 gssencmode=disable"
    text = said("psql", f"{where} sslmode=disable", "-c", "select 1")
    assert "FATAL" in text, text
    assert "could not be started" in text


def test_redis_cli_reads_that_it_is_loading(port: int) -> None:
    assert "LOADING" in said("redis-cli", "-p", str(port), "ping")


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
def test_mosquitto_reads_that_the_server_is_unavailable(port: int, version: str) -> None:
    command = ("mosquitto_pub", "-p", str(port), "-V", version, "-t", "a", "-m", "b", "-i", "me")
    text = said(*command).lower()
    assert "unavailable" in text, text


def test_ssh_reads_why(port: int) -> None:
    options = ("-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")
    text = said("ssh", "-F", "none", *options, "-p", str(port), "someone@127.0.0.1")
    assert "could not be started" in text, text
