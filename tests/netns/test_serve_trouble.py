"""`fourtuple serve` in trouble: no privilege, no io_uring, no descriptor, no disk, and services that behave badly.

Each time what goes wrong is said or counted, nobody else notices, and the broker is there when it is over.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bench.waiting import children
from fourtuple.cli import Exit
from fourtuple.errors import LimitReached
from fourtuple.lab import namespaces
from fourtuple.registry import Registry
from fourtuple.service import Listener
from fourtuple.services import Service
from tests.netns.brokering import (
    PATIENCE_S,
    SERVE,
    echoing,
    free_port,
    get,
    listens,
    needed,
    process,
    run,
    said,
    wait_for,
)

NOBODY = 65_534
CARRIERS = ["uring", "epoll"]


def file_of(folder: Path, port: int, *services: str) -> Path:
    """A broker.toml of services NAME.example at folder/NAME, or of tables as they are given."""
    tables = [
        one if one.startswith("[[") else f'[[service]]\nname = "{one}.example"\ntarget = "unix:{folder}/{one}"\n'
        for one in services
    ]
    path = folder / f"{port}.toml"
    path.write_text(f'[[listen]]\naddress = "127.0.0.1:{port}"\nsniff_ms = 2000\n' + "".join(tables))
    return path


def ended(broker: subprocess.Popen[str]) -> dict[str, Any]:
    """The last line of one that is told to end."""
    broker.send_signal(signal.SIGTERM)
    output, _ = broker.communicate(timeout=PATIENCE_S)
    assert broker.returncode == Exit.HEALTHY, output
    last: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert sum(last["ended"].values()) == last["accepted"]
    return last


# ---- who may not, and what is not there ------------------------------------------------------------------------------


AS_NOBODY = f"""
import os, sys
import fourtuple.cli.commands, fourtuple.cli.serve, fourtuple.supervisor.brokerlife, fourtuple.supervisor.life
import fourtuple.supervisor.surroundings
from fourtuple.cli.main import main
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
sys.exit(main(sys.argv[1:]))
"""
"""What an ordinary user may not read, of Python or of this folder, is read before it becomes one."""


@pytest.fixture
def of_nobody() -> Iterator[Path]:
    """A folder of an ordinary user, where it can get."""
    if os.geteuid() != 0:
        pytest.skip("only root becomes somebody else")
    with tempfile.TemporaryDirectory(prefix="fourtuple-nobody-") as name:
        os.chown(name, NOBODY, NOBODY)
        yield Path(name)


def test_an_ordinary_user_serves_and_hears_what_it_lacks(of_nobody: Path) -> None:
    port, log, serve = free_port(), of_nobody / "log", (sys.executable, "-c", AS_NOBODY, "serve")
    handoff = f'[[service]]\nname = "given.example"\ntarget = "unix:{of_nobody}/given"\ndelivery = "handoff"\n'
    file = file_of(of_nobody, port, "shop", "locked", handoff)
    with ExitStack() as stack:
        for name in ("shop", "locked"):
            stack.enter_context(echoing(of_nobody / name))
        (of_nobody / "shop").chmod(0o666)
        (of_nobody / "locked").chmod(0o600)
        stack.enter_context(Listener(of_nobody / "given"))
        broker = stack.enter_context(process(*serve, "-c", str(file), "--json", "--log", str(log)))
        wait_for(lambda: listens(port) or broker.poll() is not None)
        assert said(port, get("shop.example")) == b"shop heard " + get("shop.example")
        # Sockets that only root may use.
        assert said(port, get("locked.example")) == b""
        assert said(port, get("given.example")) == b""
        assert f"Uid:\t{NOBODY}" in Path(f"/proc/{broker.pid}/status").read_text()
        last = ended(broker)
    assert (last["ended"]["relayed"], last["ended"]["service_unreachable"]) == (1, 2)
    assert {failure["errno"] for failure in last["failures"]} == {"EACCES"}
    assert log.stat().st_uid == NOBODY

    closed = of_nobody / "closed"
    closed.mkdir(mode=0o700)
    cases = [(["-c", str(file), "--log", str(closed / "log")], "Permission denied")]
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) > 80:
        cases.append((["-c", str(file_of(of_nobody, 80, "shop"))], "cannot listen on 127.0.0.1:80: Permission denied"))
    for options, words in cases:
        refused = run(*serve, *options)
        assert words in refused
        assert "Traceback" not in refused


def test_without_io_uring_it_says_so_and_serves(tmp_path: Path) -> None:
    port = free_port()
    command = (*SERVE, "-c", str(file_of(tmp_path, port, "shop")))
    with echoing(tmp_path / "shop"), process(*command, before=namespaces.refuse_io_uring) as broker:
        wait_for(lambda: listens(port))
        assert said(port, get("shop.example")) == b"shop heard " + get("shop.example")
        broker.send_signal(signal.SIGTERM)
        output, _ = broker.communicate(timeout=PATIENCE_S)
    assert f"listening on 127.0.0.1:{port} (epoll, " in output
    assert "epoll, because io_uring" in output
    asked = subprocess.run(
        [*command, "--carrier", "uring"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        preexec_fn=namespaces.refuse_io_uring,
        check=False,
    )
    assert (asked.returncode, "io_uring" in asked.stderr) == (Exit.UNABLE, True), asked.stderr


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("delivery", ["relay", "handoff"])
def test_a_full_descriptor_table_costs_no_processor_and_is_over_with_its_clients(
    tmp_path: Path, carrier: str, delivery: str
) -> None:
    port, count = free_port(), 200
    table = f'[[service]]\nname = "shop.example"\ntarget = "unix:{tmp_path}/shop"\ndelivery = "{delivery}"\n'
    command = (*SERVE, "-c", str(file_of(tmp_path, port, table)), "--json", "--carrier", carrier)

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    with ExitStack() as stack:
        broker = stack.enter_context(process(*command, "--patience", "60", before=few))
        wait_for(lambda: listens(port) or broker.poll() is not None)
        # They come while nobody accepts, so that each worker finds its share of them waiting.
        (moving,) = children(broker.pid)
        os.kill(moving, signal.SIGSTOP)
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE_S)) for _ in range(count)]
        for client in clients:
            client.sendall(get("shop.example"))
        os.kill(moving, signal.SIGCONT)
        # Nobody is there yet: they are held as far as there are descriptors, and the others wait in the backlog.
        time.sleep(1)
        before_s = processor_s(broker.pid)
        time.sleep(3)
        # Two workers that spin would have used six seconds.
        assert processor_s(broker.pid) - before_s < 1.5
        stack.enter_context(serving(tmp_path / "shop", delivery))
        with ThreadPoolExecutor(count) as pool:
            heard = list(pool.map(rest, clients))
        assert set(heard) == {b"served"}
        assert said(port, get("shop.example")) == b"served"
        last = ended(broker)
    assert last["accepted"] == count + 2
    assert last["ended"]["relayed" if delivery == "relay" else "handed_off"] == heard.count(b"served") + 1
    assert set(last["ended"]) <= {"relayed", "handed_off", "client_left", "service_absent", "service_unreachable"}


def rest(client: socket.socket) -> bytes:
    """What still comes, until the other side closes or breaks it."""
    heard = b""
    with client, suppress(ConnectionError):
        while block := client.recv(4096):
            heard += block
    return heard


@contextmanager
def serving(path: Path, delivery: str) -> Iterator[None]:
    """A service that says "served" to everybody whose request has come."""
    over = threading.Event()

    def serve(accept: Callable[[], socket.socket]) -> None:
        while not over.is_set():
            with suppress(OSError), accept() as client:
                client.settimeout(PATIENCE_S)
                client.recv(4096)
                client.sendall(b"served")

    with ExitStack() as stack:
        if delivery == "handoff":
            listener = stack.enter_context(Listener(path))
            listener.settimeout(0.1)
            thread = threading.Thread(target=serve, args=(lambda: listener.accept().socket,))
        else:
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(path))
            listening.listen(1024)
            listening.settimeout(0.1)
            thread = threading.Thread(target=serve, args=(lambda: listening.accept()[0],))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(PATIENCE_S)


def processor_s(pid: int) -> float:
    """What a process has used of its processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- disks and registries that are full ------------------------------------------------------------------------------


@contextmanager
def small_disk(tmp_path: Path, *command: str) -> Iterator[tuple[subprocess.Popen[str], tuple[str, ...]]]:
    """A command with a disk of 4 MiB at tmp_path/disk, and what goes before another one that is to see that disk. It is
    gone with its processes."""
    needed("unshare", "mount", "nsenter")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = f'mount -t tmpfs -o size=4m,mode=700 none {disk} && echo mounted && exec "$@"'
    unshare = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))
    with process(*unshare, "sh", "-c", mounted, "sh", *command) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "mounted\n"
        namespaces_of = ("--mount", *(() if os.geteuid() == 0 else ("--user", "--preserve-credentials")))
        yield started, ("nsenter", f"--target={started.pid}", *namespaces_of)


def fill(disk: Path) -> None:
    """To the last byte."""
    with (disk / "filler").open("ab", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(b"x" * 4096)


def test_a_full_disk_costs_whole_lines_of_the_log_and_nothing_else(tmp_path: Path) -> None:
    port, log = free_port(), "disk/log"
    command = (*SERVE, "-c", str(file_of(tmp_path, port, "shop")), "--json", "--log", str(tmp_path / log))
    with echoing(tmp_path / "shop"), small_disk(tmp_path, *command) as (broker, _):
        disk = Path(f"/proc/{broker.pid}/root{tmp_path}/disk")
        wait_for(lambda: listens(port) or broker.poll() is not None)

        def visit(count: int) -> None:
            for _ in range(count):
                assert said(port, get("shop.example")) == b"shop heard " + get("shop.example")

        visit(5)
        wait_for(lambda: (disk / "log").read_bytes().count(b"relayed") == 5)
        fill(disk)
        visit(200)
        time.sleep(0.5)
        (disk / "filler").unlink()
        visit(20)

        def told() -> int:
            lines = (disk / "log").read_bytes().split(b"\n")[:-1]
            return sum(1 + json.loads(line).get("lost_before", 0) for line in lines)

        # One more is the client that looked whether somebody listens.
        wait_for(lambda: told() == 226)
        assert b"lost_before" in (disk / "log").read_bytes()
        last = ended(broker)
    assert last["ended"] == {"relayed": 225, "client_left": 1}


def test_a_registry_on_a_full_disk_goes_on_answering(tmp_path: Path) -> None:
    port, store = free_port(), tmp_path / "disk/registry"
    services = [*SERVE[:3], "services"]
    shop = f"unix:{tmp_path}/shop"
    fill_it = textwrap.dedent(f"""
        set -e
        {sys.executable} -m fourtuple services add shop.example {shop} --store {store}
        exec "$@"
    """)
    command = (*SERVE, "-c", str(file_of(tmp_path, port)), "--json", "--store", str(store))
    with echoing(tmp_path / "shop"), small_disk(tmp_path, "sh", "-c", fill_it, "sh", *command) as (broker, inside):
        wait_for(lambda: listens(port) or broker.poll() is not None)
        assert said(port, get("shop.example")) == b"shop heard " + get("shop.example")
        rows = "".join(f"s{number:06}.example,{shop}\n" for number in range(200_000))
        full = subprocess.run(
            [*inside, *services, "import", "-", "--format", "csv", "--store", str(store)],
            input=rows,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S * 4,
            check=False,
        )
        assert full.returncode != Exit.HEALTHY
        assert "disk-space" in full.stderr
        assert said(port, get("shop.example")) == b"shop heard " + get("shop.example")
        assert said(port, get("s000001.example")) == b""
        assert run(*inside, *services, "add", "late.example", shop, "--store", str(store)).startswith("added ")
        assert said(port, get("late.example")) == b"shop heard " + get("late.example")
        last = ended(broker)
    assert last["ended"]["no_route"] == 1


def test_a_registry_that_is_full_or_has_two_writers_is_served_all_the_time(tmp_path: Path) -> None:
    port, store, target = free_port(), tmp_path / "registry", f"unix:{tmp_path}/shop"
    with Registry(store, most_bytes=1 << 20) as registry:
        registry.add([Service(name="shop.example", target=target)])
        command = (*SERVE, "-c", str(file_of(tmp_path, port)), "--json", "--store", str(store))
        with echoing(tmp_path / "shop"), process(*command) as broker:
            wait_for(lambda: listens(port) or broker.poll() is not None)
            with pytest.raises(LimitReached, match="registry-size"):
                registry.add(Service(name=f"s{number}.example", target=target) for number in range(100_000))
            assert said(port, get("shop.example")) == b"shop heard " + get("shop.example")
            writer = (
                "import sys\nfrom fourtuple import Registry\nfrom fourtuple.services import Service\n"
                "with Registry(sys.argv[1]) as registry:\n"
                "    for number in range(200):\n"
                "        registry.set([Service(name=f'{sys.argv[2]}{number}.example', target=sys.argv[3])])\n"
            )
            writers = [
                subprocess.Popen([sys.executable, "-c", writer, str(store), name, target]) for name in ("a", "b")
            ]
            while any(one.poll() is None for one in writers):
                assert said(port, get("shop.example")) == b"shop heard " + get("shop.example")
            assert [one.wait() for one in writers] == [0, 0]
            for name in ("a0", "b0", "a199", "b199"):
                assert said(port, get(f"{name}.example")) == b"shop heard " + get(f"{name}.example")
            assert set(ended(broker)["ended"]) <= {"relayed", "client_left"}


# ---- services that behave badly --------------------------------------------------------------------------------------


@pytest.mark.parametrize("delivery", ["relay", "handoff"])
def test_a_stale_socket_file_is_waited_at(tmp_path: Path, delivery: str) -> None:
    port, path = free_port(), tmp_path / "shop"
    table = f'[[service]]\nname = "shop.example"\ntarget = "unix:{path}"\ndelivery = "{delivery}"\n'
    kind = socket.SOCK_STREAM if delivery == "relay" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_UNIX, kind) as dead:
        dead.bind(str(path))
    command = (*SERVE, "-c", str(file_of(tmp_path, port, table)), "--json")
    with process(*command, "--patience", "0.3") as broker:
        wait_for(lambda: listens(port) or broker.poll() is not None)
        assert said(port, get("shop.example")) == b""
        last = ended(broker)
    assert last["ended"]["service_absent"] == 1
    assert last["retries"] > 0
    with process(*command, "--patience", "60") as broker:
        wait_for(lambda: listens(port) or broker.poll() is not None)
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
            client.sendall(get("shop.example"))
            time.sleep(0.3)
            path.unlink()
            with serving(path, delivery):
                assert rest(client) == b"served"


def stalls(listening: socket.socket, held: list[socket.socket]) -> None:
    """Accepts, and says and reads nothing."""
    held.append(listening.accept()[0])


def resets(listening: socket.socket, _: list[socket.socket]) -> None:
    """Accepts, and closes with bytes unread: the other side is reset."""
    client, _name = listening.accept()
    client.recv(1)
    client.close()


def vanishes(listening: socket.socket, _: list[socket.socket]) -> None:
    """Takes one, and is gone with its file."""
    listening.accept()[0].close()
    Path(listening.getsockname()).unlink()
    listening.close()


def is_full(listening: socket.socket, _: list[socket.socket]) -> None:
    """Accepts nobody."""
    listening.listen(0)
    time.sleep(0.2)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("manner", [stalls, resets, vanishes, is_full], ids=lambda manner: manner.__name__)
def test_one_bad_service_delays_no_other(
    tmp_path: Path, carrier: str, manner: Callable[[socket.socket, list[socket.socket]], None]
) -> None:
    """All connections of the good one end while those of the bad one are on their way, or stuck with data."""
    port, over = free_port(), threading.Event()
    held: list[socket.socket] = []
    bad = f'[[service]]\nname = "bad.example"\ntarget = "unix:{tmp_path}/bad"\npatience_ms = 120000\n'
    command = (*SERVE, "-c", str(file_of(tmp_path, port, "good", bad)), "--json", "--carrier", carrier, "--grace", "0")
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(str(tmp_path / "bad"))
        listening.listen(5)
        listening.settimeout(0.1)

        def misbehave() -> None:
            while not over.is_set():
                with suppress(OSError):
                    manner(listening, held)

        thread = threading.Thread(target=misbehave)
        thread.start()
        stack.callback(thread.join, PATIENCE_S)
        stack.callback(over.set)
        stack.enter_context(serving(tmp_path / "good", "relay"))
        broker = stack.enter_context(process(*command))
        wait_for(lambda: listens(port) or broker.poll() is not None)
        stuck = [stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE_S)) for _ in range(50)]
        for client in stuck:
            client.sendall(get("bad.example"))
            client.setblocking(False)
            # More than any buffer on the way holds.
            with suppress(OSError):
                while client.send(b"x" * 65_536):
                    pass
        for _ in range(200):
            assert said(port, get("good.example")) == b"served"
        for client in (*stuck, *held):
            client.close()
        last = ended(broker)
    assert last["ended"]["relayed"] >= 200
