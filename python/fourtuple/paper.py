"""How our reports look on paper: one HTML file that stands alone, light and dark.

Decides the frame of a page and its style. Knows nothing of what stands in it; the caller has escaped it.
"""

from __future__ import annotations

from html import escape

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


def page(title: str, body: str) -> str:
    """A whole page; `body` is HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
{body}
</body></html>
"""
