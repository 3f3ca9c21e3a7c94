"""The commands as typer has them.

Decides which command has which name. Imports only the commands that a command line may mean, so that what others need
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

EPILOG = (
    "Exit status: 0 done or healthy, 1 warning, 2 critical (doctor), 64 wrong usage, 69 something is missing, "
    "74 output failed, 130 interrupted."
)
# Nouns read, verbs change. A command is the function of its name in the module of its name, or a group, `app`.
COMMANDS = ("doctor", "limits", "plan", "tune", "prove", "load", "serve", "services", "sniff", "control", "run")
_GROUPS = ("limits", "services", "control")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"fourtuple {version('fourtuple')}")
        except PackageNotFoundError:
            typer.echo("fourtuple, not installed: run from its sources")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command stand before the command."""


def application(typed: Sequence[str]) -> typer.Typer:
    """With the command that `typed` begins with, or with all."""
    app = typer.Typer(
        name="fourtuple",
        help="Takes a Linux host past 65,535 connections: finds the limit that really binds, and proves the result "
        "live.",
        epilog=EPILOG,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    # With a callback, a single command is a command still, and not the whole.
    app.callback()(_options)
    for name in typed[:1] if typed[0] in COMMANDS else COMMANDS:
        module: Any = import_module(f"fourtuple.cli.{name}")
        if name in _GROUPS:
            app.add_typer(module.app, name=name)
            if name == "control" and typed[0] not in COMMANDS:
                for one in module.AT_THE_TOP:
                    app.command(one)(module.COMMANDS[one])
            continue
        command: Callable[..., int] = getattr(module, name)
        # What follows COMMAND is the command's, options too.
        settings = {"allow_interspersed_args": False} if name == "run" else None
        app.command(name, context_settings=settings)(command)
    return app
