"""`fourtuple load udp://` against real servers in a lab: flows by arithmetic, and each thing a datagram may meet."""

from __future__ import annotations

import runpy
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fourtuple.lab import Lab
from tests.netns.loading import START_S, cause, inside, run_load, server_address

PROGRAM = Path(__file__).parent / "programs" / "datagrams.py"
MANNERS = ["echo", "stall", "garbage", "twice", "empty", "huge"]
"""The ports of datagrams.py in their order, which a test holds it to."""
FIRST_PORT = 7_100


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(("client", "server")) as made:
        yield made


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[str]:
    """The address of a server with a manner for each port."""
    command = inside(lab, lab["server"], [sys.executable, str(PROGRAM), str(FIRST_PORT)])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        yield server_address(lab)
        running.kill()


def load(lab: Lab, address: str, manner: str, *options: str) -> dict[str, Any]:
    url = f"udp://{address}:{FIRST_PORT + MANNERS.index(manner)}"
    return run_load(lab, lab["client"], url, "--duration", "0.6", *options)


def test_the_port_table_is_the_servers() -> None:
    assert list(runpy.run_path(str(PROGRAM))["MANNERS"]) == MANNERS


@pytest.mark.parametrize("carrier", ["uring", "epoll"])
def test_flows_are_held_and_each_token_comes_back(lab: Lab, server: str, carrier: str) -> None:
    options = ("-c", "400", "--ping-every", "0.2", "--size", "64", "--answer-timeout", "5", "--carrier", carrier)
    report = load(lab, server, "echo", *options)
    assert (report["status"], report["noun"], report["held"], report["carrier"]) == (0, "flows", 400, carrier)
    assert report["rounds_right"] >= 400
    assert (report["rounds_failed"], report["strays"], report["causes"]) == (0, 0, [])
    assert report["ports"][0]["used"] == 400


def test_a_closed_loop_over_datagrams(lab: Lab, server: str) -> None:
    report = load(lab, server, "echo", "-c", "20", "--closed-loop", "--answer-timeout", "5")
    assert (report["status"], report["rounds_failed"]) == (0, 0)
    assert report["rounds_right"] > 20 * 10


def test_more_flows_than_an_address_has_ports_and_one_port_to_all(lab: Lab, server: str) -> None:
    before = lab["client"].sysctl("net.ipv4.ip_local_port_range")
    lab["client"].set_sysctl("net.ipv4.ip_local_port_range", "40000 40049")
    try:
        # 50 ports to six destinations: 300 flows, and not one more.
        url = f"udp://{server}:{FIRST_PORT}-{FIRST_PORT + 5}"
        report = run_load(lab, lab["client"], url, "-c", "310", "--duration", "0.2")
    finally:
        lab["client"].set_sysctl("net.ipv4.ip_local_port_range", before)
    assert (report["held"], report["stopped_by"]) == (300, "this side")
    assert report["causes"][0]["limits"][0] == "ephemeral-ports"
    assert {(row["used"], row["of"]) for row in report["ports"]} == {(50, 50)}


def test_two_programs_share_ports_and_lose_no_datagram(lab: Lab, server: str) -> None:
    before = lab["client"].sysctl("net.ipv4.ip_local_port_range")
    lab["client"].set_sysctl("net.ipv4.ip_local_port_range", "41000 41099")
    options = ["-c", "50", "--ping-every", "0.2", "--duration", "2", "--answer-timeout", "5", "--json"]
    command = [sys.executable, "-m", "fourtuple", "load", f"udp://{server}:{FIRST_PORT}", *options]
    try:
        with subprocess.Popen(inside(lab, lab["client"], command), stdout=subprocess.PIPE, text=True) as first:
            time.sleep(0.7)
            second = load(lab, server, "echo", "-c", "50", "--ping-every", "0.2", "--answer-timeout", "5")
            output, _ = first.communicate(timeout=30)
    finally:
        lab["client"].set_sysctl("net.ipv4.ip_local_port_range", before)
    assert first.returncode == 0, output
    assert (second["status"], second["held"], second["rounds_failed"], second["strays"]) == (0, 50, 0, 0)


BAD_MANNERS = (
    ("stall", "rounds_missing", "connected, but it does not answer in time"),
    ("garbage", "rounds_wrong", "it answers with other bytes than it should"),
    ("empty", "rounds_wrong", "it answers with other bytes than it should"),
    ("huge", "rounds_wrong", "its datagrams are longer than 2,048 bytes, and cut"),
)
NOBODY = "9"


@pytest.fixture(scope="module")
def at_once(lab: Lab, server: str) -> dict[str, dict[str, Any]]:
    """A report per manner, all run at once: each spends most of its time waiting."""
    ports = {manner: str(FIRST_PORT + MANNERS.index(manner)) for manner, _, _ in BAD_MANNERS}
    ports |= {"twice": str(FIRST_PORT + MANNERS.index("twice")), "nobody": NOBODY}
    options = ("-c", "30", "--ping-every", "0.2", "--size", "32", "--duration", "1", "--workers", "1")

    def one(manner: str) -> dict[str, Any]:
        timeout_s = "5" if manner == "twice" else "0.2"
        url = f"udp://{server}:{ports[manner]}"
        return run_load(lab, lab["client"], url, *options, "--answer-timeout", timeout_s)

    with ThreadPoolExecutor(max_workers=len(ports)) as threads:
        return dict(zip(ports, threads.map(one, ports), strict=True))


@pytest.mark.parametrize(("manner", "number", "said"), BAD_MANNERS)
def test_a_server_with_bad_manners(at_once: dict[str, dict[str, Any]], manner: str, number: str, said: str) -> None:
    report = at_once[manner]
    assert report[number] == report["rounds_failed"] >= 30
    assert (report["rounds_right"], report["held"], report["replaced"]) == (0, 30, 0), "no flow is spoiled or ended"
    found = next(one for one in report["causes"] if one["what"].startswith(said))
    assert found["side"] == "the other side"


def test_doubled_answers_are_strays(at_once: dict[str, dict[str, Any]]) -> None:
    report = at_once["twice"]
    assert (report["status"], report["rounds_failed"]) == (0, 0)
    assert 0 < report["strays"] <= report["rounds_right"]


def test_nobody_listens_and_the_flows_live_on(at_once: dict[str, dict[str, Any]]) -> None:
    report = at_once["nobody"]
    found = cause(report, error="ECONNREFUSED", step="receive")
    assert (found["side"], report["held"], report["rounds_right"]) == ("the other side", 30, 0)
    # A host sends few such messages (net.ipv4.icmp_ratelimit): the other rounds are missing, for the same reason.
    assert 1 <= found["count"] == report["rounds_failed"] - report["rounds_missing"]
    silent = next(one for one in report["causes"] if one["what"].startswith("no answer, and where there was one"))
    assert silent["side"] == found["side"]
    assert not any("error status" in one["what"] for one in report["causes"])


def test_dnsmasq_is_asked(lab: Lab) -> None:
    path = shutil.which("dnsmasq")
    if path is None:
        pytest.skip("dnsmasq is not installed (apt-get install dnsmasq-base)")
    address = server_address(lab)
    options = [
        "--no-daemon",
        "--no-resolv",
        "--no-hosts",
        "--user=",
        "--group=",
        "--port=5353",
        "--no-dhcp-interface=*",
    ]
    command = [path, *options, "--conf-file=/dev/null", "--address=/host.test/192.0.2.7"]
    # A query for host.test, type A (RFC 1035 4.1), and its answer: same id, one question, one answer.
    query = struct.pack("!6H", 0x1234, 0x0100, 1, 0, 0, 0) + b"\4host\4test\0" + struct.pack("!2H", 1, 1)
    said = "".join(f"\\x{byte:02x}" for byte in query)
    with subprocess.Popen(inside(lab, lab["server"], command), stderr=subprocess.DEVNULL) as server:
        try:
            url = f"udp://{address}:5353"
            asked = ("--say", said, "--duration", "0.5", "--ping-every", "0.2", "--answer-timeout", "5")
            deadline_s = time.monotonic() + START_S
            while run_load(lab, lab["client"], url, "-c", "1", *asked, "--expect", r"\x12\x34...")["rounds_right"] == 0:
                assert server.poll() is None, f"dnsmasq ended with {server.returncode}"
                assert time.monotonic() < deadline_s, "dnsmasq does not answer"
            report = run_load(lab, lab["client"], url, "-c", "200", *asked, "--expect", r"\x12\x34\x85\x80...")
            wrong = run_load(
                lab, lab["client"], url, "-c", "5", *asked, "--answer-timeout", "0.2", "--expect", r"\x12\x34\x99..."
            )
        finally:
            server.terminate()
    assert (report["status"], report["held"], report["rounds_failed"]) == (0, 200, 0)
    assert report["rounds_right"] >= 200
    assert (wrong["rounds_right"], wrong["rounds_missing"]) == (0, 0)
    assert wrong["rounds_wrong"] >= 5


def test_think_time_sets_the_pace(lab: Lab, server: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from fourtuple.dialogue import *\n"
        "dialogue = Dialogue(round=(Say(b'a'), Expect(b'a'), Wait(0.3), Say(b'b'), Expect(b'b')))\n"
    )
    options = ("-c", "30", "--closed-loop", "--script", str(script), "--answer-timeout", "0.25", "--duration", "1")
    report = load(lab, server, "echo", *options)
    # Each round takes 0.3 s and something, so there are three of them at most; thinking is no part of the deadline.
    assert 30 <= report["rounds_right"] <= 30 * 3
    assert (report["status"], report["rounds_failed"]) == (0, 0)
