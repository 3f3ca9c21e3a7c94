"""python -m bench.matrix: which programs route a TLS hello by its name, however it is cut; ours and others beside.

Decides the cells, what each program is configured to do, and what became of a hello: it came whole to the service that
it names, it came to another (the default among them: a rule by name was passed by), its connection was closed, or
nothing happened. What is in a hello, and where it is cut, is `bench.hellos`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.hellos import CONTENTS, RECORDS, SEGMENTS, SIZES, hello, records, segments
from bench.peers.hello_services import answer as answer_of

RECORD = Path(__file__).parents[1] / "docs" / "recorded" / "matrix.json"
NAMES = ("one.example.com", "two.example.com")
DEFAULT = "default"
SNIFF_S = 4
"""How long each program waits for a hello to become whole."""
PATIENCE_S = 15.0
"""After that, nothing will happen any more."""
TRIES = 3
"""An end by a deadline has to come so often before it counts: the first time, the machine may have been slow."""
STARTS_WITHIN_S = 60.0
AT_ONCE = 32
SLOW_PIECES = 10
PAUSE_S = 0.002
"""Behind each of the first pieces, so that they are read one by one; the rest follow as fast as they are taken."""
_ANSWER_BYTES = 64
_SERVICES = Path(__file__).parent / "peers" / "hello_services.py"
OUTCOMES = ("right", "default", "other", "closed", "stalled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way to say hello."""

    content: str
    size: int = 0
    """Of the message; 0 is as its client made it."""
    name_last: bool = False
    records: str
    segments: str

    @property
    def size_class(self) -> str:
        """The column that it stands in."""
        if self.size:
            return f"{self.size:,}"
        return SHORT if len(hello(self.content, NAMES[0])) < 1_000 else LONG

    def pieces(self, name: str) -> list[bytes]:
        """What is said at a time, to the service of that name."""
        message = hello(self.content, name, self.size, name_last=self.name_last)
        return segments(*records(message, self.records), self.segments)


SHORT, LONG = "161-549", "1,517-1,800"
SIZE_CLASSES = (SHORT, LONG, *(f"{size:,}" for size in SIZES))
_SHAPES = [(0, False), *((size, last) for size in SIZES for last in (False, True))]
CELLS = tuple(
    Cell(content=content, size=size, name_last=name_last, records=cut, segments=pieces)
    for content in CONTENTS
    for size, name_last in _SHAPES
    for cut in RECORDS
    for pieces in SEGMENTS
)
"""All of them."""


def some_cells() -> tuple[Cell, ...]:
    """Each content as it is in every cut, and each size in every cut with one content after the other."""
    contents = list(CONTENTS)
    padded = [cell for cell in CELLS if cell.size and cell.content == contents[0]]
    return tuple(cell for cell in CELLS if not cell.size) + tuple(
        Cell(content=contents[place % len(contents)], size=cell.size, name_last=cell.name_last,
             records=cell.records, segments=cell.segments)
        for place, cell in enumerate(padded)
    )  # fmt: skip


# ---- programs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where a program listens, and where its services do."""

    listen: int
    services: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One row."""

    name: str
    binary: str
    package: str
    command: Callable[[str, Path, Ports], list[str]]
    """Writes what it needs into the folder."""
    version: tuple[str, ...]
    ours: bool = False
    needs: tuple[str, ...] = ()
    """Files beside the binary."""
    at_once: int = AT_ONCE
    """Connections."""


def _fourtuple(carrier: str) -> Callable[[str, Path, Ports], list[str]]:
    def command(binary: str, folder: Path, ports: Ports) -> list[str]:
        services = "".join(
            f'[[service]]\nname = "{name}"\ntarget = "tcp:127.0.0.1:{ports.services[name]}"\n' for name in NAMES
        )
        (folder / "broker.toml").write_text(
            f'[[listen]]\naddress = "127.0.0.1:{ports.listen}"\nsniff_ms = {SNIFF_S * 1000}\n'
            f'default = "tcp:127.0.0.1:{ports.services[DEFAULT]}"\n{services}'
        )
        options = ["--carrier", carrier, "--json", "--grace", "0", "--log", str(folder / "ledger")]
        return [binary, "-m", "fourtuple", "serve", "-c", str(folder / "broker.toml"), *options]

    return command


def _haproxy(bufsize: int) -> Callable[[str, Path, Ports], list[str]]:
    def command(binary: str, folder: Path, ports: Ports) -> list[str]:
        (folder / "haproxy.cfg").write_text(
            textwrap.dedent(f"""
                global
                    {f"tune.bufsize {bufsize}" if bufsize else ""}
                defaults
                    mode tcp
                    timeout connect 5s
                    timeout client 30s
                    timeout server 30s
                frontend all
                    bind 127.0.0.1:{ports.listen} backlog 4096
                    tcp-request inspect-delay {SNIFF_S}s
                    tcp-request content accept if {{ req.ssl_hello_type 1 }}
                    use_backend one if {{ req.ssl_sni -i {NAMES[0]} }}
                    use_backend two if {{ req.ssl_sni -i {NAMES[1]} }}
                    default_backend default
                backend one
                    server one 127.0.0.1:{ports.services[NAMES[0]]}
                backend two
                    server two 127.0.0.1:{ports.services[NAMES[1]]}
                backend default
                    server default 127.0.0.1:{ports.services[DEFAULT]}
            """)
        )
        return [binary, "-db", "-q", "-f", str(folder / "haproxy.cfg")]

    return command


_NGINX_STREAM = "/usr/lib/nginx/modules/ngx_stream_module.so"


def _nginx(buffer: str) -> Callable[[str, Path, Ports], list[str]]:
    def command(binary: str, folder: Path, ports: Ports) -> list[str]:
        named = "\n".join(f"{name} 127.0.0.1:{ports.services[name]};" for name in NAMES)
        (folder / "nginx.conf").write_text(
            textwrap.dedent(f"""
                load_module {_NGINX_STREAM};
                daemon off; worker_processes 2; pid {folder}/pid; error_log {folder}/error.log;
                events {{ worker_connections 1000; }}
                stream {{
                    map $ssl_preread_server_name $service {{
                        {named}
                        default 127.0.0.1:{ports.services[DEFAULT]};
                    }}
                    server {{
                        listen 127.0.0.1:{ports.listen} backlog=4096;
                        ssl_preread on; preread_timeout {SNIFF_S}s; {buffer}
                        proxy_pass $service;
                    }}
                }}
            """)
        )
        return [binary, "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]

    return command


def _sslh(binary: str, folder: Path, ports: Ports) -> list[str]:
    named = "".join(
        f'{{ name: "tls"; host: "127.0.0.1"; port: "{ports.services[name]}"; sni_hostnames: [ "{name}" ]; }},\n'
        for name in NAMES
    )
    (folder / "sslh.cfg").write_text(
        f'foreground: true;\ninetd: false;\ntimeout: {SNIFF_S};\npidfile: "{folder}/pid";\n'
        f'listen: ( {{ host: "127.0.0.1"; port: "{ports.listen}"; }} );\nprotocols: (\n{named}'
        f'{{ name: "anyprot"; host: "127.0.0.1"; port: "{ports.services[DEFAULT]}"; }} );\n'
    )
    return [binary, f"-F{folder}/sslh.cfg"]


_OURS = ("-m", "fourtuple", "--version")
PROGRAMS = (
    *(
        Program(name=f"fourtuple, {carrier}", binary=sys.executable, package="", command=_fourtuple(carrier),
                version=_OURS, ours=True)
        for carrier in ("uring", "epoll")
    ),
    Program(name="HAProxy", binary="haproxy", package="haproxy", command=_haproxy(0), version=("-v",)),
    Program(name="HAProxy, tune.bufsize 524288", binary="haproxy", package="haproxy", command=_haproxy(524_288),
            version=("-v",)),
    Program(name="nginx", binary="nginx", package="nginx-light and libnginx-mod-stream", command=_nginx(""),
            version=("-v",), needs=(_NGINX_STREAM,)),
    Program(name="nginx, preread_buffer_size 512k", binary="nginx", package="nginx-light and libnginx-mod-stream",
            command=_nginx("preread_buffer_size 512k;"), version=("-v",), needs=(_NGINX_STREAM,)),
    Program(name="sslh, a process each", binary="sslh", package="sslh", command=_sslh, version=("-V",)),
    # sslh-select 1.20 closes a connection now and then, whatever it says, and more of them when there are several.
    Program(name="sslh-select", binary="sslh-select", package="sslh", command=_sslh, version=("-V",), at_once=1),
)  # fmt: skip


def absent(program: Program) -> str:
    """Why the row cannot run here; empty if it can."""
    there = _path(program) and all(Path(file).exists() for file in program.needs)
    return "" if there else f"{program.package} is not installed"


def _path(program: Program) -> str:
    return shutil.which(program.binary, path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""


def version(program: Program) -> str:
    """As it says itself."""
    told = subprocess.run([_path(program), *program.version], capture_output=True, text=True, timeout=30, check=False)
    line = next(iter((told.stdout + told.stderr).splitlines()), "")
    return next((word for word in line.replace("/", " ").split() if word[:1].isdigit()), line)


# ---- one run ---------------------------------------------------------------------------------------------------------


def run(program: Program, cells: Iterable[Cell]) -> dict[Cell, str]:
    """What became of each."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-matrix-") as name, ExitStack() as stack:
        folder = Path(name)
        ports = Ports(listen=_free_port(), services=stack.enter_context(_services()))
        stack.enter_context(_process(program.command(_path(program), folder, ports), folder / "output"))
        _wait_for_port(ports.listen, folder / "output")
        return asyncio.run(_visits(ports.listen, tuple(cells), program.at_once))


async def _visits(port: int, cells: tuple[Cell, ...], at_once: int) -> dict[Cell, str]:
    places = asyncio.Semaphore(at_once)

    async def visit(place: int, cell: Cell) -> tuple[str, float]:
        async with places:
            name = NAMES[place % len(NAMES)]
            pieces, started_s = cell.pieces(name), time.monotonic()
            return await _visit(port, name, pieces), time.monotonic() - started_s

    outcomes, visited = dict[Cell, str](), list(enumerate(cells))
    for _ in range(TRIES):
        done = await asyncio.gather(*(visit(place, cell) for place, cell in visited))
        outcomes |= {cell: what for (_, cell), (what, _) in zip(visited, done, strict=True)}
        late = [what != "right" and took_s > 0.9 * SNIFF_S for what, took_s in done]
        visited = list(itertools.compress(visited, late))
    return outcomes


async def _visit(port: int, name: str, pieces: list[bytes]) -> str:
    """Say it, and hear which service has heard what."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        saying: asyncio.Task[None] | None = None
        answer = b""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await loop.sock_connect(client, ("127.0.0.1", port))
                saying = asyncio.ensure_future(_say(client, pieces))
                while len(answer) < _ANSWER_BYTES and (block := await loop.sock_recv(client, _ANSWER_BYTES)):
                    answer += block
        except TimeoutError:
            return "stalled"
        except OSError:
            return "closed"
        finally:
            if saying is not None:
                saying.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await saying
    who = next((one for one in (*NAMES, DEFAULT) if answer == answer_of(one, b"".join(pieces))), None)
    if who == name:
        return "right"
    if not answer:
        return "closed"
    return "default" if who == DEFAULT else "other"


async def _say(client: socket.socket, pieces: list[bytes]) -> None:
    loop = asyncio.get_running_loop()
    for place, piece in enumerate(pieces):
        await loop.sock_sendall(client, piece)
        if place < SLOW_PIECES:
            await asyncio.sleep(PAUSE_S)


@contextmanager
def _services() -> Iterator[dict[str, int]]:
    """The port of each, by name."""
    names = (*NAMES, DEFAULT)
    command = [sys.executable, str(_SERVICES), *names]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            yield {name: int(started.stdout.readline()) for name in names}
        finally:
            started.terminate()


@contextmanager
def _process(command: list[str], output: Path) -> Iterator[None]:
    """In a group of its own: some leave a process per connection behind."""
    with output.open("wb") as told:
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(started.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(STARTS_WITHIN_S if number == signal.SIGTERM else None)


def _wait_for_port(port: int, output: Path) -> None:
    until_s = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < until_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"it does not listen: {output.read_text(errors='replace')[-500:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- what is told ----------------------------------------------------------------------------------------------------


def summary(outcomes: dict[Cell, str]) -> dict[str, Any]:
    """How many were right, of how many: in all, and along each axis."""

    def shares(key: Callable[[Cell], str]) -> dict[str, list[int]]:
        of, right = (
            Counter(map(key, outcomes)),
            Counter(key(cell) for cell, what in outcomes.items() if what == "right"),
        )
        return {name: [right[name], count] for name, count in of.items()}

    return {
        "outcomes": {what: count for what in OUTCOMES if (count := list(outcomes.values()).count(what))},
        "grid": {
            cut: {size: share for size in SIZE_CLASSES if (share := shares(_square).get(f"{cut}/{size}"))}
            for cut in RECORDS
        },
        "segments": shares(lambda cell: cell.segments),
        "contents": shares(lambda cell: cell.content),
    }


def _square(cell: Cell) -> str:
    return f"{cell.records}/{cell.size_class}"


def _table(row: dict[str, Any]) -> Table:
    told = ", ".join(f"{count:,} {what}" for what, count in row["outcomes"].items())
    table = Table(title=f"{row['name']} ({row['version']}): {told}")
    table.add_column("records")
    for size in SIZE_CLASSES:
        table.add_column(size, justify="right")
    for cut, shares in row["grid"].items():
        table.add_row(cut, *("/".join(map(str, shares.get(size, ["-"]))) for size in SIZE_CLASSES))
    return table


def main(arguments: list[str]) -> int:
    """Run the programs that are here, one after the other; 1 if ours is not right in each cell."""
    parser = argparse.ArgumentParser(prog="python -m bench.matrix", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--some", action="store_true", help=f"{len(some_cells())} cells, not all {len(CELLS):,}")
    parser.add_argument("--only", metavar="WORD", default="", help="programs whose name has this in it")
    parser.add_argument("--record", action="store_true", help="keep it in docs/recorded, for docs/generate.py")
    options = parser.parse_args(arguments)
    cells = some_cells() if options.some else CELLS
    console = Console() if Console().is_terminal else Console(width=132)
    started, started_s, rows, wrong = datetime.now(UTC), time.monotonic(), list[dict[str, Any]](), 0
    for program in PROGRAMS:
        if options.only not in program.name:
            continue
        row: dict[str, Any] = {"name": program.name, "absent": absent(program)}
        rows.append(row)
        if row["absent"]:
            console.print(f"skipped {program.name}: {row['absent']}")
            continue
        outcomes = run(program, cells)
        row |= {"version": version(program), **summary(outcomes)}
        console.print(_table(row))
        if program.ours:
            for cell, what in outcomes.items():
                if what != "right":
                    wrong += 1
                    console.print(f"{what}: {cell}", style="red", highlight=False)
    if options.record:
        record = {
            "started_at": f"{started:%Y-%m-%dT%H:%M:%SZ}",
            "seconds": round(time.monotonic() - started_s, 1),
            "kernel": platform.release(),
            "machine": platform.machine(),
            "command": " ".join(["python -m bench.matrix", *arguments]),
            "cells": len(cells),
            "sizes": list(SIZE_CLASSES),
            "programs": rows,
        }
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"written to {RECORD.relative_to(Path.cwd()) if RECORD.is_relative_to(Path.cwd()) else RECORD}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
