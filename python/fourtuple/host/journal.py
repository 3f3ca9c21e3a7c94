"""The journal of `tune`: what each knob was, on the disk before the first of them changes.

Decides its form, and that one which was changed since is refused. Knows no knob's meaning. A journal is replaced whole,
so that a crash leaves the old one or the new one, and it names every knob in the order in which they are set.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fourtuple.errors import BadConfig, LimitReached, MissingPrivilege
from fourtuple.host.knobs import KnobKind, check, replace_file, sync_directory

NAME, LOCK = "tune.journal", "tune.lock"
VERSION = 1
LARGEST_BYTES = 64 << 20
WANTED = "undo by hand what it names, then remove it"


class Phase(Enum):
    """How far the work is. Only `APPLIED` is a state to stay in: in any other, the old values are to come back."""

    APPLYING = "applying"
    APPLIED = "applied"
    UNDOING = "undoing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One knob: its value before and after, byte for byte; None is absence."""

    kind: KnobKind
    name: str
    old: bytes | None
    new: bytes | None
    made: tuple[str, ...] = ()
    """Directories that are made for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """All knobs of one plan."""

    phase: Phase
    boot: str
    """The kernel's id of this boot: after another, settings are not ours any more."""
    entries: tuple[Entry, ...]


@contextmanager
def locked(state: Path) -> Iterator[None]:
    """The folder of the journal, made if need be, for one process at a time; also for its guardian, should it die."""
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(state / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MissingPrivilege(f"the journal's folder {state} cannot be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LimitReached("one tune at a time", remedy=f"another works with {state}: wait for its end") from None
        yield
    finally:
        os.close(descriptor)


def exists(state: Path) -> bool:
    """Whether a plan is applied, or was half applied."""
    return (state / NAME).is_symlink() or (state / NAME).exists()


def write(state: Path, journal: Journal) -> None:
    """Replace the journal; on the disk when this returns."""
    body = _body(journal)
    document = {"body": body, "checksum": _checksum(body)}
    replace_file(state / NAME, json.dumps(document, indent=1).encode() + b"\n", 0o600)


def read(state: Path) -> Journal:
    """The journal. BadConfig if there is none, or if it is not what was written."""
    path = state / NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadConfig("--undo", f"there is no journal {path}: nothing is applied that could be undone") from None
    except OSError as error:
        raise BadConfig(str(path), f"cannot be read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as opened:
        data = opened.read(LARGEST_BYTES + 1)
    try:
        if len(data) > LARGEST_BYTES:
            raise ValueError("too long")
        document = json.loads(data)
        body = document["body"]
        if document["checksum"] != _checksum(body):
            raise BadConfig(str(path), f"was changed after fourtuple wrote it (its checksum is wrong): {WANTED}")
        if body["version"] != VERSION:
            raise BadConfig(str(path), f"is of version {str(body['version'])[:20]}; {VERSION} is known: {WANTED}")
        journal = Journal(
            phase=Phase(body["phase"]), boot=str(body["boot"]), entries=tuple(map(_entry, body["entries"]))
        )
    except BadConfig:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadConfig(str(path), f"is no journal that fourtuple wrote: {WANTED}") from None
    for entry in journal.entries:
        for value in (entry.old, entry.new):
            check(entry.kind, entry.name, value)
    return journal


def remove(state: Path) -> None:
    """Forget it: the old values are back."""
    (state / NAME).unlink(missing_ok=True)
    sync_directory(state)


def boot_id(root: Path) -> str:
    """The kernel's name for the time since it was started; "" where it has none."""
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _body(journal: Journal) -> dict[str, object]:
    entries = [
        {
            "kind": entry.kind.value,
            "name": entry.name,
            "old": None if entry.old is None else b64encode(entry.old).decode(),
            "new": None if entry.new is None else b64encode(entry.new).decode(),
            "made": list(entry.made),
        }
        for entry in journal.entries
    ]
    return {"version": VERSION, "phase": journal.phase.value, "boot": journal.boot, "entries": entries}


def _entry(row: dict[str, object]) -> Entry:
    old, new, made = row["old"], row["new"], row["made"]
    parents = {str(parent) for parent in Path(str(row["name"])).parents if not parent.is_absolute()}
    if not isinstance(made, list) or not parents.issuperset(made):
        raise ValueError("made")
    return Entry(
        kind=KnobKind(row["kind"]), name=str(row["name"]), old=_decoded(old), new=_decoded(new), made=tuple(made)
    )


def _decoded(value: object) -> bytes | None:
    return None if value is None else b64decode(str(value), validate=True)


def _checksum(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
