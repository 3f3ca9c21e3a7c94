"""Kills `apply` and `undo` at random points and says what was left; run by the tests, in a process of its own.

Each trial is a forked child that is killed after a random time. Then either everything is old or everything is new
(its guardian saw to it), and undo gives back the old state byte for byte. With --both the guardian is killed too, as
when power fails: then any mixture may be left, and undo has to give back the old state all the same. Prints a line of
JSON: how many trials, how many were hit while they worked, and what was wrong.

Below --root /, which is this network namespace, only its own sysctls and routes are changed; with --lab NAME another's,
as tune --lab NAME does.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from fourtuple.host import journal, knobs
from fourtuple.host.apply import Step, apply, undo
from fourtuple.host.knobs import KnobKind
from fourtuple.host.namespace import inside_network_namespace

SYSCTLS = {
    "net.core.somaxconn": "65535",
    "net.ipv4.ip_local_reserved_ports": "1024-1030,2000,8080-8090",
    "net.ipv4.ip_local_port_range": "1024 65535",
    "net.ipv4.tcp_tw_reuse": "1",
    "net.ipv4.ip_forward": "1",
}
ROUTES = ("10.91.0.0/27", "10.92.0.0/24", "10.93.0.0/30")
FILES = ("etc/sysctl.d/60-fourtuple.conf", "etc/systemd/system/x.service.d/60-fourtuple.conf")
PATIENCE_S = 20.0


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--root", type=Path, required=True)
    options.add_argument("--state", type=Path, required=True)
    options.add_argument("--trials", type=int, required=True)
    options.add_argument("--seed", type=int, required=True)
    options.add_argument("--both", action="store_true")
    options.add_argument("--lab")
    asked = options.parse_args()
    trials = Trials(asked.root, asked.state, random.Random(asked.seed), asked.both, asked.lab)
    for number in range(asked.trials):
        trials.run(undoing=number % 2 == 1)
    print(json.dumps({"trials": asked.trials, "hit": trials.hit, "left": trials.left, "wrong": trials.wrong}))


class Trials:
    """A machine that is tuned and killed again and again."""

    def __init__(self, root: Path, state: Path, chance: random.Random, both: bool, lab: str | None) -> None:
        self.root, self.state, self.chance, self.both, self.lab = root, state, chance, both, lab
        self.hit = 0
        self.left = {"old": 0, "new": 0, "mixed": 0}
        self.wrong: list[str] = []
        steps = [Step(kind=KnobKind.SYSCTL, name=name, new=value.encode()) for name, value in SYSCTLS.items()]
        if root == Path("/"):
            steps += [Step(kind=KnobKind.ROUTE, name=prefix, new=knobs.LOCAL) for prefix in ROUTES]
        else:
            steps += [Step(kind=KnobKind.FILE, name=name, new=b"x = 1\n" * 1_000) for name in FILES]
        self.steps = tuple(steps)
        # Once in peace, to know both states and how long each way takes.
        self.old = self.seen()
        self.duration_s = {False: self._timed(self._apply), True: 0.0}
        self.new = self.seen()
        self.duration_s[True] = self._timed(self._undo)
        if self.seen() != self.old or self.new == self.old:
            self.wrong.append("apply and undo in peace do not give back the old state")

    def run(self, *, undoing: bool) -> None:
        if undoing:
            self._apply()
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                self._undo() if undoing else self._apply()
            os._exit(0)
        time.sleep(self.chance.uniform(0, self.duration_s[undoing] * 1.2))
        self._kill(child)
        self._await_lock()
        self._judge("undo" if undoing else "apply")

    def seen(self) -> dict[str, bytes | None]:
        """Every knob as it is; below another root also every other file and folder, but for the journal's."""
        with self._there():
            found = {step.name: knobs.read(self.root, step.kind, step.name) for step in self.steps}
        if self.root != Path("/"):
            for path in self.root.rglob("*"):
                if not path.is_relative_to(self.state):
                    found[str(path)] = path.read_bytes() if path.is_file() else None
        return found

    def _judge(self, what: str) -> None:
        now = self.seen()
        left = "old" if now == self.old else "new" if now == self.new else "mixed"
        self.left[left] += 1
        if left == "mixed" and not self.both:
            self.wrong.append(f"killed in {what}: {[name for name in now if now[name] != self.old.get(name)]}")
        if journal.exists(self.state):
            self._undo()
        if self.seen() != self.old:
            self.wrong.append(f"killed in {what}: undo does not give back the old state")

    def _kill(self, child: int) -> None:
        guardians: list[int] = []
        if self.both:
            with suppress(OSError):
                guardians = [int(pid) for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split()]
            os.kill(child, signal.SIGSTOP)
        for guardian in guardians:
            with suppress(ProcessLookupError):
                os.kill(guardian, signal.SIGKILL)
        os.kill(child, self.chance.choice((signal.SIGKILL, signal.SIGTERM)) if not self.both else signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        self.hit += os.WIFSIGNALED(status)

    def _await_lock(self) -> None:
        """The guardian holds the lock until it has restored."""
        with (self.state / journal.LOCK).open("a") as lock:
            deadline_s = time.monotonic() + PATIENCE_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() > deadline_s:
                        raise
                    time.sleep(0.001)

    def _apply(self) -> None:
        with self._there():
            apply(self.steps, root=self.root, state=self.state)

    def _undo(self) -> None:
        with self._there():
            undo(root=self.root, state=self.state)

    def _there(self) -> AbstractContextManager[object]:
        return nullcontext() if self.lab is None else inside_network_namespace(self.lab)

    def _timed(self, work: Callable[[], None]) -> float:
        begun_s = time.monotonic()
        work()
        return time.monotonic() - begun_s


if __name__ == "__main__":
    main()
