"""An ASGI application under uvicorn whose connections a broker hands over: `scope["client"]` is the client itself.

Decides how uvicorn gets its connections; the rest of a server's life (lifespan, signals, logs, protocols) is uvicorn's.
Knows no broker; needs the extra `asgi`. `python -m fourtuple.asgi app:app --handoff /run/shop` takes uvicorn's options
but those that say where to listen; for several processes there is `fourtuple run --handoff` with `uvicorn --workers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
from typing import Any

import click
import uvicorn
from uvicorn.config import LOGGING_CONFIG, STARTUP_FAILURE
from uvicorn.main import main as uvicorns

from fourtuple.errors import BadConfig
from fourtuple.service import Handed, Listener, Reader

_FIRST_BYTES_S = 0.1
"""The broker has seen them, so that they are there; uvicorn closes a connection that has not begun when it ends."""
_NOT_OURS = ("host", "port", "uds", "fd", "workers", "backlog", "version", "reload")


class Server(uvicorn.Server):
    """uvicorn's server; it takes its connections off `listener`, and listens on nothing."""

    def __init__(self, config: uvicorn.Config, listener: Listener) -> None:
        """Take over `listener`: it is closed when the server ends."""
        super().__init__(config)
        self._listener = listener
        self._reader: Reader | None = None
        self._beginning: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then take clients."""
        await super().startup(sockets=[])
        self._reader = Reader(self._listener, self._taken)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve who is queued already, then end as uvicorn does."""
        if self._reader is not None and not self.force_exit:
            self._reader.drain()
            await asyncio.sleep(_FIRST_BYTES_S)
        await super().shutdown(sockets)

    def _taken(self, handed: Handed) -> None:
        task = asyncio.get_running_loop().create_task(self._begin(handed.socket))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    async def _begin(self, client: socket.socket) -> None:
        loop, config = asyncio.get_running_loop(), self.config
        try:
            await loop.connect_accepted_socket(self._protocol, client, ssl=config.ssl)
        except (OSError, asyncio.CancelledError):
            # A client that is gone again, or speaks no TLS; asyncio's own servers say nothing of those either.
            client.close()

    def _protocol(self) -> asyncio.Protocol:
        """As `uvicorn.Server.startup` makes one."""
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


def run(config: uvicorn.Config, path: str | os.PathLike[str], *, mode: int = 0o600) -> Server:
    """Serve until a signal ends it; `mode` as of `Listener`."""
    if not config.loaded:
        config.load()
    with Listener(path, mode=mode) as listener:
        server = Server(config, listener)
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    return server


def _serve(handoff: str, mode: str, headers: list[str], app_dir: str, **options: Any) -> None:  # noqa: ANN401
    sys.path.insert(0, app_dir or ".")
    options["log_config"] = options["log_config"] or LOGGING_CONFIG
    options["headers"] = [tuple(header.split(":", 1)) for header in headers]
    if not re.fullmatch("[0-7]{3}", mode):
        raise click.BadOptionUsage("--mode", "--mode needs three octal digits, such as 660")
    try:
        server = run(uvicorn.Config(**options), handoff, mode=int(mode, 8))
    except BadConfig as error:
        raise click.UsageError(f"{error}") from None
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def main() -> None:
    """The command: uvicorn's, less what says where to listen."""
    theirs = [option for option in uvicorns.params if option.name and not option.name.startswith(_NOT_OURS)]
    ours = [
        click.Option(["--handoff"], required=True, metavar="PATH", help="Where the broker hands sockets over."),
        click.Option(["--mode"], default="600", show_default=True, help="Permissions of PATH: who may do that."),
    ]
    click.Command("python -m fourtuple.asgi", params=[*theirs, *ours], callback=_serve, help="Serve APP.")()


if __name__ == "__main__":
    main()
