"""A broker with a control socket as tests start it, and ways to its socket that are not our own client's."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from fourtuple.control.client import Client
from tests.netns.brokering import PATIENCE_S, free_port, wait_for


class Controlled:
    """A broker that runs, and the folder of its files."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.socket = folder / "control"
        # The process of the API starts in a second, or in many on a machine that does much else.
        self.client = Client(self.socket, 4 * PATIENCE_S)
        self.ask = self.client.ask

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Of the broker's log, those of these names."""
        told = [json.loads(line) for line in (self.folder / "events").read_text().splitlines()]
        return [one for one in told if one["event"] in names]

    def api_pids(self) -> list[int]:
        """Processes of the API that run now."""
        ended = {one["pid"] for one in self.events("control_ended")}
        return [one["pid"] for one in self.events("control_started") if one["pid"] not in ended]

    def metrics(self, name: str) -> float:
        """The sum of the samples of that name."""
        families = text_string_to_metric_families(self.client.raw("GET", "/metrics").decode())
        return sum(one.value for family in families for one in family.samples if one.name == name)

    def wait_for_event(self, name: str, count: int = 1) -> None:
        wait_for(lambda: len(self.events(name)) >= count)


@contextmanager
def controlled(*arguments: str, services: int = 1_000) -> Iterator[Controlled]:
    """A broker with `services` services of one process; others than root can reach its socket."""
    folder = Path(tempfile.mkdtemp(prefix="fourtuple-control-"))
    folder.chmod(0o755)
    port = free_port()
    command = (sys.executable, "-m", "tests.netns.controlled", str(folder), str(port), str(services), *arguments)
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as broker:
            assert broker.stdin is not None
            assert broker.stdout is not None
            assert broker.stdout.readline() == "ready\n"
            made = Controlled(folder, port)
            yield made
            broker.stdin.close()
            assert broker.wait(PATIENCE_S) == 0
            assert made.api_pids() == []
            assert not made.socket.exists()
    finally:
        shutil.rmtree(folder)


def as_nobody(path: Path, target: str, *more: str, user: int = 65_534, group: int = 65_534) -> tuple[int, Any]:
    """curl as another user: status and body."""
    curl = ("curl", "-s", "-m", str(PATIENCE_S), "-w", "\n%{http_code}", "--unix-socket", str(path), *more)
    who = ("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups")
    done = subprocess.run((*who, *curl, f"http://localhost{target}"), capture_output=True, text=True, check=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body) if body else None


@contextmanager
def over_tcp(path: Path) -> Iterator[int]:
    """A port of 127.0.0.1 behind which the unix socket is, for programs that know no other."""
    loop = asyncio.new_event_loop()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(path)
        await asyncio.gather(pipe(reader, back), pipe(there, writer))

    ready: list[int] = []
    over = asyncio.Event()

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ready.append(server.sockets[0].getsockname()[1])
        async with server:
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    wait_for(lambda: bool(ready))
    try:
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(PATIENCE_S)
        end(loop)


def end(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what still runs there, and close it when transports are closed, too (connection_lost comes a turn on)."""

    async def rest() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)

    loop.run_until_complete(rest())
    loop.close()


def raw(path: Path, data: bytes) -> bytes:
    """All that comes back."""
    heard = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE_S)
        client.connect(os.fspath(path))
        client.sendall(data)
        while block := client.recv(65_536):
            heard += block
    return heard
