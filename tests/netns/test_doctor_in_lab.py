"""`fourtuple doctor` as a command inside a lab: status and JSON say what was turned there, with root and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from shutil import which
from typing import Any

import pytest

import fourtuple
from fourtuple.cli import Exit
from fourtuple.lab import Lab, LabHost
from fourtuple.tuples import Endpoint

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(fourtuple.__file__ or "").parents[1])}
AS_ROOT = "import sys; from fourtuple.cli.main import main; sys.exit(main({arguments!r}))"
# The first run imports what the second needs: the interpreter itself may lie where only root can read it.
AS_NOBODY = """
import os, sys
from fourtuple.cli.main import main
sys.stdout = open(os.devnull, "w"); main({arguments!r}); sys.stdout = sys.__stdout__
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(main({arguments!r}))
"""


@pytest.fixture(scope="module")
def client() -> Iterator[LabHost]:
    """A host whose range has 100 ports: ten reserved, one listened on."""
    if os.geteuid() != 0 or which("nsenter") is None:
        pytest.skip("entering a namespace of the lab from outside needs root and nsenter (util-linux)")
    with Lab(("client",)) as lab:
        lab["client"].set_sysctl("net.ipv4.ip_local_port_range", "40000 40099")
        lab["client"].set_sysctl("net.ipv4.ip_local_reserved_ports", "40000-40009")
        lab["client"].listen(Endpoint(ip_address("127.0.0.1"), 40_050), backlog=4)
        yield lab["client"]


def doctor(host: LabHost, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    inside = ["nsenter", "-t", str(host.pid), "-n", sys.executable, "-c", code.format(arguments=["doctor", *arguments])]
    return subprocess.run(inside, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)


def diagnosis(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert ran.stderr == ""
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize("code", [AS_ROOT, AS_NOBODY], ids=["root", "uid-65534"])
def test_the_command_sees_the_lab_and_not_the_host(client: LabHost, code: str) -> None:
    ran = doctor(client, code, "--json", "--role", "client-one")
    found = diagnosis(ran)
    assert ran.returncode == Exit[found["health"].upper()]
    (role,) = found["roles"]
    assert role["ceiling"] == 100 - 10 - 1
    assert role["bounds"][0]["name"] == "ephemeral-ports"


def test_what_is_asked_for_and_not_to_be_had_is_a_warning(client: LabHost) -> None:
    ran = doctor(client, AS_ROOT, "--json", "--role", "client-one", "--connections", "90")
    assert ran.returncode == Exit.WARNING
    assert any("90 connections wanted, ephemeral-ports allows 89" in reason for reason in diagnosis(ran)["reasons"])


def test_a_full_accept_queue_is_critical(client: LabHost) -> None:
    for _ in range(5):
        assert client.connect_once(Endpoint(ip_address("127.0.0.1"), 40_050), keep=True) == "ok"
    ran = doctor(client, AS_NOBODY, "--json")
    found = diagnosis(ran)
    assert (ran.returncode, found["health"]) == (Exit.CRITICAL, "critical")
    assert any("accept-queue" in reason for reason in found["reasons"])
