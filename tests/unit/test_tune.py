"""tune: all or nothing, by kills at random points; what is refused; plans and journals that mean harm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fourtuple.cli import Exit
from fourtuple.cli.main import main
from fourtuple.errors import BadConfig, LimitReached, MissingFeature
from fourtuple.facts import Change, Goal, Host, Role
from fourtuple.host import journal, knobs
from fourtuple.host.apply import Step, apply, compare, undo
from fourtuple.host.knobs import TUNABLE, KnobKind
from fourtuple.plan import Means, Plan, hazards, plan
from fourtuple.tuples import AddressSet, Endpoint

HOSTS = Path(__file__).parents[1] / "hosts"
TRIALS = Path(__file__).with_name("tune_trials.py")
SYSCTLS = {
    "net.core.somaxconn": "4096\n",
    "net.ipv4.ip_local_port_range": "32768\t60999\n",
    "net.ipv4.ip_local_reserved_ports": "\n",
    "net.ipv4.ip_forward": "0\n",
    "net.ipv4.tcp_tw_reuse": "2\n",
    "fs.nr_open": "1048576\n",
    "kernel.random.boot_id": "first\n",
}
SYSCTL_FILE = "etc/sysctl.d/60-fourtuple.conf"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine in a folder."""
    made = tmp_path / "root"
    for name, value in SYSCTLS.items():
        set_value(made, name, value)
    return made


def set_value(root: Path, name: str, value: str) -> None:
    path = root.joinpath("proc/sys", *name.split("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value)


def value(root: Path, name: str) -> str:
    return root.joinpath("proc/sys", *name.split(".")).read_text()


def everything(root: Path) -> dict[str, bytes | None]:
    """Each file and folder below, but for the journal's."""
    paths = (path for path in root.rglob("*") if "var" not in path.relative_to(root).parts)
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def sysctl(name: str, value: str) -> Step:
    return Step(kind=KnobKind.SYSCTL, name=name, new=value.encode() + b"\n")


def file(name: str, text: str) -> Step:
    return Step(kind=KnobKind.FILE, name=name, new=text.encode())


STEPS = (
    sysctl("net.core.somaxconn", "10000"),
    sysctl("net.ipv4.ip_local_reserved_ports", "8080,8081,9000"),
    sysctl("net.ipv4.ip_local_port_range", "1024 65535"),
    file(SYSCTL_FILE, "net.core.somaxconn = 10000\n"),
)


# All or nothing.


def test_apply_and_undo_give_back_every_byte(root: Path) -> None:
    before = everything(root)
    done = apply(STEPS, root=root)
    assert [entry.name for entry in done] == [step.name for step in STEPS]
    assert value(root, "net.ipv4.ip_local_port_range") == "1024 65535\n"
    assert (root / SYSCTL_FILE).read_text() == "net.core.somaxconn = 10000\n"
    assert undo(root=root) == done
    assert everything(root) == before
    with pytest.raises(BadConfig, match="nothing is applied"):
        undo(root=root)


def test_what_has_its_value_is_left_alone(root: Path) -> None:
    assert apply((sysctl("net.core.somaxconn", "4096"),), root=root) == ()
    assert not journal.exists(root / "var/lib/fourtuple")
    assert [entry.name for entry in compare(STEPS[:1], root)] == ["net.core.somaxconn"]


def test_a_file_that_was_there_comes_back_with_its_mode(root: Path) -> None:
    path = root / SYSCTL_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff old \0")
    path.chmod(0o600)
    apply(STEPS, root=root)
    undo(root=root)
    assert path.read_bytes() == b"\xff old \0"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_refused_write_takes_back_all_before_it(root: Path) -> None:
    before = everything(root)
    (root / "etc").write_text("no folder")
    with pytest.raises((BadConfig, MissingFeature)):
        apply(STEPS, root=root)
    (root / "etc").unlink()
    assert everything(root) == before
    assert not journal.exists(root / "var/lib/fourtuple")


def test_applied_twice_is_refused_until_taken_back(root: Path) -> None:
    apply(STEPS, root=root)
    with pytest.raises(BadConfig, match="applied here already"):
        apply((sysctl("net.core.somaxconn", "20000"),), root=root)
    undo(root=root)
    assert apply((sysctl("net.core.somaxconn", "20000"),), root=root)


def test_one_at_a_time(root: Path) -> None:
    state = root / "var/lib/fourtuple"
    with journal.locked(state), pytest.raises(LimitReached, match="wait for its end"):
        apply(STEPS, root=root)


def kills(root: Path, state: Path, trials: int, *options: str) -> dict[str, object]:
    command = [sys.executable, str(TRIALS), "--root", str(root), "--state", str(state)]
    command += ["--trials", str(trials), "--seed", str(trials), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_25_kills_leave_the_old_state_or_the_new(root: Path, tmp_path: Path) -> None:
    found = kills(root, tmp_path / "state", 25)
    assert found["wrong"] == []
    assert isinstance(found["hit"], int)
    assert found["hit"] >= 5, "hardly one was killed at work, so that this shows nothing"


def test_undo_restores_what_a_power_failure_leaves(root: Path, tmp_path: Path) -> None:
    found = kills(root, tmp_path / "state", 10, "--both")
    assert found["wrong"] == []


# What others changed meanwhile.


def test_a_value_that_somebody_changed_since_stops_undo(root: Path) -> None:
    before = everything(root)
    apply(STEPS, root=root)
    set_value(root, "net.core.somaxconn", "777\n")
    with pytest.raises(BadConfig, match=r"changed since by somebody else: net\.core\.somaxconn"):
        undo(root=root)
    assert value(root, "net.ipv4.ip_local_port_range") == "1024 65535\n", "nothing may be undone by half"
    undo(root=root, force=True)
    assert everything(root) == before


def test_after_a_reboot_files_go_and_settings_that_are_not_ours_stay(root: Path) -> None:
    apply(STEPS, root=root)
    set_value(root, "kernel.random.boot_id", "second\n")
    # The range came back with our file; somaxconn has the new kernel's default.
    set_value(root, "net.core.somaxconn", "128\n")
    undo(root=root)
    assert value(root, "net.core.somaxconn") == "128\n"
    assert value(root, "net.ipv4.ip_local_port_range") == SYSCTLS["net.ipv4.ip_local_port_range"]
    assert not (root / "etc").exists()


# Journals that are not what was written.


def damaged(root: Path) -> Path:
    apply(STEPS, root=root)
    return root / "var/lib/fourtuple" / journal.NAME


@pytest.mark.parametrize("old", ['"old": "NDA5Ngo="', '"applied"', '"net.core.somaxconn"', '"first"'])
def test_a_tampered_journal_is_refused(root: Path, old: str) -> None:
    path = damaged(root)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, old.replace("e", "f").replace("NDA5", "NDA6").replace("first", "frist"), 1))
    now = everything(root)
    with pytest.raises(BadConfig, match="checksum is wrong"):
        undo(root=root)
    with pytest.raises(BadConfig, match="checksum is wrong"):
        apply(STEPS, root=root)
    assert everything(root) == now


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"body": 1}', "\0" * 99, "[" * 100_000, '{"checksum": ""}'])
def test_a_journal_that_is_none(root: Path, text: str) -> None:
    damaged(root).write_text(text)
    with pytest.raises(BadConfig, match=r"is no journal|checksum"):
        undo(root=root)


def test_every_cut_of_a_journal_is_refused(root: Path) -> None:
    path = damaged(root)
    whole = path.read_bytes()
    for end in range(0, len(whole) - 2, 37):
        path.write_bytes(whole[:end])
        with pytest.raises(BadConfig):
            undo(root=root)


def test_a_journal_cannot_reach_beyond_what_tune_sets(root: Path) -> None:
    """Whoever can write a right checksum can still only name knobs of the table."""
    path = damaged(root)
    for kind, name in (("sysctl", "kernel.core_pattern"), ("file", "etc/passwd"), ("file", "../../etc/passwd")):
        body = json.loads(path.read_text())["body"]
        body["entries"] = [{"kind": kind, "name": name, "old": "", "new": "", "made": []}]
        path.write_text(json.dumps({"body": body, "checksum": journal._checksum(body)}))
        with pytest.raises(BadConfig, match="is not a"):
            undo(root=root)


def test_a_journal_removes_only_folders_of_its_file(root: Path, tmp_path: Path) -> None:
    path, kept = damaged(root), tmp_path / "kept"
    kept.mkdir()
    body = json.loads(path.read_text())["body"]
    body["entries"][-1]["made"] = [str(kept)]
    path.write_text(json.dumps({"body": body, "checksum": journal._checksum(body)}))
    with pytest.raises(BadConfig, match="is no journal"):
        undo(root=root)
    assert kept.is_dir()


def test_a_journal_that_is_a_link_is_not_followed(root: Path, tmp_path: Path) -> None:
    path = damaged(root)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadConfig, match="cannot be read"):
        undo(root=root)


# Plans that mean harm, or that are another's.


@pytest.mark.parametrize(
    ("kind", "name", "new"),
    [
        (KnobKind.SYSCTL, "kernel.core_pattern", b"|/bin/sh"),
        (KnobKind.SYSCTL, "net.ipv4.../../kernel/core_pattern", b"1"),
        (KnobKind.SYSCTL, "net.core.somaxconn", b"1; reboot"),
        (KnobKind.SYSCTL, "net.core.somaxconn", None),
        (KnobKind.ROUTE, "0.0.0.0/0", b"local"),
        (KnobKind.ROUTE, "127.0.0.0/8", b"local"),
        (KnobKind.ROUTE, "10.0.0.1/24", b"local"),
        (KnobKind.ROUTE, "10.9.0.0/24", b"via 10.0.0.1"),
        (KnobKind.FILE, "etc/cron.d/x", b""),
        (KnobKind.FILE, "etc/systemd/system/a/../../x.service.d/60-fourtuple.conf", b""),
        (KnobKind.FILE, SYSCTL_FILE, b"x" * (knobs.LARGEST_BYTES + 1)),
    ],
)
def test_a_step_that_is_not_ours_is_refused(root: Path, kind: KnobKind, name: str, new: bytes | None) -> None:
    before = everything(root)
    with pytest.raises(BadConfig):
        apply((*STEPS, Step(kind=kind, name=name, new=new)), root=root)
    assert everything(root) == before


def test_a_setting_that_this_kernel_lacks(root: Path) -> None:
    with pytest.raises(MissingFeature, match="modprobe nf_conntrack"):
        apply((*STEPS, sysctl("net.netfilter.nf_conntrack_max", "500000")), root=root)
    assert value(root, "net.core.somaxconn") == "4096\n"


def test_the_rules_of_plan_keep_to_the_table() -> None:
    source = (Path(knobs.__file__).parents[1] / "plan").glob("*.py")
    named = {word for path in source for word in TUNABLE if f'"{word}"' in path.read_text()}
    assert named | {"net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports"} == TUNABLE


def host(name: str) -> Host:
    return Host.model_validate_json((HOSTS / f"{name}.json").read_bytes())


def client_plan(of: Host) -> Plan:
    means = Means(to=(Endpoint.parse("203.0.113.5:443"),), sources=AddressSet.parse("10.9.0.0/24"))
    return plan(Goal(role=Role.CLIENT_ONE, connections=2_000_000), of, means)


def test_a_plan_is_for_its_host() -> None:
    stock = host("stock_distribution")
    made = client_plan(stock)
    assert hazards(made, stock) == ()
    assert any("another host: processors 8 there, 2 here" in one for one in hazards(made, host("container")))


def test_a_stale_plan_says_what_changed() -> None:
    stock = host("stock_distribution")
    made = client_plan(stock)
    changed = stock.model_copy(update={"sysctl": stock.sysctl | {"net.ipv4.ip_local_port_range": "20000 30000"}})
    (hazard,) = hazards(made, changed)
    assert "net.ipv4.ip_local_port_range is '20000 30000' here, and was '32768 60999'" in hazard


def test_a_listener_in_the_new_range_speaks_against_it() -> None:
    stock = host("stock_distribution")
    listening = host("old_kernel").listeners
    made = client_plan(stock)
    (hazard,) = hazards(made, stock.model_copy(update={"listeners": listening}))
    assert "listeners of this host have ports 8080" in hazard
    # A plan that is made where the listener is known reserves its port.
    again = client_plan(stock.model_copy(update={"listeners": listening}))
    assert [one.new for one in again.changes if one.limit == "A5"] == ["8080"]
    assert hazards(again, stock.model_copy(update={"listeners": listening})) == ()


def test_memory_that_is_not_there_speaks_against_it() -> None:
    stock = host("stock_distribution")
    less = stock.machine.model_copy(update={"memory_available_bytes": 1 << 30})
    (hazard,) = hazards(client_plan(stock), stock.model_copy(update={"machine": less}))
    assert "7,900,000,000 B, more than 80 % of the 1,073,741,824 B" in hazard


# The command.


def saved(tmp_path: Path, made: Plan) -> str:
    path = tmp_path / "plan.json"
    path.write_text(made.model_dump_json())
    return str(path)


def simple_plan(root: Path) -> Plan:
    """A plan for the machine in the folder, as the command makes it."""
    from fourtuple.host import read_host

    goal = Goal(role=Role.SERVER, connections=1_000, rate_per_s=10_000, uses_epoll=False, descriptors_per_connection=0)
    return plan(goal.model_copy(update={"descriptors_per_connection": 1}), read_host(root=root))


def test_dry_run_apply_and_undo(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "proc/self").mkdir(parents=True)
    file, before = saved(tmp_path, simple_plan(root)), everything(root)
    assert main(["tune", file, "--root", str(root)]) == Exit.HEALTHY
    shown = capsys.readouterr().out
    assert "dry run" in shown
    assert "4096" in shown
    assert "10000" in shown
    assert everything(root) == before
    assert main(["tune", file, "--apply", "--persist", "--root", str(root)]) == Exit.HEALTHY
    shown = capsys.readouterr().out
    assert f"To undo: fourtuple tune --undo --root {root}" in shown.replace("\n", " ").replace("  ", " ")
    assert "before:" in shown
    assert value(root, "net.core.somaxconn") == "10000\n"
    assert "net.core.somaxconn = 10000" in (root / SYSCTL_FILE).read_text()
    assert main(["tune", "--undo", "--root", str(root)]) == Exit.HEALTHY
    assert "taken back" in capsys.readouterr().out
    assert everything(root) == before


def test_the_command_refuses_another_host_unless_forced(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = simple_plan(root)
    other = made.model_copy(update={"host": made.host.model_copy(update={"cpus": 4_096})})
    file, before = saved(tmp_path, other), everything(root)
    assert main(["tune", file, "--root", str(root)]) == Exit.WARNING
    assert main(["tune", file, "--apply", "--root", str(root)]) == Exit.USAGE
    assert "another host" in capsys.readouterr().err
    assert everything(root) == before
    assert main(["tune", file, "--apply", "--force", "--root", str(root)]) == Exit.HEALTHY
    assert value(root, "net.core.somaxconn") == "10000\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["tune"],
        ["tune", "/nonexistent"],
        ["tune", "PLAN", "--undo"],
        ["tune", "--undo", "--apply"],
        ["tune", "PLAN", "--rehearse", "--apply"],
        ["tune", "PLAN", "--rehearse", "--lab", "name"],
        ["tune", "PLAN", "--lab", "name", "--persist"],
        ["tune", "PLAN", "--lab", "name", "--root", "/nonexistent"],
        ["tune", "PLAN", "--lab", "no-such-namespace"],
        ["tune", "PLAN", "--lab", "/proc/self/ns/net"],
        ["tune", "PLAN", "--lab", "/dev/null"],
        ["tune", "PLAN", "--lab", ""],
        ["tune", "PLAN", "--lab", ".."],
        ["tune", "PLAN", "--lab", "a\0b"],
        ["tune", "--undo", "--lab", "no-such-namespace"],
        ["tune", "PLAN", "--service", "nginx"],
        ["tune", "PLAN", "--persist", "--service", "../../etc/x"],
    ],
)
def test_wrong_use(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path, client_plan(host("stock_distribution")))
    assert main([file if one == "PLAN" else one for one in arguments]) == Exit.USAGE
    assert "Traceback" not in capsys.readouterr().err


def hostile(made: Plan, **update: object) -> str:
    change = made.changes[1].model_copy(update=update)
    return made.model_copy(update={"changes": (change,)}).model_dump_json()


@pytest.mark.parametrize(
    "update",
    [
        {"knob": "kernel.core_pattern", "new": "|/bin/sh"},
        {"knob": "../../../etc/passwd", "new": "1"},
        {"knob": "net.core.somaxconn", "new": "\x1b[2J"},
        {"knob": "net.core.somaxconn\0", "new": "1"},
    ],
)
def test_a_hostile_plan_changes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], update: dict[str, object]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(hostile(client_plan(host("stock_distribution")), **update))
    before = everything(root)
    assert main(["tune", str(path), "--apply", "--force", "--root", str(root)]) in (Exit.USAGE, Exit.UNABLE)
    captured = capsys.readouterr()
    assert "\x1b" not in captured.err
    assert everything(root) == before


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 2}', "\xff", "1e999"])
def test_a_file_that_is_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="latin-1")
    assert main(["tune", str(path)]) == Exit.USAGE
    assert "plan.json" in capsys.readouterr().err


def test_another_root_has_no_routes(root: Path) -> None:
    with pytest.raises(MissingFeature, match="no routes below"):
        apply((Step(kind=KnobKind.ROUTE, name="10.9.0.0/24", new=knobs.LOCAL),), root=root)


def test_changes_of_a_plan_can_be_read_back() -> None:
    made = client_plan(host("stock_distribution"))
    assert Plan.model_validate_json(made.model_dump_json()) == made
    assert all(isinstance(change, Change) for change in made.changes)
    assert os.linesep not in made.sources
