"""The comparisons of brokers as `make bench` calls them, with numbers too small to mean anything; and connections at
rest, of which the bench holds 200,000 and this a few thousand."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench import brokers, idle, traffic

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
HELD = 3_000
NAME = "shop.example.com"


@pytest.mark.slow
def test_connections_rest_and_are_all_used() -> None:
    (row,) = idle.ROWS
    if reason := idle.absent(row):
        pytest.skip(reason)
    figures = idle.run(row, HELD, rest_s=0.5)
    assert figures["held"] == HELD
    assert figures["echoes_right"] == 2 * HELD
    assert figures["errors"] == 0
    # The process that has the connections is among those that are weighed.
    assert figures["user_bytes_each"] > 50
    # Direct descriptors: a fraction of one for each of the two sides.
    assert figures["broker_descriptors"] < HELD / 10


def test_on_epoll_it_is_the_hard_limit_of_descriptors_that_bounds(tmp_path: Path) -> None:
    if reason := traffic.absent():
        pytest.skip(reason)
    hello = traffic.write_hellos(tmp_path / "hello", [NAME])
    target = f"tcp:127.0.0.1:{brokers.free_port()}"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        program = stack.enter_context(traffic.compiled())
        stack.enter_context(program.service(target, "echo"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        try:
            running = stack.enter_context(brokers.running(brokers.EPOLL, target, [NAME]))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        clients = stack.enter_context(program.held(running.port, hello, 300))
        program.use_again(clients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "figures"),
    [
        (("broker", "--connections", "100"), ("cpu_us_per_connection_at_8", "connections_per_s_at_64")),
        (
            ("relay", "--quick"),
            (
                "through_p50_us_at_64",
                "through_p99_us_at_64, 20,000/s",
                "send_gb_per_s_at_8",
                "take_gb_per_s_at_1",
                "at_rest",
            ),
        ),
        (("many", "--quick", "--services", "2000"), ("few_p50_us", "all_p50_us", "many_ready_ms")),
    ],
)
def test_each_broker_serves_in_each_comparison(options: tuple[str, ...], figures: tuple[str, ...]) -> None:
    if reason := traffic.absent():
        pytest.skip(reason)
    shown, results = _bench("--only", *options, "--runs", "1")
    assert results["failed"] == {}
    measured = results[options[0]]
    for broker in (brokers.HAPROXY, brokers.NGINX, brokers.URING, brokers.EPOLL):
        if brokers.absent(broker):
            continue
        # Ours by the carrier: not each way to deliver is in each.
        rows = [row for name, row in measured.items() if name.startswith(broker.name.partition(",")[0])]
        assert rows, broker.name
        for row in rows:
            assert all(row[figure] > 0 for figure in figures), (broker.name, row)
    for name, reason in results["skipped"].items():
        assert f"skipped {name}: {reason}" in shown


def test_a_broker_that_is_not_here_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(brokers, "_program", lambda _: "")
    monkeypatch.setenv("PATH", str(tmp_path))
    for broker in (brokers.HAPROXY, brokers.NGINX, brokers.SSLH):
        assert "not installed" in brokers.absent(broker)
    assert "gcc" in traffic.absent()


def test_a_wrong_echo_and_a_client_without_a_service_are_errors(tmp_path: Path) -> None:
    if reason := traffic.absent():
        pytest.skip(reason)
    hello = traffic.write_hellos(tmp_path / "hello", [NAME])
    with traffic.compiled() as program:
        port = brokers.free_port()
        with pytest.raises(RuntimeError, match="Connection refused"):
            program.visit(port, hello, 1, 1)
        with (
            program.service(f"tcp:127.0.0.1:{port}", "one=x"),
            pytest.raises(RuntimeError, match="echo"),
        ):
            # It says one byte where the whole opening has to come back.
            program.rounds(port, hello, 1, 1)


def test_hellos_of_one_length_differ_in_nothing_but_the_name(tmp_path: Path) -> None:
    names = ["s0000001.example.com", "s0000002.example.com", "shop.example.com"]
    data = traffic.write_hellos(tmp_path / "hellos", names).read_bytes()
    for name in names:
        length = int.from_bytes(data[:2])
        said, data = data[2 : 2 + length], data[2 + length :]
        assert name.encode() in said
        assert sum(other.encode() in said for other in names) == 1
    assert data == b""


def _bench(*options: str) -> tuple[str, dict[str, Any]]:
    """What it prints, in one line, and what it leaves in its one file."""
    before = set(RESULTS.glob("*.json"))
    command = [sys.executable, "-m", "bench", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = set(RESULTS.glob("*.json")) - before
    results: dict[str, Any] = json.loads(written.read_text())
    written.unlink()
    return " ".join(done.stdout.split()), results
