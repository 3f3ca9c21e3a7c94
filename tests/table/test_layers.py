"""The dependency rules fail as they should: each is broken once, in a copy of the package, and its tool has to object.

A rule that nothing can break holds nothing; this is the test of the checks themselves.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
IMPORT_LINTER: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
CONTRACTS: dict[str, dict[str, Any]] = {contract["type"]: contract for contract in IMPORT_LINTER["contracts"]}

UPWARD = [
    ("errors.py", "import fourtuple.ranges"),
    ("ranges.py", "import fourtuple.tuples"),
    ("tuples.py", "from fourtuple.facts import Host"),
    ("sources.py", "import fourtuple.connect"),
    ("services.py", "import fourtuple.registry"),
    ("registry.py", "import fourtuple.brokerfile"),
    ("brokerfile.py", "import fourtuple.lab"),
    ("templates.py", "import fourtuple.service"),
    ("launcher/__init__.py", "import fourtuple.plan"),
    ("facts.py", "import fourtuple.limits"),
    ("service.py", "import fourtuple.asgi"),
    ("engine/engine.py", "import fourtuple.lab"),
    ("preload.py", "import fourtuple.hook"),
    ("hook.py", "import fourtuple.lab"),
    ("host/__init__.py", "import fourtuple.doctor"),
    ("doctor.py", "import fourtuple.plan"),
    ("plan/__init__.py", "import fourtuple.lab"),
    ("lab/__init__.py", "import fourtuple.prove"),
    ("prove/__init__.py", "from fourtuple.cli import main"),
]
"""A module, and an import that goes up from it."""

SIDEWAYS = [
    ("host/__init__.py", "import fourtuple.engine"),
    ("engine/engine.py", "import fourtuple.host"),
    ("preload.py", "import fourtuple.doctor"),
    ("limits/__init__.py", "from fourtuple import host"),
    ("metrics.py", "import fourtuple.errors"),
    ("connect/__init__.py", "import fourtuple.host"),
    ("registry.py", "import fourtuple.engine"),
    ("asgi.py", "import fourtuple.brokerfile"),
    ("service.py", "import fourtuple.host"),
    ("launcher/__init__.py", "import fourtuple.brokerfile"),
    ("templates.py", "import fourtuple.facts"),
]

IMPURE = [
    ("ranges.py", "import os"),
    ("tuples.py", "import socket"),
    ("sources.py", "import socket"),
    ("services.py", "from pathlib import Path"),
    ("sources.py", "from time import monotonic"),
    ("facts.py", "import subprocess"),
    ("templates.py", "import os"),
    ("limits/__init__.py", "import pathlib"),
    ("limits/_model.py", "import os.path"),
    ("plan/search.py", "import os"),
    ("plan/files.py", "from pathlib import Path"),
    ("doctor.py", "from time import monotonic"),
    ("doctor.py", "def later() -> None:\n    import socket"),
]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The Python sources and the rules in a folder of their own, where imports may be spoilt."""
    shutil.copytree(ROOT / "python", tmp_path / "python", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def spoil(copy: Path, module: str, statement: str) -> None:
    path = copy / "python/fourtuple" / module
    path.write_text(f"{path.read_text()}\n\n{statement}  # noqa\n")


def lint_imports(copy: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return run(copy, sys.executable, "-c", f"import sys; sys.path.insert(0, 'python'); {program}", "--no-cache")


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=copy, capture_output=True, text=True, timeout=120, check=False, env={"PYTHONPATH": "python"}
    )


def test_the_package_keeps_the_rules(copy: Path) -> None:
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(IMPORT_LINTER['contracts'])} kept, 0 broken" in done.stdout


@pytest.mark.parametrize(("module", "statement"), UPWARD)
def test_an_upward_import(copy: Path, module: str, statement: str) -> None:
    spoil(copy, module, statement)
    broken(lint_imports(copy), CONTRACTS["layers"]["name"])


@pytest.mark.parametrize(("module", "statement"), SIDEWAYS)
def test_a_sibling_import(copy: Path, module: str, statement: str) -> None:
    spoil(copy, module, statement)
    broken(lint_imports(copy), CONTRACTS["layers"]["name"])


@pytest.mark.parametrize(("module", "statement"), IMPURE)
def test_an_impure_import(copy: Path, module: str, statement: str) -> None:
    spoil(copy, module, statement)
    broken(lint_imports(copy), CONTRACTS["forbidden"]["name"])


@pytest.mark.parametrize(
    "statement", ["import fourtuple._core", "from fourtuple._core import Workers", "from fourtuple import _core"]
)
@pytest.mark.parametrize("module", ["cli/main.py", "lab/__init__.py", "host/__init__.py", "metrics.py"])
def test_another_door_to_the_compiled_module(copy: Path, module: str, statement: str) -> None:
    path = copy / "python/fourtuple" / module
    path.write_text(f"{statement}\n")
    done = run(
        copy, str(Path(sys.executable).with_name("ruff")), "check", "--no-cache", "--select", "TID251", str(path)
    )
    assert done.returncode == 1
    assert "and fourtuple.launcher.spawn talk to the compiled module" in done.stdout


@pytest.mark.parametrize("module", ["engine/engine.py", "registry.py", "launcher/spawn.py"])
def test_the_three_doors(copy: Path, module: str) -> None:
    path = copy / "python/fourtuple" / module
    assert "_core" in path.read_text()
    done = run(
        copy, str(Path(sys.executable).with_name("ruff")), "check", "--no-cache", "--select", "TID251", str(path)
    )
    assert done.returncode == 0, done.stdout


def test_every_module_has_a_layer() -> None:
    layers = {name.strip() for layer in CONTRACTS["layers"]["layers"] for name in layer.split("|")}
    package = ROOT / "python/fourtuple"
    modules = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/*.py")}
    assert {f"fourtuple.{module}" for module in modules - {"__init__", "__main__"}} == layers


def test_pure_modules_are_the_pure_layers() -> None:
    pure = {"ranges", "dialogue", "tuples", "sources", "services", "questions", "templates", "facts"}
    pure |= {"limits", "doctor", "plan"}
    assert set(CONTRACTS["forbidden"]["source_modules"]) == {f"fourtuple.{module}" for module in pure}


def broken(done: subprocess.CompletedProcess[str], contract: str) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in " ".join(done.stdout.split())
