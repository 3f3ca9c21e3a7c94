"""What `fourtuple serve` prints and logs is what docs/broker.md says; and what a shell completes of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

from fourtuple.cli import Exit
from fourtuple.registry import Registry
from fourtuple.services import Service
from tests.netns.brokering import PATIENCE_S, SERVE, echoing, free_port, get, listens, process, run, said, wait_for

DOCUMENT = Path(__file__).parents[2] / "docs/broker.md"


def documented(words: str) -> set[str]:
    """Fields in the first table behind these words."""
    table = DOCUMENT.read_text().partition(words)[2].partition("|---|---|\n")[2].partition("\n\n")[0]
    return {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}


def test_numbers_and_log_have_the_fields_that_are_documented(tmp_path: Path) -> None:
    port, file, log = free_port(), tmp_path / "broker.toml", tmp_path / "log"
    file.write_text(
        f'[[listen]]\naddress = "127.0.0.1:{port}"\n[[service]]\nname = "shop.example"\n'
        f'target = "unix:{tmp_path}/shop"\n[[service]]\nname = "absent.example"\ntarget = "unix:{tmp_path}/absent"\n'
    )
    options = ("--json", "--every", "0.2", "--log", str(log), "--log-every", "5", "--workers", "1", "--patience", "0.2")
    with echoing(tmp_path / "shop"), process(*SERVE, "-c", str(file), *options) as broker:
        wait_for(lambda: listens(port) or broker.poll() is not None)
        for _ in range(18):
            assert said(port, get("shop.example")) == b"shop heard " + get("shop.example")
        assert said(port, get("absent.example")) == b""
        assert broker.stdout is not None
        first = json.loads(broker.stdout.readline())
        broker.send_signal(signal.SIGTERM)
        output, _ = broker.communicate(timeout=PATIENCE_S)
    assert broker.returncode == Exit.HEALTHY, output
    rows = [first, *map(json.loads, output.splitlines())]
    assert all(set(row) == documented("With `--json`") for row in rows)
    assert len(rows) > 1
    assert [row["seconds"] for row in rows] == sorted({row["seconds"] for row in rows})
    last = rows[-1]
    # One of them is the client that looked whether somebody listens.
    assert last["ended"] == {"relayed": 18, "client_left": 1, "service_absent": 1}
    assert last["retries"] > 0
    assert {failure["errno"] for failure in last["failures"]} == {"ENOENT"}
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(entries) == 20 // 5
    fields = documented("With `--log FILE`")
    assert all(set(entry) == fields - {"event", "lost_before"} for entry in entries)
    assert {"relayed"} <= {entry["reason"] for entry in entries} <= set(last["ended"])
    request = len(get("shop.example"))
    relayed = [entry for entry in entries if entry["reason"] == "relayed"]
    assert {(entry["bytes_up"], entry["bytes_down"]) for entry in relayed} == {(request, request + len(b"shop heard "))}


def completed(words: str, environment: dict[str, str]) -> list[str]:
    """What bash would offer for the last word."""
    given = {"_FOURTUPLE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [Path(SERVE[0]).with_name("fourtuple")],
        env={**os.environ, **environment, **given},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    return done.stdout.split()


def test_a_shell_completes_options_and_names(tmp_path: Path) -> None:
    environment = {"FOURTUPLE_STORE": str(tmp_path / "registry")}
    with Registry(tmp_path / "registry") as registry:
        registry.add(
            Service(name=name, target="unix:/x") for name in ("shop.example", "short.example", "other.example")
        )
    assert completed("fourtuple ser", environment) == ["serve", "services"]
    assert completed("fourtuple serve --lo", environment) == ["--log", "--log-steps", "--log-every"]
    assert completed("fourtuple serve --carrier e", environment) == ["epoll"]
    assert completed("fourtuple services ro", environment) == ["route"]
    assert completed("fourtuple services show sh", environment) == ["shop.example", "short.example"]
    assert "_FOURTUPLE_COMPLETE=complete_bash" in run(
        str(Path(SERVE[0]).with_name("fourtuple")), "--show-completion", "bash"
    )
