"""`fourtuple`: what is typed becomes a command, and an error of any of them becomes a line and an exit status.

Decides the exit status and the message for every exception of the package. Knows nothing of what a command does. A
command imports what it needs when it runs, so that help and completion stay quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fourtuple.cli import Exit
from fourtuple.errors import BadConfig, FourtupleError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; an error is one line on standard error, never a traceback."""
    try:
        typed = list(sys.argv[1:] if arguments is None else arguments)
        status = _served(typed[1:]) if typed[:1] == ["serve"] else None
        return _by_typer(typed or ["--help"]) if status is None else status
    except BadConfig as problem:
        return _complain(str(problem), Exit.USAGE)
    except FourtupleError as problem:
        return _complain(str(problem), Exit.UNABLE)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except OSError as problem:
        return _complain(f"input or output failed: {problem.strerror or problem}", Exit.OUTPUT)


def _served(words: Sequence[str]) -> int | None:
    """The exit status of `serve` with these words; None if they are not plainly its options."""
    from fourtuple.cli.serving import Options, serve

    options = Options.plain(words)
    return None if options is None else serve(options)


def _by_typer(typed: Sequence[str]) -> int:
    import typer

    from fourtuple.cli.commands import application

    try:
        return int(application(typed)(args=typed, prog_name="fourtuple", standalone_mode=False) or 0)
    except typer.TyperException as problem:
        return _complain(problem.format_message(), Exit.USAGE)
    except typer.Abort:
        return Exit.INTERRUPTED


def _complain(message: str, status: Exit) -> int:
    hint = " (see fourtuple --help)" if status is Exit.USAGE else ""
    print(f"fourtuple: {message}{hint}", file=sys.stderr)
    return status
