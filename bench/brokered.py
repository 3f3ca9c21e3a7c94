"""The comparisons of brokers, `--only broker`, `relay`, `many` and `idle`: which rows, how often, and their tables.

Decides what is shown of each, with ratios of medians to HAProxy's. What is measured is in the files of these names, how
a broker is started in `bench.brokers`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from rich.table import Table

from bench import broker, brokers, idle, many, relay

Measured = dict[str, dict[str, Any]]


class Brokered(Protocol):
    """A row of one of the comparisons."""

    @property
    def name(self) -> str:
        """As the table has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One table, or two."""

    rows: Callable[[argparse.Namespace], Sequence[Any]]
    absent: Callable[[Any], str]
    """Why a row cannot run here; empty if it can."""
    run: Callable[[Any, argparse.Namespace], dict[str, Any]]
    tables: Callable[[Measured, argparse.Namespace], list[Table]]
    repeats: bool = True
    """Whether it is done in as many rounds as were asked for."""


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure."""
    return {key: median(run[key] for run in runs) for key in runs[0]}


def _broker_tables(measured: Measured, options: argparse.Namespace) -> list[Table]:
    figures = {
        f"{what} ({count})": (f"{key}_at_{count}", shape)
        for count in broker.CLIENTS
        for what, key, shape in (
            ("CPU us/connection", "cpu_us_per_connection", "{:,.1f}"),
            ("connections/s", "connections_per_s", "{:,.0f}"),
            ("first byte p50 us", "first_byte_p50_us", "{:,.0f}"),
            ("first byte p99 us", "first_byte_p99_us", "{:,.0f}"),
        )
    }
    title = f"{options.connections:,} connections by server name to a unix socket, (so many) clients at once"
    return [_by_figure(f"{title}; medians of {options.runs}", measured, figures, brokers.HAPROXY.name)]


def _relay_tables(measured: Measured, options: argparse.Namespace) -> list[Table]:
    figures = {
        **{
            f"{what} ({load.name})": (f"{key}_at_{load.name}", shape)
            for load in relay.LOADS
            for what, key, shape in (
                ("direct p50 us", "direct_p50_us", "{:,.1f}"),
                ("added p50 us", "added_p50_us", "{:,.1f}"),
                ("direct p99 us", "direct_p99_us", "{:,.0f}"),
                ("added p99 us", "added_p99_us", "{:,.0f}"),
                ("CPU us/round", "cpu_us_per_round", "{:,.1f}"),
            )
        },
        **{
            f"{what} ({count})": (f"{key}_at_{count}", shape)
            for count in relay.BULK_CONNECTIONS
            for what, key, shape in (
                ("to service GB/s", "send_gb_per_s", "{:,.2f}"),
                ("CPU ms/GB to", "send_cpu_ms_per_gb", "{:,.0f}"),
                ("from service GB/s", "take_gb_per_s", "{:,.2f}"),
                ("CPU ms/GB from", "take_cpu_ms_per_gb", "{:,.0f}"),
            )
        },
        "connections at rest": ("at_rest", "{:,.0f}"),
        "user B each at rest": ("idle_bytes_each", "{:,.0f}"),
    }
    title = f"relay over TCP: 64 bytes there and back, and bulk, on (so many) connections; medians of {options.runs}"
    return [_by_figure(title, measured, figures, brokers.HAPROXY.name)]


def _many_tables(measured: Measured, options: argparse.Namespace) -> list[Table]:
    few = f"{many.FEW:,}"
    figures = {
        f"p50 us, {few} services": ("few_p50_us", "{:,.1f}"),
        f"{few} names of many": ("many_p50_us", "{:,.1f}"),
        "  to few": ("many_to_few", "{:.3f} x"),
        "all names of many": ("all_p50_us", "{:,.1f}"),
        "  to few ": ("all_to_few", "{:.3f} x"),
        "p99 us, few": ("few_p99_us", "{:,.0f}"),
        "p99 us, all names": ("all_p99_us", "{:,.0f}"),
        "CPU us/connection, few": ("few_cpu_us", "{:,.1f}"),
        f"{few} names of many ": ("many_cpu_us", "{:,.1f}"),
        "all names of many ": ("all_cpu_us", "{:,.1f}"),
        "ready ms, few": ("few_ready_ms", "{:,.0f}"),
        "ready ms, many": ("many_ready_ms", "{:,.0f}"),
        "own B/service": ("own_bytes_per_service", "{:,.1f}"),
        "change written ms": ("change_written_ms", "{:,.1f}"),
        "change served ms": ("change_seen_ms", "{:,.1f}"),
        "  most": ("change_seen_most_ms", "{:,.1f}"),
    }
    title = f"first byte by how many services there are, one client at a time; medians of {options.runs}"
    return [_by_figure(title, measured, figures)]


def _idle_tables(measured: Measured, _options: argparse.Namespace) -> list[Table]:
    columns = {
        "held": ("held", "{:,.0f}"),
        "made/s": ("connections_per_s", "{:,.0f}"),
        "user B each": ("user_bytes_each", "{:,.0f}"),
        "kernel B each, all ends": ("kernel_bytes_each", "{:,.0f}"),
        "descriptors": ("broker_descriptors", "{:,.0f}"),
        "CPU % at rest": ("rest_cpu_percent", "{:.2f}"),
        "echoes/s, all used": ("used_per_s", "{:,.0f}"),
        "echoes right": ("echoes_right", "{:,.0f}"),
        "errors": ("errors", "{:,.0f}"),
    }
    table = _table("relayed connections at rest in one broker, then all used; once", "broker", list(columns))
    for name, row in measured.items():
        table.add_row(name, *_cells(row, columns))
    return [table]


def _run_relay(row: brokers.Broker, options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        return relay.run(row, at_rest=relay.AT_REST // 20, bulk_bytes=relay.BULK_BYTES // 32, part=0.02)
    return relay.run(row)


COMPARISONS = {
    "broker": Comparison(
        rows=lambda _: broker.BROKERS,
        absent=broker.absent,
        run=lambda row, options: broker.run(row, options.connections),
        tables=_broker_tables,
    ),
    "relay": Comparison(rows=lambda _: relay.BROKERS, absent=relay.absent, run=_run_relay, tables=_relay_tables),
    "many": Comparison(
        rows=lambda options: many.crowds(options.services, is_quick=options.quick),
        absent=many.absent,
        run=lambda row, options: many.run(row, 1 if options.quick else many.SLICES),
        tables=_many_tables,
    ),
    "idle": Comparison(
        rows=lambda _: idle.ROWS,
        absent=idle.absent,
        run=lambda row, options: idle.run(row, options.held, 1.0 if options.quick else idle.REST_S),
        tables=_idle_tables,
        repeats=False,
    ),
}
"""By what `--only` calls them."""


def _table(title: str, rows: str, headings: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column(rows)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _by_figure(title: str, measured: Measured, figures: dict[str, tuple[str, str]], base: str | None = None) -> Table:
    """A column for each broker, a row for each figure; beside what a broker causes its ratio to what `base` causes."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for name in measured:
        table.add_column(name, justify="right")
    for heading, (key, shape) in figures.items():
        cells = []
        for name, row in measured.items():
            compares = base in measured and name != base and not key.startswith(("direct", "at_rest"))
            ratio = _ratio(row[key], measured[base][key]) if compares and base and key in row else ""
            cells.append(f"{shape.format(row[key])}  {ratio}".rstrip() if key in row else "")
        table.add_row(heading, *cells)
    return table


def _cells(row: dict[str, Any], columns: dict[str, tuple[str, str]]) -> list[str]:
    return [shape.format(row[key]) if key in row else "" for key, shape in columns.values()]


def _ratio(value: float, base: float | None) -> str:
    """Of figures that are differences it says nothing where one is not above zero."""
    return f"{value / base:.2f} x" if base and base > 0 and value > 0 else ""
