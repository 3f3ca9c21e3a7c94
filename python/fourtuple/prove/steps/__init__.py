"""The steps of the proof, in order; one file each. `STEPS` is the table that everything else derives from."""

from fourtuple.prove.steps.addresses import ADDRESSES
from fourtuple.prove.steps.cliff import CLIFF
from fourtuple.prove.steps.descriptors import DESCRIPTORS
from fourtuple.prove.steps.exhaust import EXHAUST
from fourtuple.prove.steps.listeners import LISTENERS
from fourtuple.prove.steps.one_port import ONE_PORT
from fourtuple.prove.steps.server import SERVER

STEPS = (EXHAUST, ONE_PORT, ADDRESSES, DESCRIPTORS, SERVER, LISTENERS, CLIFF)

__all__ = ["STEPS"]
