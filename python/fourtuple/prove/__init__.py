"""The whole argument, live, in a private lab: past 65,535 in each way, step by step.

Decides the order of the steps, what happens when one cannot run, and what is kept when somebody interrupts. Knows no
terminal: an `Observer` is told. Every step plays in network namespaces of its own, which end with it.
"""

from __future__ import annotations

import errno
import time
from datetime import UTC, datetime
from platform import machine, release

from fourtuple.errors import BadConfig, EngineStopped, LimitReached, MissingFeature, MissingPrivilege
from fourtuple.prove.model import Curve, Observer, Options, Outcome, Proof, Row, Step, StepResult
from fourtuple.prove.stage import Stage, limit_behind, meminfo_bytes
from fourtuple.prove.steps import STEPS, server

__all__ = ["STEPS", "Curve", "Observer", "Options", "Outcome", "Proof", "Row", "Step", "StepResult", "prove"]


def prove(options: Options, observer: Observer) -> Proof:
    """Run the steps that the options name, all of them by default. Raises BadConfig for a step that does not exist.

    Ctrl-C ends the current step, keeps what was reached, and skips the rest: the proof says `interrupted`.
    """
    steps = _chosen(options)
    if options.connections is not None and not 1 <= options.connections <= server.MOST:
        raise BadConfig("--connections", f"{options.connections:,}; allowed is 1 to {server.MOST:,}")
    started, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    results: list[StepResult] = []
    interrupted = False
    try:
        for number, step in enumerate(steps, start=1):
            observer.step_started(step, number, len(steps))
            result, interrupted = _played(step, options, observer)
            results.append(result)
            observer.step_ended(result)
            if interrupted:
                break
    except KeyboardInterrupt:  # between two steps
        interrupted = True
    gib = meminfo_bytes("MemTotal") / 2**30
    return Proof(
        results=tuple(results),
        machine=f"{machine()}, {gib:.0f} GiB",
        kernel=release(),
        started_at=started_at,
        seconds=time.monotonic() - started,
        interrupted=interrupted,
    )


def _played(step: Step, options: Options, observer: Observer) -> tuple[StepResult, bool]:
    """One step to its end, whatever that is; whether somebody interrupted it."""
    stage = Stage(options, observer)
    interrupted = False
    try:
        with stage:
            step.run(stage)
    except KeyboardInterrupt:
        interrupted = True
        stage.broken_off(step.claim, "", "interrupted")
    except LimitReached as error:
        stage.broken_off(step.claim, error.limit, error.remedy or str(error))
    except MissingPrivilege as error:
        stage.broken_off(step.claim, error.limit, str(error))
    except MissingFeature as error:
        stage.broken_off(step.claim, "direct-descriptors" if options.carrier == "uring" else "", str(error))
    except OSError as error:
        # This very process may be what runs out: each process of the lab takes two of its descriptors.
        limit = limit_behind(errno.errorcode.get(error.errno or 0, ""))
        if limit:
            stage.broken_off(step.claim, limit, str(error))
        else:
            stage.add(Row(claim=stage.doing or step.claim, reached=0, kernel_said=str(error), outcome=Outcome.FAILED))
    except (EngineStopped, BadConfig) as error:
        stage.add(Row(claim=stage.doing or step.claim, reached=0, kernel_said=str(error), outcome=Outcome.FAILED))
    return stage.result(step.name, step.title), interrupted


def _chosen(options: Options) -> tuple[Step, ...]:
    names = tuple(step.name for step in STEPS)
    for name in options.only:
        if name not in names:
            raise BadConfig("--only", f"{name!r} is not a step; the steps are {', '.join(names)}")
    return tuple(step for step in STEPS if not options.only or step.name in options.only)
