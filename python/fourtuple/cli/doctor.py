"""`fourtuple doctor`: which limit binds here, for each role, and what is close to being hit.

Decides where the facts come from (this machine or a file), which goals are examined, and the exit status. Knows no
limit and no layout: `fourtuple.doctor` diagnoses, `render` shows. Reads only; the one file that it writes is that of
--save.
"""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourtuple.cli import Exit, count
from fourtuple.cli.documents import load
from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fourtuple.facts import Goal, Host

LARGEST_HOST_BYTES = 16 << 20
"""A host file with all lists full is below 1 MB."""


class RoleName(StrEnum):
    """The roles of `fourtuple.facts.Role` as they are typed."""

    CLIENT_ONE = "client-one"
    CLIENT_MANY = "client-many"
    SERVER = "server"
    PROXY = "proxy"
    NAT = "nat"


def _count(text: str | int) -> int:
    try:
        return count(str(text))
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from None


def _pid(text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{str(text)[:40]!r} is not a process id, which is a whole number from 1") from None


def doctor(
    role: Annotated[list[RoleName] | None, typer.Option(help="Examine this role only; may be repeated.")] = None,
    connections: Annotated[
        int | None, typer.Option(parser=_count, metavar="COUNT", help="Connections wanted; default: the ceiling.")
    ] = None,
    sources: Annotated[
        int | None, typer.Option(parser=_count, metavar="COUNT", help="Source addresses that the program uses.")
    ] = None,
    destinations: Annotated[
        int | None,
        typer.Option(
            "--destinations", "--to", parser=_count, metavar="COUNT", help="Distinct address:port pairs connected to."
        ),
    ] = None,
    pid: Annotated[
        int | None,
        typer.Option(
            parser=_pid, metavar="PID", help="See the host as this process does: its limits, cgroup, network."
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="FILE", help="Examine a host that --save wrote; - is standard input.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="FILE", help="An earlier --save of the same host: show what rose.")
    ] = None,
    save: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the facts, addresses included, to examine elsewhere; - prints them."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON.")] = False,
    myths: Annotated[bool, typer.Option("--myths", help="Show all of the common advice that is wrong here.")] = False,
    probe_ports: Annotated[
        bool,
        typer.Option(
            "--probe-ports/--no-probe-ports",
            help="Try each ephemeral port, without a packet (0.1 s), or count listeners and bound sockets only.",
        ),
    ] = True,
) -> None:
    """Which limit binds on this host, for each role; what is close to being hit. Needs no root and changes nothing.

    Exit status: 0 healthy, 1 warning, 2 critical; 64 wrong usage, 69 something is missing.
    """
    goals = _goals(role or [], connections, sources, destinations)
    if host is not None and pid is not None:
        raise BadConfig("--pid", "is for this machine and cannot be given with --host; leave out one of the two")
    if host == "-" and since == "-":
        raise BadConfig("--since", "standard input can be read only once, and --host reads it; name a file")
    facts = load_host(host) if host is not None else _read_here(pid, probe_ports=probe_ports)
    previous = load_host(since) if since is not None else None

    from fourtuple.cli import render
    from fourtuple.doctor import Health, diagnose

    if save is not None:
        _save(facts, save)
    diagnosis = diagnose(facts, goals, previous)
    statuses = {Health.HEALTHY: Exit.HEALTHY, Health.WARNING: Exit.WARNING, Health.CRITICAL: Exit.CRITICAL}
    if as_json:
        render.emit(json.dumps(diagnosis.to_json(), indent=2) + "\n")
    elif save != "-":
        render.show(render.diagnosis(facts, diagnosis, all_myths=myths))
    raise typer.Exit(statuses[diagnosis.health])


def load_host(file: str) -> Host:
    """The host that a file holds. BadConfig names the file, the field and what is allowed there."""
    from fourtuple.facts import Host

    return load(file, Host, "host file", "that fourtuple doctor --save wrote", LARGEST_HOST_BYTES)


def _goals(
    roles: Iterable[RoleName], connections: int | None, sources: int | None, destinations: int | None
) -> tuple[Goal, ...]:
    from fourtuple.doctor import default_goals
    from fourtuple.facts import Role

    wanted = {Role[name.name] for name in roles} or set(Role)
    given = {"connections": connections, "sources": sources, "destinations": destinations}
    update = {name: number for name, number in given.items() if number is not None}
    goals = [goal.model_copy(update=update) for goal in default_goals() if goal.role in wanted]
    # "To one destination" stays what its name says.
    one = {"destinations": 1}
    return tuple(goal.model_copy(update=one) if goal.role is Role.CLIENT_ONE else goal for goal in goals)


def _read_here(pid: int | None, *, probe_ports: bool) -> Host:
    from fourtuple.host import read_host

    return read_host(pid, probe_ports=probe_ports)


def _save(facts: Host, file: str) -> None:
    from fourtuple.cli.render import emit, plain

    text = facts.model_dump_json(indent=2) + "\n"
    if file == "-":
        emit(text)
        return
    target = Path(file)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial") if target.name else target
    try:
        # A reader sees the old file or the new one, never half of it.
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            partial.write_text(text, encoding="utf-8")
            partial.replace(target)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        partial.unlink(missing_ok=True)
        raise BadConfig("--save", f"{plain(file)} cannot be written: {why}; name a file that you may write") from None
