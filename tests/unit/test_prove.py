"""What a proof is made of, and its paper: arithmetic of shares, outcomes, JSON, the HTML report. No lab here."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fourtuple import limits
from fourtuple.cli import Exit
from fourtuple.cli.main import main
from fourtuple.engine import LoadConfig, SourceChoice
from fourtuple.errors import BadConfig
from fourtuple.prove import STEPS, Curve, Options, Outcome, Proof, Row, Step, StepResult, fleet, prove, report
from fourtuple.prove.stage import SHORTAGES, Stage, limit_behind, space
from fourtuple.prove.steps import server


class Silence:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def step_started(self, step: Step, number: int, of: int) -> None:
        pass

    def claimed(self, claim: str) -> None:
        pass

    def noted(self, text: str) -> None:
        pass

    def progressed(self, label: str, value: int, target: int | None) -> None:
        pass

    def row_added(self, row: Row) -> None:
        self.rows.append(row)

    def step_ended(self, result: StepResult) -> None:
        pass


HOSTILE = "<script>alert('1 & 2')</script>"
PASSED = Row(claim="one", expected=65_535, reached=65_535, bound_by="ephemeral-ports", outcome=Outcome.PASSED)
STOPPED = Row(claim=HOSTILE, reached=7, bound_by="descriptors-soft", kernel_said=HOSTILE, outcome=Outcome.STOPPED)
CURVE = Curve(title="t < u", x_label="x", y_label="y", series={"a": ((0.0, 1.0), (2.0, 3.0))}, marks=((2.0, "<2>"),))


def a_proof(*rows: Row) -> Proof:
    stage = Stage(Options(), Silence())
    for row in rows:
        stage.add(row)
    result = replace(stage.result("server", "One port"), curves=(CURVE,), notes=(HOSTILE,))
    return Proof(results=(result,), machine="m", kernel="k", started_at="now", seconds=1.5)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("connections", [64, 100, 101, 6_399])
def test_shares_are_disjoint_and_lose_nothing(parts: int, connections: int) -> None:
    whole = space("10.81.0.1-10.81.0.2", "1024-4223", "10.82.0.1")
    config = LoadConfig(space=whole, connections=connections, choice=SourceChoice.BIND)
    shares = fleet.share_out(config, parts)
    assert sum(share.connections for share in shares) == connections
    assert sum(share.space.size for share in shares) == whole.size
    assert all(share.connections <= share.space.size for share in shares)
    seen = [ports for share in shares for ports in share.space.source_ports.ranges()]
    assert len({first for first, _ in seen}) == parts


def test_where_the_kernel_chooses_each_share_has_the_whole_space() -> None:
    whole = space("10.81.0.1", "1024-2023", "10.82.0.1")
    config = LoadConfig(space=whole, connections=101, choice=SourceChoice.KERNEL)
    assert [share.space for share in fleet.share_out(config, 4)] == [whole] * 4


@pytest.mark.parametrize(("hard", "each"), [(20_000, 19_936), (1_024, 960), (256, 192), (64, 32), (1, 1)])
def test_descriptors_of_a_process(monkeypatch: pytest.MonkeyPatch, hard: int, each: int) -> None:
    monkeypatch.setattr(fleet, "hard_limit", lambda: hard)
    assert fleet.descriptors_each() == each
    assert fleet.processes_for(1) == 1
    assert fleet.processes_for(each + 1) == 2
    assert fleet.processes_for(10**12) == fleet.MOST_PROCESSES


@pytest.mark.parametrize(
    ("rows", "outcome"),
    [
        ((), Outcome.FAILED),
        ((PASSED,), Outcome.PASSED),
        ((PASSED, STOPPED), Outcome.STOPPED),
        ((replace(PASSED, outcome=Outcome.FAILED), STOPPED), Outcome.FAILED),
    ],
)
def test_a_step_passes_only_if_every_row_did(rows: tuple[Row, ...], outcome: Outcome) -> None:
    proof = a_proof(*rows)
    assert proof.results[0].outcome is outcome
    assert proof.passed is (outcome is Outcome.PASSED)
    assert not replace(proof, interrupted=True).passed


def test_json_says_all_that_the_proof_holds() -> None:
    proof = a_proof(PASSED, STOPPED)
    read = json.loads(json.dumps(proof.to_json()))
    assert read["passed"] is False
    assert [Outcome(row["outcome"]) for row in read["results"][0]["rows"]] == [Outcome.PASSED, Outcome.STOPPED]
    rows = [Row(**{**row, "outcome": Outcome(row["outcome"])}) for row in read["results"][0]["rows"]]
    assert tuple(rows) == proof.results[0].rows
    (curve,) = read["results"][0]["curves"]
    assert curve["series"] == {"a": [[0.0, 1.0], [2.0, 3.0]]}


def test_the_report_has_every_row_and_believes_no_text() -> None:
    pytest.importorskip("matplotlib")
    proof = a_proof(PASSED, STOPPED, replace(PASSED, claim="third", outcome=Outcome.FAILED))
    page = report.html(proof)
    assert page.count('<td class="passed">') == page.count('<td class="failed">') == 1
    assert page.count('<td class="stopped">') == 1
    for text in ("one", "third", "65,535", "ephemeral-ports", "descriptors-soft"):
        assert f">{text}</td>" in page
    assert "Time" not in page, "a column that has no value is left out"
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3
    assert page.count("<svg") == 1
    loaded = re.findall(r"""(?:src|href)=["'](?!#)([^"']+)|url\((?!#)([^)]+)\)|@import""", page)
    assert loaded == [], "the page stands alone"


@pytest.mark.parametrize("name", SHORTAGES)
@pytest.mark.parametrize("call", ["", "socket", "accept", "connect", "bind", "listen"])
def test_whatever_runs_out_has_a_name_in_the_catalogue(name: str, call: str) -> None:
    assert limits.by_name(limit_behind(name, call)) is not None


def test_what_a_tuple_is_refused_with_is_no_shortage() -> None:
    assert limit_behind("EADDRNOTAVAIL", "connect") == ""
    assert all(hasattr(errno, name) for name in SHORTAGES)


@pytest.mark.parametrize("wrong", [0, -5, server.MOST + 1, 10**12])
def test_a_count_that_no_lab_has_tuples_for_is_refused_before_any_work(wrong: int) -> None:
    with pytest.raises(BadConfig, match="--connections"):
        prove(Options(connections=wrong), Silence())


def test_an_unknown_step_is_answered_with_the_list() -> None:
    with pytest.raises(BadConfig) as caught:
        prove(Options(only=("nope",)), Silence())
    assert all(step.name in str(caught.value) for step in STEPS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "nope"], ["--only", "'nope'", "exhaust", "cliff"]),
        (["--connections", "0"], ["--connections", "'0'", "whole number from 1"]),
        (["--connections=-5"], ["--connections", "'-5'", "whole number from 1"]),
        (["--connections", "abc"], ["--connections", "'abc'", "whole number from 1"]),
        (["--connections", "1000000000000"], ["--connections", "1,000,000,000,000", "4,227,793,920"]),
        (["--html", "/nonexistent/report.html"], ["--html", "/nonexistent/report.html", "No such file"]),
        (["--html", "/"], ["--html", "Is a directory"]),
        (["--carrier", "pigeon"], ["--carrier", "pigeon", "uring", "epoll"]),
    ],
)
def test_wrong_usage_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    if "--html" in arguments:
        pytest.importorskip("matplotlib")
    assert main(["prove", "--quick", *arguments]) == Exit.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert [word for word in words if word not in printed.err] == []


def test_trying_the_report_s_place_leaves_no_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    place = tmp_path / "report.html"
    assert main(["prove", "--html", str(place), "--only", "nope"]) == Exit.USAGE
    assert not place.exists()
