"""Relayed connections that rest, very many of them in one broker, and then all used: `fourtuple serve` between our own
load and echo engines, three network namespaces, every echo compared.

Decides how many there are of what, and what has to be true: each connection is opened by a client that says a token of
its own at once and hears it back through the broker; all rest; each says its token again; all end. Anything wrong,
missing, refused or ended before its time is an error, and counted. There is no peer: with a descriptor for each side of
a connection none can hold so many where RLIMIT_NOFILE is 20,000.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from bench import brokers
from bench.arena import entering
from bench.brokers import Broker, Running
from fourtuple.engine import CarrierName, EchoConfig, LoadConfig, Phase, SourceChoice
from fourtuple.lab import Lab, kernel_memory_bytes
from fourtuple.lab.readings import descriptors_open
from fourtuple.lab.remote import RemoteEngine
from fourtuple.tuples import AddressSet, Endpoint, PortSet, TupleSpace

GROUP = 10_000
"""Connections of one load engine: group after group is opened and used, so that few are on their way at once."""
PATHS = 8
"""Listeners, each with a service of its own: from one address to one service there are at most 64,512 connections."""
REST_S = 10.0
WAIT_S = 120.0
PORT, SERVICE_PORT = 700, 701
TOKEN_BYTES = 64
FATES = ("right", "wrong", "missing")
FIRST_CLIENT = ip_address("10.81.0.1")
FIRST_LISTENER, FIRST_SERVICE = ip_address("10.82.0.1"), ip_address("10.83.0.1")
_NO_PROTOCOL = 0x80
"""What each token begins with, so that nothing takes it for the beginning of a protocol, and it goes to the default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resting:
    """One row."""

    broker: Broker

    @property
    def name(self) -> str:
        """The broker's."""
        return self.broker.name


ROWS = (Resting(broker=brokers.URING),)


def absent(row: Resting) -> str:
    """Why the row cannot run here; empty if it can."""
    return brokers.absent(row.broker)


def run(row: Resting, connections: int, rest_s: float = REST_S) -> dict[str, Any]:
    """Open, rest, use all, end; RuntimeError if one connection was not held or one echo did not come back right."""
    with Lab(("client", "broker", "service")) as lab, tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as folder:
        for host, prefix in (("client", "10.81.0.0/16"), ("broker", "10.82.0.0/24"), ("service", "10.83.0.0/24")):
            lab[host].add_any_ip(prefix)
            lab[host].set_sysctl("net.core.somaxconn", 65_535)
            lab[host].set_sysctl("net.ipv4.ip_local_port_range", "1024 65535")
        echo = EchoConfig(listen=tuple(Endpoint(FIRST_SERVICE + place, SERVICE_PORT) for place in range(PATHS)))
        service = lab["service"].start_engine(echo, CarrierName.URING)
        service.wait_for(lambda now: now.listening_now == PATHS * service.workers, WAIT_S)
        with _broker(lab, row, Path(folder)) as broker:
            broker.wait_for(lambda now: now["accepted"] == 0)
            return _played(lab, broker, service, connections, rest_s)


def _played(lab: Lab, broker: _Broker, service: RemoteEngine, connections: int, rest_s: float) -> dict[str, Any]:
    user_before, kernel_before = broker.running.resident_bytes(), kernel_memory_bytes()
    started_s, clients, first = time.monotonic(), list[RemoteEngine](), 0
    while first < connections:
        count = min(GROUP, connections - first)
        clients.append(_opened(lab, len(clients), count))
        first += count
    took_s = time.monotonic() - started_s
    held = broker.wait_for(lambda now: now["relaying"] == connections)
    kernel_bytes, user_bytes = kernel_memory_bytes() - kernel_before, broker.running.resident_bytes() - user_before
    descriptors = sum(map(descriptors_open, broker.running.processes))
    cpu_before_ns = broker.running.cpu_ns()
    time.sleep(rest_s)
    rest_cpu_ns = broker.running.cpu_ns() - cpu_before_ns
    rested = broker.wait_for(lambda now: now["relaying"] == connections)
    using_s = time.monotonic()
    for client in clients:
        client.ping()
    for client in clients:
        client.wait_for(_answered(2), WAIT_S)
    used_s = time.monotonic() - using_s
    ends = [client.snapshot() for client in clients]
    right, wrong, missing = (sum(getattr(end, f"pings_{fate}") for end in ends) for fate in FATES)
    served = service.snapshot().open_now
    for client in clients:
        client.close()
    for client in clients:
        client.join(WAIT_S)
        client.forget()
    ended = broker.wait_for(lambda now: sum(now["ended"].values()) == connections)
    early = sum(rested["ended"].values())
    errors = {
        "wrong": wrong,
        "missing": missing,
        "unanswered": 2 * connections - right - wrong - missing,
        "ended early": early,
        "not ended as relayed": connections - ended["ended"].get("relayed", 0),
        "not at the service": connections - served,
        "system calls": sum(failure["count"] for failure in ended["failures"]),
        **{f"client: {failure}": failure.count for end in ends for failure in end.failures},
    }
    if any(errors.values()):
        told = ", ".join(f"{what} {count:,}" for what, count in errors.items() if count)
        raise RuntimeError(f"of {connections:,} connections {held['relaying']:,} were held; {told}; broker: {ended}")
    return {
        "held": held["relaying"],
        "connections_per_s": connections / took_s,
        "user_bytes_each": user_bytes / connections,
        "kernel_bytes_each": kernel_bytes / connections,
        "broker_descriptors": descriptors,
        "rest_s": rest_s,
        "rest_cpu_percent": rest_cpu_ns / 1e7 / rest_s if rest_s else 0.0,
        "used_per_s": connections / used_s,
        "echoes_right": right,
        "errors": sum(errors.values()),
        "retries": ended["retries"],
        "user_bytes_each_after": (broker.running.resident_bytes() - user_before) / connections,
    }


def _opened(lab: Lab, group: int, count: int) -> RemoteEngine:
    """The next clients: each connects, says its token and has it back."""
    space = TupleSpace(
        sources=AddressSet.parse(str(FIRST_CLIENT + group)),
        source_ports=PortSet.parse("1024-65535"),
        destinations=AddressSet.parse(str(FIRST_LISTENER + group % PATHS)),
        destination_ports=PortSet.parse(str(PORT)),
    )
    load = LoadConfig(
        space=space,
        connections=count,
        choice=SourceChoice.BIND,
        ping_timeout_s=WAIT_S,
        token_bytes=TOKEN_BYTES,
        # Little-endian: the first byte is the same for all.
        seed=(group + 1) << 8 | _NO_PROTOCOL,
    )
    engine = lab["client"].start_engine(load, CarrierName.URING, 1)
    engine.wait_for(lambda now: now.phase is Phase.HOLDING and now.open_now == count, WAIT_S)
    engine.ping()
    engine.wait_for(_answered(1), WAIT_S)
    return engine


def _answered(rounds: int) -> Callable[[Any], bool]:
    def holds(now: Any) -> bool:  # noqa: ANN401 - a Snapshot, which only annotations need
        return bool(now.pings_answered >= rounds * now.open_now)

    return holds


class _Broker:
    """`fourtuple serve`, and the last line of counters that it has printed."""

    def __init__(self, process: subprocess.Popen[bytes], lines: Path) -> None:
        self.running = Running(pid=process.pid, port=PORT, started_s=time.monotonic())
        self._process, self._lines = process, lines

    def wait_for(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first counters that are so."""
        until_s = time.monotonic() + WAIT_S
        while True:
            whole = self._lines.read_bytes().rpartition(b"\n")[0]
            now: dict[str, Any] | None = json.loads(whole.rpartition(b"\n")[2]) if whole else None
            if now is not None and holds(now):
                return now
            if self._process.poll() is not None:
                raise RuntimeError(f"the broker ended with status {self._process.returncode}; at last {now}")
            if time.monotonic() > until_s:
                raise RuntimeError(f"the broker did not come so far within {WAIT_S:g} s: {now}")
            time.sleep(0.05)


@contextmanager
def _broker(lab: Lab, row: Resting, folder: Path) -> Iterator[_Broker]:
    file, lines = folder / "broker.toml", folder / "counters"
    file.write_text(
        "".join(
            f'[[listen]]\naddress = "{FIRST_LISTENER + place}:{PORT}"\nsniff_ms = 60000\n'
            f'default = "tcp:{FIRST_SERVICE + place}:{SERVICE_PORT}"\n'
            for place in range(PATHS)
        )
    )
    command = [sys.executable, "-m", "fourtuple", "serve", "-c", str(file), "--carrier", row.broker.program]
    command = [*entering(lab, lab["broker"]), *command, "--json", "--every", "0.25", "--grace", "0"]
    with lines.open("wb") as written, subprocess.Popen(command, stdout=written) as process:
        try:
            yield _Broker(process, lines)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
