"""Upgrades that nobody is to notice: a broker that is replaced ten times in a row under load.

Decides what is under way meanwhile, and what has to be true: relays that never rest and compare every byte, clients
that come and go as fast as they can, clients that wait for a service that takes its time to start, services that are
awake. None may fail, miss or see twice a byte; the services go on in the processes that they have. Then programs that
are broken in three ways: nothing may change. Everything is in a network namespace of its own.

    python -m bench.upgrade [--relays COUNT] [--parked COUNT] [--services COUNT] [--upgrades COUNT] [--carrier NAME]
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from bench import traffic
from bench.waiting import children, listens, until
from fourtuple.engine import CarrierName, EchoConfig, Engine, LoadConfig, Phase, SourceChoice, raise_soft_descriptors
from fourtuple.lab import namespaces
from fourtuple.tuples import AddressSet, Endpoint, PortSet, TupleSpace

PORT, ECHO_PORT = 700, 701
WAIT_S = 120.0
VISITS = 1_000
"""Connections of a slice of those that come and go."""
SLOW_S = 20.0
"""What the service takes to start that clients wait for."""
_SLEEPER = Path(__file__).parent / "peers" / "sleeper.c"
_NO_PROTOCOL = 0x80


def file_of(folder: Path, slow_s: float) -> Path:
    """A broker with a service of each kind."""
    path = folder / "broker.toml"
    path.write_text(
        f"""[[listen]]
address = "127.0.0.1:{PORT}"
sniff_ms = 60000
default = "tcp:127.0.0.1:{ECHO_PORT}"
[control]
socket = "{folder}/control"
[[template]]
name = "sleeper"
argv = ["{folder}/sleeper", "{{name}}"]
socket = "pass"
ready = "started"
idle_s = 3600
[[template]]
name = "slow"
argv = ["/bin/sh", "-c", "sleep {slow_s}; exec {folder}/own {{socket}} {{name}}"]
socket = "own"
ready = "listening"
start_timeout_s = 100
[[route]]
name = "*.awake.example"
to = "unix:{folder}/run/{{label}}"
start = "sleeper"
[[service]]
name = "slow.example"
target = "unix:{folder}/run/slow"
start = "slow"
patience_ms = 100000
[[service]]
name = "visit.example"
target = "unix:{folder}/run/visited"
"""
    )
    return path


class Fleet:
    """`fourtuple serve`, told over its control socket."""

    def __init__(self, folder: Path, carrier: str, slow_s: float) -> None:
        self.folder = folder
        self.said = folder / "said"
        command = [sys.executable, "-m", "fourtuple", "serve", "-c", str(file_of(folder, slow_s)), "--carrier", carrier]
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [*command, "--json", "--events", str(folder / "events"), "--grace", "5"], stdout=said, stderr=said
            )
        until(lambda: listens(PORT) or self.process.poll() is not None, WAIT_S)

    def upgrade(self, executable: str | None = None) -> dict[str, Any]:
        """How it went."""
        more = [] if executable is None else ["--executable", executable]
        command = [sys.executable, "-m", "fourtuple", "upgrade", "--socket", str(self.folder / "control"), "--json"]
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=WAIT_S, check=False)
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            raise RuntimeError(f"upgrade said: {done.stdout} {done.stderr}") from None
        return answer

    def brokers(self) -> list[int]:
        """Processes of the broker."""
        found = []
        for child in children(self.process.pid):
            with suppress(OSError):
                words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                if b"--broker" in words or b"serve" in words:
                    found.append(child)
        return found

    def end(self) -> dict[str, Any]:
        """Its last numbers."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(WAIT_S)
        lines = self.said.read_text().splitlines()
        if status != 0:
            raise RuntimeError(f"the broker ended with status {status}: {lines[-5:]}")
        last: dict[str, Any] = json.loads(lines[-1])
        return last


def run(
    relays: int, parked: int, services: int, upgrades: int, carrier: str, slow_s: float = SLOW_S, rest_s: float = 0
) -> dict[str, Any]:
    """All of it; RuntimeError says what somebody has noticed. Those that come and go rest after each slice."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "run").mkdir()
        for source, made in ((_SLEEPER, "sleeper"), (_SLEEPER.with_name("owner.c"), "own")):
            subprocess.run(["gcc", "-O2", "-o", folder / made, source], check=True)
        program = stack.enter_context(traffic.compiled())
        stack.enter_context(program.service(f"unix:{folder}/run/visited", "one=x"))
        echo = stack.enter_context(Engine.start(EchoConfig(listen=(Endpoint(ip_address("127.0.0.1"), ECHO_PORT),))))
        echo.wait_for(lambda now: now.listening_now > 0, WAIT_S)
        fleet = Fleet(folder, carrier, slow_s)
        try:
            numbers = _played(fleet, program, echo, relays, parked, services, upgrades, rest_s)
            ended = fleet.end()
        finally:
            if fleet.process.poll() is None:
                fleet.process.kill()
        held = ended["accepted"] - sum(ended["ended"].values())
        return {**numbers, "accepted": ended["accepted"], "unaccounted": held, "ended": ended["ended"]} | {
            "moved": ended["supervisor"]["connections_moved"]
        }


def _played(
    fleet: Fleet,
    program: traffic.Traffic,
    echo: Engine,
    relays: int,
    parked: int,
    services: int,
    upgrades: int,
    rest_s: float,
) -> dict[str, Any]:
    pids = _woken(services)
    started = children(fleet.process.pid)
    supervisor = fleet.process.pid
    with (
        _relaying(relays) as load,
        _visiting(program, fleet.folder, rest_s) as visits,
        ThreadPoolExecutor(parked or 1) as pool,
    ):
        took = list[float]()
        waiting = [pool.submit(_ask, "slow.example") for _ in range(parked)]
        rounds = load.snapshot().pings_right
        for number in range(upgrades):
            time.sleep(0.5)
            begun_s, before = time.monotonic(), fleet.brokers()
            answer = fleet.upgrade()
            if answer.get("state") != "done":
                raise RuntimeError(f"upgrade {number}: {answer}")
            until(lambda before=before: not set(before) & set(fleet.brokers()), WAIT_S)  # type: ignore[misc]
            took.append(round(time.monotonic() - begun_s, 2))
            _check(load, relays, number)
        heard = [one.result(WAIT_S) for one in waiting]
        wrong = [text for text in heard if not text.startswith(b"slow.example heard ")]
        rounds = load.snapshot().pings_right - rounds
        broken = _broken(fleet)
        _check(load, relays, upgrades)
        still = [pid for pid in started if pid in children(supervisor)]
        numbers = {
            "upgrades": upgrades,
            "took_s": took,
            "relays": load.snapshot().open_now,
            "rounds_right": rounds,
            "parked_right": len(heard) - len(wrong),
            "parked_wrong": [text.decode(errors="replace")[:120] for text in wrong[:5]],
            "visits": visits["count"],
            "visits_per_s": round(visits["count"] / (time.monotonic() - visits["begun_s"])),
            "visits_failed": visits["failed"],
            "services_same_pid": len(set(pids) & set(still)),
            "supervisor_pid_same": fleet.process.poll() is None,
            "broken_rolled_back": broken,
        }
        _woken(services)
        return numbers


def _check(load: Engine, relays: int, number: int) -> None:
    now = load.snapshot()
    wrong = now.pings_wrong + now.pings_missing + now.pings_refused
    if now.open_now != relays or wrong or now.broken:
        raise RuntimeError(f"upgrade {number}: {now.open_now:,} of {relays:,} relays, {wrong} wrong or missing, {now}")


def _broken(fleet: Fleet) -> int:
    """Programs that do not start, do not understand, or whose broker process does not: how many were rolled back."""
    scripts = {
        "absent": None,
        "fails": "#!/bin/sh\necho no >&2\nexit 1\n",
        # It understands the estate, as the check sees it, and its broker process ends at once.
        "half": f'#!/bin/sh\ncase "$*" in *--broker*) exit 3;; esac\nexec {sys.executable} "$@"\n',
    }
    rolled_back = 0
    for name, text in scripts.items():
        path = fleet.folder / name
        if text is not None:
            path.write_text(text)
            path.chmod(0o755)
        before = fleet.brokers()
        answer = fleet.upgrade(str(path))
        rolled_back += answer.get("state") == "failed" and fleet.brokers() == before
    return rolled_back


@contextmanager
def _relaying(count: int) -> Iterator[Engine]:
    """Relays that never rest: each sends its token, compares what comes back, and goes on."""
    space = TupleSpace(
        sources=AddressSet.parse("127.0.1.1"),
        source_ports=PortSet.parse("1024-65535"),
        destinations=AddressSet.parse("127.0.0.1"),
        destination_ports=PortSet.parse(str(PORT)),
    )
    config = LoadConfig(
        space=space,
        connections=count,
        choice=SourceChoice.BIND,
        ping_timeout_s=30,
        ping_every_s=1.0,
        ping_window=1_024,
        token_bytes=256,
        seed=1 << 8 | _NO_PROTOCOL,
    )
    with Engine.start(config, CarrierName.AUTO, 1) as engine:
        engine.wait_for(lambda now: now.phase is Phase.HOLDING and now.open_now == count, WAIT_S)
        engine.wait_for(lambda now: now.pings_right >= count, WAIT_S)
        yield engine


@contextmanager
def _visiting(program: traffic.Traffic, folder: Path, rest_s: float) -> Iterator[dict[str, Any]]:
    """Clients that come, are answered and go, slice after slice."""
    hellos = traffic.write_hellos(folder / "hellos", ["visit.example"])
    seen: dict[str, Any] = {"count": 0, "failed": [], "begun_s": time.monotonic()}
    over = threading.Event()

    def visit() -> None:
        while not over.is_set():
            try:
                program.visit(PORT, hellos, 4, VISITS)
                seen["count"] += VISITS
                over.wait(rest_s)
            except RuntimeError as error:
                seen["failed"].append(str(error))
                time.sleep(0.1)

    thread = threading.Thread(target=visit)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join(WAIT_S)


def _ask(name: str) -> bytes:
    heard = b""
    with socket.create_connection(("127.0.0.1", PORT), timeout=WAIT_S) as client:
        client.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        try:
            while block := client.recv(65_536):
                heard += block
        except OSError as error:
            return heard + repr(error).encode()
    return heard


def _woken(count: int) -> list[int]:
    """Each service answers; their processes."""
    for number in range(count):
        name = f"s{number}.awake.example"
        heard = _ask(name)
        if not heard.startswith(f"{name} heard ".encode()):
            raise RuntimeError(f"{name} said {heard[:80]!r}")
    return [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and b"awake.example" in _command_line(path)
    ]


def _command_line(path: Path) -> bytes:
    with suppress(OSError):
        return (path / "cmdline").read_bytes()
    return b""


def main() -> int:
    """Print what was seen, as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--relays", type=int, default=5_000)
    options.add_argument("--parked", type=int, default=500)
    options.add_argument("--services", type=int, default=200, help="that are awake")
    options.add_argument("--upgrades", type=int, default=10)
    options.add_argument("--carrier", default="auto")
    options.add_argument("--slow", type=float, default=SLOW_S, help="seconds that the slow service takes to start")
    options.add_argument("--rest", type=float, default=0.0, help="seconds between slices of those that come and go")
    given = options.parse_args()
    raise_soft_descriptors()
    namespaces.enter(namespaces.Membership())
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/net/core/somaxconn").write_text("65535")
    seen = run(given.relays, given.parked, given.services, given.upgrades, given.carrier, given.slow, given.rest)
    print(json.dumps(seen, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
