"""Verbs between two processes: what crosses is what was said, and whoever breaks the rules is hung up on."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import socket
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourtuple.control.peers import Access, Caller, Role
from fourtuple.control.remote import CALLER, Remote
from fourtuple.control.verbs import (
    MOST_BYTES,
    VERBS,
    Broken,
    Connection,
    Connections,
    Controlled,
    FailureRow,
    Limits,
    Numbers,
    Refused,
    ServiceView,
    Spread,
    Standings,
    Status,
    Tally,
    Top,
    TopRow,
    Upgrade,
    serve_verbs,
)
from fourtuple.errors import BadConfig


class Broker:
    """A `Controlled` that says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[object, ...]]] = []
        self.hold = asyncio.Event()

    async def status(self) -> Status:
        await self.hold.wait()
        raise Refused("conflict", "held")

    async def numbers(self) -> Numbers:
        return Numbers(
            version="1",
            carrier="epoll",
            counters={"accepts_succeeded": 3},
            failures=(FailureRow(step="connect", errno="EAGAIN", count=1),),
            delivery=Spread(count=1, mean=2, p50=3, p90=4, p99=5, p999=6),
            services=Standings(known=1),
            processes=(),
        )

    async def connections(self, after: str | None, most: int, service: str | None, source: str | None) -> Connections:
        self.asked.append(("connections", (after, most, service, source)))
        row = Connection(
            id="0" * 16,
            peer=None,
            service="é" * 300,
            state="relaying",
            age_s=1.5,
            bytes_up=2**63,
            bytes_down=0,
            listener="[::]:443",
        )
        return Connections(connections=(row,) * most, next="0.5")

    async def close_connection(self, id: str) -> None:
        raise Refused("absent", "there is none", field="id", value=id, remedy="look")

    async def top(self, by: str, most: int) -> Top:
        return Top(by=by, services=(TopRow(service="a", amount=5, over=1),))

    async def service(self, name: str) -> ServiceView:
        return ServiceView(name=name, target="unix:/a", delivery="relay", standing="awake", pids=(1, 2))

    async def reasons(self) -> dict[str, int]:
        return {"relayed": 1}

    async def failures(self) -> tuple[FailureRow, ...]:
        return (FailureRow(step="connect", errno="EAGAIN", count=1),)

    async def wake(self, service: str, wait_s: float) -> ServiceView:
        return await self.service(service)

    async def stop(self, service: str, wait_s: float) -> ServiceView:
        return await self.service(service)

    async def drain(self, grace_s: float | None) -> None:
        self.asked.append(("drain", (grace_s,)))

    async def limits(self) -> Limits:
        return Limits(most_connections=1, most_per_source=2, most_per_service=3)

    async def set_limits(self, changes: Mapping[str, int]) -> Limits:
        return Limits(**({"most_connections": 1, "most_per_source": 2, "most_per_service": 3} | dict(changes)))

    async def upgrade(self, executable: str | None) -> Upgrade:
        return Upgrade(state="running", began=1.0)

    async def reload(self) -> None:
        pass


def both(play: Callable[[Remote, Broker, socket.socket], Coroutine[Any, Any, None]]) -> tuple[Tally, list[Any]]:
    """A remote and what it is the remote of; gives back the tally, and what was said in the log."""
    said: list[Any] = []
    tally = Tally()

    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            broker, remote = Broker(), Remote(theirs)
            serving = asyncio.create_task(
                serve_verbs(broker, ours, tally=tally, say=lambda event, **fields: said.append((event, fields)))
            )
            answers = asyncio.create_task(remote.run())
            try:
                await play(remote, broker, theirs)
                theirs.shutdown(socket.SHUT_RDWR)
                await serving
            finally:
                serving.cancel()
                answers.cancel()
                await asyncio.gather(serving, answers, return_exceptions=True)

    asyncio.run(asyncio.wait_for(main(), 30))
    return tally, said


def test_verbs_are_exactly_the_methods_with_their_arguments() -> None:
    methods = {name: one for name, one in vars(Controlled).items() if inspect.iscoroutinefunction(one)}
    assert {name: list(inspect.signature(one).parameters)[1:] for name, one in methods.items()} == {
        verb.name: list(verb.arguments) for verb in VERBS.values()
    }
    assert all(inspect.iscoroutinefunction(getattr(Remote, name)) for name in methods)


def test_what_is_said_arrives_as_it_was() -> None:
    async def play(remote: Remote, broker: Broker, _: socket.socket) -> None:
        here = Broker()
        assert await remote.numbers() == await here.numbers()
        assert await remote.connections("0.1", 2, None, "192.0.2.0/24") == await here.connections("", 2, None, None)
        assert broker.asked == [("connections", ("0.1", 2, None, "192.0.2.0/24"))]
        assert await remote.service("a") == await here.service("a")
        assert await remote.top("live", 5) == await here.top("live", 5)
        assert await remote.failures() == await here.failures()
        assert await remote.reasons() == {"relayed": 1}
        assert await remote.set_limits({"most_per_source": 9}) == await here.set_limits({"most_per_source": 9})
        assert await remote.upgrade(None) == Upgrade(state="running", began=1.0)
        assert (await remote.raw_numbers())["control"]["requests"] == 9
        CALLER.set(1234)
        await remote.drain(0.5)
        with pytest.raises(Refused, match="there is none") as refused:
            await remote.close_connection("ab")
        assert (refused.value.kind, refused.value.field, refused.value.value) == ("absent", "id", "ab")

    tally, said = both(play)
    assert (tally.requests, tally.refused) == (11, 1)
    assert [(event, fields["verb"], fields["uid"]) for event, fields in said] == [
        ("control_told", "set_limits", None),
        ("control_told", "upgrade", None),
        ("control_told", "drain", 1234),
        ("control_told", "close_connection", 1234),
    ]


def test_an_answer_that_is_too_long_is_refused_and_the_next_one_is_heard() -> None:
    async def play(remote: Remote, broker: Broker, _: socket.socket) -> None:
        with pytest.raises(Refused, match="are the most"):
            await remote.connections(None, 256, None, None)
        assert await remote.reasons() == {"relayed": 1}

    both(play)


def test_one_that_waits_holds_up_no_other_and_no_more_is_read_than_is_answered() -> None:
    async def play(remote: Remote, broker: Broker, theirs: socket.socket) -> None:
        waiting = [asyncio.create_task(remote.status()) for _ in range(15)]
        assert await remote.reasons() == {"relayed": 1}
        waiting += [asyncio.create_task(remote.status()) for _ in range(200)]
        blocked = asyncio.create_task(remote.reasons())
        await asyncio.sleep(0.05)
        assert not blocked.done()
        broker.hold.set()
        assert await blocked == {"relayed": 1}
        assert {str(one) for one in await asyncio.gather(*waiting, return_exceptions=True)} == {"held"}

    tally, _ = both(play)
    assert tally.refused == 215


RULES = [
    b"{",
    b"[]",
    b"\xff",
    b"[" * 50_000,
    b'{"n":1}',
    b'{"n":"1","verb":"status","with":{}}',
    b'{"n":1,"verb":"run","with":{}}',
    b'{"n":1,"verb":"__init__","with":{}}',
    b'{"n":1,"verb":["status"],"with":{}}',
    b'{"n":1,"verb":"status","with":{"a":1}}',
    b'{"n":1,"verb":"wake","with":{"service":""}}',
    b'{"n":1,"verb":"wake","with":{"service":"a","wait_s":61}}',
    b'{"n":1,"verb":"wake","with":{"service":"a","wait_s":NaN}}',
    b'{"n":1,"verb":"connections","with":{"after":null,"most":257,"service":null,"source":null}}',
    b'{"n":1,"verb":"set_limits","with":{"changes":{}}}',
    b'{"n":1,"verb":"set_limits","with":{"changes":{"most":1}}}',
    b'{"n":1,"verb":"set_limits","with":{"changes":{"most_connections":-1}}}',
    b'{"n":1,"verb":"set_limits","with":{"changes":{"most_connections":true}}}',
    json.dumps({"n": 1, "verb": "service", "with": {"name": "x" * 2_000}}).encode(),
    b" " * (MOST_BYTES + 1),
]


@pytest.mark.parametrize("message", RULES, ids=lambda message: str(message[:60]))
def test_who_breaks_the_rules_is_hung_up_on(message: bytes) -> None:
    async def broken() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            theirs.send(message)
            with pytest.raises(Broken):
                await serve_verbs(Broker(), ours, tally=Tally())

    asyncio.run(asyncio.wait_for(broken(), 30))


@given(
    st.binary(max_size=400)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([*VERBS]),
        lambda one: (
            st.lists(one, max_size=4) | st.dictionaries(st.sampled_from(["n", "verb", "with", "by", "tell", "a"]), one)
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
@settings(max_examples=300, deadline=None)
def test_any_message_is_answered_or_broken(message: bytes) -> None:
    async def play() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            broker = Broker()
            broker.hold.set()
            theirs.send(message)
            theirs.shutdown(socket.SHUT_WR)
            with contextlib.suppress(Broken):
                await serve_verbs(broker, ours, tally=Tally())

    asyncio.run(play())


def test_who_takes_no_answers_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourtuple.control.verbs._SENT_WITHIN_S", 0.05)

    async def stuck() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            serving = asyncio.create_task(serve_verbs(Broker(), ours, tally=Tally()))
            ask = {"n": 1, "verb": "connections", "with": {"after": None, "most": 60, "service": None, "source": None}}
            while not serving.done():
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    theirs.send(json.dumps(ask).encode())
                await asyncio.sleep(0.001)
            with pytest.raises(Broken, match="takes no answers"):
                await serving

    asyncio.run(asyncio.wait_for(stuck(), 30))


# ---- peers ---------------------------------------------------------------------------------------------------------


def test_a_peer_is_whom_the_kernel_says() -> None:
    one, other = socket.socketpair()
    with one, other:
        caller = Caller.of(one)
    assert (caller.pid, caller.uid) == (os.getpid(), os.geteuid())
    assert set(os.getgroups()) | {os.getegid()} == caller.groups


def test_roles() -> None:
    access = Access(
        owner=500,
        reader_users=frozenset({10}),
        reader_groups=frozenset({20}),
        admin_users=frozenset({30}),
        admin_groups=frozenset({40}),
    )

    def role(uid: int, *groups: int) -> Role | None:
        return access.role(Caller(pid=1, uid=uid, groups=frozenset(groups)))

    assert [role(0), role(500), role(30), role(7, 40), role(10, 40)] == [Role.ADMIN] * 5
    assert [role(10), role(7, 1, 20)] == [Role.READER] * 2
    assert [role(7), role(20), role(40), role(0xFFFF_FFFF, 0xFFFF_FFFF)] == [None] * 4
    assert Access.loaded(access.dumped()) == access


def test_names_are_looked_up_once_and_unknown_ones_are_errors() -> None:
    access = Access.named(["root", "65534"], ["group:root", "group:7"])
    assert (access.reader_users, access.admin_groups) == (frozenset({0, 65534}), frozenset({0, 7}))
    for readers, admins, field in ((["no-such-user"], [], "readers"), ([], ["group:no-such-group"], "admins")):
        with pytest.raises(BadConfig, match=f"control.{field}: there is no"):
            Access.named(readers, admins)
