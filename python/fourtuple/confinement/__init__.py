"""Least privilege: what a broker's process gives up once everything is open, and before it moves the first byte.

`plan` says what it will need, `confine` gives the rest up for ever, and `explain` does the same in a child, to tell
what would come of it here. Where a broker may not even connect, `Connector` does it for it. Defines nothing itself.
"""

from fourtuple.confinement.apply import confine, explain
from fourtuple.confinement.connecting import Addresses, Connector
from fourtuple.confinement.model import (
    Confinement,
    Folder,
    Identity,
    Reach,
    Report,
    Step,
    StepName,
    addresses,
    outside,
    plan,
    reach_of,
    reach_of_registry,
)
from fourtuple.confinement.paths import identity, libraries, moved, stays_readable

__all__ = [
    "Addresses",
    "Confinement",
    "Connector",
    "Folder",
    "Identity",
    "Reach",
    "Report",
    "Step",
    "StepName",
    "addresses",
    "confine",
    "explain",
    "identity",
    "libraries",
    "moved",
    "outside",
    "plan",
    "reach_of",
    "reach_of_registry",
    "stays_readable",
]
