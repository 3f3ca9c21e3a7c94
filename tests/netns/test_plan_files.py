"""The files of a plan, read by the programs that they are for: nft, ip, sh, systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fourtuple.facts import Conntrack, Goal, Host, Role
from fourtuple.plan import Means, Plan, plan, written_files
from fourtuple.tuples import AddressSet, Endpoint

HOSTS = Path(__file__).parents[1] / "hosts"
SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def host(name: str) -> Host:
    return Host.model_validate_json((HOSTS / f"{name}.json").read_bytes())


def tracking(name: str) -> Host:
    table = Conntrack(loaded=True, active=True, count=0, maximum=262_144, buckets=262_144)
    return host(name).model_copy(update={"conntrack": table})


def client(to: str = "203.0.113.5:443", sources: str = "10.9.0.0/24") -> Plan:
    goal = Goal(role=Role.CLIENT_ONE, connections=2_000_000)
    means = Means(to=(Endpoint.parse(to),), sources=AddressSet.parse(sources))
    return plan(goal, tracking("stock_distribution"), means)


def proxy() -> Plan:
    means = Means(to=(Endpoint.parse("10.1.0.1:80"), Endpoint.parse("10.1.0.2:8080")))
    return plan(Goal(role=Role.PROXY, connections=300_000), tracking("stock_distribution"), means)


def server() -> Plan:
    return plan(Goal(role=Role.SERVER, connections=5_000_000, rate_per_s=9_000), tracking("tuned_server"))


def nat(sources: str | None, ports: tuple[int, int] | None = None) -> Plan:
    box = host("nat_box")
    (rule, *_) = box.source_nat
    before = box.model_copy(update={"source_nat": (rule.model_copy(update={"ports": ports}),)})
    means = Means(sources=None if sources is None else AddressSet.parse(sources))
    return plan(Goal(role=Role.NAT, connections=440_000), before, means)


PLANS: dict[str, Callable[[], Plan]] = {
    "client": client,
    "client-6": lambda: client("[2001:db8::5]:443", "fd81:1::/64"),
    "proxy": proxy,
    "server": server,
    "nat": lambda: nat("198.51.100.8/29"),
    "nat-with-ports": lambda: nat("198.51.100.0/24", (2_000, 9_999)),
    "nat-unnamed": lambda: nat(None),
    "nat-6": lambda: nat("fd98::/64", (2_000, 9_999)),
}


def with_file(path: str) -> pytest.MarkDecorator:
    """Once for each of the plans that have such a file, or a folder of that name."""
    names = [name for name, made in PLANS.items() if any(one.startswith(path) for one in written_files(made(), "shop"))]
    return pytest.mark.parametrize("files", names, indirect=True)


@pytest.fixture
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a plan, as --write leaves it."""
    for name, text in written_files(PLANS[request.param](), "shop").items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(*command: str, **environment: str) -> str:
    """What a program says; skips where it is not installed."""
    for program in command[:1] if command[0] != "unshare" else (command[0], command[2]):
        if shutil.which(program, path=SEARCH) is None:
            pytest.skip(f"{program} is not installed")
    whole = {**os.environ, "PATH": SEARCH, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=whole)
    if "unshare failed" in done.stderr:
        pytest.skip(f"no network namespace from outside: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@with_file("fourtuple.nft")
def test_nft_takes_the_rules(files: Path) -> None:
    rules = files / "fourtuple.nft"
    # What only a person knows stands in capitals.
    rules.write_text(rules.read_text().replace("PORT_OF_THE_DESTINATION", "80").replace("PORT", "443"))
    run("unshare", "--net", "nft", "--check", "--file", str(rules))


@with_file("addresses.sh")
def test_the_script_makes_the_addresses_local_and_says_how_to_undo_it(files: Path) -> None:
    script = files / "addresses.sh"
    undo = [line.removeprefix("#   ") for line in script.read_text().splitlines() if line.startswith("#   ")]
    table = "ip route show table local; ip -6 route show table local"
    steps = ["ip link set lo up", f"({table}) > before", f"sh {script}", f"({table}) > during", *undo]
    run("unshare", "--net", "sh", "-euc", f"cd {files}; " + "; ".join([*steps, f"({table}) > after"]))
    before, during, after = ((files / name).read_text() for name in ("before", "during", "after"))
    assert during != before
    assert after == before
    assert during.count("local") == before.count("local") + len(undo)


@with_file("etc/systemd/system")
def test_systemd_understands_the_units(files: Path) -> None:
    units = files / "etc/systemd/system"
    (units / "shop.service").write_text("[Service]\nExecStart=/bin/true\n")
    for unit in units.glob("*.service"):
        said = run("systemd-analyze", "verify", "--man=no", str(unit), SYSTEMD_UNIT_PATH=f"{units}:")
        assert not [line for line in said.splitlines() if str(units) in line or "60-fourtuple" in line], said


@with_file("etc/sysctl.d")
def test_the_kernel_has_every_key_of_the_sysctl_file(files: Path) -> None:
    path = files / "etc/sysctl.d/60-fourtuple.conf"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    keys = [line.partition(" = ")[0] for line in lines if line]
    assert keys
    for key in keys:
        if key.startswith("net.netfilter.") and not Path("/proc/sys/net/netfilter/nf_conntrack_max").exists():
            assert (files / "etc/modules-load.d/60-fourtuple.conf").exists()
        else:
            assert Path("/proc/sys", *key.split(".")).exists(), key
