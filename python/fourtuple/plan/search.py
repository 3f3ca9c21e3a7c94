"""The search for a plan: ask the catalogue, have the rule of the lowest limit that falls short raise it, ask again.

Decides the order of changes, when a goal is out of reach and what is nearest, and on how many machines it is reached.
Knows no knob: `rules` does. Since only a limit that binds is raised, and no further than needed, the changes are the
least set; since the catalogue is asked about the host as it would be, the plan and the doctor cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fourtuple.doctor import Binding, RoleDiagnosis, diagnose
from fourtuple.errors import BadConfig
from fourtuple.facts import Goal, Host, Role
from fourtuple.limits._terms import MEMORY_SHARE_PERCENT
from fourtuple.plan.draft import Draft
from fourtuple.plan.machines import balancer, in_front
from fourtuple.plan.model import MOST_MACHINES, Finding, HostMark, Means, Plan
from fourtuple.plan.rules import COUNT_RULES, LARGEST_QUEUE, NAT_FILL_PERCENT, RATE_RULES, Rule, memory, queue_for_rate
from fourtuple.tuples import AddressSet

MOST_ROUNDS = 64
"""Each round raises a limit, and there are fewer limits; a rule that raises nothing ends the search anyway."""


def plan(goal: Goal, host: Host, means: Means | None = None) -> Plan:
    """The least changes with which `host`, or several of its shape, reach `goal`; or the nearest that can be reached.

    BadConfig where goal and means contradict each other.
    """
    means = means or Means()
    means.check(goal)
    goal = _told(goal, means)
    machines = means.machines or _enough_machines(goal, host, means)
    if means.machine > machines:
        raise BadConfig("--machine", f"{means.machine:,}: from 1 to the number of machines, {machines:,}")
    means = replace(means, machines=machines, sources=_share_of_sources(means, machines))
    share = goal.model_copy(update={"connections": -(-(goal.connections or 0) // machines)})
    draft, stop = _nearest(share, host, means)
    return _written(goal, share, draft, stop)


def _told(goal: Goal, means: Means) -> Goal:
    """The goal with what the named endpoints and addresses say."""
    update: dict[str, object] = {}
    if means.to:
        update["destinations"] = len(means.to)
    destinations = len(means.to) or goal.destinations
    if goal.role is Role.CLIENT_ONE and destinations > 1:
        update["role"] = Role.CLIENT_MANY
    named = [one.address.version for one in means.to] + ([means.sources.version] if means.sources else [])
    if named:
        update["ipv6"] = named[0] == 6
    return goal.model_copy(update=update)


def _enough_machines(goal: Goal, host: Host, means: Means) -> int:
    """The fewest machines of this shape, were each to take its best."""
    total = goal.connections or 0
    alone, _ = _nearest(goal, host, replace(means, machines=1))
    if alone.wanted >= total or not alone.wanted:
        return 1
    machines = -(-total // alone.wanted)
    if means.sources is not None and means.sources.size < machines:
        why = f"{means.sources.size:,} addresses, and it takes {machines:,} machines: each needs one of its own"
        raise BadConfig("--from", why)
    if machines > MOST_MACHINES:
        raise BadConfig("--connections", f"{total:,} would take {machines:,} machines; at most {MOST_MACHINES:,} count")
    return machines


def _share_of_sources(means: Means, machines: int) -> AddressSet | None:
    return None if means.sources is None else means.sources.split(machines)[means.machine - 1]


def _nearest(goal: Goal, host: Host, means: Means) -> tuple[Draft, Binding | None]:
    """The draft for the goal, or for as many connections as can be had; and the limit that stopped it."""
    wanted, stopped = goal.connections or 0, None
    while True:
        start = goal.model_copy(update={"connections": wanted})
        draft, stop = _search(Draft(found=host, host=host, goal=start, means=means))
        stopped = stopped or stop
        # A rate that cannot be had does not make the number smaller.
        if stop is None or stop.limit in RATE_RULES or wanted == 0:
            return draft, stopped
        wanted = stop.connections


def _search(draft: Draft) -> tuple[Draft, Binding | None]:
    draft = queue_for_rate(draft)
    for _ in range(MOST_ROUNDS):
        short = next(_short(draft), None)
        if short is None:
            return draft, None
        binding, rule = short
        later = rule(draft) if rule else None
        if later is None or later == draft:
            return draft, binding
        draft = later
    raise AssertionError("a plan that does not come to an end")


def _short(draft: Draft) -> Iterator[tuple[Binding, Rule | None]]:
    """Limits that are not enough for the draft's goal, lowest first, each with its rule."""
    answer = _asked(draft.host, draft.goal)
    for bound in answer.bounds:
        bound = _certain(bound)
        if bound.connections < draft.wanted:
            yield bound, COUNT_RULES.get(bound.limit)
    for rate in answer.rates:
        if rate.limit in RATE_RULES and rate.connections < draft.goal.rate_per_s:
            yield rate, RATE_RULES[rate.limit]


def _certain(bound: Binding) -> Binding:
    """Source NAT fails by chance before it is full; all other limits hold to the last connection."""
    if bound.limit != "G4":
        return bound
    connections = bound.connections * NAT_FILL_PERCENT // 100
    arithmetic = f"{bound.arithmetic}; {NAT_FILL_PERCENT} % of it = {connections:,}"
    return replace(bound, connections=connections, arithmetic=arithmetic)


def _asked(host: Host, goal: Goal) -> RoleDiagnosis:
    return diagnose(host, [goal]).roles[0]


def _written(goal: Goal, share: Goal, draft: Draft, stop: Binding | None) -> Plan:
    before = _asked(draft.found, share)
    after = _asked(draft.host, draft.goal)
    machines = draft.means.machines or 1
    bounds = [_certain(bound) for bound in after.bounds]
    ceiling = min((bound.connections for bound in bounds), default=draft.wanted)
    total = min(goal.connections or 0, draft.wanted * machines)
    needed, arithmetic = memory(draft.goal, _tracked(draft))
    return Plan(
        goal=goal,
        host=HostMark.of(draft.found),
        machines=machines,
        machine=draft.means.machine,
        share=draft.goal,
        reached=stop is None,
        ceiling_before=min((_certain(bound).connections for bound in before.bounds), default=None),
        ceiling=ceiling,
        total=total,
        stopped_by="" if stop is None else f"{stop.name} ({stop.limit}): {stop.arithmetic}",
        findings=_findings(draft, before, after),
        changes=draft.changes,
        sources="" if draft.goal.sources <= 1 or not draft.sources else str(draft.sources),
        destinations=draft.means.to,
        memory_bytes=needed,
        memory_arithmetic=arithmetic,
        unknown=tuple(f"{one.name} ({one.limit}): {one.reason}" for one in after.unknown),
        notes=tuple(_notes(goal, draft, stop, needed)),
        balancer=balancer(goal, draft.found, machines, total) if in_front(goal, machines) else None,
    )


def _findings(draft: Draft, before: RoleDiagnosis, after: RoleDiagnosis) -> tuple[Finding, ...]:
    now = {bound.limit: _certain(bound).connections for bound in (*after.bounds, *after.rates)}
    short = [(_certain(bound), False) for bound in before.bounds if _certain(bound).connections < draft.wanted]
    rates = (rate for rate in before.rates if rate.limit in RATE_RULES)
    short += [(rate, True) for rate in rates if rate.connections < draft.goal.rate_per_s]
    return tuple(
        Finding(
            limit=bound.limit,
            name=bound.name,
            title=bound.title,
            before=bound.connections,
            after=now.get(bound.limit),
            arithmetic=bound.arithmetic,
            per_second=per_second,
        )
        for bound, per_second in short
    )


def _tracked(draft: Draft) -> int:
    """Entries of the tracking table, where there is tracking: translation brings it along."""
    tracks = draft.host.conntrack.active or draft.goal.role is Role.NAT
    return (draft.host.conntrack.maximum or draft.wanted) if tracks else 0


def _notes(goal: Goal, draft: Draft, stop: Binding | None, needed: int) -> Iterator[str]:
    available = draft.host.machine.memory_available_bytes
    if available is not None and needed > available * MEMORY_SHARE_PERCENT // 100:
        share = f"{MEMORY_SHARE_PERCENT} % of the {available:,} B available"
        yield f"the memory that is needed, {needed:,} B, is more than {share}"
    if stop is not None and draft.wanted and (draft.means.machines or 1) == 1:
        machines = -(-(goal.connections or 0) // draft.wanted)
        if machines > 1:
            yield f"{machines:,} machines of this shape would reach it: --machines auto plans them"
    if goal.rate_per_s:
        text = f"whether the processors make {goal.rate_per_s:,} connections per second shows fourtuple load alone"
        if goal.rate_per_s > LARGEST_QUEUE and goal.role in (Role.SERVER, Role.PROXY):
            pause_ms = LARGEST_QUEUE * 1_000 // goal.rate_per_s
            text += f"; the longest queue there is covers {pause_ms:,} ms without accept()"
        yield text
    if goal.role is Role.NAT and draft.goal.sources > 1:
        # find_best_ips_proto() in net/netfilter/nf_nat_core.c.
        yield "the kernel picks the SNAT address by a hash of client and server: few clients fill few of the addresses"
    if draft.unnamed_sources and goal.role is not Role.NAT:
        yield f"{draft.unnamed_sources:,} source addresses have no name yet: --from names them"
    if draft.goal.sources > 1 and goal.role is not Role.NAT:
        yield "the peers, or the router before them, need a route back to the source addresses; clouds assign them (H2)"
    if draft.goal.role in (Role.CLIENT_ONE, Role.CLIENT_MANY, Role.PROXY):
        yield "past half of its ports connect() gets slow unless each port is chosen (A3): fourtuple's engine does so"
