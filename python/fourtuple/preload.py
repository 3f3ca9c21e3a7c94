"""What a program that cannot be changed is started with, so that it uses the tuple space, or gets its clients from a
broker: the environment of the preload library.

Decides which sources, ports, listeners and programs that can work with, and says of the others what can. Starts
nothing. What the library then does per connection is in `crates/preload`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

from fourtuple.errors import BadConfig, MissingFeature
from fourtuple.facts import Address
from fourtuple.host.addresses import read_addresses
from fourtuple.host.programs import Program, read_program
from fourtuple.host.trials import read_features
from fourtuple.tuples import AddressSet, Endpoint, PortSet

SOURCES, PORTS, PRELOAD = "FOURTUPLE_SOURCES", "FOURTUPLE_PORTS", "LD_PRELOAD"
HANDOFF, MODE = "FOURTUPLE_HANDOFF", "FOURTUPLE_HANDOFF_MODE"
MOST_RANGES = 64
"""MOST_RUNS in crates/preload/src/sources.rs: the library keeps them in a table that is never allocated."""
MOST_HANDOFFS = 16
"""Likewise, in crates/preload/src/handoffs.rs."""
MOST_PATH_BYTES = 107
"""sun_path with its zero byte, unix(7)."""
LIBRARY = Path(__file__).parent / "libfourtuple_preload.so"

_LOOPBACK = {4: "127.0.0.0/8", 6: "::1"}
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
SOURCES_OTHERWISE = (
    "What works for any program: --by cgroup, where a BPF program may be attached; SNAT to several addresses "
    "(fourtuple limits show G4); or one network namespace per source address (fourtuple limits show A20)."
)
HANDOFF_OTHERWISE = (
    'What works for any program: delivery = "relay", with a PROXY header if it reads one (docs/broker.md).'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where connections may come from: at most one set of each family, and the ports, None for all that there are."""

    addresses: tuple[AddressSet, ...]
    ports: PortSet | None = None

    @classmethod
    def parse(cls, addresses: Iterable[str], ports: str | None = None) -> Sources:
        """Read "10.81.0.0/16", "10.7.0.1-10.7.0.9,fd81::/64" and the like, and ports such as "40000-49999"."""
        by_version: dict[int, AddressSet] = {}
        for part in (part for text in addresses for part in text.split(",")):
            one = _addresses(part)
            known = by_version.get(one.version)
            by_version[one.version] = one if known is None else known.union(one)
        if not by_version:
            raise BadConfig("--from", "one or more addresses, ranges or prefixes are needed, such as 10.81.0.0/16")
        for version, found in by_version.items():
            usable = AddressSet.usable(version).union(AddressSet.parse(_LOOPBACK[version]))
            if useless := found.subtract(usable):
                raise BadConfig("--from", f"no connection can come from {_excerpt(useless)}")
            if len(found.runs) > MOST_RANGES:
                raise BadConfig("--from", f"{len(found.runs)} separate ranges; up to {MOST_RANGES} are allowed")
        return cls(addresses=tuple(by_version.values()), ports=None if ports is None else _port_range(ports))

    def require_local(self, own: Iterable[Address]) -> None:
        """BadConfig if a source is no address of this host, given the addresses and local routes that it has."""
        prefixes = [f"{one.address}/{one.prefix_length}" if one.any_ip else one.address for one in own]
        networks = [ip_network(prefix, strict=False) for prefix in (*prefixes, *_LOOPBACK.values())]
        for wanted in self.addresses:
            runs = tuple((int(n[0]), int(n[-1])) for n in networks if n.version == wanted.version)
            if foreign := wanted.subtract(AddressSet(version=wanted.version, runs=runs)):
                example = "10.81.0.0/16" if wanted.version == 4 else "fd81::/64"
                raise BadConfig(
                    "--from",
                    f"not an address of this host: {_excerpt(foreign)}. One route makes a whole prefix local: "
                    f"ip route add local {example} dev lo; its peers need a route back to it",
                )

    def require_within(self, low: int, high: int) -> None:
        """BadConfig if a port lies outside net.ipv4.ip_local_port_range, where the kernel would ignore the bound."""
        if self.ports is not None and self.ports.subtract(PortSet(runs=((low, high),))):
            raise BadConfig(
                "--range",
                f"{self.ports} is not within net.ipv4.ip_local_port_range, {low}-{high} here, and the kernel ignores a "
                f'bound outside it (A4); widen that first: sysctl -w net.ipv4.ip_local_port_range="1024 65535"',
            )

    def environment(self) -> dict[str, str]:
        """What the library reads; an empty value stands for none."""
        return {
            SOURCES: ",".join(map(str, self.addresses)),
            PORTS: "" if self.ports is None else "{}-{}".format(*self.ports.ranges()[0]),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoffs:
    """Listeners of the program, each with the path at which a broker hands its clients over; who may do that."""

    paths: tuple[tuple[str, str], ...]
    mode: int | None = None

    @classmethod
    def parse(cls, texts: Iterable[str], mode: str | None = None) -> Handoffs:
        """Read "127.0.0.1:80=/run/web" or "/run/app.sock=/run/app", and permissions such as "660"."""
        paths = tuple(_handoff(text) for text in texts)
        if len(paths) > MOST_HANDOFFS:
            raise BadConfig("--handoff", f"{len(paths)} listeners; up to {MOST_HANDOFFS} are allowed")
        listeners = [listener for listener, _ in paths]
        for listener in listeners:
            if listeners.count(listener) > 1:
                raise BadConfig("--handoff", f"{listener} is there twice")
        if mode is not None and not re.fullmatch(r"[0-7]{3}", mode):
            raise BadConfig("--mode", f"{mode[:40]!r}: three octal digits are needed, such as 660")
        return cls(paths=paths, mode=None if mode is None else int(mode, 8))

    def environment(self) -> dict[str, str]:
        """What the library reads; an empty value stands for none."""
        return {
            HANDOFF: ",".join(f"{listener}={path}" for listener, path in self.paths),
            MODE: "" if self.mode is None else f"{self.mode:o}",
        }


def environment(old: Mapping[str, str], *wanted: Sources | Handoffs) -> dict[str, str]:
    """The environment for the program: the old one, with the library and what it needs to know."""
    if not LIBRARY.is_file():
        raise MissingFeature(f"the preload library is not installed: {LIBRARY} is missing; install fourtuple again")
    library = str(LIBRARY)
    if set(library) & set(": "):
        raise MissingFeature(f"{PRELOAD} cannot hold a path with a blank or colon (ld.so(8)): {library}")
    others = [other for other in old.get(PRELOAD, "").replace(" ", ":").split(":") if other not in ("", library)]
    new = {**old, PRELOAD: ":".join([library, *others])}
    for one in wanted:
        new.update(one.environment())
    # An outer one's ports are not ours.
    return {name: value for name, value in new.items() if value or name not in (PORTS, MODE)}


def require_host(sources: Sources) -> None:
    """BadConfig or MissingFeature if this host has not these sources and ports."""
    try:
        own, complete = read_addresses()
    except OSError as error:
        raise MissingFeature(f"the addresses of this host cannot be read: {error.strerror}") from None
    if complete:
        sources.require_local(own)
    features = read_features(None)
    if not features["bind_address_no_port"]:
        raise MissingFeature("this kernel has no IP_BIND_ADDRESS_NO_PORT (Linux 4.2)")
    if sources.ports is not None:
        if not features["local_port_range"]:
            raise MissingFeature("--range needs IP_LOCAL_PORT_RANGE (Linux 6.3), which this kernel has not")
        low, high = _PORT_RANGE.read_text(encoding="ascii").split()
        sources.require_within(int(low), int(high))


def require_loadable(path: Path, otherwise: str) -> Program:
    """What the program is; MissingFeature if no library of ours can work in it, with what can be done instead."""
    program, ours = read_program(path), read_program(Path(sys.executable))
    if not program.loader:
        reason = "is linked statically, so no library can be loaded into it"
    elif program.made_by_go:
        reason = "is written in Go, which makes system calls without libc, so that none can be intercepted"
    elif (program.bits, program.machine) != (ours.bits, ours.machine):
        reason = "is for another processor or word size than the library that would be loaded into it"
    elif ours.libc and program.libc != ours.libc:
        reason = f"uses {program.libc}, and the library that would be loaded into it uses {ours.libc}"
    elif program.takes_on_rights:
        reason = "takes on other rights when it starts (set-user-id or file capabilities), so libraries are not loaded"
    else:
        return program
    name = str(path) if program.path == path else f"{path} runs {program.path}, which"
    raise MissingFeature(f"{name} {reason}. {otherwise}")


def _addresses(text: str) -> AddressSet:
    try:
        return AddressSet.parse(text)
    except BadConfig as problem:
        raise BadConfig("--from", problem.why) from None


def _port_range(text: str) -> PortSet:
    try:
        ports = PortSet.parse(text)
    except BadConfig as problem:
        raise BadConfig("--range", problem.why) from None
    if len(ports.runs) != 1:
        raise BadConfig("--range", f"{text[:40]!r}: one range is allowed, such as 40000-49999 (A4)")
    return ports


def _handoff(text: str) -> tuple[str, str]:
    listener, sign, path = (part.strip() for part in text.partition("="))
    if not sign:
        raise BadConfig("--handoff", f"{text[:80]!r}: LISTENER=PATH is needed, such as 127.0.0.1:80=/run/web")
    path = str(Path(path).absolute()) if path else ""
    if listener.startswith("/"):
        if not _may_be_bound(listener) or listener == path:
            raise BadConfig("--handoff", f"{listener[:80]!r} is no path of a socket, or the same on both sides")
    else:
        reason = "what the program listens on is needed, as `ss -ltn` shows it: ADDRESS:PORT, or an absolute path"
        try:
            end = Endpoint.parse(listener)
        except BadConfig:
            raise BadConfig("--handoff", f"{listener[:80]!r}: {reason}") from None
        if getattr(end.address, "scope_id", None):
            raise BadConfig("--handoff", f"{listener[:80]!r}: an address of one link only is not possible")
        listener = str(end)
    if not _may_be_bound(path):
        raise BadConfig(
            "--handoff", f"{path[:120]!r} is no path for a socket: {MOST_PATH_BYTES} bytes, no comma and no ="
        )
    return listener, path


def _may_be_bound(path: str) -> bool:
    """The library cuts its variable, which is UTF-8, at commas and equal signs."""
    if not path.startswith("/") or not path.isprintable() or set(path) & set(",="):
        return False
    return len(os.fsencode(path)) <= MOST_PATH_BYTES


def _excerpt(addresses: AddressSet) -> str:
    text = ", ".join(str(addresses).split(",")[:3])
    return text if len(addresses.runs) <= 3 else f"{text} and more"
