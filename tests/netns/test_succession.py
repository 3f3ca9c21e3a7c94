"""A supervisor that wants to leave its place and cannot; broker processes that follow one another in trouble; and a
service whose kind of socket changes while it runs."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bench import wake
from fourtuple.control.client import Client, Declined
from fourtuple.errors import MissingFeature
from fourtuple.registry import Registry
from fourtuple.services import Delivery, Match, Route, Service
from tests.netns.brokering import PATIENCE_S, SERVE, free_port, needed, process, wait_for
from tests.netns.waking import command_of

NAME = "shop.example"
REQUEST = f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode()
DENIED = "127.0.0.66"
"""An address that may wake nothing."""
_ECHOER = Path(__file__).parents[2] / "bench" / "peers" / "echoer.c"
# Everything is done as if it were the interpreter itself, and the broker process takes it away.
_VANISHES = """#!/bin/sh
case "$*" in *--broker*) rm -f "$0" ;; esac
exec {python} "$@"
"""


@contextmanager
def broker(folder: Path, *options: str) -> Iterator[tuple[int, Client, subprocess.Popen[str]]]:
    """One with a control socket, and a registry where `NAME` is started when it is called."""
    port, program = free_port(), folder / "echoer"
    needed("gcc")
    subprocess.run(["gcc", "-O2", "-o", program, _ECHOER], check=True)
    (folder / "run").mkdir()
    (folder / "events").touch()
    with Registry(folder / "store") as registry:
        registry.add([Service(name=NAME, target=f"unix:{folder}/run/{NAME}", start="echoer", patience_ms=60_000)])
        registry.add_route(
            Route(
                match=Match(name="*.flood.example"),
                to=f"unix:{folder}/run/{{name}}",
                start="echoer",
                patience_ms=60_000,
            )
        )
    (folder / "broker.toml").write_text(
        f'[[listen]]\naddress = "0.0.0.0:{port}"\n[control]\nsocket = "{folder}/control"\n'
        f'[wake]\ndeny = ["{DENIED}"]\n'
        f'[[template]]\nname = "echoer"\nargv = ["{program}", "{{socket}}"]\nsocket = "pass"\nready = "started"\n'
        f"idle_s = 600\n"
    )
    with process(
        *SERVE, "-c", f"{folder}/broker.toml", "--store", f"{folder}/store", "--events", f"{folder}/events", *options
    ) as started:
        # It listens before there is anybody who accepts.
        wait_for(lambda: "broker_started" in (folder / "events").read_text() or started.poll() is not None)
        yield port, Client(folder / "control"), started
        started.send_signal(signal.SIGTERM)
        output, _ = started.communicate(timeout=PATIENCE_S)
    assert started.returncode == 0, output
    assert list((folder / "run").iterdir()) == []


def asked(port: int) -> bytes:
    """What its service says to a client."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(REQUEST)
        return heard(client)


def heard(client: socket.socket) -> bytes:
    """Its name, and the request as it has heard it; or what the broker says instead."""
    said = b""
    while not said.endswith(REQUEST[-4:]) and (some := client.recv(4096)):
        said += some
    return said


def broker_pid(folder: Path) -> int:
    """Of the broker process that was started last."""
    rows = map(json.loads, (folder / "events").read_text().splitlines())
    return int([row["pid"] for row in rows if row["event"] == "broker_started"][-1])


def children(supervisor: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()]


@contextmanager
def without_descriptors(pid: int) -> Iterator[None]:
    """It can open nothing more in the block."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    opened = {int(one.name) for one in Path(f"/proc/{pid}/fd").iterdir()}
    lowest_free = next(number for number in itertools.count() if number not in opened)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def upgraded(client: Client) -> dict[str, Any]:
    """How it has gone, once it is over."""
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        try:
            told: dict[str, Any] = client.ask("GET", "/v1/status")["upgrade"]
        except (Declined, MissingFeature):
            # While the process of the API changes.
            continue
        if told["state"] != "running":
            return told
        time.sleep(0.05)
    pytest.fail("it is still running")


def test_a_supervisor_that_cannot_leave_goes_on_and_is_heard(tmp_path: Path) -> None:
    program = tmp_path / "python"
    with broker(tmp_path) as (port, client, _):
        first = asked(port)
        assert first
        program.write_text(_VANISHES.format(python=sys.executable))
        program.chmod(0o755)
        client.ask("POST", "/v1/upgrade", {"executable": str(program)})
        told = upgraded(client)
        assert (told["state"], str(program) in told["why"]) == ("failed", True)
        assert not program.exists()
        assert asked(port) == first
        # The next one succeeds, from where that has left off.
        client.ask("POST", "/v1/upgrade", {})
        assert upgraded(client)["state"] == "done"
        assert asked(port) == first
    events = [json.loads(line)["event"] for line in (tmp_path / "events").read_text().splitlines()]
    assert events.count("upgrade_failed") == 1


def test_nothing_of_the_registry_is_left_open_by_upgrades(tmp_path: Path) -> None:
    def opened(pid: int) -> int:
        found = 0
        for one in Path(f"/proc/{pid}/fd").iterdir():
            # One that looks through the others is gone by the time it is looked at.
            with suppress(FileNotFoundError):
                found += str(one.readlink()).startswith(str(tmp_path / "store"))
        return found

    with broker(tmp_path) as (port, client, started):
        counts = []
        for _ in range(3):
            client.ask("POST", "/v1/upgrade", {})
            assert upgraded(client)["state"] == "done"
            assert asked(port)
            # It is opened by whoever asks first, which may be a moment later.
            wait_for(lambda: opened(started.pid) > 0)
            counts.append(opened(started.pid))
        assert counts[0] == counts[1] == counts[2]


def test_a_service_whose_delivery_changes_is_started_anew(tmp_path: Path) -> None:
    with broker(tmp_path) as (port, client, _), Registry(tmp_path / "store", create=False) as registry:
        pids = []
        for delivery in (Delivery.RELAY, Delivery.HANDOFF, Delivery.RELAY):
            registry.set([Service(name=NAME, target=f"unix:{tmp_path}/run/{NAME}", start="echoer", delivery=delivery)])
            # Who comes before it has been seen waits for the one that is to be.
            assert asked(port)
            wait_for(lambda: client.ask("GET", f"/v1/services/{NAME}")["standing"] == "awake")
            pids.append(client.ask("GET", f"/v1/services/{NAME}")["pids"][0])
            time.sleep(1.0)
        assert len(set(pids)) > 1
        assert asked(port)


def test_who_waited_while_no_broker_was_there_is_answered_at_once(tmp_path: Path) -> None:
    """What the first questions of a broker process are answered with must not be lost while it is taken in."""
    with broker(tmp_path) as (port, _, started), ExitStack() as stack:
        assert asked(port)
        pidfd = os.pidfd_open(broker_pid(tmp_path))
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], PATIENCE_S)
        os.close(pidfd)
        # One asks for a service that is up; the others for some that they may not wake.
        clients = [stack.enter_context(socket.socket()) for _ in range(20)]
        for number, client in enumerate(clients):
            client.settimeout(PATIENCE_S)
            client.bind((DENIED if number else "127.0.0.1", 0))
            client.connect(("127.0.0.1", port))
            name = f"f{number}.flood.example" if number else NAME
            client.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        wait_for(lambda: any("--broker" in command_of(pid) for pid in children(started.pid)))
        # It is ready and has asked before the supervisor hears either.
        os.kill(started.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(started.pid, signal.SIGCONT)
        answers = [heard(client) for client in clients]
        assert NAME.encode() in answers[0]
        assert [answer.split()[1] for answer in answers[1:]] == [b"503"] * 19


@pytest.mark.parametrize(("carrier", "clients"), [("epoll", 1), ("uring", 1), ("uring", 1_500)])
def test_who_comes_when_no_descriptor_is_left_is_known_later(tmp_path: Path, carrier: str, clients: int) -> None:
    with broker(tmp_path, "--carrier", carrier) as (port, _, _), ExitStack() as stack:
        came = []
        # io_uring has them all, in more than one turn of asking again; epoll leaves them in the backlog.
        with without_descriptors(broker_pid(tmp_path)):
            for _ in range(clients):
                came.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)))
                came[-1].sendall(REQUEST)
            time.sleep(0.5)
        # With an address that nobody knows they would be refused.
        assert all(NAME.encode() in heard(client) for client in came)
        assert asked(port)


@pytest.mark.parametrize("carrier", ["epoll", "uring"])
def test_a_broker_that_has_no_descriptor_left_is_succeeded_when_it_has(tmp_path: Path, carrier: str) -> None:
    with broker(tmp_path, "--carrier", carrier) as (port, client, _):
        old = broker_pid(tmp_path)
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as relayed:
            relayed.sendall(REQUEST)
            assert heard(relayed)
            with without_descriptors(old):
                client.ask("POST", "/v1/upgrade", {})
                wait_for(lambda: "broker_started" in (tmp_path / "events").read_text().partition("upgrade_started")[2])
                time.sleep(0.5)
                assert client.ask("GET", "/v1/status")["upgrade"]["state"] == "running"
            assert upgraded(client)["state"] == "done"
            assert broker_pid(tmp_path) != old
            relayed.sendall(REQUEST)
            assert heard(relayed) == REQUEST
        assert asked(port)


@pytest.mark.skipif(os.geteuid() != 0, reason="all of the sandbox includes another user, which only root can become")
def test_the_successor_makes_connections_for_a_confined_broker_too(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_S)
        port = free_port()
        (tmp_path / "events").touch()
        (tmp_path / "broker.toml").write_text(
            f'[confine]\nuser = "nobody"\nsandbox = "required"\n[control]\nsocket = "{tmp_path}/control"\n'
            f'[[listen]]\naddress = "127.0.0.1:{port}"\ndefault = "tcp:127.0.0.1:{listener.getsockname()[1]}"\n'
        )
        with process(*SERVE, "-c", f"{tmp_path}/broker.toml", "--events", f"{tmp_path}/events") as started:
            wait_for(lambda: "broker_started" in (tmp_path / "events").read_text() or started.poll() is not None)
            client = Client(tmp_path / "control")
            for number in range(3):
                if number:
                    client.ask("POST", "/v1/upgrade", {})
                    assert upgraded(client)["state"] == "done"
                with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as visitor:
                    visitor.sendall(REQUEST)
                    service, _ = listener.accept()
                    with service:
                        assert service.recv(4096) == REQUEST
            # Of each broker process one, and none of those that are gone.
            links = [str(one.readlink()) for one in Path(f"/proc/{started.pid}/fd").iterdir()]
            assert links.count("anon_inode:seccomp notify") == 1
            started.send_signal(signal.SIGTERM)
            assert started.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_a_flood_has_left_in_memory_goes_and_nobody_notices(is_killed: bool) -> None:
    needed("gcc")
    with wake.sleeping(2_500, idle_s=1.0) as world:
        assert asyncio.run(wake.ask([wake.name_of(0)], 1)).right == 1
        before, pids = world.memory_mib(), world.broker_pids
        request = f"GET / HTTP/1.1\r\nHost: {wake.name_of(1)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", wake.PORT), timeout=PATIENCE_S) as slow:
            slow.sendall(request[:20])
            flood = asyncio.run(wake.ask([wake.name_of(number) for number in range(2_500)], 2_500))
            assert flood.right == 2_500, flood.wrong[:10]
            if is_killed:
                # As soon as it is there: the old one has what it has, and goes on.
                wait_for(lambda: len(world.broker_pids) == 3, every_s=0.001)
                (new,) = set(world.broker_pids) - set(pids)
                os.kill(new, signal.SIGKILL)
                wait_for(lambda: new not in world.broker_pids)
                assert world.broker_pids == pids
            else:
                wait_for(lambda: len(world.broker_pids) == 2 and world.broker_pids[1] != pids[1])
                assert world.broker_pids[0] == pids[0]
                assert world.memory_mib()["own"] < before["own"] + 4
            slow.sendall(request[20:])
            said = b""
            while some := slow.recv(4096):
                said += some
            assert said == wake.name_of(1).encode() + b" heard " + request
