"""One worker: connects, plays the script's session on each connection, and tells its parent what came of it.

Decides when a connection is made, and which of the things that can happen to a session are the peer's doing and which
the script's. Run as `python -m fourtuple.crew.worker DESCRIPTOR`, a sequenced-packet socket to the parent. It ends when
the parent says so or is gone, whatever the script does: the kernel sees to the second.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import resource
import runpy
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from itertools import count
from types import FrameType

from fourtuple.connect import SourceSocket
from fourtuple.crew.tally import BEGIN, END, ENOUGH, MOST_KINDS, Tally, Task
from fourtuple.errors import FourtupleError, LimitReached
from fourtuple.session import MOST_HELD_BYTES, AnswerTimeout, Connection, PeerClosed, WrongAnswer
from fourtuple.sources import SourcePool
from fourtuple.tuples import AddressSet, PortSet

Session = Callable[[Connection], Awaitable[object]]

TELL_EVERY_S = 0.1
BLOCKED_AFTER_S = 1.0
"""Longer without a turn of the event loop, while the script runs, is told as its fault."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
"""Before a connection is made anew for one that failed; doubled each time it fails again."""
END_WITHIN_S = 2.0
"""For sessions to end when they are told to."""
MOST_MESSAGE_BYTES = 1 << 20
MOST_SHOWN = 200
"""Letters of a line of the script, and of what an exception says."""
_PR_SET_PDEATHSIG = 1
_ABORT = struct.pack("ii", 1, 0)


def main(descriptor: int) -> None:
    """Play until told to end."""
    channel = socket.socket(fileno=descriptor)
    task = Task.decode(channel.recv(MOST_MESSAGE_BYTES))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != task.parent_pid:
        return  # it went before that
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    resource.setrlimit(resource.RLIMIT_DATA, (task.memory_bytes, task.memory_bytes))
    worker = Worker(task, channel)
    try:
        session: Session = runpy.run_path(task.script, run_name="fourtuple_script")["session"]
    except BaseException as error:
        worker.tally.refused = f"{type(error).__name__}: {error}"
        worker.tell()
        return
    threading.Thread(target=worker.watch, args=(threading.get_ident(),), daemon=True).start()
    try:
        asyncio.run(worker.play(session))
    except BaseException as error:  # of a task that the script started, which asyncio passes on
        worker.raised(error)
    worker.beat_s = None
    channel.settimeout(END_WITHIN_S)
    worker.tell()
    # Not by the way of interpreter's end: what the script left behind, a thread among it, could keep that waiting.
    sys.stdout.flush()
    os._exit(0)


class Worker:
    """The places of one process: each is one connection at a time."""

    def __init__(self, task: Task, channel: socket.socket) -> None:
        self.task = task
        self.tally = Tally()
        self.beat_s: float | None = None
        self._channel = channel
        self._pool = SourcePool(task.sources, task.ports, patience_s=0.0)
        self._destinations = [str(one) for one in AddressSet.parse(task.destinations)]
        self._destination_ports = list(PortSet.parse(task.destination_ports))
        self._window = asyncio.Semaphore(task.window)
        self._next_s = 0.0
        self._tried = 0
        self._begun = asyncio.Event()
        self._ended = asyncio.Event()
        self._enough = False

    async def play(self, session: Session) -> None:
        """Everything, from the order to begin to the order to end."""
        loop = asyncio.get_running_loop()
        self._channel.setblocking(False)
        loop.add_reader(self._channel.fileno(), self._hear)
        self.tally.ready = True
        telling = asyncio.create_task(self._keep_telling())
        await self._begun.wait()
        places = [asyncio.create_task(self._place(number, session)) for number in range(self.task.connections)]
        await self._ended.wait()
        for place in places:
            place.cancel()
        if places:
            _, unwilling = await asyncio.wait(places, timeout=END_WITHIN_S)
            self.tally.unwilling = len(unwilling)
        telling.cancel()
        if self.tally.unwilling or len(asyncio.all_tasks()) > 1:
            # asyncio.run() would wait for those without end.
            self._channel.settimeout(END_WITHIN_S)
            self.tell()
            os._exit(0)

    @property
    def ending(self) -> bool:
        """Whether the order to end has come."""
        return self._ended.is_set()

    def tell(self) -> None:
        """Say what was counted so far; left out if the parent has not read the last ones yet."""
        try:
            self._channel.send(self.tally.encode())
        except (BlockingIOError, TimeoutError):
            return
        except OSError:
            os._exit(1)  # the parent is gone

    def raised(self, error: BaseException) -> None:
        """Count what the script let out."""
        kind = type(error).__name__
        if kind not in self.tally.raised and len(self.tally.raised) >= MOST_KINDS:
            kind = "others"
        number, example = self.tally.raised.get(kind, (0, ""))
        self.tally.raised[kind] = (number + 1, example or self._where(error))

    def watch(self, loop_thread: int) -> None:
        """Run in a thread of its own: see when the event loop does not get its turn, and where the script is then."""
        while True:
            time.sleep(TELL_EVERY_S)
            beat_s = self.beat_s
            waited_s = 0.0 if beat_s is None else time.monotonic() - beat_s
            if waited_s < BLOCKED_AFTER_S:
                continue
            place = self._frame(sys._current_frames().get(loop_thread))
            if place is not None and (place in self.tally.blocked or len(self.tally.blocked) < MOST_KINDS):
                before_s = self.tally.blocked.get(place, 0.0)
                self.tally.blocked[place] = max(before_s, waited_s)
                try:
                    self._channel.send(self.tally.encode())  # one packet each: it may come between others of the loop
                except (OSError, RuntimeError):  # the parent reads later; a table grew meanwhile
                    continue

    # Places

    async def _place(self, number: int, session: Session) -> None:
        """One connection after the other. Between two sessions of which the first returned, it counts as held."""
        serial, counts = self.task.first_serial + number, self.tally.counts
        place, row = serial % len(self._destinations), serial // len(self._destinations)
        destination = (self._destinations[place], self._destination_ports[row % len(self._destination_ports)])
        pause_s, kept, tried = FIRST_PAUSE_S, False, False
        for turn in count():
            if self._enough and not tried:
                return
            await self._pace()
            held = await self._connect(destination, first=not tried)
            tried = True
            if kept != (held is not None):
                counts["open_now"] += 1 if held is not None else -1
                counts["open_peak"] = max(counts["open_peak"], counts["open_now"])
            if held is not None:
                pause_s = FIRST_PAUSE_S
                kept = await held.play(session, serial, turn)
                if kept:
                    continue
            if not self.task.replace:
                return
            await asyncio.sleep(pause_s)
            if held is None:
                kept, pause_s = False, min(2 * pause_s, LONGEST_PAUSE_S)

    async def _pace(self) -> None:
        if self.task.rate_per_s:
            now_s = time.monotonic()
            self._next_s = max(self._next_s, now_s - 1 / self.task.rate_per_s) + 1 / self.task.rate_per_s
            if self._next_s > now_s:
                await asyncio.sleep(self._next_s - now_s)

    async def _connect(self, destination: tuple[str, int], *, first: bool) -> _Held | None:
        counts, loop = self.tally.counts, asyncio.get_running_loop()
        made: SourceSocket | None = None
        step = "socket"
        async with self._window:
            counts["connects_attempted"] += 1
            started_ns = time.perf_counter_ns()
            try:
                made = SourceSocket(self._pool)
                made.setblocking(False)
                step = "connect"
                async with asyncio.timeout(self.task.connect_timeout_s):
                    await loop.sock_connect(made, destination)
                if not self.task.close_with_fin:
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
                held = _Held(self, made.getsockname()[:2], destination)
                await held.take(made)
            except (OSError, FourtupleError) as error:
                if made is not None:
                    made.close()
                counts["connects_failed"] += 1
                self.tally.failures[_failure(step, error)] += 1
                return None
            finally:
                self._tried += first
            self.tally.connect_ns.add(time.perf_counter_ns() - started_ns)
            counts["connects_succeeded"] += 1
            return held

    # The parent

    async def _keep_telling(self) -> None:
        while True:
            self.beat_s = time.monotonic()
            self.tally.ramping = self._tried < self.task.connections and not self._enough
            self.tell()
            await asyncio.sleep(TELL_EVERY_S)

    def _hear(self) -> None:
        try:
            order = self._channel.recv(64)
        except BlockingIOError:
            return
        match order:
            case b"":
                os._exit(1)
            case _ if order == BEGIN:
                self._begun.set()
            case _ if order == ENOUGH:
                self._enough = True
            case _ if order == END:
                self._begun.set()
                self._enough = True
                self._ended.set()

    # Where in the script

    def _where(self, error: BaseException) -> str:
        lines = [one for one in traceback.extract_tb(error.__traceback__) if one.filename == self.task.script]
        said = str(error)[:MOST_SHOWN]
        if not lines:
            return said
        return f"line {lines[-1].lineno}: {(lines[-1].line or '')[:MOST_SHOWN]}" + (f" ({said})" if said else "")

    def _frame(self, frame: FrameType | None) -> str | None:
        while frame is not None and frame.f_code.co_filename != self.task.script:
            frame = frame.f_back
        return None if frame is None else f"line {frame.f_lineno}, in {frame.f_code.co_name}"


class _Held:
    """A connection of a worker from the moment it stands; also what its rounds are counted by."""

    __slots__ = ("_destination", "_gone", "_lost", "_reader", "_source", "_worker", "_writer")

    def __init__(self, worker: Worker, source: tuple[str, int], destination: tuple[str, int]) -> None:
        self._worker = worker
        self._source = source
        self._destination = destination
        self._gone = asyncio.Event()
        self._lost = False

    async def take(self, connected: socket.socket) -> None:
        """Give the socket to the event loop."""
        loop = asyncio.get_running_loop()
        self._reader = asyncio.StreamReader(limit=MOST_HELD_BYTES, loop=loop)
        protocol = _Protocol(self._reader, self)
        transport, _ = await loop.create_connection(lambda: protocol, sock=connected)
        self._writer = asyncio.StreamWriter(transport, protocol, self._reader, loop)

    async def play(self, session: Session, serial: int, turn: int) -> bool:
        """Play a session to its end and close; True if the next may follow at once."""
        worker, counts = self._worker, self._worker.tally.counts
        returned = False
        try:
            connection = Connection(
                serial=serial,
                turn=turn,
                source=self._source,
                destination=self._destination,
                reader=self._reader,
                writer=self._writer,
                gone=self._gone,
                book=self,
                answer_timeout_s=worker.task.answer_timeout_s,
            )
            await session(connection)
            returned = True
            counts["sessions_ended"] += 1
        except AnswerTimeout as late:
            counts["pings_missing"] += not late.counted
        except WrongAnswer as wrong:
            counts["pings_wrong"] += not wrong.counted
        except PeerClosed:
            self.ended_by_peer(None)
        except ConnectionError as error:
            self.ended_by_peer(error)
        except asyncio.CancelledError as told:
            if worker.ending:
                raise
            worker.raised(told)
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: a script does not end the run
            worker.raised(error)
        finally:
            kept = returned and not self._lost and worker.task.replace
            if not self._lost:
                self._lost = True
                counts["closed_by_us"] += 1
                counts["open_now"] -= not kept
            if worker.task.close_with_fin:
                self._writer.close()
            else:
                self._writer.transport.abort()
        return kept

    def ended_by_peer(self, error: Exception | None) -> None:
        """It stands no more; once per connection."""
        self._gone.set()
        if self._lost:
            return
        self._lost = True
        counts = self._worker.tally.counts
        counts["open_now"] -= 1
        if error is None:
            counts["closed_by_peer"] += 1
        else:
            counts["broken"] += 1
            self._worker.tally.failures[_failure("receive", error)] += 1

    def sent(self, count: int) -> None:
        """Bytes were."""
        self._worker.tally.counts["bytes_out"] += count

    def received(self, count: int) -> None:
        """Bytes were."""
        self._worker.tally.counts["bytes_in"] += count

    def begun(self) -> None:
        """A round is."""
        self._worker.tally.counts["pings_sent"] += 1

    def right(self, took_ns: int) -> None:
        """A round was."""
        self._worker.tally.counts["pings_right"] += 1
        self._worker.tally.round_ns.add(took_ns)

    def missing(self) -> None:
        """A round's answer is."""
        self._worker.tally.counts["pings_missing"] += 1

    def wrong(self) -> None:
        """A round's answer was."""
        self._worker.tally.counts["pings_wrong"] += 1


class _Protocol(asyncio.StreamReaderProtocol):
    """A stream that says at once when the peer has ended it, whatever the session waits for."""

    def __init__(self, reader: asyncio.StreamReader, held: _Held) -> None:
        super().__init__(reader)
        self._held = held

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self._held.received(len(data))
        super().data_received(data)

    def eof_received(self) -> bool:
        """The peer sent FIN."""
        super().eof_received()
        self._held.ended_by_peer(None)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """The transport is closed: by the peer if there is an error."""
        super().connection_lost(error)
        if error is not None:
            self._held.ended_by_peer(error)


def _failure(step: str, error: Exception) -> tuple[str, int]:
    """As the engine names it. Of a pool: nothing is left; bind() is where an address is refused."""
    match error:
        case LimitReached():
            return step, errno.EADDRNOTAVAIL
        case FourtupleError():
            return "bind", errno.EADDRNOTAVAIL
        case TimeoutError():
            return step, error.errno or errno.ETIMEDOUT
        case OSError(errno=int(number)):
            return step, number
        case _:
            return step, errno.EIO


if __name__ == "__main__":
    main(int(sys.argv[1]))
