"""The names that `import fourtuple` promises are there, and cost nothing until they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fourtuple


@pytest.mark.parametrize("name", fourtuple.__all__)
def test_a_promised_name(name: str) -> None:
    value = getattr(fourtuple, name)
    assert isinstance(value, tuple) or value.__doc__, "a public name says what it means"


def test_no_name_but_the_promised_ones() -> None:
    assert not hasattr(fourtuple, "Sources")
    assert len(set(fourtuple.__all__)) == len(fourtuple.__all__)


def test_counting_loads_only_the_standard_library() -> None:
    program = "import fourtuple, sys; fourtuple.PortSet.parse('80'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    costly = {"pydantic", "rich", "typer", "fourtuple._core", "fourtuple.facts", "fourtuple.engine", "asyncio"}
    assert not costly & set(loaded.stdout.split())
