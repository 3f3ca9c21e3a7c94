"""`fourtuple tune`: apply a plan to this machine, take it back, make it last; or rehearse it in a namespace.

Decides what is refused and the order: look, refuse, apply, look again. Knows no limit and no knob: `fourtuple.plan`
judges, `fourtuple.host` writes and restores. Without --apply nothing is changed.
"""

from __future__ import annotations

import tempfile
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
        bool,
        typer.Option("--lab", help="Rehearse in a network namespace: apply, examine, undo; the host stays as it is."),
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

    base = Path(root).absolute()
    journal = Path(state).absolute() if state is not None else None
    if undo:
        if plan is not None or apply or persist or lab:
            raise BadConfig(
                "--undo", "takes back what the journal says: no PLAN, --apply, --persist or --lab beside it"
            )
        from fourtuple.host.apply import undo as take_back

        render.show(plan_view.undone(take_back(root=base, state=journal, force=force)))
        return
    if plan is None:
        raise BadConfig("PLAN", "a file that fourtuple plan --json wrote is wanted, or --undo")
    if service and not persist:
        raise BadConfig("--service", "is for the drop-in that --persist writes; add --persist")
    if service:
        checked_service(service)
    found = load_plan(plan)
    if lab:
        if apply or persist:
            raise BadConfig("--lab", "rehearses and keeps nothing; leave out --apply and --persist")
        _rehearse(found)
        return
    steps = _steps(found, service, persist=persist)
    _work(found, steps, base, journal, apply=apply, persist=persist, force=force)


def _work(
    found: Plan, steps: tuple[Step, ...], root: Path, state: Path | None, *, apply: bool, persist: bool, force: bool
) -> None:
    from fourtuple.cli import plan_view, render
    from fourtuple.host import read_host
    from fourtuple.host.apply import apply as change
    from fourtuple.host.apply import compare
    from fourtuple.plan import hazards

    before = read_host(root=root)
    against = hazards(found, before)
    if not apply:
        render.show(plan_view.dry_run(found, compare(steps, root), against, persist))
        raise typer.Exit(Exit.WARNING if against else Exit.HEALTHY)
    if against and not force:
        raise BadConfig("--apply", f"{'; '.join(render.plain(one) for one in against)}; --force applies all the same")
    entries = change(steps, root=root, state=state)
    how = "fourtuple tune --undo" + ("" if root == Path("/") else f" --root {root}")
    how += "" if state is None else f" --state {state}"
    after = read_host(root=root)
    render.show(plan_view.applied(found, entries, _asked(found, before), _asked(found, after), how, persist))


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
    from fourtuple.host.knobs import KnobKind
    from fourtuple.lab import Lab

    with Lab(("rehearsal",)) as lab, tempfile.TemporaryDirectory() as state:
        host = lab["rehearsal"]
        before = host.facts()
        steps = steps_of(found.changes)
        own = [one for one in steps if one.kind is KnobKind.ROUTE or _is_own(one.name, before)]
        entries = host.apply(own, Path(state))
        after = host.facts()
        render.show(plan_view.applied(found, entries, _asked(found, before), _asked(found, after), "", False))
        if entries:
            render.show(plan_view.undone(host.undo(Path(state))))
    left = ", ".join(one.name for one in steps if one not in own)
    if left:
        render.emit(f"Not rehearsed, for they are the whole host's: {left}\n")


def _is_own(name: str, host: Host) -> bool:
    """Whether a namespace has this sysctl for itself; the table of tracked connections is read-only inside."""
    shared = ("net.netfilter.nf_conntrack_max", "net.netfilter.nf_conntrack_buckets")
    return name.startswith("net.") and name in host.sysctl and name not in shared


def _asked(found: Plan, host: Host) -> RoleDiagnosis:
    from fourtuple.doctor import diagnose

    return diagnose(host, [found.share]).roles[0]
