"""Run the tests of both languages, show their output as it comes, and close with one line that counts them all.

Decides what "all tests" means. Nothing runs beside anything else: on two processors, tests of the real kernel that wait
for each other's turns would fail for that. A runner that ends badly without naming a failed test counts as one failure.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
CARGO = ("cargo", "test", "--workspace", "--profile", "tests", "--locked", "--no-fail-fast")
PYTEST = (sys.executable, "-m", "pytest", "--color=no", "--durations=10")
SUMMARY = re.compile(r"^(test result: |(=+ )?\d+ (passed|failed|skipped|deselected|xfailed|error|warning))")
"""The line with which cargo closes each test binary, and pytest the whole run."""
COUNTED = re.compile(r"(\d+) (passed|failed|ignored|skipped|xfailed|errors?)\b")
MEANING = {"passed": "passed", "failed": "failed", "error": "failed", "errors": "failed"}
"""What is in neither list was skipped: ignored, xfailed."""
# Tests start programs of ours some hundred times; without this each time would be spent on compiling them, too.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def main(arguments: Sequence[str]) -> int:
    total = run(CARGO) + run([*PYTEST, *arguments])
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if total["failed"] or not total["passed"] else 0


def run(command: Sequence[str]) -> Counter[str]:
    """How many passed, failed and were skipped; the output is passed on line by line."""
    print("$", *command, flush=True)
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        errors="replace", text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        counts = passed_on(process.stdout)
    return judged(command, process.returncode, counts)


def passed_on(output: IO[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in output:
        print(line, end="", flush=True)
        if SUMMARY.search(line):
            for number, word in COUNTED.findall(line):
                counts[MEANING.get(word, "skipped")] += int(number)
    return counts


def judged(command: Sequence[str], status: int, counts: Counter[str]) -> Counter[str]:
    if status and not counts["failed"]:
        print(f"{command[0]} ended with status {status} and names no failed test", flush=True)
        counts["failed"] += 1
    return counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
