"""What a memory cgroup allows: the limits that the doctor reads and the plan raises are those that the kernel holds to.

The tenth and eleventh of the goals that are played (`test_plan.py` has the others): bytes queued, and memory. Beside a
cgroup only the host has those limits, and a test leaves the host's alone; in a cgroup of our own both are ours to set.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fourtuple.doctor import diagnose
from fourtuple.engine import CarrierName, EchoConfig, LoadConfig, SourceChoice
from fourtuple.errors import EngineStopped, LimitReached
from fourtuple.facts import Goal, Role
from fourtuple.lab import Lab, RemoteEngine
from fourtuple.plan import plan
from fourtuple.tuples import AddressSet, Endpoint, PortSet, TupleSpace

MEMORY = Path("/sys/fs/cgroup/memory")
VERSION_2 = Path("/sys/fs/cgroup")
QUEUES = Path(__file__).with_name("queues.py")
KMEM_TCP = "memory.kmem.tcp.limit_in_bytes"
PATIENCE_S = 30.0
FACTOR = 300


def make_cgroup(parent: Path, file: str) -> Path:
    """A cgroup that has this file; skips with the reason where none can be made."""
    path = parent / f"fourtuple-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made in {parent}: {error.strerror}")
    if not (path / file).exists():
        path.rmdir()
        pytest.skip(f"a cgroup below {parent} has no {file}: another version has the memory controller, or none")
    return path


def remove_cgroup(path: Path) -> None:
    """It goes when the last of its processes has been taken down."""
    deadline = time.monotonic() + PATIENCE_S
    while path.exists() and time.monotonic() < deadline:
        with suppress(OSError):
            path.rmdir()
        time.sleep(0.02)
    assert not path.exists()


@pytest.fixture
def version_1() -> Iterator[Path]:
    path = make_cgroup(MEMORY, KMEM_TCP)
    yield path
    remove_cgroup(path)


@pytest.fixture(params=[(MEMORY, "memory.limit_in_bytes"), (VERSION_2, "memory.max")], ids=["version-1", "version-2"])
def limited(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The file with the limit of a cgroup of ours."""
    parent, name = request.param
    path = make_cgroup(parent, name)
    yield path / name
    remove_cgroup(path)


def test_server_whose_connections_have_bytes_queued(version_1: Path) -> None:
    """300,000 / 300 connections with 16 KiB unread each; the cgroup begins with a 300th of 1.2 GB."""
    limit = version_1 / KMEM_TCP
    limit.write_text(str((1_200 << 20) // FACTOR // 4_096 * 4_096))
    with Lab(("machine",)) as made:
        machine = made["machine"]
        (version_1 / "cgroup.procs").write_text(str(machine.pid))
        goal = Goal(role=Role.SERVER, connections=300_000 // FACTOR, bytes_queued=16_384)
        found = plan(goal, machine.facts())
    assert found.reached
    assert found.ceiling_before == (1_200 << 20) // FACTOR // 20_480
    before = played(version_1, 2 * found.ceiling_before, 16_384)
    assert abs(before["complete"] - found.ceiling_before) * 100 <= found.ceiling_before
    (change,) = (one for one in found.changes if one.knob == KMEM_TCP)
    limit.write_text(change.new)
    after = played(version_1, found.share.connections or 0, 16_384)
    assert after["complete"] == found.share.connections
    assert abs(after["charged_bytes"] - int(change.new)) * 100 <= int(change.new)
    # Beside it the host's own account (C3), which other programs move too, and which each processor keeps 1 MiB of.
    print(f"{after['pages_of_the_host']:,} pages more in sockstat, {after['charged_bytes'] // 4_096:,} predicted")


@pytest.mark.parametrize("queued", [4_096, 16_384, 50_000])
def test_queued_bytes_are_charged_in_whole_pages(version_1: Path, queued: int) -> None:
    goal = Goal(role=Role.SERVER, connections=200, bytes_queued=queued)
    with Lab(("machine",)) as made:
        (version_1 / "cgroup.procs").write_text(str(made["machine"].pid))
        (version_1 / KMEM_TCP).write_text("0")
        needed = {one.knob: one.new for one in plan(goal, made["machine"].facts()).changes}[KMEM_TCP]
    (version_1 / KMEM_TCP).write_text("-1")
    done = played(version_1, 200, queued)
    assert done["complete"] == 200
    # The catalogue's quarter of overhead is for segments of any size: never less than it takes, a tenth more at most.
    assert int(needed) * 90 // 100 <= done["charged_bytes"] <= int(needed)


def played(cgroup: Path, connections: int, queued: int) -> dict[str, int]:
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, str(QUEUES)]
    command += ["--connections", str(connections), "--queued", str(queued), "--cgroup", str(cgroup)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_memory_of_a_cgroup_ends_it_where_the_doctor_says(limited: Path) -> None:
    """Some 10,000 connections: then the kernel kills their process, for nothing in its cgroup can be given back."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 15_000:
        pytest.skip(f"RLIMIT_NOFILE is {hard:,}; 15,000 are needed")
    usage = limited.with_name("memory.usage_in_bytes" if limited.name.endswith("in_bytes") else "memory.current")
    with Lab(("client", "server"), descriptors=hard) as made:
        client, server = made["client"], made["server"]
        (limited.parent / "cgroup.procs").write_text(str(client.pid))
        there = Endpoint.parse(f"{server.links['client'].addresses[0]}:443")
        echo = server.start_engine(EchoConfig(listen=(there,), backlog=4_096), CarrierName.EPOLL, 1)
        space = TupleSpace(
            sources=AddressSet.of(client.links["server"].addresses[0]),
            source_ports=PortSet.parse("10000-30000"),
            destinations=AddressSet.of(there.address),
            destination_ports=PortSet.of(there.port),
        )
        config = LoadConfig(space=space, connections=0, choice=SourceChoice.KERNEL_PORT)
        load = client.start_engine(config, CarrierName.EPOLL, 1)
        client.facts()  # what reading itself takes is in use before the limit is set
        limit = (int(usage.read_text()) + (40 << 20)) // 4_096 * 4_096
        limited.write_text(str(limit))
        facts = client.facts()
        assert facts.cgroup is not None
        assert facts.cgroup.memory_max_bytes == limit
        role = diagnose(facts, [Goal(role=Role.CLIENT_ONE)]).roles[0]
        first = role.bounds[0]
        assert first.name == "memory-cgroup"
        load.set_target(first.connections * 5 // 4)
        with pytest.raises((LimitReached, EngineStopped)):
            last_words(load)
        reached = echo.snapshot().open_peak
        print(f"{first.connections:,} promised, {reached:,} reached; {first.arithmetic}")
        # Slabs are charged in pages, and processors keep some in advance.
        assert abs(reached - first.connections) * 10 <= first.connections


def last_words(load: RemoteEngine) -> None:
    """Ask until its process is gone."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        load.snapshot()
        time.sleep(0.02)
