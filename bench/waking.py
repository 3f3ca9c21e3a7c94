"""From a client's first packet to a sleeping service's first byte, beside that service's own start without a broker.

Decides which services: a C program and a shell script, for which ours would show, and Redis, PostgreSQL, an ASGI
application and sshd. Each wake is of an instance that has not run before, found by the address that the client has
connected to; right before it the same instance is started without a broker and asked by the same client, so that both
have the same machine, whatever else it does. Knows nothing of storms.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourtuple.errors import MissingFeature

PORT = 701
PATIENCE_S = 60.0
_LOOK_S = 0.0005
"""Between two tries to reach a service that is starting; the launcher begins with the same."""
_SLEEPER = Path(__file__).parent / "peers" / "sleeper.c"
_NOBODY_ID = 65_534
_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
_SHELL = """#!/bin/sh
read -r line
echo "heard $line"
"""
_APP = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"heard"})
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One row. In a command `{folder}` is an instance's, and `{socket}`, `{address}` and `{port}` are its target's."""

    name: str
    argv: Sequence[str]
    request: bytes
    answer: bytes
    """What it begins with; anything else means that it is not there yet."""
    passed: bool = False
    """It has its listening socket as descriptor 3."""
    tcp: bool = False
    file: str = "socket"
    """As the service calls its socket."""
    ready: str = "listening"
    stop_signal: str = "TERM"


def kinds(folder: Path) -> list[Kind]:
    """Those that are installed, with their files in `folder`. MissingFeature names a program that is not."""
    postgres = _program("postgres")
    startup = b"\0\3\0\0user\0postgres\0database\0postgres\0\0"
    startup = (len(startup) + 4).to_bytes(4, "big") + startup
    settings = ["listen_addresses=", "max_connections=10", "shared_buffers=1MB", "fsync=off", "logging_collector=off"]
    options = [word for setting in settings for word in ("-c", setting)]
    http = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    return [
        Kind(name="C", argv=[f"{folder}/sleeper"], request=b"hello\n", answer=b"sleeper", passed=True, ready="started"),
        Kind(
            name="shell",
            argv=[_program("socat"), "UNIX-LISTEN:{socket},fork", f"EXEC:{folder}/shell"],
            request=b"hello\n",
            answer=b"heard",
        ),
        Kind(
            name="Redis",
            argv=[_program("redis-server"), "--port", "0", "--save", "", "--unixsocket", "{socket}"],
            request=b"PING\r\n",
            answer=b"+PONG",
        ),
        Kind(
            name="PostgreSQL",
            argv=[*_NOBODY, postgres, "-D", "{folder}/data", "-k", "{folder}", *options],
            request=startup,
            answer=b"R",
            file=".s.PGSQL.5432",
            ready="notify",
            stop_signal="INT",
        ),
        Kind(
            name="ASGI (uvicorn)",
            argv=[sys.executable, "-m", "uvicorn", "--app-dir", str(folder), "--fd", "3", "app:app"],
            request=http,
            answer=b"HTTP/1.1 200",
            passed=True,
        ),
        Kind(
            name="sshd",
            argv=[_program("sshd"), "-D", "-f", f"{folder}/sshd_config", "-o", "ListenAddress={address}:{port}"],
            request=b"SSH-2.0-client\r\n",
            answer=b"SSH-2.0-",
            tcp=True,
        ),
    ]


def measured(count: int) -> list[dict[str, Any]]:
    """A row for each kind: medians of so many wakes, in milliseconds."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "run").mkdir()
        rows = kinds(folder)
        _prepare(folder, stack)
        places = {
            kind.name: [_Place(folder, kind, at, number) for number in range(count)] for at, kind in enumerate(rows)
        }
        took: dict[str, list[tuple[float, float]]] = {kind.name: [] for kind in rows}
        with _broker(folder, rows, places):
            for number in range(count):
                for kind in rows:
                    place = places[kind.name][number]
                    if kind.name == "PostgreSQL":
                        _cluster(folder, place)
                    own = _own_start_ms(kind, place)
                    took[kind.name].append((own, _first_byte_ms(kind, (place.asked, PORT))))
        return [_row(kind.name, took[kind.name]) for kind in rows]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For people."""
    lines = [f"{'':16}{'own start':>12}{'woken':>12}{'over it':>12}{'at most':>12}   p50 of pairs, ms"]
    for row in rows:
        figures = (row["own_start_p50_ms"], row["woken_p50_ms"], row["over_own_start_p50_ms"], row["over_most_ms"])
        lines.append(f"{row['service']:16}" + "".join(f"{figure:12.2f}" for figure in figures))
    return "\n".join(lines)


def _row(name: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    over = [woken - own for own, woken in pairs]
    return {
        "service": name,
        "wakes": len(pairs),
        "own_start_p50_ms": round(statistics.median(own for own, _ in pairs), 3),
        "woken_p50_ms": round(statistics.median(woken for _, woken in pairs), 3),
        "over_own_start_p50_ms": round(statistics.median(over), 3),
        "over_most_ms": round(max(over), 3),
    }


class _Place:
    """Where an instance is: `asked` by clients of the broker."""

    def __init__(self, folder: Path, kind: Kind, at: int, number: int) -> None:
        self.asked, self.template = f"127.{at + 1}.0.{number + 1}", f"k{at}-{number}"
        self.folder = folder / "run" / f"{at}.{number}"
        self.folder.mkdir()
        os.chown(self.folder, _NOBODY_ID, _NOBODY_ID)
        self.path = f"{self.folder}/{kind.file}"
        self.address, self.port = (f"127.{at + 1}.1.{number + 1}", 22) if kind.tcp else ("", 0)

    @property
    def target(self) -> str:
        return f"tcp:{self.address}:{self.port}" if self.address else f"unix:{self.path}"

    @property
    def itself(self) -> tuple[str, int] | str:
        return (self.address, self.port) if self.address else self.path

    def filled(self, argv: Sequence[str]) -> list[str]:
        values = {
            "{folder}": str(self.folder),
            "{socket}": self.path,
            "{address}": self.address,
            "{port}": str(self.port),
        }
        filled = []
        for word in argv:
            for name, value in values.items():
                word = word.replace(name, value)
            filled.append(word)
        return filled


def _prepare(folder: Path, stack: ExitStack) -> None:
    subprocess.run(["gcc", "-O2", "-o", folder / "sleeper", _SLEEPER], check=True)
    (folder / "shell").write_text(_SHELL)
    (folder / "shell").chmod(0o755)
    (folder / "app.py").write_text(_APP)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host"], check=True)
    (folder / "sshd_config").write_text(f"HostKey {folder}/host\nUsePAM no\nPidFile none\n")
    separation = Path("/run/sshd")
    if not separation.exists():
        separation.mkdir(0o755)
        stack.callback(separation.rmdir)
    made = folder / "template"
    made.mkdir()
    os.chown(made, _NOBODY_ID, _NOBODY_ID)
    command = [
        *_NOBODY,
        _program("initdb"),
        "-D",
        str(made),
        "-A",
        "trust",
        "-U",
        "postgres",
        "--no-sync",
        "--locale=C",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _cluster(folder: Path, place: _Place) -> None:
    """What it starts from: a cluster that there is already, as of a tenant that has been here before."""
    subprocess.run(["cp", "-a", folder / "template", place.folder / "data"], check=True)


@contextmanager
def _broker(folder: Path, rows: Sequence[Kind], places: Mapping[str, Sequence[_Place]]) -> Iterator[None]:
    text = [f'[[listen]]\naddress = "0.0.0.0:{PORT}"\n']
    for kind in rows:
        for place in places[kind.name]:
            socket_of = "pass" if kind.passed else "own"
            text.append(
                f'[[template]]\nname = "{place.template}"\nargv = {json.dumps(place.filled(kind.argv))}\n'
                f'idle_s = 0\noutput = "null"\nready = "{kind.ready}"\nsocket = "{socket_of}"\n'
                f'stop_signal = "{kind.stop_signal}"\n'
                f'[[route]]\ndestination = "{place.asked}/32"\nto = "{place.target}"\nstart = "{place.template}"\n'
            )
    (folder / "broker.toml").write_text("".join(text))
    command = [sys.executable, "-m", "fourtuple", "serve", "-c", f"{folder}/broker.toml", "--patience", "60"]
    command += ["--events", f"{folder}/events"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            until_s = time.monotonic() + PATIENCE_S
            while process.poll() is None and time.monotonic() < until_s:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", PORT)) == 0:
                        break
                time.sleep(0.05)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)


def _own_start_ms(kind: Kind, place: _Place) -> float:
    """From before its start to its first byte."""
    argv = place.filled(kind.argv)
    with socket.socket(socket.AF_UNIX) as listener, Path(os.devnull).open("r+") as nowhere:
        actions = [(os.POSIX_SPAWN_DUP2, nowhere.fileno(), number) for number in range(3)]
        if kind.passed:
            listener.bind(place.path)
            listener.listen()
            actions.append((os.POSIX_SPAWN_DUP2, listener.fileno(), 3))
        begun_s = time.monotonic()
        pid = os.posix_spawn(shutil.which(argv[0]) or argv[0], argv, {"PATH": os.environ["PATH"]}, file_actions=actions)
        try:
            _first_byte_ms(kind, place.itself)
            took_ms = (time.monotonic() - begun_s) * 1e3
        finally:
            os.kill(pid, getattr(signal, f"SIG{kind.stop_signal}"))
            os.waitpid(pid, 0)
    Path(place.path).unlink(missing_ok=True)
    return took_ms


def _first_byte_ms(kind: Kind, where: tuple[str, int] | str) -> float:
    """Ask until it answers as it should; from the first try to the first byte."""
    begun_s = time.monotonic()
    family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET
    while True:
        with socket.socket(family) as client:
            client.settimeout(PATIENCE_S)
            heard = b""
            with suppress(ConnectionError, FileNotFoundError):
                client.connect(where)
                client.sendall(kind.request)
                heard = client.recv(64)
            took_ms = (time.monotonic() - begun_s) * 1e3
            if heard.startswith(kind.answer):
                return took_ms
        if took_ms > PATIENCE_S * 1e3:
            raise RuntimeError(f"{kind.name} at {where} does not answer: {heard!r}")
        time.sleep(_LOOK_S)


def _program(name: str) -> str:
    folders = ["/usr/sbin", "/usr/bin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    found = shutil.which(name, path=":".join(folders))
    if found is None:
        raise MissingFeature(f"{name} is not installed")
    return found
