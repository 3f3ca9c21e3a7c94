"""What happens to a broker and its services, as it happens: lines of JSON, one per event.

Decides the table of events, the form of a line, how much may wait, and that a disk that is full or slow costs whole
lines and nothing else: a thread writes, and what a short write has begun is finished before anything else is written.
Lines that were lost are counted in the next one (`lost_before`). Connections are not events; they have a log of their
own.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from msgspec import Struct

from fourtuple.errors import BadConfig

MOST_WAITING_BYTES = 1 << 20
MOST_TEXT = 1_000
"""Characters of one value."""
FLUSH_EVERY_S = 0.1


class Event(Struct, frozen=True):
    """One row of EVENTS."""

    name: str
    fields: tuple[str, ...]
    """What a line of it may have, beside `time` and `event`."""
    meaning: str


EVENTS = (
    Event("supervisor_started", ("pid", "version", "config"), "the supervisor runs"),
    Event("supervisor_ended", ("pid", "why"), "the supervisor ends"),
    Event("broker_started", ("pid", "version", "carrier", "workers"), "a broker process takes connections"),
    Event("broker_ended", ("pid", "status", "why"), "a broker process has ended, as it was told or by itself"),
    Event("broker_restarted", ("pid", "pause_s", "why"), "another one is started, after a pause"),
    Event("broker_renewed", ("pid", "why"), "another takes its place, for folders of services are new"),
    Event(
        "renewal_started",
        ("pid", "mib", "mib_before"),
        "both processes begin anew, for a flood has left so much behind",
    ),
    Event("renewal_failed", ("why",), "they do not, and nothing has changed"),
    Event("service_kept", ("service", "why"), "whether it is used cannot be seen, so that it is not stopped"),
    Event(
        "service_moved",
        ("service", "target"),
        "the registry has it elsewhere, where it is started next",
    ),
    Event("registry_unread", ("why",), "the registry cannot be read just now"),
    Event(
        "service_asked", ("service", "start", "peer", "protocol", "connection"), "a client came to a sleeping service"
    ),
    Event("service_refused", ("service", "peer", "why"), "it is not woken for this client: a budget or a rule"),
    Event("service_started", ("service", "start", "pid", "connection"), "its process runs"),
    Event("service_up", ("service", "pid", "took_ms"), "it takes connections"),
    Event("service_failed", ("service", "pid", "status", "why", "pause_s"), "it did not come up, or ended by itself"),
    Event("service_backed_off", ("service", "failures", "pause_s"), "it is not started again before a pause is over"),
    Event("service_stopping", ("service", "pid", "why"), "it is asked to end"),
    Event("service_stopped", ("service", "pid", "status", "took_ms"), "all its processes have ended"),
    Event("service_killed", ("service", "pid", "why"), "it did not end when asked"),
    Event("plugin_ready", ("module", "sniffers"), "the process of a plugin takes questions"),
    Event(
        "plugin_raised",
        ("module", "sniffer", "why"),
        "a function of a plugin raised an exception",
    ),
    Event("upgrade_started", ("pid", "executable", "version"), "a broker of another version is made"),
    Event("upgrade_done", ("pid", "version", "took_ms", "moved"), "it serves, with all that there was"),
    Event("upgrade_failed", ("why", "took_ms"), "it does not, and nothing has changed"),
    Event("draining", ("grace_s", "by"), "no more connections are taken"),
    Event("reloaded", ("config", "why"), "the file was read again; `why` if it could not be used"),
    Event("limits_set", ("most_connections", "most_per_source", "most_per_service"), "limits, as they are now"),
    Event("control_started", ("pid",), "the process of the control API, for its first client"),
    Event("control_ended", ("pid", "status"), "it ended, having no client"),
    Event("control_failed", ("status", "pause_s"), "it ended with an error, and is not started before a pause is over"),
    Event("control_broken", ("pid", "why"), "it broke the rules of messages, and was ended"),
    Event(
        "control_told",
        (
            "verb",
            "uid",
            "with_id",
            "with_service",
            "with_wait_s",
            "with_grace_s",
            "with_changes",
            "with_executable",
        ),
        "somebody changes something, over the control socket",
    ),
    Event("control_denied", ("uid",), "somebody may not do what was tried there"),
)

_BY_NAME = {row.name: row for row in EVENTS}


class EventLog:
    """Appends events to a file. A context manager: leaving it writes what is left."""

    def __init__(self, path: Path | None) -> None:
        """Append to `path`, or write to standard error if there is none; BadConfig if it cannot be opened."""
        self._path = path
        self._descriptor = 2 if path is None else _opened(path)
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._lost = 0
        self._rest = b""
        """What is left of a line that the disk had no room for."""
        # Held for moments; `_writing` for as long as the disk takes.
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._come, self._over = threading.Event(), False
        self._thread: threading.Thread | None = None

    @property
    def lost(self) -> int:
        """Lines lost that no line has told of yet."""
        return self._lost

    def say(self, event: str, **fields: object) -> None:
        """One event of EVENTS, with its fields; those that are None are left out. Never waits for a disk."""
        row = _BY_NAME[event]
        assert not fields.keys() - set(row.fields), f"{event} has no {', '.join(fields.keys() - set(row.fields))}"
        told = {key: _bounded(value) for key, value in fields.items() if value is not None}
        line = (
            json.dumps({"time": round(time.time(), 6), "event": event, **told}, separators=(",", ":")).encode() + b"\n"
        )
        with self._lock:
            if self._waiting_bytes + len(line) > MOST_WAITING_BYTES:
                self._lost += 1
                return
            self._lines.append(line)
            self._waiting_bytes += len(line)
            # Started with the first event, so that nothing that forks before has a thread.
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="fourtuple-events", daemon=True)
                self._thread.start()
        self._come.set()

    def flush(self) -> None:
        """Write what waits, now."""
        with self._writing:
            with self._lock:
                lines, lost = list(self._lines), self._lost
                self._lines.clear()
                self._waiting_bytes = 0
            if lines and lost:
                lines[0] = lines[0][:-2] + b',"lost_before":%d}\n' % lost
            begun = len(self._rest)
            data = self._rest + b"".join(lines)
            written = _write_some(self._descriptor, data)
            if lines and lost and written > begun:
                with self._lock:
                    self._lost -= lost
            torn = data[written - 1 : written] != b"\n" if written else begun > 0
            end = data.find(b"\n", written) + 1 if torn else written
            self._rest = data[written:end]
            with self._lock:
                self._lost += data.count(b"\n", end)

    def reopen(self) -> None:
        """Open the path again, where it was moved away (logrotate); what it was stays if that fails."""
        if self._path is None:
            return
        fresh = _opened(self._path)
        self.flush()
        with self._writing:
            os.close(self._descriptor)
            self._descriptor, self._rest = fresh, b""

    def close(self) -> None:
        """Write what is left, and end."""
        self._over = True
        self._come.set()
        if self._thread is not None:
            # A disk that answers no more must not keep the process.
            self._thread.join(5)
        if self._path is not None and (self._thread is None or not self._thread.is_alive()):
            os.close(self._descriptor)

    def _write(self) -> None:
        while not self._over:
            self._come.wait()
            self._come.clear()
            self.flush()
            # Events of so long are written together, and a full disk is tried no more often.
            if not self._over:
                time.sleep(FLUSH_EVERY_S)
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise BadConfig(str(path), f"cannot be written to: {error.strerror}") from None


def _bounded(value: object) -> object:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key)[:MOST_TEXT]: _bounded(one) for key, one in list(value.items())[:16]}
    text = str(value)
    return text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + "…"


def _write_some(descriptor: int, data: bytes) -> int:
    """How much of it was written before the file took no more."""
    written = 0
    while written < len(data):
        try:
            count = os.write(descriptor, data[written:])
        except OSError:
            break
        if count == 0:
            break
        written += count
    return written
