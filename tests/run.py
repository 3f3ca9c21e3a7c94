"""Run the tests of both languages, show their output as it comes, and close with one line that counts them all.

Decides what "all tests" means, and what runs beside what: tests of the broker and of single modules in one lane, those
of limits and load in the other. Both wait more than they compute; the first has a network namespace of its own, so that
neither takes the other's ports, and a folder of its own for temporary files, for there are tests that compare /tmp.
More lanes would want for processors. A runner that ends badly without naming a failed test counts as one failure.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).parent.parent
CARGO = ("cargo", "test", "--workspace", "--profile", "tests", "--locked", "--no-fail-fast")
PYTEST = (sys.executable, "-m", "pytest", "--color=no", "--durations=10")
OF_LIMITS = (
    *("bench", "cgroup", "doctor_in_lab", "failures", "kill", "lab", "load", "load_tls", "load_udp", "plan"),
    *("plan_files", "prove", "run", "script", "sources", "truth", "truth_roles", "tune"),
)
"""Of tests/netns; whatever is not named is in the other lane."""
IN_A_NETWORK_OF_ITS_OWN = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
PROGRESS = re.compile(r"\[ *\d+%\]$")
SUMMARY = re.compile(r"^(test result: |(=+ )?\d+ (passed|failed|skipped|deselected|xfailed|error|warning))")
"""The line with which cargo closes each test binary, and pytest the whole run."""
COUNTED = re.compile(r"(\d+) (passed|failed|ignored|skipped|xfailed|errors?)\b")
MEANING = {"passed": "passed", "failed": "failed", "error": "failed", "errors": "failed"}
"""What is in neither list was skipped: ignored, xfailed."""
# Tests start programs of ours some hundred times; without this each time would be spent on compiling them, too.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def main(arguments: Sequence[str]) -> int:
    # In the background of a shell it ignores Ctrl-C, and so would every program that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    total = run(CARGO)
    if arguments or not has_networks():
        total += run([*PYTEST, *arguments])
    else:
        total += both_lanes()
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if total["failed"] or not total["passed"] else 0


def has_networks() -> bool:
    """Whether a network namespace can be had here, and be entered by a program."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return not subprocess.run([*IN_A_NETWORK_OF_ITS_OWN, "true"], capture_output=True, check=False).returncode


def both_lanes() -> Counter[str]:
    """All files of tests, each in one of them."""
    files = sorted(path.relative_to(ROOT) for path in ROOT.glob("tests/**/test_*.py"))
    limits = [file for file in files if file.parts[1] == "netns" and file.stem.removeprefix("test_") in OF_LIMITS]
    others = [file for file in files if file not in limits]
    lock = Lock()
    with tempfile.TemporaryDirectory(prefix="", dir="/tmp") as folder, ThreadPoolExecutor(2) as pool:
        # As /tmp, for services run as other users, too; its path is short, for it is part of sockets' paths.
        Path(folder).chmod(0o1777)
        lanes = [
            pool.submit(lane, [*PYTEST, *map(str, limits)], ENVIRONMENT, lock),
            pool.submit(
                lane,
                [*IN_A_NETWORK_OF_ITS_OWN, *PYTEST, *map(str, others)],
                ENVIRONMENT | {"TMPDIR": folder},
                lock,
            ),
        ]
        return sum((one.result() for one in lanes), Counter[str]())


def lane(command: Sequence[str], environment: Mapping[str, str], lock: Lock) -> Counter[str]:
    """As `run`; of its output only the progress is shown at once, and the rest in one piece at the end."""
    rest: list[str] = []

    def show(line: str) -> None:
        if PROGRESS.search(line.rstrip()):
            with lock:
                print(line, end="", flush=True)
        else:
            rest.append(line)

    counts = run(command, environment, show)
    with lock:
        print("".join(rest), end="", flush=True)
    return counts


def shown(line: str) -> None:
    print(line, end="", flush=True)


def run(
    command: Sequence[str], environment: Mapping[str, str] = ENVIRONMENT, show: Callable[[str], object] = shown
) -> Counter[str]:
    """How many passed, failed and were skipped; the output is passed on line by line."""
    show(f"$ {' '.join(command)}\n")
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        errors="replace", text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        counts: Counter[str] = Counter()
        for line in process.stdout:
            show(line)
            if SUMMARY.search(line):
                for number, word in COUNTED.findall(line):
                    counts[MEANING.get(word, "skipped")] += int(number)
    return judged(command, process.returncode, counts)


def judged(command: Sequence[str], status: int, counts: Counter[str]) -> Counter[str]:
    if status and not counts["failed"]:
        print(f"{command[0]} ended with status {status} and names no failed test", flush=True)
        counts["failed"] += 1
    return counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
