"""A broker whose services sleep, as tests start it: its events, its processes, and what is left of a service."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.netns.brokering import PATIENCE_S, SERVE, listens, wait_for

NOBODY = 65_534


@dataclass(slots=True)
class Waking:
    """One that runs."""

    folder: Path
    pid: int
    ended: dict[str, Any] = field(default_factory=dict)
    """What it has counted, once it has ended."""

    def events(self, *names: str, service: str | None = None) -> list[dict[str, Any]]:
        """Of the broker's log, those of these names."""
        text = (self.folder / "events").read_text()
        told = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [one for one in told if one["event"] in names and service in (None, one.get("service"))]

    def pid_of(self, service: str) -> int:
        """Of the process that was started for it last."""
        wait_for(lambda: bool(self.events("service_up", service=service)))
        return int(self.events("service_up", service=service)[-1]["pid"])

    def count(self, event: str, service: str, at_least: int = 1) -> int:
        """How often that was; it is written a little later, so there is to be so much of it."""
        wait_for(lambda: len(self.events(event, service=service)) >= at_least)
        return len(self.events(event, service=service))

    def until_asleep(self, service: str, times: int = 1) -> None:
        """It has been stopped so often, and nothing of its last start is left."""
        pid = self.pid_of(service)
        wait_for(lambda: len(self.events("service_stopped", service=service)) >= times)
        assert not Path(f"/proc/{pid}").exists()


@contextmanager
def waking(text: str, *options: str, folder: Path, ports: tuple[int, ...]) -> Iterator[Waking]:
    """With this broker.toml. Afterwards no process that it has started is there."""
    (folder / "broker.toml").write_text(text)
    (folder / "events").write_text("")
    said = folder / "said"
    command = [*SERVE, "-c", f"{folder}/broker.toml", "--events", f"{folder}/events", "--json", *options]
    with said.open("w") as output:
        broker = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: all(map(listens, ports)) or broker.poll() is not None)
        assert broker.poll() is None, said.read_text()
        made = Waking(folder=folder, pid=broker.pid)
        yield made
        pids = [one["pid"] for one in made.events("service_up")]
        broker.send_signal(signal.SIGTERM)
        assert broker.wait(PATIENCE_S) == 0, said.read_text()
        made.ended = json.loads(said.read_text().splitlines()[-1])
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    finally:
        if broker.poll() is None:
            broker.kill()
            broker.wait()


@contextmanager
def open_folder() -> Iterator[Path]:
    """That other users may pass through, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="fourtuple-waking-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def owned(path: Path) -> Path:
    """A folder of nobody's."""
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)
    return path


def table(kind: str, **fields: object) -> str:
    """One of broker.toml: JSON of texts, numbers, lists and booleans is TOML, too."""

    def value(it: object) -> str:
        if isinstance(it, dict):
            return "{ " + ", ".join(f"{key} = {value(one)}" for key, one in it.items()) + " }"
        return json.dumps(it)

    rows = "".join(f"{key} = {value(one)}\n" for key, one in fields.items() if one is not None)
    return f"[[{kind}]]\n{rows}"


def command_of(pid: int) -> list[str]:
    """Its arguments."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def user_of(pid: int) -> int:
    """Its effective user."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[2])
    raise AssertionError(pid)
