"""Messages between the supervisor and a broker process: JSON objects over a SOCK_SEQPACKET pair, whole, in order and
with descriptors.

Decides how a message lies in a packet and what is too much of it. Knows no meaning of a message and no event loop: the
owner watches the descriptor and calls `receive` when it is readable, `flush` when it is writable.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from msgspec import Struct, field

VERSION = 1
"""Of what is said between the two; each process says its own first."""
MOST_BYTES = 96 << 10
"""Of one message. A socket's usual send buffer (net.core.wmem_default) has room for two."""
MOST_DESCRIPTORS = 250
"""SCM_MAX_FD is 253."""
_MOST_QUEUED = 65_536
_PER_TURN = 256

Fields: TypeAlias = dict[str, Any]


class ChannelBroken(Exception):
    """The other end is gone, or says what is no message."""


class Message(Struct, frozen=True, kw_only=True):
    """What came, and the descriptors that came along; whoever takes the message owns them."""

    kind: str
    fields: Fields
    descriptors: Sequence[int] = ()
    lacks_descriptors: bool = False
    """Some that came along had no room in this process's table of them, and are lost (scm_detach_fds())."""

    def close(self) -> None:
        """Close the descriptors that nobody wants."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class Channel(Struct):
    """One end of it."""

    sock: socket.socket
    _queue: deque[tuple[bytes, tuple[int, ...]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.sock.setblocking(False)

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Both ends of a new one."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        """To watch."""
        return self.sock.fileno()

    @property
    def has_more_to_send(self) -> bool:
        """Whether `flush` is to be called when it is writable."""
        return bool(self._queue)

    def send(self, kind: str, fields: Mapping[str, Any] | None = None, descriptors: Iterable[int] = ()) -> None:
        """Send, or keep until there is room; the descriptors are duplicated, and remain the caller's.

        Raises ChannelBroken if the other end is gone or reads nothing.
        """
        packet = json.dumps({"kind": kind, **(fields or {})}, separators=(",", ":")).encode()
        if len(packet) > MOST_BYTES:
            raise ValueError(f"a message of {len(packet)} bytes; {MOST_BYTES} are possible")
        if len(self._queue) >= _MOST_QUEUED:
            raise ChannelBroken("the other end does not read")
        self._queue.append((packet, tuple(os.dup(one) for one in descriptors)))
        self.flush()

    def flush(self) -> None:
        """Send what there is room for."""
        while self._queue:
            packet, descriptors = self._queue[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                self.sock.sendmsg([packet], rights)
            except BlockingIOError:
                return
            except OSError as error:
                self.close_queued()
                raise ChannelBroken(str(error)) from None
            self._queue.popleft()
            for descriptor in descriptors:
                os.close(descriptor)

    def receive(self) -> list[Message]:
        """What is there, some of it at least; raises ChannelBroken once there will be no more."""
        messages: list[Message] = []
        room = socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)
        while len(messages) < _PER_TURN:
            try:
                packet, ancillary, flags, _ = self.sock.recvmsg(MOST_BYTES, room, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                break
            except OSError as error:
                if messages:
                    break
                raise ChannelBroken(str(error)) from None
            descriptors = array.array("i")
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            if not packet:
                if messages:
                    break
                raise ChannelBroken("the other end is closed")
            messages.append(_message(packet, descriptors.tolist(), flags))
        return messages

    def wait(self, timeout_s: float) -> list[Message]:
        """As `receive`, after the first has come; nothing if none comes in time."""
        readable, _, _ = select.select([self.sock], [], [], timeout_s)
        return self.receive() if readable else []

    def close_queued(self) -> None:
        """Forget what has not been sent."""
        while self._queue:
            for descriptor in self._queue.popleft()[1]:
                os.close(descriptor)

    def close(self) -> None:
        """Close this end."""
        self.close_queued()
        self.sock.close()


def _message(packet: bytes, descriptors: list[int], flags: int) -> Message:
    try:
        if flags & socket.MSG_TRUNC:
            raise ValueError("is cut")
        fields = json.loads(packet)
        lacking = bool(flags & socket.MSG_CTRUNC)
        kind = str(fields.pop("kind"))
        return Message(kind=kind, fields=fields, descriptors=descriptors, lacks_descriptors=lacking)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        for descriptor in descriptors:
            os.close(descriptor)
        raise ChannelBroken(f"no message: {error}") from None
