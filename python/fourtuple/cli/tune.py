"""`fourtuple tune`: apply a plan to this machine or to a network namespace, take it back, make it last, rehearse it.

Decides what is refused and the order: look, refuse, apply, look again. Knows no limit and no knob: `fourtuple.plan`
judges, `fourtuple.host` writes and restores. Without --apply nothing is changed.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourtuple.cli import Exit
from fourtuple.cli.plan import checked_service, load_plan
from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from fourtuple.doctor import RoleDiagnosis
    from fourtuple.facts import Host
    from fourtuple.host.apply import Step
    from fourtuple.plan import Plan


def tune(
    plan: Annotated[
        str | None, typer.Argument(metavar="[PLAN]", help="A file of fourtuple plan --json; - is standard input.")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Change the settings; without it they are only shown.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take back what was applied, also after a crash.")] = False,
    persist: Annotated[
        bool, typer.Option("--persist", help="Also write the plan's files, so that the changes outlast a reboot.")
    ] = False,
    service: Annotated[
        str, typer.Option(metavar="NAME", help="With --persist: the service that gets the drop-in.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Apply or undo although something speaks against it.")] = False,
    lab: Annotated[
        str | None,
        typer.Option(
            "--lab",
            metavar="NAME",
            help="Apply (or undo) in this network namespace: a name of ip netns, or a path as /proc/PID/ns/net.",
        ),
    ] = None,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Apply, examine and undo in a namespace made for it; the host stays as it is."),
    ] = False,
    root: Annotated[
        str, typer.Option(metavar="DIR", help="Work on the tree of another root, such as an image's.")
    ] = "/",
    state: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the journal is; default: /var/lib/fourtuple below --root.")
    ] = None,
) -> None:
    """Apply a plan, all of it or nothing. A dry run unless --apply is given; --undo restores every value as it was.

    Exit status: 0 done, 1 dry run in which something speaks against the plan, 64 refused or wrong usage, 69 a privilege
    is missing.
    """
    from fourtuple.cli import plan_view, render

    place = _Place(root=Path(root).absolute(), state=None if state is None else Path(state).absolute(), lab=lab)
    if lab is not None and (persist or rehearse or place.root != Path("/")):
        raise BadConfig(
            "--lab", "a namespace is of the running machine and ends with it; no --persist, --root, --rehearse"
        )
    if undo:
        if plan is not None or apply or persist or rehearse:
            why = "takes back what the journal says: no PLAN, --apply, --persist or --rehearse beside it"
            raise BadConfig("--undo", why)
        from fourtuple.host.apply import undo as take_back

        with place.entered() as journal:
            render.show(plan_view.undone(take_back(root=place.root, state=journal, force=force)))
        return
    if plan is None:
        raise BadConfig("PLAN", "a file that fourtuple plan --json wrote is wanted, or --undo")
    if service and not persist:
        raise BadConfig("--service", "is for the drop-in that --persist writes; add --persist")
    if service:
        checked_service(service)
    found = load_plan(plan)
    if rehearse:
        if apply or persist:
            raise BadConfig("--rehearse", "keeps nothing; leave out --apply and --persist")
        _rehearse(found)
        return
    _work(found, _steps(found, service, persist=persist), place, apply=apply, persist=persist, force=force)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a plan is applied, and where its journal is."""

    root: Path
    state: Path | None
    lab: str | None

    @contextmanager
    def entered(self) -> Iterator[Path]:
        """Be where the settings are; yields the folder of the journal, in a namespace one of its own."""
        from fourtuple.host.apply import STATE

        state = self.state or self.root / STATE
        if self.lab is None:
            yield state
            return
        from fourtuple.host.namespace import inside_network_namespace

        with inside_network_namespace(self.lab) as unique:
            yield state / "namespaces" / unique

    @property
    def undo(self) -> str:
        """The command that takes it back."""
        words = ["fourtuple tune --undo"]
        words += [] if self.root == Path("/") else [f"--root {shlex.quote(str(self.root))}"]
        words += [] if self.lab is None else [f"--lab {shlex.quote(self.lab)}"]
        words += [] if self.state is None else [f"--state {shlex.quote(str(self.state))}"]
        return " ".join(words)


def _work(found: Plan, steps: tuple[Step, ...], place: _Place, *, apply: bool, persist: bool, force: bool) -> None:
    from fourtuple.cli import plan_view, render
    from fourtuple.host import read_host
    from fourtuple.host.apply import apply as change
    from fourtuple.host.apply import compare
    from fourtuple.plan import hazards

    with place.entered() as state:
        before = read_host(root=place.root)
        against = hazards(found, before, same_namespace=place.lab is None)
        if place.lab is not None:
            steps, left = _own(steps, before)
            if left:
                why = f"no knobs of a network namespace, or not of this one: {left}"
                against = (*against, f"{why}; --force leaves them out")
        if not apply:
            render.show(plan_view.dry_run(found, compare(steps, place.root), against, persist, place.undo))
            raise typer.Exit(Exit.WARNING if against else Exit.HEALTHY)
        if against and not force:
            why = "; ".join(render.plain(one) for one in against)
            raise BadConfig("--apply", f"{why}; --force applies all the same")
        entries = change(steps, root=place.root, state=state)
        after = read_host(root=place.root)
        asked = _asked(found, before), _asked(found, after)
        render.show(plan_view.applied(found, entries, *asked, place.undo, persist))


def _steps(found: Plan, service: str, *, persist: bool) -> tuple[Step, ...]:
    from fourtuple.host.apply import Step, steps_of
    from fourtuple.host.knobs import KnobKind
    from fourtuple.plan.files import persistent_files

    files = persistent_files(found, service) if persist else ()
    written = (Step(kind=KnobKind.FILE, name=name, new=text.encode()) for name, text in files)
    return (*steps_of(found.changes), *written)


def _rehearse(found: Plan) -> None:
    """Apply what is a namespace's own in one made for it, have the doctor look, and take it back."""
    from fourtuple.cli import plan_view, render
    from fourtuple.host.apply import steps_of
    from fourtuple.lab import Lab

    with Lab(("rehearsal",)) as lab, tempfile.TemporaryDirectory() as state:
        host = lab["rehearsal"]
        before = host.facts()
        steps = steps_of(found.changes)
        own, left = _own(steps, before)
        entries = host.apply(own, Path(state))
        after = host.facts()
        render.show(plan_view.applied(found, entries, _asked(found, before), _asked(found, after), "", False))
        if entries:
            render.show(plan_view.undone(host.undo(Path(state))))
    if left:
        render.emit(f"Not rehearsed, for they are the whole host's: {left}\n")


def _own(steps: tuple[Step, ...], inside: Host) -> tuple[tuple[Step, ...], str]:
    """The steps that a network namespace has for itself, and the names of the others."""
    from fourtuple.host.knobs import KnobKind

    # The table of tracked connections is the whole host's, and read-only inside (G1).
    shared = ("net.netfilter.nf_conntrack_max", "net.netfilter.nf_conntrack_buckets")
    own = tuple(
        one
        for one in steps
        if one.kind is KnobKind.ROUTE
        or (one.name.startswith("net.") and one.name in inside.sysctl and one.name not in shared)
    )
    return own, ", ".join(one.name for one in steps if one not in own)


def _asked(found: Plan, host: Host) -> RoleDiagnosis:
    from fourtuple.doctor import diagnose

    return diagnose(host, [found.share]).roles[0]
