"""`fourtuple load` against real servers in a lab, and against trouble: each cause is named, with the side it is on."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fourtuple.lab import Lab
from fourtuple.tuples import Endpoint
from tests.netns.loading import RUN_S, START_S, cause, inside, run_load, server_address, serving, web_server

HERE = Path(__file__).parent
MANNERS = [
    "reset",
    "stall",
    "garbage",
    "finish",
    "half_close",
    "huge_headers",
    "vanish_in_answer",
    "drip",
    "echo",
    "refuse",
]
"""The ports of troublemaker.py in their order, which a test holds it to."""
FIRST_PORT = 7_000

Loaded = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(("client", "server")) as made:
        yield made


@pytest.fixture(scope="module")
def trouble(lab: Lab) -> Iterator[str]:
    """The address of a server that misbehaves, by port."""
    address = server_address(lab)
    command = [sys.executable, str(HERE / "troublemaker.py"), address, str(FIRST_PORT)]
    with subprocess.Popen(inside(lab, lab["server"], command), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield address
        server.kill()


@pytest.fixture
def load(lab: Lab) -> Loaded:
    return lambda *options, prefix=(): run_load(lab, lab["client"], *options, prefix=prefix)


@pytest.fixture(scope="module")
def redis(lab: Lab) -> Iterator[str]:
    with serving(
        lab, "redis-server", "--port", "6379", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", port=6379
    ) as address:
        yield address


@pytest.fixture(scope="module")
def nginx(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with web_server(lab, tmp_path_factory.mktemp("nginx")) as address:
        yield address


# Real servers


def test_redis_answers_a_typed_dialogue(load: Loaded, redis: str) -> None:
    report = load(
        f"tcp://{redis}:6379", "-c", "300", "--say", r"PING\r\n", "--expect", r"+PONG\r\n",
        "--duration", "1", "--ping-every", "0.2", "--window", "64",
    )  # fmt: skip
    assert (report["status"], report["held"], report["stopped_by"]) == (0, 300, None)
    assert report["rounds_right"] >= 600
    assert report["rounds_failed"] == 0
    assert report["answer"]["count"] == report["rounds_right"]
    assert report["ports"][0]["used"] >= 300


def test_redis_answers_a_script(load: Loaded, redis: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from fourtuple.dialogue import *\n"
        "dialogue = Dialogue(\n"
        "    opening=(Say(b'SET key 12345\\r\\n'), Expect(b'+OK\\r\\n')),\n"
        "    round=(Say(b'GET key\\r\\n'), Until(b'\\r\\n'), Skip(7), "
        "           Say(b'INFO server\\r\\n'), Until(b'\\r\\n\\r\\n')),\n"
        ")\n"
    )
    report = load(f"tcp://{redis}:6379", "-c", "50", "--script", str(script), "--duration", "1", "--window", "32")
    assert (report["status"], report["openings_right"], report["rounds_failed"]) == (0, 50, 0)
    assert report["rounds_right"] >= 50


def test_nginx_keeps_connections_alive(load: Loaded, nginx: str) -> None:
    report = load(f"http://{nginx}:8080-8083/", "-c", "600", "--duration", "1", "--ping-every", "0.2")
    assert (report["status"], report["held"], report["rounds_failed"]) == (0, 600, 0)
    assert report["rounds_right"] >= 1_200
    assert report["connected"] == 600, "not one was made anew"


def test_nginx_says_no(load: Loaded, nginx: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    report = load(
        f"http://{nginx}:8080/no",
        "-c",
        "20",
        "--duration",
        "0.5",
        "--html",
        str(page),
        "--fail-if",
        "rounds_failed > 0",
    )
    assert (report["status"], report["failed_if"]) == (1, ["rounds_failed > 0"])
    found = cause(report, side="the other side", what="it answers with an error status")
    assert found["count"] == report["rounds"] > 0
    assert "it answers with an error status" in page.read_text()


def test_nginx_at_its_worker_connections(load: Loaded, nginx: str) -> None:
    report = load(f"tcp://{nginx}:8080", "-c", "1500", "--duration", "1", "--no-replace")
    assert report["status"] == 1
    assert report["stopped_by"] == "the other side"
    assert "accept-at-limit" in cause(report, what="it closes connections that we hold")["limits"]
    assert 900 <= report["held"] < 1_000


def test_websockets_pings_us_and_we_answer(load: Loaded, lab: Lab) -> None:
    pytest.importorskip("websockets")
    address = server_address(lab)
    program = textwrap.dedent(f"""
        import asyncio
        from websockets.asyncio.server import serve
        async def handler(connection):
            await connection.wait_closed()
        async def main():
            async with serve(handler, "{address}", 8765, ping_interval=0.3, ping_timeout=0.5):
                print("ready", flush=True)
                await asyncio.Event().wait()
        asyncio.run(main())
        """)
    command = inside(lab, lab["server"], [sys.executable, "-c", program])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        report = load(
            f"ws://{address}:8765/chat", "-c", "100", "--duration", "1.5", "--ping-every", "0.3", "--size", "40"
        )
        server.kill()
    assert (report["status"], report["openings_right"], report["held"]) == (0, 100, 100)
    assert report["rounds_right"] >= 200
    assert (report["rounds_failed"], report["closed_by_peer"]) == (0, 0), "its pings were answered"


# Trouble, and the side that it is on


def test_the_port_table_is_the_servers() -> None:
    found = runpy.run_path(str(HERE / "troublemaker.py"))["MANNERS"]
    assert list(found) == MANNERS


BAD_MANNERS = (
    ("reset", "tcp", (), "the peer reset the connection"),
    ("finish", "tcp", (), "it closes connections that we hold"),
    ("half_close", "tcp", (), "it closes connections that we hold"),
    ("stall", "tcp", ("--say", "x", "--expect", "y"), "connected, but it does not answer in time"),
    ("garbage", "tcp", ("--ping-every", "0.2"), "it answers with other bytes than it should"),
    ("huge_headers", "http", (), "it answers with other bytes than it should"),
    ("vanish_in_answer", "http", (), "the peer reset the connection"),
    ("garbage", "ws", (), "the opening handshake is garbled"),
    ("stall", "ws", ("--connect-timeout", "0.2"), "the opening handshake is not answered in time"),
)


@pytest.fixture(scope="module")
def bad_manners(lab: Lab, trouble: str) -> list[dict[str, Any]]:
    """A report per row, all run at once: each spends most of its time waiting."""

    def one(row: tuple[str, str, tuple[str, ...], str]) -> dict[str, Any]:
        manners, scheme, options, _ = row
        url = f"{scheme}://{trouble}:{FIRST_PORT + MANNERS.index(manners)}"
        common = ("-c", "40", "--duration", "1", "--answer-timeout", "0.3", "--no-replace", "--workers", "1")
        return run_load(lab, lab["client"], url, *common, *options)

    with ThreadPoolExecutor(max_workers=len(BAD_MANNERS)) as threads:
        return list(threads.map(one, BAD_MANNERS))


@pytest.mark.parametrize("row", range(len(BAD_MANNERS)), ids=[f"{row[1]}-{row[0]}" for row in BAD_MANNERS])
def test_a_server_with_bad_manners(bad_manners: list[dict[str, Any]], row: int) -> None:
    report, (_, _, _, what) = bad_manners[row], BAD_MANNERS[row]
    found = next(one for one in report["causes"] if one["what"].startswith(what))
    assert found["side"] == "the other side"
    assert found["count"] >= 30
    assert report["connected"] == 40


@pytest.mark.parametrize(("manners", "scheme"), [("drip", "http"), ("echo", "tcp")])
def test_a_slow_or_plain_server_is_no_trouble(load: Loaded, trouble: str, manners: str, scheme: str) -> None:
    port = FIRST_PORT + MANNERS.index(manners)
    report = load(
        f"{scheme}://{trouble}:{port}", "-c", "40", "--duration", "0.8", "--ping-every", "0.2", "--size", "1000"
    )
    assert (report["status"], report["held"], report["rounds_failed"]) == (0, 40, 0)
    assert report["rounds_right"] >= 80


def test_ended_connections_are_made_anew(load: Loaded, trouble: str) -> None:
    port = FIRST_PORT + MANNERS.index("finish")
    report = load(f"tcp://{trouble}:{port}", "-c", "10", "--duration", "1.2")
    assert report["replaced"] >= 10


# The command


def test_ctrl_c_keeps_what_it_had(lab: Lab, trouble: str) -> None:
    port = FIRST_PORT + MANNERS.index("echo")
    command = [sys.executable, "-m", "fourtuple", "load", f"tcp://{trouble}:{port}", "-c", "50", "--json"]
    with subprocess.Popen(
        inside(lab, lab["client"], [*command, "--ping-every", "0.1", "--duration", "60"]),
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        destination = Endpoint.parse(f"{trouble}:{port}")
        deadline_s = time.monotonic() + START_S
        while not any(
            flow.destination == destination and flow.connections == 50 for flow in lab["client"].facts().flows
        ):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        time.sleep(0.5)  # so that it holds, and reads no facts any more; if not, the report is of an earlier moment
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=RUN_S)
    report = json.loads(output)
    assert (running.returncode, report["interrupted"], report["held"]) == (130, True, 50)


def test_a_target_of_somebody_else_is_refused() -> None:
    # In the host's own namespace: nothing is sent, the refusal comes before.
    command = [sys.executable, "-m", "fourtuple", "load", "tcp://192.0.2.1:80", "--from", "127.0.0.1", "-c", "1"]
    with Lab(("alone",)) as lab:
        routed = ["sh", "-c", 'ip route add default dev lo && exec "$@"', "sh", *command]
        if shutil.which("ip") is None:
            pytest.skip("ip is not installed (make system)")
        done = subprocess.run(
            inside(lab, lab["alone"], routed), capture_output=True, text=True, timeout=RUN_S, check=False
        )
    assert done.returncode == 64
    assert "--i-own-this-target" in done.stderr
