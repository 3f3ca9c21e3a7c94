"""A server with bad manners, one to a port: for tests of what a load run makes of each.

Run as a script: troublemaker.py ADDRESS FIRST_PORT. Prints "ready" when all listen. `MANNERS` says what is where.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from typing import TypeAlias

Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter


async def _reset(_reader: Reader, writer: Writer) -> None:
    raw: socket.socket = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


async def _stall(reader: Reader, _writer: Writer) -> None:
    while await reader.read(65_536):
        pass


async def _garbage(reader: Reader, writer: Writer) -> None:
    while await reader.read(65_536):
        writer.write(bytes(range(256)))


async def _finish(_reader: Reader, writer: Writer) -> None:
    writer.close()


async def _half_close(reader: Reader, writer: Writer) -> None:
    writer.write_eof()
    await _stall(reader, writer)


async def _huge_headers(reader: Reader, writer: Writer) -> None:
    await reader.read(65_536)
    writer.write(b"HTTP/1.1 200 OK\r\n" + b"X-Pad: %s\r\n" % (b"x" * 100_000))
    await _stall(reader, writer)


async def _refuse(reader: Reader, writer: Writer) -> None:
    while await reader.read(65_536):
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")


async def _vanish_in_answer(reader: Reader, writer: Writer) -> None:
    await reader.read(65_536)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
    await writer.drain()
    await _reset(reader, writer)


async def _drip(reader: Reader, writer: Writer) -> None:
    while await reader.read(65_536):
        for byte in b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n":
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0)


async def _echo(reader: Reader, writer: Writer) -> None:
    while data := await reader.read(65_536):
        writer.write(data)


MANNERS: dict[str, Callable[[Reader, Writer], Awaitable[None]]] = {
    "reset": _reset,
    "stall": _stall,
    "garbage": _garbage,
    "finish": _finish,
    "half_close": _half_close,
    "huge_headers": _huge_headers,
    "vanish_in_answer": _vanish_in_answer,
    "drip": _drip,
    "echo": _echo,
    "refuse": _refuse,
}
"""The place in this table is the port above the first."""


async def main(address: str, first_port: int) -> None:
    """Listen, and serve until killed."""

    def server(manners: Callable[[Reader, Writer], Awaitable[None]]) -> Callable[[Reader, Writer], Awaitable[None]]:
        async def serve(reader: Reader, writer: Writer) -> None:
            try:
                await manners(reader, writer)
            except ConnectionError:  # the client's right
                writer.close()

        return serve

    for offset, manners in enumerate(MANNERS.values()):
        await asyncio.start_server(server(manners), address, first_port + offset, backlog=1_024)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
