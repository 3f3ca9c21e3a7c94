"""The truth test: what `doctor` predicts for a lab is the number that the engine reaches there, and the limit that it
names first is the one that the kernel's own answer shows.

A seed makes the labs: their knobs are turned at random, one of them so far that it should bind. The doctor reads each
lab with the real reader and is not told which. Then more connections are asked for than it predicts, until the kernel
refuses. The seed is printed; FOURTUPLE_SEED=n plays the same labs again, FOURTUPLE_LABS=n plays more or fewer.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address
from math import isqrt
from shutil import which

import pytest

from fourtuple.doctor import Binding, Diagnosis, RoleDiagnosis, diagnose
from fourtuple.engine import CarrierName, EchoConfig, LoadConfig, Phase, Snapshot, SourceChoice
from fourtuple.facts import Goal, Host, Role
from fourtuple.lab import Lab, LabHost, RemoteEngine
from fourtuple.limits import suspects
from fourtuple.tuples import AddressSet, Endpoint, PortSet, TupleSpace
from tests.netns.conntrack import fill_table

SEED = int(os.environ.get("FOURTUPLE_SEED") or random.SystemRandom().randrange(10**6))
LABS = int(os.environ.get("FOURTUPLE_LABS") or 30)

RANGE, RESERVED = "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports"
ECHO_PORTS = (1_020, 1_023)
"""Where the servers of clients listen: below every range."""
SERVED = {4: "10.82.0.0/16", 6: "fd82::/64"}
DESTINATIONS = {4: "10.82.0.", 6: "fd82::"}
ELSEWHERE = {4: "10.82.9.9", 6: "fd82::9:9"}
"""Where the connections of other programs go."""
ANY_IP = {4: "10.81.0.0/16", 6: "fd81::/64"}
LOOPBACK = ip_address("127.0.0.1")
ALIASES, NOT_OURS = "10.83.0.", "10.84.0."
MOST_CONNECTIONS = 20_000
TOLERANCE_PERCENT = 1
PATIENCE_S = 60.0
SETTLE_S = 0.5
TIME_WAIT_REUSE_S = 1.2
"""A little more than net.ipv4.tcp_tw_reuse_delay."""


class Wall(Enum):
    """Which knob is turned so far that it should bind."""

    PORTS = "ports"
    ADDRESSES = "addresses"
    LEFTOVERS = "leftovers"
    EXCLUSIVE = "exclusive"
    CLIENT_DESCRIPTORS = "client-descriptors"
    RINGS = "rings"
    SERVER_DESCRIPTORS = "server-descriptors"
    ACCEPT_QUEUE = "accept-queue"
    CONNTRACK = "conntrack"
    WHOLE_TABLE = "conntrack-whole-table"


WALLS = (
    Wall.PORTS,
    Wall.CLIENT_DESCRIPTORS,
    Wall.ACCEPT_QUEUE,
    Wall.PORTS,
    Wall.CONNTRACK,
    Wall.SERVER_DESCRIPTORS,
    Wall.PORTS,
    Wall.LEFTOVERS,
    Wall.ACCEPT_QUEUE,
    Wall.ADDRESSES,
    Wall.RINGS,
    Wall.CLIENT_DESCRIPTORS,
    Wall.SERVER_DESCRIPTORS,
    Wall.CONNTRACK,
    Wall.EXCLUSIVE,
)
"""One after the other; the very first time that conntrack's turn comes, the whole table is filled with connections."""
SERVER_WALLS = (Wall.SERVER_DESCRIPTORS, Wall.ACCEPT_QUEUE)
SIZES = ((1, 9), (201, 3_000), (3_001, 14_000), (10, 200))
"""Tiny, middling, big, small: sizes of a port range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One lab: every knob, whether it binds or not."""

    number: int
    wall: Wall
    version: int
    low: int
    high: int
    reserved: str
    """As the sysctl takes it; may reach beyond the range."""
    listening: tuple[int, ...] = ()
    bound: tuple[int, ...] = ()
    connected: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    """Ports in the range that other programs hold by listen(), by bind() alone, by bind() and connect(), or held so
    until a moment ago: TIME_WAIT."""
    listening_apart: tuple[int, ...] = ()
    """Ports in the range with a listener at one address: by turns loopback's, and the one that the client uses."""
    sources: int
    aliases: int
    """Addresses that the client has beside its link's own; 0 and several sources is an AnyIP prefix."""
    destination_addresses: int
    destination_ports: int
    choice: SourceChoice
    carrier: CarrierName
    soft: int | None
    """RLIMIT_NOFILE of the process whose connections are counted; None leaves it."""
    hard_too: bool
    somaxconn: int
    backlog: int
    tracked: bool
    room: int | None
    """Entries that other hosts' connections leave in the conntrack table; None leaves it empty."""
    at_server: bool
    """Whether the server is the host that is examined."""
    closed: bool
    """Whether the connections that were there before are in TIME_WAIT or still open."""
    reuse: int
    """net.ipv4.tcp_tw_reuse: with 1, connect() takes over what is in TIME_WAIT."""

    def __str__(self) -> str:
        return f"{self.number:02}-{self.wall.value}"

    @property
    def size(self) -> int:
        """Ports in the range."""
        return self.high - self.low + 1

    @property
    def destinations(self) -> int:
        """Different ones."""
        return self.destination_addresses * self.destination_ports


def scenarios(seed: int, count: int) -> list[Scenario]:
    """The labs of a seed."""
    walls = list(itertools.islice(itertools.cycle(WALLS), count))
    if Wall.CONNTRACK in walls:
        walls[walls.index(Wall.CONNTRACK)] = Wall.WHOLE_TABLE
    return [scenario(random.Random(f"{seed}/{number}"), number, wall) for number, wall in enumerate(walls)]


def scenario(dice: random.Random, number: int, wall: Wall) -> Scenario:
    """One lab, its knobs turned at random as far as its wall allows."""
    version = 6 if wall not in (Wall.ADDRESSES, Wall.EXCLUSIVE, Wall.WHOLE_TABLE) and dice.random() < 0.4 else 4
    size = range_size(dice, number, wall)
    low = dice.randint(1_024, 65_536 - size)
    high = low + size - 1
    sources, aliases, addresses, ports = 1, 0, 1, 1
    if wall not in (Wall.LEFTOVERS, Wall.EXCLUSIVE, Wall.WHOLE_TABLE):
        ports = dice.randint(1, min(4, max(1, MOST_CONNECTIONS // size)))
        addresses = dice.randint(1, min(5, max(1, MOST_CONNECTIONS // (size * ports))))
        sources = dice.randint(1, min(6, max(1, MOST_CONNECTIONS // (size * ports * addresses))))
    if wall is Wall.EXCLUSIVE:
        addresses = dice.randint(1, 4)
    elif wall is Wall.ADDRESSES:
        aliases, sources = dice.randint(1, 4), 0
        sources = aliases + 1 + dice.randint(1, 3)
    elif wall is Wall.WHOLE_TABLE:
        sources = 5
    elif version == 4 and sources > 1 and dice.random() < 0.5:
        aliases = sources
    most = size * sources * addresses * ports
    quick = most if size <= 2_000 else 0
    choices = [SourceChoice.KERNEL_RANGE]
    choices += [SourceChoice.KERNEL_PORT] * bool(quick) + [SourceChoice.KERNEL] * bool(quick and sources == 1)
    choice = dice.choice(choices[1:] or choices) if dice.random() < 0.7 else choices[0]
    tracked = wall in (Wall.CONNTRACK, Wall.WHOLE_TABLE) or dice.random() < 0.3
    carrier = dice.choice((CarrierName.EPOLL, CarrierName.AUTO))
    soft: int | None = None
    if wall is Wall.WHOLE_TABLE:
        carrier = CarrierName.AUTO
    elif wall is Wall.CLIENT_DESCRIPTORS:
        carrier, soft = CarrierName.EPOLL, dice.randint(40, max(41, most * 3 // 4))
    elif wall is Wall.RINGS:
        carrier, soft = CarrierName.AUTO, dice.randint(16, min(100, isqrt(most)))
    elif wall is Wall.SERVER_DESCRIPTORS:
        carrier, soft = CarrierName.EPOLL, dice.randint(40, dice.choice((100, 1_000, 5_000)))
    elif carrier is CarrierName.AUTO and dice.random() < 0.6:
        soft = dice.randint(300, 2_000)
    held = poison(dice, low, high) if wall not in (Wall.WHOLE_TABLE, Wall.EXCLUSIVE) else ((),) * 4
    if wall is Wall.EXCLUSIVE and dice.random() < 0.6:
        held = (tuple(dice.sample(range(low, high + 1), 3)), (), (), ())
    free = sorted({*range(low, high + 1)}.difference(*held))
    apart = tuple(dice.sample(free, dice.randint(0, 10))) if wall is Wall.EXCLUSIVE else ()
    return Scenario(
        number=number,
        wall=wall,
        version=version,
        low=low,
        high=high,
        reserved=reserved(dice, low, high) if wall is not Wall.WHOLE_TABLE and dice.random() < 0.6 else "",
        listening=held[0],
        bound=held[1],
        connected=held[2],
        left=held[3],
        listening_apart=apart,
        sources=sources,
        aliases=aliases,
        destination_addresses=addresses,
        destination_ports=ports,
        choice=choice,
        carrier=carrier,
        soft=soft,
        hard_too=soft is not None and dice.random() < 0.4,
        somaxconn=dice.choice((0, 1, 7, 128, 511, 1_024)) if wall is Wall.ACCEPT_QUEUE else 65_535,
        backlog=dice.choice((1, 5, 100, 128, 600, 4_096)) if wall is Wall.ACCEPT_QUEUE else 65_535,
        tracked=tracked,
        room=dice.randint(1, max(1, min(4_000, most * 3 // 4))) if wall is Wall.CONNTRACK else None,
        at_server=wall in SERVER_WALLS or (wall is Wall.CONNTRACK and dice.random() < 0.5),
        closed=dice.random() < 0.6,
        reuse=dice.randint(0, 2),
    )


def range_size(dice: random.Random, number: int, wall: Wall) -> int:
    """Ports in the range, as far as the wall allows."""
    match wall:
        case Wall.WHOLE_TABLE:
            return 64_512
        case Wall.EXCLUSIVE:
            return dice.randint(20, 120)
        case Wall.CLIENT_DESCRIPTORS | Wall.RINGS | Wall.CONNTRACK:
            return dice.randint(300, 8_000)
        case _:
            return dice.randint(*SIZES[(number + number // len(WALLS)) % len(SIZES)])


def reserved(dice: random.Random, low: int, high: int) -> str:
    """Single ports and ranges, some beside the range, some across its ends; never the whole of a range."""
    size = high - low + 1
    items = [str(dice.randint(low, high)) for _ in range(dice.randint(1, 4)) if size > 8]
    if size > 20:
        first = dice.randint(low, high - size // 4)
        items.append(f"{first}-{dice.randint(first, first + size // 4)}")
        items.append(f"{max(1, low - 50)}-{low + dice.randint(0, size // 8)}")
    items.append(str(dice.randint(1, 1_000)))
    return ",".join(items)


def poison(dice: random.Random, low: int, high: int) -> tuple[tuple[int, ...], ...]:
    """Ports for other programs to listen on, to bind, to connect from, to have connected from; none of them twice."""
    if dice.random() < 0.4 or high - low < 8:
        return ((),) * 4
    ports = dice.sample(range(low, high + 1), dice.randint(1, min(30, (high - low + 1) // 4)))
    return tuple(tuple(ports[first::4]) for first in range(4))


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What was predicted, and what the kernel let happen."""

    diagnosis: Diagnosis
    reached: int
    answer: tuple[str, str]
    """The call that failed, and its errno."""
    after: Host
    """The same host at the wall."""
    before: Host
    room: tuple[int, int] | None = None
    """Of a pressure that the doctor saw: connections left, connections made."""

    @property
    def role(self) -> RoleDiagnosis:
        """The one that was asked for."""
        return self.diagnosis.roles[0]

    @property
    def first(self) -> Binding:
        """The limit that the doctor names."""
        return self.role.bounds[0]

    @property
    def by_chance(self) -> int:
        """How many connections the prediction leaves to chance, such as the port that an odd range may miss (A2)."""
        return (self.first.may_reach or self.first.connections) - self.first.connections

    def agrees(self, binding: Binding) -> bool:
        """Whether this number is the one that was reached; within a tolerance only where timeouts have to tell."""
        certain, most = binding.connections, binding.may_reach or binding.connections
        most_off = certain * TOLERANCE_PERCENT // 100 if self.answer[1] == "ETIMEDOUT" else 0
        return certain - most_off <= self.reached <= most + most_off

    def shown(self) -> list[str]:
        """The limits that the kernel's answer leaves as suspects, first suspect first.

        An error has several suspects. A limit whose own number is not the one that was reached is not the one that
        was hit; and where a counter breaks the silence of a timeout, the limits that make it rise are meant.
        """
        names = [limit.name for limit in suspects(*self.answer)]
        if self.answer[1] == "ETIMEDOUT":
            rising = [one for one in diagnose(self.after, [], self.before).rising if one.breaks]
            names = [name for name in names if any(name in one.limits for one in rising)]
        allowed = {binding.name: binding for binding in self.role.bounds}
        return [name for name in names if name in allowed and self.agrees(allowed[name])]


@pytest.mark.parametrize("lab_of", scenarios(SEED, LABS), ids=str)
def test_the_doctor_predicts_what_the_kernel_does(lab_of: Scenario) -> None:
    print(f"\nFOURTUPLE_SEED={SEED} {lab_of!r}")
    if lab_of.wall in (Wall.CONNTRACK, Wall.WHOLE_TABLE) and (reason := why_no_tracking()):
        pytest.skip(reason)
    began = time.monotonic()
    with Lab(("client", "server")) as lab:
        play = PLAYS.get(lab_of.wall, play_server if lab_of.at_server else play_client)
        outcome = play(lab_of, lab["client"], lab["server"])
    first, role = outcome.first, outcome.role
    print(
        f"{lab_of}: predicted {role.ceiling:,}, reached {outcome.reached:,}; {first.name}: {first.arithmetic}; "
        f"kernel: {outcome.answer[1]} at {outcome.answer[0]}(); {time.monotonic() - began:.1f} s"
    )
    assert role.ceiling == first.connections
    assert outcome.agrees(first)
    assert outcome.shown()[:1] == [first.name]
    if outcome.room is not None:
        left, made = outcome.room
        assert left <= made <= left + outcome.by_chance


@pytest.mark.parametrize("seed", [SEED, *range(20)])
def test_thirty_labs_turn_every_knob(seed: int) -> None:
    labs = scenarios(seed, 30)
    turned: dict[str, Callable[[Scenario], bool]] = {
        "odd range": lambda it: bool(it.size % 2),
        "even range": lambda it: not it.size % 2,
        "tiny range": lambda it: it.size <= 200,
        "big range": lambda it: it.size > 3_000,
        "reserved": lambda it: bool(it.reserved),
        "poisoned": lambda it: bool(it.listening or it.bound or it.connected or it.left),
        "rlimit": lambda it: it.soft is not None,
        "somaxconn": lambda it: it.somaxconn < 65_535,
        "tracked": lambda it: it.tracked,
        "sources": lambda it: it.sources > 1,
        "destinations": lambda it: it.destinations > 1,
        "IPv6": lambda it: it.version == 6,
        "kernel's own choice": lambda it: it.choice is not SourceChoice.KERNEL_RANGE,
    }
    assert {name for name, is_turned in turned.items() if sum(map(is_turned, labs)) < 4} == set()
    assert {it.wall for it in labs} == set(Wall)
    for it in labs:
        assert 1_024 <= it.low <= it.high <= 65_535
        taken = PortSet.of(*it.listening, *it.bound, *it.connected, *it.left)
        everything = PortSet.parse(f"{it.low}-{it.high}")
        left = everything.subtract(taken).subtract(PortSet.parse(it.reserved) if it.reserved else PortSet())
        assert left.size, "a lab without a port says nothing"


# What is played


def play_client(lab_of: Scenario, client: LabHost, server: LabHost) -> Outcome:
    """The client is examined, then connects until its kernel says no."""
    wire(lab_of, client, server)
    examined = client.another() if lab_of.soft is not None else client
    turn_limits(lab_of, examined)
    where = space_of(lab_of, client)
    # An engine that is told to wait: its own descriptors are open when the doctor counts them.
    load = examined.start_engine(load_of(lab_of, where), lab_of.carrier, 1)
    before = facts(examined)
    goal = client_goal(lab_of, load.carrier)
    diagnosis = diagnose(before, [goal])
    ceiling = ceiling_of(diagnosis)
    load.set_target(ceiling + surplus(lab_of, ceiling))
    now = filled(load, ceiling + surplus(lab_of, ceiling))
    return Outcome(
        diagnosis=diagnosis,
        reached=now.open_now,
        answer=answer_of(now),
        before=before,
        after=facts(examined) if lab_of.tracked else before,
    )


def play_server(lab_of: Scenario, client: LabHost, server: LabHost) -> Outcome:
    """The server is examined, then clients come until its kernel says no."""
    route(lab_of, client, server)
    server.set_sysctl("net.core.somaxconn", lab_of.somaxconn)
    turn_limits(lab_of, server)
    track(lab_of, server)
    accepts = lab_of.wall is not Wall.ACCEPT_QUEUE
    everywhere = Endpoint(ip_address("0.0.0.0" if lab_of.version == 4 else "::"), ECHO_PORTS[0])
    echo = EchoConfig(listen=(everywhere,), backlog=lab_of.backlog, accept=accepts)
    serving = server.start_engine(echo, lab_of.carrier, 1)
    serving.wait_for(lambda one: one.listening_now == 1, PATIENCE_S)
    before = facts(server)
    goal = Goal(
        role=Role.SERVER,
        accepts=accepts,
        backlog=lab_of.backlog,
        descriptors_per_connection=descriptors(serving.carrier),
        uses_epoll=serving.carrier is CarrierName.EPOLL,
        ipv6=lab_of.version == 6,
    )
    diagnosis = diagnose(before, [goal])
    ceiling = ceiling_of(diagnosis)
    where = TupleSpace(
        sources=AddressSet.of(client.links["server"].addresses[lab_of.version == 6]),
        source_ports=PortSet.parse("1024-65535"),
        destinations=AddressSet.parse(f"{DESTINATIONS[lab_of.version]}1"),
        destination_ports=PortSet.of(ECHO_PORTS[0]),
    )
    client.set_sysctl(RANGE, "1024 65535")
    wanted = ceiling + surplus(lab_of, ceiling)
    load = client.start_engine(load_of(lab_of, where, SourceChoice.BIND), CarrierName.AUTO, 1)
    load.set_target(wanted)
    now = filled(load, wanted)
    if lab_of.wall is Wall.SERVER_DESCRIPTORS:
        # The client sees nothing of it: what the server cannot accept waits in its queue.
        now = settled(serving)
    answer = answer_of(now)
    after = facts(server)
    queued = sum(listener.queue for listener in after.listeners)
    reached = now.open_now if accepts else queued
    return Outcome(diagnosis=diagnosis, reached=reached, answer=answer, before=before, after=after)


def play_leftovers(lab_of: Scenario, client: LabHost, server: LabHost) -> Outcome:
    """Another program has most of the ports, or had them a moment ago; the doctor says how many are left."""
    wire(lab_of, client, server)
    where = space_of(lab_of, client)
    usable = ceiling_of(diagnose(facts(client), [client_goal(lab_of, CarrierName.AUTO)]))
    other = client.another().start_engine(load_of(lab_of, where, SourceChoice.KERNEL_RANGE), CarrierName.AUTO, 1)
    others = usable * 3 // 4
    other.set_target(others)
    filled(other, others)
    client.set_sysctl("net.ipv4.tcp_tw_reuse", lab_of.reuse)
    if lab_of.closed:
        other.close()
        other.join(PATIENCE_S)
        time.sleep(TIME_WAIT_REUSE_S)
        others = 0 if lab_of.reuse == 1 else others
    load = client.start_engine(load_of(lab_of, where), lab_of.carrier, 1)
    before = facts(client)
    diagnosis = diagnose(before, [client_goal(lab_of, load.carrier)])
    load.set_target(usable + 10)
    now = filled(load, usable + 10)
    pressures = [one for one in diagnosis.pressures if one.name == "ephemeral-ports"]
    used = pressures[0].used if pressures else 0
    return Outcome(
        diagnosis=diagnosis,
        reached=now.open_now + others,
        answer=answer_of(now),
        before=before,
        after=before,
        room=(usable - used, now.open_now),
    )


def play_exclusive(lab_of: Scenario, client: LabHost, server: LabHost) -> Outcome:
    """A program that binds its source address first, as plain sockets do it, to several destinations in turn."""
    wire(lab_of, client, server)
    source = client.links["server"].addresses[0]
    for port, address in zip(lab_of.listening_apart, itertools.cycle((LOOPBACK, source)), strict=False):
        client.listen(Endpoint(address, port))
    before = facts(client)
    goal = Goal(role=Role.CLIENT_MANY, destinations=lab_of.destinations, binds_first=True)
    diagnosis = diagnose(before, [goal])
    reached, said = 0, "ok"
    for destination in itertools.cycle(range(1, lab_of.destinations + 1)):
        there = Endpoint(ip_address(f"{DESTINATIONS[4]}{destination}"), ECHO_PORTS[0])
        said = client.connect_once(there, source=source, keep=True)
        if said != "ok" or reached > lab_of.size:
            break
        reached += 1
    # EADDRINUSE is what bind() says; connect() would say EADDRNOTAVAIL.
    return Outcome(diagnosis=diagnosis, reached=reached, answer=("bind", said), before=before, after=before)


PLAYS = {Wall.LEFTOVERS: play_leftovers, Wall.EXCLUSIVE: play_exclusive}


# How a lab is set up


def route(lab_of: Scenario, client: LabHost, server: LabHost) -> None:
    """The addresses of both, each reached by the other."""
    server.add_any_ip(SERVED[lab_of.version])
    if lab_of.aliases:
        client.add_addresses(AddressSet.parse(f"{ALIASES}1-{ALIASES}{lab_of.aliases}"))
    elif lab_of.sources > 1:
        client.add_any_ip(ANY_IP[lab_of.version])


def wire(lab_of: Scenario, client: LabHost, server: LabHost) -> None:
    """A client with its knobs turned, and a server that bounds nothing."""
    route(lab_of, client, server)
    server.set_sysctl("net.core.somaxconn", 65_535)
    everywhere = ip_address("0.0.0.0" if lab_of.version == 4 else "::")
    ports = PortSet.parse(f"{ECHO_PORTS[0]}-{ECHO_PORTS[1]}")
    echo = server.start_engine(EchoConfig(listen=tuple(Endpoint(everywhere, port) for port in ports), backlog=65_535))
    echo.wait_for(lambda one: one.listening_now >= ports.size, PATIENCE_S)
    client.set_sysctl(RANGE, f"{lab_of.low} {lab_of.high}")
    keep_time_wait(client)
    if lab_of.reserved:
        client.set_sysctl(RESERVED, lab_of.reserved)
    track(lab_of, client)
    elsewhere = Endpoint(ip_address(ELSEWHERE[lab_of.version]), ECHO_PORTS[0])
    for port in lab_of.listening:
        client.listen(Endpoint(everywhere, port))
    for port in lab_of.bound:
        client.bind(Endpoint(everywhere, port))
    for port in (*lab_of.connected, *lab_of.left):
        assert client.connect_once(elsewhere, source_port=port, keep=port in lab_of.connected) == "ok"


def keep_time_wait(host: LabHost) -> None:
    """Else one in a few hundred ends at once on a busy machine (RFC 1337): an ACK of the server's that comes behind its
    FIN is answered from TIME_WAIT, the server's socket is no more, and a RST comes back."""
    host.set_sysctl("net.ipv4.tcp_rfc1337", 1)


def turn_limits(lab_of: Scenario, host: LabHost) -> None:
    """RLIMIT_NOFILE, before the engine starts: a ring's table is as large as the limit was."""
    if lab_of.soft is not None:
        host.limit_descriptors(lab_of.soft, lab_of.soft if lab_of.hard_too else None)


def track(lab_of: Scenario, host: LabHost) -> None:
    """Have the host track connections, and its table hold entries of others."""
    if not lab_of.tracked or why_no_tracking():
        return
    rules = "table inet truth {\n chain every {\n type filter hook output priority 0;\n ct state new counter\n }\n}\n"
    subprocess.run(["nsenter", "-t", str(host.pid), "-n", nft(), "-f", "-"], input=rules, text=True, check=True)
    if lab_of.room is not None:
        most = facts(host).conntrack.maximum
        assert most is not None
        fill_table(host, most - lab_of.room)


def why_no_tracking() -> str:
    """Empty if the rules of a lab can be set from here."""
    if os.geteuid() != 0:
        return "setting rules in a namespace of the lab from outside needs root"
    return "" if nft() and which("nsenter") else "nft (package nftables) or nsenter (util-linux) is not installed"


def nft() -> str:
    """Where nft is."""
    return which("nft") or which("nft", path="/usr/sbin:/sbin") or ""


def space_of(lab_of: Scenario, client: LabHost) -> TupleSpace:
    """The names that the client may use; of several kinds of addresses, those that are not its own come last."""
    own = client.links["server"].addresses[lab_of.version == 6]
    if lab_of.sources == 1:
        sources = str(own)
    elif lab_of.wall is Wall.ADDRESSES:
        missing = lab_of.sources - lab_of.aliases - 1
        sources = f"{own},{ALIASES}1-{ALIASES}{lab_of.aliases},{NOT_OURS}1-{NOT_OURS}{missing}"
    elif lab_of.aliases:
        sources = f"{ALIASES}1-{ALIASES}{lab_of.sources}"
    else:
        sources = f"10.81.0.1-10.81.0.{lab_of.sources}" if lab_of.version == 4 else f"fd81::1-fd81::{lab_of.sources}"
    start = DESTINATIONS[lab_of.version]
    return TupleSpace(
        sources=AddressSet.parse(sources),
        source_ports=PortSet.parse(f"{lab_of.low}-{lab_of.high}"),
        destinations=AddressSet.parse(f"{start}1-{start}{lab_of.destination_addresses}"),
        destination_ports=PortSet.parse(f"{ECHO_PORTS[0]}-{ECHO_PORTS[0] + lab_of.destination_ports - 1}"),
    )


def load_of(lab_of: Scenario, where: TupleSpace, choice: SourceChoice | None = None) -> LoadConfig:
    """An engine that makes no connection before it is told how many."""
    return LoadConfig(
        space=where,
        connections=0,
        choice=choice or lab_of.choice,
        window=16 if lab_of.at_server else 64,
        give_up_after=16,
        connect_timeout_s=2.0,
    )


def client_goal(lab_of: Scenario, carrier: CarrierName) -> Goal:
    """What the client is going to do, in the doctor's words."""
    return Goal(
        role=Role.CLIENT_ONE if lab_of.destinations == 1 else Role.CLIENT_MANY,
        sources=lab_of.sources,
        destinations=lab_of.destinations,
        descriptors_per_connection=descriptors(carrier),
        uses_epoll=carrier is CarrierName.EPOLL,
        ipv6=lab_of.version == 6,
        searches_all_ports=lab_of.choice is SourceChoice.KERNEL_RANGE,
    )


def descriptors(carrier: CarrierName) -> int:
    """Of each connection."""
    return 1 if carrier is CarrierName.EPOLL else 0


# How the result is read


def facts(host: LabHost) -> Host:
    """The host as the doctor reads it; again where the machine was so busy that nft did not answer in time."""
    found = host.facts()
    for _ in range(5):
        if "nft did not list" not in found.unread.get("nft", ""):
            break
        found = host.facts()
    return found


def ceiling_of(diagnosis: Diagnosis) -> int:
    """The number predicted."""
    ceiling = diagnosis.roles[0].ceiling
    assert ceiling is not None
    assert ceiling < 300_000, f"nothing is to bind here: {diagnosis.roles[0].bounds[:3]}"
    return ceiling


def surplus(lab_of: Scenario, ceiling: int) -> int:
    """How many connections are asked for beyond the prediction."""
    return 100 + ceiling // 20 + 2 * lab_of.sources * lab_of.destinations


def filled(engine: RemoteEngine, wanted: int) -> Snapshot:
    """The engine's numbers once it has all that it was told to make, or was refused."""

    def is_over(now: Snapshot) -> bool:
        ended = now.open_now >= wanted or now.stopped_by is not None
        return ended and now.phase is Phase.HOLDING

    return engine.wait_for(is_over, PATIENCE_S)


def settled(engine: RemoteEngine) -> Snapshot:
    """The engine's numbers once they have stood still for a while."""
    last, since = engine.snapshot(), time.monotonic()
    while time.monotonic() - since < SETTLE_S:
        time.sleep(SETTLE_S / 10)
        now = engine.snapshot()
        if now.open_now != last.open_now:
            since = time.monotonic()
        last = now
    return last


def answer_of(now: Snapshot) -> tuple[str, str]:
    """What the kernel said: why the engine stopped, or what it met most often; nothing if nothing failed."""
    failures = sorted(now.failures, key=lambda failure: -failure.count)
    said = now.stopped_by or next(iter(failures), None)
    return ("", "") if said is None else (said.step, said.name)
