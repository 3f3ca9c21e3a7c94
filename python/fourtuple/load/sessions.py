"""A script's sessions in worker processes, used as if they were an engine: `Crew`.

Decides how many processes there are, what share of connections, ports, rate and memory each has, and how they end: all
of them, and what they started, when the run does. What a worker does is `fourtuple.crew.worker`'s business.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from enum import Enum
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import Self

from fourtuple.crew.tally import BEGIN, END, ENOUGH, Histogram, Tally, Task
from fourtuple.engine import CarrierNumbers, Failure, Phase, Quantiles, Snapshot
from fourtuple.errors import BadConfig, LimitReached
from fourtuple.load.report import Raised, ScriptOutcome
from fourtuple.load.scenario import Scenario
from fourtuple.metrics import COUNTERS
from fourtuple.tuples import TupleSpace

SPARE_DESCRIPTORS = 64
"""Of each worker, for the interpreter, the channel and what a script opens."""
CONNECTIONS_PER_WORKER = 500
"""Below this another process costs more than it brings: 0.2 s of processor time and 20 MB each."""
START_S = 30.0
END_S = 4.5
"""Longer than a worker gives its sessions to end and its parent to hear of it (`fourtuple.crew.worker`)."""
LEAST_MEMORY_BYTES, MOST_MEMORY_BYTES, MEMORY_PER_CONNECTION_BYTES = 256 << 20, 1 << 30, 256 << 10
MOST_SAID_BYTES = 2_000
"""Of what the script prints, in all workers together."""
_MOST_MESSAGE_BYTES = 1 << 20
_NO_CARRIER = CarrierNumbers(**dict.fromkeys(CarrierNumbers.__struct_fields__, 0))


class ScriptCarrier(Enum):
    """What moves the bytes of a script."""

    ASYNCIO = "asyncio"


class Crew:
    """The workers of one run. A context manager: leaving it leaves no process behind."""

    carrier = ScriptCarrier.ASYNCIO

    def __init__(self, scenario: Scenario, script: Path, space: TupleSpace, descriptors: int) -> None:
        """Start the processes and wait until each has loaded the script; BadConfig if one cannot."""
        self._tasks = tasks(scenario, script, space, descriptors)
        self._started_s = time.monotonic()
        self._lock = threading.Lock()
        self._members: list[_Member] = []
        self._said = bytearray()
        self._selector = selectors.DefaultSelector()
        self._over = False
        self._ear = threading.Thread(target=self._listen, name="crew", daemon=True)
        try:
            for task in self._tasks:
                self._members.append(_Member(task))
            for member in self._members:
                self._selector.register(member.channel, selectors.EVENT_READ, member)
                self._selector.register(member.words, selectors.EVENT_READ, None)
            self._ear.start()
            self._await_ready()
            for member in self._members:
                member.order(BEGIN)
        except BaseException:
            self.stop()
            raise

    @property
    def workers(self) -> int:
        """How many processes."""
        return len(self._members)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the workers."""
        return tuple(member.process.pid for member in self._members)

    def snapshot(self) -> Snapshot:
        """The numbers of all workers together, as an engine gives them."""
        with self._lock:
            tallies = [member.tally for member in self._members]
            running = any(not member.gone for member in self._members)
            ramping = any(member.tally.ramping and not member.gone for member in self._members)
        total = Tally()
        for tally in tallies:
            total.merge(tally)
        failures = tuple(
            Failure(step=step, errno=number, count=count) for (step, number), count in sorted(total.failures.items())
        )
        counts: Counter[str] = total.counts
        wanting = not ramping and counts["open_now"] < sum(task.connections for task in self._tasks)
        here = [failure for failure in failures if failure.name in ("EADDRNOTAVAIL", "EMFILE", "ENFILE", "ENOBUFS")]
        return Snapshot(
            **{row.name: counts[row.name] for row in COUNTERS},
            taken_s=time.monotonic() - self._started_s,
            phase=Phase.RAMPING if ramping else Phase.HOLDING,
            running=running,
            failures=failures,
            stopped_by=max(here, key=lambda failure: failure.count) if here and wanting else None,
            opening_reasons=(),
            round_reasons=(("wrong", counts["pings_wrong"]),) if counts["pings_wrong"] else (),
            connect_ns=_quantiles(total.connect_ns),
            opening_ns=_quantiles(Histogram()),
            echo_ns=_quantiles(total.round_ns),
            fill_curves=(),
            listeners_served=0,
            carrier=_NO_CARRIER,
            errors=(),
        )

    def outcome(self) -> ScriptOutcome:
        """What the script itself did."""
        total = Tally()
        with self._lock:
            for member in self._members:
                total.merge(member.tally)
            said = bytes(self._said).decode(errors="replace")
        raised = (Raised(kind=kind, count=number, example=example) for kind, (number, example) in total.raised.items())
        blocked = max(total.blocked.items(), key=lambda one: one[1], default=("", 0.0))
        return ScriptOutcome(
            processes=len(self._members),
            most_connections_each=max(task.connections for task in self._tasks),
            sessions_ended=total.counts["sessions_ended"],
            raised=tuple(sorted(raised, key=lambda one: -one.count)),
            blocked_at=blocked[0],
            blocked_s=blocked[1],
            unwilling=total.unwilling,
            ended_early=tuple(member.obituary for member in self._members if member.obituary),
            said=said,
        )

    def ping(self) -> None:
        """A script says itself when its rounds are."""

    def set_target(self, connections: int) -> None:
        """Each place fills itself as long as the run lasts; fewer than there are means that no new one is to be."""
        if connections < sum(task.connections for task in self._tasks):
            for member in self._members:
                member.order(ENOUGH)

    def close(self) -> None:
        """End all sessions and connections, and the workers."""
        for member in self._members:
            member.ending = True
            member.order(END)

    def join(self, timeout_s: float) -> bool:
        """Wait for the workers to be gone; what is left after a few seconds is killed."""
        deadline_s = time.monotonic() + min(timeout_s, END_S)
        while time.monotonic() < deadline_s:
            with self._lock:
                if all(member.gone for member in self._members):
                    break
            time.sleep(0.02)
        self.stop()
        return True

    def stop(self) -> None:
        """End every worker and what it started, now; again does no harm."""
        for member in self._members:
            member.kill()
        self._over = True
        if self._ear.is_alive():
            self._ear.join()
        for member in self._members:
            member.bury()
        self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _await_ready(self) -> None:
        deadline_s = time.monotonic() + START_S
        while True:
            with self._lock:
                tallies = [(member.tally, member.gone) for member in self._members]
            for tally, gone in tallies:
                if tally.refused:
                    raise BadConfig("--script", f"cannot be loaded in a worker: {tally.refused}")
                if gone:
                    said = bytes(self._said).decode(errors="replace").strip()
                    raise BadConfig("--script", f"ends its worker while it is loaded{': ' if said else ''}{said}")
            if all(tally.ready for tally, _ in tallies):
                return
            if time.monotonic() >= deadline_s:
                raise BadConfig("--script", f"is not loaded by its workers within {START_S:g} s")
            time.sleep(0.01)

    def _listen(self) -> None:
        """Run in a thread of its own, so that no worker ever waits for whoever watches the run."""
        while not self._over:
            for key, _ in self._selector.select(timeout=0.1):
                if key.data is None:
                    self._hear_words(key.fd)
                else:
                    self._hear_member(key.data)

    def _hear_words(self, descriptor: int) -> None:
        words = os.read(descriptor, 65_536)
        if not words:
            self._selector.unregister(descriptor)
        with self._lock:
            self._said += words[: MOST_SAID_BYTES - len(self._said)]

    def _hear_member(self, member: _Member) -> None:
        try:
            message = member.channel.recv(_MOST_MESSAGE_BYTES)
        except OSError:
            message = b""
        with self._lock:
            if message:
                member.tally = Tally.decode(message)
                return
            member.gone, member.lost = True, not member.ending
            member.tally.counts["open_now"] = 0
        self._selector.unregister(member.channel)


class _Member:
    """A worker as its parent sees it."""

    def __init__(self, task: Task) -> None:
        self.tally = Tally()
        self.gone = self.ending = self.lost = False
        """Its end of the channel is closed; it was told to end; it is gone although it was not."""
        self.obituary = ""
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.words, their_words = os.pipe()
        try:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-P", "-m", "fourtuple.crew.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=their_words,
                stderr=their_words,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C reaches the parent alone; a kill reaches what a script starts, too
                env={**os.environ, "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"},
            )
        except BaseException:
            self.channel.close()
            os.close(self.words)
            raise
        finally:
            theirs.close()
            os.close(their_words)
        self.channel.send(task.encode())

    def order(self, order: bytes) -> None:
        """Say so; a worker that is gone hears nothing."""
        with contextlib.suppress(OSError):
            self.channel.send(order, socket.MSG_DONTWAIT)

    def kill(self) -> None:
        """End it and its process group, which exists as long as nobody has waited for it."""
        if self.process.returncode is None:
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if self.lost and ended is not None:
                how = f"status {ended.si_status}" if ended.si_code == os.CLD_EXITED else _signal_name(ended.si_status)
                self.obituary = f"a worker ended with {how}"
            elif self.ending and ended is None:
                self.obituary = f"a worker did not end within {END_S:g} s and was killed"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def bury(self) -> None:
        """Let go of everything; the process is dead."""
        self.process.wait()
        self.channel.close()
        with contextlib.suppress(OSError):
            os.close(self.words)


def tasks(scenario: Scenario, script: Path, space: TupleSpace, descriptors: int) -> tuple[Task, ...]:
    """Each worker's share: disjoint ports, and connections in proportion, so that all tuples can be used exactly."""
    each = descriptors - SPARE_DESCRIPTORS
    if each < 1:
        raise LimitReached("descriptors-hard", descriptors, SPARE_DESCRIPTORS + 1)
    needed = ceil(scenario.connections / each)
    cpus = len(os.sched_getaffinity(0))
    count = scenario.workers or max(needed, min(cpus, ceil(scenario.connections / CONNECTIONS_PER_WORKER)))
    if count < needed:
        why = f"{count} processes hold at most {count * each:,} connections (RLIMIT_NOFILE is {descriptors:,} each)"
        raise BadConfig("--workers", f"{why}; {needed} are needed for {scenario.connections:,}")
    count = min(count, scenario.connections, len(space.source_ports))
    memory = _memory_available_bytes() * 4 // 5 // count
    made, first, ports_before = [], 0, 0
    for number, ports in enumerate(space.source_ports.split(count)):
        ports_before += len(ports)
        last = scenario.connections * ports_before // len(space.source_ports)
        made.append(
            Task(
                script=str(script.resolve()),
                parent_pid=os.getpid(),
                first_serial=first,
                connections=last - first,
                sources=str(space.sources),
                ports=str(ports),
                destinations=str(space.destinations),
                destination_ports=str(space.destination_ports),
                rate_per_s=scenario.rate_per_s / count,
                window=max(1, (scenario.window + number) // count),
                connect_timeout_s=scenario.connect_timeout_s,
                answer_timeout_s=scenario.answer_timeout_s,
                replace=scenario.replace,
                close_with_fin=scenario.close_with_fin,
                memory_bytes=max(
                    LEAST_MEMORY_BYTES,
                    min(memory, MOST_MEMORY_BYTES + MEMORY_PER_CONNECTION_BYTES * (last - first)),
                ),
            )
        )
        first = last
    return tuple(made)


def _memory_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return LEAST_MEMORY_BYTES


def _quantiles(found: Histogram) -> Quantiles:
    if not found.count:
        return Quantiles(count=0, least=0, mean=0, p50=0, p90=0, p99=0, p999=0, most=0)
    p50, p90, p99, p999 = (found.quantile(share) for share in (0.5, 0.9, 0.99, 0.999))
    mean = found.total // found.count
    return Quantiles(
        count=found.count, least=found.least, mean=mean, p50=p50, p90=p90, p99=p99, p999=p999, most=found.most
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _python_path() -> str:
    """Where this very package is found, first: a worker runs the code that its parent runs."""
    ours = str(Path(__file__).parents[2])
    inherited = os.environ.get("PYTHONPATH", "")
    return f"{ours}{os.pathsep}{inherited}" if inherited else ours
