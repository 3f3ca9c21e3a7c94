"""Load on a real server: open, hold and measure connections, and say which side and which limit stops them.

A `Scenario` is played by `play` and ends in a `Report`. Knows no terminal: `fourtuple.cli.load` is its face.
"""

from fourtuple.load.attribution import Cause
from fourtuple.load.condition import Condition
from fourtuple.load.reasons import Side
from fourtuple.load.report import NUMBERS, Report
from fourtuple.load.run import Progress, play
from fourtuple.load.scenario import Scenario, Scheme, Target, TlsOptions

__all__ = [
    "NUMBERS",
    "Cause",
    "Condition",
    "Progress",
    "Report",
    "Scenario",
    "Scheme",
    "Side",
    "Target",
    "TlsOptions",
    "play",
]
