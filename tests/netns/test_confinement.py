"""A confined broker: what code that got into it can do, and that the broker serves all the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fourtuple.registry import Registry
from fourtuple.service import Listener
from fourtuple.services import Delivery, Route, Service
from tests.netns.brokering import PATIENCE_S, echoing, free_port, get, said, wait_for

PROGRAM = (sys.executable, "-m", "tests.netns.programs.confined")
NOBODY = 65_534
STEPS = ("mounts", "identity", "capabilities", "privileges", "dumpable", "landlock", "seccomp")


class Confined:
    """The program, and what it says."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process, self.port = process, port
        self.report: dict[str, Any] = self._line()

    def _line(self) -> Any:  # noqa: ANN401 - whatever it prints
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it has ended: {self._process.wait(PATIENCE_S)}"
        return json.loads(line)

    def wait(self) -> None:
        assert self._line() == "ready"

    def ask(self, word: str) -> Any:  # noqa: ANN401
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)
        return self._line()

    @property
    def steps(self) -> dict[str, Any]:
        return {step["name"]: step for step in self.report["steps"]}


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That others may pass through, unlike pytest's own."""
    made = tmp_path_factory.mktemp("confined")
    made.chmod(0o755)
    for above in (made.parent, made.parent.parent):
        if above.owner() == made.owner() and above != Path("/tmp"):
            above.chmod(0o755)
    return made


@contextmanager
def confined(folder: Path, carrier: str, **settings: object) -> Iterator[Confined]:
    """A broker of the registry `folder/store` whose services are in `folder/inside`, and listeners for its attacks."""
    inside, elsewhere = folder / "inside", folder / "elsewhere"
    for one in (inside, elsewhere):
        one.mkdir(exist_ok=True)
        one.chmod(0o755)
    secret = folder / "secret"
    secret.write_text("secret")
    (inside / "file").write_text("")
    for link, text in (("link", str(secret)), ("socket-link", str(elsewhere / "socket"))):
        (inside / link).symlink_to(text)
    port, elsewhere_port, free = free_port(), free_port(), free_port()
    file = folder / "broker.toml"
    file.write_text(f'[[listen]]\naddress = "127.0.0.1:{port}"\nsniff_ms = 300\ndefault = "unix:{inside}/echo"\n')
    log = folder / "log" / "broker.log"
    log.parent.mkdir(exist_ok=True)
    with ExitStack() as stack:
        for address, kind in (
            (str(elsewhere / "socket"), socket.SOCK_STREAM),
            (str(elsewhere / "socket.dgram"), socket.SOCK_DGRAM),
            ("\0fourtuple-test", socket.SOCK_STREAM),
            ("\0fourtuple-test.dgram", socket.SOCK_DGRAM),
        ):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            listener.bind(address)
            if kind is socket.SOCK_STREAM:
                listener.listen()
            if address.startswith("/"):
                Path(address).chmod(0o777)
        tcp = stack.enter_context(socket.socket())
        tcp.bind(("127.0.0.1", elsewhere_port))
        tcp.listen()
        given = {
            "carrier": carrier,
            "secret": str(secret),
            "inside": str(inside),
            "elsewhere": str(elsewhere / "socket"),
            "name": "fourtuple-test",
        }
        everything = {
            "file": str(file),
            "carrier": carrier,
            "store": str(folder / "store"),
            "log": str(log),
            "user": str(NOBODY) if os.geteuid() == 0 else None,
            "without": [],
            "patience_s": 0.3,
            "given": given,
            "ports": {"elsewhere": elsewhere_port, "free": free},
            **settings,
        }
        process = stack.enter_context(
            subprocess.Popen(
                [*PROGRAM, json.dumps(everything)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        stack.callback(process.terminate)
        broker = Confined(process, port)
        broker.wait()
        yield broker


def registry(folder: Path) -> Registry:
    """With two services, whose owner is the broker's user."""
    store = Registry(folder / "store")
    inside = folder / "inside"
    inside.mkdir(exist_ok=True)
    store.set(
        [
            Service(name="echo.example.com", target=f"unix:{inside}/echo"),
            Service(name="hand.example.com", target=f"unix:{inside}/hand", delivery=Delivery.HANDOFF),
        ]
    )
    if os.geteuid() == 0:
        for path in (store.path, *store.path.iterdir()):
            os.chown(path, NOBODY, NOBODY)
    return store


def refused(outcomes: Mapping[str, str]) -> dict[str, str]:
    """Those that were not, but for the known gaps."""
    return {name: what for name, what in outcomes.items() if what == "done" and not name.startswith("gap: ")}


@pytest.mark.parametrize("carrier", ["epoll", "uring"])
def test_code_that_got_in_reaches_nothing_and_the_broker_serves_on(folder: Path, carrier: str) -> None:
    with registry(folder) as store, ExitStack() as stack:
        inside = folder / "inside"
        broker = stack.enter_context(confined(folder, carrier))
        assert all(broker.steps[name]["applied"] for name in STEPS), broker.report
        with echoing(inside / "echo"):
            (inside / "echo").chmod(0o777)
            assert said(broker.port, get("echo.example.com")).startswith(b"echo heard GET")
            outcomes = broker.ask("attack")
            assert not refused(outcomes), outcomes
            gaps = " ".join(gap for step in broker.report["steps"] for gap in step["gaps"])
            open_gaps = [name.removeprefix("gap: ") for name, what in outcomes.items() if what == "done"]
            assert all(name in gaps for name in open_gaps), (open_gaps, gaps)
            assert said(broker.port, get("echo.example.com")).startswith(b"echo heard GET")
