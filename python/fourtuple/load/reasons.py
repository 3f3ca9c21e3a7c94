"""Why openings fail and rounds are wrong: the engine's names for it, in words, with the side and what helps.

Decides what each name of `_core.reasons()` means to a person. Knows no run. A test holds the tables to those names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Side(Enum):
    """Who has to do something about it."""

    CLIENT = "this side"
    SERVER = "the other side"
    BETWEEN = "not to be told from here"


@dataclass(frozen=True, slots=True)
class Reason:
    """One way to fail."""

    side: Side
    what: str
    remedy: str = ""


_SERVER, _CLIENT, _BETWEEN = Side.SERVER, Side.CLIENT, Side.BETWEEN
_INSECURE = "--tls-insecure accepts any certificate"

OPENING_REASONS: Mapping[str, Reason] = {
    "wrong": Reason(_SERVER, "the opening handshake is garbled: other bytes come than should"),
    "refused": Reason(_SERVER, "the opening handshake is refused"),
    "late": Reason(_SERVER, "the opening handshake is not answered in time", "--connect-timeout is the time"),
    "finished": Reason(_SERVER, "it closes the connection in the opening handshake"),
    "broke": Reason(_SERVER, "the connection breaks in the opening handshake"),
    "accept": Reason(_SERVER, "its Sec-WebSocket-Accept does not prove that it read our key (RFC 6455 4.2.2)"),
    "certificate-issuer": Reason(
        _BETWEEN,
        "its certificate leads to no authority that is trusted here",
        f"--tls-ca FILE names the authority, unless the server sends too few certificates; {_INSECURE}",
    ),
    "certificate-expired": Reason(_SERVER, "its certificate has expired", _INSECURE),
    "certificate-early": Reason(
        _BETWEEN, "its certificate is not valid yet", f"is this host's clock right? {_INSECURE}"
    ),
    "certificate-name": Reason(
        _BETWEEN,
        "its certificate is for another name",
        f"--tls-server-name NAME says which one is expected; {_INSECURE}",
    ),
    "certificate-ca": Reason(
        _SERVER, "its certificate is that of an authority, and not of a server", f"self-signed? {_INSECURE}"
    ),
    "certificate-other": Reason(_SERVER, "its certificate is malformed, or not made for servers", _INSECURE),
    "tls-garbage": Reason(_SERVER, "what it says is not TLS", "tcp://, http:// and ws:// speak without"),
    "tls-incompatible": Reason(
        _SERVER, "no TLS version, cipher or group is in common", "TLS 1.2 and 1.3 are spoken here, with forward secrecy"
    ),
    "tls-alert-incompatible": Reason(
        _SERVER,
        "it says that no TLS version, cipher or group is in common",
        "TLS 1.2 and 1.3 are spoken here, with forward secrecy",
    ),
    "tls-alert-certificate": Reason(
        _CLIENT, "it wants a certificate of ours, or does not trust the one it got", "--tls-cert and --tls-key"
    ),
    "tls-alert-name": Reason(_CLIENT, "it serves no such name", "--tls-server-name NAME"),
    "tls-alert-alpn": Reason(_CLIENT, "it speaks none of the protocols that we offer", "--tls-alpn NAMES"),
    "tls-alert-other": Reason(_SERVER, "it ends TLS with an alert"),
    "tls-broken": Reason(_SERVER, "it breaks the rules of TLS, or something on the way changes what it says"),
    "tls-late": Reason(_SERVER, "it stalls in the TLS handshake", "--connect-timeout is the time"),
    "tls-finished": Reason(_SERVER, "it closes the connection in the TLS handshake"),
    "tls-broke": Reason(_SERVER, "the connection breaks in the TLS handshake"),
}
"""Of openings."""

ROUND_REASONS: Mapping[str, Reason] = {
    **OPENING_REASONS,
    "wrong": Reason(_SERVER, "it answers with other bytes than it should, or ends the dialogue"),
}
"""Of rounds, and of what comes between them."""
