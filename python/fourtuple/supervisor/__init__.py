"""Two processes are a broker that lives: this one, which holds listeners and services, and the one that moves bytes.

`supervisor` decides what follows what; `child` and `brokerprocess` are the two ends of one broker process, `channel`,
`spec` and `words` what goes between them; `dormancy` and `wakes` are about services that sleep, `listeners` about
sockets, `succession` about the program that takes this one's place; `surroundings`, `controlled` and `life` make it a
command.
"""

from __future__ import annotations

from fourtuple.supervisor.listeners import Listeners
from fourtuple.supervisor.spec import Demonstration, Spec
from fourtuple.supervisor.supervisor import Settings, Supervisor

__all__ = ["Demonstration", "Listeners", "Settings", "Spec", "Supervisor"]
