"""Starts services that sleep, knows when they are there, stops them, and leaves nothing of them behind.

Needs no engine and no broker: whoever has a `Template` and a `Call` can start one (docs/services.md).
"""

from fourtuple.launcher.inetd import Inetd
from fourtuple.launcher.launcher import Launcher
from fourtuple.launcher.outcomes import Exit, Failure, Phase, Started, StartFailed, State
from fourtuple.launcher.state import Saved

__all__ = ["Exit", "Failure", "Inetd", "Launcher", "Phase", "Saved", "StartFailed", "Started", "State"]
