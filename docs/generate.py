"""Writes what in docs/ follows from something else; `--check` only says what is stale, missing or left over.

docs/limits comes from the catalogue, the tables of recorded runs from docs/recorded. Decides where things go: the text
of a page is `fourtuple.limits.pages`, and the prose around a table is in the file itself.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from fourtuple.limits.pages import pages

DOCS = Path(__file__).resolve().parent
RECORDED = DOCS / "recorded"
WEIGHED = 500_000
"""Connections from which on the record says what each cost: fewer say more about the allocator than about sockets."""
PLACE = re.compile(r"(?s)(<!-- recorded(?P<what>[a-z ]*): [^>]*-->\n).*?(<!-- /recorded -->)")


def differences(folder: Path) -> list[str]:
    """Names of pages that are stale, missing or belong to no limit."""
    wanted = pages()
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def write(folder: Path) -> None:
    """Make the folder hold the pages and no others."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for path in folder.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


def with_record(text: str, record: dict[str, Any]) -> str:
    """The text with the recorded run in its place; ValueError if it has none."""
    replaced, places = PLACE.subn(lambda found: f"{found[1]}{TELLERS[found['what']](record)}{found[3]}", text)
    if places != 1:
        raise ValueError(f"{places} places for the recorded run; exactly one is needed")
    return replaced


def record(proof: dict[str, Any]) -> str:
    """The recorded run as Markdown: what it ran on, and a row for each claim."""
    rows = [
        f"| `{result['step']}` | {row['claim']} | {row['arithmetic']} | {row['reached']:,} | {_answer(row)} |"
        for result in proof["results"]
        for row in result["rows"]
    ]
    notes = [f"- `{result['step']}`: {note}" for result in proof["results"] for note in result["notes"]]
    head = "| step | claim | arithmetic | reached | the kernel said |\n|---|---|---|---:|---|\n"
    return f"{_where(proof)}\n\n{head}" + "\n".join(rows) + "\n\n" + "\n".join(notes) + "\n"


def in_short(proof: dict[str, Any]) -> str:
    """The recorded run as Markdown, the largest number of each step."""
    largest = [(result, max(reversed(result["rows"]), key=lambda row: row["reached"])) for result in proof["results"]]
    rows = [f"| `{result['step']}` | {row['claim']} | {row['reached']:,} | {_answer(row)} |" for result, row in largest]
    return (
        f"{_where(proof)}\n\n| step | claim | reached | the kernel said |\n|---|---|---:|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def matrix(record: dict[str, Any]) -> str:
    """The recorded matrix as Markdown: what each program did in all, then along each axis."""
    rows = [row for row in record["programs"] if not row["absent"]]
    outcomes = ("right", "default", "other", "closed", "stalled")
    counts = [
        f"| {row['name']} | {row['version']} | "
        + " | ".join(f"{row['outcomes'].get(it, 0):,}" for it in outcomes)
        + " |"
        for row in rows
    ]
    lines = [
        _where(record),
        "",
        f"`{record['command']}`",
        "",
        f"| of {record['cells']:,} cells | version | {' | '.join(outcomes)} |",
    ]
    lines += [f"|---|---|{'---:|' * len(outcomes)}", *counts, ""]
    lines += [f"{row['name']}: not run, {row['absent']}.\n" for row in record["programs"] if row["absent"]]
    for row in rows:
        lines += [f"**{row['name']}**, right of all, by bytes of the message:", ""]
        lines += [f"| records | {' | '.join(record['sizes'])} |", f"|---|{'---:|' * len(record['sizes'])}"]
        for cut, shares in row["grid"].items():
            lines.append(f"| {cut} | " + " | ".join(_share(shares.get(size)) for size in record["sizes"]) + " |")
        lines.append("")
    for axis in ("segments", "contents"):
        lines += [f"| {axis} | {' | '.join(row['name'] for row in rows)} |", f"|---|{'---:|' * len(rows)}"]
        for name in rows[0][axis]:
            lines.append(f"| {name} | " + " | ".join(_share(row[axis].get(name)) for row in rows) + " |")
        lines.append("")
    return "\n".join(lines)


def _share(share: list[int] | None) -> str:
    if share is None:
        return "-"
    right, of = share
    return f"{right} of {of}" if right < of else f"all {of}"


TELLERS = {"": record, " in short": in_short, " matrix": matrix}
"""What stands between the comments `recorded`, `recorded in short` and `recorded matrix`."""
PLACES = {
    DOCS / "65535.md": RECORDED / "proof.json",
    DOCS.parent / "README.md": RECORDED / "proof.json",
    DOCS / "sniffing.md": RECORDED / "matrix.json",
}
"""Files with a place for a recorded run."""


def filled() -> dict[Path, str]:
    """What stands in those files once their places are filled."""
    return {
        path: with_record(path.read_text(encoding="utf-8"), json.loads(source.read_text(encoding="utf-8")))
        for path, source in PLACES.items()
    }


def stale_records() -> list[str]:
    """Names of files whose recorded run is another."""
    return [path.name for path, text in filled().items() if text != path.read_text(encoding="utf-8")]


def main() -> int:
    """Exit status 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description="Write the limits' pages and the tables of the recorded run.")
    parser.add_argument("--check", action="store_true", help="change nothing; list what differs")
    if not parser.parse_args().check:
        write(DOCS / "limits")
        for path, text in filled().items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = differences(DOCS / "limits") + stale_records()
    if stale:
        print(f"run python docs/generate.py: {len(stale)} files differ: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


def _where(proof: dict[str, Any]) -> str:
    kernel = re.match(r"[0-9.]+", proof["kernel"])
    number = kernel[0] if kernel else proof["kernel"]
    return f"*Linux {number}, {proof['machine']}, {proof['started_at'][:10]}, {proof['seconds']:.0f} s in all:*"


def _answer(row: dict[str, Any]) -> str:
    bound = f" (`{row['bound_by']}`)" if row["bound_by"] else ""
    memory = row["kernel_bytes_per_socket"]
    cost = f"; {memory:,.0f} B of kernel memory per socket" if memory and row["reached"] >= WEIGHED else ""
    return f"{row['kernel_said']}{bound}{cost}"


if __name__ == "__main__":
    sys.exit(main())
