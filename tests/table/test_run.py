"""The closing line of `make test` counts what the two runners said, and cannot be green when one of them was not."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Run = Callable[[Sequence[str]], Counter[str]]


@pytest.fixture
def run() -> Run:
    found: Run = runpy.run_path(str(Path(__file__).parents[1] / "run.py"))["run"]
    return found


@pytest.mark.parametrize(
    ("said", "status", "passed", "failed", "skipped"),
    [
        ("test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.1s", 0, 12, 0, 3),
        (
            "test result: ok. 2 passed; 0 failed; 0 ignored\ntest result: FAILED. 1 passed; 4 failed; 0 ignored",
            101,
            3,
            4,
            0,
        ),
        ("===== 2 failed, 30 passed, 4 skipped, 1 deselected, 1 xfailed, 3 errors in 9.87s =====", 1, 30, 5, 5),
        ("136 passed in 5.04s", 0, 136, 0, 0),
        ("===== 1 warning, 1 error in 0.70s =====", 2, 0, 1, 0),
        ("error: could not compile `fourtuple-engine`", 101, 0, 1, 0),
        ("test result: ok. 5 passed; 0 failed; 0 ignored\nSegmentation fault", 139, 5, 1, 0),
        ("captured: test result: ok. 5 passed", 0, 0, 0, 0),
    ],
)
def test_counts(run: Run, said: str, status: int, passed: int, failed: int, skipped: int) -> None:
    counts = run([sys.executable, "-c", f"import sys; print({said!r}); sys.exit({status})"])
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (passed, failed, skipped)


def test_output_that_is_no_text(run: Run) -> None:
    counts = run([sys.executable, "-c", r"import os; os.write(1, b'\xff\xfe\n1 passed in 0.1s\n')"])
    assert counts["passed"] == 1
