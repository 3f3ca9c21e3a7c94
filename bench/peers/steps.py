"""How a client under measurement talks with the bench: a line of JSON at the end of each step, then wait for a line.

Decides nothing of what is measured. Between two steps the client does nothing, so that its memory can be read.
"""

from __future__ import annotations

import json
import resource
import sys
import time


class Step:
    """Measures what happens between the bench's word to begin and `done`."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._cpu_s = _cpu_s()

    def done(self, **numbers: object) -> None:
        """Report this step's numbers with its time, wait for the bench, and begin the next."""
        seconds, cpu_s = time.perf_counter() - self._started_s, _cpu_s() - self._cpu_s
        print(json.dumps({**numbers, "seconds": seconds, "cpu_s": cpu_s}), flush=True)
        if not sys.stdin.readline():
            raise SystemExit("the bench is gone")
        self._started_s, self._cpu_s = time.perf_counter(), _cpu_s()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
