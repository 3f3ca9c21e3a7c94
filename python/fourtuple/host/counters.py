"""Totals and gauges of the network stack from /proc/net: TCP counters, backlog drops, table overflows, sockets in use.

Decides the names ("TcpExt.ListenOverflows", "softnet.dropped") and how each file is laid out. Knows no meaning of a
counter.
"""

from __future__ import annotations

from itertools import pairwise

from fourtuple.facts import LARGEST
from fourtuple.host.tree import Tree, whole

_GROUPS = {"snmp": ("Tcp",), "netstat": ("TcpExt",)}
_SOFTNET = ("processed", "dropped", "time_squeeze")
"""The first three columns of /proc/net/softnet_stat (softnet_seq_show)."""
_STAT = {"nf_conntrack": "conntrack", "arp_cache": "arp_cache", "ndisc_cache": "ndisc_cache"}


def read_counters(tree: Tree, net: str) -> dict[str, int]:
    """Every counter of this network namespace, by name; `net` is its /proc/.../net."""
    counters: dict[str, int] = {}
    for file, groups in _GROUPS.items():
        counters.update(_pairs(tree.text(f"{net}/{file}", f"counters.{file}") or "", groups))
    counters.update(_softnet(tree.text(f"{net}/softnet_stat", "counters.softnet") or ""))
    for file, group in _STAT.items():
        # nf_conntrack is absent while the module is not loaded: a fact, not a failure.
        fact = "" if group == "conntrack" else f"counters.{group}"
        text = tree.text(f"{net}/stat/{file}", fact, absent="of the whole host, not shown in this network namespace")
        counters.update(_per_processor(text or "", group))
    return {name: total for name, total in counters.items() if abs(total) <= LARGEST}


def read_gauges(tree: Tree, net: str) -> dict[str, int]:
    """Numbers of sockets in use, as "TCP.inuse" and "TCP6.inuse" (sockstat_seq_show)."""
    gauges = {}
    for file in ("sockstat", "sockstat6"):
        absent = "IPv6 is not on in this kernel" if file == "sockstat6" else "absent"
        for line in (tree.text(f"{net}/{file}", f"sockets.{file}", absent=absent) or "").splitlines():
            group, _, rest = line.partition(":")
            words = rest.split()
            for name, text in zip(words[::2], words[1::2], strict=False):
                number = whole(text)
                if number is not None and number >= 0:
                    gauges[f"{group}.{name}"] = number
    return gauges


def _pairs(text: str, groups: tuple[str, ...]) -> dict[str, int]:
    """A line of names, then a line of values, both led by the group (netstat_seq_show)."""
    found: dict[str, int] = {}
    lines = text.splitlines()
    for names, values in pairwise(lines):
        group, _, rest = names.partition(":")
        if group not in groups or not values.startswith(f"{group}:"):
            continue
        for name, value in zip(rest.split(), values.partition(":")[2].split(), strict=False):
            number = whole(value)
            if number is not None and not name.lstrip("-").isdigit():
                found[f"{group}.{name}"] = number
    return found


def _softnet(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in text.splitlines():
        for name, column in zip(_SOFTNET, line.split(), strict=False):
            _add(found, f"softnet.{name}", column)
    return found


def _per_processor(text: str, group: str) -> dict[str, int]:
    """A line of names, then a line of hexadecimal numbers per processor; `entries` is a gauge that each line
    repeats."""
    found: dict[str, int] = {}
    names, *rows = text.splitlines() or [""]
    for row in rows:
        for name, column in zip(names.split(), row.split(), strict=False):
            if name != "entries":
                _add(found, f"{group}.{name}", column)
    return found


def _add(found: dict[str, int], name: str, column: str) -> None:
    try:
        # int() would also take a sign or "0x": no kernel writes them here.
        found[name] = found.get(name, 0) + (int(column, 16) if column.isalnum() else 0)
    except ValueError:
        return
