"""What docs/control.md says of events, paths and commands is what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fourtuple.cli.control import AT_THE_TOP, COMMANDS
from fourtuple.control.api import document
from fourtuple.eventlog import EVENTS

PAGE = (Path(__file__).parents[2] / "docs/control.md").read_text()


def test_every_event_is_described_with_its_fields() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", PAGE.partition("## Events")[2].partition("## Verbs")[0], re.M)
    described = [(name, tuple(re.findall(r"`(\w+)`", fields)), meaning) for name, fields, meaning in rows]
    assert described == [(row.name, row.fields, row.meaning) for row in EVENTS]


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
