"""Sniffers in Python as a broker asks them: a process of their own, killed and made anew when it does not answer.

Decides how long a question may take, how many may wait, and what a plug-in's trouble is counted as. Whatever happens,
the answer to a question is an opinion, in time: No, where there is none. Knows no connection and no route.
"""

from __future__ import annotations

import asyncio
import json
import pwd
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

from msgspec import Struct

from fourtuple.plugin import MESSAGE_BYTES

MOST_WAITING = 256
"""Questions that wait for one process; of more nobody knows anything."""
LOADS_WITHIN_S = 10.0
_BACKOFF_S = (0.1, 30.0)

Opinion: TypeAlias = dict[str, Any]
Log: TypeAlias = Callable[..., None]
_NO: Opinion = {"verdict": "no"}


class Plugin(Struct, frozen=True, kw_only=True):
    """`[[plugin]]`: a module whose sniffers are asked, and what they may use."""

    module: str
    limit_ms: int = 100
    """For one question."""
    memory_mb: int = 512
    """Address space of its process."""
    user: str | None = None
    """Whose its process is; if not given, the broker's supervisor's."""


class _Trouble(Exception):
    def __init__(self, reason: str) -> None:
        self.reason = reason


class PluginProcess:
    """One plug-in's process, while there is one. Made within a running event loop."""

    def __init__(self, plugin: Plugin, log: Log) -> None:
        self.plugin = plugin
        self.counts: Counter[str] = Counter()
        """asked, matched, no, more, and what went wrong: raised, late, died, failed, busy, down."""
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._down_until_s = 0.0
        self._pause_s = _BACKOFF_S[0]

    async def ask(self, opening: bytes, *, is_all: bool) -> Opinion:
        """What its functions say; No if they cannot say it."""
        self.counts["asked"] += 1
        if self._waiting >= MOST_WAITING:
            self.counts["busy"] += 1
            return _NO
        self._waiting += 1
        try:
            async with self._turn:
                opinion = await self._asked(opening, is_all=is_all)
        except _Trouble as trouble:
            self.counts[trouble.reason] += 1
            return _NO
        finally:
            self._waiting -= 1
        for name, why in opinion.get("raised", {}).items():
            self.counts["raised"] += 1
            self._log("plugin_raised", module=self.plugin.module, sniffer=name, why=why)
        verdict = opinion.get("verdict")
        self.counts["matched" if verdict == "match" else str(verdict)] += 1
        return opinion

    def close(self) -> None:
        """End the process."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._channel = None

    async def _asked(self, opening: bytes, *, is_all: bool) -> Opinion:
        channel = await self._running()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.plugin.limit_ms / 1000):
                await loop.sock_sendall(channel, bytes([is_all]) + opening)
                answer = await loop.sock_recv(channel, MESSAGE_BYTES)
            opinion = json.loads(answer)
        except TimeoutError:
            self._ended("plugin_late")
            raise _Trouble("late") from None
        except (OSError, ValueError):
            # Nothing, or no JSON: it has died of its memory, or by a call of its own.
            self._ended("plugin_died")
            raise _Trouble("died") from None
        self._pause_s = _BACKOFF_S[0]
        assert isinstance(opinion, dict)
        return opinion

    async def _running(self) -> socket.socket:
        """Its channel, made if there is none. Raises _Trouble while it is not to be tried."""
        if self._channel is not None:
            return self._channel
        loop = asyncio.get_running_loop()
        if loop.time() < self._down_until_s:
            raise _Trouble("down")
        self._begin()
        channel = self._channel
        assert channel is not None
        try:
            async with asyncio.timeout(LOADS_WITHIN_S):
                said = json.loads(await loop.sock_recv(channel, MESSAGE_BYTES))
            if "ready" not in said:
                raise ValueError(str(said.get("failed")))
        except (TimeoutError, OSError, ValueError) as error:
            self._ended("plugin_failed", why=str(error) or "it is not ready in time")
            raise _Trouble("failed") from None
        self._log("plugin_ready", module=self.plugin.module, sniffers=said["ready"])
        return channel

    def _begin(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        memory, user = self.plugin.memory_mb << 20, self.plugin.user
        whose: dict[str, Any] = {}
        if user is not None:
            entry = pwd.getpwnam(user)
            whose = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        with theirs:
            channel = str(theirs.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fourtuple.plugin", str(memory), channel, self.plugin.module],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                **whose,
            )
        self._channel = ours

    def _ended(self, event: str, **why: str) -> None:
        self.close()
        self._down_until_s = asyncio.get_running_loop().time() + self._pause_s
        self._pause_s = min(self._pause_s * 2, _BACKOFF_S[1])
        self._log(event, module=self.plugin.module, **why)


class Plugins:
    """All of a broker's, in the order of the file."""

    def __init__(self, plugins: tuple[Plugin, ...], log: Log) -> None:
        self._processes = [PluginProcess(plugin, log) for plugin in plugins]
        self._tasks: set[asyncio.Task[None]] = set()

    def sniff(self, question: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        """Have `answer` called with the opinion of a question, soon."""
        task = asyncio.create_task(self._sniff(question, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def counts(self) -> dict[str, dict[str, int]]:
        """By module, what became of the questions."""
        return {process.plugin.module: dict(process.counts) for process in self._processes}

    async def aclose(self) -> None:
        """End all processes."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.close()

    def close(self) -> None:
        """End all processes at once; who is asked again begins again."""
        for process in self._processes:
            process.close()

    async def _sniff(self, question: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        opening, is_all = bytes.fromhex(question["opening"]), bool(question["is_all"])
        more_than: int | None = None
        told = {key: question[key] for key in ("broker", "worker", "ticket")}
        for process in self._processes:
            opinion = await process.ask(opening, is_all=is_all)
            if opinion["verdict"] == "match":
                return answer({"kind": "opinion", **told, "protocol": opinion["protocol"], **opinion["fields"]})
            if opinion["verdict"] == "more":
                more_than = len(opening)
        answer({"kind": "opinion", **told, "more_than": more_than})
