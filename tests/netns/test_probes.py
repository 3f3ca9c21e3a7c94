"""Who only looks wakes nothing: nmap, a TLS scanner, HEAD, health paths, Minecraft's list of servers. A client does."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.netns.brokering import PATIENCE_S, free_port, get, needed, run, said
from tests.netns.waking import Waking, open_folder, table, waking

SLEEPER = Path(__file__).parents[2] / "bench" / "peers" / "sleeper.c"
NAME, OTHER = "c.example.com", "d.example.com"
MOTD = "Asleep. Come in to wake it."
SETTLE_MS = 500
ALERT = bytes((0x15, 3, 3, 0, 2, 2, 80))
"""internal_error (RFC 8446 6.2)."""


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    """A folder with the service's program."""
    needed("gcc")
    with open_folder() as folder:
        subprocess.run(["gcc", "-O2", "-o", folder / "sleeper", SLEEPER], check=True)
        (folder / "run").mkdir()
        yield folder


@pytest.fixture
def port() -> int:
    return free_port()


def broker_file(folder: Path, port: int, *, settle_ms: int = 0, **wake: object) -> str:
    """Every protocol leads to services that sleep."""
    everything = ("redis", "postgres", "ssh", "minecraft", "http1", "http2", "tls", "mqtt", "rtsp", "tcpmux", "amqp")
    rows = [
        table("listen", address=f"127.0.0.1:{port}", sniff_ms=1000),
        table(
            "template",
            name="c",
            argv=[f"{folder}/sleeper", "{name}"],
            socket="pass",
            ready="started",
            idle_s=60,
            output="null",
        ),
        table("service", name=NAME, target=f"unix:{folder}/run/c", start="c"),
        table("service", name=OTHER, target=f"unix:{folder}/run/d", start="c"),
        *(table("route", protocol=name, to=f"service:{NAME}") for name in everything),
    ]
    asleep = table("asleep", motd=MOTD, retry_after_s=7, settle_ms=settle_ms).replace("[[asleep]]", "[asleep]")
    return asleep + table("wake", **wake).replace("[[wake]]", "[wake]") + "".join(rows)


def nothing_was_started(broker: Waking) -> None:
    assert broker.events("service_asked", "service_up", "service_failed", "service_refused") == []
    children = Path(f"/proc/{broker.pid}/task/{broker.pid}/children").read_text().split()
    assert len(children) == 1
    assert list((broker.folder / "run").iterdir()) == []


def a_client_wakes_it(broker: Waking, port: int) -> None:
    assert said(port, get(NAME)) == f"{NAME} heard ".encode() + get(NAME)
    assert broker.count("service_up", NAME) == 1
    assert Path(f"/proc/{broker.pid_of(NAME)}").exists()


def curl(port: int, path: str, *more: str) -> str:
    resolve = ("--resolve", f"{NAME}:{port}:127.0.0.1")
    return run("curl", "-sim", str(PATIENCE_S), *resolve, *more, f"http://{NAME}:{port}{path}")


def test_head_and_health_paths_are_answered_for_the_sleeper(program: Path, port: int) -> None:
    needed("curl")
    with waking(broker_file(program, port), folder=program, ports=(port,)) as broker:
        for path, more in (("/", ["-I"]), ("/healthz", []), ("/readyz", []), ("/", ["-I", "--http2-prior-knowledge"])):
            answer = curl(port, path, *more).lower()
            assert " 503" in answer.splitlines()[0], answer
            assert "retry-after: 7" in answer
            assert (MOTD.lower() in answer) == ("-I" not in more), answer
        nothing_was_started(broker)
        a_client_wakes_it(broker, port)
    assert broker.ended["ended"]["answered_asleep"] == 4


def test_nmap_wakes_nothing(program: Path, port: int) -> None:
    needed("nmap")
    nmap = ("nmap", "-n", "-Pn", "-p", str(port), "--host-timeout", "60s")
    with waking(broker_file(program, port), folder=program, ports=(port,)) as broker:
        assert f"{port}/tcp open" in run(*nmap, "-sT", "127.0.0.1")
        heads = run(*nmap, "-sT", "--script", "http-headers", "--script-args", "http.host=" + NAME, "127.0.0.1")
        assert f"{port}/tcp open" in heads
        versions = run(*nmap, "-sV", "--version-light", "127.0.0.1")
        assert f"{port}/tcp open" in versions
        ciphers = run(*nmap, "-sT", "--script", "+ssl-enum-ciphers", "127.0.0.1")
        assert f"{port}/tcp open" in ciphers
        assert "TLS_" not in ciphers
        nothing_was_started(broker)
        a_client_wakes_it(broker, port)


def test_a_tls_scanner_without_a_name_gets_an_alert(program: Path, port: int) -> None:
    needed("sslscan", "openssl")
    with waking(broker_file(program, port), folder=program, ports=(port,)) as broker:
        found = run("sslscan", "--no-colour", f"127.0.0.1:{port}")
        assert "Testing SSL server 127.0.0.1" in found
        assert "Accepted" not in found
        assert "alert internal error" in run("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-noservername")
        nothing_was_started(broker)
        a_client_wakes_it(broker, port)


def hello(name: str) -> bytes:
    """The first flight of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def test_a_scanner_with_the_right_name_wakes_nothing_unless_it_stays(program: Path, port: int) -> None:
    """Nothing tells it from a client but that it leaves: who is gone within `settle_ms` has woken nothing. One that
    stays is a client, and bounded by the budget of its source, as all are."""
    text = broker_file(program, port, settle_ms=SETTLE_MS, per_source_per_minute=1)
    with waking(text, folder=program, ports=(port,)) as broker:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as scanner:
                scanner.sendall(hello(NAME))
        # Who comes later and stays has its turn after all of them; none of them has asked.
        a_client_wakes_it(broker, port)
        assert [one["protocol"] for one in broker.events("service_asked")] == ["http1"]
        told = said(port, hello(OTHER))
        assert told == ALERT
        assert broker.count("service_refused", OTHER) == 1
        assert broker.events("service_asked", "service_up", service=OTHER) == []
    # Who has seen whether it listens has left, too.
    assert broker.ended["ended"]["client_left"] >= 5


def test_the_list_of_servers_is_answered_for_the_sleeper(program: Path, port: int) -> None:
    mcstatus = pytest.importorskip("mcstatus", reason="mcstatus (PyPI) is not installed")
    with waking(broker_file(program, port), folder=program, ports=(port,)) as broker:
        server = mcstatus.JavaServer("127.0.0.1", port, timeout=PATIENCE_S)
        shown = server.status()
        assert shown.motd.to_plain() == MOTD
        assert (shown.players.online, shown.version.name) == (0, "asleep")
        assert server.ping() >= 0
        nothing_was_started(broker)
        # Handshake with the intent to log in (2), and the start of that.
        address = b"\x091.2.3.4.5" + port.to_bytes(2, "big")
        handshake = b"\0" + b"\xff\x05" + address + b"\2"
        login = b"\0\5alice"
        entry = bytes([len(handshake)]) + handshake + bytes([len(login)]) + login
        assert said(port, entry) == f"{NAME} heard ".encode() + entry
        assert broker.count("service_up", NAME) == 1
