"""What an agent can be asked: one function per operation, and `OPERATIONS`, the table of them.

Decides what each operation does inside the namespace. Knows nothing of processes, of the parent or of how requests
arrive. Every function takes what the agent holds (`Held`) first; the parent names the functions themselves, so that the
types of a call are checked across the process boundary. Heavy modules are imported where they are used.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourtuple.errors import BadConfig, MissingFeature, MissingPrivilege
from fourtuple.lab import readings
from fourtuple.tuples import AddressSet, Endpoint, IPAddress

if TYPE_CHECKING:
    from fourtuple.engine import CarrierName, CarrierSettings, EchoConfig, Engine, LoadConfig, Snapshot
    from fourtuple.facts import Host
    from fourtuple.host.apply import Step
    from fourtuple.host.journal import Entry
    from fourtuple.lab.wiring import IPInterface, IPNetwork


@dataclass(slots=True)
class Held:
    """What an agent holds between two requests."""

    sockets: list[socket.socket] = field(default_factory=list)
    engines: dict[int, Engine] = field(default_factory=dict)
    last_engine: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """How far a series of sockets came, and the errno's name that ended it ("" if nothing did)."""

    count: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An engine that was started: its number in the agent, and what its `Engine` says once."""

    number: int
    carrier: CarrierName
    fallback_reason: str
    workers: int


# Settings


def sysctl(held: Held, name: str) -> str:
    """The value of a sysctl as this namespace sees it, whitespace folded to one blank."""
    path = _sysctl_path(name)
    try:
        return " ".join(path.read_text(encoding="ascii", errors="replace").split())
    except FileNotFoundError:
        raise MissingFeature(_no_such_sysctl(name)) from None
    except OSError as error:
        raise MissingPrivilege(f"{name} cannot be read here: {error.strerror}") from None


def set_sysctl(held: Held, name: str, value: str) -> None:
    """Set a sysctl of this namespace and read it back. Only net.*: all else would change the host."""
    if not re.match(r"net[./]", name):
        raise BadConfig(name, "a lab sets sysctls of its own namespaces, whose names begin with net.")
    try:
        descriptor = os.open(_sysctl_path(name), os.O_WRONLY)
        try:
            os.write(descriptor, value.encode())  # one write: the kernel takes each as a whole value
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise MissingFeature(_no_such_sysctl(name)) from None
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "?")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise MissingPrivilege(f"{name} cannot be set to {value!r} in this namespace ({code})") from None
        raise BadConfig(name, f"the kernel refuses {value!r} ({code})") from None
    found = sysctl(held, name)
    if _comparable(name, found) != _comparable(name, value):
        raise BadConfig(name, f"{value!r} was written but {found!r} is read back: the kernel adjusts such a value")


def limit_descriptors(held: Held, soft: int, hard: int | None) -> tuple[int, int]:
    """Set RLIMIT_NOFILE; `hard` None leaves the hard limit. Returns both as they are now."""
    _, old_hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    new_hard = old_hard if hard is None else hard
    if not 0 <= soft <= new_hard:
        raise BadConfig("descriptors", f"{soft:,} is not from 0 to the hard limit, {new_hard:,}")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, new_hard))
    except ValueError:
        why = f"raising the hard limit of descriptors from {old_hard:,} to {new_hard:,} needs CAP_SYS_RESOURCE"
        raise MissingPrivilege(why) from None
    return resource.getrlimit(resource.RLIMIT_NOFILE)


# Wiring


def prepare_network(held: Held) -> bool:
    """Make a new namespace ready: lo is up, and it can vanish; says whether the kernel has IPv6.

    A socket whose process is gone keeps its namespace alive until its FIN is acknowledged, and once the other host of a
    dead lab has gone nobody does: 100 s of eight retries (tcp_orphan_retries). One retry makes it less than a second.
    """
    from fourtuple.lab import wiring

    set_sysctl(held, "net.ipv4.tcp_orphan_retries", "1")
    wiring.raise_loopback()
    return wiring.has_ipv6()


def join_by_veth(held: Held, interface: str, peer_interface: str, peer_pid: int) -> None:
    """Make a veth pair to the namespace of another process."""
    from fourtuple.lab import wiring

    wiring.join_by_veth(interface, peer_interface, peer_pid)


def raise_link(held: Held, interface: str, addresses: tuple[IPInterface, ...]) -> None:
    """Give a link its addresses and set it up."""
    from fourtuple.lab import wiring

    wiring.raise_link(interface, addresses)


def add_addresses(held: Held, addresses: AddressSet) -> None:
    """Put each address on lo, one alias each."""
    from fourtuple.lab import wiring

    wiring.add_aliases(tuple(addresses))


def add_any_ip(held: Held, prefix: IPNetwork) -> None:
    """Make a whole prefix local with one route."""
    from fourtuple.lab import wiring

    wiring.add_local_prefix(prefix)


def route(held: Held, prefix: IPNetwork, via: IPAddress) -> None:
    """Reach a prefix through a neighbour."""
    from fourtuple.lab import wiring

    wiring.add_route(prefix, via)


def apply_steps(held: Held, steps: Sequence[Step], state: str) -> tuple[Entry, ...]:
    """Apply settings as `fourtuple tune` does, with the journal in a folder. Only what is this namespace's own."""
    from fourtuple.host.apply import apply
    from fourtuple.host.knobs import KnobKind

    for step in steps:
        if step.kind is KnobKind.FILE or (step.kind is KnobKind.SYSCTL and not step.name.startswith("net.")):
            raise BadConfig(
                step.name, "a lab changes its own namespaces only: sysctls that begin with net., and routes"
            )
    return apply(steps, state=Path(state))


def undo_steps(held: Held, state: str) -> tuple[Entry, ...]:
    """Take back what the journal in a folder says."""
    from fourtuple.host.apply import undo

    return undo(state=Path(state))


# Readings


def facts(held: Held) -> Host:
    """This namespace's host as the doctor sees it, this process being the one examined."""
    from fourtuple.host import read_host

    return read_host()


def user_memory(held: Held) -> readings.UserMemory:
    """Memory of this process."""
    return readings.user_memory()


# Plain sockets: what any program without an engine of its own meets


def open_sockets(held: Held, count: int) -> Opened:
    """Open and hold so many TCP sockets, unconnected; stop at the first error."""
    for made in range(count):
        try:
            held.sockets.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        except OSError as error:
            return Opened(count=made, error=_errno_name(error))
    return Opened(count=count, error="")


def listen(held: Held, endpoint: Endpoint, backlog: int) -> None:
    """Listen and hold the listener; nobody accepts, so that the accept queue bounds what connects."""
    listener = socket.socket(_family(endpoint.address), socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(endpoint.address), endpoint.port))
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    held.sockets.append(listener)


def bind(held: Held, endpoint: Endpoint) -> None:
    """Bind a plain socket and hold it, neither listening nor connected."""
    one = socket.socket(_family(endpoint.address), socket.SOCK_STREAM)
    try:
        one.bind((str(endpoint.address), endpoint.port))
    except OSError:
        one.close()
        raise
    held.sockets.append(one)


def connect_once(
    held: Held,
    destination: Endpoint,
    source: IPAddress | None,
    source_port: int,
    timeout_s: float,
    keep: bool,
) -> str:
    """One blocking connect: "ok" or the errno's name. `source_port` 0 leaves the port to the kernel."""
    attempt = socket.socket(_family(destination.address), socket.SOCK_STREAM)
    try:
        attempt.settimeout(timeout_s)
        if source is not None or source_port:
            # SO_REUSEADDR lets one port serve many destinations: the tuple, not the port, has to be free (A10).
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            wildcard = "0.0.0.0" if destination.address.version == 4 else "::"
            attempt.bind((wildcard if source is None else str(source), source_port))
        attempt.connect((str(destination.address), destination.port))
    except TimeoutError:
        attempt.close()
        return "ETIMEDOUT"
    except OSError as error:
        attempt.close()
        return _errno_name(error)
    if keep:
        held.sockets.append(attempt)
    else:
        attempt.close()
    return "ok"


def release(held: Held) -> int:
    """Close every plain socket that is held; says how many."""
    count = len(held.sockets)
    for one in held.sockets:
        one.close()
    held.sockets.clear()
    return count


# Engines


def start_engine(
    held: Held,
    config: LoadConfig | EchoConfig,
    carrier: CarrierName | None,
    workers: int | None,
    settings: CarrierSettings | None,
) -> Started:
    """Start an engine and hold it."""
    from fourtuple.engine import CarrierName, Engine

    wanted = CarrierName.AUTO if carrier is None else carrier
    engine = Engine.start(config, carrier=wanted, workers=workers, settings=settings)
    held.last_engine += 1
    held.engines[held.last_engine] = engine
    return Started(
        number=held.last_engine,
        carrier=engine.carrier,
        fallback_reason=engine.fallback_reason,
        workers=engine.workers,
    )


def engine_snapshot(held: Held, number: int) -> Snapshot:
    """What the engine counts now."""
    return held.engines[number].snapshot()


def engine_order(held: Held, number: int, order: str, value: int | None) -> None:
    """Give the engine one of its orders: ping, close, stop, set_rate, set_target."""
    method = getattr(held.engines[number], order)
    if value is None:
        method()
    else:
        method(value)


def engine_join(held: Held, number: int, timeout_s: float) -> bool:
    """Wait for the engine to end; short waits only, nothing else is answered meanwhile."""
    return held.engines[number].join(timeout_s)


def engine_forget(held: Held, number: int) -> None:
    """Stop an engine if it runs and let go of it and its memory; EngineStopped if it had failed."""
    engine = held.engines.pop(number, None)
    if engine is not None:
        engine.stop()
        engine.join()


OPERATIONS: dict[str, Callable[..., Any]] = {
    operation.__name__: operation
    for operation in (
        sysctl,
        set_sysctl,
        limit_descriptors,
        prepare_network,
        join_by_veth,
        raise_link,
        add_addresses,
        add_any_ip,
        route,
        apply_steps,
        undo_steps,
        facts,
        user_memory,
        open_sockets,
        listen,
        bind,
        connect_once,
        release,
        start_engine,
        engine_snapshot,
        engine_order,
        engine_join,
        engine_forget,
    )
}


def _sysctl_path(name: str) -> Path:
    # As sysctl(8): where there are slashes they separate, so that an interface's name may have a dot in it.
    parts = name.split("/" if "/" in name else ".")
    if any(re.fullmatch(r"\.*", part) or "\0" in part for part in parts):
        raise BadConfig("sysctl", f"{name!r} is not a name such as net.ipv4.ip_local_port_range")
    return Path("/proc/sys", *parts)


def _no_such_sysctl(name: str) -> str:
    return f"{name} does not exist in this namespace: it is the whole host's, or this kernel has none"


def _comparable(name: str, value: str) -> object:
    """Equal for texts that mean the same: the kernel folds whitespace, and merges the ports of a list into ranges."""
    if not name.endswith("_reserved_ports"):
        return value.split()
    ports: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", value):
        ports.update(range(int(first), int(last or first) + 1))
    return ports


def _family(address: IPAddress) -> socket.AddressFamily:
    return socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6


def _errno_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)
