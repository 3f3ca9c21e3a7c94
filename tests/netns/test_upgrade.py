"""A broker that is replaced under load, small (`python -m bench.upgrade` is the large one): nobody is to notice."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.netns.brokering import needed

PATIENCE_S = 240


def test_nobody_notices() -> None:
    needed("gcc", "ip")
    counts = {"relays": 150, "parked": 20, "services": 5, "upgrades": 2}
    options = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    done = subprocess.run(
        [sys.executable, "-m", "bench.upgrade", "--slow", "4", *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    assert (seen["relays"], seen["upgrades"], seen["visits_failed"], seen["unaccounted"]) == (150, 2, [], 0)
    assert (seen["parked_right"], seen["parked_wrong"]) == (20, [])
    assert seen["rounds_right"] > 150
    assert seen["visits"] > 0
    assert seen["services_same_pid"] == 5
    assert seen["supervisor_pid_same"]
    # One that is not there, one that fails at once, and one whose broker process does.
    assert seen["broken_rolled_back"] == 3
    assert seen["moved"] >= 2 * 150
    assert set(seen["ended"]) == {"relayed"}
