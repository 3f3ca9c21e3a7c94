"""A client that knows nothing of the tuple space: connect, hold, count. Written as most programs are.

Arguments: destinations ("10.77.0.2:7000", "[fd77::2]:7000", more with commas), connections to each, and words:
"bind=ADDRESS" binds to that address and port 0 first, "threads=N" and "processes=N" share the work out, "mapped" uses
an IPv6 socket for IPv4, "nonblocking" connects as event loops do, "hold" keeps all until standard input ends. Prints
JSON: connections per source address, and errors by name.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import socket
import sys
import threading
import time
from collections import Counter

held: list[socket.socket] = []


def connected(destination: tuple[str, int], options: dict[str, str]) -> socket.socket:
    host, port = destination
    if "mapped" in options:
        host = f"::ffff:{host}"
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if "bind" in options:
            made.bind((options["bind"], 0))
        if "nonblocking" in options:
            made.setblocking(False)
            number = made.connect_ex((host, port))
            if number == errno.EINPROGRESS:
                select.select([], [made], [])
                number = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                raise OSError(number, os.strerror(number))
        else:
            made.connect((host, port))
    except OSError:
        made.close()
        raise
    return made


def work(destinations: list[tuple[str, int]], count: int, options: dict[str, str]) -> tuple[Counter[str], Counter[str]]:
    sources: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for destination in destinations:
        for _ in range(count):
            try:
                made = connected(destination, options)
            except OSError as error:
                errors[errno.errorcode[error.errno or 0]] += 1
                continue
            held.append(made)
            sources[made.getsockname()[0]] += 1
    return sources, errors


def main() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    where, count, *words = sys.argv[1:]
    options = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    parts = (text.rpartition(":") for text in where.split(","))
    destinations = [(host.strip("[]"), int(port)) for host, _, port in parts]
    processes, threads = int(options.get("processes", 1)), int(options.get("threads", 1))
    each = int(count) // processes // threads
    children = []
    parent_ends = []
    for _ in range(processes - 1):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            # What it has counted goes to the parent, and its connections are held until the parent is done.
            os.close(reading)
            os.write(writing, json.dumps(work(destinations, each, options)).encode() + b"\n")
            time.sleep(600)
        os.close(writing)
        children.append(child)
        parent_ends.append(reading)
    found: list[tuple[dict[str, int], dict[str, int]]] = []
    started = [threading.Thread(target=lambda: found.append(work(destinations, each, options))) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    for reading in parent_ends:
        with os.fdopen(reading) as pipe:
            found.append(json.loads(pipe.readline()))
    sources: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for some_sources, some_errors in found:
        sources.update(some_sources)
        errors.update(some_errors)
    print(json.dumps({"sources": sources, "errors": errors}))
    sys.stdout.flush()
    if "hold" in options:
        sys.stdin.read()
    for child in children:
        os.kill(child, 9)


if __name__ == "__main__":
    main()
