"""What a brokered connection costs the broker in CPU, by server name to a unix socket; HAProxy beside.

Decides who is measured and with what: threads here each connect, say a TLS hello, and read until the end; a process of
its own is the service, which says one byte and closes, the same for all. CPU is what the scheduler has counted for the
broker's threads, all of them, from the first connection to the last.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

NAME = "shop.example.com"
CLIENTS = 8
WARM_UP = 200
PATIENCE_S = 30.0
_SERVICE = Path(__file__).parent / "peers" / "brokered_service.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """One row."""

    name: str
    delivery: str = "relay"
    carrier: str = ""
    """Of ours; empty is HAProxy."""


BROKERS = (
    Broker(name="HAProxy, relay"),
    Broker(name="fourtuple uring, handoff", delivery="handoff", carrier="uring"),
    Broker(name="fourtuple epoll, handoff", delivery="handoff", carrier="epoll"),
    Broker(name="fourtuple uring, relay", carrier="uring"),
    Broker(name="fourtuple epoll, relay", carrier="epoll"),
)


def absent(broker: Broker) -> str:
    """Why the row cannot run here; empty if it can."""
    return "" if broker.carrier or _haproxy() else "haproxy is not installed"


def run(broker: Broker, connections: int) -> dict[str, Any]:
    """CPU of the broker per connection, and connections per second."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as name:
        folder = Path(name)
        service = [sys.executable, str(_SERVICE), str(folder / "service"), broker.delivery]
        with _process(service), _process(_command(broker, folder, port := _free_port())) as process:
            _wait_for_port(port)
            _visit(port, WARM_UP)
            before_ns, started_s = _cpu_ns(process.pid), time.monotonic()
            _visit(port, connections)
            took_s = time.monotonic() - started_s
            return {
                "cpu_us_per_connection": (_cpu_ns(process.pid) - before_ns) / 1000 / connections,
                "connections_per_s": connections / took_s,
            }


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure."""
    return {key: median(run[key] for run in runs) for key in runs[0]}


def _command(broker: Broker, folder: Path, port: int) -> list[str]:
    if not broker.carrier:
        file = folder / "haproxy.cfg"
        file.write_text(
            textwrap.dedent(f"""
                global
                    nbthread {len(os.sched_getaffinity(0))}
                defaults
                    mode tcp
                    timeout connect 5s
                    timeout client 30s
                    timeout server 30s
                frontend all
                    bind 127.0.0.1:{port} backlog 4096
                    tcp-request inspect-delay 5s
                    tcp-request content accept if {{ req.ssl_hello_type 1 }}
                    use_backend shop if {{ req.ssl_sni -i {NAME} }}
                backend shop
                    server shop unix@{folder}/service
            """)
        )
        return [_haproxy(), "-db", "-f", str(file)]
    file = folder / "broker.toml"
    file.write_text(
        f'[[listen]]\naddress = "127.0.0.1:{port}"\n'
        f'[[service]]\nname = "{NAME}"\ntarget = "unix:{folder}/service"\ndelivery = "{broker.delivery}"\n'
    )
    return [sys.executable, "-m", "fourtuple", "serve", "-c", str(file), "--carrier", broker.carrier, "--json"]


def _visit(port: int, connections: int) -> None:
    hello, failures = _hello(), list[BaseException]()

    def visit(count: int) -> None:
        try:
            for _ in range(count):
                with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
                    client.sendall(hello)
                    if client.recv(64) != b"x" or client.recv(64):
                        raise RuntimeError("the service's answer did not come")
        except (OSError, RuntimeError) as problem:
            failures.append(problem)

    shares = [connections // CLIENTS + (place < connections % CLIENTS) for place in range(CLIENTS)]
    threads = [threading.Thread(target=visit, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"{len(failures)} of {CLIENTS} clients failed: {failures[0]}")


def _hello() -> bytes:
    """What OpenSSL says first to a server of that name."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    try:
        context.wrap_bio(incoming, outgoing, server_hostname=NAME).do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a peer")


def _cpu_ns(process: int) -> int:
    """What every thread has run; schedstat counts in nanoseconds, and stat only in hundredths of a second."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def _haproxy() -> str:
    return shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError("the broker does not listen")


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
