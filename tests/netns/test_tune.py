"""tune --lab NAME: a plan applied to a network namespace beside ours, and taken back byte for byte; also by kills."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fourtuple.cli import Exit
from fourtuple.facts import Change, ChangeKind, Goal, Host, Role
from fourtuple.host import knobs, read_host
from fourtuple.host.knobs import KnobKind
from fourtuple.host.namespace import inside_network_of
from fourtuple.lab import Lab, LabHost
from fourtuple.plan import Means, Plan, plan
from fourtuple.tuples import AddressSet, Endpoint

TRIALS = Path(__file__).parents[1] / "unit/tune_trials.py"
RANGE, FILES_OPEN = "net.ipv4.ip_local_port_range", "fs.nr_open"
VIP = Endpoint.parse("10.82.0.5:443")
KNOBS = ((KnobKind.SYSCTL, RANGE), (KnobKind.ROUTE, "10.9.0.0/27"))


@pytest.fixture
def machine() -> Iterator[LabHost]:
    with Lab(("machine",)) as made:
        if made.in_user_namespace:
            pytest.skip("entering a namespace of the lab from outside needs root")
        yield made["machine"]


def tune(*arguments: str, status: Exit = Exit.HEALTHY) -> str:
    command = [sys.executable, "-m", "fourtuple", "tune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join((done.stdout + done.stderr).split())


def place(host: LabHost) -> str:
    return f"/proc/{host.pid}/ns/net"


def values(host: LabHost | None) -> list[bytes | None]:
    """Both knobs byte for byte, in the lab or here."""

    def read() -> list[bytes | None]:
        return [knobs.read(Path("/"), kind, name) for kind, name in KNOBS]

    return read() if host is None else inside_network_of(f"proc/{host.pid}", read)


def saved(tmp_path: Path, made: Plan) -> str:
    file = tmp_path / "plan.json"
    file.write_text(made.model_dump_json())
    return str(file)


def client_plan(to: Endpoint = VIP, sources: str = "10.9.0.0/24") -> Plan:
    """For this machine, as it is outside of every lab."""
    stock = Host.model_validate_json((TRIALS.parents[1] / "hosts/stock_distribution.json").read_bytes())
    here = stock.model_copy(update={"machine": read_host().machine})
    goal = Goal(role=Role.CLIENT_ONE, connections=2_000_000, descriptors_per_connection=0, uses_epoll=False)
    return plan(goal, here, Means(to=(to,), sources=AddressSet.parse(sources)))


def with_a_knob_of_the_host(made: Plan) -> Plan:
    wider = Change(
        kind=ChangeKind.SYSCTL,
        knob=FILES_OPEN,
        scope="host",
        old="1048576",
        new="1048577",
        limit="B3",
        name="descriptors-ceiling",
        arithmetic="one more",
        persist="",
    )
    return made.model_copy(update={"changes": (*made.changes, wider)})


def test_applied_to_a_namespace_and_taken_back(machine: LabHost, tmp_path: Path) -> None:
    file, lab = saved(tmp_path, client_plan()), ("--lab", place(machine), "--state", str(tmp_path / "state"))
    before, here = values(machine), values(None)
    assert "dry run, nothing is changed" in tune(file, *lab)
    assert values(machine) == before
    shown = tune(file, "--apply", *lab)
    assert "2 applied" in shown
    assert f"To undo: fourtuple tune --undo --lab {place(machine)} --state {tmp_path}/state" in shown
    assert values(machine) == [b"1024\t65535\n", knobs.LOCAL]
    assert values(None) == here
    assert "applied here already" in tune(file, "--apply", *lab, status=Exit.USAGE)
    assert "2 taken back" in tune("--undo", *lab)
    assert values(machine) == before
    assert "nothing is applied" in tune("--undo", *lab, status=Exit.USAGE)


def test_what_is_the_whole_hosts_is_named_and_refused(machine: LabHost, tmp_path: Path) -> None:
    file = saved(tmp_path, with_a_knob_of_the_host(client_plan()))
    lab = ("--lab", place(machine), "--state", str(tmp_path / "state"))
    before, files_open = values(machine), Path("/proc/sys/fs/nr_open").read_bytes()
    assert FILES_OPEN in tune(file, *lab, status=Exit.WARNING)
    assert f"not of this one: {FILES_OPEN}" in tune(file, "--apply", *lab, status=Exit.USAGE)
    assert values(machine) == before
    assert "2 applied" in tune(file, "--apply", "--force", *lab)
    assert Path("/proc/sys/fs/nr_open").read_bytes() == files_open
    tune("--undo", *lab)
    assert values(machine) == before


def test_each_namespace_has_a_journal_of_its_own(tmp_path: Path) -> None:
    with Lab(("one", "two")) as made:
        if made.in_user_namespace:
            pytest.skip("entering a namespace of the lab from outside needs root")
        file, state = saved(tmp_path, client_plan()), ("--state", str(tmp_path / "state"))
        before = [values(host) for host in made.hosts]
        for host in made.hosts:
            assert "2 applied" in tune(file, "--apply", "--lab", place(host), *state)
        tune("--undo", "--lab", place(made["two"]), *state)
        assert [values(host) for host in made.hosts] == [[b"1024\t65535\n", knobs.LOCAL], before[1]]
        # Another process of the same namespace names it by another path.
        tune("--undo", "--lab", place(made["one"].another()), *state)
        assert [values(host) for host in made.hosts] == before


def test_a_namespace_by_its_name(tmp_path: Path) -> None:
    """As ip netns add leaves it, with lo down and so no IPv6 routes: all is taken back, and the message says why."""
    if not Path("/proc/sys/net/ipv6").is_dir():
        pytest.skip("this kernel has no IPv6")
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("ip (iproute2) or unshare (util-linux) is not installed")
    file = saved(tmp_path, client_plan(Endpoint.parse("[fd82::5]:443"), "fd81:1::/64"))
    state = tmp_path / "state"
    fourtuple = f"{sys.executable} -m fourtuple tune"
    script = f"""
set -eu
mount -t tmpfs none /run && mkdir /run/netns && ip netns add shop
range() {{ ip netns exec shop cat /proc/sys/net/ipv4/ip_local_port_range; }}
range
{fourtuple} {file} --apply --lab shop --state {state} 2>&1 || true
range
ip -n shop link set lo up
{fourtuple} {file} --apply --lab shop --state {state}
range
{fourtuple} --undo --lab shop --state {state}
range
ip netns del shop
{fourtuple} --undo --lab shop --state {state} 2>&1 || true
"""
    command = ["unshare", "--mount", "--net", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"a private /run/netns cannot be made here: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stdout + done.stderr
    ranges = [line for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert ranges == ["32768\t60999", "32768\t60999", "1024\t65535", "32768\t60999"]
    assert "ip link set lo up" in done.stdout
    assert "fourtuple tune --undo --lab shop" in done.stdout
    assert "there is no network namespace 'shop'" in " ".join(done.stdout.split())


@pytest.mark.parametrize("options", [("15",), ("6", "--both")], ids=["killed", "killed-with-its-guardian"])
def test_kills_in_another_namespace(machine: LabHost, tmp_path: Path, options: tuple[str, ...]) -> None:
    command = [sys.executable, str(TRIALS), "--root", "/", "--lab", place(machine), "--state", str(tmp_path)]
    command += ["--seed", "15", "--trials", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["hit"] >= 2, "hardly one was killed at work, so that this shows nothing"
