"""A service as the tests of the launcher start it, with the manners that its first argument asks for.

Run by itself, isolated from the environment: it needs nothing but the standard library.
"""

from __future__ import annotations

import array
import json
import os
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

SLEEP_S = 1_000


def listening(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(path)
    made.listen()
    return made


def serve(listener: socket.socket) -> None:
    """Say to each client which process this is."""
    while True:
        client, _ = listener.accept()
        with client:
            client.sendall(str(os.getpid()).encode())


def report(file: str, *arguments: str) -> None:
    """What it was born with; then serve at the socket that it was passed."""
    descriptors = []
    for number in range(1_000):
        with suppress(OSError):
            os.fstat(number)
            descriptors.append(number)
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    umask = os.umask(0)
    os.umask(umask)
    writable = {}
    for place in ("/etc", "/tmp", "/dev/shm"):
        try:
            probe = Path(place, f"launched-{os.getpid()}")
            probe.touch()
            probe.unlink()
            writable[place] = True
        except OSError:
            writable[place] = False
    found = {
        "descriptors": descriptors,
        "environment": dict(os.environ),
        "arguments": arguments,
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "ids": [*os.getresuid(), *os.getresgid(), *os.getgroups()],
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
        "nice": os.nice(0),
        "umask": umask,
        "folder": str(Path.cwd()),
        "ignored": int(status["SigIgn"], 16),
        "blocked": int(status["SigBlk"], 16),
        "no_new_privileges": status["NoNewPrivs"],
        "cgroup": Path("/proc/self/cgroup").read_text(),
        "network": len(socket.if_nameindex()),
        "writable": writable,
        "in_tmp": len(list(Path("/tmp").iterdir())),
    }
    Path(file).write_text(json.dumps(found))
    serve(socket.socket(fileno=3))


def held() -> None:
    """Take handed sockets, keep each until its client is gone; and have a connection of its own to somewhere."""
    source = socket.socket(fileno=3)
    kept = []
    while True:
        _, control, _, _ = source.recvmsg(560, socket.CMSG_SPACE(4))
        rights = array.array("i", control[0][2])
        kept.append(socket.socket(fileno=rights[0]))
        kept[-1].setblocking(True)
        kept[-1].sendall(b"held")
        kept[-1].recv(1)
        kept.pop().close()


def main() -> None:
    """The manners."""
    manners, rest = sys.argv[1], sys.argv[2:]
    if manners == "report":
        report(*rest)
    elif manners == "own":
        time.sleep(float(rest[1]) if len(rest) > 1 else 0)
        serve(listening(rest[0]))
    elif manners == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        serve(listening(rest[0]))
    elif manners == "daemon":
        if os.fork():
            os._exit(0)
        os.setsid()
        if os.fork():
            os._exit(0)
        serve(listening(rest[0]))
    elif manners == "leaky":
        listener = listening(rest[0])
        if not os.fork():
            os.setsid()
            if os.fork():
                os._exit(0)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(SLEEP_S)
        serve(listener)
    elif manners == "noisy":
        for _ in range(1_000):
            os.write(1, b"o" * 9_999 + b"\n")
            os.write(2, b"e" * 9_999 + b"\n")
        serve(listening(rest[0]))
    elif manners == "notify":
        time.sleep(float(rest[0]))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as word:
            word.connect("\0" + os.environ["NOTIFY_SOCKET"][1:])
            word.send(b"STATUS=here\nREADY=1")
        time.sleep(SLEEP_S)
    elif manners == "held":
        held()
    elif manners == "dying":
        listener = listening(rest[0])
        listener.accept()
        os.kill(os.getpid(), signal.SIGSEGV)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
