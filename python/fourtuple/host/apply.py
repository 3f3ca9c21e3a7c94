"""Applying changes to a machine and taking them back: all or nothing, also when this process is killed on the way.

Decides the order of journal and writes, and who restores after a death. Knows no plan and no limit: what it gets are
knobs and values.

1. The journal with every old value is on the disk before the first knob changes, and says when all of them have.
2. Each write is read back. One that fails, and everything before it, is taken back.
3. A guardian, a child process of its own session, waits on a pipe. If this process ends before it says "done", by any
   signal, the guardian restores what the journal says. The lock passes to it, so that nobody comes between.
4. If both are gone (power, a reboot) the journal is still there, and `undo` restores.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from fourtuple.errors import BadConfig, FourtupleError, MissingFeature
from fourtuple.facts import Change, ChangeKind
from fourtuple.host import journal, knobs
from fourtuple.host.journal import Entry, Journal, Phase
from fourtuple.host.knobs import KnobKind

STATE = "var/lib/fourtuple"
"""Below the root: where the journal is, also after a reboot."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One knob and the value that it is to have."""

    kind: KnobKind
    name: str
    new: bytes | None


def steps_of(changes: Sequence[Change]) -> tuple[Step, ...]:
    """The changes that a machine can be given while it runs, as steps."""
    steps = []
    for change in changes:
        if change.kind is ChangeKind.SYSCTL:
            steps.append(Step(kind=KnobKind.SYSCTL, name=change.knob, new=change.new.encode() + b"\n"))
        elif change.kind is ChangeKind.LOCAL_PREFIX:
            steps.append(Step(kind=KnobKind.ROUTE, name=change.knob, new=knobs.LOCAL))
    return tuple(steps)


def compare(steps: Sequence[Step], root: Path = Path("/")) -> tuple[Entry, ...]:
    """Each knob as it is and as it is to be, those that have the value already left out. Changes nothing."""
    entries = []
    for step in steps:
        knobs.check(step.kind, step.name, step.new)
        old = knobs.read(root, step.kind, step.name)
        if not knobs.same(step.kind, step.name, old, step.new):
            made = knobs.made_directories(root, step.kind, step.name)
            entries.append(Entry(kind=step.kind, name=step.name, old=old, new=step.new, made=made))
    return tuple(entries)


def apply(steps: Sequence[Step], *, root: Path = Path("/"), state: Path | None = None) -> tuple[Entry, ...]:
    """Have every knob its new value, or each its old one and an error. Says what was changed."""
    state = state or root / STATE
    with journal.locked(state):
        if journal.exists(state):
            phase = journal.read(state).phase.value
            raise BadConfig("--apply", f"a plan is {phase} here already ({state / journal.NAME}): take it back first")
        entries = compare(steps, root)
        if not entries:
            return ()
        begun = Journal(phase=Phase.APPLYING, boot=journal.boot_id(root), entries=entries)

        def work() -> tuple[Entry, ...]:
            journal.write(state, begun)
            for entry in entries:
                knobs.write(root, entry.kind, entry.name, entry.new)
            journal.write(state, replace(begun, phase=Phase.APPLIED))
            return entries

        return _guarded(work, lambda: _recover(root, state))


def undo(*, root: Path = Path("/"), state: Path | None = None, force: bool = False) -> tuple[Entry, ...]:
    """Have every knob of the journal its old value, byte for byte. Says which were taken back.

    A knob that somebody else has changed since stops it before anything is written, unless forced. After a reboot the
    settings of the running system are not ours any more: one that has not our value is left as it is.
    """
    state = state or root / STATE
    journal.read(state)
    with journal.locked(state):
        found = journal.read(state)
        entries = _to_restore(found, root, force=force)

        def work() -> tuple[Entry, ...]:
            journal.write(state, replace(found, phase=Phase.UNDOING, entries=entries))
            _restore(entries, root)
            journal.remove(state)
            return entries

        return _guarded(work, lambda: _recover(root, state))


def _to_restore(found: Journal, root: Path, *, force: bool) -> tuple[Entry, ...]:
    rebooted = found.boot != journal.boot_id(root)
    entries, foreign = [], []
    for entry in found.entries:
        try:
            now = knobs.read(root, entry.kind, entry.name)
        except MissingFeature:
            # After a reboot a module may not be loaded, and its settings not be there.
            if not rebooted:
                raise
            continue
        ours = now == entry.old or knobs.same(entry.kind, entry.name, now, entry.new)
        if not ours and rebooted and entry.kind is not KnobKind.FILE:
            continue
        if not ours and not force:
            foreign.append(entry.name)
        entries.append(entry)
    if foreign:
        names = ", ".join(foreign)
        raise BadConfig("--undo", f"changed since by somebody else: {names}; --force puts the old values over it")
    return tuple(entries)


def _restore(entries: Sequence[Entry], root: Path) -> None:
    """The old values, last knob first. Those that cannot be had are named at the end, after all the others."""
    failed = []
    for entry in reversed(entries):
        try:
            if knobs.read(root, entry.kind, entry.name) != entry.old:
                knobs.write(root, entry.kind, entry.name, entry.old)
            if knobs.read(root, entry.kind, entry.name) != entry.old:
                failed.append(f"{entry.name}: the old value does not come back byte for byte")
            knobs.tidy(root, entry.kind, entry.name, entry.made)
        except (FourtupleError, OSError) as error:
            failed.append(f"{entry.name}: {error}")
    if failed:
        raise BadConfig("undo", f"the journal stays, for these were not restored: {'; '.join(failed)}")


def _recover(root: Path, state: Path) -> None:
    """What a death left half done becomes the old state; what was complete stays."""
    if not journal.exists(state):
        return
    found = journal.read(state)
    if found.phase is not Phase.APPLIED:
        _restore(found.entries, root)
        journal.remove(state)


def _guarded(work: Callable[[], _Result], recover: Callable[[], None]) -> _Result:
    """Do the work with a guardian beside it, which recovers if the work ends any other way than by returning."""
    listening, telling = os.pipe()
    guardian = os.fork()
    if guardian == 0:
        # The child: nothing but the journal and the knobs; no cleanup of what it shares with its parent.
        status = 1
        with suppress(BaseException):
            os.close(telling)
            os.setsid()
            for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
                signal.signal(one, signal.SIG_IGN)
            if os.read(listening, 1) == b"":
                recover()
            status = 0
        os._exit(status)
    os.close(listening)
    try:
        result = work()
    except BaseException as error:
        os.close(telling)
        _, status = os.waitpid(guardian, 0)
        if status:
            error.add_note("and not everything could be taken back: fourtuple tune --undo says what")
        raise
    with suppress(BrokenPipeError):
        os.write(telling, b".")
    os.close(telling)
    os.waitpid(guardian, 0)
    return result
