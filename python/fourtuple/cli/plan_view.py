"""Terminal output of plan and tune: what falls short, what to change, what was changed.

Decides layout and words. Knows no file and no arithmetic: the numbers come ready from the plan. Text of a plan from
elsewhere is made harmless before a terminal sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fourtuple.cli.render import plain
from fourtuple.doctor import RoleDiagnosis
from fourtuple.facts import Change, ChangeKind
from fourtuple.host.journal import Entry
from fourtuple.host.knobs import LOCAL, KnobKind
from fourtuple.plan import Plan

_SHOWN = 60


def plan(found: Plan, written: str | None) -> RenderableType:
    """The whole plan, for one screen."""
    parts: list[RenderableType] = [_headline(found)]
    if found.stopped_by:
        parts += _lines([f"stopped by {found.stopped_by}"])
    if found.findings:
        table = _table("limit that falls short", "allows now", "then", "arithmetic now")
        for one in found.findings:
            unit = " per s" if one.per_second else ""
            now, then = f"{one.before:,}{unit}", "no bound" if one.after is None else f"{one.after:,}{unit}"
            table.add_row(f"{one.name} ({one.limit})", now, then, Text(plain(one.arithmetic)))
        parts += ["", table]
    parts += ["", _changes(found.changes) if found.changes else Text("Nothing has to be changed.")]
    parts += _section("Memory of the connections", [found.memory_arithmetic])
    if found.sources:
        parts += _section("Source addresses", [found.sources])
    if found.balancer is not None:
        parts += _section(
            "In front of the machines",
            [f"passing packets on: {found.balancer.passes_on}", f"relaying: {found.balancer.relays}"],
        )
    parts += _section("Not to be read from here", found.unknown)
    parts += _section("To know", found.notes)
    if found.changes or found.findings:
        parts += ["", Text("Each limit has its page: fourtuple limits show NAME", style="dim")]
    if written is not None:
        parts += ["", Text(f"Written to {plain(written)}. Next: fourtuple tune {plain(written)}/plan.json")]
    return Group(*parts)


def dry_run(found: Plan, entries: Sequence[Entry], hazards: Sequence[str], persist: bool, undo: str) -> RenderableType:
    """What tune would do: the old and the new value of each knob."""
    parts: list[RenderableType] = [Text("fourtuple tune: dry run, nothing is changed", style="bold")]
    parts += [_entries(entries)] if entries else _lines(["every knob has its value already"])
    parts += _section("Speaks against it (--force applies all the same)", hazards)
    parts += by_hand(found, persist=persist)
    parts += ["", Text(f"Next: the same with --apply; {undo} takes it back.", style="dim")]
    return Group(*parts)


def applied(
    found: Plan, entries: Sequence[Entry], before: RoleDiagnosis, after: RoleDiagnosis, undo: str, persist: bool
) -> RenderableType:
    """What tune did, what the doctor said before and says now, and how to undo it."""
    head = f"fourtuple tune: {len(entries)} applied" if entries else "fourtuple tune: every knob had its value already"
    parts: list[RenderableType] = [Text(head, style="bold")]
    parts += [_entries(entries)] if entries else []
    parts += _section("The doctor for this goal", [f"before: {_first(before)}", f"now:    {_first(after)}"])
    parts += by_hand(found, persist=persist)
    if entries and undo:
        parts += ["", Text(f"To undo: {undo}", style="bold")]
    return Group(*parts)


def undone(entries: Sequence[Entry]) -> RenderableType:
    """What was taken back."""
    return Group(Text(f"fourtuple tune: {len(entries)} taken back", style="bold"), _entries(entries, back=True))


def by_hand(found: Plan, *, persist: bool) -> list[RenderableType]:
    """The changes that tune does not make."""
    left = [one for one in found.changes if one.kind not in (ChangeKind.SYSCTL, ChangeKind.LOCAL_PREFIX)]
    lines = [f"{one.knob}: {one.old or 'none'} -> {one.new} ({one.limit}; {one.persist})" for one in left]
    if persist and any(one.kind is ChangeKind.LOCAL_PREFIX for one in found.changes):
        lines.append("systemctl daemon-reload && systemctl enable fourtuple-addresses")
    return _section("For you to do", lines)


def _headline(found: Plan) -> Text:
    goal = found.goal
    line = Text("fourtuple plan: ", style="bold")
    line.append("REACHED" if found.reached else "NOT REACHED", style="bold green" if found.reached else "bold yellow")
    words = f"  {found.total:,} of {goal.connections or 0:,} connections, {goal.role.value}"
    if found.machines > 1:
        words += f", on {found.machines:,} machines of this shape with {found.share.connections or 0:,} each"
    now = "unknown" if found.ceiling_before is None else f"{found.ceiling_before:,}"
    return line.append(f"{words}; one machine allows {now} now, {found.ceiling:,} then", style="not bold")


def _changes(changes: Iterable[Change]) -> Table:
    table = _table("change", "now", "then", "limit", "arithmetic")
    for one in changes:
        old, new = (plain(text)[:_SHOWN] for text in (one.old, one.new))
        name = Text(plain(one.knob), style="bold")
        name.append(f"\n{one.kind.value}", style="not bold dim")
        table.add_row(
            name, Text(old or "-"), Text(new), f"{plain(one.name)} ({plain(one.limit)})", plain(one.arithmetic)
        )
    return table


def _entries(entries: Sequence[Entry], *, back: bool = False) -> Table:
    table = _table("knob", "was" if back else "old", "is" if back else "new")
    for one in entries:
        first, second = (one.new, one.old) if back else (one.old, one.new)
        name = f"/{one.name}" if one.kind is KnobKind.FILE else one.name
        table.add_row(Text(name), Text(_value(one, first)), Text(_value(one, second)))
    return table


def _value(entry: Entry, value: bytes | None) -> str:
    if value is None:
        return "absent"
    if entry.kind is KnobKind.FILE:
        return f"{len(value):,} bytes"
    if value == LOCAL:
        return "local"
    return (
        " ".join(plain(value.decode(errors="replace").replace("\t", " ")).split())[:_SHOWN].strip("\ufffd ") or "empty"
    )


def _first(role: RoleDiagnosis) -> str:
    if not role.bounds:
        return "no limit could be read"
    first = role.bounds[0]
    return f"{first.connections:,} connections, bound by {first.name} ({first.limit}): {plain(first.arithmetic)}"


def _section(heading: str, lines: Iterable[str]) -> list[RenderableType]:
    content = _lines(lines)
    return ["", Text(heading, style="bold"), *content] if content else []


def _lines(lines: Iterable[str]) -> list[RenderableType]:
    return [Padding(Text(plain(line)), (0, 0, 0, 2)) for line in lines]


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    for place, heading in enumerate(headings):
        # The name of a knob is to be copied, so that it stays in one piece.
        table.add_column(heading, overflow="fold", no_wrap=place == 0)
    return table
