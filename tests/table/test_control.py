"""What docs/control.md says of events, paths and commands is what there is."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from fourtuple.cli.control import AT_THE_TOP, COMMANDS
from fourtuple.control.api import document
from fourtuple.eventlog import EVENTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/control.md").read_text()
SAYING = {"supervisor": ("_log",), "control": ("say", "_say")}
"""In which folder an event is what is given to which function."""


def test_every_event_is_described_with_its_fields() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", PAGE.partition("## Events")[2].partition("## Verbs")[0], re.M)
    described = [(name, tuple(re.findall(r"`(\w+)`", fields)), meaning) for name, fields, meaning in rows]
    assert described == [(row.name, row.fields, row.meaning) for row in EVENTS]


def said() -> Iterator[tuple[str, set[str]]]:
    """Each event that a program says, and its fields; `**more` is not seen."""
    for folder, functions in SAYING.items():
        for path in sorted((ROOT / "python/fourtuple" / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(
                        func=ast.Attribute(attr=function) | ast.Name(id=function),
                        args=[ast.Constant(value=str(name))],
                        keywords=fields,
                    ) if function in functions:
                        yield name, {one.arg for one in fields if one.arg is not None}


def test_every_event_that_is_said_is_one_with_these_fields() -> None:
    known = {row.name: set(row.fields) for row in EVENTS}
    told = list(said())
    assert {"service_moved", "plugin_raised", "control_told"} <= {name for name, _ in told}
    assert [(name, fields) for name, fields in told if not fields <= known.get(name, set())] == []


def test_every_path_and_command_is_described() -> None:
    table = PAGE.partition("| request |")[2].partition("```")[0]
    described = set(re.findall(r"`(GET|POST|PATCH|DELETE) (/[\w/]*)", table))
    served = {
        (method.upper(), re.sub(r"\{\w+\}", lambda found: found[0][1:-1].upper(), path))
        for path, methods in document()["paths"].items()
        for method in methods
    }
    assert described == served
    named = re.findall(r"`fourtuple (control )?(\w+)", table)
    assert {name for _, name in named} == set(COMMANDS)
    assert {name for under, name in named if not under} == set(AT_THE_TOP)


def test_every_error_is_a_problem() -> None:
    page = document()
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                expected = {"application/problem+json"} if int(status) >= 400 else None
                assert expected is None or set(answer["content"]) == expected, (method, path, status)
    assert set(page["components"]["schemas"]["Problem"]["required"]) == {"title", "status", "detail"}
    json.dumps(page)
