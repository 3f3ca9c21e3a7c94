"""`fourtuple prove`: the whole argument, live, with a display of what is being shown and what the kernel answered.

Decides options, layout and exit status. Knows no step: `fourtuple.prove` plays them and tells the display.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fourtuple.cli import Exit, count
from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from types import TracebackType

    from fourtuple.prove import Proof, Row, Step, StepResult

MARKS = {"passed": ("✓", "green"), "failed": ("✗", "bold red"), "stopped": ("-", "yellow")}
WIDTH_OF_A_PIPE = 120
INDENT, NUMBER = 4, 11
"""Columns before a verdict's number, and of the number with the blank after it."""
ROOM_FOR_ALL_COLUMNS = 100


class CarrierOption(StrEnum):
    """The carriers of `fourtuple.engine.CarrierName` as they are typed."""

    AUTO = "auto"
    URING = "uring"
    EPOLL = "epoll"


def _count(text: str | int) -> int:
    try:
        return count(str(text))
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from None


def prove(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller numbers; about a minute.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="STEP", help="Run this step only; may be repeated. See --steps.")
    ] = None,
    steps: Annotated[bool, typer.Option("--steps", help="List the steps and what each claims, and exit.")] = False,
    connections: Annotated[
        int | None,
        typer.Option(
            parser=_count,
            metavar="COUNT",
            help="Connections of the step `server`; default: as many as memory allows, up to 1,000,000.",
        ),
    ] = None,
    carrier: Annotated[
        CarrierOption, typer.Option(help="What moves the bytes: io_uring, epoll, or the first that works.")
    ] = CarrierOption.AUTO,
    refuse_io_uring: Annotated[
        bool, typer.Option("--refuse-io-uring", help="Refuse io_uring to the lab by seccomp, as many containers do.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the proof as JSON; progress goes to standard error.")
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report with its curves there.")] = None,
) -> int:
    """Show with live connections how far this host goes past 65,535, step by step.

    Runs in network namespaces of its own (user namespaces without root) and changes nothing on the host: there is
    nothing to undo. Ctrl-C stops it and keeps what was reached.

    Exit status: 0 every claim shown, 1 a claim failed, 69 a step could not run here, 130 interrupted.
    """
    from fourtuple.cli import render
    from fourtuple.prove import STEPS, Options, report
    from fourtuple.prove import prove as play

    if steps:
        render.emit("".join(f"{step.name:<12} {step.claim}\n" for step in STEPS))
        return Exit.HEALTHY
    if html is not None:
        report.require_matplotlib()
        _require_writable(html)
    options = Options(
        quick=quick,
        only=tuple(only or ()),
        connections=connections,
        carrier=carrier.value,
        refuse_io_uring=refuse_io_uring,
    )
    with _sigterm_as_ctrl_c(), Display(to_stderr=as_json) as display:
        proof = play(options, display)
    try:
        if html is not None:
            html.write_text(report.html(proof), encoding="utf-8")
    finally:  # a full disk does not cost the result
        if as_json:
            render.emit(json.dumps(proof.to_json(), indent=1) + "\n")
        else:
            render.show(_summary(proof, html))
    return _status(proof)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Whoever ends the run, by whichever signal, gets what was reached."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Display:
    """What is being shown, as it happens: on a terminal with a moving line at the bottom, elsewhere line by line."""

    def __init__(self, *, to_stderr: bool) -> None:
        stream = sys.stderr if to_stderr else sys.stdout
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal has no check mark
        self._console = _Screen(stderr=to_stderr, highlight=False)
        width = self._console.width if self._console.is_terminal else WIDTH_OF_A_PIPE
        self._console.width = min(width, WIDTH_OF_A_PIPE)
        self._live = Live(console=self._console, transient=True, refresh_per_second=8, auto_refresh=True)
        self._label, self._value, self._target = "", 0, 0
        self._since = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def step_started(self, step: Step, number: int, of: int) -> None:
        """A heading, and what the step claims."""
        self._console.print()
        self._console.print(Text.assemble((f"{number}/{of} {step.name}  ", "bold"), (step.title, "bold cyan")))
        self._console.print(Padding(Text(step.claim, style="italic"), (0, 0, 0, INDENT), expand=False))

    def claimed(self, claim: str) -> None:
        """The moving line names it at once; elsewhere the row that follows is enough."""
        self.progressed(claim, 0, None)

    def noted(self, text: str) -> None:
        """A line of talk."""
        self._console.print(Padding(Text(text, style="dim"), (0, 0, 0, INDENT + NUMBER), expand=False))

    def progressed(self, label: str, value: int, target: int | None) -> None:
        """The moving line."""
        if not self._live.is_started:
            return
        if label != self._label:
            self._label, self._since = label, time.monotonic()
        self._live.update(_moving(label, value, target or 0, time.monotonic() - self._since))

    def row_added(self, row: Row) -> None:
        """A claim with its verdict."""
        mark, style = MARKS[row.outcome.value]
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_column(width=INDENT - 1, justify="right")
        line.add_column(width=NUMBER - 1, justify="right")
        line.add_column()
        stopper = f"stopped by {row.bound_by}: " if row.outcome.value == "stopped" and row.bound_by else ""
        answer = f" \N{RIGHTWARDS ARROW} {stopper}{row.kernel_said}" if row.kernel_said else ""
        line.add_row(
            Text(mark, style=style), Text(f"{row.reached:,}", style="bold"), Text.assemble(row.claim, (answer, "dim"))
        )
        self._console.print(line)

    def step_ended(self, result: StepResult) -> None:
        """The moving line goes; what could not be shown has its row."""
        if self._live.is_started:
            self._live.update("")


class _Screen(Console):
    """A console whose reader may go, as head does: it wanted no more, so the run ends, and that is success."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        raise typer.Exit


def _moving(label: str, value: int, target: int, seconds: float) -> RenderableType:
    line = Table.grid(padding=(0, 1, 0, 0))
    for width in (INDENT - 1, 20, None, None):
        line.add_column(width=width, no_wrap=True)
    line.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    rate = f"{value / seconds:,.0f}/s" if seconds > 0.5 else ""
    of = f" of {target:,}" if target else ""
    bar = ProgressBar(total=target or None, completed=min(value, target) if target else value, width=20)
    line.add_row("", bar, Text(f"{value:,}{of}", style="bold"), rate, Text(label, style="dim"))
    return line


def _summary(proof: Proof, html: Path | None) -> RenderableType:
    console = Console()
    wide = not console.is_terminal or console.width >= ROOM_FOR_ALL_COLUMNS
    table = Table(
        title="\nPast 65,535: claim by claim", title_justify="left", title_style="bold", box=SIMPLE_HEAD, expand=True
    )
    table.add_column("", no_wrap=True)
    table.add_column("claim", ratio=3)
    if wide:
        table.add_column("arithmetic", ratio=2)
    table.add_column("reached", justify="right", no_wrap=True)
    table.add_column("limit that bound", max_width=18)
    if wide:
        table.add_column("kernel\nB/socket", justify="right", no_wrap=True)
        table.add_column("user\nB/conn.", justify="right", no_wrap=True)
        table.add_column("s", justify="right", no_wrap=True)
    for result in proof.results:
        for row in result.rows:
            mark, style = MARKS[row.outcome.value]
            table.add_row(
                Text(mark, style=style),
                row.claim,
                *([row.arithmetic] if wide else []),
                f"{row.reached:,}",
                row.bound_by or row.kernel_said * (row.outcome.value != "passed"),
                *(_costs(row) if wide else []),
            )
        table.add_section()
    counted = [row.outcome.value for result in proof.results for row in result.rows]
    verdict = ", ".join(f"{counted.count(one)} {one}" for one in MARKS if one in counted)
    table.caption = f"{verdict}; {proof.seconds:.0f} s" + (f"; report in {html}" if html else "")
    table.caption_justify = "left"
    return table


def _costs(row: Row) -> tuple[str, ...]:
    memory = (row.kernel_bytes_per_socket, row.user_bytes_per_connection)
    return (*("" if each is None else f"{each:,.0f}" for each in memory), f"{row.seconds:.1f}" if row.seconds else "")


def _status(proof: Proof) -> int:
    outcomes = {result.outcome.value for result in proof.results}
    if proof.interrupted:
        return Exit.INTERRUPTED
    if "failed" in outcomes:
        return Exit.WARNING
    return Exit.UNABLE if "stopped" in outcomes else Exit.HEALTHY


def _require_writable(path: Path) -> None:
    new = not path.exists()
    try:
        with path.open("a", encoding="utf-8"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise BadConfig("--html", f"{path} cannot be written: {error.strerror}") from None
