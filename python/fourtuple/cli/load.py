"""`fourtuple load`: open, hold and measure connections to a real server, with a live line and a report at the end.

Decides options, layout and exit status. Knows no connection: `fourtuple.load` plays the scenario and explains the end.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from enum import StrEnum
from inspect import iscoroutinefunction, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fourtuple.cli import Exit, count
from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from fourtuple.dialogue import Dialogue
    from fourtuple.load import Progress, Report, Target
    from fourtuple.load.report import Latency

ANSWER_TIMEOUT_S = {"udp": 1.0, "other": 10.0}
"""What a datagram does not bring in a second is lost; what a stream does not bring is on its way."""
ROUND_EVERY_S = 1.0
"""Where something is to be said and nobody says how often."""


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


def load(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="tcp://HOST:PORT, udp://HOST:PORT, http://HOST[:PORT]/PATH or ws://HOST[:PORT]/PATH; tls, https and "
            "wss are tcp, http and ws within TLS. HOST may be a range or list of addresses, 10.0.0.1-10.0.0.8, and "
            "PORT of ports: all of them share the load.",
        ),
    ],
    connections: Annotated[
        int, typer.Option("--connections", "-c", parser=_count, metavar="COUNT", help="Connections to hold.")
    ] = 100,
    rate: Annotated[
        int | None,
        typer.Option(parser=_count, metavar="COUNT", help="New connections per second; default: as fast as possible."),
    ] = None,
    duration: Annotated[float, typer.Option(metavar="SECONDS", help="How long to hold after the ramp.")] = 10.0,
    ping_every: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="A round on every connection at this interval: an echo (tcp, udp), a GET (http), a ping (ws), or "
            "what --say says. Default: 1, and for tcp and udp without --say never: connect and hold.",
        ),
    ] = None,
    closed_loop: Annotated[
        bool,
        typer.Option("--closed-loop", help="Each connection begins its next round as soon as its last is over."),
    ] = False,
    size: Annotated[int, typer.Option(metavar="BYTES", help="Bytes of an echo (16 to 2,048) or of a ws ping.")] = 16,
    say: Annotated[
        str | None, typer.Option(metavar="TEXT", help=r"What to send in each round, such as 'PING\r\n'.")
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help=r"What has to come back, such as '+PONG\r\n'; '+...' is + and the rest of the line (udp: datagram).",
        ),
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A Python file, which is run: it sets `dialogue` to a fourtuple.dialogue.Dialogue, or has an "
            "`async def session(connection)`, which worker processes play on each connection (docs/load.md).",
        ),
    ] = None,
    sources: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="ADDRESSES", help="Source addresses: a list, ranges, prefixes. Default: by route."
        ),
    ] = None,
    window: Annotated[
        int, typer.Option(metavar="COUNT", help="Attempts under way at once, which the server's queues must bear.")
    ] = 256,
    connect_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="An attempt is given up after.")] = 10.0,
    answer_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="An answer is missing after. Default: 10, for udp 1.")
    ] = None,
    ramp_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="The ramp ends after.")] = 120.0,
    no_replace: Annotated[
        bool, typer.Option("--no-replace", help="Do not make connections anew for those that end.")
    ] = False,
    fin: Annotated[
        bool, typer.Option("--fin", help="Close with FIN, which leaves ports in TIME_WAIT; default: RST.")
    ] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Trust these certificates (PEM) for a tls, https or wss target, and no others. Default: the system's.",
        ),
    ] = None,
    tls_insecure: Annotated[bool, typer.Option("--tls-insecure", help="Accept any certificate.")] = False,
    tls_server_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The name (or address) that the certificate has to be for, and that the "
            "server is told. Default: the URL's host.",
        ),
    ] = None,
    tls_alpn: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Protocols to offer, as a list with commas; '' is none. Default: http/1.1 for https and wss.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A certificate of ours (PEM), for servers that want one.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (PEM).")] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Threads, or processes of a script; default: one per processor.")
    ] = None,
    carrier: Annotated[CarrierOption, typer.Option(help="What moves the bytes.")] = CarrierOption.AUTO,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit 1 if true of the report's numbers, such as 'p99_connect_ms > 50 or held < 1000'; may be "
            "repeated. Any wrong name lists all names.",
        ),
    ] = None,
    own: Annotated[
        bool,
        typer.Option("--i-own-this-target", help="Needed for a target that is not on this host or in a closed lab."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as a page there.")] = None,
) -> int:
    """Open, hold and measure connections to a real server, and say which side and which limit stops them.

    Changes nothing on this host. Ctrl-C ends it early and keeps what it had.

    Exit status: 0 all held and no --fail-if true, 1 otherwise, 64 wrong usage, 69 something is missing, 130
    interrupted.
    """
    from fourtuple.cli import render
    from fourtuple.load import NUMBERS, Condition, Scenario, Target, TlsOptions, play
    from fourtuple.load import report as page
    from fourtuple.load.scenario import address_set

    conditions = [Condition.parse(text, NUMBERS) for text in fail_if or ()]
    target = Target.parse(url)
    dialogue, sessions = _speech(target, say, expect, script)
    talks = (dialogue is not None or not target.is_plain) and not closed_loop
    if answer_timeout is None:
        answer_timeout = ANSWER_TIMEOUT_S["udp" if target.scheme.value == "udp" else "other"]
    scenario = Scenario(
        target=target,
        connections=connections,
        sources=address_set("--from", sources) if sources is not None else None,
        rate_per_s=rate or 0,
        round_every_s=ping_every if ping_every is not None else ROUND_EVERY_S * talks,
        closed_loop=closed_loop,
        size_bytes=size,
        duration_s=duration,
        ramp_timeout_s=ramp_timeout,
        connect_timeout_s=connect_timeout,
        answer_timeout_s=answer_timeout,
        window=window,
        replace=not no_replace,
        close_with_fin=fin,
        dialogue=dialogue,
        tls=TlsOptions(
            ca=_contents("--tls-ca", tls_ca),
            insecure=tls_insecure,
            server_name=tls_server_name,
            alpn=None if tls_alpn is None else tuple(name for name in tls_alpn.split(",") if name),
            certificate=_contents("--tls-cert", tls_cert),
            key=_contents("--tls-key", tls_key),
        ),
        script=sessions,
        workers=workers,
        carrier=carrier.value,
    )
    if html is not None:
        _require_writable(html)
    console = Console(stderr=True, highlight=False)
    with Live(console=console, transient=True, refresh_per_second=8) as live:
        show = live.update if console.is_terminal else _ignore
        report = play(scenario, lambda progress: show(_line(progress)), owned=own)
    true_ones = [condition.text for condition in conditions if condition.holds(report.numbers())]
    if html is not None:
        html.write_text(page.html(report), encoding="utf-8")
    if as_json:
        render.emit(json.dumps(report.to_json() | {"failed_if": true_ones}, indent=1) + "\n")
    else:
        render.show(_summary(report, true_ones, html))
    if report.interrupted:
        return Exit.INTERRUPTED
    raised = report.script is not None and bool(report.script.raised)
    return Exit.WARNING if true_ones or raised or report.held < report.wanted else Exit.HEALTHY


def _speech(
    target: Target, say: str | None, expect: str | None, script: Path | None
) -> tuple[Dialogue | None, Path | None]:
    """A dialogue for the engine, or a script for workers, if any was given."""
    from fourtuple.dialogue import Dialogue
    from fourtuple.load import presets

    given = say is not None or expect is not None
    if (given or script is not None) and not target.is_plain:
        raise BadConfig(
            "--say" if given else "--script",
            f"is for tcp, udp and tls targets; {target.scheme.value} has its own words",
        )
    if given and script is not None:
        raise BadConfig("--script", "says what is sent already; leave out --say and --expect")
    if given:
        return presets.typed(say, expect, target.scheme), None
    if script is None:
        return None, None
    try:
        with redirect_stdout(sys.stderr):  # stdout is the report's
            found = runpy.run_path(str(script), run_name="fourtuple_script")
    except (Exception, SystemExit) as problem:
        raise BadConfig("--script", f"{script} cannot be run: {type(problem).__name__}: {problem}") from None
    dialogue, session = found.get("dialogue"), found.get("session")
    if (dialogue is None) == (session is None):
        raise BadConfig("--script", f"{script} has to set `dialogue`, or to have an `async def session(connection)`")
    if session is not None:
        if not iscoroutinefunction(session) or not _takes_one(session):
            raise BadConfig("--script", f"{script}: `session` has to be an `async def session(connection)`")
        return None, script
    if not isinstance(dialogue, Dialogue):
        raise BadConfig("--script", f"{script} has to set `dialogue` to a fourtuple.dialogue.Dialogue")
    return dialogue, None


def _takes_one(session: Callable[..., object]) -> bool:
    try:
        signature(session).bind(object())
    except TypeError:
        return False
    return True


def _ignore(_line: RenderableType) -> None:
    """Where nobody watches."""


def _line(progress: Progress) -> RenderableType:
    now = progress.snapshot
    rate_per_s = now.connects_succeeded / progress.elapsed_s if progress.elapsed_s > 0.5 else 0
    parts = [
        f"{progress.phase} {progress.elapsed_s:5.1f} s",
        f"{now.open_now:,} of {progress.wanted:,} open",
        f"{rate_per_s:,.0f}/s",
    ]
    if not progress.is_datagrams:
        parts.append(f"connect p99 {now.connect_ns.p99 / 1e6:,.1f} ms")
    if now.pings_sent:
        parts.append(f"{now.pings_right:,} answers, p99 {now.echo_ns.p99 / 1e6:,.1f} ms")
    parts += [str(failure) for failure in now.failures[:2]]
    return Text("  ".join(parts))


def _summary(report: Report, true_ones: list[str], html: Path | None) -> RenderableType:
    from fourtuple.cli.render import plain

    style = "bold green" if report.held >= report.wanted else "bold red"
    parts: list[RenderableType] = [Text(f"fourtuple load {report.target}: {report.verdict}", style=style), ""]
    parts.append(
        Text(
            f"  {report.connected:,} {'made' if report.is_datagrams else 'connected'} of {report.attempts:,} tried, "
            f"{report.ramp_rate_per_s:,.0f}/s in a ramp of {report.ramp_s:.1f} s"
            + ("" if report.is_datagrams else _endings(report))
        )
    )
    if report.rounds:
        parts.append(
            Text(
                f"  {report.rounds_right:,} rounds right of {report.rounds:,}, {report.rounds_missing:,} missing, "
                f"{report.rounds_wrong:,} wrong, "
                f"{report.rounds_failed - report.rounds_missing - report.rounds_wrong:,} refused"
                + (f"; {report.strays:,} datagrams answered nothing" if report.is_datagrams else "")
            )
        )
    if report.script is not None:
        outcome = report.script
        each = f"{outcome.processes:,} worker processes, at most {outcome.most_connections_each:,} connections each"
        parts.append(Text(f"  {outcome.sessions_ended:,} sessions returned, in {each}"))
        if outcome.said:
            parts.append(Text(f"  the script says: {plain(outcome.said.strip())}", style="dim"))
    memory = [
        f"{value:,.0f} B {whose}"
        for value, whose in (
            (report.user_bytes_per_connection, "of this process"),
            (report.kernel_bytes_per_connection, "of this host's kernel"),
        )
        if value is not None
    ]
    one = report.noun.removesuffix("s")
    cost = f"  {report.client_cpu_us_per_connection:,.1f} us of processor per {one}"
    parts.append(Text(cost + (f"; memory per {one}: {', '.join(memory)}" if memory else "")))
    if report.latencies():
        parts += ["", _latencies(report)]
    if report.ports:
        fullest = report.ports[0]
        more = f", and {len(report.ports) - 1} more pairs" if len(report.ports) > 1 else ""
        use = f"{fullest.source} -> {fullest.destination}: {fullest.used:,} of {fullest.of:,}{more}"
        parts += ["", Text(f"  source ports  {use}")]
    if report.causes:
        parts += ["", Text("What went wrong, and where", style="bold"), _causes(report)]
    parts += [Text(f"  this host: {plain(text)}", style="yellow") for text in report.host_warnings]
    parts += [Text(f"  true, and so it failed: {text}", style="bold red") for text in true_ones]
    if html is not None:
        parts.append(Text(f"  report in {html}", style="dim"))
    return Group(*parts)


def _latencies(report: Report) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("  ms")
    for name in ("count", "mean", "p50", "p90", "p99", "p99.9", "most"):
        table.add_column(name, justify="right")

    def row(name: str, found: Latency) -> None:
        values = (found.mean_ms, found.p50_ms, found.p90_ms, found.p99_ms, found.p999_ms, found.most_ms)
        table.add_row(name, f"{found.count:,}", *(f"{value:,.3f}" for value in values))

    for name, found in report.latencies():
        row(f"  {name}", found)
    return table


def _endings(report: Report) -> str:
    return f"; {report.replaced:,} replaced, {report.closed_by_peer:,} closed by the peer, {report.broken:,} broken"


def _causes(report: Report) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    for cause in report.causes:
        error = f"{cause.error} at {cause.step}" if cause.error else ""
        told = [cause.what, cause.evidence, "limits: " + ", ".join(cause.limits) if cause.limits else ""]
        table.add_row(
            f"  {cause.count:,} x",
            Text(error),
            Text(cause.side.value, style="bold"),
            Text("; ".join(filter(None, told))),
        )
    return table


def _contents(option: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadConfig(option, f"{path} cannot be read: {error.strerror}") from None


def _require_writable(path: Path) -> None:
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise BadConfig("--html", f"{path} cannot be written: {error.strerror}") from None
