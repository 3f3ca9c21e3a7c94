"""`fourtuple serve --demo`: every one of its services answers, and nothing of it is left however it ends.

Also the end of `serve -c`, which keeps the services of its file in memory: neither leaves a process, file or folder.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fourtuple.cli import Exit
from fourtuple.demo import SERVICES, name_of
from tests.netns.brokering import PATIENCE_S, SERVE, free_port, get, listens, needed, process, run, said, wait_for

CHECKED_WITHIN_S = 1_800
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
MOMENTS_S = (0.05, 0.2, 0.4, 0.6, 0.8, 1.2)
"""Before, while and after it starts, on a machine that is busy or not."""


@pytest.mark.slow
def test_all_100_000_services_answer_asked_one_by_one() -> None:
    listen = f"127.0.0.1:{free_port()}"
    done = subprocess.run(
        [*SERVE, "--demo", "--check", "--listen", listen, "--json"],
        capture_output=True,
        text=True,
        timeout=CHECKED_WITHIN_S,
        check=False,
    )
    assert done.returncode == Exit.HEALTHY, done.stdout + done.stderr
    checked, counters = (json.loads(line) for line in done.stdout.splitlines())
    print(f"{checked['right']:,} pages in {checked['took_s']:.1f} s, {SERVICES / checked['took_s']:,.0f} connections/s")
    assert (checked["services"], checked["right"], checked["wrong"]) == (SERVICES, SERVICES, 0)
    assert counters["ended"] == {"handed_off": SERVICES}


def test_curl_reaches_them_as_the_readme_has_it() -> None:
    needed("curl")
    port = free_port()
    with process(*SERVE, "--demo", "--listen", f"127.0.0.1:{port}") as broker:
        wait_for(lambda: listens(port))
        for number in (0, 42, SERVICES - 1):
            name = name_of(number, SERVICES)
            expected = f"{name}: service {number:,} of 100,000 behind this port\nyou are 127.0.0.1:"
            resolved = run("curl", "-s", "--resolve", f"{name}:{port}:127.0.0.1", f"http://{name}:{port}/")
            assert resolved.startswith(expected)
            assert run("curl", "-s", "-H", f"Host: {name}", f"http://127.0.0.1:{port}/").startswith(expected)
        missing = run("curl", "-si", "-H", f"Host: s100000.{name_of(0, 10)[3:]}", f"http://127.0.0.1:{port}/")
        assert missing.startswith("HTTP/1.1 404 ")
        assert f"curl --resolve {name_of(20_000, SERVICES)}:{port}:127.0.0.1" in missing
        assert run("curl", "-sI", f"http://127.0.0.1:{port}/").startswith("HTTP/1.1 404 ")
        assert said(port, b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 405 ")
        assert said(port, b"SSH-2.0-x\r\n") == b""
        broker.send_signal(signal.SIGTERM)
        output, _ = broker.communicate(timeout=PATIENCE_S)
    assert broker.returncode == Exit.HEALTHY, output
    assert f"curl --resolve {name_of(SERVICES // 2, SERVICES)}:{port}:127.0.0.1" in output
    assert "no_route 1" in output


def test_what_does_not_answer_is_not_right(tmp_path: Path) -> None:
    with trace(tmp_path) as environment:
        port = free_port()
        command = (*SERVE, "--demo", "--check", "--listen", f"127.0.0.1:{port}", "--json", "--patience", "0.2")
        with process(*command, environment=environment) as broker:
            wait_for(lambda: listens(port))
            (pages,) = set(processes(tmp_path)) - brokers(broker.pid)
            os.kill(pages, signal.SIGKILL)
            output, _ = broker.communicate(timeout=PATIENCE_S)
        assert broker.returncode == Exit.WARNING, output
        checked, counters = (json.loads(line) for line in output.splitlines())
        assert checked["right"] < SERVICES
        # Who was in the queue of the process that was killed had been handed over.
        assert 0 < counters["ended"]["service_absent"] <= checked["wrong"]
        assert checked["wrong"] <= counters["ended"]["service_absent"] + counters["ended"].get("handed_off", 0)


def test_the_broker_ends_with_the_pages(tmp_path: Path) -> None:
    with trace(tmp_path) as environment:
        port = free_port()
        with process(*SERVE, "--demo", "--listen", f"127.0.0.1:{port}", environment=environment) as broker:
            wait_for(lambda: listens(port))
            (pages,) = set(processes(tmp_path)) - brokers(broker.pid)
            os.kill(pages, signal.SIGKILL)
            output, _ = broker.communicate(timeout=PATIENCE_S)
        assert broker.returncode == Exit.UNABLE
        assert "has ended" in output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--demo", "--services", "2M"), "1,000,000 is the most"),
        (("--demo", "--services", "some"), "not a count"),
        (("--demo", "--listen", "8080"), "ADDRESS:PORT"),
        (("--demo", "--store", "x"), "does not go with --demo"),
        (("--demo", "-c", "x"), "does not go with --demo"),
        (("--services", "5"), "is for --demo"),
        (("--check",), "is for --demo"),
        ((), "broker.toml is needed, or --demo"),
    ],
)
def test_what_cannot_be_shown_is_said(options: tuple[str, ...], words: str) -> None:
    done = subprocess.run([*SERVE, *options], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == Exit.USAGE
    assert words in done.stderr


def test_a_port_that_is_taken_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    with trace(tmp_path) as environment, socket.create_server(("127.0.0.1", 0)) as taken:
        listen = "{}:{}".format(*taken.getsockname())
        command = [*SERVE, "--demo", "--listen", listen]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment)
    assert done.returncode == Exit.USAGE
    assert f"cannot listen on {listen}: " in done.stderr
    assert "Address already in use" in done.stderr


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("what", ["demo", "file"])
def test_nothing_is_left_whenever_it_is_ended(tmp_path: Path, what: str, number: signal.Signals) -> None:
    for moment_s in MOMENTS_S:
        with trace(tmp_path) as environment:
            command = [*SERVE, *source(tmp_path, what, free_port())]
            with process(*command, environment=environment) as broker:
                time.sleep(moment_s)
                broker.send_signal(number)
                status, said = broker.wait(PATIENCE_S), broker.stdout.read() if broker.stdout is not None else ""
                # Python itself ends so of a signal before anybody has said otherwise; importing site, by status 1.
                in_site = status == 1 and "init_import_site" in said
                assert in_site or status in (Exit.HEALTHY, Exit.INTERRUPTED, -number), said


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_nothing_is_left_while_it_relays(tmp_path: Path, number: signal.Signals) -> None:
    with trace(tmp_path) as environment, socket.socket(socket.AF_UNIX) as service:
        port = free_port()
        service.bind(str(tmp_path / "service"))
        service.listen()
        command = [*SERVE, *source(tmp_path, "file", port), "--grace", "0.2"]
        with process(*command, environment=environment) as broker:
            wait_for(lambda: listens(port))
            assert list(folder(tmp_path).iterdir()) == []
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
                client.sendall(get("shop.example"))
                served, _ = service.accept()
                with served:
                    assert served.recv(4096) == get("shop.example")
                    broker.send_signal(number)
                    assert broker.wait(PATIENCE_S) == (-number if number == signal.SIGKILL else Exit.HEALTHY)
                    with suppress(ConnectionResetError):
                        assert client.recv(1) == b""


def source(tmp_path: Path, what: str, port: int) -> list[str]:
    if what == "demo":
        return ["--demo", "--listen", f"127.0.0.1:{port}", "--services", "1000"]
    file = tmp_path / "broker.toml"
    file.write_text(
        f'[[listen]]\naddress = "127.0.0.1:{port}"\n'
        f'[[service]]\nname = "shop.example"\ntarget = "unix:{tmp_path}/service"\n'
    )
    return ["-c", str(file)]


@contextmanager
def trace(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment by which everything that is started in it is found again; at the end nothing may be there."""
    folder(tmp_path).mkdir(exist_ok=True)
    yield {**os.environ, "TMPDIR": str(folder(tmp_path))}
    wait_for(lambda: not processes(tmp_path))
    assert list(folder(tmp_path).iterdir()) == []


def folder(tmp_path: Path) -> Path:
    return tmp_path / "t"


def brokers(supervisor: int) -> set[int]:
    """The supervisor and what it has forked of itself."""
    command = Path(f"/proc/{supervisor}/cmdline").read_bytes()
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return {supervisor} | {int(pid) for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes() == command}


def processes(tmp_path: Path) -> list[int]:
    """Those whose environment has the folder for temporary files."""
    found = []
    for process_folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (process_folder / "environ").read_bytes().split(b"\0")
            if f"TMPDIR={folder(tmp_path)}".encode() in variables:
                found.append(int(process_folder.name))
    return found
