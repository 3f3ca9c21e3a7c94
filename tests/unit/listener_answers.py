"""What a program hears of its listener, and of sockets that are none: the same with `fourtuple run --handoff`.

Called with the listener. Each line is a question and its answer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fourtuple.tuples import Endpoint


def say(question: str, ask: Callable[[], object]) -> None:
    """One line."""
    try:
        answer = str(ask())
    except OSError as error:
        answer = errno.errorcode[error.errno or 0]
    print(question, answer)


def options(name: str, asked: socket.socket) -> None:
    """What is asked of a listener, and set on it."""
    level = socket.SOL_SOCKET
    for option in ("SO_TYPE", "SO_DOMAIN", "SO_PROTOCOL", "SO_ERROR", "SO_KEEPALIVE"):
        say(f"{name} {option}", lambda option=option: asked.getsockopt(level, getattr(socket, option)))  # type: ignore[misc]
    if asked.family != socket.AF_UNIX and asked.type == socket.SOCK_STREAM:
        tcp, ip = socket.IPPROTO_TCP, socket.IPPROTO_IP
        say(f"{name} fast open", lambda: asked.getsockopt(tcp, socket.TCP_FASTOPEN))
        say(f"{name} nodelay", lambda: asked.getsockopt(tcp, socket.TCP_NODELAY))
        say(f"{name} four bytes", lambda: len(asked.getsockopt(tcp, socket.TCP_DEFER_ACCEPT, 4)))
        for number, value in ((socket.TCP_NODELAY, 1), (socket.TCP_DEFER_ACCEPT, 1), (socket.TCP_FASTOPEN, 5)):
            say(f"{name} set {number}", lambda number=number, value=value: asked.setsockopt(tcp, number, value))  # type: ignore[misc]
        say(f"{name} set TOS", lambda: asked.setsockopt(ip, socket.IP_TOS, 8))
        say(f"{name} set REUSEPORT", lambda: asked.setsockopt(level, socket.SO_REUSEPORT, 1))
    say(f"{name} set KEEPALIVE", lambda: asked.setsockopt(level, socket.SO_KEEPALIVE, 1))
    say(f"{name} KEEPALIVE", lambda: asked.getsockopt(level, socket.SO_KEEPALIVE))


def questions(listener: str) -> None:
    """All of them."""
    if listener.startswith("/"):
        family, name, other = socket.AF_UNIX, listener, f"{listener}.other"
    else:
        end = Endpoint.parse(listener)
        family = socket.AF_INET6 if end.address.version == 6 else socket.AF_INET
        name, other = (str(end.address), end.port), (str(end.address), 0)  # type: ignore[assignment]
    with (
        socket.socket(family) as made,
        socket.socket(family) as plain,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        socket.socketpair()[0] as pair,
    ):
        made.set_inheritable(True)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        number = made.fileno()
        say("bind", lambda: made.bind(name))
        say("descriptor", lambda: made.fileno() == number)
        say("inheritable", lambda: made.get_inheritable())
        say("non-blocking", lambda: bool(fcntl.fcntl(made, fcntl.F_GETFL) & os.O_NONBLOCK))
        say("name", lambda: made.getsockname())
        say("no port yet", lambda: plain.getsockname())
        say("bind again", lambda: made.bind(other))
        say("listen", lambda: made.listen(5))
        say("accepting", lambda: made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        say("accept", lambda: made.accept())
        say("peer", lambda: made.getpeername())
        say("again", lambda: socket.socket(fileno=os.dup(number)).getsockname())
        options("listener", made)
        say("plain bind", lambda: plain.bind(other))
        say("plain listen", lambda: plain.listen(5))
        say("plain accepting", lambda: plain.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        plain.setblocking(False)
        say("plain accept", lambda: plain.accept())
        options("plain", plain)
        if family != socket.AF_UNIX:
            say("udp on the same port", lambda: socket.socket(family, socket.SOCK_DGRAM).bind(name))
        for what, one in (("udp", udp), ("datagrams", datagrams), ("pair", pair)):
            say(f"{what} listen", lambda one=one: one.listen(1))  # type: ignore[misc]
            say(f"{what} accept", lambda one=one: one.accept())  # type: ignore[misc]
            say(f"{what} nodelay", lambda one=one: one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))  # type: ignore[misc]
            options(what, one)
    if family == socket.AF_UNIX:
        say("its file", lambda: Path(listener).chmod(0o600))
        for path in (name, other):
            with suppress(FileNotFoundError):
                Path(path).unlink()


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore", ResourceWarning)
    questions(sys.argv[1])
