"""A JSON file from elsewhere, or standard input, becomes a model, or an error that names the file and the field.

Decides how hostile such a file may be. Knows no model by name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fourtuple.errors import BadConfig

if TYPE_CHECKING:
    from pydantic import ValidationError

    from fourtuple.facts import Facts

    Model = TypeVar("Model", bound=Facts)


def load(file: str, model: type[Model], what: str, maker: str, largest_bytes: int) -> Model:
    """The `model` that a file holds; `what` it is called, and which command writes it, for the error."""
    import pydantic

    from fourtuple.cli.render import plain

    named = "standard input" if file == "-" else plain(file)
    try:
        if file == "-":
            data = sys.stdin.buffer.read(largest_bytes + 1)
        else:
            with Path(file).open("rb") as opened:
                data = opened.read(largest_bytes + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise BadConfig(named, f"cannot be read: {why}; a file {maker} is wanted") from None
    if len(data) > largest_bytes:
        raise BadConfig(named, f"is longer than {largest_bytes >> 20} MiB, which no {what} is")
    try:
        found = model.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise BadConfig(named, _first_problem(error, what)) from None
    except BadConfig as error:
        raise BadConfig(named, plain(str(error))) from None
    version = getattr(found, "schema_version", 1)
    if version != 1:
        raise BadConfig(named, f"field schema_version: {version} is not known here; 1 is allowed")
    return found


def _first_problem(error: ValidationError, what: str) -> str:
    from fourtuple.cli.render import plain

    problem, *others = error.errors(include_url=False, include_context=False)
    field = plain(".".join(str(part) for part in problem["loc"]))[:120]
    value = "" if problem["type"] in ("json_invalid", "missing") else f", not {plain(repr(problem['input']))[:60]}"
    more = f" (and {len(others):,} more problems)" if others else ""
    where = f"field {field}: " if field else f"is no {what}: "
    return f"{where}{plain(problem['msg'])}{value}{more}"
