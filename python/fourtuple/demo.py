"""A demonstration: any number of services, each with a page of its own, behind one port.

Decides what the services are called, what their pages say, and that nothing of it outlives whoever began it: the
process that serves the pages makes the one socket file and its folder, and takes both away when its standard input
ends, so also after SIGKILL. Knows no broker; what one needs of it is a registry and the path of that socket.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from fourtuple.errors import EngineStopped
from fourtuple.registry import Sealed, sealed
from fourtuple.service import Note, start_server
from fourtuple.services import Delivery, Match, Route, Service
from fourtuple.tuples import Endpoint

DOMAIN = "demo.example"
SERVICES = 100_000
MOST_SERVICES = 1_000_000
_PATIENCE_S = 10
_PATIENCE = struct.pack("@ll", _PATIENCE_S, 0)
"""As a struct timeval."""
_ENDS_WITHIN_S = 5.0
_VISITORS = 8
"""Threads that ask one service after the other: enough that none of the processes waits for the others."""
_EXAMPLES = 5


def name_of(number: int, services: int) -> str:
    """What a service is called, with as many digits as the last one has.

    >>> name_of(42, 100_000)
    's00042.demo.example'
    """
    return f"s{number:0{len(str(services - 1))}}.{DOMAIN}"


def registry(services: int, path: Path) -> Sealed:
    """The services as rows of a registry, all handed over at `path`, and a route for whatever else speaks HTTP."""
    target = f"unix:{path}"
    rows = (
        Service(name=name_of(number, services), target=target, delivery=Delivery.HANDOFF) for number in range(services)
    )
    return sealed(rows, [Route(match=Match(protocol="http1"), to=target, delivery=Delivery.HANDOFF)])


def page(name: str, services: int, client: Endpoint | None) -> str:
    """What a service says to a client."""
    number = int(name.removesuffix(f".{DOMAIN}")[1:])
    return f"{name}: service {number:,} of {services:,} behind this port\nyou are {client}\n"


class Pages:
    """The process that serves the pages."""

    def __init__(self, path: Path, process: subprocess.Popen[str]) -> None:
        """For `serving`; not called otherwise."""
        self.path = path
        """Where it takes clients."""
        self._process = process

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it is there."""
        return self._process.poll() is None


@contextmanager
def serving(services: int) -> Iterator[Pages]:
    """Pages of so many services, in a process that ends with this block, or with this process."""
    command = [sys.executable, "-P", "-m", "fourtuple.demo", str(services)]
    package = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    # In a session of its own, Ctrl-C does not reach it: clients are answered as long as the broker takes them.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        path = Path()
        try:
            path = Path(process.stdout.readline().rstrip("\n"))
            if not path.name:
                raise EngineStopped("the process of the demonstration did not start; it says above why")
            yield Pages(path, process)
        finally:
            process.stdin.close()
            try:
                process.wait(_ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
            # Only if somebody killed it is there anything left.
            if path.name:
                shutil.rmtree(path.parent, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the services said when each was asked."""

    right: int
    wrong: tuple[str, ...]
    """One line for each service that said something else, or nothing."""
    took_s: float


def check(endpoint: Endpoint, services: int, stopped: Callable[[], bool]) -> Checked:
    """Ask every service for its page, each over a connection of its own, and compare; until `stopped`."""
    right = [0] * _VISITORS
    wrong: list[str] = []
    over = threading.Event()

    def visit(visitor: int) -> None:
        for number in range(visitor, services, _VISITORS):
            if over.is_set():
                return
            name = name_of(number, services)
            why = _ask(endpoint, name, services)
            if why is None:
                right[visitor] += 1
            else:
                wrong.append(f"{name}: {why}")

    began_s = time.monotonic()
    threads = [threading.Thread(target=visit, args=(visitor,)) for visitor in range(_VISITORS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            if stopped():
                over.set()
            thread.join(0.1)
    return Checked(right=sum(right), wrong=tuple(wrong), took_s=time.monotonic() - began_s)


def _ask(endpoint: Endpoint, name: str, services: int) -> str | None:
    """What is wrong with what it says."""
    family = socket.AF_INET if endpoint.address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family) as client:
            # The kernel's own timeouts: Python's would cost a poll() at each call.
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                client.setsockopt(socket.SOL_SOCKET, option, _PATIENCE)
            client.connect((str(endpoint.address), endpoint.port))
            client.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
            address, port = client.getsockname()[:2]
            said = b""
            while block := client.recv(4096):
                said += block
    except OSError as error:
        return error.strerror or str(error)
    expected = _response("200 OK", page(name, services, Endpoint(ip_address(address), port)))
    return None if said == expected else f"said {said[:200]!r}"


def _response(status: str, text: str) -> bytes:
    body = text.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def _index(services: int, note: Note) -> str:
    shown = [name_of(number, services) for number in range(0, services, max(1, services // _EXAMPLES))]
    port = "" if note.local is None else f":{note.local.port}"
    address = "127.0.0.1" if note.local is None else str(note.local.address)
    lines = [f"there is no such service; there are {services:,}, such as"]
    lines += [f"  curl --resolve {name}{port}:{address} http://{name}{port}/" for name in shown[:_EXAMPLES]]
    return "\n".join(lines) + "\n"


async def _answer(services: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Note) -> None:
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _PATIENCE_S)
        method, _, rest = head.partition(b" ")
        if method not in (b"GET", b"HEAD") or b"HTTP/1." not in rest.partition(b"\r\n")[0]:
            response = _response("405 Method Not Allowed", "GET is answered here, and nothing else\n")
        elif note.service.endswith(f".{DOMAIN}"):
            response = _response("200 OK", page(note.service, services, note.peer))
        else:
            response = _response("404 Not Found", _index(services, note))
        writer.write(response.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == b"HEAD" else response)
        await asyncio.wait_for(writer.drain(), _PATIENCE_S)
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return


async def _serve(services: int) -> None:
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    folder = Path(tempfile.mkdtemp(prefix="fourtuple-demo-"))
    try:
        async with await start_server(partial(_answer, services), folder / "pages"):
            # Nothing is ever written there: it ends.
            loop.add_reader(sys.stdin.fileno(), over.set)
            print(folder / "pages", flush=True)
            await over.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    os.umask(0o077)
    asyncio.run(_serve(int(sys.argv[1])))
