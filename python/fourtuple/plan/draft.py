"""A plan in the making: the host and the goal as they would be after the changes so far.

Decides how a change shows in the facts, so that the catalogue can be asked again. Knows no rule and no limit's number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network, summarize_address_range

from fourtuple.facts import Address, Change, ChangeKind, Goal, Host, RLimit, Role
from fourtuple.limits import by_name
from fourtuple.plan.model import Means
from fourtuple.tuples import AddressSet, IPAddress

SYSCTL_FILE = "/etc/sysctl.d/60-fourtuple.conf"
UNIT_FILE = "the service's drop-in, or the container's runtime"
ADDRESS_FILE = "fourtuple-addresses.service, or systemd-networkd"
NONLOCAL_BIND_6 = "net.ipv6.ip_nonlocal_bind"
HOST_WIDE = (
    "fs.",
    "kernel.",
    "vm.",
    "net.ipv4.tcp_mem",
    "net.netfilter.nf_conntrack_max",
    "net.netfilter.nf_conntrack_buckets",
)
"""Not a network namespace's own: from inside a container they are read-only (catalogue section 5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Facts and goal as they would be, and the changes that made them so."""

    found: Host
    """The host as it is."""
    host: Host
    goal: Goal
    means: Means
    changes: tuple[Change, ...] = ()
    sources: AddressSet | None = None
    unnamed_sources: int = 0
    """Source addresses that are needed beyond those that have a name."""

    @property
    def wanted(self) -> int:
        """Connections of one machine."""
        return self.goal.connections or 0

    def with_change(self, change: Change) -> Draft:
        """With one change more. The same knob raised again keeps what it was at first, and its place."""
        for place, earlier in enumerate(self.changes):
            if (earlier.kind, earlier.knob) == (change.kind, change.knob):
                later = change.model_copy(update={"old": earlier.old})
                return replace(self, changes=(*self.changes[:place], later, *self.changes[place + 1 :]))
        return replace(self, changes=(*self.changes, change))

    def with_sysctl(self, name: str, value: str, limit: str, arithmetic: str) -> Draft:
        """With a sysctl set; from inside a container one of the whole host's is for somebody else to set."""
        outside = name.startswith(HOST_WIDE) and self.host.isolation.initial_network_namespace is False
        kind = ChangeKind.ELSEWHERE if outside else ChangeKind.SYSCTL
        persist = f"{SYSCTL_FILE}, on the host itself" if outside else SYSCTL_FILE
        old = self.host.sysctl.get(name, "")
        changed = self.with_change(_change(kind, name, old, value, limit, arithmetic, persist))
        update = {"sysctl": self.host.sysctl | {name: value}}
        return replace(changed, host=self.host.model_copy(update=update))

    def with_descriptors(self, count: int, limit: str, arithmetic: str) -> Draft:
        """With the descriptors of the process raised, soft and hard."""
        found = self.host.process.rlimits.get("NOFILE")
        old = "" if found is None else f"{_or_infinity(found.soft)}:{_or_infinity(found.hard)}"
        hard = count if found is None or found.hard is not None else None
        change = _change(ChangeKind.UNIT, "LimitNOFILE", old, str(count), limit, arithmetic, UNIT_FILE)
        rlimits = self.host.process.rlimits | {"NOFILE": RLimit(soft=count, hard=hard)}
        process = self.host.process.model_copy(update={"rlimits": rlimits})
        return replace(self.with_change(change), host=self.host.model_copy(update={"process": process}))

    def with_memory_max(self, size_bytes: int, limit: str, arithmetic: str) -> Draft:
        """With the memory limit of the cgroup raised."""
        if self.host.cgroup is None:
            return self
        old = str(self.host.cgroup.memory_max_bytes)
        change = _change(ChangeKind.UNIT, "MemoryMax", old, str(size_bytes), limit, arithmetic, UNIT_FILE)
        cgroup = self.host.cgroup.model_copy(update={"memory_max_bytes": size_bytes})
        return replace(self.with_change(change), host=self.host.model_copy(update={"cgroup": cgroup}))

    def with_kmem_tcp(self, size_bytes: int, limit: str, arithmetic: str) -> Draft:
        """With the TCP limit of a version 1 cgroup raised."""
        if self.host.cgroup is None:
            return self
        knob, old = "memory.kmem.tcp.limit_in_bytes", str(self.host.cgroup.kmem_tcp_limit_bytes)
        change = _change(
            ChangeKind.ELSEWHERE, knob, old, str(size_bytes), limit, arithmetic, "whoever makes the cgroup"
        )
        cgroup = self.host.cgroup.model_copy(update={"kmem_tcp_limit_bytes": size_bytes})
        return replace(self.with_change(change), host=self.host.model_copy(update={"cgroup": cgroup}))

    def with_tracked(self, entries: int, limit: str, arithmetic: str) -> Draft:
        """With a larger table of tracked connections."""
        name = "net.netfilter.nf_conntrack_max"
        changed = self.with_sysctl(name, str(entries), limit, arithmetic)
        tracking = self.host.conntrack.model_copy(update={"loaded": True, "maximum": entries})
        return replace(changed, host=changed.host.model_copy(update={"conntrack": tracking}))

    def with_program(self, knob: str, old: str, new: str, limit: str, arithmetic: str, **goal: object) -> Draft:
        """With the program doing otherwise, which the goal then says."""
        change = _change(ChangeKind.PROGRAM, knob, old, new, limit, arithmetic, "the program")
        return replace(self.with_change(change), goal=self.goal.model_copy(update=goal))

    def with_rules(self, knob: str, old: str, new: str, limit: str, arithmetic: str) -> Draft:
        """With rules of the firewall."""
        return self.with_change(_change(ChangeKind.RULES, knob, old, new, limit, arithmetic, "/etc/nftables.conf"))

    def own_addresses(self) -> tuple[IPAddress, ...]:
        """Addresses of the goal's family that the host can use towards others."""
        found: dict[IPAddress, None] = {}
        for address in self.host.addresses:
            try:
                parsed = ip_address(address.address)
            except ValueError:
                continue
            beyond = not (parsed.is_loopback or parsed.is_link_local or address.any_ip)
            if parsed.version == (6 if self.goal.ipv6 else 4) and beyond:
                found[parsed] = None
        return tuple(found)

    def with_sources(self, count: int, limit: str, arithmetic: str) -> Draft:
        """With so many source addresses: of `--from` where it was given, else the host's own and unnamed ones.

        Fewer where `--from` has no more: then the limit stays short, and the plan says so.
        """
        own = self.own_addresses()
        pool = self.means.sources
        if pool is not None:
            chosen = pool.between(0, count)
        elif own:
            chosen = AddressSet.of(*own[:count])
        else:
            chosen = AddressSet(version=6 if self.goal.ipv6 else 4)
        unnamed = count - chosen.size if pool is None else 0
        taken = chosen.size + unnamed
        draft = replace(self, sources=chosen, unnamed_sources=unnamed)
        kept = tuple(one for one in self.changes if one.kind is not ChangeKind.LOCAL_PREFIX)
        draft = replace(draft, changes=kept, host=self.host.model_copy(update={"addresses": self.found.addresses}))
        missing = chosen.subtract(local_addresses(self.found, chosen.version))
        for first, last in missing.ranges():
            for prefix in summarize_address_range(first, last):
                draft = draft._with_local_prefix(str(prefix), limit, arithmetic)
        if missing and missing.version == 6 and self.found.sysctl.get(NONLOCAL_BIND_6, "").strip() != "1":
            why = "bind() refuses an address of a local IPv6 prefix without it, unless the socket sets IPV6_FREEBIND"
            draft = draft.with_sysctl(NONLOCAL_BIND_6, "1", "A17", why)
        if unnamed:
            knob, old = "source addresses", f"{chosen.size:,}"
            place = "your network; name them with --from for the files to hold them"
            draft = draft.with_change(
                _change(ChangeKind.ELSEWHERE, knob, old, f"{taken:,}", limit, arithmetic, place)
            )._as_if_local()
        if taken > 1 and self.goal.role is not Role.NAT:
            knob = "choice of the source"
            new = f"bind() to one of {taken:,} addresses, with IP_BIND_ADDRESS_NO_PORT"
            why = "an unbound connect() always takes the one address of its route"
            draft = draft.with_program(knob, "the kernel's", new, "A18", why)
        return replace(draft, goal=draft.goal.model_copy(update={"sources": max(1, taken)}))

    def _with_local_prefix(self, prefix: str, limit: str, arithmetic: str) -> Draft:
        change = _change(ChangeKind.LOCAL_PREFIX, prefix, "", "local", limit, arithmetic, ADDRESS_FILE)
        address, _, length = prefix.partition("/")
        local = Address(interface="lo", address=address, prefix_length=int(length), any_ip=True)
        host = self.host.model_copy(update={"addresses": (*self.host.addresses, local)})
        return replace(self.with_change(change), host=host)

    def _as_if_local(self) -> Draft:
        """The catalogue is not to count missing addresses twice: the change above asks for them already."""
        local = Address(interface="", address="::" if self.goal.ipv6 else "0.0.0.0", prefix_length=0, any_ip=True)
        return replace(self, host=self.host.model_copy(update={"addresses": (*self.host.addresses, local)}))


def local_addresses(host: Host, version: int) -> AddressSet:
    """Every address that is bindable already: the host's own, and those of its local prefixes."""
    known = AddressSet(version=version)
    for one in host.addresses:
        text = f"{one.address}/{one.prefix_length}" if one.any_ip else one.address
        try:
            network = ip_network(text, strict=False)
        except ValueError:
            continue
        if network.version == version:
            known = known.union(AddressSet.parse(str(network)))
    return known


def _change(kind: ChangeKind, knob: str, old: str, new: str, limit: str, arithmetic: str, persist: str) -> Change:
    entry = by_name(limit)
    if entry is None:
        raise AssertionError(f"no limit is called {limit}")
    return Change(
        kind=kind,
        knob=knob,
        scope=entry.scope.value,
        old=old,
        new=new,
        limit=entry.id,
        name=entry.name,
        arithmetic=arithmetic,
        persist=persist,
    )


def _or_infinity(limit: int | None) -> str:
    return "infinity" if limit is None else str(limit)
