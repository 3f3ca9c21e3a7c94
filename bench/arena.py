"""One client against one echo server of ours, in a lab of their own: what every comparison here runs in.

Decides how a client is started, talked with and measured, the same for ours and for the peers: a process of its own,
its private memory read from outside between two steps. Knows nothing of what the client does.
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fourtuple.engine import EchoConfig
from fourtuple.lab import Lab
from fourtuple.tuples import Endpoint

ROOT = Path(__file__).parent.parent
HOST, PORT = "127.0.0.1", 700
"""Below every range of source ports that is used here."""
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a client said at the end of a step, and its private memory then."""

    numbers: dict[str, Any]
    private_bytes: int


class Client:
    """A client process, paused between its steps."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def step(self) -> Measured:
        """Let it run to the end of its step; RuntimeError, in its own words, if it does not get there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # One line per step: between two steps nothing is left in Python's buffer that select would not see.
        if not select.select([self._process.stdout], [], [], TIMEOUT_S)[0]:
            raise RuntimeError(f"the client did not come to the end of its step within {TIMEOUT_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            _, words = self._process.communicate(timeout=TIMEOUT_S)
            raise RuntimeError(words.strip() or f"the client ended with status {self._process.returncode}")
        measured = Measured(numbers=json.loads(line), private_bytes=_private_bytes(self._process.pid))
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return measured

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate(timeout=TIMEOUT_S)


@contextmanager
def client(script: str, *arguments: str, ports: str = "1024 65535") -> Iterator[Client]:
    """Start a script of `peers/` in a fresh lab with an echo server; `ports` is what the kernel may choose from."""
    with Lab(("bench",)) as lab:
        here = lab["bench"]
        here.set_sysctl("net.ipv4.ip_local_port_range", ports)
        here.set_sysctl("net.core.somaxconn", 65_535)
        server = here.start_engine(EchoConfig(listen=(Endpoint(ip_address(HOST), PORT),), backlog=65_535), workers=1)
        server.wait_for(lambda now: now.listening_now == 1, TIMEOUT_S)
        namespaces = [f"--net=/proc/{here.pid}/ns/net"]
        if lab.in_user_namespace:
            namespaces += [f"--user=/proc/{here.pid}/ns/user", "--preserve-credentials"]
        python = [sys.executable, "-m", f"bench.peers.{script}", HOST, str(PORT)]
        with Client(["nsenter", *namespaces, *python, *arguments]) as started:
            yield started


def _private_bytes(pid: int) -> int:
    """Memory of the process that no other one maps: what it would give back."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    return sum(int(fields[name]) for name in ("Private_Clean", "Private_Dirty", "Swap")) * 1024
