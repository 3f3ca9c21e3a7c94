"""python3 fuzz/run.py: build every fuzz target and run each for a while, two at a time; 1 if one found something.

Decides the flags that make a build libFuzzer's, what is a finding, and which inputs are kept for ever (`--keep`). Needs
the compiler of the rest and a C++ compiler for libFuzzer: no nightly, and no cargo-fuzz, though `cargo fuzz` works here
as well. Knows no parser: a target is a file in fuzz_targets.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FUZZ = Path(__file__).resolve().parent
TARGETS = tuple(sorted(path.stem for path in (FUZZ / "fuzz_targets").glob("*.rs")))
AT_A_TIME = 2
MOST_INPUT_BYTES = 20_000
"""More than a TLS record and a line of services have, which are bounds that a parser has to keep."""
MOST_KEPT_BYTES = 512
"""Large inputs are many of the bytes and few of the edges."""
SLOWEST_INPUT_S = 10
BUILD = (
    # What libFuzzer learns from (SanitizerCoverage), as cargo-fuzz has it.
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "-Ccodegen-units=1",
    "-Cdebug-assertions",
    "--cfg",
    "fuzzing",
)
"""No address sanitizer: there is no unsafe code in what is fuzzed, and that one does need a nightly."""
PROGRESS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)/")
EXECUTIONS = re.compile(r"stat::number_of_executed_units: (\d+)")
EDGES_ONLY = ("-use_counters=0", "-use_cmp=0", "-use_value_profile=0", "-entropic=0")
"""How often an edge is passed is no reason to keep an input for ever."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one target; the numbers are libFuzzer's own."""

    target: str
    executions: int
    edges: int
    features: int
    inputs: int
    finding: str
    """What there is to be seen of it; empty if there is none."""


def main() -> int:
    """Build, run, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default all: {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=15, help="for each target; default 15")
    parser.add_argument("--keep", action="store_true", help="do not run; of corpus/, keep in kept/ what adds coverage")
    options = parser.parse_args()
    unknown = [target for target in options.targets if target not in TARGETS]
    if unknown or options.seconds < 1:
        parser.error(f"no target {', '.join(unknown)}" if unknown else "--seconds has to be 1 or more")
    targets = options.targets or list(TARGETS)
    folder = build()
    if options.keep:
        for target in targets:
            keep(folder, target)
        return 0
    print("target      executions    cov     ft  inputs", flush=True)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        outcomes = list(pool.map(lambda target: shown(run(folder, target, options.seconds)), targets))
    found = [outcome for outcome in outcomes if outcome.finding]
    print(f"{len(outcomes)} targets, {len(found)} with a finding: {' '.join(one.target for one in found) or 'none'}")
    return 1 if found else 0


def build() -> Path:
    """Build all targets; where they are. For a named platform, so that build scripts are not instrumented."""
    version = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True).stdout
    host = version.split("host: ", 1)[1].split("\n", 1)[0]
    target = FUZZ / "target"
    command = ["cargo", "build", "--release", "--locked", "--bins", "--target", host, "--target-dir", str(target)]
    flags = {"CARGO_ENCODED_RUSTFLAGS": "\x1f".join(BUILD)}
    subprocess.run(command, cwd=FUZZ, env=os.environ | flags, check=True)
    return target / host / "release"


def run(folder: Path, target: str, seconds: int) -> Outcome:
    """Run a target on what is kept and what it finds itself."""
    corpus, artifacts = unpack(target), FUZZ / "artifacts" / target
    artifacts.mkdir(parents=True, exist_ok=True)
    before = set(artifacts.iterdir())
    command = [
        str(folder / target), str(corpus), str(FUZZ / "seeds" / target), f"-max_total_time={seconds}",
        f"-max_len={MOST_INPUT_BYTES}", f"-timeout={SLOWEST_INPUT_S}", f"-artifact_prefix={artifacts}/",
        "-print_final_stats=1",
    ]  # fmt: skip
    # libFuzzer ends by itself; a target that is stuck where it cannot look at the clock does not.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", text=True
    ) as one:
        try:
            told, _ = one.communicate(timeout=2 * seconds + 60)
        except subprocess.TimeoutExpired:
            one.kill()
            told, _ = one.communicate()
        finally:
            one.kill()
    finding = ""
    if one.returncode:
        inputs = [describe(path) for path in sorted(set(artifacts.iterdir()) - before)]
        tail = "\n".join(told.splitlines()[-60:])
        finding = "\n".join([tail, f"exit status {one.returncode}", *inputs])
    progress, executions = PROGRESS.findall(told), EXECUTIONS.search(told)
    edges, features, count = map(int, progress[-1]) if progress else (0, 0, 0)
    return Outcome(target, int(executions[1]) if executions else 0, edges, features, count, finding)


def describe(path: Path) -> str:
    """An input that was too much, so that it can be taken from a log."""
    data = path.read_bytes()
    return (
        f"the input, {len(data)} bytes, as Python writes it: {data[:4096]!r}{' and more' * (len(data) > 4096)}\n{path}"
    )


def shown(outcome: Outcome) -> Outcome:
    """Print it at once: a line, and the whole of a finding."""
    line = f"{outcome.target:10} {outcome.executions:11,} {outcome.edges:6,} {outcome.features:6,} {outcome.inputs:7,}"
    print(f"{line}\n{outcome.finding}" if outcome.finding else line, flush=True)
    return outcome


def unpack(target: str) -> Path:
    """The folder that a target begins with and adds to; holds at least what is kept."""
    corpus = FUZZ / "corpus" / target
    corpus.mkdir(parents=True, exist_ok=True)
    kept = FUZZ / "kept" / f"{target}.txt"
    for line in kept.read_text().split() if kept.exists() else ():
        data = base64.b64decode(line)
        (corpus / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    return corpus


def keep(folder: Path, target: str) -> None:
    """Of all inputs the fewest that reach each edge that those in seeds/ do not; a line each, in base64."""
    corpus, seeds, kept = unpack(target), FUZZ / "seeds" / target, FUZZ / "kept" / f"{target}.txt"
    with tempfile.TemporaryDirectory(prefix="fourtuple-fuzz-") as name:
        chosen = Path(name)
        # What is in the first folder already counts as reached.
        written = {path.name for path in seeds.iterdir()}
        for path in seeds.iterdir():
            (chosen / path.name).write_bytes(path.read_bytes())
        command = [str(folder / target), "-merge=1", f"-max_len={MOST_KEPT_BYTES}", *EDGES_ONLY, name, str(corpus)]
        subprocess.run(command, check=True, capture_output=True)
        inputs = sorted(path.read_bytes() for path in chosen.iterdir() if path.name not in written)
    lines = [base64.b64encode(data).decode() + "\n" for data in inputs if len(data) <= MOST_KEPT_BYTES]
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("".join(lines))
    print(f"{target}: {len(lines)} inputs kept, {kept.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    sys.exit(main())
