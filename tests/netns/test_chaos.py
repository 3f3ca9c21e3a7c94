"""The chaos run as `make chaos` starts it, short: some of each trouble, by dice that fall the same way each time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.netns.brokering import needed

ROOT = Path(__file__).parents[2]
SECONDS, SEED = 18, 11
WITHIN_S = 300
"""For the host's slowest hour; nothing else is timed here."""


def test_no_client_hears_a_wrong_byte_and_none_is_lost_without_a_reason(tmp_path: Path) -> None:
    needed("gcc", "ip")
    command = [sys.executable, "-m", "bench.chaos", "--seconds", str(SECONDS), "--seed", str(SEED), "--rate", "25"]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    said = (tmp_path / "said").read_text()[-2_000:] if (tmp_path / "said").exists() else ""
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:] + said
    came_of_it = json.loads(done.stdout)
    assert came_of_it["clients"] > 100
    assert came_of_it["troubles"]["upgrade"] >= 2
    assert came_of_it["summary"]["ended"]["relayed"] > 0
    assert came_of_it["summary"]["ended"]["handed_off"] > 0
