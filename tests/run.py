"""Run the tests of both languages, show their output as it comes, and close with one line that counts them all.

Decides what "all tests" means. A runner that ends badly without naming a failed test counts as one failure.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNNERS = (
    ["cargo", "test", "--workspace", "--profile", "tests", "--locked", "--no-fail-fast"],
    [sys.executable, "-m", "pytest", "--color=no", "--durations=10"],
)
SUMMARY = re.compile(r"^(test result: |(=+ )?\d+ (passed|failed|skipped|deselected|xfailed|error|warning))")
"""The line with which cargo closes each test binary, and pytest the whole run."""
COUNTED = re.compile(r"(\d+) (passed|failed|ignored|skipped|xfailed|errors?)\b")
MEANING = {"passed": "passed", "failed": "failed", "error": "failed", "errors": "failed"}
"""What is in neither list was skipped: ignored, xfailed."""


def main(arguments: Sequence[str]) -> int:
    total: Counter[str] = Counter()
    for runner in RUNNERS:
        command = [*runner, *arguments] if "pytest" in runner else runner
        print("$", *command, flush=True)
        total += run(command)
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if total["failed"] or not total["passed"] else 0


def run(command: Sequence[str]) -> Counter[str]:
    """How many passed, failed and were skipped; the output is passed on line by line."""
    counts: Counter[str] = Counter()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if SUMMARY.search(line):
                for number, word in COUNTED.findall(line):
                    counts[MEANING.get(word, "skipped")] += int(number)
    if process.returncode and not counts["failed"]:
        print(f"{command[0]} ended with status {process.returncode} and names no failed test", flush=True)
        counts["failed"] += 1
    return counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
