"""Terminal output: the diagnosis on one screen, the catalogue as a table and as pages.

Decides layout and words, and makes text from a file or a kernel harmless before a terminal sees it. Knows no file and
no arithmetic: the numbers and formulas come ready from the diagnosis. Colour follows the terminal and NO_COLOR.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fourtuple.doctor import Diagnosis, Health, RoleDiagnosis, Severity
from fourtuple.facts import Host
from fourtuple.limits import Limit
from fourtuple.limits.myths import Myth

_NARROWEST, _WIDEST = 60, 120
_MYTHS_SHOWN = 3
_FACTS_NAMED = 8
_HEALTH_STYLE = {Health.HEALTHY: "bold green", Health.WARNING: "bold yellow", Health.CRITICAL: "bold red"}
_SEVERITY_STYLE = {Severity.NOTICE: "cyan", Severity.WARNING: "yellow", Severity.CRITICAL: "bold red"}


def plain(text: str) -> str:
    """Text without control characters, so that a host file cannot command the terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def emit(text: str) -> None:
    """Write to standard output. A reader that has gone, as head does, wanted no more: that is success."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail again when the interpreter flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None
    except UnicodeEncodeError:
        sys.stdout.write(text.encode("ascii", "replace").decode("ascii"))
        sys.stdout.flush()


def show(content: RenderableType) -> None:
    """Render for this terminal, then write at once."""
    console = Console(highlight=False, soft_wrap=False)
    console.width = max(_NARROWEST, min(console.width, _WIDEST)) if console.is_terminal else _WIDEST
    with console.capture() as captured:
        console.print(content)
    emit("\n".join(line.rstrip() for line in captured.get().split("\n")))


def diagnosis(host: Host, found: Diagnosis, *, all_myths: bool) -> RenderableType:
    """The whole diagnosis, for one screen."""
    parts: list[RenderableType] = [_headline(host, found)]
    parts += _bullets((plain(reason), "") for reason in found.reasons)
    parts += ["", _roles(found.roles)]
    if steps := _first_steps(found.roles):
        parts += _section("Past the first limit of each role", steps)
    near = [(f"{it.name} ({it.limit}): {plain(it.text)}", _SEVERITY_STYLE[it.severity]) for it in found.pressures]
    parts += _section("Close to being hit now", _bullets(near) or ["  nothing is half used"])
    if found.rising:
        risen = ((f"{plain(it.counter)} rose by {it.by:,}: {', '.join(it.limits)}", "yellow") for it in found.rising)
        parts += _section("Rose since the earlier sample", _bullets(risen))
    if found.settings:
        parts += _section("Settings that a host for many connections wants otherwise", _settings(found))
    shown = found.myths if all_myths else [myth for myth in found.myths if myth.applies][:_MYTHS_SHOWN]
    if shown:
        rest = len(found.myths) - len(shown)
        heading = "What common advice gets wrong here" + (f" ({rest} more: --myths)" if rest else "")
        parts += _section(heading, _myths(shown))
    parts += _section("How a SourcePool uses ports here", _bullets([(_source_pool(found), "")]))
    if missing := _missing(found):
        parts += _section("Could not read", missing)
    first = next((role.bounds[0].name for role in found.roles if role.bounds), "ephemeral-ports")
    parts += ["", Text(f"Pages: fourtuple limits show {first}, fourtuple limits list, docs/limits/", style="dim")]
    return Group(*parts)


def limits_table(limits: Iterable[Limit]) -> RenderableType:
    """The catalogue, a line to a limit."""
    table = _table()
    for heading in ("", "limit", "what it is", "scope", "bounds", "evidence"):
        table.add_column(heading, no_wrap=heading in ("", "limit"))
    for limit in limits:
        row = (limit.id, limit.name, limit.title, limit.scope.value, limit.kind.value, limit.evidence.value)
        table.add_row(*(Text(cell) for cell in row))
    return table


def suspects(heading: str, error: str, limits: Sequence[Limit]) -> RenderableType:
    """The limits behind an error, with what tells them apart."""
    if not limits:
        return Group(Text(heading, style="bold"), Text("  No limit in the catalogue gives this error."))
    table = _table()
    for title in ("", "limit", "seen as", "way past"):
        table.add_column(title, overflow="fold")
    for rank, limit in enumerate(limits, 1):
        hits = [hit for hit in limit.hit if hit.errno == error]
        seen = "; ".join(": ".join(part for part in (hit.call, hit.note) if part) for hit in hits)
        remedy = limit.remedies[0].text if limit.remedies else ""
        table.add_row(str(rank), Text(f"{limit.name} ({limit.id})", style="bold"), Text(seen), Text(remedy))
    return Group(Text(heading, style="bold"), table)


def markdown(page: str) -> RenderableType:
    """A page of the catalogue. To a pipe it goes as it is: Markdown is meant to be read there too."""
    if page.startswith("<!--"):
        page = page.partition("\n")[2]
    if not sys.stdout.isatty():
        return Text(page.rstrip("\n"))
    from rich.markdown import Markdown

    return Markdown(page)


def _headline(host: Host, found: Diagnosis) -> Text:
    machine, process = host.machine, host.process
    facts = [f"Linux {plain(host.kernel.release)}"]
    if machine.cpus:
        facts.append(f"{machine.cpus} processors" if machine.cpus > 1 else "1 processor")
    if machine.memory_total_bytes is not None:
        facts.append(f"{machine.memory_total_bytes / (1 << 30):.1f} GiB")
    if host.isolation.container:
        facts.append(f"in a container ({plain(host.isolation.container)})")
    if host.isolation.initial_network_namespace is False:
        facts.append("in a network namespace of its own")
    facts.append(f"as process {process.pid} {plain(process.name)}".rstrip() + f", uid {process.effective_uid}")
    if host.label:
        facts.insert(0, plain(f"{host.origin}: {host.label}"))
    line = Text("fourtuple doctor: ", style="bold")
    line.append(found.health.value.upper(), style=_HEALTH_STYLE[found.health])
    return line.append("  " + ", ".join(facts), style="not bold")


def _roles(roles: Sequence[RoleDiagnosis]) -> Table:
    table = _table()
    table.add_column("role", overflow="fold", ratio=2)
    table.add_column("connections", justify="right", no_wrap=True)
    table.add_column("limit, lowest first", overflow="fold", ratio=3)
    table.add_column("arithmetic", overflow="fold", ratio=5)
    for role in roles:
        goal = role.goal
        details = [
            f"{number:,} {name}"
            for number, name in ((goal.sources, "sources"), (goal.destinations, "destinations"))
            if number > 1
        ]
        title = Text(goal.role.value, style="bold")
        if details:
            title.append(f"\n{', '.join(details)}", style="not bold dim")
        if not role.bounds:
            table.add_row(title, "?" if role.unknown else "-", "", Text(_nothing_bounds(role)))
        for rank, bound in enumerate(role.bounds[:3]):
            style = "bold" if rank == 0 else ""
            table.add_row(
                title if rank == 0 else "",
                Text(_number(bound.connections), style=style),
                Text(f"{rank + 1}. {bound.name} ({bound.limit})", style=style),
                Text(plain(bound.arithmetic)),
            )
    return table


def _nothing_bounds(role: RoleDiagnosis) -> str:
    if role.unknown:
        return f"not to be told from here: {', '.join(it.name for it in role.unknown)}"
    # Each limit has its reason not to apply; for a box that translates nothing, that of snat-ports (G4) says it all.
    return next((plain(it.reason) for it in role.not_applicable if it.limit == "G4"), "no limit of this host applies")


def _first_steps(roles: Sequence[RoleDiagnosis]) -> list[RenderableType]:
    steps: dict[str, str] = {}
    for role in roles:
        for bound in role.bounds[:1]:
            command = f"  $ {bound.command}" if bound.command else ""
            steps.setdefault(f"{bound.name}: {bound.remedy}", command)
    return _bullets((plain(step + command), "") for step, command in steps.items())


def _settings(found: Diagnosis) -> list[RenderableType]:
    return _bullets(
        (f"{it.name} ({it.limit}): {plain(it.setting)} is {plain(it.found) or 'empty'}, wanted {plain(it.wanted)}", "")
        for it in found.settings
    )


def _myths(myths: Iterable[Myth]) -> list[RenderableType]:
    return _bullets((f'"{it.advice}": {plain(it.truth)} ({it.limit})', "") for it in myths)


def _source_pool(found: Diagnosis) -> str:
    choice = found.source_pool
    if choice is None:
        return "not to be told: the socket options of this kernel were not tried"
    elsewhere = f"; {choice.outside.value} outside the automatic range" if choice.outside is not choice.inside else ""
    return f"{choice.inside.value}{elsewhere}: {choice.why}"


def _missing(found: Diagnosis) -> list[RenderableType]:
    """Facts with one reason stand in one line; then limits that bind although their value is hidden."""
    reasons: dict[str, list[str]] = {}
    for fact, why in found.unread.items():
        reasons.setdefault(plain(why), []).append(plain(fact))
    for role in found.roles:
        for limit in role.unknown:
            # A limit that is unknown because a fact is unread stands with that fact.
            known = [why for why in reasons if why in plain(limit.reason)]
            why = max(known, key=len, default=plain(limit.reason))
            names = reasons.setdefault(why, [])
            label = f"limit {limit.name} ({limit.limit})"
            if label not in names:
                names.append(label)
    return _bullets((f"{_some(facts)}: {why}", "") for why, facts in reasons.items())


def _some(facts: Sequence[str]) -> str:
    more = len(facts) - _FACTS_NAMED
    return ", ".join(facts[:_FACTS_NAMED]) + (f" and {more} more" if more > 0 else "")


def _section(heading: str, content: Sequence[RenderableType]) -> list[RenderableType]:
    return ["", Text(heading, style="bold"), *content]


def _bullets(lines: Iterable[tuple[str, str]]) -> list[RenderableType]:
    return [Padding(Text(line, style=style), (0, 0, 0, 2)) for line, style in lines]


def _table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")


def _number(connections: int) -> str:
    return f"{connections:,}" if connections < 10**15 else f"{connections:.1e}"
