"""The process of the API: uvicorn on the inherited control socket, for as long as there are clients.

Decides who is listened to at all, how long a client may be silent, and when the process ends: without losing anybody,
for what it does not accept stays in the backlog that the supervisor watches. Knows no verb.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fourtuple.control import api
from fourtuple.control.peers import Access, Caller
from fourtuple.control.remote import Remote

MOST_CLIENTS = 64
_FIRST_REQUEST_S = 10.0
_LINGER_S = 1.0
_LINGER_BYTES = 1 << 20
_MOST_HEAD_BYTES = 16_384
_GLANCE_S = 0.25


class _Life:
    """What all connections share: who may come, and when the last one was there."""

    def __init__(self, access: Access, remote: Remote) -> None:
        self.access, self.remote = access, remote
        self.seen_s = time.monotonic()
        self.tasks: set[asyncio.Task[None]] = set()

    def deny(self, uid: int | None) -> None:
        """Have it counted."""
        task = asyncio.get_running_loop().create_task(self.remote.told_denied(uid))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class _Protocol(H11Protocol):
    """uvicorn's connection, of whose peer the kernel is asked first."""

    life: _Life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Look who it is; who may do nothing is told so, unheard."""
        self.life.seen_s = time.monotonic()
        self._unheard, self._lingered = False, 0
        try:
            caller = Caller.of(transport.get_extra_info("socket"))
            role = self.life.access.role(caller)
        except OSError:
            caller, role = None, None
        super().connection_made(transport)
        if caller is None or role is None:
            self.life.deny(caller.uid if caller is not None else None)
            self._unheard = True
            transport.write(_forbidden(caller))
            transport.write_eof()
            self.loop.call_later(_LINGER_S, transport.close)
            return
        self.app_state = {**self.app_state, "uid": caller.uid, "role": role, "deny": self.life.deny}
        self.loop.call_later(_FIRST_REQUEST_S, self._expect_request)

    def _expect_request(self) -> None:
        if self.cycle is None and not self._unheard:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Hear it, if it may be heard."""
        if self._unheard:
            # Thrown away, so that closing is no error over there before the answer is read.
            self._lingered += len(data)
            if self._lingered > _LINGER_BYTES:
                self.transport.abort()
            return
        self.life.seen_s = time.monotonic()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self.life.seen_s = time.monotonic()
        super().connection_lost(exc)


def _forbidden(caller: Caller | None) -> bytes:
    problem = api.problem(
        403,
        "the control socket is not for this user",
        field="user",
        value=str(caller.uid) if caller is not None else None,
        remedy="have it named among readers or admins in [control] of broker.toml",
    )
    body = json.dumps(problem).encode()
    head = (
        "HTTP/1.1 403 Forbidden\r\nContent-Type: application/problem+json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _serve(listener: socket.socket, verbs: socket.socket, access: Access, idle_s: float) -> None:
    remote = Remote(verbs)
    life = _Life(access, remote)
    protocol = type("Protocol", (_Protocol,), {"life": life})
    config = uvicorn.Config(
        api.made(remote),
        http=protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CLIENTS,
        backlog=MOST_CLIENTS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=_MOST_HEAD_BYTES,
    )
    server = uvicorn.Server(config)
    loop = asyncio.get_running_loop()
    answers = loop.create_task(remote.run())
    answers.add_done_callback(lambda _: setattr(server, "should_exit", True))
    idle = loop.create_task(_end_when_idle(server, life, idle_s))
    await server.serve(sockets=[listener])
    idle.cancel()
    answers.cancel()
    await asyncio.gather(idle, answers, return_exceptions=True)


async def _end_when_idle(server: uvicorn.Server, life: _Life, idle_s: float) -> None:
    while not server.started:
        await asyncio.sleep(_GLANCE_S / 10)
    await life.remote.told_ready()
    life.seen_s = time.monotonic()
    while True:
        await asyncio.sleep(min(_GLANCE_S, idle_s))
        state = server.server_state
        if state.connections or state.tasks:
            continue
        if time.monotonic() - life.seen_s < idle_s:
            continue
        # From here on nobody is accepted; whoever was just now is served before the end.
        for one in server.servers:
            one.close()
        await asyncio.sleep(0)
        until_s = time.monotonic() + 2 * _FIRST_REQUEST_S
        while (state.connections or state.tasks) and time.monotonic() < until_s:
            await asyncio.sleep(_GLANCE_S)
        server.should_exit = True
        return


def main(arguments: list[str] | None = None) -> int:
    """Serve on inherited descriptors; started by `door.Door` and by nobody else."""
    parser = argparse.ArgumentParser(prog="python -m fourtuple.control", description=__doc__)
    parser.add_argument("--listener", type=int, required=True)
    parser.add_argument("--verbs", type=int, required=True)
    parser.add_argument("--access", required=True)
    parser.add_argument("--idle", type=float, required=True)
    given = parser.parse_args(arguments)
    listener, verbs = socket.socket(fileno=given.listener), socket.socket(fileno=given.verbs)
    for one in (listener, verbs):
        one.setblocking(False)
        one.set_inheritable(False)
    # Ctrl-C on the terminal is the supervisor's to hear; this process ends with it.
    _serve_until_over(listener, verbs, Access.loaded(given.access), given.idle)
    return 0


def _serve_until_over(listener: socket.socket, verbs: socket.socket, access: Access, idle_s: float) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server: Any = _serve(listener, verbs, access, idle_s)
    asyncio.run(server)


if __name__ == "__main__":
    sys.exit(main())
