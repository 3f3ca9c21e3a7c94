"""A broker as tests start it: the programs it needs, processes that end with the test, waiting for what comes up."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PATIENCE_S = 30
SERVE = (sys.executable, "-m", "fourtuple", "serve")


def needed(*programs: str) -> None:
    for program in programs:
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            pytest.skip(f"{program} is not installed")


def run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return done.stdout + done.stderr


def wait_for(ready: Callable[[], bool], *, every_s: float = 0.02) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < until_s, "it does not come up"
        time.sleep(every_s)


@contextmanager
def process(
    *command: str, before: Callable[[], object] | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Ended with the block, however that ends; `before` is called in it before the program."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=before,
        env=environment,
    ) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                started.terminate()
                try:
                    started.wait(PATIENCE_S)
                except subprocess.TimeoutExpired:
                    started.kill()


@contextmanager
def echoing(path: Path) -> Iterator[None]:
    """A service that says its name and the first bytes that it hears."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with answering(listener, path.name):
            yield


@contextmanager
def answering(listener: socket.socket, name: str) -> Iterator[None]:
    """The same behind a listener that there is."""

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                client.settimeout(PATIENCE_S)
                client.sendall(name.encode() + b" heard " + client.recv(4096))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def said(port: int, request: bytes) -> bytes:
    """All that comes back for `request`; what there was before a reset."""
    heard = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        try:
            client.sendall(request)
            while block := client.recv(65_536):
                heard += block
        except ConnectionError:
            pass
    return heard


def get(host: str, path: str = "/") -> bytes:
    """A request of HTTP/1.1 for it."""
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
