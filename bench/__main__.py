"""python -m bench: ours and the peers side by side in one run; a table for people, one JSON file for the rest.

Decides the order of the runs (interleaved), and how results are shown and kept. What is measured is in `bench.rates`,
`bench.cliff`, `bench.sources`, `bench.load` and `bench.registry`, and of brokers in `bench.brokered`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from bench import brokered, cliff, load, rates, registry, sources
from fourtuple.errors import FourtupleError

RESULTS = Path(__file__).parent / "results"
MOST_CONNECTIONS = 60_000
"""Inside the range 1024-65535 of one source address, which is what the peers have."""
WIDTH = 132
"""Of a table in a file or a pipe."""
Row = TypeVar("Row", rates.Contender, cliff.Chooser, sources.Filling, load.Client, registry.Store, brokered.Brokered)


def main(arguments: list[str]) -> int:
    """Run what was asked for; 1 if a row that can run here failed."""
    options = _options(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    results: dict[str, Any] = {"machine": _machine(), "rounds": options.runs, "connections": options.connections}
    failed: dict[str, str] = {}
    try:
        if options.only in (None, "rates"):
            skipped = {row.name: reason for row in rates.CONTENDERS if (reason := rates.absent(row))}
            rows = [row for row in rates.CONTENDERS if row.name not in skipped]
            measured = _interleaved(
                rows, lambda row: rates.run(row, options.connections), options.runs, console, failed
            )
            results["rates"] = {name: rates.medians(runs) for name, runs in measured.items()}
            results["skipped"] = skipped
            console.print(_rates_table(results["rates"], options))
            for name, reason in skipped.items():
                console.print(f"skipped {name}: {reason}")
        if options.only in (None, "cliff"):
            no_uring = bool(rates.absent(rates.CONTENDERS[0]))
            choosers = [row for row in cliff.CHOOSERS if not (no_uring and "uring" in row.arguments)]
            curves = _interleaved(choosers, cliff.run, options.runs, console, failed)
            results["cliff"] = {name: cliff.medians(runs) for name, runs in curves.items()}
            title = f"the cost of one connect() by fill of {cliff.COUNT} ports, us; medians of {options.runs}"
            console.print(_cliff_table(title, "who chooses the port", results["cliff"]))
        if options.only == "sources":
            count = min(options.connections, sources.MOST_PORTS)
            fillings = sources.libraries(count, whole=options.whole)
            filled = _interleaved(fillings, sources.run, options.runs, console, failed)
            results["sources"] = {name: sources.medians(runs) for name, runs in filled.items()}
            title = f"SourcePool: CPU of one connection by fill of {count:,} ports, us; medians of {options.runs}"
            console.print(_sources_table(title, results["sources"]))
            filled = _interleaved(sources.whole_range(), sources.run, 1, console, failed)
            results["sources_whole_range"] = {name: sources.medians(runs) for name, runs in filled.items()}
            title = f"the same on {sources.WHOLE_RANGE}, filled by {sources.PROCESSES} processes, us; once"
            console.print(_sources_table(title, results["sources_whole_range"]))
        if options.only == "registry":
            stores = registry.stores(options.services)
            costs = _interleaved(stores, registry.run, options.runs, console, failed)
            results["registry"] = {name: registry.medians(runs) for name, runs in costs.items()}
            console.print(_registry_table(results["registry"], options))
        if options.only in brokered.COMPARISONS:
            comparison = brokered.COMPARISONS[options.only]
            candidates = comparison.rows(options)
            skipped = {row.name: reason for row in candidates if (reason := comparison.absent(row))}
            present = [row for row in candidates if row.name not in skipped]
            rounds = options.runs if comparison.repeats else 1
            costs = _interleaved(present, lambda row: comparison.run(row, options), rounds, console, failed)
            results[options.only] = {name: brokered.medians(runs) for name, runs in costs.items()}
            results["skipped"] = skipped
            for table in comparison.tables(results[options.only], options):
                console.print(table)
            for name, reason in skipped.items():
                console.print(f"skipped {name}: {reason}")
        if options.only == "load":
            count = min(options.connections, load.MOST_CONNECTIONS)
            skipped = {row.name: reason for row in load.CLIENTS if (reason := load.absent(row))}
            clients = [row for row in load.CLIENTS if row.name not in skipped]
            runs = _interleaved(clients, lambda row: load.run(row, count), options.runs, console, failed)
            results["load"] = {name: rates.medians(one) for name, one in runs.items()}
            results["skipped"] = skipped
            console.print(_load_table(results["load"], count, options.runs))
            for name, reason in skipped.items():
                console.print(f"skipped {name}: {reason}")
    except FourtupleError as problem:
        console.print(f"bench: {problem}", style="red")
        return 1
    except KeyboardInterrupt:
        failed["bench"] = "stopped by Ctrl-C; a comparison that was complete is kept"
    results["failed"] = failed
    results["machine"]["load_after"] = os.getloadavg()[0]
    for name, reason in failed.items():
        console.print(f"failed {name}: {reason}", style="red")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return 1 if failed else 0


def _interleaved(
    rows: list[Row], run: Callable[[Row], dict[str, Any]], rounds: int, console: Console, failed: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Each row once per round; a row that fails is named and left out from then on."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        for row in rows:
            if row.name in failed:
                continue
            started_s = time.monotonic()
            try:
                measured.setdefault(row.name, []).append(run(row))
            except RuntimeError as problem:
                failed[row.name] = str(problem)
            took_s = time.monotonic() - started_s
            console.print(f"round {number + 1}/{rounds}  {row.name}  {took_s:.1f} s", style="dim", highlight=False)
    return {name: runs for name, runs in measured.items() if name not in failed}


def _rates_table(measured: dict[str, dict[str, Any]], options: argparse.Namespace) -> Table:
    table = Table(title=f"{options.connections:,} connections to one port, both ends held; medians of {options.runs}")
    for heading in (
        "client",
        "connections/s",
        "CPU us/conn",
        "bytes/conn",
        "after echo",
        "echoes/s",
        "speed vs asyncio",
    ):
        table.add_column(heading, justify="left" if heading == "client" else "right")
    base = measured.get("asyncio protocol", {}).get("connections_per_s")
    for name, row in measured.items():
        table.add_row(
            name,
            f"{row['connections_per_s']:,.0f}",
            f"{row['cpu_us_per_connection']:,.1f}",
            f"{row['bytes_per_connection']:,.0f}",
            f"{row['bytes_per_connection_after_echo']:,.0f}",
            f"{row['echoes_per_s']:,.0f}",
            f"{row['connections_per_s'] / base:.2f} x" if base else "",
        )
    return table


def _cliff_table(title: str, rows: str, measured: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title)
    for heading in (rows, "reached", "1 %", "50 %", "90 %", "99 %", "99 % : 1 %"):
        table.add_column(heading, justify="left" if heading == rows else "right")
    for name, row in measured.items():
        costs = (f"{row[f'us_at_{percent}_percent']:,.1f}" for percent in (1, 50, 90, 99))
        table.add_row(name, f"{row['connected']:,.0f}", *costs, f"{row['ratio_99_to_1']:.2f} x")
    return table


def _registry_table(measured: dict[str, dict[str, Any]], options: argparse.Namespace) -> Table:
    columns = {
        "import/s": ("import_per_s", "{:,.0f}"),
        "per CPU s": ("import_per_cpu_s", "{:,.0f}"),
        "B each": ("bytes_each", "{:,.1f}"),
        "own/mapped B": ("own_bytes_each", "{:,.1f}"),
        "open ms": ("open_to_lookup_ms", "{:,.2f}"),
        "lookup p50 ns": ("lookup_p50_ns", "{:,.0f}"),
        "p99 ns": ("lookup_p99_ns", "{:,.0f}"),
        "snapshot+lookup": ("snapshot_and_lookup_p50_ns", "{:,.0f}"),
        "change seen ms": ("change_seen_ms", "{:,.2f}"),
        "most": ("change_seen_most_ms", "{:,.1f}"),
    }
    table = Table(title=f"a registry of services, durable; medians of {options.runs}")
    table.add_column("store")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, row in measured.items():
        cells = [shape.format(row[key]) for key, shape in columns.values()]
        cells[list(columns).index("own/mapped B")] += f" / {row['mapped_bytes_each']:,.1f}"
        table.add_row(name, *cells)
    return table


def _load_table(measured: dict[str, dict[str, Any]], count: int, rounds: int) -> Table:
    few = min(load.FEW, count)
    table = Table(title=f"load on one nginx process, {count:,} connections and {few:,}; medians of {rounds}")
    for heading in (
        "client",
        "held",
        "connections/s",
        f"requests/s at {count:,}",
        f"at {few:,}",
        "bytes/conn",
        "MB in all",
        f"CPU us/request at {count:,}",
        f"at {few:,}",
        "requests vs wrk",
    ):
        table.add_column(heading, justify="left" if heading == "client" else "right")
    base = measured.get("wrk", {})
    for name, row in measured.items():
        ratios = (row[key] / base[key] for key in ("requests_per_s", "requests_per_s_few") if base.get(key))
        table.add_row(
            name,
            f"{row['held']:,.0f}",
            f"{row['connections_per_s']:,.0f}",
            f"{row['requests_per_s']:,.0f}",
            f"{row['requests_per_s_few']:,.0f}",
            f"{row['bytes_per_connection']:,.0f}",
            f"{row['private_bytes'] / 1e6:,.0f}",
            f"{row['cpu_us_per_request']:,.1f}",
            f"{row['cpu_us_per_request_few']:,.1f}",
            " and ".join(f"{ratio:.2f} x" for ratio in ratios),
        )
    return table


def _sources_table(title: str, measured: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title, caption="by fill: (99 % : 1 %) / (the same beside, to a destination that is empty)")
    for heading in ("client library", "reached", "1 %", "50 %", "90 %", "99 %", "99 % : 1 %", "beside", "by fill"):
        table.add_column(heading, justify="left" if heading == "client library" else "right")
    for name, row in measured.items():
        costs = (f"{row[f'us_at_{percent}_percent']:,.1f}" for percent in (1, 50, 90, 99))
        ratios = (f"{row[key]:.2f} x" for key in ("ratio_99_to_1", "beside_99_to_1", "by_fill_99_to_1"))
        table.add_row(name, f"{row['connected']:,.0f}", *costs, *ratios)
    return table


def _machine() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
    }


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only",
        choices=("rates", "cliff", "sources", "load", "registry", *brokered.COMPARISONS),
        help="one comparison; default rates and cliff",
    )
    parser.add_argument(
        "--connections", type=_whole(1, MOST_CONNECTIONS), default=15_000, help="per client; default 15000"
    )
    parser.add_argument(
        "--services", type=_whole(1_000, 10_000_000), default=1_000_000, help="registry, many; default 1000000"
    )
    parser.add_argument(
        "--held", type=_whole(1, 1_000_000), default=200_000, help="idle: relayed connections at rest; default 200000"
    )
    parser.add_argument("--quick", action="store_true", help="relay, many: a fraction of the work, to see that it runs")
    parser.add_argument("--runs", type=_whole(1, 100), default=3, help="rounds, all clients in each; default 3")
    parser.add_argument(
        "--whole", action="store_true", help="sources: each library opens every connection of its range (long)"
    )
    return parser.parse_args(arguments)


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}; a whole number from {least} to {most} is needed")
        return int(text)

    return parse


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
