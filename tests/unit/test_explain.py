"""`fourtuple serve --explain`: what it says, and that it starts and leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fourtuple.brokerfile import BrokerFile
from fourtuple.confinement import Confinement, Report, StepName, plan

FOURTUPLE = (sys.executable, "-m", "fourtuple", "serve", "--explain")


def explained(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FOURTUPLE, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_it_says_what_is_left_and_starts_nothing(tmp_path: Path) -> None:
    file, log = tmp_path / "broker.toml", tmp_path / "log"
    file.write_text(
        f'[confine]\nuser = "{os.geteuid() or 65_534}"\nallow_ports = [5432]\nwithout = ["seccomp"]\n'
        f'[[listen]]\naddress = "127.0.0.1:9"\ndefault = "unix:{tmp_path}/service"\n'
    )
    done = explained("-c", str(file), "--log", str(log), "--json")
    said = json.loads(done.stdout)
    allowed, report = Confinement.from_json(said["allowed"]), Report.from_json(said)
    assert allowed.sockets == {str(tmp_path)}
    assert allowed.connect_ports == {5432}
    assert allowed.uring
    assert [step.name for step in report.steps] == list(StepName)
    wanted = {step.name: step.wanted for step in report.steps}
    assert not wanted[StepName.SECCOMP], "switched off"
    assert not wanted[StepName.NETWORK], "there is a TCP target"
    assert done.returncode == (1 if report.missing else 0)
    assert not log.exists()
    text = explained("-c", str(file), "--carrier", "epoll").stdout
    assert "TCP connect() to ports  5432" in text
    assert "io_uring                none" in text
    assert "switched off" in text


def test_where_the_sandbox_is_required_no_ring_reaches_out_of_it(tmp_path: Path) -> None:
    file, socket = tmp_path / "broker.toml", f"unix:{tmp_path}/service"
    for target, uring in ((socket, True), ("tcp:127.0.0.1:5432", False), ("unix:@name", False)):
        head = f'[confine]\nuser = "{os.geteuid() or 65_534}"\nsandbox = "required"\n'
        file.write_text(f'{head}[[listen]]\naddress = "127.0.0.1:9"\ndefault = "{target}"\n')
        assert plan(BrokerFile.read(file)).uring is uring


def test_it_needs_a_file(tmp_path: Path) -> None:
    assert explained("--demo").returncode == 64
    missing = explained("-c", str(tmp_path / "none"))
    assert (missing.returncode, missing.stdout) == (64, "")
