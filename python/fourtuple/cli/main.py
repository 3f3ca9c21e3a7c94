"""`fourtuple`: the table of commands, and what an error of any of them looks like.

Decides the exit status and the message for every exception of the package. Knows nothing of what a command does. A
command imports what it needs when it runs, so that help and completion stay quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fourtuple.cli import Exit, control, doctor, limits, load, plan, prove, run, serve, services, sniff, tune
from fourtuple.errors import BadConfig, FourtupleError

EPILOG = (
    "Exit status: 0 done or healthy, 1 warning, 2 critical (doctor), 64 wrong usage, 69 something is missing, "
    "74 output failed, 130 interrupted."
)

app = typer.Typer(
    name="fourtuple",
    help="Takes a Linux host past 65,535 connections: finds the limit that really binds, and proves the result live.",
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"fourtuple {version('fourtuple')}")
        except PackageNotFoundError:
            typer.echo("fourtuple, not installed: run from its sources")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command stand before the command."""


# The table of commands. Nouns read, verbs change.
app.command("doctor")(doctor.doctor)
app.add_typer(limits.app, name="limits")
app.command("plan")(plan.plan)
app.command("tune")(tune.tune)
app.command("prove")(prove.prove)
app.command("load")(load.load)
app.command("serve")(serve.serve)
app.add_typer(services.app, name="services")
app.command("sniff")(sniff.sniff)
app.add_typer(control.app, name="control")
for _name in control.AT_THE_TOP:
    app.command(_name)(control.COMMANDS[_name])
# What follows COMMAND is the command's, options too.
app.command("run", context_settings={"allow_interspersed_args": False})(run.run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; an error is one line on standard error, never a traceback."""
    try:
        typed = list(sys.argv[1:] if arguments is None else arguments)
        status = app(args=typed or ["--help"], prog_name="fourtuple", standalone_mode=False)
    except typer.TyperException as problem:
        return _complain(problem.format_message(), Exit.USAGE)
    except BadConfig as problem:
        return _complain(str(problem), Exit.USAGE)
    except FourtupleError as problem:
        return _complain(str(problem), Exit.UNABLE)
    except (typer.Abort, KeyboardInterrupt):
        return Exit.INTERRUPTED
    except OSError as problem:
        return _complain(f"input or output failed: {problem.strerror or problem}", Exit.OUTPUT)
    return int(status or 0)


def _complain(message: str, status: Exit) -> int:
    hint = " (see fourtuple --help)" if status is Exit.USAGE else ""
    print(f"fourtuple: {message}{hint}", file=sys.stderr)
    return status
