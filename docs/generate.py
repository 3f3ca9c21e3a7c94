"""Writes docs/limits from the catalogue; `--check` only says which pages are stale, missing or left over.

Decides nothing but where the pages go: their text is `fourtuple.limits.pages`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fourtuple.limits.pages import pages

FOLDER = Path(__file__).resolve().parent / "limits"


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


def main() -> int:
    """Exit status 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description="Write docs/limits from the catalogue of limits.")
    parser.add_argument("--check", action="store_true", help="change nothing; list the pages that differ")
    if not parser.parse_args().check:
        write(FOLDER)
        return 0
    stale = differences(FOLDER)
    if stale:
        print(f"run python docs/generate.py: {len(stale)} pages differ: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
