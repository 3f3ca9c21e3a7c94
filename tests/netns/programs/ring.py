"""An io_uring of its own, by raw system calls, as code would use it that got in: one operation at a time."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_SETUP, _ENTER = 425, 426
_ENTRIES = 8
_GETEVENTS = 1
_SQ_RING, _SQES = 0, 0x1000_0000
OPENAT, CONNECT, SENDMSG, SOCKET, BIND = 18, 16, 9, 45, 56
_AT_FDCWD = -100
_FASTOPEN = 0x2000_0000


def call(number: int, *arguments: object) -> int:
    """A system call by its number; OSError where it fails."""
    answer = int(_libc.syscall(*(ctypes.c_long(one) if isinstance(one, int) else one for one in (number, *arguments))))
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return answer


class Ring:
    """struct io_uring_params and the two rings, which share a mapping (IORING_FEAT_SINGLE_MMAP)."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(120)
        self._fd = call(_SETUP, _ENTRIES, parameters)
        values = struct.unpack("30I", parameters.raw)
        # sq_off: head, tail, mask, entries, flags, dropped, array; cq_off: head, tail, mask, entries, -, cqes.
        self._tail, self._array = values[11], values[16]
        self._cq_head, self._cq_tail, self._cqes = values[20], values[21], values[25]
        size = max(self._array + 4 * _ENTRIES, self._cqes + 16 * values[1])
        self._rings = mmap.mmap(self._fd, size, offset=_SQ_RING)
        self._entries = mmap.mmap(self._fd, 64 * _ENTRIES, offset=_SQES)

    def do(self, opcode: int, fd: int, address: int = 0, length: int = 0, offset: int = 0, flags: int = 0) -> int:
        """What the operation comes to; OSError where it fails."""
        entry = struct.pack("=BBHiQQII", opcode, 0, 0, fd, offset, address, length, flags).ljust(64, b"\0")
        self._entries[:64] = entry
        struct.pack_into("I", self._rings, self._array, 0)
        (tail,) = struct.unpack_from("I", self._rings, self._tail)
        struct.pack_into("I", self._rings, self._tail, tail + 1)
        call(_ENTER, self._fd, 1, 1, _GETEVENTS, None, 0)
        (head,) = struct.unpack_from("I", self._rings, self._cq_head)
        # cqe_size is 16, and there is one at a time; the mask is that of a power of two.
        (answer,) = struct.unpack_from("i", self._rings, self._cqes + 16 * (head % (2 * _ENTRIES)) + 8)
        struct.pack_into("I", self._rings, self._cq_head, head + 1)
        if answer < 0:
            raise OSError(-answer, os.strerror(-answer))
        return int(answer)

    def open(self, path: str) -> int:
        """IORING_OP_OPENAT."""
        text = ctypes.create_string_buffer(os.fsencode(path))
        return self.do(OPENAT, _AT_FDCWD, ctypes.addressof(text))

    def connect(self, fd: int, address: bytes) -> int:
        """IORING_OP_CONNECT, with a struct sockaddr."""
        memory = ctypes.create_string_buffer(address, len(address))
        return self.do(CONNECT, fd, ctypes.addressof(memory), offset=len(address))

    def bind(self, fd: int, address: bytes) -> int:
        """IORING_OP_BIND (Linux 6.11)."""
        memory = ctypes.create_string_buffer(address, len(address))
        return self.do(BIND, fd, ctypes.addressof(memory), offset=len(address))

    def socket(self, family: int, kind: int, protocol: int = 0) -> int:
        """IORING_OP_SOCKET."""
        return self.do(SOCKET, family, offset=kind, length=protocol)

    def fast_open(self, fd: int, address: bytes) -> int:
        """IORING_OP_SENDMSG with MSG_FASTOPEN and a struct sockaddr: a connection without a connect()."""
        name, byte = ctypes.create_string_buffer(address, len(address)), ctypes.create_string_buffer(b"!", 1)
        vector = struct.pack("=QQ", ctypes.addressof(byte), 1)
        memory = ctypes.create_string_buffer(vector, 16)
        # struct msghdr: name, namelen, iov, iovlen, control, controllen, flags.
        header = struct.pack(
            "=QIxxxxQQQQixxxx", ctypes.addressof(name), len(address), ctypes.addressof(memory), 1, 0, 0, 0
        )
        message = ctypes.create_string_buffer(header, len(header))
        try:
            return self.do(SENDMSG, fd, ctypes.addressof(message), 1, flags=_FASTOPEN)
        except BlockingIOError:
            # EINPROGRESS: the SYN is on its way.
            return 0


def inet(port: int, host: str = "127.0.0.1") -> bytes:
    """struct sockaddr_in."""
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(host) + bytes(8)


def unix(path: str) -> bytes:
    """struct sockaddr_un; @ begins an abstract name."""
    text = os.fsencode(path)
    return struct.pack("=H", socket.AF_UNIX) + (b"\0" + text[1:] if text[:1] == b"@" else text + b"\0")
