"""`fourtuple serve --explain`: what a broker with this file would be confined to on this machine, what not, and why.

Decides how that is shown. It is found by trying it in a child that ends at once (`fourtuple.confinement`): nothing else
is started, bound or written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourtuple.cli import Exit

if TYPE_CHECKING:
    from fourtuple.brokerfile import BrokerFile
    from fourtuple.confinement import Confinement, Report

_MOST_SHOWN = 8


def explain(file: BrokerFile, *, store: Path | None, log: Path | None, uring: bool, as_json: bool) -> Exit:
    """Print it. Exit status 1 if something is missing that is neither switched off nor out of place."""
    from fourtuple import confinement
    from fourtuple.registry import Registry

    table = file.confine
    settings: dict[str, Any] = {
        "log": log,
        "uring": uring,
        "served": True,
        "identity": confinement.identity(table.user, table.group),
        "read": confinement.libraries(),
    }
    if store is None:
        allowed = confinement.plan(file, **settings)
    else:
        with Registry(store, create=False) as registry:
            allowed = confinement.plan(file, registry=registry, **settings)
    report = confinement.explain(allowed)
    if as_json:
        print(json.dumps({"allowed": allowed.as_json, **report.as_json}))
    else:
        print("\n".join(_lines(allowed, report)))
    return Exit.WARNING if report.missing else Exit.HEALTHY


def _lines(allowed: Confinement, report: Report) -> list[str]:
    lines = ["left to a broker with this file:"]
    written = sorted(allowed.write) + ([allowed.append] if allowed.append is not None else [])
    for name, things in (
        ("unix sockets below", sorted(allowed.sockets)),
        ("abstract unix names", ["all"] if allowed.abstract else []),
        (
            "TCP, by the supervisor" if allowed.asks else "TCP connect() to ports",
            ["the addresses of targets"] if allowed.asks else sorted(allowed.connect_ports),
        ),
        ("files written", written),
        ("files read", sorted(allowed.read)),
        ("io_uring", ["yes"] if allowed.uring else []),
    ):
        lines.append(f"  {name:24}{_shown(things)}")
    lines.append("how, on this machine:")
    for step in report.steps:
        said = "yes" if step.applied else "NO" if step.wanted else "no"
        lines.append(f"  {step.name.value:14}{said:5}{step.detail}")
    gaps = [(step.name.value, gap) for step in report.steps for gap in step.gaps]
    if gaps:
        lines.append("what stays open:")
        lines += [f"  {name:14}{gap}" for name, gap in gaps]
    return lines


def _shown(things: list[Any]) -> str:
    text = ", ".join(map(str, things[:_MOST_SHOWN])) or "none"
    return text + (f" and {len(things) - _MOST_SHOWN:,} more" if len(things) > _MOST_SHOWN else "")
