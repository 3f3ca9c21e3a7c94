"""The log of events: lines of JSON, whole or not at all, whatever the disk does."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fourtuple import eventlog
from fourtuple.errors import BadConfig
from fourtuple.eventlog import EVENTS, MOST_WAITING_BYTES, EventLog


def lines(text: bytes) -> list[dict[str, Any]]:
    assert text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def test_events_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "events"
    before = time.time()
    with EventLog(path) as log:
        log.say("service_started", service='a"b\n', start="shop", pid=7, connection=None)
        log.say("draining", grace_s=1.5, by="x" * 5_000)
        log.say("control_told", verb="set_limits", uid=0, with_changes={"most_connections": 5})
    first, second, third = lines(path.read_bytes())
    assert before <= first.pop("time") <= time.time()
    assert first == {"event": "service_started", "service": 'a"b\n', "start": "shop", "pid": 7}
    assert (second["grace_s"], len(second["by"])) == (1.5, 1_001)
    assert third["with_changes"] == {"most_connections": 5}
    with EventLog(path) as log:
        log.say("reloaded")
    assert len(lines(path.read_bytes())) == 4


def test_the_table_is_the_vocabulary(tmp_path: Path) -> None:
    assert len({row.name for row in EVENTS}) == len(EVENTS)
    with EventLog(tmp_path / "events") as log:
        for row in EVENTS:
            log.say(row.name, **dict.fromkeys(row.fields, 1))
        with pytest.raises(KeyError):
            log.say("something")
        with pytest.raises(AssertionError, match="has no colour"):
            log.say("reloaded", colour="red")
    assert [line["event"] for line in lines((tmp_path / "events").read_bytes())] == [row.name for row in EVENTS]


def test_a_log_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be written to"):
        EventLog(tmp_path / "none" / "events")


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A file that takes some of what it is given, then nothing: a pipe that nobody reads yet."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    # The log writes when it is told to, and at no other time.
    monkeypatch.setattr(EventLog, "_write", lambda self: None)
    monkeypatch.setattr(eventlog, "_opened", lambda _: writer)
    yield reader, writer
    os.close(reader)


def read(pipe: int) -> bytes:
    found = b""
    while True:
        try:
            found += os.read(pipe, 1 << 20)
        except BlockingIOError:
            return found


def test_a_full_disk_costs_whole_lines_and_the_next_one_says_how_many(pipe: tuple[int, int], tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    said = 0
    heard = b""
    for size in (1, 200, 900):
        for _ in range(3):
            # More than a pipe holds (65,536), so that the last line is cut, wherever that is.
            for _ in range(400):
                said += 1
                log.say("service_failed", service=f"s{said}", why="x" * size)
            log.flush()
            log.say("service_up", service=f"s{said}", pid=1)
            said += 1
            log.flush()
            heard += read(pipe[0])
    log.flush()
    for _ in range(3):
        log.say("reloaded")
        said += 1
        log.flush()
        heard += read(pipe[0])
    log.close()
    told = lines(heard)
    lost = sum(line.get("lost_before", 0) for line in told)
    assert lost > 0
    assert len(told) + lost == said
    assert log.lost == 0


def test_what_waits_is_bounded_and_lost_lines_are_counted(pipe: tuple[int, int], tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    said = MOST_WAITING_BYTES // 900
    for number in range(said):
        log.say("service_failed", service=f"s{number}", why="x" * 900)
    kept = said - log.lost
    assert 0 < kept < said
    log.flush()
    heard = read(pipe[0])
    assert json.loads(heard.partition(b"\n")[0])["lost_before"] == said - kept
    log.close()


def test_events_of_many_threads_are_whole(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events") as log:

        def speak(who: int) -> None:
            for number in range(200):
                log.say("service_up", service=f"s{who}", pid=number)

        threads = [threading.Thread(target=speak, args=(who,)) for who in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    told = lines((tmp_path / "events").read_bytes())
    for who in range(8):
        assert [line["pid"] for line in told if line["service"] == f"s{who}"] == list(range(200))


def test_a_log_that_was_moved_away_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "events"
    with EventLog(path) as log:
        log.say("reloaded")
        path.rename(tmp_path / "events.1")
        log.reopen()
        log.say("draining")
    assert [line["event"] for line in lines((tmp_path / "events.1").read_bytes())] == ["reloaded"]
    assert [line["event"] for line in lines(path.read_bytes())] == ["draining"]
