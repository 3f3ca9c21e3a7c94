"""What a plan is: findings, the ceiling, changes; and the means that it may use.

Decides which fields a plan has, and that a plan file from elsewhere is a `Plan` or a clear error. Knows no arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fourtuple.errors import BadConfig
from fourtuple.facts import Change, Count, Facts, Goal, Host, Role
from fourtuple.tuples import AddressSet, Endpoint

MOST_MACHINES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What may be used to reach a goal: addresses, destinations, machines."""

    sources: AddressSet | None = None
    """Addresses that the plan may take, all machines together (`--from`); None: the host's own, and unnamed ones."""
    to: tuple[Endpoint, ...] = ()
    """The destinations by name; without names the goal's count."""
    machines: int | None = 1
    """How many share the goal; None: as many as it takes."""
    machine: int = 1
    """For which of them the changes are: each has its own share of `sources`."""

    def __post_init__(self) -> None:
        if self.machines is not None and not 1 <= self.machines <= MOST_MACHINES:
            raise BadConfig("--machines", f"{self.machines:,}: auto, or a number from 1 to {MOST_MACHINES:,}")
        if self.machine < 1 or (self.machines is not None and self.machine > self.machines):
            raise BadConfig("--machine", f"{self.machine:,}: from 1 to the number of machines")
        if len(set(self.to)) < len(self.to):
            raise BadConfig("--to", "names an endpoint twice; each may be named once")
        for one in self.to:
            if one.address not in _reachable(one.address.version):
                why = (
                    f"{one} is no destination: an address of one host is wanted, no wildcard, multicast or reserved one"
                )
                raise BadConfig("--to", why)
        versions = {one.address.version for one in self.to} | ({self.sources.version} if self.sources else set())
        if len(versions) > 1:
            raise BadConfig("--to", "mixes IPv4 and IPv6 with itself or with --from; make a plan for each family")
        if self.sources is not None:
            self._check_sources(self.sources)

    def _check_sources(self, sources: AddressSet) -> None:
        """BadConfig where an address cannot be the source of a connection to these destinations."""
        local = bool(self.to) and all(one.address.is_loopback for one in self.to)
        allowed = _reachable(sources.version) if local else AddressSet.usable(sources.version)
        if unusable := sources.subtract(allowed):
            kinds = "wildcard, multicast or reserved" if local else "loopback, wildcard, multicast or reserved"
            why = f"{str(unusable)[:80]} cannot be sources of connections to other hosts: they are {kinds}"
            raise BadConfig("--from", why)
        for one in self.to:
            if one.address in sources and not local:
                why = f"holds {one.address}, a destination: made local, it could not be reached any more"
                raise BadConfig("--from", why)

    def check(self, goal: Goal) -> None:
        """BadConfig where these means contradict the goal."""
        if goal.connections is None or goal.connections < 1:
            raise BadConfig("--connections", "0: a goal of 1 connection or more is wanted")
        if goal.role is Role.SERVER and (self.to or self.sources):
            raise BadConfig("--role", "server: its clients bring addresses and ports; leave out --to and --from")
        if goal.role is Role.NAT and self.sources is not None and len(self.sources.runs) > 1:
            raise BadConfig("--from", f"{str(self.sources)[:80]}: source NAT takes one range of addresses")
        if self.machines is not None and goal.connections < self.machines:
            raise BadConfig("--machines", f"{self.machines:,} for {goal.connections:,} connections: at most one each")
        if self.sources is not None and self.machines is not None and self.sources.size < self.machines:
            why = f"{self.sources.size:,} addresses for {self.machines:,} machines: each needs one of its own"
            raise BadConfig("--from", why)


def _reachable(version: int) -> AddressSet:
    """Addresses that a connection of this host may go to: those of other hosts, and loopback."""
    return AddressSet.usable(version).union(AddressSet.parse("127.0.0.0/8" if version == 4 else "::1"))


class HostMark(Facts):
    """By what a plan knows the host that it was made for."""

    label: str = ""
    kernel: str
    cpus: Count
    memory_total_bytes: Count | None
    initial_network_namespace: bool | None = None

    @classmethod
    def of(cls, host: Host) -> HostMark:
        """The mark of this host."""
        return cls(
            label=host.label,
            kernel=host.kernel.release,
            cpus=host.machine.cpus,
            memory_total_bytes=host.machine.memory_total_bytes,
            initial_network_namespace=host.isolation.initial_network_namespace,
        )


class Finding(Facts):
    """A limit that falls short of the goal: what it allows each machine before the changes, and after them."""

    limit: str
    name: str
    title: str
    before: Count
    after: Count | None
    """None: it does not bind any more."""
    arithmetic: str
    per_second: bool = False


class Balancer(Facts):
    """What stands in front of several serving machines has to hold, in its two forms."""

    connections: Count
    passes_on: str
    """Forwarding packets: table entries and their memory."""
    relays: str
    """Ending connections and opening others: sockets, memory, source addresses."""
    relay_machines: Count
    """Machines of this host's shape that relay."""
    relay_sources_each: Count
    """Source addresses that each of these needs towards the serving machines."""


class Plan(Facts):
    """The whole answer for one goal on one host, or on several of its shape."""

    schema_version: int = 1
    goal: Goal
    """As it was asked."""
    host: HostMark
    machines: Annotated[int, Field(ge=1, le=MOST_MACHINES)]
    machine: Annotated[int, Field(ge=1, le=MOST_MACHINES)] = 1
    share: Goal
    """One machine's part of it, with the source addresses that it uses after the changes."""
    reached: bool
    ceiling_before: Count | None
    """Connections that one machine allows as it is; None if no limit could be read."""
    ceiling: Count
    """Connections that one machine allows after the changes."""
    total: Count
    """Connections that all machines together hold, at most the goal."""
    stopped_by: str = ""
    """Name and arithmetic of the limit that no change raises; "" where the goal is reached."""
    findings: tuple[Finding, ...] = ()
    """Limits that fall short, in the order in which they were met."""
    changes: tuple[Change, ...] = ()
    """In the order in which they have to be made."""
    sources: str = ""
    """The source addresses of this machine, as "10.0.0.1-10.0.0.32"; "" where the host's one is enough."""
    destinations: tuple[Endpoint, ...] = ()
    memory_bytes: Count
    """What the connections of one machine take."""
    memory_arithmetic: str
    unknown: tuple[str, ...] = ()
    """Limits that bind and cannot be read from here."""
    notes: tuple[str, ...] = ()
    balancer: Balancer | None = None
