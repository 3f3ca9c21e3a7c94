"""ClientHellos of many kinds and any size, and the ways to cut one into records and segments.

Decides what is in a hello and where it is cut. Each is what OpenSSL says or a browser has said, with extensions put in,
so that nothing but what is meant is unusual about it; a test shows them to OpenSSL's server. Knows no socket.
"""

from __future__ import annotations

import functools
import itertools
import ssl
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

MOST_RECORD_BYTES = 16_384
"""Of a plaintext (RFC 8446 5.1)."""
SERVER_NAME, SUPPORTED_GROUPS, ALPN, PADDING, SUPPORTED_VERSIONS, KEY_SHARE, ECH = 0, 10, 16, 21, 43, 51, 0xFE0D
X25519MLKEM768 = 0x11EC
_BROWSERS = Path(__file__).parents[1] / "crates" / "sniff" / "tests" / "hellos"
_PROTOCOLS = (b"h2", b"http/1.1", b"http/1.0", b"spdy/3.1", b"imap", b"pop3", b"acme-tls/1", b"mqtt", b"postgresql",
              b"dot", b"irc", b"xmpp-client")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A ClientHello taken apart (RFC 8446 4.1.2)."""

    head: bytes
    """Version, random and session."""
    ciphers: bytes
    compression: bytes
    extensions: tuple[tuple[int, bytes], ...]

    @classmethod
    def of(cls, message: bytes) -> Parts:
        """Take it apart; only what a client has said whole."""
        after_session = 4 + 2 + 32 + 1 + message[38]
        ciphers, at = _counted(message, after_session, 2)
        compression, at = _counted(message, at, 1)
        block, at = _counted(message, at, 2)
        assert message[0] == 1
        assert at == len(message) == 4 + int.from_bytes(message[1:4])
        extensions, within = list[tuple[int, bytes]](), 0
        while within < len(block):
            kind = int.from_bytes(block[within : within + 2])
            data, within = _counted(block, within + 2, 2)
            extensions.append((kind, data))
        head = message[4:after_session]
        return cls(head=head, ciphers=ciphers, compression=compression, extensions=tuple(extensions))

    @property
    def message(self) -> bytes:
        """Put together, without records."""
        block = b"".join(kind.to_bytes(2) + _count(data, 2) for kind, data in self.extensions)
        return b"\x01" + _count(self.head + _count(self.ciphers, 2) + _count(self.compression, 1) + _count(block, 2), 3)

    def having(self, kind: int, change: Callable[[bytes], bytes]) -> Parts:
        """The same with one extension changed; put in last if it is not there."""
        if kind not in dict(self.extensions):
            return replace(self, extensions=(*self.extensions, (kind, change(b""))))
        return replace(
            self, extensions=tuple((it, change(data) if it == kind else data) for it, data in self.extensions)
        )

    def without(self, kind: int) -> Parts:
        """The same without that extension."""
        return replace(self, extensions=tuple(one for one in self.extensions if one[0] != kind))

    def sized(self, size: int, *, name_last: bool) -> Parts:
        """Padded to a message of `size` bytes (RFC 7685), the name in front of all that or behind it."""
        bare = self.without(PADDING)
        name = next(one for one in bare.extensions if one[0] == SERVER_NAME)
        others = bare.without(SERVER_NAME).extensions
        padding = (PADDING, bytes(size - len(bare.message) - 4))
        return replace(bare, extensions=(padding, *others, name) if name_last else (name, *others, padding))


def _openssl(name: str, *protocols: str, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Parts:
    """What OpenSSL says first to a server of that name."""
    context = ssl.create_default_context()
    context.maximum_version = newest
    if newest is ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("ECDHE+AESGCM")
    if protocols:
        context.set_alpn_protocols(list(protocols))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    except ssl.SSLWantReadError:
        return Parts.of(outgoing.read()[5:])
    raise AssertionError("a handshake without a peer")


def _grease(name: str) -> Parts:
    """With values that nobody knows in each list, and as first and last extension (RFC 8701 3.1)."""
    parts = _openssl(name, "h2")
    parts = replace(parts, ciphers=b"\x1a\x1a" + parts.ciphers)
    parts = parts.having(SUPPORTED_GROUPS, lambda data: _count(b"\x2a\x2a" + data[2:], 2))
    parts = parts.having(SUPPORTED_VERSIONS, lambda data: _count(b"\x3a\x3a" + data[1:], 1))
    parts = parts.having(KEY_SHARE, lambda data: _count(b"\x2a\x2a\x00\x01\x00" + data[2:], 2))
    parts = parts.having(ALPN, lambda data: _count(b"\x02\x4a\x4a" + data[2:], 2))
    return replace(parts, extensions=((0x7A7A, b""), *parts.extensions, (0x8A8A, b"\x00")))


def _post_quantum(name: str) -> Parts:
    """With a share of X25519MLKEM768 before the one of X25519: 1,184 bytes of ML-KEM-768 and 32."""
    share = X25519MLKEM768.to_bytes(2) + _count(bytes(1_216), 2)
    parts = _openssl(name, "h2").without(PADDING)
    parts = parts.having(SUPPORTED_GROUPS, lambda data: _count(X25519MLKEM768.to_bytes(2) + data[2:], 2))
    return parts.having(KEY_SHARE, lambda data: _count(share + data[2:], 2))


def _ech(name: str) -> Parts:
    """With an outer encrypted_client_hello that nobody can open: what a client sends that has no configuration."""
    suite = (1).to_bytes(2) + (1).to_bytes(2)  # HKDF-SHA256, AES-128-GCM
    outer = b"\x00" + suite + b"\x2f" + _count(bytes(range(32)), 2) + _count(bytes(range(208)), 2)
    return _openssl(name, "h2").without(PADDING).having(ECH, lambda _: outer)


def _browser(file: str, name: str) -> Parts:
    """As a browser has said it (crates/sniff/tests/hellos), to another server."""
    parts = Parts.of((_BROWSERS / file).read_bytes()[5:])
    return parts.having(SERVER_NAME, lambda _: _count(b"\x00" + _count(name.encode(), 2), 2))


CONTENTS: dict[str, Callable[[str], Parts]] = {
    "TLS 1.2 alone": functools.partial(_openssl, newest=ssl.TLSVersion.TLSv1_2),
    "TLS 1.3": _openssl,
    "12 ALPNs": lambda name: _openssl(name, *(protocol.decode() for protocol in _PROTOCOLS)),
    "GREASE": _grease,
    "ECH": _ech,
    "X25519MLKEM768": _post_quantum,
    "Chrome 142": functools.partial(_browser, "chrome142.bin"),
    "Firefox 144": functools.partial(_browser, "firefox144.bin"),
    "Safari 26": functools.partial(_browser, "safari260.bin"),
}
SIZES = (4_096, 16_379, 16_384, 16_385, 32_768, 65_535)
"""Of the message; 16,379 is what a buffer of 16 kB holds with the head of the record, 16,384 what one record holds."""


@functools.cache
def hello(content: str, name: str, size: int = 0, *, name_last: bool = False) -> bytes:
    """A ClientHello message of `size` bytes; 0 leaves it as it is."""
    parts = CONTENTS[content](name)
    return parts.sized(size, name_last=name_last).message if size else parts.message


def _by(size: int) -> Callable[[int], Iterator[int]]:
    return lambda length: iter(range(size, length, size))


def _behind(first: int) -> Callable[[int], Iterator[int]]:
    return lambda length: iter((first, *range(first + MOST_RECORD_BYTES, length, MOST_RECORD_BYTES)))


RECORDS: dict[str, Callable[[int], Iterator[int]]] = {
    "as few as can be": _by(MOST_RECORD_BYTES),
    "in halves": lambda length: _by(min(-(-length // 2), MOST_RECORD_BYTES // 2))(length),
    "2 bytes, the rest": _behind(2),
    "4 bytes, the rest": _behind(4),
    "100 bytes each": _by(100),
    "1 byte each": _by(1),
}
"""Where a message of that many bytes is cut. Type and length of a handshake message are its first 4 bytes."""


@functools.lru_cache(maxsize=64)
def records(message: bytes, how: str) -> tuple[bytes, tuple[int, ...]]:
    """The message in records, and where each of them ends."""
    cuts = [*RECORDS[how](len(message)), len(message)]
    parts = [b"\x16\x03\x01" + _count(message[start:end], 2) for start, end in zip([0, *cuts], cuts, strict=False)]
    return b"".join(parts), tuple(itertools.accumulate(map(len, parts)))


SEGMENTS: dict[str, Callable[[tuple[int, ...]], Iterable[int]]] = {
    "at once": lambda _: (),
    "a record at a time": lambda ends: ends[:64],
    "64 single bytes": lambda _: range(1, 65),
    "inside record heads": lambda ends: (3, ends[0] + 3),
    "1,448 bytes at a time": lambda ends: range(1_448, ends[-1], 1_448),
}
"""Where a stream is cut whose records end there."""


def segments(stream: bytes, ends: tuple[int, ...], how: str) -> list[bytes]:
    """What is said at a time."""
    cuts = [cut for cut in SEGMENTS[how](ends) if cut < len(stream)]
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def _counted(data: bytes, at: int, width: int) -> tuple[bytes, int]:
    """What stands behind its length, and where that ends."""
    start = at + width
    end = start + int.from_bytes(data[at:start])
    return data[start:end], end


def _count(data: bytes, width: int) -> bytes:
    return len(data).to_bytes(width) + data
