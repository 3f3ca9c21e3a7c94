"""What is said to systemd, on a real datagram socket, and what it hands over, to a real process of ours."""

from __future__ import annotations

import array
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fourtuple import systemd
from fourtuple.errors import BadConfig


class Manager:
    """systemd's end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address[0] == "@" else address)
        self._socket.settimeout(10)
        self.environment = {"NOTIFY_SOCKET": address}

    def heard(self) -> tuple[list[str], list[int]]:
        data, control, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(4 * 300))
        descriptors = array.array("i")
        for _, _, body in control:
            descriptors.frombytes(body)
        return data.decode().split("\n"), list(descriptors)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@fourtuple-{os.getpid()}"
    with closing(Manager(address)) as made:
        yield made


def test_states_are_said_as_sd_notify_has_them(manager: Manager) -> None:
    assert systemd.notify(ready=True, status="1 listener\nof 1", main_pid=4711, environment=manager.environment)
    assert manager.heard() == (["READY=1", "STATUS=1 listener of 1", "MAINPID=4711"], [])
    assert systemd.notify(stopping=True, watchdog=True, errno=2, environment=manager.environment)
    assert manager.heard()[0] == ["STOPPING=1", "WATCHDOG=1", "ERRNO=2"]
    assert systemd.notify(extend_timeout_s=1.5, environment=manager.environment)
    assert manager.heard()[0] == ["EXTEND_TIMEOUT_USEC=1500000"]


def test_a_reload_says_when_it_began(manager: Manager) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000
    assert systemd.notify(reloading=True, environment=manager.environment)
    reloading, since = manager.heard()[0]
    assert reloading == "RELOADING=1"
    assert before <= int(since.removeprefix("MONOTONIC_USEC=")) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000


def test_descriptors_are_kept_by_name_as_many_as_a_message_takes(manager: Manager) -> None:
    with socket.socket() as one:
        assert systemd.store([one.fileno()] * 300, "listener-443", poll=False, environment=manager.environment)
        for count in (systemd.MOST_DESCRIPTORS, 300 - systemd.MOST_DESCRIPTORS):
            lines, descriptors = manager.heard()
            assert lines == ["FDSTORE=1", "FDNAME=listener-443", "FDPOLL=0"]
            assert len(descriptors) == count
            assert all(os.path.sameopenfile(one.fileno(), kept) for kept in descriptors)
            for kept in descriptors:
                os.close(kept)
    assert systemd.forget("listener-443", environment=manager.environment)
    assert manager.heard()[0] == ["FDSTOREREMOVE=1", "FDNAME=listener-443"]


def test_a_barrier_waits_until_it_is_let_go(manager: Manager) -> None:
    assert not systemd.barrier(0, environment=manager.environment)
    lines, (descriptor,) = manager.heard()
    assert lines == ["BARRIER=1"]
    os.close(descriptor)
    manager.close()
    assert systemd.barrier(0, environment={})


def test_without_systemd_nothing_is_said() -> None:
    assert not systemd.notify(ready=True, environment={})
    assert not systemd.store([0], "name", environment={})
    assert systemd.watchdog_s({}) is None


def test_nothing_to_say_is_not_said(manager: Manager) -> None:
    assert not systemd.notify(environment=manager.environment)


@pytest.mark.parametrize("address", ["relative", "@", "/"])
def test_an_address_that_is_none_is_an_error(address: str) -> None:
    with pytest.raises(BadConfig, match="NOTIFY_SOCKET"):
        systemd.notify(ready=True, environment={"NOTIFY_SOCKET": address})


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "ä", "x" * 256])
def test_names_that_systemd_would_refuse_are_refused(name: str, manager: Manager) -> None:
    with pytest.raises(BadConfig, match="cannot name"):
        systemd.store([], name, environment=manager.environment)


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
    ],
)
def test_the_watchdog_is_told_twice_as_often_as_it_waits(environment: dict[str, str], seconds: float | None) -> None:
    assert systemd.watchdog_s(environment) == seconds


SAYS = """
import json, os, socket
from fourtuple import systemd
given = systemd.listen_fds()
kept = [[one.fd, one.name, os.get_inheritable(one.fd), socket.socket(fileno=one.fd).getsockname()[1]] for one in given]
print(json.dumps([kept, [key for key in os.environ if key.startswith("LISTEN_")], len(systemd.listen_fds())]))
"""


def handed_over(setting: str, *listeners: socket.socket) -> subprocess.CompletedProcess[str]:
    """The program above, with listeners from descriptor 3 on, as systemd leaves them."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    moves = " ".join(f"{3 + place}<&{one.fileno() + 100}" for place, one in enumerate(listeners))
    copies = [os.dup2(one.fileno(), one.fileno() + 100) for one in listeners]
    try:
        return subprocess.run(
            ["bash", "-c", f'exec {moves}; export {setting}; exec "$0" "$@"', sys.executable, "-c", SAYS],
            pass_fds=copies,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        for copy in copies:
            os.close(copy)


def test_descriptors_are_taken_with_their_names_and_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [one.getsockname()[1], two.getsockname()[1]]
        done = handed_over("LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=http:tls", one, two)
        kept, environment, again = json.loads(done.stdout)
        assert kept == [[3, "http", False, ports[0]], [4, "tls", False, ports[1]]]
        assert environment == []
        assert again == 0
        done = handed_over("LISTEN_PID=$$ LISTEN_FDS=2", one, two)
        assert [name for _, name, _, _ in json.loads(done.stdout)[0]] == ["unknown", "unknown"]
        done = handed_over("LISTEN_PID=1 LISTEN_FDS=2 LISTEN_FDNAMES=http:tls", one, two)
        assert json.loads(done.stdout) == [[], [], 0]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS: is '-1'"),
        ({"LISTEN_FDS": "99999"}, "a number up to"),
        ({"LISTEN_FDS": "many"}, "a number up to"),
        ({}, "a number up to"),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a:b"}, "2 names for 1"),
        ({"LISTEN_FDS": "4000"}, "is not open"),
    ],
)
def test_an_environment_that_cannot_be_is_an_error(given: dict[str, str], why: str) -> None:
    with pytest.raises(BadConfig, match=why):
        systemd.listen_fds({"LISTEN_PID": str(os.getpid()), **given})
