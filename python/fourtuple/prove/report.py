"""The proof as one HTML file: the table, what the kernel said, and the curves.

Decides how a proof looks on paper. Knows only the finished `Proof`. Needs matplotlib (extra `report`); the pictures are
SVG inside the file, so that it stands alone.
"""

from __future__ import annotations

from html import escape
from io import StringIO
from typing import TYPE_CHECKING

from fourtuple.errors import MissingFeature
from fourtuple.prove.model import Curve, Outcome, Proof, Row, StepResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #dde3ea; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; white-space: normal; } .wide { overflow-x: auto; }
.passed, .failed, .stopped { white-space: nowrap; }
.passed { color: #1a7f37; } .failed { color: #c4232a; font-weight: 600; } .stopped { color: #9a6700; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; } .dim { color: #66707c; }
@media (prefers-color-scheme: dark) { body { background: #12161c; color: #e2e7ee; } th, td { border-color: #2b333d; }
  figure { background: #fff; border-radius: 6px; padding: .5rem; } }
"""
WORDS = {Outcome.PASSED: "passed", Outcome.FAILED: "failed", Outcome.STOPPED: "could not run"}
COLUMNS = (
    ("Claim", ""),
    ("Arithmetic", ""),
    ("Reached", "number"),
    ("Limit that bound", ""),
    ("The kernel said", ""),
    ("Kernel memory per socket", "number"),
    ("User memory per connection", "number"),
    ("Time", "number"),
)
"""Heading and class of each column after the verdict; a step without a value for a column goes without the column."""


def require_matplotlib() -> None:
    """Raise MissingFeature now, before minutes of work, if the pictures could not be drawn at the end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingFeature("--html needs matplotlib: pip install 'fourtuple[report]'") from None


def html(proof: Proof) -> str:
    """The whole page."""
    body = "\n".join(_step(result) for result in proof.results)
    verdict = (
        "every claim holds" if proof.passed else "interrupted" if proof.interrupted else "not every claim was shown"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fourtuple: past 65,535</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>Past 65,535: {escape(verdict)}</h1>
<p class="dim">Linux {escape(proof.kernel)}, {escape(proof.machine)}, {escape(proof.started_at)}, {proof.seconds:.0f} s.
Every number was reached with live connections in network namespaces made for it.</p>
{body}
</body></html>
"""


def _step(result: StepResult) -> str:
    lines = [_texts(row) for row in result.rows]
    used = [number for number in range(len(COLUMNS)) if any(texts[number] for texts in lines)]
    head = "".join(f'<th class="{COLUMNS[number][1]}">{escape(COLUMNS[number][0])}</th>' for number in used)
    rows = "\n".join(
        f'<tr><td class="{row.outcome.value}">{WORDS[row.outcome]}</td>'
        + "".join(f'<td class="{COLUMNS[number][1]}">{escape(texts[number])}</td>' for number in used)
        + "</tr>"
        for row, texts in zip(result.rows, lines, strict=True)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    figures = "\n".join(f"<figure>{_svg(curve)}</figure>" for curve in result.curves)
    return f"""<h2>{escape(result.title)} <span class="{result.outcome.value}">{WORDS[result.outcome]}</span>
<span class="dim">({escape(result.step)}, {result.seconds:.1f} s)</span></h2>
<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>
{rows}
</tbody></table></div>
{f"<ul>{notes}</ul>" if notes else ""}
{figures}"""


def _texts(row: Row) -> tuple[str, ...]:
    """The cells of a row, in the order of the columns."""

    def memory(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f} B"

    return (
        row.claim,
        row.arithmetic,
        f"{row.reached:,}",
        row.bound_by,
        row.kernel_said,
        memory(row.kernel_bytes_per_socket),
        memory(row.user_bytes_per_connection),
        f"{row.seconds:.1f} s" if row.seconds else "",
    )


def _svg(curve: Curve) -> str:
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curve.series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1.6)
    for height, name in curve.marks:
        axes.axhline(height, color="#c4232a", linewidth=1, linestyle="--")
        axes.annotate(name, (0, height), xytext=(4, 3), textcoords="offset points", color="#c4232a", fontsize=9)
    axes.set(title=curve.title, xlabel=curve.x_label, ylabel=curve.y_label)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if curve.logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    if len(curve.series) > 1:
        axes.legend(frameon=False)
    drawn = StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
