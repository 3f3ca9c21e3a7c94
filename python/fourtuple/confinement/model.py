"""What a broker may still do when it is confined, computed from its file and its registry; and what came of it.

Decides which folders and ports targets stand for. Pure but for its caller's registry: no system call, no host. What the
kernel makes of a `Confinement` is for the other files of this package.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from fourtuple.brokerfile import BrokerFile
from fourtuple.confinement.connecting import Address, addresses_of
from fourtuple.registry import Registry

MOST_FOLDERS = 256
"""Of sockets; more are taken together by their parents: each is a mount and a rule that a lookup passes."""
_UNIX = "unix:"
_TCP = "tcp:"


class StepName(Enum):
    """What `confine` does, in this order."""

    MOUNTS = "mounts"
    """A file system that has the allowed folders and nothing else."""
    NETWORK = "network"
    """A network of its own with nothing in it, where no target needs the host's."""
    IDENTITY = "identity"
    """User and groups."""
    CAPABILITIES = "capabilities"
    """None is left, nor can one be had again."""
    PRIVILEGES = "privileges"
    """No program that this process starts gets more than it has (PR_SET_NO_NEW_PRIVS)."""
    DUMPABLE = "dumpable"
    """Other processes of the same user cannot look into this one, and it leaves no core."""
    LANDLOCK = "landlock"
    """Files, ports, abstract names and signals; io_uring is bound by it, too."""
    SECCOMP = "seccomp"
    """System calls by their numbers and arguments; io_uring's operations are none."""


class NotWanted(Exception):
    """A step does not go with what a broker needs; the message says what that is."""


class Identity(Struct, frozen=True, kw_only=True):
    """Who to become."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    """Others than `gid`."""


class Reach(Struct, frozen=True, kw_only=True):
    """Where targets lie."""

    folders: frozenset[str] = frozenset()
    """Those that hold unix sockets; of a template, the folder before its first placeholder."""
    ports: frozenset[int] = frozenset()
    """Of TCP targets."""
    abstract: bool = False
    """Whether any is an abstract unix name."""

    @classmethod
    def of_services(cls, found: tuple[Iterable[str], Iterable[int], bool]) -> Reach:
        """As `Registry.reach` tells it."""
        folders, ports, abstract = found
        return cls(folders=frozenset(folders), ports=frozenset(ports), abstract=abstract)

    def __or__(self, other: Reach) -> Reach:
        return Reach(
            folders=self.folders | other.folders,
            ports=self.ports | other.ports,
            abstract=self.abstract or other.abstract,
        )


class Confinement(Struct, frozen=True, kw_only=True):
    """What is left to a process; everything else goes. Paths are absolute."""

    read: frozenset[str] = frozenset()
    """Folders, with all below them, and files that may be read."""
    write: frozenset[str] = frozenset()
    """Of which files may be written, too; none can be made there."""
    append: str | None = None
    """A log, made if it is not there."""
    sockets: frozenset[str] = frozenset()
    """Folders below which unix sockets may be reached."""
    abstract: bool = False
    """Whether abstract unix names may be reached."""
    connect_ports: frozenset[int] = frozenset()
    asks: bool = False
    """Whether TCP connections are not made here, but asked of whoever serves the listener of the filter."""
    bind_ports: frozenset[int] = frozenset()
    """Empty where listeners are inherited."""
    uring: bool = True
    """Whether io_uring may be used."""
    identity: Identity | None = None
    """None: the user stays who it is."""
    without: frozenset[StepName] = frozenset()
    """Steps that are switched off."""
    required: bool = False
    """Whether a step that cannot be taken is an error."""

    @property
    def as_json(self) -> dict[str, Any]:
        """For another process; `from_json` reads it."""
        return {
            "read": sorted(self.read),
            "write": sorted(self.write),
            "append": self.append,
            "sockets": sorted(self.sockets),
            "abstract": self.abstract,
            "connect_ports": sorted(self.connect_ports),
            "asks": self.asks,
            "bind_ports": sorted(self.bind_ports),
            "uring": self.uring,
            "identity": None if self.identity is None else asdict(self.identity),
            "without": sorted(step.value for step in self.without),
            "required": self.required,
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Confinement:
        """What `as_json` wrote."""
        who = given["identity"]
        return cls(
            read=frozenset(given["read"]),
            write=frozenset(given["write"]),
            append=given["append"],
            sockets=frozenset(given["sockets"]),
            abstract=given["abstract"],
            connect_ports=frozenset(given["connect_ports"]),
            asks=given["asks"],
            bind_ports=frozenset(given["bind_ports"]),
            uring=given["uring"],
            identity=None if who is None else Identity(**{**who, "groups": tuple(who["groups"])}),
            without=frozenset(map(StepName, given["without"])),
            required=given["required"],
        )


class Step(Struct, frozen=True, kw_only=True):
    """One step, and what came of it."""

    name: StepName
    applied: bool
    detail: str
    """What holds now; or why it does not."""
    gaps: tuple[str, ...] = ()
    """What it does not bound here, though it was taken."""
    wanted: bool = True
    """Whether it should have been: it is not switched off, and goes with what the broker needs."""


class Folder(Struct, frozen=True, kw_only=True):
    """A folder of sockets when it was looked at. A folder that is made anew is another one, and not allowed."""

    path: str
    device: int | None
    inode: int | None
    """None: it was not there."""


class Report(Struct, frozen=True, kw_only=True):
    """What `confine` did."""

    steps: tuple[Step, ...]
    folders: tuple[Folder, ...] = ()
    """Of sockets, as they were found; `moved` says which have changed since."""
    asks_at: int | None = None
    """In this process, the descriptor where connections are asked for; `connecting.Connector` serves it, elsewhere."""

    @property
    def missing(self) -> tuple[Step, ...]:
        """What could not be done."""
        return tuple(step for step in self.steps if step.wanted and not step.applied)

    @property
    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "steps": [{**asdict(step), "name": step.name.value, "gaps": list(step.gaps)} for step in self.steps],
            "folders": [asdict(folder) for folder in self.folders],
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Report:
        """What `as_json` wrote."""
        steps = ({**step, "name": StepName(step["name"]), "gaps": tuple(step["gaps"])} for step in given["steps"])
        return cls(
            steps=tuple(Step(**step) for step in steps),
            folders=tuple(Folder(**folder) for folder in given["folders"]),
        )


def plan(
    file: BrokerFile,
    *,
    registry: Registry | None = None,
    services: Reach | None = None,
    log: Path | None = None,
    uring: bool = True,
    inherited: bool = True,
    served: bool = False,
    identity: Identity | None = None,
    read: Iterable[str] = (),
    sockets: Iterable[str] = (),
) -> Confinement:
    """What a broker with this file needs once it runs.

    `registry` is the store that its services come from, if not from the file, and `services` is where those lie, if
    somebody has looked already; `inherited` says whether its listeners
    are bound by another process, `served` whether that makes TCP connections for it where the sandbox is required;
    `read` is what its own program still reads (`libraries()`), `sockets` are further folders of sockets. `uring` is
    whether it is to have io_uring, which goes all the same where the sandbox is required and a ring would reach out of
    it.
    """
    table, reach = file.confine, reach_of(targets(file))
    if registry is not None:
        reach |= reach_of_registry(registry, services)
    # What is tried without being configured: one name of each listener's own port is nothing to connect to.
    bind = () if inherited else (int(listener.address.rpartition(":")[2]) for listener in file.listen)
    every = frozenset(StepName)
    without = every - {StepName.IDENTITY} if table.sandbox == "off" else frozenset(map(StepName, table.without))
    ports, abstract = reach.ports | frozenset(table.allow_ports), reach.abstract or table.allow_abstract
    required = table.sandbox == "required"
    # A ring's operations pass by the filter; what ends them is a network with nothing in it.
    isolated = not ports and not abstract and StepName.NETWORK not in without
    return Confinement(
        read=frozenset(read),
        write=frozenset() if registry is None else frozenset({str(registry.path.absolute())}),
        append=None if log is None else str(log.absolute()),
        sockets=_together(reach.folders | frozenset(table.allow_folders) | frozenset(sockets)),
        abstract=abstract,
        connect_ports=ports,
        asks=required and served and inherited and bool(ports) and not abstract,
        bind_ports=frozenset(bind),
        uring=uring and (isolated or not required),
        identity=identity,
        without=without,
        required=required,
    )


def reach_of(targets: Iterable[str]) -> Reach:
    """Where these targets lie; those that name a service lie nowhere themselves.

    >>> sorted(reach_of(["unix:/run/pg/{label}", "unix:/run/shop/app", "tcp:10.0.0.1:80"]).folders)
    ['/run/pg', '/run/shop']
    """
    folders, ports, abstract = set(), set(), False
    for target in targets:
        if target.startswith(_UNIX):
            path = target.removeprefix(_UNIX)
            if path.startswith("@"):
                abstract = True
            else:
                folders.add(path.partition("{")[0].rpartition("/")[0] or "/")
        elif target.startswith(_TCP):
            ports.add(int(target.rpartition(":")[2]))
    return Reach(folders=frozenset(folders), ports=frozenset(ports), abstract=abstract)


def reach_of_registry(registry: Registry, services: Reach | None = None) -> Reach:
    """Where the targets of a store lie, now: of services, if that is not known already, and of routes."""
    of_services = Reach.of_services(registry.reach()) if services is None else services
    return of_services | reach_of(route.to for route in registry.routes())


def targets(file: BrokerFile) -> Iterator[str]:
    """Every target of the file: of services, routes and defaults."""
    yield from (service.target for service in file.services)
    yield from (route.to for route in file.routes)
    yield from (listener.default for listener in file.listen if listener.default is not None)


def addresses(file: BrokerFile, registry: Registry | None) -> tuple[Container[Address], ...]:
    """Where TCP targets are now: those of the file, and of the registry's routes and services."""
    if registry is None:
        return (addresses_of(targets(file)),)
    return (addresses_of([*targets(file), *(route.to for route in registry.routes())]), registry.addresses())


def outside(confinement: Confinement, target: str) -> bool:
    """Whether a broker that is confined so cannot reach a target, and a new one with a wider set is needed."""
    one = reach_of([target])
    return (
        not (confinement.asks or one.ports <= confinement.connect_ports)
        or (one.abstract and not confinement.abstract)
        or any(not _within(folder, confinement.sockets) for folder in one.folders)
    )


def _within(folder: str, folders: frozenset[str]) -> bool:
    path = PurePosixPath(folder)
    return str(path) in folders or any(str(parent) in folders for parent in path.parents)


def _together(folders: frozenset[str]) -> frozenset[str]:
    """The same without what lies below another; if there are too many still, the deepest give way to their parents."""
    depth = max((folder.count("/") for folder in folders), default=0)
    found = _outermost(folders)
    while len(found) > MOST_FOLDERS and depth > 1:
        found = _outermost(
            frozenset(folder.rpartition("/")[0] if folder.count("/") == depth else folder for folder in found)
        )
        depth -= 1
    return found


def _outermost(folders: frozenset[str]) -> frozenset[str]:
    if "/" in folders:
        return frozenset({"/"})
    kept: list[str] = []
    # "/" sorts before what else a name may go on with only if it is made the least; so it is.
    for folder in sorted(folders, key=lambda path: path.replace("/", "\0")):
        if not kept or not folder.startswith(kept[-1] + "/"):
            kept.append(folder)
    return frozenset(kept)
