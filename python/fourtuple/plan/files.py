"""The files of a plan: what makes its changes last, and what a person or a cluster has to be told.

Decides paths and contents. Pure: the caller writes them, into a folder to look at or into the host's own places.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network

from fourtuple.facts import Change, ChangeKind, Role
from fourtuple.plan.draft import HOST_WIDE
from fourtuple.plan.model import Plan

HEAD = "# Written by fourtuple plan"
SYSCTL_FILE = "etc/sysctl.d/60-fourtuple.conf"
MODULES_FILE = "etc/modules-load.d/60-fourtuple.conf"
UNIT_FILE = "etc/systemd/system/fourtuple-addresses.service"
NETWORK_FILE = "etc/systemd/network/60-fourtuple.network"
SERVICE = "SERVICE"
"""Stands where no service was named."""


def written_files(plan: Plan, service: str = SERVICE) -> dict[str, str]:
    """Contents by path, relative to the root of a host or to the folder of --write."""
    found = dict(persistent_files(plan, service))
    if prefixes := _prefixes(plan):
        found[NETWORK_FILE] = _networkd(prefixes)
        found["addresses.sh"] = _script(prefixes)
    if rules := _nft(plan):
        found["fourtuple.nft"] = rules
    found["container.md"] = _container(plan)
    found["plan.json"] = plan.model_dump_json(indent=2) + "\n"
    return found


def persistent_files(plan: Plan, service: str = "") -> Iterator[tuple[str, str]]:
    """The files that --persist puts into a host's own places; the drop-in only for a service that was named."""
    sysctls = [change for change in plan.changes if change.kind is ChangeKind.SYSCTL]
    if sysctls:
        lines = [line for change in sysctls for line in _sysctl(change)]
        yield SYSCTL_FILE, "\n".join([_head(plan), *lines, ""])
    if any(change.knob.startswith("net.netfilter.") for change in sysctls):
        # The keys do not exist before the module is loaded, and systemd-modules-load comes before systemd-sysctl (G1).
        yield MODULES_FILE, f"{_head(plan)}\nnf_conntrack\n"
    units = [change for change in plan.changes if change.kind is ChangeKind.UNIT]
    if units and service:
        lines = [line for change in units for line in (f"# {change.arithmetic} ({change.limit})", _unit_line(change))]
        yield drop_in(service), "\n".join([_head(plan), "[Service]", *lines, ""])
    if prefixes := _prefixes(plan):
        yield UNIT_FILE, _unit(prefixes)


def drop_in(service: str) -> str:
    """The path of a service's drop-in."""
    return f"etc/systemd/system/{service}.service.d/60-fourtuple.conf"


def _head(plan: Plan) -> str:
    goal = plan.goal
    return f"{HEAD}: {goal.connections or 0:,} connections, {goal.role.value}, on {plan.machines:,} of such machines."


def _sysctl(change: Change) -> Iterator[str]:
    yield f"# {change.arithmetic} ({change.limit}); it was {change.old or 'empty'!r}."
    yield f"{change.knob} = {change.new}"


def _unit_line(change: Change) -> str:
    return f"{change.knob}={change.new}"


def _prefixes(plan: Plan) -> tuple[str, ...]:
    return tuple(change.knob for change in plan.changes if change.kind is ChangeKind.LOCAL_PREFIX)


def _ip(prefix: str, verb: str) -> str:
    return f"ip {'-6 ' if ip_network(prefix).version == 6 else ''}route {verb} local {prefix} dev lo"


def _networkd(prefixes: tuple[str, ...]) -> str:
    routes = (f"\n[Route]\nDestination={prefix}\nType=local\nTable=local\n" for prefix in prefixes)
    head = f"{HEAD}: each address of these prefixes is this host's own. Use this or fourtuple-addresses.service."
    return f"{head}\n[Match]\nName=lo\n{''.join(routes)}"


def _script(prefixes: tuple[str, ...]) -> str:
    lines = [_ip(prefix, "replace") for prefix in prefixes]
    undo = [f"#   {_ip(prefix, 'del')}" for prefix in prefixes]
    return "\n".join(["#!/bin/sh", HEAD, "set -eu", *lines, "# To undo:", *undo, ""])


def _unit(prefixes: tuple[str, ...]) -> str:
    starts = [f"ExecStart=/sbin/{_ip(prefix, 'replace')}" for prefix in prefixes]
    stops = [f"ExecStop=-/sbin/{_ip(prefix, 'del')}" for prefix in prefixes]
    lines = [
        f"{HEAD}; systemctl enable --now fourtuple-addresses",
        "[Unit]",
        "Description=Local prefixes for many source addresses",
        "After=network-pre.target",
        "Before=network.target",
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        *starts,
        *stops,
        "",
        "[Install]",
        "WantedBy=multi-user.target",
        "",
    ]
    return "\n".join(lines)


def _nft(plan: Plan) -> str:
    """Source NAT where the plan asks for it; else, where it turns the tracking table, the way to do without one."""
    translate = [change for change in plan.changes if change.kind is ChangeKind.RULES]
    if translate:
        rule = translate[0]
        text = f'        oifname "WAN" {rule.new} fully-random'
        if not plan.sources:
            text = f"        # Name the addresses with --from and plan again.\n        # {text.strip()}"
        return "\n".join(
            [
                f"{HEAD}: {rule.arithmetic} ({rule.limit}).",
                f"# In the place of: {rule.old or 'no rule'}. WAN is the interface that leads outside.",
                f"table {'ip6' if plan.share.ipv6 else 'ip'} fourtuple {{",
                "    chain postrouting {",
                "        type nat hook postrouting priority srcnat;",
                text,
                "    }",
                "}",
                "",
            ]
        )
    # A box that translates has to track.
    if plan.goal.role is Role.NAT or not any(change.limit == "G1" for change in plan.changes):
        return ""
    here, there = "PORT", sorted({one.port for one in plan.destinations})
    serves = plan.goal.role in (Role.SERVER, Role.PROXY)
    connects = plan.goal.role is not Role.SERVER
    which = "{ " + ", ".join(map(str, there)) + " }" if there else "PORT_OF_THE_DESTINATION"
    before = [f"dport {here}"] * serves + [f"sport {which}"] * connects
    after = [f"sport {here}"] * serves + [f"dport {which}"] * connects
    unnamed = ["# Put in the numbers for the ports in capitals first."] if serves or not there else []
    return "\n".join(
        [
            f"{HEAD}: instead of a larger table, do not track these connections at all (G1).",
            "# Rules that ask for their state no longer see them.",
            *unnamed,
            "table inet fourtuple {",
            *_chain("prerouting", before),
            *_chain("output", after),
            "}",
            "",
        ]
    )


def _chain(hook: str, ports: list[str]) -> list[str]:
    rules = [f"        tcp {one} notrack" for one in ports]
    return [f"    chain {hook} {{", f"        type filter hook {hook} priority raw;", *rules, "    }"]


NAMESPACED_SAFE = ("net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports")
"""Sysctls that Kubernetes lets a pod set unasked; others need --allowed-unsafe-sysctls on the kubelet."""


def _container(plan: Plan) -> str:
    """Notes for containers: which changes go where."""
    lines = ["# The same plan in containers", ""]
    sysctls = [one for one in plan.changes if one.kind is ChangeKind.SYSCTL]
    own = [one for one in sysctls if not one.knob.startswith(HOST_WIDE)]
    host = [one for one in sysctls if one not in own]
    host += [one for one in plan.changes if one.kind is ChangeKind.ELSEWHERE]
    units = {one.knob: one.new for one in plan.changes if one.kind is ChangeKind.UNIT}
    if own:
        lines += ["A network namespace has its own copy of these, so they belong into the pod:", "", "```yaml"]
        lines += ["securityContext:", "  sysctls:"]
        lines += [f'    - {{name: {one.knob}, value: "{one.new}"}}' for one in own]
        lines += ["```", "", "docker: " + " ".join(f'--sysctl "{one.knob}={one.new}"' for one in own), ""]
        unsafe = [one.knob for one in own if one.knob not in NAMESPACED_SAFE]
        if unsafe:
            lines += [f"The kubelet has to allow {', '.join(unsafe)}: `--allowed-unsafe-sysctls`.", ""]
    if host:
        lines += ["On the node, not in the container:", ""]
        lines += [f"- {one.knob}: {one.old or 'empty'} -> {one.new} ({one.arithmetic})" for one in host] + [""]
    if "LimitNOFILE" in units:
        nofile = units["LimitNOFILE"]
        lines += [
            f"Descriptors: `docker run --ulimit nofile={nofile}:{nofile}`. Kubernetes has no setting for a pod: set"
            f" `LimitNOFILE={nofile}` in the unit of containerd or CRI-O, and verify /proc/PID/limits of the program.",
            "",
        ]
    if "MemoryMax" in units:
        lines += [f'Memory: `resources.limits.memory: "{units["MemoryMax"]}"`; sockets are charged to it (C6).', ""]
    if prefixes := _prefixes(plan):
        lines += ["Source addresses: in the namespace of the pod, with CAP_NET_ADMIN (an init container):", "", "```sh"]
        lines += [_ip(prefix, "replace") for prefix in prefixes]
        lines += ["```", "", "The cluster's network has to route them to the pod: most do not, hostNetwork does.", ""]
    if len(lines) == 2:
        lines += ["Nothing has to be changed.", ""]
    return "\n".join(lines)
