"""What is typed behind `fourtuple serve`: read plainly or by typer, it means the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from fourtuple.cli import main, serving
from fourtuple.cli.commands import application
from fourtuple.cli.load import CarrierOption
from fourtuple.cli.serving import Options


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """What a broker would have been started with."""
    found: list[Options] = []

    def serve(options: Options) -> int:
        found.append(options)
        return 0

    monkeypatch.setattr(serving, "serve", serve)
    return found


def by_typer(words: list[str]) -> int:
    typed = ["serve", *words]
    return int(application(typed)(args=typed, prog_name="fourtuple", standalone_mode=False) or 0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "-c broker.toml",
        "--config /etc/fourtuple/broker.toml --store /var/lib/fourtuple --json",
        "--log log --log-steps --log-every 10 --events events --every 2.5",
        "--most 1000000 --most-per-source 10 --most-per-service 20 --patience 1 --grace 0.5",
        "--workers 2 --carrier epoll --explain",
        "--demo --services 100k --listen 127.0.0.1:1 --check",
        "-c one -c two",
        "--store ~/store",
    ],
)
def test_a_plain_line_means_what_typer_reads_in_it(line: str, served: list[Options]) -> None:
    assert by_typer(line.split()) == 0
    assert main.main(["serve", *line.split()]) == 0
    assert Options.plain(line.split()) == served[0] == served[1]


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["broker.toml"],
        ["-c"],
        ["-c", "--json"],
        ["-c", ""],
        ["--config=broker.toml"],
        ["--conf", "broker.toml"],
        ["--json", "yes"],
        ["--workers", "two"],
        ["--workers", "-1"],
        ["--workers", "1_0"],
        ["--workers", "٣"],
        ["--workers", "1" * 30],
        ["--grace", "1e9"],
        ["--grace", "nan"],
        ["--carrier", "Epoll"],
        ["--as-json"],
        [""],
        ["--"],
        ["-c", "a\nb"],
    ],
)
def test_what_is_not_plain_is_left_to_typer(words: list[str]) -> None:
    assert Options.plain(words) is None


def test_each_option_has_one_name_and_one_default() -> None:
    app: Any = typer.main.get_command(application(["serve"]))
    declared = {one.name: one for one in app.commands["serve"].params if one.name != "help"}
    assert list(declared) == list(Options._fields)
    for name, one in declared.items():
        assert f"--{name.replace('_', '-')}" in one.opts
        assert one.default == getattr(Options(), name)
    assert [name for name, one in declared.items() if "-c" in one.opts] == ["config"]
    assert tuple(CarrierOption) == serving.CARRIERS


def test_an_error_of_the_plain_way_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve", "-c", str(tmp_path / "none")]) == 64
    assert "cannot be read" in capsys.readouterr().err
    assert main.main(["serve"]) == 64
    assert "--config: is missing" in capsys.readouterr().err
    assert main.main(["serve", "--workers", "0"]) == 64
    assert "--workers" in capsys.readouterr().err
