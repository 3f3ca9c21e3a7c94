"""Seven hosts and what the doctor says of them: the first limit of each role, and the whole diagnosis as a snapshot.

The numbers of `FIRST` are worked out here from the catalogue's arithmetic, not copied from output. The snapshots guard
the rest; FOURTUPLE_UPDATE_SNAPSHOTS=1 rewrites them, and the difference is then to be looked at.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fourtuple.doctor import Health, diagnose
from fourtuple.facts import Host, Role
from fourtuple.sources import Mechanism
from fourtuple.tuples import Endpoint

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.json"))

STOCK_PORTS = 60_999 - 32_768 + 1  # 28,232: the default range (A2)

# Source NAT to one address takes ports 1024 to 65535 for one destination (G4). That is less than the 262,144 entries
# which the table has above 4 GiB (G1), so it binds first on each of these hosts, as a rule that is there or one that
# would be.
NAT_OF_ONE_ADDRESS = ("snat-ports", 65_535 - 1_024 + 1)

FIRST: dict[str, dict[Role, tuple[str, int]]] = {
    # RLIMIT_NOFILE 20,000, 5 descriptors open when it was saved. Soft equals hard, and of equal numbers the earlier
    # entry of the catalogue is named (B1 before B2). A proxied connection takes two.
    "recorded": {
        Role.CLIENT_ONE: ("descriptors-soft", 20_000 - 5),
        Role.CLIENT_MANY: ("descriptors-soft", 20_000 - 5),
        Role.SERVER: ("descriptors-soft", 20_000 - 5),
        Role.PROXY: ("descriptors-soft", (20_000 - 5) // 2),
        Role.NAT: NAT_OF_ONE_ADDRESS,
    },
    # The ladder of catalogue section 1: soft 1,024 before anything else, less standard input, output and error.
    "stock_distribution": {
        Role.CLIENT_ONE: ("descriptors-soft", 1_024 - 3),
        Role.CLIENT_MANY: ("descriptors-soft", 1_024 - 3),
        Role.SERVER: ("descriptors-soft", 1_024 - 3),
        Role.PROXY: ("descriptors-soft", (1_024 - 3) // 2),
        Role.NAT: NAT_OF_ONE_ADDRESS,
    },
    # 1024-65535 is 64,512 ports, and the proxy's own listener on 8443 lies inside (A8): 64,511 to one destination,
    # which is less than two million descriptors. To 1,000 destinations 64.5 million tuples: the 2,000,000 - 40
    # descriptors bind, and 60 GiB x 80 % / 3,950 B = 13.0 million sockets is more.
    "tuned_server": {
        Role.CLIENT_ONE: ("ephemeral-ports", 64_512 - 1),
        Role.CLIENT_MANY: ("descriptors-soft", 2_000_000 - 40),
        Role.SERVER: ("descriptors-soft", 2_000_000 - 40),
        Role.PROXY: ("ephemeral-ports", 64_512 - 1),
        Role.NAT: NAT_OF_ONE_ADDRESS,
    },
    # A child namespace has the default range. memory.max 2 GiB less 200 MiB in use, at 3,750 B a socket and 200 B of
    # epoll: 490,574, below the 1,048,576 descriptors. A proxy needs two sockets, 245,287; its one backend's ports are
    # fewer.
    "container": {
        Role.CLIENT_ONE: ("ephemeral-ports", STOCK_PORTS),
        Role.CLIENT_MANY: ("memory-cgroup", (2 * 2**30 - 200 * 2**20) // (3_750 + 200)),
        Role.SERVER: ("memory-cgroup", (2 * 2**30 - 200 * 2**20) // (3_750 + 200)),
        Role.PROXY: ("ephemeral-ports", STOCK_PORTS),
        Role.NAT: NAT_OF_ONE_ADDRESS,
    },
    # The kernel's own 1024:4096, and a Java process that has 96 files open already.
    "old_kernel": {
        Role.CLIENT_ONE: ("descriptors-soft", 1_024 - 96),
        Role.CLIENT_MANY: ("descriptors-soft", 1_024 - 96),
        Role.SERVER: ("descriptors-soft", 1_024 - 96),
        Role.PROXY: ("descriptors-soft", (1_024 - 96) // 2),
        Role.NAT: NAT_OF_ONE_ADDRESS,
    },
    # Masquerading uses the one address of the outgoing interface: 65535 - 1024 + 1 ports to one destination (G4). The
    # table has 262,144 - 87,000 = 175,144 entries left, which is more. Programs on the box itself have the shell's
    # 1,024.
    "nat_box": {
        Role.CLIENT_ONE: ("descriptors-soft", 1_024 - 3),
        Role.CLIENT_MANY: ("descriptors-soft", 1_024 - 3),
        Role.SERVER: ("descriptors-soft", 1_024 - 3),
        Role.PROXY: ("descriptors-soft", (1_024 - 3) // 2),
        Role.NAT: NAT_OF_ONE_ADDRESS,
    },
    # Two listeners and thirty bound ports lie in the range: 28,232 - 32. Descriptors: 65,536 - 8,140 = 57,396, for a
    # proxy half of that, 28,698, which is still more than its ports.
    "exhausted_client": {
        Role.CLIENT_ONE: ("ephemeral-ports", STOCK_PORTS - 32),
        Role.CLIENT_MANY: ("descriptors-soft", 65_536 - 8_140),
        Role.SERVER: ("descriptors-soft", 65_536 - 8_140),
        Role.PROXY: ("ephemeral-ports", STOCK_PORTS - 32),
        Role.NAT: NAT_OF_ONE_ADDRESS,
    },
}


def load(name: str) -> Host:
    return Host.model_validate_json((HERE / f"{name}.json").read_bytes())


def test_every_host_is_expected() -> None:
    assert set(FIRST) == set(NAMES)
    assert all(set(roles) == set(Role) for roles in FIRST.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_origin_is_labelled(name: str) -> None:
    host = load(name)
    assert host.origin == ("recorded" if name == "recorded" else "constructed")
    assert host.label


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("name", NAMES)
def test_the_first_limit_of_each_role(name: str, role: Role) -> None:
    found = next(it for it in diagnose(load(name)).roles if it.goal.role is role)
    assert (found.bounds[0].name, found.bounds[0].connections) == FIRST[name][role]
    assert found.ceiling == FIRST[name][role][1]


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_diagnosis(name: str) -> None:
    shown = json.dumps(diagnose(load(name)).to_json(), indent=1, ensure_ascii=False) + "\n"
    snapshot = HERE / "snapshots" / f"{name}.json"
    if os.environ.get("FOURTUPLE_UPDATE_SNAPSHOTS"):
        snapshot.parent.mkdir(exist_ok=True)
        snapshot.write_text(shown, encoding="utf-8")
    assert json.loads(shown) == json.loads(snapshot.read_text(encoding="utf-8"))


def test_the_exhausted_client_is_critical_and_says_where() -> None:
    found = diagnose(load("exhausted_client"))
    assert found.health is Health.CRITICAL
    # 28,100 of the 28,200 ports that automatic choice can take: 99 % rounded down.
    worst = found.pressures[0]
    assert (worst.name, worst.used, worst.of, worst.percent) == ("ephemeral-ports", 28_100, 28_200, 99)
    assert "198.51.100.10:443" in worst.subject


@pytest.mark.parametrize("name", NAMES)
def test_the_mechanism_of_a_source_pool_is_named(name: str) -> None:
    """A kernel before IP_LOCAL_PORT_RANGE leaves the choice of the port to connect()."""
    choice = diagnose(load(name)).source_pool
    assert choice is not None
    assert choice.inside is (Mechanism.NO_PORT if name == "old_kernel" else Mechanism.SINGLE_PORT)
    assert choice.outside is Mechanism.BIND
    assert ("no IP_LOCAL_PORT_RANGE" in choice.why) is (name == "old_kernel")


@pytest.mark.parametrize("missing", ["bind_address_no_port", "local_port_range"])
def test_the_mechanism_is_not_guessed(missing: str) -> None:
    host = load("recorded")
    features = {name: there for name, there in host.features.items() if name != missing}
    assert diagnose(host.model_copy(update={"features": features})).source_pool is None


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"exhausted_client"}))
def test_the_others_are_healthy(name: str) -> None:
    assert diagnose(load(name)).health is Health.HEALTHY


def test_the_container_names_host_limits_as_unknown() -> None:
    host = load("container")
    server = next(it for it in diagnose(host).roles if it.goal.role is Role.SERVER)
    named = " ".join(f"{it.name} {it.reason}" for it in server.unknown) + " ".join(host.unread)
    assert "net.ipv4.tcp_mem" in named
    assert "orphan" in named


def test_two_million_to_one_address_need_71_sources_or_32() -> None:
    # The worked example of catalogue section 1.
    for name, sources in (
        ("stock_distribution", -(-2_000_000 // STOCK_PORTS)),
        ("tuned_server", -(-2_000_000 // 64_512)),
    ):
        host = load(name).model_copy(update={"poisoned_ports": (), "listeners": ()})
        default = next(it.goal for it in diagnose(host).roles if it.goal.role is Role.CLIENT_ONE)
        for count, enough in ((sources - 1, False), (sources, True)):
            goal = default.model_copy(update={"sources": count, "connections": 2_000_000})
            ports = next(it for it in diagnose(host, [goal]).roles[0].bounds if it.name == "ephemeral-ports")
            assert (ports.connections >= 2_000_000) is enough
    assert -(-2_000_000 // STOCK_PORTS) == 71
    assert -(-2_000_000 // 64_512) == 32


def test_constructed_files_are_fresh() -> None:
    ran = subprocess.run(
        [sys.executable, str(HERE / "construct.py"), "--check"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_an_endpoint_survives_the_file() -> None:
    assert load("exhausted_client").flows[0].destination == Endpoint.parse("198.51.100.10:443")
