"""A supervisor that wants to leave its place and cannot; and a service whose kind of socket changes while it runs."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fourtuple.control.client import Client, Declined
from fourtuple.errors import MissingFeature
from fourtuple.registry import Registry
from fourtuple.services import Delivery, Service
from tests.netns.brokering import PATIENCE_S, SERVE, free_port, listens, needed, process, wait_for

NAME = "shop.example"
_ECHOER = Path(__file__).parents[2] / "bench" / "peers" / "echoer.c"
# Everything is done as if it were the interpreter itself, and the broker process takes it away.
_VANISHES = """#!/bin/sh
case "$*" in *--broker*) rm -f "$0" ;; esac
exec {python} "$@"
"""


@contextmanager
def broker(folder: Path) -> Iterator[tuple[int, Client, subprocess.Popen[str]]]:
    """One with a control socket, and a registry where `NAME` is started when it is called."""
    port, program = free_port(), folder / "echoer"
    needed("gcc")
    subprocess.run(["gcc", "-O2", "-o", program, _ECHOER], check=True)
    (folder / "run").mkdir()
    with Registry(folder / "store") as registry:
        registry.add([Service(name=NAME, target=f"unix:{folder}/run/{NAME}", start="echoer")])
    (folder / "broker.toml").write_text(
        f'[[listen]]\naddress = "127.0.0.1:{port}"\n[control]\nsocket = "{folder}/control"\n'
        f'[[template]]\nname = "echoer"\nargv = ["{program}", "{{socket}}"]\nsocket = "pass"\nready = "started"\n'
        f"idle_s = 600\n"
    )
    with process(
        *SERVE, "-c", f"{folder}/broker.toml", "--store", f"{folder}/store", "--events", f"{folder}/events"
    ) as started:
        wait_for(lambda: listens(port) or started.poll() is not None)
        yield port, Client(folder / "control"), started
        started.send_signal(signal.SIGTERM)
        output, _ = started.communicate(timeout=PATIENCE_S)
    assert started.returncode == 0, output
    assert list((folder / "run").iterdir()) == []


def asked(port: int) -> bytes:
    """What its service says to a client."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode())
        return client.recv(100)


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
    with broker(tmp_path) as (port, client, started):
        counts = []
        for _ in range(3):
            client.ask("POST", "/v1/upgrade", {})
            assert upgraded(client)["state"] == "done"
            assert asked(port)
            links = [str(one.readlink()) for one in Path(f"/proc/{started.pid}/fd").iterdir()]
            counts.append(sum(link.startswith(str(tmp_path / "store")) for link in links))
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
