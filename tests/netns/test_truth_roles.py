"""The truth test for hosts in the middle, as `test_truth.py` is for ends: what `doctor` predicts for a proxy and for a
NAT box is what HAProxy and the kernel's own translation hold, within 1 %.

A seed makes the labs; it is printed, and FOURTUPLE_SEED=n plays the same ones again. NAT has no more than 128 ports per
address: there the kernel tries them all (nf_nat_l4proto_unique_tuple() in net/netfilter/nf_nat_core.c), with more it
tries some 250 at random, and `plan` counts on 94 % of them (G4).
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fourtuple.doctor import diagnose
from fourtuple.engine import CarrierName, EchoConfig, LoadConfig, Snapshot, SourceChoice
from fourtuple.facts import Goal, Host, Role
from fourtuple.host.apply import Step
from fourtuple.host.knobs import LOCAL, KnobKind
from fourtuple.lab import Lab, LabHost, RemoteEngine
from fourtuple.tuples import AddressSet, Endpoint, PortSet, TupleSpace

SEED = int(os.environ.get("FOURTUPLE_SEED") or random.SystemRandom().randrange(10**6))
LABS = int(os.environ.get("FOURTUPLE_LABS") or 2)
RANGE, RESERVED = "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports"
SERVED, SOURCES, CLIENTS = "10.82.0.0/24", "10.81.0.0/24", "10.9.0.0/16"
OUTSIDE = "198.51.100.0/24"
PORT = 1_020
PATIENCE_S, SETTLE_S = 30.0, 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Middle:
    """One lab: how many names the host in the middle has, and what of them is taken."""

    number: int
    addresses: int
    destinations: int
    low: int
    high: int
    reserved: str
    bound: tuple[int, ...]
    masquerades: bool

    def __str__(self) -> str:
        return f"{self.number:02}"


def labs(role: str, most_ports: int) -> list[Middle]:
    made = []
    for number in range(LABS):
        dice = random.Random(f"{SEED}/{role}/{number}")
        low = dice.randint(2_000, 60_000)
        high = low + dice.randint(40, most_ports) - 1
        taken = dice.sample(range(low, high + 1), dice.randint(0, 10))
        masquerades = number % 2 == 1
        made.append(
            Middle(
                number=number,
                addresses=1 if masquerades else dice.randint(1, 3),
                destinations=dice.randint(1, 4),
                low=low,
                high=high,
                reserved=",".join(map(str, sorted(taken[::2]))),
                bound=tuple(taken[1::2]),
                masquerades=masquerades,
            )
        )
    return made


@pytest.mark.parametrize("middle", labs("proxy", 300), ids=str)
def test_a_proxy_holds_what_the_doctor_predicts(middle: Middle, tmp_path: Path) -> None:
    """HAProxy, with so many source addresses and backends: each pair of them is a server of its own to it."""
    for program in ("haproxy", "nsenter"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"{program} is not installed")
    print(f"\nFOURTUPLE_SEED={SEED} {middle!r}")
    with Lab(("client", "proxy", "server")) as made:
        if made.in_user_namespace:
            pytest.skip("running HAProxy in a namespace of the lab needs root")
        client, proxy, server = made["client"], made["proxy"], made["server"]
        server.add_any_ip(SERVED)
        proxy.add_any_ip(SOURCES)
        proxy.set_sysctl(RANGE, f"{middle.low} {middle.high}")
        proxy.set_sysctl(RESERVED, middle.reserved or "1")
        for port in middle.bound:
            proxy.bind(Endpoint.parse(f"0.0.0.0:{port}"))
        backends = [Endpoint.parse(f"10.82.0.{last}:{PORT}") for last in range(1, middle.destinations + 1)]
        echo = serve(server, *backends)
        facts = proxy.facts()
        goal = Goal(role=Role.PROXY, sources=middle.addresses, destinations=middle.destinations)
        front = Endpoint(proxy.links["client"].addresses[0], 443)
        with haproxy(proxy, front, backends, middle.addresses, tmp_path):
            held_to(facts, goal, "ephemeral-ports", lambda wanted: through(client, front, wanted, echo))


@pytest.mark.parametrize("middle", labs("nat", 128), ids=str)
def test_a_nat_box_holds_what_the_doctor_predicts(middle: Middle, tmp_path: Path) -> None:
    for program in ("nft", "nsenter"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"{program} is not installed")
    print(f"\nFOURTUPLE_SEED={SEED} {middle!r}")
    with Lab(("client", "box", "server")) as made:
        if made.in_user_namespace:
            pytest.skip("setting rules in a namespace of the lab from outside needs root")
        client, box, server = made["client"], made["box"], made["server"]
        # Routes by hand: the lab's own would lead past the box.
        for host, prefix in ((server, SERVED), (client, CLIENTS)):
            host.apply((Step(kind=KnobKind.ROUTE, name=prefix, new=LOCAL),), tmp_path / host.name)
        client.route(SERVED, client.links["box"].peer_addresses[0])
        box.route(SERVED, box.links["server"].peer_addresses[0])
        box.route(CLIENTS, box.links["client"].peer_addresses[0])
        server.route(OUTSIDE, server.links["box"].peer_addresses[0])
        box.set_sysctl("net.ipv4.ip_forward", "1")
        ports = f":{middle.low}-{middle.high}"
        last = f"-198.51.100.{middle.addresses}" if middle.addresses > 1 else ""
        what = f"masquerade to {ports}" if middle.masquerades else f"snat to 198.51.100.1{last}{ports}"
        rule = f'oifname "to-server" meta l4proto tcp {what}'
        translate(box, f"table ip nat {{\nchain out {{\ntype nat hook postrouting priority 100\n{rule}\n}}\n}}\n")
        facts = box.facts()
        if not facts.source_nat:
            pytest.skip(f"the rules cannot be read here: {facts.unread.get('nft', 'nft lists none')}")
        there = [Endpoint.parse(f"10.82.0.{number}:{PORT}") for number in range(1, middle.destinations + 1)]
        echo = serve(server, *there)
        goal = Goal(role=Role.NAT, destinations=middle.destinations)
        held_to(facts, goal, "snat-ports", lambda wanted: translated(client, there, wanted, echo))


# How it is played.


def held_to(facts: Host, goal: Goal, limit: str, reach: Callable[[int], int]) -> None:
    """The first limit is this one, and what is reached by asking for more is its number."""
    first = diagnose(facts, [goal]).roles[0].bounds[0]
    reached = reach(first.connections * 2)
    print(f"predicted {first.connections:,}, reached {reached:,}; {first.name}: {first.arithmetic}")
    assert first.name == limit
    most = first.may_reach or first.connections
    assert first.connections * 99 <= reached * 100 <= most * 101


def through(client: LabHost, front: Endpoint, wanted: int, echo: RemoteEngine) -> int:
    """So many clients come to the proxy; says how many stand behind it."""
    space = TupleSpace(
        sources=AddressSet.of(client.links["proxy"].addresses[0]),
        source_ports=PortSet.parse("10000-30000"),
        destinations=AddressSet.of(front.address),
        destination_ports=PortSet.of(front.port),
    )
    client.start_engine(LoadConfig(space=space, connections=wanted, choice=SourceChoice.BIND), CarrierName.EPOLL, 1)
    return settled(echo).open_now


def translated(client: LabHost, there: list[Endpoint], wanted: int, echo: RemoteEngine) -> int:
    """So many clients, each with an address of its own, since the box chooses its own by a hash of theirs."""
    space = TupleSpace(
        sources=AddressSet.parse(CLIENTS).between(0, -(-wanted // len(there))),
        source_ports=PortSet.of(20_000),
        destinations=AddressSet.of(*(one.address for one in there)),
        destination_ports=PortSet.of(PORT),
    )
    # What the box drops is seen by time alone, and an address that is full says nothing of the others.
    config = LoadConfig(
        space=space,
        connections=space.size,
        choice=SourceChoice.BIND,
        window=256,
        connect_timeout_s=0.5,
        give_up_after=space.size,
    )
    client.start_engine(config, CarrierName.EPOLL, 1)
    return settled(echo).open_now


def serve(host: LabHost, *endpoints: Endpoint) -> RemoteEngine:
    engine = host.start_engine(EchoConfig(listen=endpoints, backlog=4_096), CarrierName.EPOLL, 1)
    engine.wait_for(lambda now: now.listening_now == len(endpoints), PATIENCE_S)
    return engine


def settled(engine: RemoteEngine) -> Snapshot:
    """The engine's numbers once they have stood still for a while."""
    last, since = engine.snapshot(), time.monotonic()
    deadline = since + PATIENCE_S
    while time.monotonic() < min(deadline, since + SETTLE_S):
        time.sleep(SETTLE_S / 10)
        now = engine.snapshot()
        if now.open_now != last.open_now:
            since = time.monotonic()
        last = now
    return last


@contextmanager
def haproxy(host: LabHost, front: Endpoint, backends: list[Endpoint], sources: int, folder: Path) -> Iterator[None]:
    """A proxy of bytes in the host's namespace."""
    own = [f" source 10.81.0.{last}" for last in range(1, sources + 1)]
    servers = [
        f"  server s{row}x{place} {backend}{source}"
        for row, backend in enumerate(backends)
        for place, source in enumerate(own)
    ]
    config = folder / "haproxy.cfg"
    lines = ["global", "  nbthread 1", "defaults", "  mode tcp", "  retries 0", "  timeout connect 5s"]
    lines += ["  timeout client 60s", "  timeout server 60s", "listen front", f"  bind {front}", *servers, ""]
    config.write_text("\n".join(lines))
    command = ["nsenter", f"--net=/proc/{host.pid}/ns/net", "haproxy", "-db", "-f", str(config)]
    with (folder / "haproxy.log").open("w") as words, subprocess.Popen(command, stdout=words, stderr=words) as running:
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not any(one.local == front for one in host.facts().listeners):
                assert running.poll() is None, (folder / "haproxy.log").read_text()
                assert time.monotonic() < deadline, "HAProxy does not listen"
            yield
        finally:
            running.kill()


def translate(box: LabHost, rules: str) -> None:
    enter = ["nsenter", f"--net=/proc/{box.pid}/ns/net", "nft", "-f", "-"]
    done = subprocess.run(enter, input=rules, text=True, capture_output=True, check=False, timeout=30)
    assert "syntax error" not in done.stderr, done.stderr
    if done.returncode:
        pytest.skip(f"nft cannot load NAT rules here: {done.stderr.strip()[:200]}")
