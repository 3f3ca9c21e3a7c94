"""plan: ten goals with their exact arithmetic; goals that contradict themselves; what cannot be reached; the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourtuple.cli import Exit
from fourtuple.cli.main import main
from fourtuple.doctor import diagnose
from fourtuple.errors import BadConfig
from fourtuple.facts import ChangeKind, Conntrack, Goal, Host, RLimit, Role
from fourtuple.host.knobs import FILES, TUNABLE
from fourtuple.plan import Means, Plan, plan, written_files
from fourtuple.plan.files import persistent_files
from fourtuple.tuples import AddressSet, Endpoint

HOSTS = Path(__file__).parents[1] / "hosts"
NAMES = ("stock_distribution", "tuned_server", "container", "old_kernel", "nat_box", "exhausted_client", "recorded")
VIP = (Endpoint.parse("203.0.113.5:443"),)


def host(name: str) -> Host:
    return Host.model_validate_json((HOSTS / f"{name}.json").read_bytes())


def pool(text: str) -> AddressSet:
    return AddressSet.parse(text)


def turned(made: Plan) -> dict[str, str]:
    """The new value by knob."""
    return {change.knob: change.new for change in made.changes}


def why(made: Plan) -> dict[str, str]:
    """The arithmetic by knob."""
    return {change.knob: change.arithmetic for change in made.changes}


# Ten goals.


def test_client_with_two_million_connections_to_one_vip() -> None:
    goal = Goal(role=Role.CLIENT_ONE, connections=2_000_000)
    made = plan(goal, host("stock_distribution"), Means(to=VIP, sources=pool("10.9.0.0/24")))
    assert made.reached
    assert (made.ceiling_before, made.ceiling) == (1_021, 2_000_064)
    assert why(made) == {
        "LimitNOFILE": "2,000,000 x 1 descriptor + 3 open + 64 = 2,000,067",
        "net.ipv4.ip_local_port_range": "65535 - 1024 + 1 = 64,512 ports instead of 28,232",
        "10.9.0.0/27": "2,000,000 to one destination / 64,512 ports = 32 source addresses",
        "choice of the source": "an unbound connect() always takes the one address of its route",
    }
    assert turned(made)["net.ipv4.ip_local_port_range"] == "1024 65535"
    assert made.sources == "10.9.0.0-10.9.0.31"
    assert made.memory_arithmetic == "2,000,000 x (3,750 B socket + 200 B epoll) = 7,900,000,000 B"
    before = {finding.limit: (finding.before, finding.after) for finding in made.findings}
    assert before == {
        "B1": (1_021, 2_000_064),
        "A2": (28_232, 32 * 64_512),
        "A1": (65_535, 32 * 65_535),
        "B2": (524_285, 2_000_064),
    }


def test_server_with_five_million() -> None:
    made = plan(Goal(role=Role.SERVER, connections=5_000_000), host("tuned_server"))
    assert made.reached
    assert why(made) == {
        "fs.nr_open": "5,000,000 x 1 descriptor + 40 open + 64 = 5,000,104",
        "LimitNOFILE": "5,000,000 x 1 descriptor + 40 open + 64 = 5,000,104",
    }
    assert made.memory_bytes == 5_000_000 * 3_950


def test_proxy_with_a_million_to_four_backends() -> None:
    backends = tuple(Endpoint.parse(f"10.1.0.{last}:8080") for last in range(1, 5))
    goal = Goal(role=Role.PROXY, connections=1_000_000)
    made = plan(goal, host("tuned_server"), Means(to=backends, sources=pool("192.0.2.30,10.2.0.0/29")))
    assert made.reached
    # 8443 is a listener's: 64,512 - 1 poisoned, and no change would give it back.
    assert why(made)["10.2.0.0/30"] == ("250,000 to each of 4 destinations / 64,511 ports = 4 source addresses")
    assert turned(made)["LimitNOFILE"] == str(2 * 1_000_000 + 40 + 64)
    assert made.memory_bytes == 1_000_000 * 2 * 3_950
    assert made.ceiling == 1_000_032


def test_nat_box_with_440_thousand() -> None:
    goal = Goal(role=Role.NAT, connections=440_000)
    made = plan(goal, host("nat_box"), Means(sources=pool("198.51.100.8/29")))
    assert made.reached
    assert turned(made) == {
        "source NAT": "snat to 198.51.100.8-198.51.100.15",
        "net.netfilter.nf_conntrack_max": "571000",
    }
    assert why(made) == {
        "source NAT": "440,000 / (64,512 ports x 94 % x 1 destination) = 8 addresses",
        "net.netfilter.nf_conntrack_max": "440,000 x 1 entry x 110 % + 87,000 in use = 571,000",
    }
    assert made.ceiling_before == 64_512 * 94 // 100
    assert made.memory_bytes == 571_000 * 256


def test_a_hundred_million_over_many_machines() -> None:
    goal = Goal(role=Role.SERVER, connections=100_000_000)
    made = plan(goal, host("stock_distribution"), Means(machines=None))
    each = 24_159_191_040 * 80 // 100 // 3_950
    assert each == 4_893_000
    assert made.machines == -(-100_000_000 // each) == 21
    assert made.share.connections == -(-100_000_000 // 21) == 4_761_905
    assert (made.reached, made.total) == (True, 100_000_000)
    balancer = made.balancer
    assert balancer is not None
    assert balancer.passes_on.startswith(
        "with state 100,000,000 x 110 % = 110,000,000 entries x 256 B = 28,160,000,000 B"
    )
    assert balancer.relay_machines == -(-100_000_000 // (24_159_191_040 * 80 // 100 // 7_900)) == 41
    to_each = -(-100_000_000 // (41 * 21))
    assert balancer.relay_sources_each == -(-to_each // 64_512) == 2


def test_ipv6_client() -> None:
    goal = Goal(role=Role.CLIENT_ONE, connections=1_000_000)
    means = Means(to=(Endpoint.parse("[2001:db8::5]:443"),), sources=pool("2001:db8:1::/64"))
    made = plan(goal, host("stock_distribution"), means)
    assert made.reached
    assert why(made)["2001:db8:1::/124"] == "1,000,000 to one destination / 64,512 ports = 16 source addresses"
    assert turned(made)["net.ipv6.ip_nonlocal_bind"] == "1"
    assert made.memory_bytes == 1_000_000 * (3_750 + 200 + 130)


def test_client_in_a_container() -> None:
    goal = Goal(role=Role.CLIENT_ONE, connections=1_000_000)
    made = plan(goal, host("container"), Means(to=VIP))
    assert made.reached
    assert turned(made)["source addresses"] == "16"
    assert turned(made)["MemoryMax"] == str(1_000_000 * 3_950 + (200 << 20))
    assert [change.kind for change in made.changes if change.knob == "source addresses"] == [ChangeKind.ELSEWHERE]
    notes = written_files(made)["container.md"]
    assert 'resources.limits.memory: "4159715200"' in notes
    assert '{name: net.ipv4.ip_local_port_range, value: "1024 65535"}' in notes


def test_short_connections_at_a_rate() -> None:
    goal = Goal(
        role=Role.CLIENT_MANY, connections=20_000, destinations=10, rate_per_s=20_000, descriptors_per_connection=0
    )
    made = plan(goal, host("stock_distribution"))
    assert made.reached
    assert turned(made) == {"net.ipv4.tcp_tw_reuse": "1"}
    assert why(made)["net.ipv4.tcp_tw_reuse"] == (
        "20,000 per second x 60 s = 1,200,000 tuples would wait; with it each waits 1 s"
    )
    (finding,) = made.findings
    assert (finding.limit, finding.before, finding.after) == ("A12", 282_320 // 60, 282_320)


def test_server_whose_connections_have_bytes_queued() -> None:
    goal = Goal(role=Role.SERVER, connections=300_000, bytes_queued=16_384)
    made = plan(goal, host("stock_distribution"))
    assert made.reached
    assert turned(made)["net.ipv4.tcp_mem"] == "750000 1000000 1500000"
    assert why(made)["net.ipv4.tcp_mem"] == ("300,000 x 20,480 B queued and their overhead / 4,096 B = 1,500,000 pages")
    assert made.memory_bytes == 300_000 * (3_950 + 20_480)


def test_connections_that_nobody_accepts_yet() -> None:
    goal = Goal(role=Role.SERVER, connections=30_000, accepts=False, backlog=511)
    made = plan(goal, host("stock_distribution"))
    assert made.reached
    assert turned(made) == {
        "net.core.somaxconn": "29999",
        "listen() backlog": "29999",
        "LimitNOFILE": "30067",
    }
    assert why(made)["net.core.somaxconn"] == "min(backlog, somaxconn) + 1 wait: 30,000 - 1 = 29,999"


# The least set, and no more.


def test_what_is_enough_is_left_alone() -> None:
    made = plan(Goal(role=Role.SERVER, connections=1_000), host("stock_distribution"))
    assert made.reached
    assert made.changes == ()
    assert made.findings == ()


def test_own_addresses_come_before_a_wider_range() -> None:
    stock = host("stock_distribution")
    further = tuple(stock.addresses[-1].model_copy(update={"address": f"192.0.2.{last}"}) for last in range(21, 24))
    rich = stock.model_copy(update={"addresses": (*stock.addresses, *further)})
    made = plan(Goal(role=Role.CLIENT_ONE, connections=100_000, descriptors_per_connection=0), rich, Means(to=VIP))
    assert made.reached
    assert [change.kind for change in made.changes] == [ChangeKind.PROGRAM]
    assert made.sources == "192.0.2.20-192.0.2.23"


def test_a_wider_range_comes_before_further_addresses() -> None:
    goal = Goal(role=Role.CLIENT_ONE, connections=60_000, descriptors_per_connection=0)
    made = plan(goal, host("stock_distribution"), Means(to=VIP, sources=pool("10.9.0.0/24")))
    assert turned(made) == {"net.ipv4.ip_local_port_range": "1024 65535"}


def test_addresses_that_are_local_already_need_no_route() -> None:
    stock = host("stock_distribution")
    prefix = stock.addresses[-1].model_copy(
        update={"interface": "lo", "address": "10.9.0.0", "prefix_length": 24, "any_ip": True}
    )
    ready = stock.model_copy(update={"addresses": (*stock.addresses, prefix)})
    goal = Goal(role=Role.CLIENT_ONE, connections=2_000_000)
    made = plan(goal, ready, Means(to=VIP, sources=pool("10.9.0.0/24")))
    assert made.reached
    assert [change.kind for change in made.changes] == [ChangeKind.UNIT, ChangeKind.PROGRAM]
    assert pool(made.sources).size == -(-2_000_000 // 28_232)


def test_a_tracked_client_gets_a_larger_table_and_a_way_without() -> None:
    stock = host("stock_distribution")
    tracked = stock.model_copy(
        update={"conntrack": Conntrack(loaded=True, active=True, count=10, maximum=262_144, buckets=65_536)}
    )
    goal = Goal(role=Role.CLIENT_MANY, connections=1_000_000, destinations=1_000, descriptors_per_connection=0)
    made = plan(goal, tracked)
    assert turned(made) == {
        "net.netfilter.nf_conntrack_max": "1100010",
        "net.netfilter.nf_conntrack_buckets": "275456",
    }
    files = written_files(made)
    assert "notrack" in files["fourtuple.nft"]
    assert "nf_conntrack" in files["etc/modules-load.d/60-fourtuple.conf"]


def test_notes_for_containers_know_whose_a_setting_is() -> None:
    queued = plan(Goal(role=Role.SERVER, connections=300_000, bytes_queued=16_384), host("stock_distribution"))
    pod, _, node = written_files(queued)["container.md"].partition("On the node, not in the container:")
    assert "net.ipv4.tcp_mem" in node
    assert "net.ipv4.tcp_mem" not in pod
    means = Means(to=(Endpoint.parse("[2001:db8::5]:443"),), sources=pool("2001:db8:1::/64"))
    client = plan(Goal(role=Role.CLIENT_ONE, connections=1_000_000), host("stock_distribution"), means)
    pod, _, node = written_files(client)["container.md"].partition("On the node, not in the container:")
    assert '{name: net.ipv6.ip_nonlocal_bind, value: "1"}' in pod
    assert not node


def test_a_proxy_leaves_both_its_sides_untracked() -> None:
    means = Means(to=(Endpoint.parse("10.1.0.1:8080"),), sources=pool("10.2.0.0/24"))
    made = plan(Goal(role=Role.PROXY, connections=300_000), host("stock_distribution"), means)
    tracking = host("stock_distribution").model_copy(
        update={"conntrack": Conntrack(loaded=True, active=True, count=0, maximum=262_144, buckets=262_144)}
    )
    assert "fourtuple.nft" not in written_files(made)
    rules = written_files(plan(Goal(role=Role.PROXY, connections=300_000), tracking, means))["fourtuple.nft"]
    assert rules.count("notrack") == 4
    assert all(text in rules for text in ("dport PORT", "sport PORT", "dport { 8080 }", "sport { 8080 }"))


def test_a_nat_box_has_to_track() -> None:
    box = host("nat_box")
    many = box.source_nat[0].model_copy(update={"addresses": 64})
    made = plan(Goal(role=Role.NAT, connections=440_000), box.model_copy(update={"source_nat": (many,)}))
    assert set(turned(made)) == {"net.netfilter.nf_conntrack_max"}
    assert "fourtuple.nft" not in written_files(made)
    idle = plan(Goal(role=Role.NAT, connections=10_000), host("exhausted_client"))
    assert idle.memory_bytes >= 10_000 * 256


def test_a_container_asks_the_host_for_what_is_not_its_own() -> None:
    box = host("container")
    little = box.model_copy(update={"sysctl": box.sysctl | {"fs.epoll.max_user_watches": "1000"}})
    made = plan(Goal(role=Role.SERVER, connections=5_000), little)
    (change,) = made.changes
    assert (change.knob, change.kind) == ("fs.epoll.max_user_watches", ChangeKind.ELSEWHERE)


# What cannot be reached.


def test_the_nearest_is_planned_and_named() -> None:
    made = plan(Goal(role=Role.SERVER, connections=6_000_000), host("stock_distribution"))
    assert not made.reached
    assert made.total == made.share.connections == 4_893_000
    assert made.stopped_by.startswith("kernel-memory (C1): (80 % of 24,159,191,040 B available)")
    assert turned(made)["LimitNOFILE"] == str(4_893_000 + 3 + 64)
    assert any("2 machines of this shape would reach it" in note for note in made.notes)


def test_too_few_addresses_to_take() -> None:
    goal = Goal(role=Role.CLIENT_ONE, connections=2_000_000)
    made = plan(goal, host("stock_distribution"), Means(to=VIP, sources=pool("10.9.0.0/29")))
    assert not made.reached
    assert made.total == 8 * 64_512
    assert made.stopped_by.startswith("ephemeral-ports (A2)")


def test_half_of_the_memory_bounds_queued_bytes() -> None:
    goal = Goal(role=Role.SERVER, connections=100_000, bytes_queued=1 << 20)
    made = plan(goal, host("stock_distribution"))
    assert not made.reached
    assert made.total == 24 * 2**30 // 2 // (5 << 18) == 9_830
    assert made.stopped_by.startswith("tcp-buffer-memory (C3)")


def test_a_rate_that_cannot_be_had_does_not_lower_the_number() -> None:
    old = host("old_kernel")
    still = old.model_copy(update={"sysctl": old.sysctl | {"net.ipv4.tcp_timestamps": "0"}})
    goal = Goal(role=Role.CLIENT_ONE, connections=1_000, rate_per_s=100_000)
    made = plan(goal, still, Means(to=VIP, sources=pool("10.9.0.0/31")))
    assert not made.reached
    assert made.total == 1_000
    assert made.stopped_by.startswith("time-wait (A12)")


def test_threads_give_way_to_events() -> None:
    made = plan(Goal(role=Role.SERVER, connections=100_000, threads_per_connection=1), host("old_kernel"))
    assert made.reached
    assert turned(made)["threads"] == "an event loop"


def test_loopback_is_a_source_towards_loopback() -> None:
    here = (Endpoint.parse("127.0.0.1:443"),)
    made = plan(
        Goal(role=Role.CLIENT_ONE, connections=100_000),
        host("stock_distribution"),
        Means(to=here, sources=pool("127.0.0.0/28")),
    )
    assert made.reached


def test_a_rate_says_what_no_limit_says() -> None:
    made = plan(Goal(role=Role.SERVER, connections=1_000, rate_per_s=131_070), host("stock_distribution"))
    assert any("the longest queue there is covers 500 ms" in note for note in made.notes)


# Several machines.


def test_each_machine_has_addresses_of_its_own() -> None:
    goal = Goal(role=Role.CLIENT_ONE, connections=8_000_000)
    everything = pool("10.9.0.0/24")
    taken = []
    for machine in range(1, 5):
        made = plan(goal, host("stock_distribution"), Means(to=VIP, sources=everything, machines=4, machine=machine))
        assert made.reached
        taken.append(pool(made.sources))
    assert [one.size for one in taken] == [32] * 4
    assert taken[0].union(taken[1]).union(taken[2]).union(taken[3]).size == 4 * 32


@pytest.mark.parametrize(
    ("goal", "means"),
    [
        ({"connections": 0}, {}),
        ({"connections": None}, {}),
        ({"connections": 5}, {"machines": 6}),
        ({"connections": 5, "role": Role.NAT}, {"sources": pool("10.0.0.1,10.0.0.9")}),
        ({"connections": 5}, {"to": VIP}),
        ({"connections": 5}, {"sources": pool("10.0.0.1")}),
        ({"connections": 500, "role": Role.CLIENT_ONE}, {"sources": pool("10.0.0.1"), "machines": 2}),
        ({"connections": 10**9, "role": Role.CLIENT_ONE}, {"sources": pool("10.0.0.1-10.0.0.9"), "machines": None}),
        ({"connections": 10**19}, {"machines": None}),
        ({"connections": 5_000_000}, {"machines": None, "machine": 3}),
    ],
)
def test_goals_that_contradict_themselves(goal: dict[str, Any], means: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match="--"):
        plan(Goal(**{"role": Role.SERVER} | goal), host("stock_distribution"), Means(**means))


@pytest.mark.parametrize(
    "means",
    [
        {"machines": 0},
        {"machines": 10**9},
        {"machine": 0},
        {"machine": 3, "machines": 2},
        {"to": VIP + VIP},
        {"to": VIP, "sources": pool("2001:db8::/64")},
        {"to": (*VIP, Endpoint.parse("[2001:db8::1]:443"))},
        {"to": (Endpoint.parse("0.0.0.0:443"),)},
        {"to": (Endpoint.parse("224.0.0.1:443"),)},
        {"to": VIP, "sources": pool("203.0.113.0/24")},
        {"to": VIP, "sources": pool("127.0.0.0/24")},
        {"sources": pool("0.0.0.0/0")},
        {"sources": pool("224.0.0.0/24")},
        {"sources": pool("::1")},
    ],
)
def test_means_that_contradict_themselves(means: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match="--"):
        Means(**means)


# Whatever is asked of whatever host.

goals = st.builds(
    Goal,
    role=st.sampled_from(Role),
    connections=st.integers(1, 10**8),
    destinations=st.sampled_from((1, 3, 1_000)),
    bytes_queued=st.sampled_from((0, 1, 16_384)),
    user_bytes=st.sampled_from((0, 4_000)),
    descriptors_per_connection=st.sampled_from((0, 1)),
    threads_per_connection=st.sampled_from((0, 1)),
    uses_epoll=st.booleans(),
    ipv6=st.booleans(),
    accepts=st.booleans(),
    backlog=st.sampled_from((None, 100)),
    binds_first=st.booleans(),
    rate_per_s=st.sampled_from((0, 100, 50_000)),
)


@settings(max_examples=200, deadline=None)
@given(goal=goals, name=st.sampled_from(NAMES), machines=st.sampled_from((1, None)))
def test_every_plan_keeps_its_promises(goal: Goal, name: str, machines: int | None) -> None:
    made = plan(goal, host(name), Means(machines=machines))
    assert Plan.model_validate_json(made.model_dump_json()) == made
    assert made.total <= (goal.connections or 0)
    assert made.reached == (not made.stopped_by)
    if made.reached:
        assert made.total == goal.connections
        assert made.ceiling >= (made.share.connections or 0)
    for change in made.changes:
        assert change.arithmetic
        assert change.old != change.new
        assert change.kind is not ChangeKind.SYSCTL or change.knob in TUNABLE
    knobs = [(change.kind, change.knob) for change in made.changes]
    assert len(set(knobs)) == len(knobs)
    for path, text in persistent_files(made, "nginx"):
        assert FILES.fullmatch(path)
        assert text.endswith("\n")


@settings(max_examples=60, deadline=None)
@given(goal=goals, name=st.sampled_from(NAMES))
def test_the_doctor_confirms_what_was_planned(goal: Goal, name: str) -> None:
    """The changes of a plan, made in the facts by hand, give the ceiling that it promises, or more."""
    found = host(name)
    made = plan(goal, found)
    sysctl = {one.knob: one.new for one in made.changes if one.kind in (ChangeKind.SYSCTL, ChangeKind.ELSEWHERE)}
    update: dict[str, Any] = {"sysctl": found.sysctl | sysctl}
    for change in made.changes:
        if change.knob == "LimitNOFILE":
            limit = RLimit(soft=int(change.new), hard=int(change.new))
            process = found.process.model_copy(update={"rlimits": found.process.rlimits | {"NOFILE": limit}})
            update["process"] = process
        if change.knob == "net.netfilter.nf_conntrack_max":
            update["conntrack"] = found.conntrack.model_copy(update={"loaded": True, "maximum": int(change.new)})
        if change.knob == "MemoryMax" and found.cgroup is not None:
            update["cgroup"] = found.cgroup.model_copy(update={"memory_max_bytes": int(change.new)})
    role = diagnose(found.model_copy(update=update), [made.share]).roles[0]
    # Addresses and rules are not facts that this test makes.
    others = [one.connections for one in role.bounds if one.limit not in ("A17", "G4")]
    assert not others or min(others) >= (made.share.connections or 0)


# The command.


def test_the_command_prints_what_tune_takes(capsys: pytest.CaptureFixture[str]) -> None:
    stock = str(HOSTS / "stock_distribution.json")
    options = ["--role", "client", "--to", "203.0.113.5:443", "--from", "10.9.0.0/24", "--host", stock]
    assert main(["plan", "--connections", "2M", *options, "--json"]) == Exit.HEALTHY
    made = Plan.model_validate(json.loads(capsys.readouterr().out))
    assert made.sources == "10.9.0.0-10.9.0.31"
    assert main(["plan", "--connections", "2M", *options]) == Exit.HEALTHY
    shown = capsys.readouterr().out
    assert "REACHED" in shown
    assert "1024 65535" in shown
    assert main(["plan", "--connections", "9M", "--host", stock]) == Exit.WARNING
    assert "NOT REACHED" in capsys.readouterr().out


def test_the_command_writes_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = str(HOSTS / "stock_distribution.json")
    options = ["--role", "client", "--to", "203.0.113.5:443", "--from", "10.9.0.0/24", "--host", stock]
    folder = tmp_path / "files"
    assert main(["plan", "--connections", "2M", *options, "--write", str(folder), "--service", "app"]) == Exit.HEALTHY
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert set(found) == {
        "etc/sysctl.d/60-fourtuple.conf",
        "etc/systemd/system/app.service.d/60-fourtuple.conf",
        "etc/systemd/system/fourtuple-addresses.service",
        "etc/systemd/network/60-fourtuple.network",
        "addresses.sh",
        "container.md",
        "plan.json",
    }
    assert "net.ipv4.ip_local_port_range = 1024 65535\n" in found["etc/sysctl.d/60-fourtuple.conf"]
    assert "LimitNOFILE=2000067\n" in found["etc/systemd/system/app.service.d/60-fourtuple.conf"]
    assert "ip route replace local 10.9.0.0/27 dev lo\n" in found["addresses.sh"]
    assert "Destination=10.9.0.0/27\nType=local\n" in found["etc/systemd/network/60-fourtuple.network"]
    assert Plan.model_validate_json(found["plan.json"]).reached


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--connections", "many"],
        ["--connections", "2M", "--role", "router"],
        ["--connections", "2M", "--role", "server", "--to", "203.0.113.5:443"],
        ["--connections", "2M", "--role", "server", "--destinations", "5"],
        ["--connections", "2M", "--role", "nat", "--io-uring"],
        ["--connections", "2M", "--role", "nat", "--user-bytes", "500"],
        ["--connections", "2M", "--role", "client", "--ipv6", "--to", "203.0.113.5:443"],
        ["--connections", "2M", "--role", "client", "--to", "203.0.113.5:443", "--from", "0.0.0.0/0"],
        ["--connections", "2M", "--role", "client", "--to", "203.0.113.5"],
        ["--connections", "2M", "--role", "client", "--to", "203.0.113.5:443,,"],
        ["--connections", "2M", "--role", "client", "--to", "203.0.113.5:443", "--destinations", "5"],
        ["--connections", "2M", "--role", "client", "--from", "10.0.0.9-10.0.0.1"],
        ["--connections", "2M", "--role", "client", "--from", ""],
        ["--connections", "2M", "--machines", "-1"],
        ["--connections", "2M", "--machines", "few"],
        ["--connections", "2M", "--service", "a/b"],
        ["--connections", "2M", "--write", "/proc/self/nowhere"],
        ["--connections", "2M", "--host", "/nonexistent"],
    ],
)
def test_wrong_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    stock = [] if "--host" in arguments else ["--host", str(HOSTS / "stock_distribution.json")]
    assert main(["plan", *arguments, *stock]) == Exit.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fourtuple: ")
