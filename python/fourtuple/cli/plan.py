"""`fourtuple plan`: what to change for a goal, on which machines, and the files to do it.

Decides what the options mean and where the files go. Knows no limit: `fourtuple.plan` plans, `plan_view` shows. Reads
only; the folder that it writes is that of --write.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourtuple.cli import Exit, count
from fourtuple.cli.doctor import load_host
from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from fourtuple.plan import Means, Plan


class PlanRole(StrEnum):
    """What the machine is to do; a client's destinations say whether it has one or many."""

    CLIENT = "client"
    SERVER = "server"
    PROXY = "proxy"
    NAT = "nat"


def _count(text: str | int) -> int:
    try:
        return count(str(text))
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from None


def plan(
    connections: Annotated[int, typer.Option(parser=_count, metavar="COUNT", help="Connections at once, such as 2M.")],
    role: Annotated[PlanRole, typer.Option(help="What the machine does.")] = PlanRole.SERVER,
    to: Annotated[
        str | None, typer.Option(metavar="ENDPOINTS", help="Destinations or backends: 203.0.113.5:443[,...].")
    ] = None,
    destinations: Annotated[
        int | None, typer.Option(parser=_count, metavar="COUNT", help="How many destinations, where --to names none.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="ADDRESSES", help="Source (or SNAT) addresses that may be used: 10.9.0.0/24[,...]."
        ),
    ] = None,
    machines: Annotated[str, typer.Option(metavar="N|auto", help="Machines of this shape that share the goal.")] = "1",
    machine: Annotated[
        int | None,
        typer.Option(parser=_count, metavar="K", help="Which of them the changes are for: each has own addresses."),
    ] = None,
    rate: Annotated[
        int | None, typer.Option(parser=_count, metavar="COUNT", help="New connections per second; default: not asked.")
    ] = None,
    bytes_queued: Annotated[
        int | None,
        typer.Option(parser=_count, metavar="COUNT", help="Unread or unsent bytes of each connection; default: 0."),
    ] = None,
    user_bytes: Annotated[
        int | None,
        typer.Option(parser=_count, metavar="COUNT", help="Memory of the program per connection; default: 0."),
    ] = None,
    io_uring: Annotated[
        bool, typer.Option("--io-uring", help="The program uses direct descriptors, as fourtuple's engine does.")
    ] = False,
    ipv6: Annotated[bool, typer.Option("--ipv6", help="IPv6, where neither --to nor --from says so.")] = False,
    host: Annotated[
        str | None, typer.Option(metavar="FILE", help="Plan for a host that doctor --save wrote; - is standard input.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON, as fourtuple tune takes it.")
    ] = False,
    write: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write the files: sysctl.d, unit drop-in, addresses, nft, containers, plan."),
    ] = None,
    service: Annotated[str, typer.Option(metavar="NAME", help="The systemd service of the program.")] = "SERVICE",
) -> None:
    """What to change so that this host, or several of its shape, reach a goal; or the nearest that can be reached.

    Changes nothing. Exit status: 0 the goal is reached, 1 only the nearest is, 64 wrong usage.
    """
    from fourtuple.cli import plan_view, render
    from fourtuple.facts import Goal, Role
    from fourtuple.host import read_host
    from fourtuple.plan import plan as make_plan
    from fourtuple.plan import written_files

    checked_service(service)
    if to is not None and destinations is not None:
        raise BadConfig("--destinations", "--to names them; leave out one of the two")
    means = _means(to, source, machines, machine or 1)
    roles = {PlanRole.SERVER: Role.SERVER, PlanRole.PROXY: Role.PROXY, PlanRole.NAT: Role.NAT}
    if role is PlanRole.SERVER and destinations is not None:
        raise BadConfig("--role", "server: it has no destinations; leave out --destinations")
    if role is PlanRole.NAT and (io_uring or user_bytes or bytes_queued):
        why = "nat: packets pass it and no program holds them; leave out --user-bytes, --bytes-queued and --io-uring"
        raise BadConfig("--role", why)
    if ipv6 and ((means.to and means.to[0].address.version == 4) or (means.sources and means.sources.version == 4)):
        raise BadConfig("--ipv6", "the addresses that --to and --from name are of IPv4; leave out one of the two")
    goal = Goal(
        role=roles.get(role, Role.CLIENT_MANY if (destinations or 1) > 1 else Role.CLIENT_ONE),
        connections=connections,
        destinations=destinations or 1,
        bytes_queued=bytes_queued or 0,
        user_bytes=user_bytes or 0,
        descriptors_per_connection=0 if io_uring else 1,
        uses_epoll=not io_uring,
        ipv6=ipv6,
        rate_per_s=rate or 0,
    )
    found = make_plan(goal, load_host(host) if host is not None else read_host(), means)
    if write is not None:
        _write(Path(write), written_files(found, service))
    if as_json:
        render.emit(found.model_dump_json(indent=2) + "\n")
    else:
        render.show(plan_view.plan(found, write))
    raise typer.Exit(Exit.HEALTHY if found.reached else Exit.WARNING)


def checked_service(name: str) -> None:
    """BadConfig unless systemd could call a service so."""
    from fourtuple.host.knobs import SERVICE_NAME

    if not SERVICE_NAME.fullmatch(name) or ".." in name:
        raise BadConfig("--service", "the name of a systemd service is wanted, without .service")


def load_plan(file: str) -> Plan:
    """The plan that a file holds. BadConfig names the file, the field and what is allowed there."""
    from fourtuple.cli.documents import load
    from fourtuple.plan import Plan

    return load(file, Plan, "plan", "that fourtuple plan --json wrote", 16 << 20)


def _means(to: str | None, source: str | None, machines: str, machine: int) -> Means:
    from fourtuple.plan import Means
    from fourtuple.tuples import AddressSet, Endpoint

    if machines != "auto" and not re.fullmatch(r"[0-9]{1,9}", machines):
        raise BadConfig("--machines", f"{machines[:40]!r}: auto or a number is wanted")
    try:
        endpoints = () if to is None else tuple(Endpoint.parse(one) for one in to.split(","))
    except BadConfig as problem:
        raise BadConfig("--to", f"{problem.path}: {problem.why}") from None
    try:
        sources = None if source is None else AddressSet.parse(source)
    except BadConfig as problem:
        raise BadConfig("--from", f"{problem.path}: {problem.why}") from None
    return Means(sources=sources, to=endpoints, machines=None if machines == "auto" else int(machines), machine=machine)


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise BadConfig(
            "--write", f"{folder} cannot be written to: {why}; name a folder that you may write to"
        ) from None
