"""The private lab: network namespaces to prove things in, so that trying fourtuple never changes the host."""

from fourtuple.lab.lab import Lab, LabHost, Link
from fourtuple.lab.leftovers import Leftover, leftovers
from fourtuple.lab.operations import Opened
from fourtuple.lab.readings import Slab, UserMemory, kernel_memory_bytes, memory_room, slabs
from fourtuple.lab.remote import RemoteEngine

__all__ = [
    "Lab",
    "LabHost",
    "Leftover",
    "Link",
    "Opened",
    "RemoteEngine",
    "Slab",
    "UserMemory",
    "kernel_memory_bytes",
    "leftovers",
    "memory_room",
    "slabs",
]
