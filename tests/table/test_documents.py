"""The documents do not promise what is not there: examples give what they show, targets and links exist."""

from __future__ import annotations

import doctest
import os
import re
from importlib import import_module
from pathlib import Path

import pytest

from fourtuple.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "docs/eaddrnotavail.md",
    "docs/registry.md",
    "docs/broker.md",
    "docs/ferry.md",
    "docs/sniffing.md",
    "fuzz/README.md",
)


def test_python_examples() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        example = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
        assert doctest.DocTestRunner().run(example).failed == 0


def test_make_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert (
        set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"`[^`]+`|^make .*", README, re.MULTILINE))))
        <= targets
    )


def test_the_first_screen_names_the_two_commands() -> None:
    first_screen = README.splitlines()[:25]
    assert any(line.startswith("make prove") for line in first_screen)
    assert any(line.startswith("make test") for line in first_screen)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / document).read_text()):
        assert target.startswith("https://") or ((ROOT / document).parent / target).exists(), target


def test_the_page_on_eaddrnotavail_names_what_there_is() -> None:
    page = (ROOT / "docs/eaddrnotavail.md").read_text()
    promised = re.findall(r"fourtuple\.connect\.(\w+)\.(\w+)", page)
    assert {module for module, _ in promised} == {
        path.stem for path in (ROOT / "python/fourtuple/connect").glob("*.py")
    } - {"__init__", "attempts", "backends", "kernel", "sockets", "udp"}
    for module, name in promised:
        assert callable(getattr(import_module(f"fourtuple.connect.{module}"), name))
    commands = re.findall(r"`?fourtuple ((?:limits|doctor)[^`\n(]*)", page)
    assert len(commands) >= 4
    for command in commands:
        # The doctor's statuses 1 and 2 speak of this host; a command line that does not exist is 64.
        assert main(command.replace("PID", str(os.getpid())).split()) in (0, 1, 2), command
