"""The services behind a sniffer: each says who it is and what it has heard, once a whole ClientHello has come to it.

Usage: hello_services.py NAME...; prints the port of each. Ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from functools import partial


class Service(asyncio.Protocol):
    """Puts the message together from its records, and answers behind the last."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.heard = bytearray()
        self.at = 0
        """Where the next record begins."""
        self.head = bytearray()
        """The first 4 bytes of the message: type and length."""
        self.carried = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        heard = self.heard
        heard += data
        while len(heard) >= self.at + 5:
            start = self.at + 5
            length = heard[self.at + 3] << 8 | heard[self.at + 4]
            if len(heard) < start + length:
                return
            if len(self.head) < 4:
                self.head += heard[start : start + min(length, 4 - len(self.head))]
            self.carried += length
            self.at = start + length
            if len(self.head) == 4 and self.carried >= 4 + int.from_bytes(self.head[1:]):
                self.transport.write(answer(self.name, bytes(heard)))
                return


def answer(name: str, heard: bytes) -> bytes:
    """Always of 64 bytes."""
    return hashlib.sha256(name.encode()).digest() + hashlib.sha256(heard).digest()


async def main(names: list[str]) -> None:
    loop = asyncio.get_running_loop()
    for name in names:
        server = await loop.create_server(partial(Service, name), "127.0.0.1", 0, backlog=4096)
        print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
