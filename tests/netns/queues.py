"""Connections whose bytes nobody reads, run by the tests in a process of its own: how many queues take all of them.

Both ends are here. The serving end is a child in the cgroup of --cgroup, which is charged for what waits there. The
bytes come in segments: the first of an empty queue is taken whatever the limit says (sk_forced_mem_schedule()), so that
one segment with everything would never be refused. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import socket
import struct
import termios
import time
from pathlib import Path

SEGMENT_BYTES = 1_460
SETTLE_S = 1.0


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--connections", type=int, required=True)
    options.add_argument("--queued", type=int, required=True)
    options.add_argument("--cgroup", type=Path, required=True)
    asked = options.parse_args()
    pages_before = pages_of_tcp()
    told, tell = os.pipe()
    go, begin = os.pipe()
    child = os.fork()
    if child == 0:
        serve(asked.cgroup, asked.connections, asked.queued, tell, go, pages_before)
        os._exit(0)
    (port,) = struct.unpack("=i", os.read(told, 4))
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(asked.connections)]
    os.read(told, 1)
    for one in clients:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.setblocking(False)
        send(one, asked.queued)
    time.sleep(SETTLE_S)
    os.write(begin, b".")
    _, status = os.waitpid(child, 0)
    raise SystemExit(os.waitstatus_to_exitcode(status))


def serve(cgroup: Path, connections: int, queued: int, tell: int, go: int, pages_before: int) -> None:
    """Accept all, read nothing, count the queues that are complete."""
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(4_096)
        os.write(tell, struct.pack("=i", listener.getsockname()[1]))
        held = [listener.accept()[0] for _ in range(connections)]
    os.write(tell, b".")
    os.read(go, 1)
    waiting = [struct.unpack("=i", fcntl.ioctl(one.fileno(), termios.FIONREAD, bytes(4)))[0] for one in held]
    found = {
        "complete": waiting.count(queued),
        "charged_bytes": int((cgroup / "memory.kmem.tcp.usage_in_bytes").read_text()),
        "pages_of_the_host": pages_of_tcp() - pages_before,
    }
    print(json.dumps(found), flush=True)


def send(one: socket.socket, size: int) -> None:
    """As much as goes without waiting."""
    while size:
        try:
            size -= one.send(bytes(min(size, SEGMENT_BYTES)))
        except BlockingIOError:
            return


def pages_of_tcp() -> int:
    """What net.ipv4.tcp_mem is compared with: the whole host's."""
    lines = Path("/proc/net/sockstat").read_text().splitlines()
    words = next(line.split() for line in lines if line.startswith("TCP:"))
    return int(words[words.index("mem") + 1])


if __name__ == "__main__":
    main()
