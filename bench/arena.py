"""One client against one echo server of ours, in a lab of their own: what every comparison here runs in.

Decides how a client is started, talked with and measured, the same for ours and for the peers: a process of its own,
its private memory read from outside between two steps. Knows nothing of what the client does.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fourtuple.engine import EchoConfig
from fourtuple.errors import MissingFeature
from fourtuple.lab import Lab, LabHost
from fourtuple.tuples import Endpoint

ROOT = Path(__file__).parent.parent
HOST, PORT = "127.0.0.1", 700
"""Below every range of source ports that is used here."""
TIMEOUT_S = 300.0
_TURNS = 100
_TAKE_TURNS = f"""
import socket, sys
host, _, port = sys.argv[1].rpartition(":")
held = [socket.create_connection((host, int(port))) for _ in range({_TURNS})]
for one in held:
    one.sendall(b"GET / HTTP/1.1\\r\\nHost: turns\\r\\n\\r\\n")
for one in held:
    one.recv(1)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a client said at the end of a step, and its private memory then."""

    numbers: dict[str, Any]
    private_bytes: int


class Client:
    """A client process, paused between its steps: it does nothing until it is told to go on."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._paused = False

    def go(self) -> None:
        """Let it begin its next step, and do not wait for the end."""
        assert self._process.stdin is not None
        self._paused = False
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def step(self) -> Measured:
        """Let it run to the end of its step; RuntimeError, in its own words, if it does not get there."""
        assert self._process.stdout is not None
        if self._paused:
            self.go()
        # One line per step: between two steps nothing is left in Python's buffer that select would not see.
        if not select.select([self._process.stdout], [], [], TIMEOUT_S)[0]:
            raise RuntimeError(f"the client did not come to the end of its step within {TIMEOUT_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            _, words = self._process.communicate(timeout=TIMEOUT_S)
            raise RuntimeError(words.strip() or f"the client ended with status {self._process.returncode}")
        self._paused = True
        return Measured(numbers=json.loads(line), private_bytes=private_bytes(self._process.pid))

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
        with started(lab, here, script, HOST, str(PORT), *arguments) as process:
            yield process


def started(lab: Lab, host: LabHost, script: str, *arguments: str) -> Client:
    """A script of `peers/` as a process of its own in the namespaces of a lab's host."""
    return Client([*entering(lab, host), sys.executable, "-m", f"bench.peers.{script}", *arguments])


def entering(lab: Lab, host: LabHost) -> list[str]:
    """The command that runs another one in the namespaces of a lab's host."""
    namespaces = [f"--net=/proc/{host.pid}/ns/net"]
    if lab.in_user_namespace:
        namespaces += [f"--user=/proc/{host.pid}/ns/user", "--preserve-credentials"]
    return ["nsenter", *namespaces]


@contextmanager
def web_server(lab: Lab, host: LabHost, endpoints: Sequence[Endpoint]) -> Iterator[None]:
    """nginx, whose answers begin and do not end, so that each held response holds its connection.

    The rest of an answer is a request within nginx that waits for its turn, a minute for each one before it: one timer
    per connection, while a limit of bytes per second would be one event per connection and second, on both sides.
    MissingFeature where nginx is not installed.
    """
    listen = "".join(f"listen {endpoint} backlog=65535;" for endpoint in endpoints)
    servers = (
        f"limit_req_zone one zone=turns:32k rate=1r/m; postpone_output 0; default_type text/html;\n"
        f"server {{ {listen} location / {{ ssi on; return 200 'begun<!--# include virtual=\"/rest\" -->'; }}\n"
        f"location = /rest {{ limit_req zone=turns burst=1000000; }}\n"
        f"location /whole {{ return 200 whole; }} }}\n"
    )
    with nginx(lab, host, servers, endpoints[-1]):
        # So that nobody's turn comes while a client is measured.
        subprocess.run([*entering(lab, host), sys.executable, "-c", _TAKE_TURNS, str(endpoints[-1])], check=True)
        yield


@contextmanager
def nginx(lab: Lab, host: LabHost, servers: str, last: Endpoint) -> Iterator[None]:
    """nginx in one process that holds 19,000 connections, with these `server` blocks; `last` is where it listens.

    MissingFeature where it is not installed.
    """
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        raise MissingFeature("nginx is not installed: `apt-get install nginx-light`")
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "nginx.conf"
        settings.write_text(
            f"daemon off; master_process off; pid {folder}/pid; worker_rlimit_nofile 20000; error_log stderr crit;\n"
            f"events {{ worker_connections 19000; }}\n"
            f"http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;\n"
            f"client_body_temp_path {folder}/a; proxy_temp_path {folder}/b;\n"
            f"fastcgi_temp_path {folder}/c; uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;\n{servers} }}\n"
        )
        command = [*entering(lab, host), program, "-c", str(settings), "-e", "stderr"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                _await_listener(host, last, server)
                yield
            finally:
                server.kill()


def _await_listener(host: LabHost, endpoint: Endpoint, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while host.connect_once(endpoint) != "ok":
        if server.poll() is not None:
            raise RuntimeError(server.communicate()[1].strip() or "nginx ended at once")
        if time.monotonic() > deadline:
            raise RuntimeError(f"nginx does not listen within {TIMEOUT_S:g} s")
        time.sleep(0.02)


def private_bytes(pid: int) -> int:
    """Memory of the process that no other one maps: what it would give back."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    return sum(int(fields[name]) for name in ("Private_Clean", "Private_Dirty", "Swap")) * 1024
