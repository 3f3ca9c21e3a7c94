"""One process that reads a registry: opens it and looks up, watches for changes, or walks all of it; a JSON line each.

Started by `bench.registry` with: store, "ours" or "sqlite", what to do, and a name or a count.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fourtuple.registry import Registry

TIMEOUT_S = 30.0


def main(store: str, kind: str, task: str, argument: str) -> None:
    started_ns = time.perf_counter_ns()
    target, walk = ours(store) if kind == "ours" else peer(store)

    if task == "open":
        found = target(argument)
        print(json.dumps({"ms": (time.perf_counter_ns() - started_ns) / 1e6, "found": found}), flush=True)
    elif task == "watch":
        watch(target, argument, int(sys.argv[5]))
    else:
        before = resident_bytes()
        walk()
        after = resident_bytes()
        print(json.dumps({"own": after[0] - before[0], "mapped": after[1] - before[1]}), flush=True)


def ours(store: str) -> tuple[Callable[[str], str | None], Callable[[], None]]:
    """How to look up a target, and how to read everything."""
    registry = Registry(store, create=False)

    def target(name: str) -> str | None:
        found = registry.service(name)
        return found.target if found else None

    def walk() -> None:
        for _ in registry.export_text("csv"):
            pass

    return target, walk


def peer(store: str) -> tuple[Callable[[str], str | None], Callable[[], None]]:
    """The same of SQLite."""
    connection = sqlite3.connect(store)

    def target(name: str) -> str | None:
        row = connection.execute("SELECT target FROM services WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def walk() -> None:
        for _ in connection.execute("SELECT * FROM services"):
            pass

    return target, walk


def watch(target: Callable[[str], str | None], name: str, changes: int) -> None:
    """The time at which each change of the service's target is seen; CLOCK_MONOTONIC is one clock for all processes."""
    before = target(name)
    print("ready", flush=True)
    deadline_s = time.monotonic() + TIMEOUT_S
    while changes and time.monotonic() < deadline_s:
        now = target(name)
        if now != before:
            print(json.dumps({"target": now, "seen_ns": time.monotonic_ns()}), flush=True)
            before, changes = now, changes - 1
        time.sleep(0.0002)


def resident_bytes() -> tuple[int, int]:
    """Memory of its own, and mapped pages of files: these are the page cache's, shared by all readers."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.partition(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")}
    return sizes["RssAnon"], sizes["RssFile"]


if __name__ == "__main__":
    main(*sys.argv[1:5])
