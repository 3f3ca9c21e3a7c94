"""The diagnosis: its arithmetic against the catalogue's worked examples, its severities, and no host is too strange."""

from __future__ import annotations

import inspect
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourtuple import limits
from fourtuple.doctor import Binding, Diagnosis, Health, RoleDiagnosis, Severity, default_goals, diagnose
from fourtuple.facts import (
    Address,
    Cgroup,
    Conntrack,
    Flow,
    Goal,
    Host,
    IoUring,
    Isolation,
    Kernel,
    Listener,
    Machine,
    Process,
    RLimit,
    Role,
    Sockets,
    SourceNat,
)
from fourtuple.limits import _terms, myths
from fourtuple.tuples import Endpoint

GIBIBYTE = 2**30
SYSCTL = {
    "net.ipv4.ip_local_port_range": "32768 60999",
    "net.ipv4.ip_local_reserved_ports": "",
    "net.ipv4.ip_unprivileged_port_start": "1024",
    "net.ipv4.tcp_tw_reuse": "2",
    "net.ipv4.tcp_timestamps": "1",
    "net.ipv4.tcp_mem": "287898 383867 575796",
    "net.ipv4.tcp_max_orphans": "131072",
    "net.ipv4.tcp_max_tw_buckets": "131072",
    "net.ipv4.tcp_ehash_entries": "262144",
    "net.ipv4.tcp_syncookies": "1",
    "net.ipv4.neigh.default.gc_thresh3": "1024",
    "net.core.netdev_max_backlog": "1000",
    "net.core.somaxconn": "4096",
    "fs.nr_open": "1048576",
    "fs.file-max": "9223372036854775807",
    "fs.file-nr": "1000 0 9223372036854775807",
    "fs.epoll.max_user_watches": "5491511",
}


def host(sysctl: dict[str, str] | None = None, **changes: object) -> Host:
    """The stock distribution host of the catalogue's ladder: 24 GiB, systemd's limits, some rule that tracks."""
    parts: dict[str, Any] = {
        "label": "stock",
        "kernel": Kernel(release="6.18.44", version=(6, 18, 44), architecture="x86_64"),
        "machine": Machine(cpus=2, memory_total_bytes=24 * GIBIBYTE, memory_available_bytes=24 * GIBIBYTE),
        "process": Process(pid=1, rlimits={"NOFILE": RLimit(soft=1_024, hard=524_288)}, open_descriptors=0),
        "cgroup": Cgroup(version=2),
        "conntrack": Conntrack(loaded=True, active=True, count=0, maximum=262_144, buckets=262_144),
        "sysctl": SYSCTL | (sysctl or {}),
    }
    return Host(**(parts | changes))


def roomy(sysctl: dict[str, str] | None = None, **changes: object) -> Host:
    """A host on which ports bind first."""
    unlimited = Process(pid=1, rlimits={"NOFILE": RLimit(soft=2**30, hard=2**30)}, open_descriptors=0)
    memory = Machine(cpus=2, memory_total_bytes=2**50, memory_available_bytes=2**50)
    facts: dict[str, Any] = {"process": unlimited, "machine": memory, "conntrack": Conntrack(loaded=False)}
    wide = {"fs.nr_open": str(2**31), "fs.epoll.max_user_watches": str(2**40)}
    return host(wide | (sysctl or {}), **(facts | changes))


def role(of: Host, role: Role, **goal: object) -> RoleDiagnosis:
    return diagnose(of, [Goal.model_validate({"role": role, **goal})]).roles[0]


def bound(found: RoleDiagnosis, name: str) -> int:
    return next(one.connections for one in (*found.bounds, *found.rates, *found.slowdowns) if one.name == name)


def names(found: RoleDiagnosis) -> list[str]:
    return [one.name for one in found.bounds]


def listening(*endpoints: str) -> tuple[Listener, ...]:
    return tuple(Listener(local=Endpoint.parse(one), queue=0, backlog=128) for one in endpoints)


class TestBindBeforeConnect:
    """exclusive-bind (A7): a port is taken for the address that it is bound to, and for no other."""

    @staticmethod
    def found(sources: int, *endpoints: str, poisoned: tuple[tuple[int, int], ...] = (), **goal: object) -> Binding:
        machine = roomy(
            {"net.ipv4.ip_local_port_range": "40000 40049"},
            listeners=listening(*endpoints),
            poisoned_ports=poisoned,
        )
        asked = role(machine, Role.CLIENT_MANY, destinations=9, sources=sources, binds_first=True, **goal)
        return next(one for one in asked.bounds if one.name == "exclusive-bind")

    @pytest.mark.parametrize(
        ("sources", "endpoints", "certain", "may_reach"),
        [
            (1, ("127.0.0.1:40007", "[::1]:40008"), 50, None),
            (1, ("0.0.0.0:40007", "[::]:40008"), 48, None),
            (1, ("192.0.2.1:40007",), 49, 50),
            (3, ("192.0.2.1:40007", "192.0.2.2:40007", "192.0.2.1:40008"), 147, 150),
            (1, ("192.0.2.1:40007", "192.0.2.2:40007"), 49, 50),
            (1, ("[::ffff:192.0.2.1]:40007",), 49, 50),
            (1, ("192.0.2.1:40007", "0.0.0.0:40007"), 49, None),
            (1, ("192.0.2.1:80",), 50, None),
        ],
    )
    def test_listeners(self, sources: int, endpoints: tuple[str, ...], certain: int, may_reach: int | None) -> None:
        bound = self.found(sources, *endpoints)
        assert (bound.connections, bound.may_reach) == (certain, may_reach)

    def test_other_families_do_not_count(self) -> None:
        assert self.found(1, "0.0.0.0:40007", "192.0.2.1:40008", ipv6=True).connections == 50
        assert self.found(1, "[::]:40007", "[2001:db8::1]:40008", ipv6=True).connections == 48

    def test_a_port_that_somebody_bound_unseen_may_be_had(self) -> None:
        bound = self.found(2, poisoned=((40000, 40004),))
        assert (bound.connections, bound.may_reach) == (90, 100)
        assert bound.arithmetic.endswith("= 90 to 100 to all destinations together")


class TestOddRanges:
    """The search rounds an odd number of ports down to even, and passes over the first or the last (A2)."""

    @pytest.mark.parametrize(
        ("ports", "reserved", "certain", "may_reach"),
        [
            ("40000 40100", "", 100, 101),
            ("40000 40100", "40000", 99, 100),
            ("40000 40100", "40000,40100", 99, None),
            ("40000 40099", "", 100, None),
        ],
    )
    def test_what_is_left_to_chance(self, ports: str, reserved: str, certain: int, may_reach: int | None) -> None:
        machine = roomy({"net.ipv4.ip_local_port_range": ports, "net.ipv4.ip_local_reserved_ports": reserved})
        first = role(machine, Role.CLIENT_ONE).bounds[0]
        assert (first.name, first.connections, first.may_reach) == ("ephemeral-ports", certain, may_reach)


class TestTheWorkedExample:
    """Two million connections to one destination (catalogue section 1)."""

    @pytest.mark.parametrize(("ports", "addresses", "at_ninety"), [("32768 60999", 71, 79), ("1024 65535", 32, 35)])
    def test_source_addresses(self, ports: str, addresses: int, at_ninety: int) -> None:
        machine = roomy({"net.ipv4.ip_local_port_range": ports})
        enough = role(machine, Role.CLIENT_ONE, sources=addresses, connections=2_000_000)
        short = role(machine, Role.CLIENT_ONE, sources=addresses - 1, connections=2_000_000)
        assert bound(enough, "ephemeral-ports") >= 2_000_000 > bound(short, "ephemeral-ports")
        assert bound(role(machine, Role.CLIENT_ONE, sources=at_ninety), "ephemeral-ports") * 9 // 10 >= 2_000_000
        assert bound(role(machine, Role.CLIENT_ONE, sources=at_ninety - 1), "ephemeral-ports") * 9 // 10 < 2_000_000

    def test_kernel_memory_is_7_8_gb(self) -> None:
        machine = host(machine=Machine(cpus=2, memory_available_bytes=7_900_000_000 * 10 // 8))
        assert bound(role(machine, Role.CLIENT_ONE), "kernel-memory") == 2_000_000


class TestTheLadder:
    """The stock host of 24 GiB, lowest first (catalogue section 1)."""

    def test_client_to_one_destination(self) -> None:
        found = role(host(), Role.CLIENT_ONE)
        ladder = [(one.name, one.connections) for one in found.bounds if one.name != "four-tuple"]
        assert ladder[:5] == [
            ("descriptors-soft", 1_024),
            ("ephemeral-ports", 28_232),
            ("conntrack-table", 262_144),
            ("descriptors-hard", 524_288),
            ("descriptors-ceiling", 1_048_576),
        ]
        assert [name for name, _ in ladder[5:7]] == ["kernel-memory", "epoll-watches"]
        assert bound(found, "kernel-memory") == pytest.approx(5_200_000, rel=0.01)
        assert bound(found, "epoll-watches") == pytest.approx(5_500_000, rel=0.01)
        assert bound(found, "four-tuple") == 65_535

    def test_server(self) -> None:
        found = role(host(), Role.SERVER)
        assert [(one.name, one.connections) for one in found.bounds][:4] == [
            ("descriptors-soft", 1_024),
            ("conntrack-table", 262_144),
            ("descriptors-hard", 524_288),
            ("descriptors-ceiling", 1_048_576),
        ]
        assert names(found)[4:6] == ["kernel-memory", "epoll-watches"]
        assert bound(found, "four-tuple") == 2**48
        assert "ephemeral-ports" not in names(found)

    def test_the_order_is_ascending_and_the_first_is_the_ceiling(self) -> None:
        for found in diagnose(host()).roles:
            numbers = [one.connections for one in found.bounds]
            assert numbers == sorted(numbers)
            assert found.ceiling == numbers[0]


class TestThePortTerm:
    def test_the_arithmetic_is_written_with_this_hosts_numbers(self) -> None:
        machine = roomy(poisoned_ports=((40_000, 40_002),))
        found = role(machine, Role.CLIENT_ONE)
        assert found.ceiling == 28_229
        first = found.bounds[0]
        assert first.arithmetic == (
            "60999 - 32768 + 1 - 0 reserved - 3 poisoned = 28,229 ports x 1 source = 28,229"
        )  # fmt: skip
        assert (first.limit, first.command) == ("A2", 'sysctl -w net.ipv4.ip_local_port_range="1024 65535"')

    def test_a_range_that_is_widest_already_is_not_to_be_widened(self) -> None:
        found = role(roomy({"net.ipv4.ip_local_port_range": "1024 65535"}), Role.CLIENT_ONE)
        assert found.bounds[0].name == "ephemeral-ports"
        assert found.bounds[0].command == "ip route add local 10.77.0.0/16 dev lo"

    @pytest.mark.parametrize(
        ("ports", "certain"),
        [("40000 40099", 100), ("40000 40100", 100), ("40000 40000", 1), ("1 65535", 65_534), ("0 65535", 65_534)],
    )
    def test_an_odd_range_is_certain_of_one_less(self, ports: str, certain: int) -> None:
        assert (
            bound(role(roomy({"net.ipv4.ip_local_port_range": ports}), Role.CLIENT_ONE), "ephemeral-ports") == certain
        )

    @pytest.mark.parametrize(("searches_all", "certain"), [(True, 101), (False, 100)])
    def test_a_search_of_every_port_misses_none_where_the_kernel_does_it(
        self, searches_all: bool, certain: int
    ) -> None:
        machine = roomy(
            {"net.ipv4.ip_local_port_range": "40000 40100"}, features={"local_port_range_searches_all": searches_all}
        )
        found = role(machine, Role.CLIENT_ONE, searches_all_ports=True)
        assert bound(found, "ephemeral-ports") == certain
        assert ("port-parity" in [one.name for one in found.not_applicable]) is searches_all
        assert bound(role(machine, Role.CLIENT_ONE), "ephemeral-ports") == 100

    def test_reserved_poisoned_and_listening_ports_count_once(self) -> None:
        machine = roomy(
            {"net.ipv4.ip_local_port_range": "40000 40099", "net.ipv4.ip_local_reserved_ports": "40000-40009,80,50000"},
            poisoned_ports=((40_005, 40_014), (60_000, 60_001)),
            listeners=(
                Listener(local=Endpoint.parse("127.0.0.1:40014"), queue=0, backlog=5),
                Listener(local=Endpoint.parse("127.0.0.1:40050"), queue=0, backlog=5),
            ),
        )
        found = role(machine, Role.CLIENT_ONE)
        assert found.ceiling == 84
        assert "10 reserved - 6 poisoned" in found.bounds[0].arithmetic

    def test_sources_and_destinations_multiply(self) -> None:
        machine = roomy()
        assert bound(role(machine, Role.CLIENT_MANY, sources=3, destinations=7), "ephemeral-ports") == 28_232 * 21
        assert bound(role(machine, Role.CLIENT_ONE, sources=3, destinations=7), "ephemeral-ports") == 28_232 * 3
        assert bound(role(machine, Role.PROXY, sources=3, destinations=7), "ephemeral-ports") == 28_232 * 21

    def test_binding_first_takes_the_destinations_away(self) -> None:
        found = role(roomy(), Role.CLIENT_MANY, sources=2, destinations=1_000, binds_first=True)
        assert (found.bounds[0].name, found.ceiling) == ("exclusive-bind", 28_232 * 2)
        assert "ephemeral-ports" in [one.name for one in found.not_applicable]

    def test_addresses_that_the_host_lacks_bind(self) -> None:
        addresses = tuple(Address(interface="eth0", address=f"10.0.0.{n}", prefix_length=24) for n in (1, 2))
        loopback = Address(interface="lo", address="127.0.0.1", prefix_length=8)
        found = role(roomy(addresses=(loopback, *addresses)), Role.CLIENT_ONE, sources=5)
        assert (found.bounds[0].name, found.ceiling) == ("source-addresses", 2 * 28_232)
        prefix = Address(interface="lo", address="10.77.0.0", prefix_length=16, any_ip=True)
        assert role(roomy(addresses=(*addresses, prefix)), Role.CLIENT_ONE, sources=5).ceiling == 5 * 28_232

    @pytest.mark.parametrize(
        ("reuse", "timestamps", "source", "used"),
        [
            ("0", "1", "10.0.0.1", [28_000]),
            ("1", "1", "10.0.0.1", []),
            ("1", "0", "10.0.0.1", [28_000]),
            ("2", "1", "10.0.0.1", [28_000]),
            ("2", "1", "127.0.0.1", []),
        ],
    )
    def test_time_wait_that_gives_way_uses_no_port(
        self, reuse: str, timestamps: str, source: str, used: list[int]
    ) -> None:
        there = Endpoint.parse("10.9.9.9:443")
        flows = (Flow(source=source, destination=there, connections=28_000, time_wait=27_000),)
        settings_of = {"net.ipv4.tcp_tw_reuse": reuse, "net.ipv4.tcp_timestamps": timestamps}
        found = diagnose(roomy(settings_of, flows=flows), [])
        assert [one.used for one in found.pressures if one.name == "ephemeral-ports"] == used

    @pytest.mark.parametrize(("ports", "rate"), [("32768 60999", 470), ("1024 65535", 1_075)])
    def test_time_wait_bounds_the_rate(self, ports: str, rate: int) -> None:
        assert bound(role(host({"net.ipv4.ip_local_port_range": ports}), Role.CLIENT_ONE), "time-wait") == rate

    def test_time_wait_reuse_lifts_it_where_timestamps_are_on(self) -> None:
        machine = host({"net.ipv4.tcp_tw_reuse": "1"})
        assert bound(role(machine, Role.CLIENT_ONE), "time-wait") == 28_232
        assert (
            bound(
                role(host({"net.ipv4.tcp_tw_reuse": "1", "net.ipv4.tcp_timestamps": "0"}), Role.CLIENT_ONE), "time-wait"
            )
            == 470
        )

    def test_half_of_the_range_is_cheap(self) -> None:
        found = role(host(), Role.CLIENT_ONE, sources=2)
        assert next(one for one in found.slowdowns if one.name == "port-parity").connections == 28_232


class TestResources:
    def test_a_proxy_counts_twice(self) -> None:
        one, two = role(host(), Role.CLIENT_ONE), role(host(), Role.PROXY)
        for name in ("descriptors-soft", "descriptors-hard", "conntrack-table", "kernel-memory", "epoll-watches"):
            assert bound(two, name) == bound(one, name) // 2

    def test_open_descriptors_are_subtracted(self) -> None:
        process = Process(pid=1, rlimits={"NOFILE": RLimit(soft=100, hard=200)}, open_descriptors=30)
        found = role(host(process=process), Role.SERVER)
        assert (bound(found, "descriptors-soft"), bound(found, "descriptors-hard")) == (70, 170)
        over = Process(pid=1, rlimits={"NOFILE": RLimit(soft=100, hard=200)}, open_descriptors=300)
        assert role(host(process=over), Role.SERVER).ceiling == 0

    def test_a_soft_limit_as_high_as_the_hard_one_is_not_to_be_raised_to_it(self) -> None:
        process = Process(pid=1, rlimits={"NOFILE": RLimit(soft=20_000, hard=20_000)}, open_descriptors=5)
        found = role(host(process=process), Role.SERVER)
        assert (found.bounds[0].name, found.ceiling) == ("descriptors-soft", 19_995)
        assert "LimitNOFILE" in found.bounds[0].command
        assert role(host(), Role.SERVER).bounds[0].command == "ulimit -Sn hard"

    def test_direct_descriptors_pass_the_descriptor_limits(self) -> None:
        able = IoUring(available=True, direct_descriptors=True)
        found = role(host(io_uring=able), Role.SERVER, descriptors_per_connection=0)
        assert not {"descriptors-soft", "descriptors-hard", "descriptors-ceiling"} & set(names(found))
        process = Process(pid=1, rlimits={"NOFILE": RLimit(soft=64, hard=64)}, open_descriptors=7)
        few = role(host(io_uring=able, process=process), Role.CLIENT_ONE, descriptors_per_connection=0)
        assert (few.bounds[0].name, few.ceiling) == ("direct-descriptors", (64 - 7) * 64)
        assert (
            bound(
                role(host(io_uring=able, process=process), Role.PROXY, descriptors_per_connection=0),
                "direct-descriptors",
            )
            == 57 * 32
        )
        unlimited = Process(pid=1, rlimits={"NOFILE": RLimit(soft=None, hard=None)})
        found = role(host(io_uring=able, process=unlimited), Role.SERVER, descriptors_per_connection=0)
        assert "direct-descriptors" in [one.name for one in found.not_applicable]
        refused = role(host(), Role.SERVER, descriptors_per_connection=0)
        assert (refused.bounds[0].name, refused.ceiling) == ("direct-descriptors", 0)

    def test_files_bind_the_unprivileged_only(self) -> None:
        few = {"fs.file-max": "1500", "fs.file-nr": "1000 0 1500"}
        assert role(host(few), Role.SERVER).bounds[0].name == "files-on-host"
        admin = Process(pid=1, rlimits={"NOFILE": RLimit(soft=1_024, hard=4_096)}, capabilities=("CAP_SYS_ADMIN",))
        assert "files-on-host" not in names(role(host(few, process=admin), Role.SERVER))

    def test_queued_bytes_bring_tcp_mem_in(self) -> None:
        assert "tcp-buffer-memory" not in names(role(host(), Role.SERVER))
        found = role(host(), Role.SERVER, bytes_queued=16_384)
        assert bound(found, "tcp-buffer-memory") == pytest.approx(117_000, rel=0.02)
        assert bound(found, "kernel-memory") < bound(role(host(), Role.SERVER), "kernel-memory")

    def test_ipv6_and_user_memory_cost(self) -> None:
        plain = bound(role(host(), Role.SERVER), "kernel-memory")
        assert bound(role(host(), Role.SERVER, ipv6=True), "kernel-memory") == math.floor(24 * GIBIBYTE * 0.8 / 4_080)
        assert bound(role(host(), Role.SERVER, user_bytes=3_950), "kernel-memory") == plain // 2

    def test_the_memory_cgroup_counts_what_cannot_be_reclaimed(self) -> None:
        group = Cgroup(
            version=2,
            memory_max_bytes=10_000_000,
            memory_current_bytes=8_100_000,
            memory_reclaimable_bytes=2_050_000,
        )
        assert bound(role(host(cgroup=group), Role.SERVER), "memory-cgroup") == 1_000

    def test_a_server_that_never_accepts_has_its_queue(self) -> None:
        assert role(host(), Role.SERVER, accepts=False, backlog=10).ceiling == 11
        assert bound(role(host(), Role.SERVER, accepts=False, backlog=100_000), "accept-queue") == 4_097
        assert "accept-queue" not in names(role(host(), Role.SERVER, backlog=10))

    def test_a_shared_hash_reads_negative(self) -> None:
        for text in ("262144", "-262144"):
            found = role(host({"net.ipv4.tcp_ehash_entries": text}), Role.PROXY)
            assert bound(found, "established-hash") == 131_072

    def test_threads_bind_only_who_has_them(self) -> None:
        of_user = Process(
            effective_uid=1_000,
            pid=1,
            rlimits={"NOFILE": RLimit(soft=9_999, hard=9_999), "NPROC": RLimit(soft=500, hard=500)},
        )
        found = role(host({"vm.max_map_count": "65530"}, process=of_user), Role.SERVER, threads_per_connection=1)
        assert (found.bounds[0].name, found.ceiling) == ("user-processes", 500)
        assert bound(found, "memory-maps") == 32_765
        assert "user-processes" not in names(role(host(process=of_user), Role.SERVER))
        root = host(process=of_user.model_copy(update={"effective_uid": 0}))
        assert "user-processes" not in names(role(root, Role.SERVER, threads_per_connection=1))


class TestNat:
    def test_each_address_has_64_512_ports_per_destination(self) -> None:
        rule = SourceNat(table="nat", rule="masquerade", addresses=0)
        pool = SourceNat(table="nat", rule="snat", addresses=3)
        assert role(host(source_nat=(rule,)), Role.NAT).ceiling == 64_512
        assert bound(role(host(source_nat=(rule, pool)), Role.NAT, destinations=2), "snat-ports") == 64_512 * 8

    def test_a_rule_may_name_its_ports(self) -> None:
        rule = SourceNat(table="nat", rule="snat", addresses=2, ports=(2_000, 2_999))
        assert role(host(source_nat=(rule,)), Role.NAT).ceiling == 2_000

    def test_its_own_sockets_and_ports_do_not_bind(self) -> None:
        assert set(names(role(host(), Role.NAT))) == {"snat-ports", "conntrack-table"}

    def test_the_table_is_that_of_the_module_once_it_is_loaded(self) -> None:
        found = role(host(conntrack=Conntrack(loaded=False)), Role.NAT)
        assert bound(found, "conntrack-table") == 262_144
        assert "conntrack-table" not in names(role(host(conntrack=Conntrack(loaded=False)), Role.SERVER))


class TestWhatCannotBeRead:
    """Catalogue section 5: an absent file is a limit of unknown value, not the absence of a limit."""

    def test_host_limits_in_a_child_namespace(self) -> None:
        hidden = {
            name: text for name, text in SYSCTL.items() if name not in ("net.ipv4.tcp_mem", "net.ipv4.tcp_max_orphans")
        }
        inside = host(sysctl=None).model_copy(
            update={"sysctl": hidden, "isolation": Isolation(initial_network_namespace=False)}
        )
        found = role(inside, Role.SERVER, bytes_queued=1_000)
        reasons = {one.name: one.reason for one in found.unknown}
        assert "binds all the same" in reasons["tcp-buffer-memory"]
        assert "binds all the same" in reasons["orphans"]
        assert "tcp-buffer-memory" not in names(found)

    def test_the_readers_reason_is_told(self) -> None:
        blind = host().model_copy(
            update={
                "sysctl": {},
                "unread": {"net.ipv4.ip_local_port_range": "permission denied"},
                "process": Process(pid=1),
            }
        )
        found = role(blind, Role.CLIENT_ONE)
        reasons = {one.name: one.reason for one in found.unknown}
        assert "permission denied" in reasons["ephemeral-ports"]
        assert "descriptors-soft" in reasons
        assert diagnose(blind).unread == {"net.ipv4.ip_local_port_range": "permission denied"}

    @pytest.mark.parametrize(
        "text", ["", "60999", "60999 32768", "-5 -3", "a b", "0 0", "1 70000", "1 2 3", "9" * 5_000]
    )
    def test_a_range_that_cannot_be_is_unknown(self, text: str) -> None:
        found = role(host({"net.ipv4.ip_local_port_range": text}), Role.CLIENT_ONE)
        assert "ephemeral-ports" in [one.name for one in found.unknown]
        assert "ephemeral-ports" not in names(found)

    def test_tracking_that_cannot_be_told_is_unknown(self) -> None:
        found = role(host(conntrack=Conntrack(loaded=True, maximum=262_144)), Role.SERVER)
        assert "262,144" in {one.name: one.reason for one in found.unknown}["conntrack-table"]

    def test_tracking_that_is_not_active_does_not_bind(self) -> None:
        found = role(host(conntrack=Conntrack(loaded=True, active=False, maximum=262_144)), Role.SERVER)
        assert "conntrack-table" in [one.name for one in found.not_applicable]

    def test_rules_that_count_are_unknown_limits(self) -> None:
        found = role(host(rule_limits=("tcp dport 443 ct count over 100 drop",)), Role.SERVER)
        assert "ct count over 100" in {one.name: one.reason for one in found.unknown}["firewall-rules"]


class TestPressure:
    @pytest.mark.parametrize(
        ("used", "severity", "health"),
        [
            (49, None, Health.HEALTHY),
            (50, Severity.NOTICE, Health.HEALTHY),
            (79, Severity.NOTICE, Health.HEALTHY),
            (80, Severity.WARNING, Health.WARNING),
            (94, Severity.WARNING, Health.WARNING),
            (95, Severity.CRITICAL, Health.CRITICAL),
            (120, Severity.CRITICAL, Health.CRITICAL),
        ],
    )
    def test_thresholds(self, used: int, severity: Severity | None, health: Health) -> None:
        process = Process(pid=7, name="server", rlimits={"NOFILE": RLimit(soft=100, hard=100)}, open_descriptors=used)
        found = diagnose(host(process=process))
        assert [one.severity for one in found.pressures] == ([] if severity is None else [severity])
        assert found.health is health
        assert bool(found.reasons) == (health is not Health.HEALTHY)

    def test_each_flow_is_held_against_the_ports(self) -> None:
        there = Endpoint.parse("10.0.0.2:443")
        flows = tuple(
            Flow(source=f"10.0.0.{n}", destination=there, connections=c) for n, c in ((1, 28_232), (3, 15_000), (4, 9))
        )
        found = diagnose(host(flows=flows))
        assert [(one.name, one.severity, one.percent) for one in found.pressures] == [
            ("ephemeral-ports", Severity.CRITICAL, 100),
            ("ephemeral-ports", Severity.NOTICE, 53),
        ]
        assert "10.0.0.1 -> 10.0.0.2:443" in found.pressures[0].text
        assert found.health is Health.CRITICAL

    def test_a_full_time_wait_table_breaks_nothing(self) -> None:
        found = diagnose(host(sockets=Sockets(time_wait=131_072)))
        assert [(one.name, one.severity) for one in found.pressures] == [("time-wait-buckets", Severity.NOTICE)]
        assert found.health is Health.HEALTHY

    def test_an_accept_queue_that_is_full(self) -> None:
        full = Listener(local=Endpoint.parse("[::1]:443"), queue=129, backlog=128)
        found = diagnose(host(listeners=(full,)))
        assert (found.pressures[0].name, found.pressures[0].severity) == ("accept-queue", Severity.CRITICAL)

    def test_a_limit_of_nothing_is_full_only_when_used(self) -> None:
        assert diagnose(host({"net.ipv4.tcp_max_orphans": "0"}, sockets=Sockets(orphans_host=0))).pressures == ()
        found = diagnose(host({"net.ipv4.tcp_max_orphans": "0"}, sockets=Sockets(orphans_host=1)))
        assert found.pressures[0].severity is Severity.CRITICAL


class TestTheRest:
    def test_a_wish_that_does_not_fit_is_a_warning(self) -> None:
        goal = Goal(role=Role.CLIENT_ONE, connections=2_000_000)
        found = diagnose(host(), [goal])
        assert found.roles[0].short_by == 2_000_000 - 1_024
        assert found.health is Health.WARNING
        assert "descriptors-soft allows 1,024" in found.reasons[0]
        assert diagnose(host(), [Goal(role=Role.CLIENT_ONE, connections=1_000)]).health is Health.HEALTHY

    def test_counters_that_rise_name_their_limits(self) -> None:
        before = host(counters={"TcpExt.ListenOverflows": 5, "TcpExt.TW": 1, "Tcp.ActiveOpens": 1})
        after = host(
            counters={"TcpExt.ListenOverflows": 9, "TcpExt.TW": 99, "Tcp.ActiveOpens": 7, "TcpExt.PruneCalled": 3}
        )
        found = diagnose(after, previous=before)
        assert [(one.counter, one.by, one.limits[0]) for one in found.rising] == [
            ("TcpExt.ListenOverflows", 4, "accept-queue"),
            ("TcpExt.TW", 98, "time-wait"),
        ]
        assert found.health is Health.WARNING
        assert found.reasons == ("TcpExt.ListenOverflows rose by 4: accept-queue",)
        assert diagnose(before, previous=after).rising == ()
        assert diagnose(after).rising == ()

    def test_settings_are_told_and_make_no_host_ill(self) -> None:
        found = diagnose(host({"net.core.somaxconn": "128", "net.ipv4.ip_autobind_reuse": "1"}))
        assert {one.name for one in found.settings} >= {"accept-queue", "autobind-reuse"}
        assert found.health is Health.HEALTHY
        assert "accept-queue" not in {one.name for one in diagnose(host()).settings}

    def test_there_is_a_default_goal_for_each_role(self) -> None:
        assert [goal.role for goal in default_goals()] == list(Role)
        assert {goal.role: goal.destinations for goal in default_goals()}[Role.CLIENT_MANY] == 1_000
        assert [found.goal for found in diagnose(host()).roles] == list(default_goals())

    def test_it_is_json(self) -> None:
        text = json.dumps(diagnose(host()).to_json())
        plain = json.loads(text)
        assert plain["health"] == "healthy"
        assert plain["roles"][0]["goal"]["role"] == "client to one destination"
        assert plain["roles"][0]["bounds"][1]["connections"] == 28_232


class TestMyths:
    def test_the_twelve_are_about_limits_of_the_catalogue(self) -> None:
        found = myths.myths(host())
        assert len({one.advice for one in found}) == len(found) == 12
        assert all(limits.by_name(one.limit) for one in found)
        assert all(one.truth for one in found)

    @pytest.mark.parametrize(
        ("limit", "changes", "applies", "number"),
        [
            ("exclusive-bind", {}, True, "28,232 ports"),
            ("poisoned-ports", {"poisoned_ports": ((40_000, 40_099),)}, True, "100 ports"),
            ("port-parity", {"features": {"local_port_range_searches_all": True}}, True, "14,116 connections"),
            ("socket-port-range", {"features": {"local_port_range": False}}, False, "no such option"),
            ("socket-port-range", {}, True, "32768 to 60999"),
            ("syn-backlog", {}, True, "4,096"),
            ("syn-backlog", {"sysctl": SYSCTL | {"net.ipv4.tcp_syncookies": "0"}}, False, "tcp_syncookies is 0"),
            ("tcp-buffer-memory", {}, True, "2,358,460,416 B"),
            ("time-wait", {}, True, "2 here: over loopback only"),
            ("files-on-host", {}, True, "RLIMIT_NOFILE binds at 1,024"),
            ("files-on-host", {"sysctl": {"fs.file-max": "100", "fs.file-nr": "90 0 100"}}, False, "come near"),
            ("sockstat-scope", {}, False, "could be read"),
            ("sockstat-scope", {"sysctl": {}}, True, "net.ipv4.tcp_mem"),
            ("observer-memory", {"process": Process(pid=1, open_descriptors=1_000_000)}, True, "900,000,000 B"),
        ],
    )
    def test_each_is_held_against_the_host(
        self, limit: str, changes: dict[str, Any], applies: bool, number: str
    ) -> None:
        found = next(one for one in myths.myths(host().model_copy(update=changes)) if one.limit == limit)
        assert (found.applies, number in found.truth) == (applies, True), found.truth


def _sysctls() -> list[str]:
    """Every sysctl that the catalogue reads, out of its source, so that a new one is fuzzed as well."""
    modules = [family for _, _, family in limits.FAMILIES] + [myths, _terms]
    text = "".join(map(inspect.getsource, modules))
    return sorted(set(re.findall(r'"((?:net|fs|kernel|vm|user)\.[A-Za-z0-9_.-]+)"', text)))


COUNTS = st.none() | st.sampled_from([0, 1, 2, 1_023, 65_535, 2**31, 2**64 - 1]) | st.integers(0, 2**64 - 1)
SURE = st.sampled_from([0, 1, 2, 65_535, 2**64 - 1]) | st.integers(0, 2**64 - 1)
TEXTS = (
    st.sampled_from(
        ["", "0", "-1", "-262144", "1 0", "32768 60999", "4096 131072 6291456", "9" * 30, "1,2,3-4", "65536-1"]
    )
    | st.integers(-(2**65), 2**65).map(str)
    | st.lists(st.integers(-5, 70_000), min_size=2, max_size=3).map(lambda numbers: " ".join(map(str, numbers)))
    | st.text(max_size=12)
)
RLIMITS = st.builds(RLimit, soft=COUNTS, hard=COUNTS)
ENDPOINTS = st.builds(Endpoint, st.ip_addresses(), st.integers(1, 65_535))
HOSTS = st.builds(
    Host,
    label=st.text(max_size=5),
    kernel=st.builds(
        Kernel,
        release=st.text(max_size=8),
        version=st.lists(st.integers(0, 9), max_size=3).map(tuple),
        architecture=st.just("x"),
        page_bytes=SURE,
    ),
    machine=st.builds(Machine, cpus=SURE, memory_total_bytes=COUNTS, memory_available_bytes=COUNTS),
    process=st.builds(
        Process,
        pid=SURE,
        name=st.sampled_from(["", "python3", "x"]),
        rlimits=st.dictionaries(st.sampled_from(["NOFILE", "NPROC", "MEMLOCK"]), RLIMITS),
        open_descriptors=COUNTS,
        capabilities=st.sampled_from([(), ("CAP_SYS_ADMIN",), ("CAP_NET_RAW",), ("CAP_SYS_RESOURCE",)]),
    ),
    isolation=st.builds(
        Isolation, initial_network_namespace=st.none() | st.booleans(), seccomp=st.none() | st.booleans()
    ),
    cgroup=st.none()
    | st.builds(
        Cgroup,
        version=st.integers(1, 2),
        memory_max_bytes=COUNTS,
        memory_current_bytes=COUNTS,
        memory_reclaimable_bytes=COUNTS,
        pids_max=COUNTS,
        pids_current=COUNTS,
        kmem_tcp_limit_bytes=COUNTS,
        kmem_tcp_usage_bytes=COUNTS,
    ),
    sysctl=st.dictionaries(st.sampled_from(_sysctls()), TEXTS, max_size=80),
    sockets=st.builds(
        Sockets,
        tcp_in_use=COUNTS,
        tcp6_in_use=COUNTS,
        time_wait=COUNTS,
        orphans_host=COUNTS,
        memory_pages_host=COUNTS,
        by_state=st.dictionaries(st.sampled_from(["ESTABLISHED", "CLOSE_WAIT", "SYN_RECV"]), SURE),
    ),
    flows=st.lists(
        st.builds(Flow, source=st.text(max_size=5), destination=ENDPOINTS, connections=SURE), max_size=3
    ).map(tuple),
    listeners=st.lists(st.builds(Listener, local=ENDPOINTS, queue=SURE, backlog=SURE), max_size=3).map(tuple),
    addresses=st.lists(
        st.builds(Address, interface=st.sampled_from(["lo", "eth0"]), address=st.text(max_size=8), prefix_length=SURE),
        max_size=3,
    ).map(tuple),
    poisoned_ports=st.none()
    | st.lists(st.tuples(st.integers(0, 65_535), st.integers(0, 65_535)), max_size=4).map(tuple),
    conntrack=st.builds(
        Conntrack, loaded=st.booleans(), active=st.none() | st.booleans(), count=COUNTS, maximum=COUNTS, buckets=COUNTS
    ),
    source_nat=st.lists(
        st.builds(SourceNat, table=st.just("t"), rule=st.just("r"), addresses=SURE, ports=st.none() | st.just((9, 3))),
        max_size=2,
    ).map(tuple),
    rule_limits=st.lists(st.text(max_size=200), max_size=2).map(tuple),
    features=st.dictionaries(st.sampled_from(["local_port_range", "bind_address_no_port"]), st.booleans()),
    counters=st.dictionaries(st.sampled_from(["TcpExt.ListenDrops", "x", ""]), st.integers(-(2**63), 2**64 - 1)),
    unread=st.dictionaries(
        st.sampled_from(["nft", "rlimits", "cgroup", "conntrack", "addresses"]), st.text(max_size=9)
    ),
)
GOALS = st.builds(
    Goal,
    role=st.sampled_from(Role),
    connections=COUNTS,
    sources=st.integers(1, 2**128),
    destinations=st.integers(1, 2**144),
    bytes_queued=SURE,
    user_bytes=SURE,
    descriptors_per_connection=SURE,
    threads_per_connection=SURE,
    ipv6=st.booleans(),
    uses_epoll=st.booleans(),
    accepts=st.booleans(),
    backlog=COUNTS,
    binds_first=st.booleans(),
    searches_all_ports=st.booleans(),
)


def check_invariants(found: Diagnosis) -> None:
    for one in found.roles:
        numbers = [bound.connections for bound in one.bounds]
        assert numbers == sorted(numbers)
        assert all(number >= 0 for number in numbers)
        assert one.ceiling == (numbers[0] if numbers else None)
        counted = [{bound.name for bound in (*one.bounds, *one.rates, *one.slowdowns)}]
        counted += [{entry.name for entry in one.unknown}, {entry.name for entry in one.not_applicable}]
        assert sum(map(len, counted)) == sum(limit.bound is not None for limit in limits.LIMITS)
        assert all(limits.by_name(name) for names_of in counted for name in names_of)
    assert (found.health is Health.HEALTHY) == (not found.reasons)
    assert json.loads(json.dumps(found.to_json()))["health"] == found.health.value


@settings(max_examples=100, deadline=None)
@given(HOSTS, st.none() | st.lists(GOALS, max_size=3), st.none() | HOSTS)
def test_any_host_has_a_diagnosis(any_host: Host, goals: list[Goal] | None, previous: Host | None) -> None:
    check_invariants(diagnose(any_host, goals, previous))


def test_the_fuzzed_sysctls_are_those_that_are_read() -> None:
    assert set(SYSCTL) <= set(_sysctls())
    assert len(_sysctls()) > 60
