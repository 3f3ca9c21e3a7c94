"""`fourtuple prove --quick` on the real kernel: each step passes, and what cannot run here says which limit it was.

No assertion here is about time. The step `cliff` is about nothing else, so of it only the shape is looked at.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fourtuple
from fourtuple import limits
from fourtuple.cli import Exit
from fourtuple.lab import namespaces
from fourtuple.prove import STEPS
from fourtuple.prove.steps import exhaust

PACKAGE_PARENT = Path(fourtuple.__file__ or "").parents[1]
PROVE = [sys.executable, "-m", "fourtuple", "prove", "--quick", "--json"]
UNSHARE = {"x86_64": 272, "aarch64": 97}
UNTIMED = tuple(step.name for step in STEPS if step.name != "cliff")

Proof = dict[str, Any]


def proof_of(*arguments: str, prepare: Callable[[], None] | None = None) -> tuple[int, Proof]:
    """Run a quick proof in a process of its own; its exit status and its JSON, which is all of its standard output."""
    done = subprocess.run(
        [*PROVE, *arguments],
        env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
        capture_output=True,
        text=True,
        preexec_fn=prepare,
    )
    assert "Traceback" not in done.stderr, done.stderr
    proof: Proof = json.loads(done.stdout)
    names = {row["bound_by"] for row in rows_of(proof)} - {""}
    assert [name for name in names if limits.by_name(name) is None] == [], "each is a name of the catalogue"
    return done.returncode, proof


def rows_of(proof: Proof, step: str = "") -> list[Proof]:
    return [row for result in proof["results"] if step in ("", result["step"]) for row in result["rows"]]


def told(rows: list[Proof]) -> str:
    return "\n".join(f"{row['outcome']} {row['claim']}: {row['reached']} [{row['kernel_said']}]" for row in rows)


def few_descriptors(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def refuse_unshare() -> None:
    """What a container runtime's seccomp profile does to a process without CAP_SYS_ADMIN."""
    machine = os.uname().machine
    load, jump_if_equal, give = 0x20, 0x15, 0x06
    program = (
        (load, 0, 0, 0),
        (jump_if_equal, 0, 1, UNSHARE[machine]),
        (give, 0, 0, namespaces.SECCOMP_RET_ERRNO | errno.EPERM),
        (give, 0, 0, namespaces.SECCOMP_RET_ALLOW),
    )
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(instructions)))
    namespaces._prctl(namespaces.PR_SET_NO_NEW_PRIVS, 1)
    namespaces._prctl(namespaces.PR_SET_SECCOMP, namespaces.SECCOMP_MODE_FILTER, ctypes.addressof(header))


class TestEveryStep:
    @pytest.mark.slow
    @pytest.mark.parametrize("step", UNTIMED)
    def test_passes_here(self, step: str) -> None:
        status, proof = proof_of("--only", step, *(["--connections", "20000"] if step == "server" else []))
        rows = rows_of(proof)
        assert status == Exit.HEALTHY, told(rows)
        assert proof["passed"]
        for row in rows:
            assert row["expected"] is None or row["reached"] == row["expected"]

    def test_exhaust_is_exact_for_each_range_of_both_families(self) -> None:
        _, proof = proof_of("--only", "exhaust")
        reached = {row["claim"].split(" gives")[0]: row["reached"] for row in rows_of(proof)}
        families = ("IPv4", "IPv6") if Path("/proc/sys/net/ipv6").is_dir() else ("IPv4",)
        ranges = [(family, ports) for family in families for ports in exhaust.SMALL_RANGES]
        assert any((last - first) % 2 == 0 for first, last in exhaust.SMALL_RANGES), "an odd size is among them"
        for family, (first, last) in [*ranges, ("IPv4", (32_768, 60_999)), ("IPv4", (1, 65_535))]:
            assert reached[f"{family}: the range {first}-{last}"] == last - first + 1, proof["results"]

    def test_the_cliff_is_drawn(self) -> None:
        _, proof = proof_of("--only", "cliff")
        (curve,) = proof["results"][0]["curves"]
        assert len(curve["series"]) == 4
        assert all(len(points) == 100 for points in curve["series"].values())


class TestWhatCannotRun:
    def test_no_io_uring(self) -> None:
        status, proof = proof_of("--refuse-io-uring", "--only", "descriptors", "--only", "one-port")
        beyond = rows_of(proof, "descriptors")[-1]
        assert (beyond["outcome"], beyond["bound_by"]) == ("stopped", "direct-descriptors")
        assert status == Exit.UNABLE, told(rows_of(proof))

    def test_io_uring_refused_and_a_process_has_few_descriptors(self) -> None:
        """Several processes at each end hold together what none holds alone."""
        arguments = ("--refuse-io-uring", "--only", "server", "--only", "cliff", "--connections", "3000")
        status, proof = proof_of(*arguments, prepare=partial(few_descriptors, 1_024))
        (server,) = rows_of(proof, "server")
        assert (server["outcome"], server["reached"]) == ("passed", 3_000)
        (cliff,) = rows_of(proof, "cliff")
        assert (cliff["outcome"], cliff["bound_by"]) == ("stopped", "descriptors-hard")
        assert status == Exit.UNABLE

    def test_hardly_any_descriptors(self) -> None:
        status, proof = proof_of("--only", "addresses", prepare=partial(few_descriptors, 64))
        outcomes = {row["outcome"] for row in rows_of(proof)}
        assert outcomes == {"passed", "stopped"}, told(rows_of(proof))
        stopped = [row for row in rows_of(proof) if row["outcome"] == "stopped"]
        assert {row["bound_by"] for row in stopped} <= {"direct-descriptors", "descriptors-soft"}
        assert all(row["reached"] > 0 for row in stopped)
        assert status == Exit.UNABLE

    @pytest.mark.skipif(os.uname().machine not in UNSHARE, reason="the filter knows two architectures")
    def test_no_namespaces(self) -> None:
        status, proof = proof_of(prepare=refuse_unshare)
        assert [result["outcome"] for result in proof["results"]] == ["stopped"] * len(STEPS)
        assert {row["bound_by"] for row in rows_of(proof)} == {"security-modules"}
        assert all("seccomp" in row["kernel_said"] for row in rows_of(proof))
        assert status == Exit.UNABLE


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_end_in_the_middle_keeps_what_was_reached(how: signal.Signals) -> None:
    command = [*PROVE, "--only", "one-port", "--only", "exhaust"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    with running:
        while "10.82" not in (line := running.stderr.readline()) and "IPv4" not in line:
            assert line, "it ended by itself"
        time.sleep(0.05)
        running.send_signal(how)
        out, err = running.communicate()
    proof = json.loads(out)
    assert running.returncode == Exit.INTERRUPTED
    assert "Traceback" not in err
    assert proof["interrupted"]
    assert rows_of(proof)[0]["outcome"] == "passed"
    assert (rows_of(proof)[-1]["outcome"], rows_of(proof)[-1]["kernel_said"]) == ("stopped", "interrupted")


def test_a_reader_that_goes_ends_the_run_quietly() -> None:
    command = f"{sys.executable} -m fourtuple prove --quick --only one-port | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
