"""The private lab: hosts that are network namespaces, joined by links, gone without a trace when the lab is.

    with Lab(("client", "server")) as lab:
        lab["server"].add_any_ip("10.82.0.0/16")
        lab["client"].set_sysctl("net.ipv4.ip_local_port_range", "40000 40099")
        engine = lab["server"].start_engine(EchoConfig(...))

Decides which namespaces and links there are and what their addresses are. Knows nothing of what is proved in it.
Namespaces have no name and no file; they live as long as the agents in them, which end when this process does, even by
kill -9.

How long a lab takes to vanish is in `Lab.close`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network, summarize_address_range
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fourtuple.errors import BadConfig
from fourtuple.lab import operations
from fourtuple.lab.namespaces import Membership
from fourtuple.lab.operations import Opened
from fourtuple.lab.process import Agent, end_all
from fourtuple.lab.readings import UserMemory, descriptors_open, rss_bytes
from fourtuple.lab.remote import RemoteEngine
from fourtuple.tuples import AddressSet, Endpoint, IPAddress

if TYPE_CHECKING:
    from fourtuple.engine import CarrierName, CarrierSettings, EchoConfig, LoadConfig
    from fourtuple.facts import Host
    from fourtuple.host.apply import Step
    from fourtuple.host.journal import Entry
    from fourtuple.lab.wiring import IPNetwork

HOST_NAME = re.compile(r"[a-z][a-z0-9]{0,10}")
"""A link is called "to-" and the other host's name, and an interface's name has at most 15 bytes (IFNAMSIZ)."""
MOST_HOSTS = 16
QUICK_END_S = 2.0
PATIENT_END_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One host's end of the veth pair to another: the first address is IPv4, the second, if any, IPv6."""

    interface: str
    addresses: tuple[IPAddress, ...]
    peer_addresses: tuple[IPAddress, ...]

    def peer_address(self, version: int) -> IPAddress | None:
        """The other end's address of this family."""
        return next((address for address in self.peer_addresses if address.version == version), None)


class Lab:
    """Some hosts, each joined to every other by a link of its own; one host alone has its loopback.

    Starts the agents at once; use it with `with`. `user_namespaces` makes a user namespace even as root. Without root
    it is made because nothing else would do, and MissingPrivilege says what forbids even that.
    """

    def __init__(
        self,
        hosts: Iterable[str] = ("client", "server"),
        *,
        refuse_io_uring: bool = False,
        descriptors: int | None = None,
        user_namespaces: bool = False,
    ) -> None:
        names = _checked_names(hosts)
        self._refuse_io_uring = refuse_io_uring
        self._descriptors = descriptors
        self._agents: list[Agent] = []
        self._hosts: dict[str, LabHost] = {}
        try:
            first = self._start(names[0], Membership(new_user=user_namespaces))
            # A veth pair needs CAP_NET_ADMIN on both sides (rtnl_link_get_net_capable): one user namespace for all.
            self._user_of = first.pid if first.await_birth() else None
            others = [self._start(name, Membership(user_of=self._user_of)) for name in names[1:]]
            for agent in others:
                agent.await_birth()
            self._hosts = {agent.name: LabHost(self, agent) for agent in (first, *others)}
            with_ipv6 = [agent.ask(operations.prepare_network) for agent in self._agents]
            for number, (one, other) in enumerate(combinations(self._hosts.values(), 2)):
                _join(one, other, number, all(with_ipv6))
        except BaseException:
            self.close(QUICK_END_S)
            raise

    def __getitem__(self, name: str) -> LabHost:
        return self._hosts[name]

    @property
    def hosts(self) -> tuple[LabHost, ...]:
        """All hosts, in the order given."""
        return tuple(self._hosts.values())

    @property
    def in_user_namespace(self) -> bool:
        """Whether this lab got by without root."""
        return self._user_of is not None

    def close(self, timeout_s: float = PATIENT_END_S) -> tuple[int, ...]:
        """Kill every agent and wait for their processes to be gone, no longer than asked; again does no harm.

        Returns the pids that the kernel is still taking down: they are dead, hold nothing but their sockets, and need
        nobody to wait for them. Measured on two busy cores, established connections with both ends inside, carrier
        epoll: 2 x 19,000 sockets are gone in 0.4 s, 2 x 99,500 in 3.8 s; the namespaces themselves 0.6 s later.
        """
        agents, self._agents = self._agents, []
        return end_all(agents, timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After Ctrl-C nobody waits for the kernel to close a million sockets; else the next lab wants their memory.
        self.close(PATIENT_END_S if kind is None else QUICK_END_S)

    def _start(self, name: str, membership: Membership) -> Agent:
        agent = Agent(name, membership=membership, refuse_io_uring=self._refuse_io_uring, descriptors=self._descriptors)
        self._agents.append(agent)
        return agent

    def _another(self, host: LabHost) -> LabHost:
        membership = Membership(user_of=self._user_of, network_of=host.pid)
        agent = self._start(host.name, membership)
        agent.await_birth()
        return LabHost(self, agent, host.links)


class LabHost:
    """A host of a lab, through one process in it. Made by `Lab`.

    What an operation raises in the agent is raised here, same class, with the agent's trace in its notes. If the agent
    is dead, EngineStopped names the host, its process and the signal; LimitReached if memory ran out and the kernel
    killed it for that.
    """

    def __init__(self, lab: Lab, agent: Agent, links: dict[str, Link] | None = None) -> None:
        self._lab = lab
        self._agent = agent
        self.links: dict[str, Link] = {} if links is None else links
        """This host's ends of its links, by the other host's name."""

    def __repr__(self) -> str:
        return f"LabHost({self.name!r}, pid={self.pid})"

    @property
    def name(self) -> str:
        """The host's name; processes made by `another` share it."""
        return self._agent.name

    @property
    def pid(self) -> int:
        """The process."""
        return self._agent.pid

    def another(self) -> LabHost:
        """A further process in the same namespaces, with descriptors and limits of its own."""
        return self._lab._another(self)

    def kill(self, timeout_s: float = PATIENT_END_S) -> bool:
        """End this process before the lab ends; True if it is gone. Its namespaces go with the last process in them."""
        return not end_all([self._agent], timeout_s)

    def sysctl(self, name: str) -> str:
        """The value of a sysctl as this host sees it, whitespace folded to one blank."""
        return self._agent.ask(operations.sysctl, name)

    def set_sysctl(self, name: str, value: str | int) -> None:
        """Set a sysctl of this host and check it by reading back; an error names both and what is wrong."""
        self._agent.ask(operations.set_sysctl, name, str(value))

    def limit_descriptors(self, soft: int, hard: int | None = None) -> tuple[int, int]:
        """Set this process's RLIMIT_NOFILE; `hard` None leaves the hard limit. Returns both."""
        return self._agent.ask(operations.limit_descriptors, soft, hard)

    def add_addresses(self, addresses: AddressSet) -> None:
        """Make each address local, an alias of lo each, and have every other host route them here."""
        if not 1 <= addresses.size <= 65_536:
            raise BadConfig("addresses", f"{addresses.size:,} aliases; 1 to 65,536 are allowed, beyond that a prefix")
        self._agent.ask(operations.add_addresses, addresses)
        for first, last in addresses.ranges():
            for prefix in summarize_address_range(first, last):
                self._have_peers_route(prefix)

    def add_any_ip(self, prefix: str | IPNetwork) -> None:
        """Make every address of a prefix local with one route, and have every other host route it here.

        For IPv6 also sets net.ipv6.ip_nonlocal_bind, without which bind() refuses such addresses.
        """
        network = _network(prefix)
        self._agent.ask(operations.add_any_ip, network)
        self._have_peers_route(network)

    def route(self, prefix: str | IPNetwork, via: str | IPAddress) -> None:
        """Reach a prefix through a neighbour's address."""
        self._agent.ask(operations.route, _network(prefix), ip_address(via))

    def apply(self, steps: Sequence[Step], state: Path) -> tuple[Entry, ...]:
        """Apply settings to this host as `fourtuple tune` does, with the journal in the folder `state`."""
        return self._agent.ask(operations.apply_steps, tuple(steps), str(state))

    def undo(self, state: Path) -> tuple[Entry, ...]:
        """Take back what the journal in the folder `state` says."""
        return self._agent.ask(operations.undo_steps, str(state))

    def have_peers_route(self, prefix: str | IPNetwork) -> None:
        """Have every other host of the lab reach a prefix through this one."""
        self._have_peers_route(_network(prefix))

    def facts(self) -> Host:
        """This host as the doctor sees it, with this process as the one examined."""
        return self._agent.ask(operations.facts)

    def memory(self) -> UserMemory:
        """User memory of this process."""
        return self._agent.ask(operations.user_memory)

    def rss_bytes(self) -> int:
        """Resident memory of this process. Read from outside: it may have no descriptor left to read with."""
        return self._agent.read(rss_bytes)

    def descriptors_open(self) -> int:
        """Descriptors that this process has open. Counted from outside: it may have none left to count with."""
        return self._agent.read(descriptors_open)

    def open_sockets(self, count: int) -> Opened:
        """Open and hold so many TCP sockets with plain socket(); stop at the first error."""
        return self._agent.ask(operations.open_sockets, count)

    def listen(self, endpoint: Endpoint, backlog: int = 128) -> None:
        """Listen with a plain socket and hold it; nobody accepts."""
        self._agent.ask(operations.listen, endpoint, backlog)

    def bind(self, endpoint: Endpoint) -> None:
        """Bind a plain socket and hold it: its port is poisoned for automatic choice (catalogue A8)."""
        self._agent.ask(operations.bind, endpoint)

    def connect_once(
        self,
        destination: Endpoint,
        *,
        source: IPAddress | None = None,
        source_port: int = 0,
        timeout_s: float = 2.0,
        keep: bool = False,
    ) -> str:
        """One plain connect(): "ok" or the errno's name. The kernel chooses what is None or 0; `keep` holds it."""
        patience_s = timeout_s + 10.0
        return self._agent.ask_within(
            patience_s, operations.connect_once, destination, source, source_port, timeout_s, keep
        )

    def release(self) -> int:
        """Close all plain sockets that are held here; says how many."""
        return self._agent.ask(operations.release)

    def start_engine(
        self,
        config: LoadConfig | EchoConfig,
        carrier: CarrierName | None = None,
        workers: int | None = None,
        settings: CarrierSettings | None = None,
    ) -> RemoteEngine:
        """Start an engine in this process; `carrier` None is AUTO: the best that works here."""
        started = self._agent.ask(operations.start_engine, config, carrier, workers, settings)
        return RemoteEngine(self._agent, started)

    def _have_peers_route(self, prefix: IPNetwork) -> None:
        for host in self._lab.hosts:
            link = host.links.get(self.name)
            via = None if link is None else link.peer_address(prefix.version)
            if via is not None:
                host.route(prefix, via)


def _checked_names(hosts: Iterable[str]) -> tuple[str, ...]:
    names = tuple(hosts)
    if not 1 <= len(names) <= MOST_HOSTS:
        raise BadConfig("hosts", f"{len(names)} hosts; 1 to {MOST_HOSTS} are allowed")
    for name in names:
        if not HOST_NAME.fullmatch(name):
            raise BadConfig("hosts", f"{name!r}: a name is 1 to 11 of a-z and 0-9, a letter first")
    if len(set(names)) != len(names):
        raise BadConfig("hosts", f"{', '.join(names)}: each name may stand once")
    return names


def _join(one: LabHost, other: LabHost, number: int, has_ipv6: bool) -> None:
    """Make link `number` of the lab: 10.77.NUMBER.0/30 and fd77:0:0:NUMBER::/64."""
    texts = [(f"10.77.{number}.1/30", f"10.77.{number}.2/30")]
    if has_ipv6:
        texts.append((f"fd77:0:0:{number:x}::1/64", f"fd77:0:0:{number:x}::2/64"))
    ours = tuple(ip_interface(here) for here, _ in texts)
    theirs = tuple(ip_interface(there) for _, there in texts)
    our_name, their_name = f"to-{other.name}", f"to-{one.name}"
    one._agent.ask(operations.join_by_veth, our_name, their_name, other.pid)
    for host, peer, interface, here, there in (
        (one, other, our_name, ours, theirs),
        (other, one, their_name, theirs, ours),
    ):
        host._agent.ask(operations.raise_link, interface, here)
        host.links[peer.name] = Link(
            interface=interface,
            addresses=tuple(address.ip for address in here),
            peer_addresses=tuple(address.ip for address in there),
        )


def _network(prefix: str | IPNetwork) -> IPNetwork:
    try:
        return ip_network(prefix)
    except ValueError as error:
        raise BadConfig("prefix", f"{error}; a prefix is such as 10.81.0.0/16 or fd81::/64") from None
