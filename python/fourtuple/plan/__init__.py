"""The plan: from a goal and a host to the least set of changes that reaches it, or the nearest that can be reached.

Pure: knows no file, socket or clock. The facts come in a `Host`; what each limit allows is the catalogue's answer,
before the changes and after them; the changes go out as a `Plan`, which `fourtuple tune` takes.
"""

from fourtuple.plan.files import written_files
from fourtuple.plan.hazards import hazards
from fourtuple.plan.model import Balancer, Finding, HostMark, Means, Plan
from fourtuple.plan.search import plan

__all__ = ["Balancer", "Finding", "HostMark", "Means", "Plan", "hazards", "plan", "written_files"]
