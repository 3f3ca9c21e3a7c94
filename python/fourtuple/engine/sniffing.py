"""What the first bytes of a connection show, for people and tests: the sniffers are Rust's, and a broker has its own.

Decides which probes there are by name, and what is looked for if nobody says.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from msgspec import Struct

from fourtuple import _core
from fourtuple.engine.checks import instance
from fourtuple.errors import BadConfig

PROBES: tuple[str, ...] = tuple(name for name, _, _ in _core.probes() if name != "pattern")
"""What connections may be sniffed for, in order of precedence; patterns are a broker's own."""

PROTOCOLS = tuple(probe for probe in PROBES if probe not in {"socks4", "socks5", "tcpmux"})
"""What a broker looks for if nobody says. Three are left out, which would take what is another's: `tcpmux` is any line
of text, SOCKS begins with a byte or two that many have, and both are answered in the service's place."""


class Prelude(Enum):
    """Whether a PROXY header stands in front of what is sniffed."""

    NONE = "none"
    ALLOWED = "allowed"
    REQUIRED = "required"


class Sniffed(Struct, frozen=True, kw_only=True):
    """What the first bytes of a connection show. What its protocol does not have, or it left out, is None."""

    verdict: str
    """match; no: no probe knows it; more: nothing can be said yet; refused: broken where a route depends on it."""
    protocol: str | None
    answers: tuple[bytes, ...]
    """What a broker sends on the way: a PostgreSQL client waits for it."""
    needed: int | None = None
    """With more: how many bytes a match takes at least."""
    why: str | None = None
    """With refused: the reason, as it is counted."""
    intent: str | None = None
    """With match: use, or probe where it bears the mark of one (HEAD, TLS without a server name, ...)."""
    end: int | None = None
    name: str | None = None
    port: int | None = None
    number: int | None = None
    path: bytes | None = None
    path_is_plain: bool = True
    alpn: tuple[bytes, ...] = ()
    ech: bool = False
    user: bytes | None = None
    database: bytes | None = None
    client: bytes | None = None
    cancel: bytes | None = None
    starttls: bool = False
    """It asks to go on with TLS, within the protocol, before anything else."""
    reply: bytes | None = None
    """What it waits for, to be told when its service is reached; all up to `end` is then not for the service."""
    proxied: tuple[str, str] | None = None
    """Source and destination out of a PROXY header."""


def sniff(
    opening: bytes,
    *,
    probes: Sequence[str] = PROBES,
    prelude: Prelude = Prelude.NONE,
    postgres_tls: bool = True,
) -> Sniffed:
    """What a broker would see in the first bytes of a connection; for people and tests, not for its own path.

    `postgres_tls` says whether a PostgreSQL client that asks for TLS is told to begin.
    """
    for name in probes:
        if name not in PROBES:
            raise BadConfig("probes", f"{name[:40]!r} is no probe; allowed are {', '.join(PROBES)}")
    instance("opening", opening, bytes)
    instance("prelude", prelude, Prelude)
    return Sniffed(**_core.sniff(opening, list(probes), prelude.value, postgres_tls))
