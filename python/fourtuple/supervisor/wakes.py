"""Who may wake a sleeping service, and how often.

Decides by lists of prefixes and by budgets, per source prefix and in total: a token bucket each, so that a burst is
allowed and a flood is not. Pure: the time is an argument. Knows no service and no process.
"""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import TypeAlias

from msgspec import Struct, field

Network: TypeAlias = IPv4Network | IPv6Network
Address: TypeAlias = IPv4Address | IPv6Address

_MOST_SOURCES = 65_536
"""Buckets remembered. One that is forgotten is full again, so the least recently used goes: it is the fullest."""


class WakeRules(Struct, frozen=True, kw_only=True):
    """What a wake has to keep to; 0 is no bound, and no `allow` is everybody."""

    allow: tuple[Network, ...] = ()
    deny: tuple[Network, ...] = ()
    """Stronger than `allow`."""
    per_minute: int = 0
    """Wakes in all."""
    per_source_per_minute: int = 0
    """Wakes asked for by one IPv4 address or IPv6 /64 (RFC 6177)."""


class _Bucket(Struct):
    tokens: float
    at_s: float

    def take(self, per_minute: int, now_s: float) -> bool:
        self.tokens = min(float(per_minute), self.tokens + max(0.0, now_s - self.at_s) * per_minute / 60)
        self.at_s = max(self.at_s, now_s)
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True

    def give_back(self) -> None:
        self.tokens += 1


class Wakes(Struct):
    """The rules and what has been used of them."""

    rules: WakeRules
    _total: _Bucket | None = None
    _sources: OrderedDict[Network, _Bucket] = field(default_factory=OrderedDict)

    def refusal(self, peer: Address | None, now_s: float) -> str:
        """Why this peer may wake nothing now, or nothing if it may, which then counts."""
        rules = self.rules
        if peer is None:
            # Whoever it was has left before anybody could ask for its name.
            return "unknown" if rules.allow or rules.deny or rules.per_source_per_minute else self._spend(now_s)
        peer = peer.ipv4_mapped or peer if isinstance(peer, IPv6Address) else peer
        if any(peer in one for one in rules.deny):
            return "denied"
        if rules.allow and not any(peer in one for one in rules.allow):
            return "not allowed"
        if not rules.per_source_per_minute:
            return self._spend(now_s)
        source = source_of(peer)
        bucket = self._sources.pop(source, None) or _Bucket(float(rules.per_source_per_minute), now_s)
        self._sources[source] = bucket
        if len(self._sources) > _MOST_SOURCES:
            self._sources.popitem(last=False)
        if not bucket.take(rules.per_source_per_minute, now_s):
            return "too many from its source"
        if why := self._spend(now_s):
            bucket.give_back()
            return why
        return ""

    def _spend(self, now_s: float) -> str:
        if not self.rules.per_minute:
            return ""
        if self._total is None:
            self._total = _Bucket(float(self.rules.per_minute), now_s)
        return "" if self._total.take(self.rules.per_minute, now_s) else "too many in all"


def source_of(peer: Address) -> Network:
    """The address, or of IPv6 the /64: what one customer is given."""
    return ip_network((peer, 64 if peer.version == 6 else 32), strict=False)
