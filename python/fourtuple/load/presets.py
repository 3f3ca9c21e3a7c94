"""The dialogue that a scheme speaks: HTTP/1.1 keep-alive, WebSocket ping, or what somebody wrote on the command line.

Decides the bytes. Knows no connection. The engine reads the answers (crates/engine/src/script).
"""

from __future__ import annotations

import base64
import hashlib
import random
import re

from fourtuple.dialogue import Dialogue, Expect, Pong, Response, Rest, Say, Until, Upgrade, said
from fourtuple.errors import BadConfig
from fourtuple.load.scenario import Scheme, Target

AGENT = "fourtuple-load"
_WEBSOCKET = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""RFC 6455 1.3: what a server adds to our key before it hashes it."""
_MOST_PING_BYTES = 125
"""RFC 6455 5.5."""
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_SIMPLE = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"0": b"\0", b"\\": b"\\"}


def preset(target: Target, size_bytes: int, seed: int) -> Dialogue | None:
    """The dialogue of the target's scheme; None for tcp, udp and tls, whose pings are tokens."""
    match target.scheme.words:
        case Scheme.HTTP:
            return http(target)
        case Scheme.WS:
            return websocket(target, size_bytes, seed)
        case _:
            return None


def http(target: Target) -> Dialogue:
    """A GET for each round, on a connection that is kept (RFC 9112 9.3)."""
    request = f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: {AGENT}\r\nAccept: */*\r\n\r\n"
    return Dialogue(round=(*said(request.encode()), Response()))


def websocket(target: Target, size_bytes: int, seed: int) -> Dialogue:
    """The opening handshake (RFC 6455 4.1), then a ping for each round, which the server has to send back."""
    chance = random.Random(seed)
    key = base64.b64encode(chance.randbytes(16))
    request = (
        f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: {AGENT}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key.decode()}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    accept = base64.b64encode(hashlib.sha1(key + _WEBSOCKET, usedforsecurity=False).digest())
    payload = chance.randbytes(min(size_bytes, _MOST_PING_BYTES))
    return Dialogue(
        opening=(*said(request.encode()), Upgrade(accept)),
        round=(Say(_masked_ping(payload, chance.randbytes(4))), Pong(payload)),
    )


def typed(say: str | None, expect: str | None, scheme: Scheme = Scheme.TCP) -> Dialogue:
    """The dialogue of --say and --expect: bytes with escapes such as \\r\\n; an answer that ends in `...` is a prefix
    and goes to the end of its line, or of its datagram."""
    if say is None or expect is None:
        raise BadConfig("--say", "and --expect go together: what is sent in each round, and what has to come back")
    wanted = expect.removesuffix("...")
    acts = [Expect(unescaped("--expect", wanted))] if wanted else []
    words = said(unescaped("--say", say))
    if scheme is Scheme.UDP and len(words) > 1:
        raise BadConfig(
            "--say", f"is {sum(len(word.data) for word in words):,} bytes; a datagram here has at most 2,048"
        )
    end = Rest() if scheme is Scheme.UDP else Until(b"\n")
    return Dialogue(round=(*words, *acts, *([end] if expect.endswith("...") else [])))


def unescaped(option: str, text: str) -> bytes:
    """The bytes that were typed: UTF-8, with the escapes \\r \\n \\t \\0 \\\\ and \\xHH."""
    data = text.encode()

    def one(matched: re.Match[bytes]) -> bytes:
        name = matched[1]
        if len(name) == 3:
            return bytes.fromhex(name[1:].decode())
        if name not in _SIMPLE:
            raise BadConfig(option, f"\\{name.decode(errors='replace')} is no escape; \\r \\n \\t \\0 \\\\ \\xHH are")
        return _SIMPLE[name]

    found = _ESCAPE.sub(one, data)
    if not found:
        raise BadConfig(option, "is empty; at least one byte is needed")
    return found


def _masked_ping(payload: bytes, mask: bytes) -> bytes:
    masked = bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))
    return bytes((0x89, 0x80 | len(payload))) + mask + masked
