"""The start of a broker: two processes that begin side by side, and end together whatever happens meanwhile."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from fourtuple.registry import Registry
from fourtuple.services import Service
from tests.netns.brokering import PATIENCE_S, SERVE, free_port, listens, process, wait_for

_MOMENTS_S = tuple(number * 0.015 for number in range(14))
"""From the interpreter's first steps until both processes serve."""
_STARTS = 10


def of_session(session: int) -> list[int]:
    """Processes that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            state, *_, of_it = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of_it) == session and state != "Z":
            found.append(int(entry.name))
    return found


def text(port: int, folder: Path) -> str:
    return f'[[listen]]\naddress = "127.0.0.1:{port}"\n[[service]]\nname = "a"\ntarget = "unix:{folder}/a"\n'


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_start_that_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    file, statuses = tmp_path / "broker.toml", set()
    for moment_s in _MOMENTS_S:
        file.write_text(text(port := free_port(), tmp_path))
        command = [*SERVE, "-c", str(file), "--grace", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as supervisor:
            time.sleep(moment_s)
            supervisor.send_signal(number)
            # A broker process whose supervisor is gone has nobody, and ends; both have to have let go of this.
            said = supervisor.communicate(timeout=PATIENCE_S)[1]
            statuses.add(supervisor.returncode)
        wait_for(lambda pid=supervisor.pid: not of_session(pid))  # type: ignore[misc]
        # Python itself, while it is not yet this program's, has words for Ctrl-C, and 1.
        assert b"Traceback" not in said or supervisor.returncode in (1, -signal.SIGINT)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert statuses <= {0, 1, 130, -number}


def test_what_fails_after_the_broker_process_has_begun_ends_it(tmp_path: Path) -> None:
    file, port = tmp_path / "broker.toml", free_port()
    file.write_text(text(port, tmp_path))
    command = [*SERVE, "-c", str(file), "--events", str(tmp_path / "nowhere" / "events")]
    done = subprocess.run(command, capture_output=True, start_new_session=True, timeout=PATIENCE_S, check=False)
    assert done.returncode not in (0, None)
    assert b"nowhere" in done.stderr
    assert b"Traceback" not in done.stderr
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


@pytest.mark.parametrize("sandbox", ["auto", "off"])
def test_a_registry_that_is_not_there_is_said(tmp_path: Path, sandbox: str) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(f'[[listen]]\naddress = "127.0.0.1:{free_port()}"\n[confine]\nsandbox = "{sandbox}"\n')
    command = [*SERVE, "-c", str(file), "--store", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, start_new_session=True, timeout=PATIENCE_S, check=False)
    assert done.returncode not in (0, None)
    assert b"nowhere" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_broker_process_serves_before_the_supervisor_is_there(tmp_path: Path) -> None:
    """The supervisor is stopped as soon as somebody listens: in one of some starts before it is ready."""
    assert any(_served_alone(tmp_path / str(number)) for number in range(_STARTS))


def _served_alone(folder: Path) -> bool:
    """Whether a client was served by a broker process whose supervisor had not come to say that it is ready."""
    folder.mkdir()
    port, store = free_port(), folder / "store"
    with Registry(store) as registry:
        registry.add([Service(name="a.example", target=f"unix:{folder}/a")])
    (folder / "broker.toml").write_text(f'[[listen]]\naddress = "127.0.0.1:{port}"\n')
    command = [*SERVE, "-c", str(folder / "broker.toml"), "--store", str(store), "--json"]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as service,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
    ):
        service.bind(f"{folder}/a")
        service.listen()
        service.settimeout(PATIENCE_S)
        systemd.bind(f"{folder}/notify")
        systemd.settimeout(PATIENCE_S)
        with process(*command, environment={**os.environ, "NOTIFY_SOCKET": f"{folder}/notify"}) as broker:
            wait_for(lambda: listens(port))
            broker.send_signal(signal.SIGSTOP)
            wait_for(lambda: _is_stopped(broker.pid))
            is_early = not _readable(systemd)
            if is_early:
                with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
                    client.sendall(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
                    with service.accept()[0] as accepted:
                        assert accepted.recv(4_096)
                        accepted.sendall(b"here")
                    assert client.recv(4) == b"here"
                assert not _readable(systemd)
            broker.send_signal(signal.SIGCONT)
            assert b"READY=1" in systemd.recv(4_096)
            assert broker.poll() is None
    return is_early


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _readable(one: socket.socket) -> bool:
    return bool(select.select([one], [], [], 0)[0])
