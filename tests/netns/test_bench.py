"""The bench as `make bench` calls it, with numbers too small to mean anything: it runs and leaves one file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def _bench(*options: str) -> list[str]:
    return [sys.executable, "-m", "bench", *options]


def test_each_client_connects_and_echoes() -> None:
    before = set(RESULTS.glob("*.json"))
    done = subprocess.run(
        _bench("--only", "rates", "--connections", "300", "--runs", "1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = set(RESULTS.glob("*.json")) - before
    results = json.loads(written.read_text())
    written.unlink()
    assert results["failed"] == {}
    assert {"fourtuple epoll", "asyncio streams", "asyncio protocol", "plain connect()"} <= set(results["rates"])
    for name, row in results["rates"].items():
        assert row["connections_per_s"] > 0, name
        assert name in done.stdout
    for name, reason in results["skipped"].items():
        assert f"skipped {name}: {reason}" in " ".join(done.stdout.split())


def test_a_client_that_is_not_here_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    others = [client for client in load.CLIENTS if not client.name.startswith("fourtuple")]
    assert {"wrk", "hey", "k6"} <= {client.name for client in others}
    for client in others:
        assert client.package in load.absent(client) != ""


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--connections", "0"), "'0'; a whole number from 1 to 60000"),
        (("--runs", "ten"), "'ten'; a whole number from 1 to 100"),
        (("--only", "speed"), "cliff"),
    ],
)
def test_a_wrong_option_is_named(options: tuple[str, ...], named: str) -> None:
    done = subprocess.run(_bench(*options), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert options[0] in done.stderr
    assert named in done.stderr


def test_ctrl_c_ends_it_with_what_it_had() -> None:
    before = set(RESULTS.glob("*.json"))
    with subprocess.Popen(_bench("--runs", "50"), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("round 1/50")
        process.send_signal(signal.SIGINT)
        words, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped by Ctrl-C" in words
    for path in set(RESULTS.glob("*.json")) - before:
        path.unlink()
