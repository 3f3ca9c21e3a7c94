"""The other way to give a program sources: a BPF program on a cgroup's connect(), for any program of any kind.

Decides the instructions, assembled here from the sources, and the cgroup that they hang on. The kernel runs them in
each connect() of each process in that cgroup (BPF_CGROUP_INET4_CONNECT and _INET6_CONNECT): an unbound TCP socket is
bound to an address chosen by chance, its port left open. It cannot set socket options and does not see how a connect()
ends, so there is no flat port search and no second address. Knows no preload library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from errno import EADDRNOTAVAIL
from pathlib import Path

from fourtuple.errors import BadConfig, MissingFeature, MissingPrivilege
from fourtuple.preload import Sources
from fourtuple.tuples import AddressSet

_SYSTEM_CALL = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _PROG_ATTACH = 5, 8
_CGROUP_SOCK_ADDR = 18
_INET4_CONNECT, _INET6_CONNECT = 10, 11
_LOG_BYTES = 65_536
_NAME = "fourtuple-run-"

# struct bpf_sock_addr and struct bpf_sock (linux/bpf.h)
_USER_IP4, _USER_IP6, _PROTOCOL, _SOCKET = 4, 8, 36, 64
_SOURCE_IP4, _SOURCE_IP6, _SOURCE_PORT = 24, 28, 44

# Instruction codes (linux/bpf.h, linux/bpf_common.h), those that are used here.
_LOAD_WORD, _LOAD_LONG, _LOAD_CONSTANT = 0x61, 0x79, 0x18
_STORE_LONG, _STORE_CONSTANT_HALF, _STORE_CONSTANT_LONG, _STORE_WORD = 0x7B, 0x6A, 0x7A, 0x63
_MOVE, _MOVE_CONSTANT, _ADD, _ADD_CONSTANT, _OR, _TO_BIG_ENDIAN = 0xBF, 0xB7, 0x0F, 0x07, 0x4F, 0xDC
_SUBTRACT_CONSTANT_32, _MODULO_CONSTANT_32, _AND_CONSTANT_32 = 0x14, 0x94, 0x54
_JUMP, _JUMP_EQUAL, _JUMP_NOT_EQUAL, _JUMP_EQUAL_32, _JUMP_NOT_LESS_32 = 0x05, 0x15, 0x55, 0x16, 0x36
_CALL, _EXIT = 0x85, 0x95
_RANDOM, _BIND = 7, 64
"""Helpers bpf_get_prandom_u32 and bpf_bind."""
_FRAME = 10

_PASS, _BOUND = "pass", "bound"
_MAPPED = 0xFFFF << 32
_MOST_32 = 2**32 - 1

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Addresses in a row, as the kernel's two halves of 64 bits; an IPv4 address has its number in the lower."""

    high: int
    low: int
    size: int


def connect4(sources: Sources) -> bytes:
    """The program for connect() to an IPv4 address; there has to be an IPv4 source."""
    loopback, usual = _pools(sources, 4)
    code = _Assembly()
    code.begin((_SOURCE_IP4,))
    code.emit(_LOAD_WORD, 1, 6, offset=_USER_IP4)
    code.jump_if_loopback_v4(1, "loopback")
    code.choose(usual, version=4)
    code.label("loopback")
    code.choose(loopback, version=4)
    return code.end(length_of_address=16)


def connect6(sources: Sources) -> bytes:
    """The program for connect() on an IPv6 socket, whose destination may be a mapped IPv4 address."""
    loopback, usual = _pools(sources, 6)
    mapped_loopback, mapped = (
        [Run(high=0, low=_MAPPED | run.low, size=run.size) for run in pool] for pool in _pools(sources, 4)
    )
    code = _Assembly()
    code.begin(tuple(_SOURCE_IP6 + 4 * number for number in range(4)))
    for number in range(4):
        code.emit(_LOAD_WORD, 1 + number, 6, offset=_USER_IP6 + 4 * number)
    code.emit(_MOVE, 5, 1)
    code.emit(_OR, 5, 2)
    code.emit(_JUMP_NOT_EQUAL, 5, target="usual", constant=0)
    code.emit(_JUMP_EQUAL_32, 3, target="mapped", constant=_network_order(0xFFFF))
    code.emit(_JUMP_NOT_EQUAL, 3, target="usual", constant=0)
    # Connecting to the unspecified address is connecting to loopback (tcp_v6_connect).
    code.emit(_JUMP_EQUAL, 4, target="loopback", constant=0)
    code.emit(_JUMP_EQUAL_32, 4, target="loopback", constant=_network_order(1))
    code.label("usual")
    # A link-local destination is reached from a link-local source of its link, which the kernel knows.
    code.emit(_AND_CONSTANT_32, 1, constant=_network_order(0xFFC0_0000))
    code.emit(_JUMP_EQUAL_32, 1, target=_PASS, constant=_network_order(0xFE80_0000))
    code.choose(usual, version=6)
    code.label("loopback")
    code.choose(loopback, version=6)
    code.label("mapped")
    code.jump_if_loopback_v4(4, "mapped loopback")
    code.choose(mapped, version=6)
    code.label("mapped loopback")
    code.choose(mapped_loopback, version=6)
    return code.end(length_of_address=28)


@contextmanager
def cgroup_with(sources: Sources) -> Iterator[Path]:
    """A new cgroup below this process's own, with both programs attached; removed at the end, if nobody is in it.

    Yields its folder: whoever writes 0 to `cgroup.procs` there is in it, with all that it starts from then on.
    """
    parent = _own_cgroup()
    _remove_left_behind(parent)
    folder = parent / f"{_NAME}{os.getpid()}"
    with ExitStack() as stack:
        wanted = [(connect6, _INET6_CONNECT)]
        if any(one.version == 4 for one in sources.addresses):
            wanted.append((connect4, _INET4_CONNECT))
        programs = [(_load(code(sources), attach), attach) for code, attach in wanted]
        for program, _ in programs:
            stack.callback(os.close, program)
        try:
            folder.mkdir()
        except OSError as error:
            raise MissingPrivilege(f"no cgroup can be made in {parent}: {error.strerror}") from None
        # As long as somebody is left in it the cgroup stays, and the programs with it.
        stack.callback(_remove, folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        for program, attach in programs:
            _bpf(_PROG_ATTACH, struct.pack("=IIII", descriptor, program, attach, 0), "attach to a cgroup")
        yield folder


def require_bindable(sources: Sources) -> None:
    """BadConfig if an address is local, yet only a socket option would let a program bind to it (IPv6 AnyIP, A17)."""
    for addresses in sources.addresses:
        if addresses.version == 6:
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as trial:
                try:
                    trial.bind((str(addresses.nth(0)), 0))
                except OSError as error:
                    if error.errno == EADDRNOTAVAIL:
                        why = "is on no interface; --by cgroup then needs: sysctl -w net.ipv6.ip_nonlocal_bind=1"
                        raise BadConfig("--from", f"{addresses.nth(0)} {why}") from None
                    raise


@dataclass(slots=True)
class _Assembly:
    """Instructions, with names for the places that are jumped to."""

    instructions: list[tuple[int, int, int, int | str, int]] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def emit(
        self, code: int, to: int = 0, source: int = 0, *, offset: int = 0, target: str = "", constant: int = 0
    ) -> None:
        self.instructions.append((code, to, source, target or offset, constant))

    def label(self, name: str) -> None:
        self.places[name] = len(self.instructions)

    def constant(self, register: int, value: int) -> None:
        """Load 64 bits: two places of code."""
        self.emit(_LOAD_CONSTANT, register, constant=value & _MOST_32)
        self.emit(0, constant=value >> 32)

    def begin(self, source_fields: tuple[int, ...]) -> None:
        """Let pass what is not TCP, and a socket that has an address or a port already. The context is kept in r6."""
        self.emit(_MOVE, 6, 1)
        self.emit(_LOAD_WORD, 1, 6, offset=_PROTOCOL)
        self.emit(_JUMP_NOT_EQUAL, 1, target=_PASS, constant=socket.IPPROTO_TCP)
        self.emit(_LOAD_LONG, 7, 6, offset=_SOCKET)
        self.emit(_JUMP_EQUAL, 7, target=_PASS, constant=0)
        for offset in (*source_fields, _SOURCE_PORT):
            self.emit(_LOAD_WORD, 1, 7, offset=offset)
            self.emit(_JUMP_NOT_EQUAL, 1, target=_PASS, constant=0)

    def jump_if_loopback_v4(self, register: int, target: str) -> None:
        """127.0.0.0/8, and 0.0.0.0, which connect() takes for it (ip_route_connect)."""
        self.emit(_JUMP_EQUAL, register, target=target, constant=0)
        self.emit(_AND_CONSTANT_32, register, constant=_network_order(0xFF00_0000))
        self.emit(_JUMP_EQUAL_32, register, target=target, constant=_network_order(0x7F00_0000))

    def choose(self, pool: list[Run], *, version: int) -> None:
        """Put a sockaddr with an address of the pool on the stack, at fp-32, and go on to bind it."""
        if not pool:
            self.emit(_JUMP, target=_PASS)
            return
        self.emit(_CALL, constant=_RANDOM)
        self.emit(_MODULO_CONSTANT_32, 0, constant=sum(run.size for run in pool))
        for number, run in enumerate(pool):
            following = f"{len(self.instructions)} after {number}"
            self.emit(_JUMP_NOT_LESS_32, 0, target=following, constant=run.size)
            self.constant(1, run.low)
            self.emit(_ADD, 1, 0)
            if version == 4:
                self.emit(_TO_BIG_ENDIAN, 1, constant=32)
                self.emit(_STORE_WORD, _FRAME, 1, offset=-28)
            else:
                self.emit(_TO_BIG_ENDIAN, 1, constant=64)
                self.emit(_STORE_LONG, _FRAME, 1, offset=-16)
                self.constant(1, run.high)
                self.emit(_TO_BIG_ENDIAN, 1, constant=64)
                self.emit(_STORE_LONG, _FRAME, 1, offset=-24)
            self.emit(_JUMP, target=_BOUND)
            self.label(following)
            self.emit(_SUBTRACT_CONSTANT_32, 0, constant=run.size)
        self.emit(_JUMP, target=_PASS)

    def end(self, *, length_of_address: int) -> bytes:
        """Bind and let pass; what cannot come from the sources is refused (EPERM), not sent from elsewhere."""
        self.label(_BOUND)
        family = socket.AF_INET if length_of_address == 16 else socket.AF_INET6
        self.emit(_STORE_CONSTANT_HALF, _FRAME, offset=-32, constant=family)
        self.emit(_STORE_CONSTANT_HALF, _FRAME, offset=-30)
        if family == socket.AF_INET:
            self.emit(_STORE_CONSTANT_LONG, _FRAME, offset=-24)
        else:
            self.emit(_STORE_CONSTANT_HALF, _FRAME, offset=-28)  # the flow's label, in two halves
            self.emit(_STORE_CONSTANT_HALF, _FRAME, offset=-26)
            self.emit(_STORE_CONSTANT_LONG, _FRAME, offset=-8)  # the scope
        self.emit(_MOVE, 1, 6)
        self.emit(_MOVE, 2, _FRAME)
        self.emit(_ADD_CONSTANT, 2, constant=-32)
        self.emit(_MOVE_CONSTANT, 3, constant=length_of_address)
        self.emit(_CALL, constant=_BIND)
        self.emit(_JUMP_EQUAL, 0, target=_PASS, constant=0)
        self.emit(_MOVE_CONSTANT, 0, constant=0)
        self.emit(_EXIT)
        self.label(_PASS)
        self.emit(_MOVE_CONSTANT, 0, constant=1)
        self.emit(_EXIT)
        return b"".join(self._encoded(place) for place in range(len(self.instructions)))

    def _encoded(self, place: int) -> bytes:
        code, to, source, where, constant = self.instructions[place]
        # Jumps count from the instruction that follows.
        offset = self.places[where] - place - 1 if isinstance(where, str) else where
        registers = to | source << 4 if sys.byteorder == "little" else to << 4 | source
        return struct.pack("=BBhI", code, registers, offset, constant & _MOST_32)


def _pools(sources: Sources, version: int) -> tuple[list[Run], list[Run]]:
    """The loopback addresses among the sources of this version, and the others."""
    loopback = AddressSet.parse("127.0.0.0/8" if version == 4 else "::1")
    found = next((one for one in sources.addresses if one.version == version), AddressSet(version=version))
    return _runs(found.intersect(loopback)), _runs(found.subtract(loopback))


def _runs(addresses: AddressSet) -> list[Run]:
    """As 32 bits of chance can choose from: of each run no more than its share of 2^32, and none across a /64."""
    share = _MOST_32 // max(1, len(addresses.runs))
    found = []
    for first, last in addresses.runs:
        high, low = first >> 64, first & 2**64 - 1
        size = min(last - first + 1, share, 2**64 - low)
        found.append(Run(high=high, low=low, size=size))
    return found


def _network_order(number: int) -> int:
    """What a 32-bit load sees of a number that stands in memory in network order."""
    return int.from_bytes(number.to_bytes(4, "big"), sys.byteorder)


def _load(code: bytes, attach: int) -> int:
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    log = ctypes.create_string_buffer(_LOG_BYTES)
    where = ctypes.addressof
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        *(_CGROUP_SOCK_ADDR, len(code) // 8, where(instructions), where(licence)),
        *(1, _LOG_BYTES, where(log), 0, 0, b"fourtuple", 0, attach),
    )
    try:
        return _bpf(_PROG_LOAD, attributes, "load a program")
    except MissingFeature as problem:
        if log.value:
            problem.add_note(log.value.decode(errors="replace"))
        raise


def _bpf(command: int, attributes: bytes, what: str) -> int:
    number = _SYSTEM_CALL.get(platform.machine())
    if number is None:
        raise MissingFeature(f"--by cgroup is for {', '.join(_SYSTEM_CALL)}, not for {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = _libc.syscall(number, command, buffer, ctypes.c_uint(len(attributes)))
    if result >= 0:
        return result
    error = ctypes.get_errno()
    said = f"bpf() cannot {what}: {os.strerror(error)}"
    if isinstance(OSError(error, ""), PermissionError):
        raise MissingPrivilege(f"{said}; --by cgroup needs CAP_BPF and CAP_NET_ADMIN, and a cgroup of one's own")
    raise MissingFeature(f"{said}; --by cgroup needs Linux 5.8 with CONFIG_CGROUP_BPF")


def _own_cgroup() -> Path:
    """The folder of this process's cgroup in the version 2 hierarchy."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    mount = next((fields[1] for fields in mounts if fields[2] == "cgroup2"), None)
    paths = (line.partition("::") for line in Path("/proc/self/cgroup").read_text().splitlines())
    own = next((path for number, _, path in paths if number == "0"), None)
    if mount is None or own is None:
        raise MissingFeature("no cgroup version 2 hierarchy is mounted here, which --by cgroup needs")
    return Path(mount, own.lstrip("/"))


def _remove_left_behind(parent: Path) -> None:
    """Remove what earlier ones left that were killed; the kernel refuses where somebody is still in it."""
    for folder in parent.glob(f"{_NAME}*"):
        if not Path("/proc", folder.name.removeprefix(_NAME)).exists():
            _remove(folder)


def _remove(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
