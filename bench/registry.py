"""What a registry of many services costs: import, opening, lookups, changes, bytes; SQLite beside it.

Decides which figures are taken and how. Services are named s0000000.example.com with a unix socket of that name, read
from CSV in the order of names or shuffled; an import counts until its last transaction is on the disk. SQLite is given
what suits it: one prepared statement, one transaction, WAL, synchronous=FULL, no ROWID, rows ready made.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from fourtuple.registry import Registry
from fourtuple.services import Service

LOOKUPS = 200_000
CHANGES = 20
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """One row: which store, how many services, and in which order they come."""

    name: str
    kind: str
    count: int
    shuffled: bool


def stores(count: int) -> list[Store]:
    """Ours small and large, sorted and shuffled; SQLite for the large one."""
    small = min(1_000, count)
    return [
        Store(name=f"fourtuple, {small:,} sorted", kind="ours", count=small, shuffled=False),
        Store(name=f"fourtuple, {count:,} sorted", kind="ours", count=count, shuffled=False),
        Store(name=f"fourtuple, {count:,} shuffled", kind="ours", count=count, shuffled=True),
        Store(name=f"SQLite, {count:,} sorted", kind="sqlite", count=count, shuffled=False),
        Store(name=f"SQLite, {count:,} shuffled", kind="sqlite", count=count, shuffled=True),
    ]


def run(store: Store) -> dict[str, Any]:
    """All figures of one row."""
    order = list(range(store.count))
    chance = random.Random(SEED)
    if store.shuffled:
        chance.shuffle(order)
    wanted = [service_name(chance.randrange(store.count)).encode() for _ in range(LOOKUPS)]
    folder = Path(tempfile.mkdtemp(prefix="fourtuple-bench-"))
    try:
        return (_ours if store.kind == "ours" else _sqlite)(folder, order, wanted)
    finally:
        shutil.rmtree(folder)


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every figure."""
    return {key: median(run[key] for run in runs) for key in runs[0]}


def _ours(folder: Path, order: list[int], wanted: list[bytes]) -> dict[str, Any]:
    text = io.BytesIO(b"".join(f"{service_name(number)},{_target(number)}\n".encode() for number in order))
    with Registry(folder / "registry") as registry:
        started_s, started_cpu_s = time.monotonic(), time.process_time()
        counts = registry.import_text(text, "csv")
        import_s, import_cpu_s = time.monotonic() - started_s, time.process_time() - started_cpu_s
        if counts.added != len(order):
            raise RuntimeError(f"{counts.added:,} of {len(order):,} services were added")
        registry.lookup_times_ns(wanted[:1_000])
        times_ns = quantiles(registry.lookup_times_ns(wanted), n=100)
        snapshot_ns = median(registry.lookup_times_ns(wanted, snapshot_each=True))
        sizes = registry.sizes()

        def change(target: str) -> None:
            registry.set([Service(name=service_name(0), target=target)])

        seen_ms = _changes(folder / "registry", "ours", change)
        return {
            "import_per_s": len(order) / import_s,
            "import_per_cpu_s": len(order) / import_cpu_s,
            "bytes_each": sizes.services_bytes / len(order),
            "file_bytes_each": sizes.file_bytes / len(order),
            **_read(folder / "registry", "ours", len(order)),
            "lookup_p50_ns": times_ns[49],
            "lookup_p99_ns": times_ns[98],
            "snapshot_and_lookup_p50_ns": snapshot_ns,
            **seen_ms,
        }


def _sqlite(folder: Path, order: list[int], wanted: list[bytes]) -> dict[str, Any]:
    path = folder / "registry.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
        "CREATE TABLE services (name TEXT PRIMARY KEY, target TEXT NOT NULL) WITHOUT ROWID;"
    )
    rows = [(service_name(number), _target(number)) for number in order]
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO services VALUES (?, ?)", rows)
    connection.execute("COMMIT")
    import_s, import_cpu_s = time.monotonic() - started_s, time.process_time() - started_cpu_s
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size_bytes = path.stat().st_size
    lookup, taken_ns = "SELECT target FROM services WHERE name = ?", []
    for name in wanted:
        key = (name.decode(),)
        started_ns = time.perf_counter_ns()
        connection.execute(lookup, key).fetchone()
        taken_ns.append(time.perf_counter_ns() - started_ns)
    times_ns = quantiles(taken_ns, n=100)

    def change(target: str) -> None:
        connection.execute("UPDATE services SET target = ? WHERE name = ?", (target, service_name(0)))

    seen_ms = _changes(path, "sqlite", change)
    reading = _read(path, "sqlite", len(order))
    connection.close()
    return {
        "import_per_s": len(order) / import_s,
        "import_per_cpu_s": len(order) / import_cpu_s,
        "bytes_each": size_bytes / len(order),
        "file_bytes_each": size_bytes / len(order),
        **reading,
        "lookup_p50_ns": times_ns[49],
        "lookup_p99_ns": times_ns[98],
        # Each of these statements is a transaction of its own already.
        "snapshot_and_lookup_p50_ns": times_ns[49],
        **seen_ms,
    }


def _read(store: Path, kind: str, count: int) -> dict[str, Any]:
    """In a process of its own: from nothing to the first answer, and what is resident when everything was read."""
    with _reader(store, kind, "open", service_name(count - 1)) as reader:
        opened = _answer(reader)
    if not opened["found"]:
        raise RuntimeError("the last service was not found")
    with _reader(store, kind, "walk", "0") as reader:
        resident = _answer(reader)
    return {
        "open_to_lookup_ms": opened["ms"],
        "own_bytes_each": max(0, resident["own"]) / count,
        "mapped_bytes_each": max(0, resident["mapped"]) / count,
    }


def _changes(store: Path, kind: str, change: Any) -> dict[str, Any]:  # noqa: ANN401 - one of two closures
    """From before a change is written until another process has looked it up."""
    taken_ms = []
    with _reader(store, kind, "watch", service_name(0), str(CHANGES)) as reader:
        assert reader.stdout is not None
        if reader.stdout.readline() != "ready\n":
            raise RuntimeError("the reader did not start")
        for number in range(CHANGES):
            before_ns = time.monotonic_ns()
            change(f"unix:/run/changed-{number}.sock")
            taken_ms.append((_answer(reader)["seen_ns"] - before_ns) / 1e6)
    return {"change_seen_ms": median(taken_ms), "change_seen_most_ms": max(taken_ms)}


@contextmanager
def _reader(store: Path, kind: str, *task: str) -> Iterator[subprocess.Popen[str]]:
    script = Path(__file__).parent / "peers/registry_reader.py"
    command = [sys.executable, str(script), str(store), kind, *task]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        if process.wait(60) != 0:
            raise RuntimeError("the reader failed")


def _answer(reader: subprocess.Popen[str]) -> dict[str, Any]:
    assert reader.stdout is not None
    line = reader.stdout.readline()
    if not line:
        raise RuntimeError("the reader ended before it answered")
    answer: dict[str, Any] = json.loads(line)
    return answer


def service_name(number: int) -> str:
    """Of the service with that number."""
    return f"s{number:07}.example.com"


def _target(number: int) -> str:
    return f"unix:/run/services/{service_name(number)}.sock"
