"""A broker with the real engine, confined as `fourtuple serve` is, and code in it that somebody got in.

Reads lines from its input: `attack` has that code try everything that it should not be able to, and prints by name what
came of it; `import` imports what nobody has yet, `crash` aborts, `report` prints counters. Knows what the test tells it
in its arguments.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fourtuple import confinement
from fourtuple.broker import reasons
from fourtuple.brokerfile import BrokerFile
from fourtuple.confinement.connecting import MARK
from fourtuple.engine import BrokerConfig, BrokerListener, CarrierName, CarrierSettings, Engine
from fourtuple.errors import MissingPrivilege
from fourtuple.registry import Registry
from fourtuple.tuples import Endpoint
from tests.netns.programs.ring import Ring, call, inet, unix

# x86_64; on other machines the numbers are those of other calls, which are refused all the same or do no harm.
_EXECVE, _EXECVEAT, _FORK, _VFORK, _PTRACE = 59, 322, 57, 58, 101
_OPEN_BY_HANDLE, _NAME_TO_HANDLE, _MEMFD, _PROCESS_VM_READV, _PIDFD_OPEN = 304, 303, 319, 310, 434
_UNSHARE, _SETNS, _MOUNT, _UMOUNT, _PIVOT_ROOT, _CHROOT = 272, 308, 165, 166, 155, 161
_BPF, _KEYCTL, _INIT_MODULE, _FINIT_MODULE, _KEXEC, _PERF, _USERFAULT = 321, 250, 175, 313, 246, 298, 323
_SETUID, _SETRESUID, _SETGROUPS, _CAPSET, _CLONE, _CLONE3 = 105, 117, 116, 126, 56, 435
_PIDFD_GETFD, _QUEUE_SIGNAL, _IO_SETUP = 438, 129, 425
_NEW_USER, _AT_EMPTY_PATH = 0x1000_0000, 0x1000
_MPTCP = 262
_CONNECT = 42


def attempts(given: dict[str, str], ports: dict[str, int]) -> Iterator[tuple[str, Callable[[], object]]]:
    """By name; each is to fail."""
    secret, inside = given["secret"], given["inside"]
    text = ctypes.create_string_buffer(b"/bin/true")
    arguments = (ctypes.c_char_p * 2)(b"/bin/true", None)
    parent = os.getppid()
    yield "open absolute", lambda: Path(secret).read_text()
    yield "open /etc/passwd", lambda: Path("/etc/passwd").read_text()
    yield "open by ..", lambda: Path(inside, "../../../../../../..", secret.lstrip("/")).read_text()
    yield "open by /proc/self/root", lambda: Path("/proc/self/root" + secret).read_text()
    yield "open by /proc/1/root", lambda: Path("/proc/1/root" + secret).read_text()
    yield "open by a link", lambda: Path(inside, "link").read_text()
    yield "open a file of an allowed folder", lambda: Path(inside, "file").read_text()
    yield "open relative", lambda: Path(secret.lstrip("/")).read_text()
    yield "list /root", lambda: os.listdir("/root/.ssh")  # noqa: PTH208
    yield "make a file", lambda: Path(inside, "new").write_text("")
    yield "make a folder", lambda: Path(inside, "new").mkdir()
    yield "make a link", lambda: os.symlink("/etc/passwd", f"{inside}/new")  # noqa: PTH211
    yield "remove a file", lambda: Path(inside, "file").unlink()
    yield "truncate a file", lambda: os.truncate(f"{inside}/file", 0)
    yield "change a mode", lambda: Path(inside, "file").chmod(0o777)
    yield "name_to_handle_at", lambda: call(_NAME_TO_HANDLE, -100, text, text, text, 0)
    yield "open_by_handle_at", lambda: call(_OPEN_BY_HANDLE, -100, text, 0)
    yield "execve", lambda: call(_EXECVE, text, arguments, None)
    yield "memfd and execveat", lambda: call(_EXECVEAT, call(_MEMFD, text, 0), b"", arguments, None, _AT_EMPTY_PATH)
    yield "execveat of an open file", lambda: call(_EXECVEAT, 0, b"", arguments, None, _AT_EMPTY_PATH)
    yield "fork", lambda: call(_FORK)
    yield "vfork", lambda: call(_VFORK)
    yield "clone", lambda: call(_CLONE, signal.SIGCHLD, 0, 0, 0, 0)
    yield "clone into a user namespace", lambda: call(_CLONE, _NEW_USER | signal.SIGCHLD, 0, 0, 0, 0)
    yield "clone3", lambda: call(_CLONE3, text, 64)
    yield "user namespace", lambda: call(_UNSHARE, _NEW_USER)
    yield "setns", lambda: call(_SETNS, 0, 0)
    yield "mount", lambda: call(_MOUNT, b"none", b"/", b"tmpfs", 0, None)
    yield "umount", lambda: call(_UMOUNT, b"/", 2)
    yield "pivot_root", lambda: call(_PIVOT_ROOT, b"/", b"/")
    yield "chroot", lambda: call(_CHROOT, b"/")
    yield "ptrace", lambda: call(_PTRACE, 0x4206, parent, 0, 0)
    yield "process_vm_readv", lambda: call(_PROCESS_VM_READV, parent, None, 0, None, 0, 0)
    yield "kill", lambda: os.kill(parent, 0)
    yield "kill the group", lambda: os.killpg(0, 0)
    yield "sigqueue", lambda: call(_QUEUE_SIGNAL, parent, 0, text)
    yield "pidfd_open", lambda: call(_PIDFD_OPEN, parent, 0)
    yield "pidfd_getfd", lambda: call(_PIDFD_GETFD, 0, 0, 0)
    yield "setuid", lambda: call(_SETUID, 0)
    yield "setresuid", lambda: call(_SETRESUID, 0, 0, 0)
    yield "setgroups", lambda: call(_SETGROUPS, 0, None)
    yield "capset", lambda: call(_CAPSET, ctypes.create_string_buffer(8), None)
    yield "raise a limit", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (10**6, 10**6))
    for name, number in (("bpf", _BPF), ("keyctl", _KEYCTL), ("init_module", _INIT_MODULE), ("kexec", _KEXEC)):
        yield name, lambda number=number: call(number, 0, 0, 0, 0, 0)  # type: ignore[misc]
    for name, number in (("finit_module", _FINIT_MODULE), ("perf_event_open", _PERF), ("userfaultfd", _USERFAULT)):
        yield name, lambda number=number: call(number, 0, 0, 0, 0, 0)  # type: ignore[misc]
    yield from _elsewhere(given, ports)


def _elsewhere(given: dict[str, str], ports: dict[str, int]) -> Iterator[tuple[str, Callable[[], object]]]:
    fast_open = 0x2000_0000

    def tcp() -> socket.socket:
        return socket.socket()

    def stream() -> socket.socket:
        return socket.socket(socket.AF_UNIX)

    def datagrams() -> socket.socket:
        return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    yield "connect to a port", lambda: tcp().connect(("127.0.0.1", ports["elsewhere"]))
    # As the carrier does it: the address in registers, too, for whoever makes the connection.
    yield "ask for a port", lambda: asked(tcp().detach(), "127.0.0.1", ports["elsewhere"])
    yield "ask for a host", lambda: asked(tcp().detach(), "127.0.0.9", ports["allowed"])
    yield (
        "ask for what cannot be",
        lambda: call(_CONNECT, tcp().detach(), 0, 16, 1 << 60, 1 << 60, MARK << 32 | 9 << 16),
    )
    yield "connect to a path", lambda: stream().connect(given["elsewhere"])
    yield "connect to a path by ..", lambda: stream().connect(f"{given['inside']}/../elsewhere/socket")
    yield "connect by a link", lambda: stream().connect(f"{given['inside']}/socket-link")
    yield "connect to a name", lambda: stream().connect("\0" + given["name"])
    yield "send to a path", lambda: datagrams().sendto(b"!", given["elsewhere"] + ".dgram")
    yield "send to a name", lambda: datagrams().sendto(b"!", "\0" + given["name"] + ".dgram")
    yield "fast open", lambda: tcp().sendto(b"!", fast_open, ("127.0.0.1", ports["elsewhere"]))
    yield "bind a port", lambda: tcp().bind(("127.0.0.1", ports["free"]))
    yield "bind a path", lambda: stream().bind(f"{given['inside']}/new")
    for name, family, kind, protocol in (
        ("UDP", socket.AF_INET, socket.SOCK_DGRAM, 0),
        ("Multipath TCP", socket.AF_INET, socket.SOCK_STREAM, _MPTCP),
        ("raw", socket.AF_INET, socket.SOCK_RAW, 1),
        ("packet", socket.AF_PACKET, socket.SOCK_RAW, 0),
        ("netlink", socket.AF_NETLINK, socket.SOCK_RAW, 0),
        ("vsock", socket.AF_VSOCK, socket.SOCK_STREAM, 0),
    ):
        yield (
            f"socket: {name}",
            lambda family=family, kind=kind, protocol=protocol: socket.socket(  # type: ignore[misc]
                family, kind, protocol
            ),
        )
    if given["carrier"] == "epoll":
        yield "io_uring", Ring
        return
    ring = Ring()
    yield "io_uring: open absolute", lambda: ring.open(given["secret"])
    yield "io_uring: open /etc/passwd", lambda: ring.open("/etc/passwd")
    yield "io_uring: open by a link", lambda: ring.open(f"{given['inside']}/link")
    yield "io_uring: open a file of an allowed folder", lambda: ring.open(f"{given['inside']}/file")
    yield "io_uring: connect to a port", lambda: ring.connect(tcp().detach(), inet(ports["elsewhere"]))
    yield "io_uring: connect to a path", lambda: ring.connect(stream().detach(), unix(given["elsewhere"]))
    yield "io_uring: connect to a name", lambda: ring.connect(stream().detach(), unix("@" + given["name"]))
    yield "io_uring: bind a port", lambda: ring.bind(tcp().detach(), inet(ports["free"]))
    yield "io_uring: bind a path", lambda: ring.bind(stream().detach(), unix(f"{given['inside']}/new"))
    yield "io_uring: packet", lambda: ring.socket(socket.AF_PACKET, socket.SOCK_RAW)
    # Known gaps: the test looks whether the report names them.
    yield "gap: UDP", lambda: ring.connect(ring.socket(socket.AF_INET, socket.SOCK_DGRAM), inet(ports["elsewhere"]))
    yield (
        "gap: Multipath TCP",
        lambda: ring.connect(ring.socket(socket.AF_INET, socket.SOCK_STREAM, _MPTCP), inet(ports["elsewhere"])),
    )
    yield "gap: TCP Fast Open", lambda: ring.fast_open(socket.socket().detach(), inet(ports["elsewhere"]))


def asked(descriptor: int, host: str, port: int) -> None:
    """connect(), to the end."""
    address, where = inet(port, host), int.from_bytes(socket.inet_aton(host), "big")
    memory = ctypes.create_string_buffer(address, len(address))
    try:
        call(_CONNECT, descriptor, memory, len(address), 0, where, MARK << 32 | 4 << 16 | port)
    except BlockingIOError:
        with socket.socket(fileno=descriptor) as connecting:
            select.select([], [connecting], [], 5.0)
            if error := connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error)) from None


def harmless(name: str) -> bool:
    """Whether it changes nothing where it succeeds."""
    return (
        name in ("kill", "pidfd_open", "fast open")
        or name.startswith(
            ("connect ", "ask for a port", "send ", "socket: ", "io_uring: open", "io_uring: connect", "gap: ")
        )
        or (name.startswith("open ") and name != "open relative")
    )


def outcome(attempt: Callable[[], object]) -> str:
    """`done`, or the name of the error."""
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    except ValueError:
        return "ValueError"
    return "done"


def refuse(calls: dict[str, int]) -> None:
    """As a container does that lacks something: these system calls, by their numbers, fail with such an errno."""
    lines = [struct.pack("=HBBI", 0x20, 0, 0, 0)]
    for number, error in calls.items():
        lines += [struct.pack("=HBBI", 0x15, 0, 1, int(number)), struct.pack("=HBBI", 0x06, 0, 0, 0x0005_0000 | error)]
    lines.append(struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF_0000))
    code = ctypes.create_string_buffer(b"".join(lines))
    libc = ctypes.CDLL(None)
    libc.prctl(38, 1, 0, 0, 0)
    assert libc.prctl(22, 2, struct.pack("@HP", len(lines), ctypes.addressof(code)), 0, 0) == 0


def main() -> None:
    settings = json.loads(sys.argv[1])
    file, carrier = BrokerFile.read(Path(settings["file"])), settings["carrier"]
    if settings["first"] is not None:
        os.setgroups([])
        os.setresgid(*[settings["first"]] * 3)
        os.setresuid(*[settings["first"]] * 3)
        # As after execve(): whose /proc/self is.
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
    if settings["refuse"]:
        refuse(settings["refuse"])
    allowed = confinement.plan(
        file,
        registry=Registry(settings["store"], create=False),
        log=Path(settings["log"]),
        uring=carrier == "uring",
        inherited=bool(settings["fds"]),
        served=settings["served"] is not None,
        identity=confinement.identity(settings["user"]),
        read=confinement.libraries(),
    )
    try:
        report = confinement.confine(allowed)
    except MissingPrivilege as error:
        print(json.dumps(str(error)), flush=True)
        return
    print(json.dumps(report.as_json), flush=True)
    if report.asks_at is not None:
        with socket.socket(fileno=settings["served"]) as owner:
            socket.send_fds(owner, [b"!"], [report.asks_at])
        os.close(report.asks_at)
    config = BrokerConfig(
        listeners=tuple(
            BrokerListener(
                endpoint=Endpoint.parse(table.address),
                default=table.default,
                sniff_timeout_s=table.sniff_s,
                fds=tuple(settings["fds"]),
            )
            for table in file.listen
        ),
        store=Path(settings["store"]),
        ledger=Path(settings["log"]),
        delivery_timeout_s=0.3,
    )
    faulthandler.enable()
    # Small rings, so that more of them are made while it serves.
    with Engine.start(config, CarrierName(carrier), 2, CarrierSettings(slots_per_ring=32)) as engine:
        engine.wait_for(lambda now: now.phase.value != "ramping", 10)
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            if line == "attack\n":
                tried = attempts(settings["given"], settings["ports"])
                print(json.dumps({name: outcome(attempt) for name, attempt in tried}), flush=True)
            elif line == "crash\n":
                os.abort()
            elif line == "attack harmless\n":
                tried = attempts(settings["given"], settings["ports"])
                print(json.dumps({name: outcome(one) for name, one in tried if harmless(name)}), flush=True)
            elif line == "import\n":
                # What nobody has imported yet, with a shared object of its own.
                import sqlite3

                print(json.dumps(sqlite3.sqlite_version), flush=True)
            else:
                now = engine.snapshot()
                numbers = {"rings": now.carrier.rings, "sniffing": now.sniffing_now, "errors": now.errors}
                print(json.dumps({"ended": reasons(now), **numbers}), flush=True)


if __name__ == "__main__":
    main()
