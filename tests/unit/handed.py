"""A program that listens, for `fourtuple run --handoff`: each scene asserts what it sees, and ends with status 0.

Called with a scene, the listener and the path at which clients are handed over. It hands them over itself.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

from fourtuple.tuples import Endpoint
from tests.unit.handing import VECTOR, connection, hand_over, no_handoffs, open_descriptors, send

LIBC = ctypes.CDLL(None, use_errno=True)
ROOM = 128


def listening(listener: str) -> socket.socket:
    """As a daemon makes one; the descriptor takes the place of one that it had before."""
    if listener.startswith("/"):
        made = socket.socket(socket.AF_UNIX)
        made.bind(listener)
    else:
        end = Endpoint.parse(listener)
        made = socket.socket(socket.AF_INET6 if end.address.version == 6 else socket.AF_INET)
        made.bind((str(end.address), end.port))
    made.listen(5)
    return made


def accepted(listener: socket.socket, flags: int | None) -> tuple[int, bytes, int]:
    """accept4(), or accept() without flags: descriptor or negative errno, address, length."""
    address, length = ctypes.create_string_buffer(b"\xee" * ROOM, ROOM), ctypes.c_uint(ROOM)
    arguments = (listener.fileno(), address, ctypes.byref(length))
    result = LIBC.accept(*arguments) if flags is None else LIBC.accept4(*arguments, flags)
    return result if result >= 0 else -ctypes.get_errno(), address.raw, length.value


def flags_are_those_that_were_asked_for(listener: socket.socket, path: Path) -> None:
    """Whatever mode the broker had."""
    for flags in (None, 0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC):
        for blocking in (True, False):
            with connection() as (client, given):
                given.setblocking(blocking)
                send(path, VECTOR, given.fileno())
                fd, address, length = accepted(listener, flags)
                assert fd >= 0, os.strerror(-fd)
                assert bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK) == bool((flags or 0) & socket.SOCK_NONBLOCK)
                assert bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC) == bool(
                    (flags or 0) & socket.SOCK_CLOEXEC
                )
                assert length == 16
                port = client.getsockname()[1]
                assert address[2:8] == port.to_bytes(2) + bytes([127, 0, 0, 1])
                os.close(fd)


def addresses_are_the_clients(listener: socket.socket, path: Path) -> None:
    """Of either family; into no memory that is too short; and into none."""
    with hand_over(path, "::1") as client:
        fd, address, length = accepted(listener, 0)
        assert (length, int.from_bytes(address[:2], sys.byteorder)) == (28, socket.AF_INET6)
        assert address[8:24] == ip_address("::1").packed
        assert address[2:4] == client.getsockname()[1].to_bytes(2)
        os.close(fd)
    with hand_over(path):
        memory, room = ctypes.create_string_buffer(b"\xee" * ROOM, ROOM), ctypes.c_uint(4)
        fd = LIBC.accept(listener.fileno(), memory, ctypes.byref(room))
        assert (room.value, memory.raw[4:] == b"\xee" * (ROOM - 4)) == (16, True)
        os.close(fd)
    with hand_over(path) as client:
        fd = LIBC.accept(listener.fileno(), None, None)
        with socket.socket(fileno=fd) as taken:
            assert taken.getpeername() == client.getsockname()


def what_brings_no_client_is_passed_over(listener: socket.socket, path: Path) -> None:
    """And closed; the next one is served."""
    before = open_descriptors()
    no_handoffs(path)
    with hand_over(path) as client:
        taken, _ = listener.accept()
        with taken:
            taken.sendall(b"hello")
        assert client.recv(5) == b"hello"
    listener.setblocking(False)
    no_handoffs(path)
    assert accepted(listener, 0)[0] == -errno.EAGAIN
    with connection() as (_, given):
        send(path, VECTOR, *[given.fileno()] * 100)
    send(path, b"")
    assert accepted(listener, 0)[0] == -errno.EAGAIN
    assert open_descriptors() == before


def a_flood_of_them_gives_the_program_its_turn(listener: socket.socket, path: Path) -> None:
    """As accept(2) has it, where a connection was aborted."""

    def flood() -> None:
        for _ in range(64):
            send(path, b"")

    sender = threading.Thread(target=flood)
    sender.start()
    assert accepted(listener, 0)[0] == -errno.ECONNABORTED
    sender.join()
    with hand_over(path):
        os.close(accepted(listener, 0)[0])


def without_a_free_descriptor_no_client_is_lost(listener: socket.socket, path: Path) -> None:
    """EMFILE, and the client stays in the queue."""
    with hand_over(path) as client:
        used = os.dup(0)
        os.close(used)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        assert accepted(listener, 0)[0] == -errno.EMFILE
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with listener.accept()[0] as taken:
            taken.sendall(b"hello")
        assert client.recv(5) == b"hello"


def a_client_that_has_left_is_accepted_or_passed_over(listener: socket.socket, path: Path) -> None:
    """One that has said its last byte is a client; one that has reset the connection is none."""
    hand_over(path).close()
    with listener.accept()[0] as taken:
        assert taken.recv(1) == b""
    with connection() as (client, given):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        send(path, VECTOR, given.fileno())
        client.close()
    listener.setblocking(False)
    assert accepted(listener, 0)[0] == -errno.EAGAIN


def readiness_is_told(listener: socket.socket, path: Path) -> None:
    """By each of the three, and not before."""
    poll, epoll = select.poll(), select.epoll()
    poll.register(listener, select.POLLIN)
    epoll.register(listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)
    assert (poll.poll(0), epoll.poll(0), select.select([listener], [], [], 0)[0]) == ([], [], [])
    with hand_over(path):
        fd = listener.fileno()
        assert (poll.poll(0), epoll.poll(0)) == ([(fd, select.POLLIN)], [(fd, select.EPOLLIN)])
        assert select.select([listener], [], [], 0)[0] == [listener]
        os.close(accepted(listener, 0)[0])
    assert poll.poll(0) == []


def shutdown_ends_it(listener: socket.socket, path: Path) -> None:
    """EINVAL, as for a TCP listener, also for who waits."""
    heard: list[int] = []
    waiting = threading.Thread(target=lambda: heard.append(accepted(listener, 0)[0]))
    waiting.start()
    listener.shutdown(socket.SHUT_RDWR)
    waiting.join()
    assert heard == [-errno.EINVAL]


def children_share_the_queue(listener: socket.socket, path: Path) -> None:
    """Those that were forked, and those that have become another program since."""
    for end in ("fork", "exec"):
        pid = os.fork()
        if pid == 0:
            if end == "exec":
                listener.set_inheritable(True)
                os.execv(sys.executable, [sys.executable, __file__, "inherited", str(listener.fileno()), str(path)])
            with listener.accept()[0] as taken:
                taken.sendall(b"child")
            os._exit(0)
        with hand_over(path) as client:
            assert client.recv(5) == b"child"
        assert os.waitpid(pid, 0)[1] == 0


def inherited(number: str) -> None:
    """What a program sees that finds the listener open."""
    with socket.socket(fileno=int(number)) as listener:
        assert listener.type == socket.SOCK_STREAM
        listener.listen(1)
        with listener.accept()[0] as taken:
            taken.sendall(b"child")


def another_takes_its_place_only_when_it_has_ended(listener: socket.socket, path: Path) -> None:
    """EADDRINUSE while it is there."""
    name = listener.getsockname()
    command = [sys.executable, "-c", "import socket, sys; socket.socket(int(sys.argv[1])).bind(eval(sys.argv[2]))"]
    command += [str(int(listener.family)), repr(name)]
    if isinstance(name, str):
        Path(name).unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Address already in use" in done.stderr
    assert f"nothing can be handed over at {path}: another process is there" in done.stderr
    listener.close()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


SCENES: dict[str, Callable[[socket.socket, Path], None]] = {
    scene.__name__: scene
    for scene in (
        flags_are_those_that_were_asked_for,
        addresses_are_the_clients,
        what_brings_no_client_is_passed_over,
        a_flood_of_them_gives_the_program_its_turn,
        without_a_free_descriptor_no_client_is_lost,
        a_client_that_has_left_is_accepted_or_passed_over,
        readiness_is_told,
        shutdown_ends_it,
        children_share_the_queue,
        another_takes_its_place_only_when_it_has_ended,
    )
}


if __name__ == "__main__":
    if sys.argv[1] == "inherited":
        inherited(sys.argv[2])
    else:
        with listening(sys.argv[2]) as ready:
            SCENES[sys.argv[1]](ready, Path(sys.argv[3]))
