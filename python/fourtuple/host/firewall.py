"""Connection tracking and the firewall rules that bound connections: source NAT, counts, rates.

Decides what a ruleset says about connections, and whether tracking is active. Knows no table size that is enough.
nftables shows its rules only to CAP_NET_ADMIN; legacy iptables rules are not read, but named where there are any.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from shutil import which
from typing import Any, NamedTuple

from fourtuple.facts import Conntrack, SourceNat
from fourtuple.host.tree import Tree, folded

_PATIENCE_S = 0.3
_MOST_RULES = 256
_TRACKING = frozenset({"ct", "ct count", "ct helper", "snat", "dnat", "masquerade", "redirect", "synproxy"})
"""Expressions that make a ruleset need connection tracking (nf_ct_netns_get in their init functions)."""


class Ruleset(NamedTuple):
    """What the rules of this network namespace say; `tracks` is None if they could not be read."""

    tracks: bool | None = None
    source_nat: tuple[SourceNat, ...] = ()
    rule_limits: tuple[str, ...] = ()


def read_conntrack(tree: Tree, *, tracks: bool | None, established: int) -> Conntrack:
    """The tracking table. It is active if it has entries or a rule asks for it; without entries although connections
    are up, it is not; otherwise it cannot be told."""
    base = "proc/sys/net/netfilter/nf_conntrack_"
    maximum = tree.number(f"{base}max")
    if maximum is None:
        return Conntrack(loaded=tree.exists(f"{base}max"), active=None if tree.exists(f"{base}max") else False)
    count = tree.number(f"{base}count", "conntrack.count")
    active = tracks
    if count:
        active = True
    elif active is None and count == 0 and established:
        active = False
    if active is None:
        tree.miss("conntrack.active", "no entry, no connection to judge by, and the rules cannot be read without root")
    return Conntrack(loaded=True, active=active, count=count, maximum=maximum, buckets=tree.number(f"{base}buckets"))


def read_rules(tree: Tree, net: str) -> Ruleset:
    """The nftables ruleset of this network namespace, in bounded time."""
    legacy = [f"{net}/{family}_tables_names" for family in ("ip", "ip6")]
    tables = sorted({table for path in legacy for table in (tree.text(path) or "").split()})
    if tables:
        tree.miss("iptables", f"rules of legacy iptables are not read; tables in use: {folded(' '.join(tables))}")
    program = which("nft") or which("nft", path="/usr/sbin:/sbin")
    if program is None:
        tree.miss("nft", "nft is not installed, so rules cannot be listed")
        return Ruleset()
    try:
        listing = subprocess.run(
            [program, "-j", "list", "ruleset"],
            capture_output=True,
            timeout=_PATIENCE_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        tree.miss("nft", f"nft did not list the rules within {_PATIENCE_S} s")
        return Ruleset()
    except OSError as error:
        tree.miss("nft", f"nft does not run: {error.strerror}")
        return Ruleset()
    if listing.returncode != 0:
        complaint = folded(listing.stderr.decode("utf-8", "replace"))
        hint = "needs CAP_NET_ADMIN" if "not permitted" in complaint else complaint[:120]
        tree.miss("nft", f"nft cannot list the rules: {hint}")
        return Ruleset()
    try:
        ruleset = parse_ruleset(listing.stdout)
    except ValueError as error:
        tree.miss("nft", f"the answer of nft cannot be understood: {error}")
        return Ruleset()
    # A legacy rule may ask for tracking unseen.
    return ruleset._replace(tracks=None) if tables and not ruleset.tracks else ruleset


def parse_ruleset(text: bytes | str) -> Ruleset:
    """What libnftables-json(5) text says about connections. ValueError if it is not that."""
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    items = document.get("nftables") if isinstance(document, dict) else None
    if not isinstance(items, list):
        raise ValueError("no list named nftables")
    tracks, source_nat, rule_limits = False, [], []
    for item in items:
        rule = item.get("rule") if isinstance(item, dict) else None
        expressions = rule.get("expr") if isinstance(rule, dict) else None
        if not isinstance(rule, dict) or not isinstance(expressions, list):
            continue
        place = folded(f"{rule.get('family')} {rule.get('table')} {rule.get('chain')}")
        for name, value in _statements(expressions):
            tracks = tracks or name in _TRACKING
            if name in ("snat", "masquerade"):
                source_nat.append(_source_nat(place, name, value))
            elif text_of := _limit(name, value):
                rule_limits.append(f"{place}: {text_of}")
    return Ruleset(tracks, tuple(source_nat[:_MOST_RULES]), tuple(rule_limits[:_MOST_RULES]))


def _statements(expressions: list[Any]) -> Iterator[tuple[str, Any]]:
    """Every name and value in a rule, at any depth."""
    left = list(reversed(expressions))
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield from ((name, value) for name, value in item.items() if isinstance(name, str))
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)


def _limit(name: str, value: Any) -> str:  # noqa: ANN401 - JSON of any shape
    if not isinstance(value, dict):
        return ""
    match name:
        case "ct count":
            return folded(f"ct count {'over ' if value.get('inv') else ''}{value.get('val')}")
        case "limit":
            over = "over " if value.get("inv") else ""
            return folded(
                f"limit rate {over}{value.get('rate')} {value.get('rate_unit', 'packets')}/{value.get('per')}"
            )
        case "xt" if value.get("name") in ("connlimit", "hashlimit", "limit", "recent"):
            return folded(f"iptables match {value['name']}")
    return ""


def _source_nat(place: str, name: str, value: Any) -> SourceNat:  # noqa: ANN401 - JSON of any shape
    fields = value if isinstance(value, dict) else {}
    # What is not a plain address, a range or a prefix (a map, say) gives at least one address.
    addresses = 0 if name == "masquerade" else max(1, _size(fields.get("addr")))
    ports = fields.get("port")
    bounds = ports.get("range") if isinstance(ports, dict) else [ports, ports]
    low, high = bounds if isinstance(bounds, list) and len(bounds) == 2 else (None, None)
    usable = isinstance(low, int) and isinstance(high, int) and 0 < low <= high <= 65_535
    rule = f"{name} to {json.dumps(fields['addr'])}" if "addr" in fields else name
    return SourceNat(table=place, rule=folded(rule)[:200], addresses=addresses, ports=(low, high) if usable else None)


def _size(addresses: Any) -> int:  # noqa: ANN401 - JSON of any shape
    try:
        if isinstance(addresses, str):
            return ip_network(addresses, strict=False).num_addresses
        if isinstance(addresses, dict) and isinstance(addresses.get("range"), list):
            first, last = (int(ip_address(end)) for end in addresses["range"])
            return last - first + 1
        if isinstance(addresses, dict) and isinstance(addresses.get("prefix"), dict):
            prefix = addresses["prefix"]
            return ip_network(f"{prefix.get('addr')}/{prefix.get('len')}", strict=False).num_addresses
    except ValueError:
        pass
    return 0
