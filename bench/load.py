"""`fourtuple load` beside wrk, hey, h2load, oha and tcpkali, on the same nginx: connections held, how fast they are
made, requests answered, and what the client costs.

Decides which clients are compared and what is taken of each run. Every number is the server's (stub_status) or the
kernel's (/proc), never a client's own. Each client has one thread where it can be told so; nginx has one process.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from bench.arena import entering, nginx, private_bytes
from fourtuple.engine import uring_abilities
from fourtuple.errors import FourtupleError
from fourtuple.lab import Lab
from fourtuple.tuples import Endpoint

FEW = 100
MOST_CONNECTIONS = 18_000
"""Inside the descriptors of nginx, and of each client that has one for each connection."""
SETTLE_S, MEASURE_S, RUN_S, START_S = 1.0, 2.0, 60, 30.0
"""After all connections stand; for the numbers; how long a client is told to run; how long it may take to connect."""
URL = "http://127.0.0.1:700/"
PORT, STATUS_PORT = 700, 701
GLANCE_S = 0.002
_STATUS = re.compile(r"Active connections: (\d+).*?\n\s*\d+ \d+ (\d+)", re.DOTALL)
_OURS = (sys.executable, "-m", "fourtuple", "load", URL, "-c", "{count}", "--duration", "{seconds}", "--workers", "1",
         "--window", "1000", "--json")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One row: a command, in which {count} and {seconds} are filled in."""

    name: str
    command: tuple[str, ...]
    package: str = ""
    """How to come by it."""


CLIENTS = (
    Client(name="fourtuple uring", command=(*_OURS, "--closed-loop", "--carrier", "uring")),
    Client(name="fourtuple epoll", command=(*_OURS, "--closed-loop", "--carrier", "epoll")),
    # A round on all connections before the next begins, 256 requests under way at once.
    Client(name="fourtuple, rounds", command=(*_OURS, "--ping-every", "0.001", "--carrier", "uring")),
    Client(
        name="wrk",
        command=("wrk", "-t1", "-c{count}", "-d{seconds}", "--timeout", "30", URL),
        package="apt-get install wrk",
    ),
    Client(
        name="hey",
        command=("hey", "-z", "{seconds}s", "-c", "{count}", "-cpus", "1", URL),
        package="apt-get install hey",
    ),
    Client(
        name="h2load",
        command=("h2load", "--h1", "-t1", "-c{count}", "-D{seconds}", URL),
        package="apt-get install nghttp2-client",
    ),
    Client(
        name="oha",
        command=("oha", "--no-tui", "-z", "{seconds}s", "-c", "{count}", URL),
        package="cargo install oha",
    ),
    Client(
        # It waits for no answer: a request per second on each connection is what it is told to send.
        name="tcpkali, 1/s each",
        command=("tcpkali", "-w1", "-c{count}", "-T{seconds}s", "--connect-rate=10000", "--connect-timeout=30", "-r1",
                 "--nagle=off", "-m", "GET / HTTP/1.1\r\nHost: bench\r\n\r\n", f"127.0.0.1:{PORT}"),
        package="build github.com/satori-com/tcpkali; glibc 2.32 and newer need an empty sys/sysctl.h",
    ),
    Client(name="k6", command=("k6",), package="not in Debian, nor in a package registry"),
)  # fmt: skip


def absent(client: Client) -> str:
    """Why it cannot run here; empty if it can."""
    if shutil.which(client.command[0]) is None:
        return f"{client.command[0]} is not installed ({client.package})"
    if "uring" in client.command:
        try:
            uring_abilities()
        except FourtupleError as problem:
            return str(problem)
    return ""


def run(client: Client, connections: int) -> dict[str, float]:
    """Few connections, then many, each on a fresh nginx; RuntimeError if the client ends or never connects."""
    few, many = _measure(client, min(FEW, connections)), _measure(client, connections)
    return {
        "held": many["held"],
        "connections_per_s": many["connections_per_s"],
        "requests_per_s_few": few["requests_per_s"],
        "requests_per_s": many["requests_per_s"],
        "private_bytes": many["private_bytes"],
        # What the program itself takes, whatever it holds, is not the connections'.
        "bytes_per_connection": (many["private_bytes"] - few["private_bytes"]) / max(1.0, many["held"] - few["held"]),
        "cpu_us_per_request_few": few["cpu_us_per_request"],
        "cpu_us_per_request": many["cpu_us_per_request"],
    }


def _measure(client: Client, count: int) -> dict[str, float]:
    with _status() as (lab, status):
        words = [word.replace("{count}", str(count)).replace("{seconds}", str(RUN_S)) for word in client.command]
        with subprocess.Popen(
            [*entering(lab, lab["bench"]), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                connections_per_s = _await_all(process, count)
                time.sleep(SETTLE_S)
                before, cpu_before_s, began_s = status.read(), _cpu_s(process.pid), time.monotonic()
                time.sleep(MEASURE_S)
                after, cpu_after_s, ended_s = status.read(), _cpu_s(process.pid), time.monotonic()
                requests = max(1, after[1] - before[1])
                return {
                    "held": min(before[0], after[0]),
                    "connections_per_s": connections_per_s,
                    "requests_per_s": requests / (ended_s - began_s),
                    "private_bytes": private_bytes(process.pid),
                    "cpu_us_per_request": (cpu_after_s - cpu_before_s) / requests * 1e6,
                }
            except OSError as error:
                raise RuntimeError(f"the client ended with status {process.wait(1)}") from error
            finally:
                process.kill()


def _await_all(process: subprocess.Popen[bytes], count: int) -> float:
    """Connections made per second between the first tenth and nine tenths; 0 if it never holds nine tenths.

    Seen by the kernel's count of sockets, of which a connection is two here: nginx, when busy, answers nobody.
    """
    deadline_s = time.monotonic() + START_S
    first: tuple[float, float] | None = None
    while True:
        made, now_s = _sockets(process.pid) / 2, time.monotonic()
        if first is None and made >= count / 10:
            first = now_s, made
        if made >= 0.9 * count and first is not None:
            return (made - first[1]) / (now_s - first[0]) if now_s > first[0] else 0.0
        if process.poll() is not None:
            raise RuntimeError(f"the client ended with status {process.returncode}")
        if now_s >= deadline_s:
            return 0.0
        time.sleep(GLANCE_S)


def _sockets(pid: int) -> int:
    matched = re.search(r"^TCP: inuse (\d+)", Path(f"/proc/{pid}/net/sockstat").read_text(), re.MULTILINE)
    return int(matched[1]) if matched else 0


def _cpu_s(pid: int) -> float:
    """utime and stime of all threads, by their place after the name (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Status:
    """nginx's own counters, over a connection that is kept."""

    def __init__(self, lab: Lab) -> None:
        command = [*entering(lab, lab["bench"]), sys.executable, "-c", _READER]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def read(self) -> tuple[int, int]:
        """Connections that are open now, and requests so far, less those of this reader."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        matched = _STATUS.search(self._process.stdout.readline().replace("|", "\n"))
        if matched is None:
            raise RuntimeError("nginx gives no status: the client takes more places than it was told to, all there are")
        return int(matched[1]) - 1, int(matched[2])

    def close(self) -> None:
        """End the reader."""
        self._process.kill()
        self._process.communicate()


_READER = f"""
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", {STATUS_PORT})
for _ in sys.stdin:
    connection.request("GET", "/")
    print(connection.getresponse().read().decode().replace("\\n", "|"), flush=True)
"""


@contextmanager
def _status() -> Iterator[tuple[Lab, _Status]]:
    with Lab(("bench",)) as lab:
        host = lab["bench"]
        host.set_sysctl("net.ipv4.ip_local_port_range", "1024 65535")
        host.set_sysctl("net.core.somaxconn", 65_535)
        servers = (
            f'server {{ listen 127.0.0.1:{PORT} backlog=65535; location / {{ return 200 "hello\\n"; }} }}\n'
            f"server {{ listen 127.0.0.1:{STATUS_PORT}; location / {{ stub_status; }} }}\n"
        )
        with nginx(lab, host, servers, Endpoint(ip_address("127.0.0.1"), STATUS_PORT)):
            status = _Status(lab)
            try:
                yield lab, status
            finally:
                status.close()
