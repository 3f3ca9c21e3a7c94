"""Two processes are a broker that lives: this one, which holds listeners and services, and the one that moves bytes.

`supervisor` decides what follows what; `child` and `brokerprocess` are the two ends of one broker process, `channel` and
`spec` what goes between them; `dormancy` and `wakes` are about services that sleep; `listeners` about sockets.
"""

from __future__ import annotations

from fourtuple.supervisor.listeners import Listeners
from fourtuple.supervisor.spec import Demonstration, Spec
from fourtuple.supervisor.supervisor import Settings, Supervisor

__all__ = ["Demonstration", "Listeners", "Settings", "Spec", "Supervisor"]
