"""The client libraries, each with a `SourcePool` and with its own source option: one class per library.

Decides how a connection is opened, held and named in each, and in which event loop, the same way whether a test or the
bench asks. An HTTP client's connection is held by a response whose body is not read.
"""

from __future__ import annotations

import asyncio
import inspect
import resource
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import anyio
import httpx
import httpx2
import requests
import trio
import urllib3

from fourtuple.connect import aiohttp as connect_aiohttp
from fourtuple.connect import anyio as connect_anyio
from fourtuple.connect import asyncio as connect_asyncio
from fourtuple.connect import blocking as connect_blocking
from fourtuple.connect import httpx as connect_httpx
from fourtuple.connect import httpx2 as connect_httpx2
from fourtuple.connect import requests as connect_requests
from fourtuple.connect import trio as connect_trio
from fourtuple.connect import urllib3 as connect_urllib3
from fourtuple.sources import SourcePool

TIMEOUT_S = 30.0
REQUESTS_PER_TRANSPORT = 50
"""httpcore walks over all connections of a pool at each request: many in one pool would measure that, and a hundredth
of a curve has to hold whole transports, or the walk is longer in one hundredth than in another."""
Name = tuple[Any, ...]


class Client:
    """Opens connections from `source`: a pool, or the one address for the library's own option ("" for none, in
    some)."""

    loop = ""
    """"asyncio" or "trio" if its methods are coroutines."""
    speaks_http = False

    def __init__(self, source: SourcePool | str) -> None:
        self.pool = source if isinstance(source, SourcePool) else None
        self.address = "" if isinstance(source, SourcePool) else source
        self.held: list[Any] = []


class Blocking(Client):
    def open(self, host: str, port: int) -> Name:
        if self.pool is None:
            own = (self.address, 0) if self.address else None
            one = socket.create_connection((host, port), TIMEOUT_S, source_address=own)
        else:
            one = connect_blocking.create_connection(self.pool, (host, port), TIMEOUT_S)
        self.held.append(one)
        return (one.getsockname()[:2], one.getpeername()[:2])

    def close(self) -> None:
        for one in self.held:
            one.close()
        self.held.clear()


class Asyncio(Client):
    loop = "asyncio"

    async def open(self, host: str, port: int) -> Name:
        if self.pool is None:
            own = (self.address, 0) if self.address else None
            _, writer = await asyncio.open_connection(host, port, local_addr=own)
        else:
            _, writer = await connect_asyncio.open_connection(self.pool, host, port)
        self.held.append(writer)
        return (writer.get_extra_info("sockname")[:2], writer.get_extra_info("peername")[:2])

    async def close(self) -> None:
        for one in self.held:
            one.close()
            await one.wait_closed()
        self.held.clear()


class AsyncioProtocol(Client):
    """A protocol and no streams."""

    loop = "asyncio"

    async def open(self, host: str, port: int) -> Name:
        transport: asyncio.Transport
        if self.pool is None:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_connection(asyncio.Protocol, host, port, local_addr=(self.address, 0))
        else:
            transport, _ = await connect_asyncio.create_connection(self.pool, asyncio.Protocol, host, port)
        self.held.append(transport)
        return (transport.get_extra_info("sockname")[:2], transport.get_extra_info("peername")[:2])

    async def close(self) -> None:
        for one in self.held:
            one.close()
        self.held.clear()
        await asyncio.sleep(0.05)  # transports close in the loop's next turns


class Trio(Client):
    loop = "trio"

    async def open(self, host: str, port: int) -> Name:
        stream: Any
        if self.pool is None:
            stream = await trio.open_tcp_stream(host, port, local_address=self.address)
        else:
            stream = await connect_trio.open_tcp_stream(self.pool, host, port)
        self.held.append(stream)
        return (stream.socket.getsockname()[:2], stream.socket.getpeername()[:2])

    async def close(self) -> None:
        for one in self.held:
            await one.aclose()
        self.held.clear()


class Anyio(Client):
    loop = "asyncio"

    async def open(self, host: str, port: int) -> Name:
        if self.pool is None:
            stream = await anyio.connect_tcp(host, port, local_host=self.address)
        else:
            stream = await connect_anyio.connect_tcp(self.pool, host, port)
        self.held.append(stream)
        return (
            stream.extra(anyio.abc.SocketAttribute.local_address)[:2],
            stream.extra(anyio.abc.SocketAttribute.remote_address)[:2],
        )

    async def close(self) -> None:
        for one in self.held:
            await one.aclose()
        self.held.clear()


class AnyioOnTrio(Anyio):
    loop = "trio"


class Aiohttp(Client):
    loop = "asyncio"
    speaks_http = True

    def __init__(self, source: SourcePool | str) -> None:
        super().__init__(source)
        self.session: aiohttp.ClientSession | None = None

    async def open(self, host: str, port: int) -> Name:
        if self.session is None:
            connector = (
                aiohttp.TCPConnector(local_addr=(self.address, 0), limit=0)
                if self.pool is None
                else connect_aiohttp.SourceConnector(self.pool, limit=0)
            )
            self.session = aiohttp.ClientSession(connector=connector)
        response = await self.session.get(f"http://{host}:{port}/")
        response.raise_for_status()
        assert response.connection is not None
        assert response.connection.transport is not None
        self.held.append(response)
        transport = response.connection.transport
        return (transport.get_extra_info("sockname")[:2], transport.get_extra_info("peername")[:2])

    async def close(self) -> None:
        for one in self.held:
            one.close()
        self.held.clear()
        if self.session is not None:
            await self.session.close()
            await asyncio.sleep(0.05)  # as aiohttp's documentation asks: transports close in the loop's next turns


class Httpx(Client):
    speaks_http = True
    library: Any = httpx
    ours: Any = connect_httpx

    def __init__(self, source: SourcePool | str) -> None:
        super().__init__(source)
        self.clients: list[Any] = []

    def open(self, host: str, port: int) -> Name:
        if len(self.held) % REQUESTS_PER_TRANSPORT == 0:
            limits = self.library.Limits(max_connections=None)
            transport = (
                self.library.HTTPTransport(local_address=self.address, verify=False, limits=limits)
                if self.pool is None
                else self.ours.SourceTransport(self.pool, verify=False, limits=limits)
            )
            self.clients.append(self.library.Client(transport=transport, trust_env=False, timeout=TIMEOUT_S))
        client = self.clients[-1]
        response = client.send(client.build_request("GET", f"http://{host}:{port}/"), stream=True)
        response.raise_for_status()
        self.held.append(response)
        stream = response.extensions["network_stream"]
        return (stream.get_extra_info("client_addr")[:2], stream.get_extra_info("server_addr")[:2])

    def close(self) -> None:
        for one in self.held:
            one.close()
        self.held.clear()
        for client in self.clients:
            client.close()


class AsyncHttpx(Client):
    loop = "asyncio"
    speaks_http = True
    library: Any = httpx
    ours: Any = connect_httpx

    def __init__(self, source: SourcePool | str) -> None:
        super().__init__(source)
        self.clients: list[Any] = []

    async def open(self, host: str, port: int) -> Name:
        if len(self.held) % REQUESTS_PER_TRANSPORT == 0:
            limits = self.library.Limits(max_connections=None)
            transport = (
                self.library.AsyncHTTPTransport(local_address=self.address, verify=False, limits=limits)
                if self.pool is None
                else self.ours.AsyncSourceTransport(self.pool, verify=False, limits=limits)
            )
            self.clients.append(self.library.AsyncClient(transport=transport, trust_env=False, timeout=TIMEOUT_S))
        client = self.clients[-1]
        response = await client.send(client.build_request("GET", f"http://{host}:{port}/"), stream=True)
        response.raise_for_status()
        self.held.append(response)
        stream = response.extensions["network_stream"]
        return (stream.get_extra_info("client_addr")[:2], stream.get_extra_info("server_addr")[:2])

    async def close(self) -> None:
        for one in self.held:
            await one.aclose()
        self.held.clear()
        for client in self.clients:
            await client.aclose()


class AsyncHttpxOnTrio(AsyncHttpx):
    loop = "trio"


class Httpx2(Httpx):
    library = httpx2
    ours = connect_httpx2


class AsyncHttpx2(AsyncHttpx):
    library = httpx2
    ours = connect_httpx2


class Urllib3(Client):
    speaks_http = True

    def __init__(self, source: SourcePool | str) -> None:
        super().__init__(source)
        self.manager = (
            urllib3.PoolManager(num_pools=100, source_address=(self.address, 0))
            if self.pool is None
            else connect_urllib3.SourcePoolManager(self.pool, num_pools=100)
        )

    def open(self, host: str, port: int) -> Name:
        response = self.manager.request(
            "GET", f"http://{host}:{port}/", preload_content=False, retries=False, timeout=TIMEOUT_S
        )
        assert response.status == 200
        self.held.append(response)
        connected: Any = response.connection
        return (connected.sock.getsockname()[:2], connected.sock.getpeername()[:2])

    def close(self) -> None:
        for one in self.held:
            one.close()
        self.held.clear()
        self.manager.clear()


class _NaiveAdapter(requests.adapters.HTTPAdapter):
    """What `requests_toolbelt.SourceAddressAdapter` does."""

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__()

    def init_poolmanager(self, *positional: Any, **named: Any) -> None:  # noqa: ANN401
        super().init_poolmanager(*positional, source_address=(self.address, 0), **named)


class Requests(Client):
    speaks_http = True

    def __init__(self, source: SourcePool | str) -> None:
        super().__init__(source)
        self.session = requests.Session()
        self.session.trust_env = False
        adapter = (
            _NaiveAdapter(self.address)
            if self.pool is None
            else connect_requests.SourceAdapter(self.pool, pool_connections=100)
        )
        self.session.mount("http://", adapter)

    def open(self, host: str, port: int) -> Name:
        response = self.session.get(f"http://{host}:{port}/", stream=True, timeout=TIMEOUT_S)
        response.raise_for_status()
        self.held.append(response)
        connected: Any = response.raw.connection
        return (connected.sock.getsockname()[:2], connected.sock.getpeername()[:2])

    def close(self) -> None:
        for one in self.held:
            one.close()
        self.held.clear()
        self.session.close()


CLIENTS: dict[str, type[Client]] = {
    "blocking": Blocking,
    "asyncio": Asyncio,
    "asyncio-protocol": AsyncioProtocol,
    "uvloop": Asyncio,
    "trio": Trio,
    "anyio": Anyio,
    "anyio-trio": AnyioOnTrio,
    "aiohttp": Aiohttp,
    "httpx": Httpx,
    "httpx-async": AsyncHttpx,
    "httpx-trio": AsyncHttpxOnTrio,
    "httpx2": Httpx2,
    "httpx2-async": AsyncHttpx2,
    "urllib3": Urllib3,
    "requests": Requests,
}


def run(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a program that uses one of the clients in the event loop it needs, with all descriptors it may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if CLIENTS[name].loop == "trio":
        trio.run(work)
    elif name == "uvloop":
        import uvloop

        uvloop.run(work())
    else:
        asyncio.run(work())


async def maybe(result: Any) -> Any:  # noqa: ANN401
    """The result of a method that is a coroutine in some of the clients."""
    return await result if inspect.isawaitable(result) else result
