"""Services that sleep: ten thousand called at once, and two thousand awake among a million.

Decides how many there are of what, and what has to be true: each client gets the answer of the service that it has
named, none is dropped; afterwards no process, no socket file and no descriptor is left of any. A service is a C program
of thirty lines (`peers/sleeper.c`), so that what is measured is ours. There is no peer: none of the brokers that are
compared elsewhere starts a service.

    python -m bench.wake [--storm COUNT] [--services COUNT --awake COUNT] [--wakes COUNT]

Of real services it is `bench.waking` that says what they are.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import waking
from bench.waiting import children, listens, until
from fourtuple.lab import namespaces
from fourtuple.registry import Registry
from fourtuple.services import Match, Route

DOMAIN = "sleep.example"
PORT = 700
WAIT_S = 330.0
WITHOUT_S = 60.0
"""Within which memory is to be given back."""
PATIENCE_S = 300
"""Of the broker, with clients that have not said anything yet, too: ten thousand of one process take their time."""
STORM, SERVICES, AWAKE, WAKES = 10_000, 1_000_000, 2_000, 20
_SOURCE = Path(__file__).parent / "peers" / "sleeper.c"


def name_of(number: int) -> str:
    """Of a service."""
    return f"s{number}.{DOMAIN}"


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A broker whose services sleep."""

    folder: Path
    process: subprocess.Popen[str]

    @property
    def broker_pids(self) -> Sequence[int]:
        """Its supervisor, and broker processes, which are the same program; not the services."""
        own = Path(f"/proc/{self.process.pid}/exe").readlink()
        return [self.process.pid, *(pid for pid in children(self.process.pid) if _executes(pid) == own)]

    def services(self) -> int:
        """Processes of services that there are."""
        return len(children(self.process.pid)) - (len(self.broker_pids) - 1)

    def sockets(self) -> int:
        """Socket files of services that there are."""
        return sum(1 for _ in (self.folder / "run").iterdir())

    def memory_mib(self) -> dict[str, float]:
        """Memory of the supervisor and of the broker process without pages of files, what two share counting for each
        one half; their sum, `own`; and `resident`, the sum with what of files is mapped and in memory."""
        rows = [_mapped_kib(pid) for pid in self.broker_pids]
        own = [row["Pss_Anon"] + row["Pss_Shmem"] for row in rows]
        found = dict(zip(("supervisor", "broker"), own, strict=False))
        found |= {"own": sum(own), "resident": sum(row["Pss"] for row in rows)}
        return {name: round(kib / 1024, 1) for name, kib in found.items()}

    def descriptors(self) -> int:
        """Open in the broker's processes."""
        return sum(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) for pid in self.broker_pids)


@contextmanager
def sleeping(services: int, *, idle_s: float, most_starting: int = 32) -> Iterator[World]:
    """A broker for so many services, a row each if there are more than a route's pattern is to make."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as name:
        folder = Path(name)
        (folder / "run").mkdir()
        program = folder / "sleeper"
        subprocess.run(["gcc", "-O2", "-o", program, _SOURCE], check=True)
        target = f"unix:{folder}/run/"
        with Registry(folder / "store") as registry:
            if services > STORM:
                names = map(name_of, range(services))
                rows = (json.dumps({"name": name, "target": target + name, "start": "sleeper"}) for name in names)
                registry.import_text(io.BytesIO("\n".join(rows).encode()), "jsonl")
            else:
                registry.add_routes([Route(match=Match(name=f"*.{DOMAIN}"), to=target + "{name}", start="sleeper")])
        (folder / "broker.toml").write_text(
            f'[[listen]]\naddress = "127.0.0.1:{PORT}"\nsniff_ms = {PATIENCE_S * 1000}\n'
            f"[wake]\nmost_starting = {most_starting}\nmost_running = {services + 1}\n"
            f'[[template]]\nname = "sleeper"\nargv = ["{program}", "{{name}}"]\nsocket = "pass"\nready = "started"\n'
            f"idle_s = {idle_s}\n"
        )
        command = [sys.executable, "-m", "fourtuple", "serve", "-c", f"{folder}/broker.toml", "--store"]
        command += [f"{folder}/store", "--json", "--every", "1", "--patience", str(PATIENCE_S)]
        with (
            (folder / "said").open("w") as said,
            subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True) as process,
        ):
            try:
                until(lambda: listens(PORT) or process.poll() is not None, WAIT_S)
                yield World(folder=folder, process=process)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(WAIT_S)
                print((folder / "said").read_text().splitlines()[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What clients heard."""

    right: int
    wrong: Sequence[str]
    """Why, of each that did not hear its service."""
    took_s: float
    first_byte_ms: Sequence[float]

    def figures(self) -> dict[str, Any]:
        """Of one row."""
        took = sorted(self.first_byte_ms) or [0.0]
        return {
            "right": self.right,
            "wrong": len(self.wrong),
            "took_s": round(self.took_s, 3),
            "p50_ms": round(statistics.median(took), 3),
            "p99_ms": round(took[int(len(took) * 0.99)], 3),
            "most_ms": round(took[-1], 3),
        }


async def ask(names: Sequence[str], at_once: int) -> Asked:
    """Each name by a connection of its own."""
    took: list[float] = []
    wrong: list[str] = []
    turn = asyncio.Semaphore(at_once)

    async def visit(name: str) -> None:
        request = f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()
        async with turn:
            begun_s = time.monotonic()
            try:
                async with asyncio.timeout(WAIT_S):
                    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
                    try:
                        writer.write(request)
                        first = await reader.read(1)
                        took.append((time.monotonic() - begun_s) * 1e3)
                        heard = first + await reader.read()
                    finally:
                        writer.close()
            except (OSError, TimeoutError) as error:
                wrong.append(f"{name}: {error!r}")
                return
            if heard != name.encode() + b" heard " + request:
                wrong.append(f"{name}: {heard[:60]!r}")

    begun_s = time.monotonic()
    await asyncio.gather(*map(visit, names))
    return Asked(right=len(names) - len(wrong), wrong=wrong, took_s=time.monotonic() - begun_s, first_byte_ms=took)


def storm(count: int) -> dict[str, Any]:
    """All of `count` sleepers called at once, then left alone until they sleep again."""
    with sleeping(count, idle_s=20.0) as world:
        warm = asyncio.run(ask([name_of(count)], 1))
        assert warm.right == 1, warm.wrong
        held = world.memory_mib()
        before = {"mib": held, "descriptors": world.descriptors()}
        asked = asyncio.run(ask([name_of(number) for number in range(count)], count))
        at_most = {"services": world.services(), "mib": world.memory_mib()}
        again = asyncio.run(ask([name_of(number) for number in range(0, count, 10)], 100))
        until(lambda: world.services() == 0 and world.sockets() == 0, WAIT_S)
        slept, begun_s = world.memory_mib(), time.monotonic()
        # What a flood has left in memory goes some seconds later, with the processes that have it.
        with suppress(RuntimeError):
            until(lambda: world.memory_mib()["own"] < held["own"] + 8, WITHOUT_S)
        time.sleep(2.0)
        after = {
            "mib": world.memory_mib(),
            "mib_at_once": slept,
            "given_back_s": round(time.monotonic() - begun_s, 1),
            "descriptors": world.descriptors(),
            "services": world.services(),
            "sockets": world.sockets(),
        }
        for line in asked.wrong[:10]:
            print(line)
        return {"storm": asked.figures(), "again": again.figures(), "before": before, "awake": at_most, "after": after}


def million(services: int, awake: int) -> dict[str, Any]:
    """Some of very many awake at once, woken one after the other: what the broker holds, and how long a wake takes."""
    with sleeping(services, idle_s=600.0) as world:
        step = services // awake
        asked = asyncio.run(ask([name_of(number) for number in range(0, step * awake, step)], 1))
        own = _own_start_ms(world.folder / "sleeper", 200)
        figures = asked.figures()
        return {
            **figures,
            "own_start_p50_ms": round(own, 3),
            "over_own_start_p50_ms": round(figures["p50_ms"] - own, 3),
            "awake": world.services(),
            "mib": world.memory_mib(),
            "descriptors": world.descriptors(),
        }


def _own_start_ms(program: Path, count: int) -> float:
    """From before its start to its first byte, without a broker: the median."""
    took = []
    for number in range(count):
        with tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as name, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{name}/socket")
            listener.listen()
            begun_s = time.monotonic()
            pid = os.posix_spawn(
                program, [str(program), name_of(number)], {}, file_actions=[(os.POSIX_SPAWN_DUP2, listener.fileno(), 3)]
            )
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"{name}/socket")
                client.sendall(b"x")
                client.recv(1)
                took.append((time.monotonic() - begun_s) * 1e3)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return statistics.median(took)


def _executes(pid: int) -> Path | None:
    with suppress(OSError):
        return Path(f"/proc/{pid}/exe").readlink()
    return None


def _mapped_kib(pid: int) -> dict[str, int]:
    words = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return {name.rstrip(":"): int(kib) for name, kib, _ in words}


def main() -> int:
    """Print both as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--storm", type=int, default=STORM, help="services of the storm; 0: none")
    options.add_argument("--services", type=int, default=SERVICES, help="of the other; 0: none")
    options.add_argument("--awake", type=int, default=AWAKE)
    options.add_argument("--wakes", type=int, default=WAKES, help="of each kind of real service; 0: none")
    given = options.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    results: dict[str, Any] = {}
    namespaces.enter(namespaces.Membership())
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/net/core/somaxconn").write_text("65535")
    if given.storm:
        results["storm"] = storm(given.storm)
    if given.services:
        results["million"] = million(given.services, given.awake)
    if given.wakes:
        results["real"] = waking.measured(given.wakes)
        print(waking.table(results["real"]))
    results["load"] = os.getloadavg()
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
