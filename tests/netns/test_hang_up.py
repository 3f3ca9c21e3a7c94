"""SIGHUP: a file that is read again and logs that were moved away; or a terminal that is gone."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.netns import test_succession as succession
from tests.netns.brokering import PATIENCE_S, SERVE, free_port, process, wait_for
from tests.netns.waking import command_of

NAMES = ("one.example", "two.example")


@contextmanager
def echo(path: Path) -> Iterator[socket.socket]:
    """A listener whose clients this test serves itself."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE_S)
        yield listener


def text(folder: Path, port: int, *names: str) -> str:
    """Of a broker.toml with these services."""
    services = (f'[[service]]\nname = "{name}"\ntarget = "unix:{folder}/{name}"\n' for name in names)
    return f'[[listen]]\naddress = "127.0.0.1:{port}"\n' + "".join(services)


def request(name: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()


def asked(port: int, name: str) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    client.sendall(request(name))
    return client


def events(path: Path, event: str) -> list[dict[str, object]]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["event"] == event]


def test_the_file_is_read_again_and_logs_begin_anew(tmp_path: Path) -> None:
    port, file, log, told = free_port(), tmp_path / "broker.toml", tmp_path / "log", tmp_path / "events"
    file.write_text(text(tmp_path, port, NAMES[0]))
    told.touch()
    command = [*SERVE, "-c", str(file), "--log", str(log), "--events", str(told), "--json"]
    with echo(tmp_path / NAMES[0]) as one, echo(tmp_path / NAMES[1]) as two, process(*command) as broker:
        wait_for(lambda: bool(events(told, "broker_started")))
        with asked(port, NAMES[0]) as relayed:
            service, _ = one.accept()
            with service:
                assert service.recv(4096) == request(NAMES[0])
                file.write_text(text(tmp_path, port, *NAMES))
                log.rename(tmp_path / "log.1")
                told.rename(tmp_path / "events.1")
                # However often, it is done at least once after the last.
                for _ in range(3):
                    broker.send_signal(signal.SIGHUP)
                wait_for(lambda: told.exists() and bool(events(told, "broker_ended")))
                with asked(port, NAMES[1]):
                    second, _ = two.accept()
                    with second:
                        assert second.recv(4096) == request(NAMES[1])
                # Who was there is there.
                service.sendall(b"still")
                assert relayed.recv(4096) == b"still"
        wait_for(lambda: log.exists() and NAMES[0] in log.read_text() and NAMES[1] in log.read_text())
        assert NAMES[1] not in (tmp_path / "log.1").read_text()
        # What cannot be used is said, and what was there before holds.
        file.write_text("[[listen]]\naddress = 3\n")
        broker.send_signal(signal.SIGHUP)
        wait_for(lambda: any("why" in row for row in events(told, "reloaded")))
        with asked(port, NAMES[1]):
            second, _ = two.accept()
            second.close()
        broker.send_signal(signal.SIGTERM)
        output, _ = broker.communicate(timeout=PATIENCE_S)
    assert broker.returncode == 0, output
    assert "line 2, listen[0].address: str is needed, not 3" in output
    last = json.loads(output.splitlines()[-1])
    assert sum(last["ended"].values()) == last["accepted"] == 3


def test_a_terminal_that_is_gone_ends_it(tmp_path: Path) -> None:
    port, file, told = free_port(), tmp_path / "broker.toml", tmp_path / "events"
    file.write_text(text(tmp_path, port))
    told.touch()
    ours, theirs = pty.openpty()
    command = [*SERVE, "-c", str(file), "--events", str(told), "--grace", "5", "--json"]
    with (tmp_path / "out").open("w") as out:
        # The first of a session that opens a terminal gets it for its own.
        took = ["setsid", "--ctty", "--wait", *command]
        started = subprocess.Popen(took, stdin=theirs, stdout=out, stderr=out, close_fds=True)
    os.close(theirs)
    try:
        wait_for(lambda: bool(events(told, "broker_started")))
        # With a terminal that is there, it is a reload.
        supervisor = int(str(events(told, "broker_started")[0]["pid"]))
        supervisor = int(Path(f"/proc/{supervisor}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(supervisor, signal.SIGHUP)
        wait_for(lambda: bool(events(told, "reloaded")) and bool(events(told, "broker_ended")))
        os.close(ours)
        ours = -1
        assert started.wait(PATIENCE_S) == 0, (tmp_path / "out").read_text()
    finally:
        if ours >= 0:
            os.close(ours)
        if started.poll() is None:
            started.kill()
            started.wait()
    assert events(told, "draining")
    until_s = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{supervisor}").exists():
        assert time.monotonic() < until_s
        time.sleep(0.02)


@pytest.mark.parametrize("later_s", [0.0, 0.2, 0.4, 0.6])
def test_a_reload_in_the_midst_of_an_upgrade_leaves_no_process(tmp_path: Path, later_s: float) -> None:
    told = tmp_path / "events"
    with succession.broker(tmp_path) as (port, client, started):
        client.ask("POST", "/v1/upgrade", {})
        time.sleep(later_s)
        started.send_signal(signal.SIGHUP)
        assert succession.upgraded(client)["state"] == "done"
        wait_for(lambda: bool(events(told, "reloaded")))
        assert succession.asked(port)

        def is_one_broker_left() -> bool:
            try:
                programs = [command_of(pid) for pid in succession.children(started.pid)]
            except FileNotFoundError:
                return False
            # One that has ended and is waited for by nobody has no arguments.
            return sum("--broker" in words for words in programs) == 1 and [] not in programs

        wait_for(is_one_broker_left)
        assert succession.asked(port)
