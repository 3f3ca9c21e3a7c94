"""The clients and services of `peers/traffic.c`: compiled once, started, asked.

Decides how they are called and what a hello is. Knows no broker. They are C so that, beside a broker on the same
processors, it is the broker that is measured.
"""

from __future__ import annotations

import functools
import json
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0
_SOURCE = Path(__file__).parent / "peers/traffic.c"
_STANDS_FOR = "xxxxxxxx.example.com"


@dataclass(frozen=True, slots=True)
class Traffic:
    """The compiled program."""

    program: Path

    def visit(self, port: int, openings: Path, threads: int, count: int) -> dict[str, float]:
        """Connect, say, read a byte and the end: seconds in all, and the time to the first byte."""
        return self._asked("visit", port, openings, threads, count)

    def rounds(
        self, port: int, openings: Path, connections: int, rounds: int, rate: int | None = None
    ) -> dict[str, float]:
        """64 bytes there and back: seconds in all, and the time of a round. In a closed loop on each connection; or so
        many per second over all of them, each counted from when it was due."""
        if rate is None:
            return self._asked("ping", port, openings, connections, rounds)
        return self._asked("pace", port, openings, connections, rounds, rate)

    def bulk(self, way: str, port: int, openings: Path, connections: int, size_bytes: int) -> dict[str, float]:
        """`send` to a sink or `take` from a source so many bytes over all connections: seconds in all."""
        return self._asked(way, port, openings, connections, size_bytes)

    @contextmanager
    def service(self, target: str, work: str, *, handoff: bool = False) -> Iterator[None]:
        """A service at `unix:PATH` or `tcp:127.0.0.1:PORT`; what may be `work` is told in `peers/traffic.c`."""
        where = target.replace("tcp:127.0.0.1:", "tcp:")
        command = [str(self.program), "serve", where, "datagram" if handoff else "stream", work]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                if process.stdout.readline() != "ready\n":
                    raise RuntimeError(f"the service at {target} did not start")
                yield
            finally:
                process.kill()

    @contextmanager
    def held(self, port: int, openings: Path, connections: int) -> Iterator[subprocess.Popen[str]]:
        """So many connections to an echo, all of which stand; `use_again` has each echo once more."""
        command = self._command("hold", port, openings, connections)
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen(command, text=True, **pipes) as process:
            try:
                self._await_held(process)
                yield process
            finally:
                process.kill()

    def use_again(self, process: subprocess.Popen[str]) -> None:
        """64 bytes there and back on each of the held connections."""
        assert process.stdin is not None
        process.stdin.write("again\n")
        process.stdin.flush()
        self._await_held(process)

    def _await_held(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        if not process.stdout.readline():
            raise RuntimeError(process.stderr.read().strip() or "the clients ended")

    def _asked(self, role: str, *arguments: object) -> dict[str, float]:
        command = self._command(role, *arguments)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{role} did not end within {PATIENCE_S:g} s") from None
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip() or f"{role} ended with status {done.returncode}")
        answer: dict[str, float] = json.loads(done.stdout)
        return answer

    def _command(self, role: str, *arguments: object) -> list[str]:
        return [str(self.program), role, "127.0.0.1", *map(str, arguments)]


def absent() -> str:
    """Why there can be no such traffic here; empty if there can."""
    return "" if shutil.which("gcc") else "gcc is not installed, with which the clients and services are made"


@contextmanager
def compiled() -> Iterator[Traffic]:
    """The program, as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as folder:
        program = Path(folder) / "traffic"
        program.write_bytes(_made())
        program.chmod(0o755)
        yield Traffic(program)


@functools.cache
def _made() -> bytes:
    """What the compiler makes of the program: once, since each row asks for it."""
    with tempfile.TemporaryDirectory(prefix="fourtuple-bench-") as folder:
        program = Path(folder) / "traffic"
        command = ["gcc", "-O2", "-pthread", "-o", str(program), str(_SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"gcc: {done.stderr.strip()[:500]}")
        return program.read_bytes()


def write_hellos(path: Path, names: Iterable[str]) -> Path:
    """What OpenSSL says first to a server of each of these names: one file, each behind its length.

    A name of the length of `_STANDS_FOR` takes its place in a hello that was made once; others have one made.
    """
    pattern = hello(_STANDS_FOR)
    with path.open("wb") as file:
        for name in names:
            same_length = len(name) == len(_STANDS_FOR)
            said = pattern.replace(_STANDS_FOR.encode(), name.encode()) if same_length else hello(name)
            file.write(len(said).to_bytes(2) + said)
    return path


def hello(name: str) -> bytes:
    """What OpenSSL says first to a server of that name."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a peer")
