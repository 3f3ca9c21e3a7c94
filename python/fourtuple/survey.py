"""What the workers of an engine hold, asked a bounded piece at a time and put together.

Decides how pages go on from worker to worker, and how each worker's busiest services make the broker's. Knows no HTTP.
An answer of a worker comes with all that the engine asks (`Engine.questions`): whoever takes those hands them on to
`heard`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network

from fourtuple.control.verbs import MOST_ROWS, Connection, Connections, Refused, Top, TopRow
from fourtuple.engine import Engine
from fourtuple.questions import Busiest, Closed, Question, SeenConnection, Surveyed, Usage

_ANSWERS_WITHIN_S = 5.0
_LOOKS_PER_PAGE = 256
"""Of some thousand places each; a page that has found little by then says where to go on."""
_KEPT = 1_024
_WORKER_BITS = 10
"""Of an id, that say which worker accepted the connection (crates/engine/src/broker/survey.rs)."""
_FIRST_TICKET = 1 << 32
"""Others who ask the same engine have tickets below."""


class Survey:
    """Asks an engine that runs; of one event loop."""

    def __init__(self, engine: Engine, listeners: Sequence[str]) -> None:
        """`listeners` are the addresses of the engine's, in their order."""
        self._engine, self._listeners = engine, tuple(listeners)
        self._tickets = itertools.count(_FIRST_TICKET)
        self._waiting: dict[int, asyncio.Queue[Question]] = {}

    def heard(self, question: Question) -> bool:
        """Take a question of the engine that is an answer to this; false if it is not."""
        if not isinstance(question, Surveyed | Busiest | Closed | Usage) or question.ticket < _FIRST_TICKET:
            return False
        if question.ticket in self._waiting:
            self._waiting[question.ticket].put_nowait(question)
        return True

    async def connections(self, after: str | None, most: int, service: str | None, source: str | None) -> Connections:
        """As `Controlled.connections`."""
        network = None if source is None else _network(source)
        prefix = None if network is None else (network.network_address, network.prefixlen)
        worker, place = _cursor(after)
        rows: list[Connection] = []
        for _ in range(_LOOKS_PER_PAGE):
            if worker >= self._engine.workers or len(rows) >= most:
                break
            of, start, room = worker, place, most - len(rows)
            answer = await self._answer(
                lambda ticket, of=of, start=start, room=room: self._engine.ask_survey(  # type: ignore[misc]
                    of, ticket, start, room, service, prefix
                )
            )
            if isinstance(answer, Surveyed):
                rows += [self._row(one) for one in answer.connections]
                place = answer.next or 0
            if not isinstance(answer, Surveyed) or answer.next is None:
                worker, place = worker + 1, 0
        following = f"{worker}.{place}" if worker < self._engine.workers else None
        return Connections(connections=tuple(rows), next=following)

    async def close(self, connection: str) -> None:
        """As `Controlled.close_connection`."""
        name = int(connection, 16)
        first = name % (1 << _WORKER_BITS) % self._engine.workers
        for worker in sorted(range(self._engine.workers), key=lambda one: one != first):
            place: int | None = 0
            while place is not None:
                of, start = worker, place
                answer = await self._answer(
                    lambda ticket, of=of, start=start: self._engine.ask_close(of, ticket, name, start)  # type: ignore[misc]
                )
                if isinstance(answer, Closed) and answer.found:
                    return
                place = answer.next if isinstance(answer, Closed) else None
        remedy = "it may have ended; fourtuple connections lists those that there are"
        raise Refused("absent", "there is no such connection", field="id", value=connection, remedy=remedy)

    async def top(self, by: str, most: int) -> Top:
        """As `Controlled.top`."""
        workers = [await self._busiest_of(worker, by) for worker in range(self._engine.workers)]
        found = {}
        for service in {service for rows, _ in workers for service in rows}:
            shares = [rows.get(service, (least, least)) for rows, least in workers]
            found[service] = TopRow(
                service=service, amount=sum(share[0] for share in shares), over=sum(share[1] for share in shares)
            )
        ranked = sorted(found.values(), key=lambda row: (-row.amount, row.over, row.service))
        return Top(by=by, services=tuple(ranked[:most]))

    async def live(self, service: str) -> int:
        """Connections of one service, those that wait included."""
        ticket, queue = self._ticket()
        total = 0
        try:
            self._engine.ask_usage(ticket, [service])
            async with asyncio.timeout(_ANSWERS_WITHIN_S):
                for _ in range(self._engine.workers):
                    answer = await queue.get()
                    assert isinstance(answer, Usage)
                    total += sum(row.live + row.parked for row in answer.rows)
        except TimeoutError:
            # A worker that has ended has none.
            if self._engine.running:
                raise _slow() from None
        finally:
            del self._waiting[ticket]
        return total

    async def _busiest_of(self, worker: int, by: str) -> tuple[dict[str, tuple[int, int]], int]:
        """A worker's busiest services, with amount and what of it may be others'; and what any other may have."""
        rows: dict[str, tuple[int, int]] = {}
        least, place = 0, 0
        while True:
            start = place
            answer = await self._answer(
                lambda ticket, start=start: self._engine.ask_busiest(worker, ticket, by, start, MOST_ROWS)  # type: ignore[misc]
            )
            if not isinstance(answer, Busiest):
                return rows, least
            least = max(least, answer.least)
            rows |= {service: (amount, over) for service, amount, over in answer.services}
            if len(rows) > _KEPT:
                ranked = sorted(rows.items(), key=lambda row: -row[1][0])
                least = max(least, ranked[_KEPT][1][0])
                rows = dict(ranked[:_KEPT])
            if answer.next is None:
                return rows, least
            place = answer.next

    async def _answer(self, ask: Callable[[int], bool]) -> Question | None:
        """What a worker says; None if it works no more."""
        ticket, queue = self._ticket()
        try:
            if not ask(ticket):
                return None
            async with asyncio.timeout(_ANSWERS_WITHIN_S):
                return await queue.get()
        except TimeoutError:
            if not self._engine.running:
                return None
            raise _slow() from None
        finally:
            del self._waiting[ticket]

    def _ticket(self) -> tuple[int, asyncio.Queue[Question]]:
        ticket, queue = next(self._tickets), asyncio.Queue[Question]()
        self._waiting[ticket] = queue
        return ticket, queue

    def _row(self, seen: SeenConnection) -> Connection:
        return Connection(
            id=f"{seen.id:016x}",
            peer=None if seen.peer is None else str(seen.peer),
            service=seen.service,
            state=seen.state,
            age_s=round(seen.age_s, 6),
            bytes_up=seen.bytes_up,
            bytes_down=seen.bytes_down,
            listener=self._listeners[seen.listener] if seen.listener < len(self._listeners) else "",
        )


def _slow() -> Refused:
    return Refused("slow", "a worker does not answer", remedy="ask again")


def _cursor(after: str | None) -> tuple[int, int]:
    if after is None:
        return 0, 0
    worker, _, place = after.partition(".")
    try:
        return int(worker), min(int(place), 2**32 - 1)
    except ValueError:
        raise Refused("invalid", "is no page", field="after", value=after, remedy="give `next` of a page") from None


def _network(source: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(source, strict=False)
    except ValueError:
        remedy = "give an address, or a prefix such as 192.0.2.0/24 or 2001:db8::/64"
        raise Refused("invalid", "is no address and no prefix", field="source", value=source, remedy=remedy) from None
